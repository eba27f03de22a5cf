/*
 * Scenario `ending`: complete, rollback before the last batch, rollback after a revert; and what the dead may do later.
 *
 *   coordinator A   ends the move; others may take it for dead, and then it is a zombie; it may be killed
 *   coordinator B   takes over at any time, and goes on
 *   attendant       one pass, in the direction that it read some time ago
 *   later           when the move is over, another one may bring the range to the other shard
 *   writers         both
 */

bit ended[2];                    /* the row that stays: the move is over on this shard */
bit ever_owned;                  /* ghost: the side that gives the range up has owned it */
bit moved_on;                    /* ghost: a later move has brought the range to the other shard */

#define takes_writes(s) ((!shard[s].armed || shard[s].state == OPEN) && !shard[s].kept)
#define was_published(s) (s == SOURCE || ever_owned)
#ifdef WITHOUT_RETIRE              /* the others look for other damage than this one does */
#define journal_is_needed(s) 0
#else
#define journal_is_needed(s) receives(1 - (s))
#endif
#include "writers.pml"

#define lease_holds(s) (number_is_current(s) && !ended[s])
#define no_writer_in_flight(s) (shard[s].writing == 0)

inline transition(after) {
    look_at_number(catalog.lease == lease);
    d_step {                     /* (commit) */
        ok = lease_is_current;
        if
        :: ok && catalog.state != after ->
            printf("@ %d transition | of the move's state\n", me);
            HOLDS(I8, catalog.lease == lease);
            catalog.state = after
        :: else
        fi
    }
}

/* Ends "mirrored from": the row's lock waits for whoever applies rows, and nobody begins afterwards. */
inline retire(s) {
#ifdef WITHOUT_RETIRE
    skip
#else
    look_at_number(shard[s].lease == lease);
    d_step {                     /* (commit) */
        row_is_free(s) ->
        if
        :: shard[s].standing == GONE -> ok = 1
        :: number_is_current(s) && !shard[s].is_open && (shard[s].standing == MIRROR || shard[s].standing == RETIRED) ->
            printf("@ %d retire | shard %d\n", me, s);
            I8_HERE(s);
            shard[s].standing = RETIRED;
            ok = 1
        :: else -> ok = 0
        fi
    }
#endif
}

#ifdef WITHOUT_ERASE_CHECK
#define is_erasable(s) (shard[s].row[k] != ABSENT)
#else
#ifdef WITHOUT_RETIRE
#define is_erasable(s) (number_is_current(s) && shard[s].standing == MIRROR && !shard[s].is_open)
#else
#define is_erasable(s) (number_is_current(s) && shard[s].standing == RETIRED && !shard[s].is_open && shard[s].state == CLOSED)
#endif
#endif

/* One key's interval, checked in the transaction that erases it; a rollback's takes the batch's record along. */
inline erase(s) {
    look_at_number(shard[s].lease == lease);
    d_step {                     /* (commit), and (lock): the fence row is held FOR SHARE from the check to the commit */
        shard[s].row_exclusive == 0 ->
        if
        :: is_erasable(s) ->
            printf("@ %d erase | key %d on shard %d\n", me, k, s);
            HOLDS(I6, owner != s && !shard[s].is_open && shard[s].standing != OWNER);
            HOLDS(I6, shard[owner].row[k] == last[k]);
#ifndef WITHOUT_ERASE_CHECK
            I8_HERE(s);
#endif
            shard[s].row[k] = ABSENT;
            shard[s].recorded = (s == TARGET -> shard[s].recorded & ~bit_of(k) : shard[s].recorded);
            ok = 1
        :: else ->
            ok = number_is_current(s)                         /* refused, or there is nothing */
        fi
    }
}

/* Refuses the range for good, without the move's own objects; waits for the table's writers in flight. */
inline keep_fence(s) {
#ifdef WITHOUT_KEPT
    skip
#else
    if
    :: !ended[s] ->              /* a plain look: what counts is asked again below */
        look_at_number(shard[s].lease == lease);
        d_step {                 /* (commit) */
            no_writer_in_flight(s) ->
            ok = lease_holds(s);
            if
            :: ok ->
                printf("@ %d keep_fence | shard %d\n", me, s);
                I8_HERE(s);
                shard[s].kept = 1
            :: else
            fi
        }
    :: else
    fi
#endif
}

/* The triggers first, then everything else but the row that says that the move has ended here. */
inline strip(s) {
    if
    :: ok && !ended[s] ->
        look_at_number(shard[s].lease == lease);
        d_step {                 /* (commit) */
            no_writer_in_flight(s) ->
            ok = lease_holds(s);
            if
            :: ok && shard[s].armed ->
                printf("@ %d disarm | shard %d\n", me, s);
                I8_HERE(s);
                shard[s].armed = 0
            :: else
            fi
        };
        look_at_number(shard[s].lease == lease);
        d_step {                 /* (commit) */
            row_is_free(s) ->
            ok = ok && lease_holds(s);
            if
            :: ok ->
                printf("@ %d remove | shard %d\n", me, s);
                I8_HERE(s);
                ended[s] = 1;
                shard[s].standing = GONE; shard[s].is_open = 0; shard[s].whole = 0; shard[s].attempt = 0;
                shard[s].state = NONE; shard[s].recorded = 0; shard[s].journal[0] = 0; shard[s].journal[1] = 0
            :: else
            fi
        }
    :: else
    fi
}

