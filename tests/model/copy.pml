/*
 * Scenario `copy`: from the first object to the last batch, under writes, with a unique value that changes rows.
 *
 *   coordinator A   installs and arms both shards, hands out two batches, marks the target whole; may be killed
 *   its workers     one batch each, under A's lease for ever
 *   coordinator B   takes over at any time, and finds out from the target's records what is left
 *   mirror          passes as long as there is something to carry
 *   attendant       one pass more, at any time
 *   writers         both; their first transactions are older than the triggers
 */

bit copying_began;               /* ghost: the first batch's snapshot was taken */
#define takes_writes(s) (!shard[s].armed || shard[s].state == OPEN)
#define was_published(s) (s == SOURCE)
#define journal_is_needed(s) copying_began
#include "writers.pml"

#define lease_is_current_on(s) (shard[s].lease == lease)

/* Fence row, state, journal, functions: one transaction; where they are already, nothing. */
inline install(s) {
    d_step {                     /* (commit) */
        row_is_free(s) ->
        ok = lease_is_current_on(s);
        if
        :: ok && shard[s].standing == GONE ->
            shard[s].standing = OWNER;
            shard[s].is_open = 1;
            shard[s].whole = 1;
            shard[s].state = OPEN;
            printf("@ %d install | shard %d\n", me, s)
        :: else
        fi
    }
}

#ifdef WITHOUT_ARM_WAIT
#define no_writer_in_flight(s) 1
#else
#define no_writer_in_flight(s) (shard[s].writing == 0)
#endif

/* CREATE TRIGGER waits for the table's writers in flight. */
inline arm(s) {
    d_step {                     /* (commit) */
        no_writer_in_flight(s) ->
        ok = lease_is_current_on(s);
        if
        :: ok && !shard[s].armed ->
            shard[s].armed = 1;
            printf("@ %d arm | shard %d\n", me, s)
        :: else
        fi
    }
}

inline transition(before, after) {
    d_step {                     /* (commit) */
        ok = catalog.lease == lease;
        if
        :: ok && catalog.state == before ->
            catalog.state = after;
            printf("@ %d transition | of the move's state\n", me);
            printf("@ %d publish | the range is marked\n", me)
        :: else
        fi
    }
}

inline mark_whole() {
    d_step {                     /* (commit) */
        row_is_free(TARGET) ->
        ok = lease_is_current_on(TARGET);
        if
        :: ok ->
            printf("@ %d mark_whole | shard 1\n", me);
            HOLDS(I5, shard[TARGET].recorded == 3);
            HOLDS(I5, is_remembered(SOURCE, 0) && is_remembered(SOURCE, 1));
            shard[TARGET].whole = 1
        :: else
        fi
    }
}

/*
 * A batch. `ok` tells how it ended: done, by us or before; not our lease any more; or nothing happened, to be repeated.
 */
#define DONE 1
#define LOST 2
#define REPEAT 3

#define other_row_holds_unique(k) (holds_unique(shard[TARGET].row[1 - (k)]))
#define would_collide(k) (holds_unique(shard[SOURCE].row[k]) && other_row_holds_unique(k))

inline batch(k) {
    d_step {                     /* (lock) the fence row FOR SHARE, with the number and the standing in it; the record */
        (shard[TARGET].row_exclusive == 0 && !would_collide(k)) ->
        if
        :: !lease_is_current_on(TARGET) || !receives(TARGET) ->
            how = LOST;
            printf(". %d has lost its lease | batch %d\n", me, k)
        :: lease_is_current_on(TARGET) && receives(TARGET) && has(shard[TARGET].recorded, k) -> how = DONE
        :: else ->
            how = 0;
            shard[TARGET].row_shared = shard[TARGET].row_shared | bit_of(me);
            shard[TARGET].live = shard[TARGET].live | bit_of(me);
            printf(". %d begins batch %d | fence row and records on shard 1\n", me, k)
        fi
    };
    if
    :: how == 0 ->
        d_step {                 /* (commit) the snapshot; rows that hold the unique value wait for who has it in hand */
            (shard[TARGET].unique_lock == 0 || !holds_unique(shard[SOURCE].row[k]) || !alive(TARGET, me)) ->
            copying_began = 1;
            value = shard[SOURCE].row[k];
            if
            :: !alive(TARGET, me) -> how = REPEAT
            :: alive(TARGET, me) && would_collide(k) ->
                how = REPEAT;
                release(TARGET, bit_of(me));
                printf(". %d meets a unique value | batch %d waits for the mirror\n", me, k)
            :: else ->
                shard[TARGET].unique_lock = (holds_unique(value) -> bit_of(me) : shard[TARGET].unique_lock);
                printf(". %d copies batch %d | at a snapshot of shard 0\n", me, k)
            fi
        };
        if
        :: how == 0 ->
#ifdef WITHOUT_RECORD_IN_TRANSACTION
            d_step {
                shard[TARGET].recorded = shard[TARGET].recorded | bit_of(k);
                printf(". %d commits the record | of batch %d on shard 1, before its rows\n", me, k)
            };
#endif
            d_step {             /* (commit) */
                if
                :: alive(TARGET, me) ->
                    printf("@ %d batch | rows and record of batch %d on shard 1\n", me, k);
                    HOLDS(I8, lease_is_current_on(TARGET));
                    HOLDS(I2, shard[TARGET].row[k] == ABSENT);
                    shard[TARGET].row[k] = value;
                    shard[TARGET].recorded = shard[TARGET].recorded | bit_of(k);
                    release(TARGET, bit_of(me));
                    how = DONE
                :: else ->
                    how = REPEAT;
                    printf(". %d fails | its session was lost: nothing of batch %d is there\n", me, k)
                fi;
                value = 0
            }
        :: else -> value = 0
        fi
    :: else
    fi
}

