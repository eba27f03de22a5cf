/*
 * Scenario `cutover`: from `ready` on. Everything is copied; the way forward, the way back, and every kind of trouble.
 *
 *   coordinator A   holds lease 1 and cuts over; others may take it for dead, and then it is a zombie; it may be killed
 *   coordinator B   takes over at any time: numbers, settling, then one more attempt, forward or back; restarted if killed
 *   attendant       passes of the mirror, and settling what it believes abandoned, as late as it likes
 *   writers         both
 */

#define takes_writes(s) (shard[s].state == OPEN)
#define was_published(s) (s == SOURCE || catalog.newest > 0)
#define journal_is_needed(s) 1
#include "writers.pml"

#define wanted_state(d) (d == FORWARD -> READY : SWITCHED)

inline open_attempt(d) {
    look_at_number(catalog.lease == lease);
    d_step {                     /* (commit) */
        if
        :: lease_is_current && wanted_state(d) == catalog.state && catalog.newest < ATTEMPTS &&
           (catalog.newest == 0 || catalog.attempt[catalog.newest].outcome != UNDECIDED) ->
            HOLDS(I8, catalog.lease == lease);
            catalog.newest++;
            n = catalog.newest;
            catalog.attempt[n].outcome = UNDECIDED;
            catalog.attempt[n].direction = d;
            catalog.attempt[n].lease = lease;
            catalog.held = 1;
            ok = 1;
            printf("@ %d open_attempt | attempt %d from shard %d\n", me, n, d);
            printf("@ %d publish | the range is held\n", me)
        :: else -> ok = 0
        fi
    }
}

#ifdef WITHOUT_ATTEMPT_OPEN
#define is_undecided(n) (catalog.attempt[n].outcome != FLIPPED)
#else
#define is_undecided(n) (catalog.attempt[n].outcome == UNDECIDED)
#endif

/* The cutover. Whether it happened is found out by whoever asks: an answer that is lost changes nothing else. */
inline flip(d) {
    look_at_number(catalog.lease == lease);
    d_step {                     /* (commit) */
        if
        :: lease_is_current && is_undecided(n) && catalog.attempt[n].lease == lease &&
           wanted_state(d) == catalog.state ->
            printf("@ %d flip | attempt %d: shard %d owns the range\n", me, n, 1 - d);
            printf("@ %d publish | programs go to shard %d\n", me, 1 - d);
            HOLDS(I8, catalog.lease == lease);
            HOLDS(I4, shard[d].state != OPEN);
            HOLDS(I5, shard[0].row[0] == shard[1].row[0] && shard[0].row[1] == shard[1].row[1]);
            HOLDS(I5, shard[1 - (d)].row[0] == last[0] && shard[1 - (d)].row[1] == last[1]);
            catalog.attempt[n].outcome = FLIPPED;
            catalog.state = (d == FORWARD -> SWITCHED : READY);
            catalog.route = 1 - d;
            catalog.held = 0;
            owner = 1 - d
        :: else -> printf(". %d cannot flip | attempt %d\n", me, n)
        fi
    }
}

inline settle() {
#ifdef WITHOUT_ABANDON_FIRST
    if
    :: catalog.attempt[n].outcome == UNDECIDED -> d = catalog.attempt[n].direction; open_for(d)
    :: else
    fi;
#endif
    abandon();
    carry_out()
}

/* One attempt; whatever happens, it is settled at the end. */
inline cross(d) {
    open_attempt(d);
    if
    :: ok ->
        look_at_number(shard[d].lease == lease);
        close_begins(d);
        if
        :: ok -> close_commits(d)
        :: else
        fi;
        if
        :: ok ->
            do                   /* until a full look finds nothing more */
            :: catch_up(d);
               if
               :: pass.is_empty || pass.failed -> break
               :: else
               fi
            od;
            if
            :: !pass.failed ->
#ifdef WITHOUT_FLIP_FIRST
                outcome = FLIPPED;
                open_for(1 - d);
#endif
                flip(d)
            :: else
            fi
        :: else
        fi;
        settle()                 /* after a flip that is known, this asks and hears of it */
    :: else
    fi
}