/* x: the side that gives the range up. Every step is safe to repeat: who takes over begins at the beginning. */
inline end_move() {
    d_step {
        ok = 1;
        x = (catalog.state == COPYING || catalog.state == READY || catalog.state == ROLLING_BACK)
    };
    transition((x == SOURCE -> CLEANING : ROLLING_BACK));
    if :: ok -> retire(x) :: else fi;
    if :: x == TARGET -> strip(SOURCE) :: else fi;
    if :: ok -> k = 0; erase(x) :: else fi;
    if :: ok -> k = 1; erase(x) :: else fi;
    k = 0;
    if :: ok && ever_owned -> keep_fence(x) :: else fi;
    if :: x == SOURCE -> strip(SOURCE) :: else fi;
    strip(TARGET);
    if :: ok -> transition((x == SOURCE -> COMPLETED : ROLLED_BACK)) :: else fi
}

#define is_over (catalog.state == COMPLETED || catalog.state == ROLLED_BACK)

proctype Coordinator(byte me; byte lease) {
    bit ok, x, k;
#ifdef WITHOUT_NUMBER_LOCK
    bit believed;
#endif
start:
    {
        ok = 1;
        if
        :: lease == 0 ->
            take_lease();
            raise_number(SOURCE);
            if :: ok -> raise_number(TARGET) :: else fi
        :: else
        fi;
        if :: ok && !is_over -> end_move() :: else fi
    } unless {
        has(crashed, me) ->
        d_step { crashed = crashed & ~bit_of(me); k = 0; x = 0 };
        if
        :: me == COORD_B -> lease = 0; goto start
        :: else
        fi
    }
    atomic { done = done | bit_of(me); k = 0; x = 0; ok = 0; lease = 0 }
}

proctype Attendant(byte me) {
    Pass pass;
    bit d;
    if
    :: catalog.state == COPYING || catalog.state == READY -> catch_up(FORWARD)
    :: catalog.state == SWITCHED -> catch_up(BACK)
    :: catalog.state != COPYING && catalog.state != READY && catalog.state != SWITCHED
    fi;
    done = done | bit_of(me)
}

/* A whole later move, in one step: the range comes (back) to the side that gave it up, the other one refuses it now. */
proctype Later() {
end_never:
    d_step {
        (is_over && shard[0].writing == 0 && shard[1].writing == 0) ->
        printf(". %d brings the range | by a later move, to shard %d\n", NOBODY, 1 - owner);
        shard[owner].kept = 1;
        shard[1 - owner].kept = 0;
        shard[1 - owner].row[0] = last[0];
        shard[1 - owner].row[1] = last[1];
        owner = 1 - owner;
        catalog.route = owner;
        ever_owned = 1;
        moved_on = 1
    }
}

#if FAULTS > 0
proctype Faults() {
end_no_more:
    do
    :: restart_server(SOURCE)
    :: restart_server(TARGET)
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

inline begin_armed(s, stands) {
    shard[s].standing = stands; shard[s].armed = 1; shard[s].lease = 1;
    shard[s].is_open = (stands == OWNER);
    shard[s].state = (stands == OWNER -> OPEN : CLOSED);
    shard[s].whole = 1
}

init {
    atomic {
        catalog.lease = 1;
        if
        :: catalog.state = SWITCHED; owner = TARGET; ever_owned = 1        /* complete */
        :: catalog.state = COPYING; owner = SOURCE                         /* rollback of a move that is half copied */
        :: catalog.state = READY; owner = SOURCE; ever_owned = 1           /* rollback behind a cutover and its revert */
        fi;
        catalog.route = owner;
        begin_armed(owner, OWNER);
        begin_armed(1 - owner, MIRROR);
        if
        :: catalog.state == COPYING -> shard[TARGET].whole = 0; shard[TARGET].recorded = 1; shard[TARGET].row[1] = ABSENT
        :: catalog.state == READY -> shard[TARGET].recorded = 3
        :: else
        fi;
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
        run Later();
#if FAULTS > 0
        run Faults();
#endif
        skip
    };
    done == EVERYBODY;
    assert(is_over && ended[0] && ended[1] && !shard[owner].kept);
    HOLDS(I4, !ever_owned || shard[1 - owner].kept);
    HOLDS(I6, moved_on || (shard[1 - owner].row[0] == ABSENT && shard[1 - owner].row[1] == ABSENT));
    assert(shard[owner].row[0] == last[0] && shard[owner].row[1] == last[1])
}