proctype Worker(byte me; bit k; byte lease) {
    byte value, how;
    catalog.state == COPYING;
    do
    :: how != DONE && how != LOST -> batch(k)
    :: else -> break
    od;
    atomic { done = done | bit_of(me); how = 0; lease = 0; k = 0 }
}

/* Everything is safe to repeat, so whoever takes over begins at the beginning. */
inline copy_all() {
    if
    :: catalog.state != COPYING ->
        install(SOURCE);
        if :: ok -> arm(SOURCE) :: else fi;
        if :: ok -> transition(0, COPYING) :: else fi
    :: else
    fi;
    if
    :: ok && me == COORD_B ->
        do
        :: k < 2 && ok ->
            batch(k);
            if
            :: how == DONE -> k++
            :: how == LOST -> ok = 0
            :: else
            fi
        :: else -> break
        od
    :: ok && me == COORD_A -> (shard[TARGET].recorded == 3 || !lease_is_current_on(TARGET))
    :: else
    fi;
    if :: ok -> mark_whole() :: else fi
}

proctype Coordinator(byte me; byte lease) {
    byte k, value, how;
    bit ok;
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
        if :: ok -> copy_all() :: else fi
    } unless {
        has(crashed, me) ->
        d_step { crashed = crashed & ~bit_of(me); k = 0; value = 0; how = 0 };
        if
        :: me == COORD_B -> lease = 0; goto start
        :: else
        fi
    }
    atomic { done = done | bit_of(me); k = 0; value = 0; how = 0; ok = 0; lease = 0 }
}

#define can_carry(k) (shard[SOURCE].journal[k] != 0 && has(gate_of(TARGET), k))
#define OTHERS (bit_of(WRITER_RC) | bit_of(WRITER_RR) | bit_of(COORD_A) | bit_of(COORD_B) | bit_of(WORKER_A) | bit_of(WORKER_B))

proctype Mirror(byte me) {
    Pass pass;
    do
    :: receives(TARGET) && (can_carry(0) || can_carry(1)) -> catch_up(FORWARD)
    :: (done & OTHERS) == OTHERS && !can_carry(0) && !can_carry(1) -> break
    od;
    done = done | bit_of(me)
}

proctype Attendant(byte me) {
    Pass pass;
    catalog.state == COPYING;
    catch_up(FORWARD);
    done = done | bit_of(me)
}

#if FAULTS > 0
proctype Faults() {
end_no_more:
    do
    :: restart_server(SOURCE)
    :: restart_server(TARGET)
    :: lose_session(TARGET, WORKER_A)
    :: lose_session(TARGET, COORD_B)
    :: lose_session(SOURCE, ATTENDANT)
#ifndef NO_B                    /* else nobody would be there to go on */
    :: kill(COORD_A)
    :: kill(COORD_B)
#endif
    od
}
#endif

#define EVERYBODY (OTHERS | bit_of(ATTENDANT) | bit_of(ATTENDANT_2))

init {
    atomic {
        catalog.lease = 1; catalog.route = SOURCE; owner = SOURCE;
        shard[SOURCE].lease = 1; shard[TARGET].lease = 1;
        shard[SOURCE].row[1] = 8; last[1] = 8;
        shard[TARGET].standing = MIRROR; shard[TARGET].state = CLOSED; shard[TARGET].armed = 1;
        shard[TARGET].row[0] = ABSENT; shard[TARGET].row[1] = ABSENT;
        run_writers();
        run Coordinator(COORD_A, 1);
#ifdef NO_B
        done = done | bit_of(COORD_B);
#else
        run Coordinator(COORD_B, 0);
#endif
        run Worker(WORKER_A, 0, 1);
        run Worker(WORKER_B, 1, 1);
        run Mirror(ATTENDANT);
#ifdef NO_ATTENDANT
        done = done | bit_of(ATTENDANT_2);
#else
        run Attendant(ATTENDANT_2);
#endif
#if FAULTS > 0
        run Faults();
#endif
        skip
    };
    done == EVERYBODY;
    HOLDS(I5, shard[TARGET].whole && shard[TARGET].recorded == 3);
    HOLDS(I3, shard[SOURCE].journal[0] == 0 && shard[SOURCE].journal[1] == 0);
    HOLDS(I5, shard[0].row[0] == shard[1].row[0] && shard[0].row[1] == shard[1].row[1]);
    assert(shard[owner].row[0] == last[0] && shard[owner].row[1] == last[1])
}