inline forget_all() {
    forget_pass(); pass.is_empty = 0; pass.failed = 0; pass.carries = 0; pass.again = 0
}

proctype Coordinator(byte me; byte lease) {
    byte n, outcome;
    bit ok, d;
    Pass pass;
#ifdef WITHOUT_NUMBER_LOCK
    bit believed;
#endif
start:
    {
        if
        :: lease == 0 ->
            take_lease();
            raise_number(SOURCE);
            if
            :: ok -> raise_number(TARGET)
            :: else
            fi;
            if
            :: !ok -> goto ended
            :: else
            fi;
            n = catalog.newest;
            if
            :: n > 0 -> settle()
            :: else
            fi
        :: else
        fi;
        atomic { d = catalog.state == SWITCHED; n = 0; outcome = 0; ok = 0 };
        cross(d);
ended:
        skip
    } unless {
        has(crashed, me) ->
        d_step { crashed = crashed & ~bit_of(me); n = 0; outcome = 0; ok = 0; d = 0; forget_all() };
        if
        :: me == COORD_B -> lease = 0; goto start
        :: else
        fi
    }
    atomic { done = done | bit_of(me); n = 0; outcome = 0; ok = 0; d = 0; lease = 0; forget_all() }
}

proctype Attendant(byte me) {
    byte n, outcome, rounds;
    bit ok, d;
    Pass pass;
    do
    :: rounds < ROUNDS ->
        rounds++;
        if
        :: d = catalog.state == SWITCHED; catch_up(d); d = 0
        :: catalog.newest > 0 -> n = catalog.newest; settle()
        fi;
        atomic { n = 0; outcome = 0; ok = 0; forget_all() }
    :: else -> break
    od;
    atomic { done = done | bit_of(me); rounds = 0 }
}

#if FAULTS > 0
proctype Faults() {
end_no_more:
    do
    :: restart_server(SOURCE)
    :: restart_server(TARGET)
    :: lose_session(SOURCE, COORD_A)
    :: lose_session(TARGET, COORD_A)
    :: lose_session(SOURCE, ATTENDANT)
    :: lose_session(TARGET, ATTENDANT)
#ifndef NO_B                    /* else nobody would be there to go on */
    :: kill(COORD_A)
    :: kill(COORD_B)
#endif
    od
}
#endif

#define EVERYBODY (bit_of(WRITER_RC) | bit_of(WRITER_RR) | bit_of(COORD_A) | bit_of(COORD_B) | bit_of(ATTENDANT))

init {
    atomic {
        catalog.lease = 1; catalog.state = READY; catalog.route = SOURCE; owner = SOURCE;
        shard[SOURCE].state = OPEN; shard[SOURCE].is_open = 1; shard[SOURCE].standing = OWNER;
        shard[SOURCE].whole = 1; shard[SOURCE].armed = 1; shard[SOURCE].lease = 1;
        shard[TARGET].state = CLOSED; shard[TARGET].standing = MIRROR; shard[TARGET].whole = 1;
        shard[TARGET].armed = 1; shard[TARGET].lease = 1;
        run_writers();
        run Coordinator(COORD_A, 1);
#ifdef NO_B
        done = done | bit_of(COORD_B);
#else
        run Coordinator(COORD_B, 0);
#endif
#ifdef NO_ATTENDANT
        done = done | bit_of(ATTENDANT);
#else
        run Attendant(ATTENDANT);
#endif
#if FAULTS > 0
        run Faults();
#endif
        skip
    };
    done == EVERYBODY;
    assert(catalog.newest == 0 || catalog.attempt[catalog.newest].outcome != UNDECIDED);
    assert(!catalog.held && catalog.route == owner);
    HOLDS(I4, shard[owner].state == OPEN && shard[owner].is_open && shard[owner].standing == OWNER);
    HOLDS(I4, shard[1 - owner].state == CLOSED && !shard[1 - owner].is_open && shard[1 - owner].standing == MIRROR);
    assert(shard[owner].row[0] == last[0] && shard[owner].row[1] == last[1])
}
