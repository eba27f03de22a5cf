/*
 * One pass of the mirror (protocol/catch_up.py), in either direction: `g`, the giver, is read, the other side written.
 *
 *   receiver   BEGIN; exclusive lock; fence row FOR SHARE: closed, mirrored from the giver; batch records
 *   giver      BEGIN REPEATABLE READ: the snapshot
 *   giver      DELETE the visible entries that the gate lets through; read the rows, as they are in that snapshot
 *   receiver   delete and insert these rows; COMMIT
 *   giver      COMMIT
 *
 * A party whose session on the receiver was lost finds out at its next statement there, and rolls back; the loss of the
 * one on the giver it may not notice before the last COMMIT, whose failure brings the entries back.
 */

/* Of the pass under way: the snapshot's entries and rows, per key, the gate, and how it ended. */
typedef Pass { byte entries[2]; byte rows[2]; byte gate; bit is_empty; bit failed; bit carries; bit again };


#ifdef WITHOUT_GATE
#define gate_of(s) 3
#else
#ifdef WITHOUT_ISLANDS
#define gate_of(s) (shard[s].whole || shard[s].recorded == 3 -> 3 : shard[s].recorded & 1)
#else
#define gate_of(s) (shard[s].whole -> 3 : shard[s].recorded)
#endif
#endif

#define taken(k) (has(pass.gate, k) -> pass.entries[k] : 0)
#define took_any (taken(0) != 0 || taken(1) != 0)
#define somebody_took(g, k) ((taken(k) & ~shard[g].journal[k]) != 0)
/* The advisory lock, the row FOR SHARE, the records: whoever changes the records of what we erase waits for the row. */
inline begin_receiver(r) {
    if
    :: receives(r) ->
        shard[r].mirror_lock = bit_of(me);
        shard[r].row_shared = shard[r].row_shared | bit_of(me);
        shard[r].live = shard[r].live | bit_of(me);
        pass.gate = gate_of(r);
        printf(". %d begins a pass | lock, fence row and records on shard %d\n", me, r)
    :: else ->
        pass.failed = 1;
#ifndef COPY
        printf(". %d is refused | shard %d is not mirrored into\n", me, r)
#endif
    fi
}

#define receiver_is_free(r) (shard[r].mirror_lock == 0 && shard[r].row_exclusive == 0)

inline take_snapshot(g) {
    shard[g].live = shard[g].live | bit_of(me);
    pass.entries[0] = shard[g].journal[0];
    pass.entries[1] = shard[g].journal[1];
    pass.rows[0] = (taken(0) != 0 -> shard[g].row[0] : 0);
    pass.rows[1] = (taken(1) != 0 -> shard[g].row[1] : 0);
    printf(". %d takes the snapshot | on shard %d\n", me, g)
}

#define entries_are_free(g) (shard[g].entry_lock == 0)

inline take_entries(g) {
    pass.is_empty = pass.entries[0] == taken(0) && pass.entries[1] == taken(1);
    if
    :: !alive(g, me) -> pass.failed = 1
    :: alive(g, me) && (somebody_took(g, 0) || somebody_took(g, 1)) -> pass.again = 1
    :: else -> pass.carries = took_any
    fi;
    if
    :: pass.carries ->
        shard[g].entry_lock = bit_of(me);
        printf(". %d deletes entries | and reads their rows at the snapshot of shard %d\n", me, g)
    :: else ->
        give_up_pass(g)
    fi
}

inline give_up_pass(g) {
    pass.carries = 0;
    release(g, bit_of(me));
    release(1 - (g), bit_of(me));
    forget_pass();
    printf(". %d ends the pass | nothing to carry, a lost session, or entries that another one took\n", me)
}

inline forget_pass() {
    pass.entries[0] = 0; pass.entries[1] = 0; pass.rows[0] = 0; pass.rows[1] = 0; pass.gate = 0
}

inline apply_row(r, k) {
    if
    :: taken(k) != 0 ->
        HOLDS(I2, is_copied(r, k));
#ifdef COPY
        HOLDS(I2, shard[r].row[k] != ABSENT);
#else
        HOLDS(I6, shard[r].row[k] != ABSENT && shard[r].standing != RETIRED);
#endif
#ifdef WITHOUT_REREAD
        shard[r].row[k] = (has(taken(k), WRITER_RR) -> write_of(WRITER_RR) : write_of(WRITER_RC))
#else
        shard[r].row[k] = pass.rows[k]
#endif
    :: else
    fi
}

/*
 * A unique value, in the scenario `copy`: one of the two rows holds it, and it may pass to the other. Whoever inserts
 * the row that holds it waits for one who has it in hand, and fails where the other row holds it still.
 */
#ifdef COPY
#define holds_unique(value) ((value) & 8)
#define brings_unique(k) (taken(k) != 0 && holds_unique(pass.rows[k]))
#define keeps_unique(r, k) (taken(k) == 0 && holds_unique(shard[r].row[k]))
#define unique_is_free(r) (shard[r].unique_lock == 0 || !(brings_unique(0) || brings_unique(1)))
#define unique_collides(r) ((brings_unique(0) && keeps_unique(r, 1)) || (brings_unique(1) && keeps_unique(r, 0)))
#else
#define unique_is_free(r) 1
#define unique_collides(r) 0
#endif

inline commit_receiver(r) {
    d_step {                     /* (commit) */
        (!alive(r, me) || unique_is_free(r)) ->
        if
#ifdef COPY
        :: alive(r, me) && unique_collides(r) ->
            pass.again = 1;                                   /* a batch has committed meanwhile: look at the gate again */
            printf(". %d meets a unique value | the pass is repeated\n", me);
            give_up_pass(1 - (r))
#endif
        :: alive(r, me) && !unique_collides(r) ->
            printf("@ %d catch_up.receiver | the rows are on shard %d\n", me, r);
            apply_row(r, 0);
            apply_row(r, 1);
            HOLDS(I3, is_remembered(1 - (r), 0) && is_remembered(1 - (r), 1));
            release(r, bit_of(me))
        :: else ->
            pass.failed = 1;
            give_up_pass(1 - (r))
        fi;
        pass.rows[0] = 0; pass.rows[1] = 0
    }
}

inline commit_giver(g) {
    d_step {                     /* (commit) */
        if
        :: alive(g, me) ->
            flush(g);
            printf("@ %d catch_up.giver | the entries are gone from shard %d\n", me, g);
            shard[g].journal[0] = shard[g].journal[0] & ~taken(0);
            shard[g].journal[1] = shard[g].journal[1] & ~taken(1);
            HOLDS(I3, is_remembered(g, 0) && is_remembered(g, 1));
            release(g, bit_of(me))
        :: else ->
            pass.failed = 1;
            printf(". %d fails | the entries are back in the journal of shard %d\n", me, g)
        fi;
        forget_pass()
    }
}

/*
 * The beginning of a pass. The receiver's locks may as well be taken when the giver's snapshot is, where all is copied:
 * who acts between the two commutes with the taking. So may the entries' locks: a pass that meets those of another one
 * waits, fails to serialize, and is repeated, which is as if it had begun later. FINE leaves each statement a step.
 */
#ifdef WITHOUT_RECEIVER_FIRST
inline begin(g) {
    d_step { entries_are_free(g) -> pass.gate = 3; take_snapshot(g); take_entries(g) }
    if
    :: pass.carries ->
        d_step {
            receiver_is_free(1 - (g)) -> begin_receiver(1 - (g));
            if
            :: pass.failed -> give_up_pass(g)
            :: else
            fi
        }
    :: else
    fi
}
#else
#if defined(FINE) || defined(COPY)
inline begin(g) {
    d_step { receiver_is_free(1 - (g)) -> begin_receiver(1 - (g)) }
    if
    :: !pass.failed ->
        d_step { take_snapshot(g) };
        d_step { (!took_any || entries_are_free(g) || !alive(g, me)) -> take_entries(g) }
    :: else
    fi
}
#else
inline begin(g) {
    d_step {
        (receiver_is_free(1 - (g)) && (!receives(1 - (g)) || entries_are_free(g))) ->
        begin_receiver(1 - (g));
        if
        :: !pass.failed -> take_snapshot(g); take_entries(g)
        :: else
        fi
    }
}
#endif
#endif

/*
 * The giver's log is made durable before anybody else remembers what was read there, and by the session that read: one
 * that was opened after a restart would make durable what is left. Where all commits are synchronous there is no step.
 */
#ifdef ASYNC
inline make_durable(g) {
#ifndef WITHOUT_FLUSH
    d_step {                     /* (commit) */
        if
#ifdef WITHOUT_OWN_SESSION
        :: 1 ->
#else
        :: alive(g, me) ->
#endif
            flush(g);
            printf(". %d makes the log durable | on shard %d\n", me, g)
#ifndef WITHOUT_OWN_SESSION
        :: else -> pass.failed = 1; give_up_pass(g)
#endif
        fi
    }
#else
    skip
#endif
}
#endif

inline catch_up(g) {
    d_step { pass.failed = 0; pass.is_empty = 0; pass.again = 1; pass.carries = 0 };         /* (ghost) */
    do
    :: pass.again ->
        pass.again = 0;
        begin(g);
        if
        :: pass.carries ->
#ifdef ASYNC
            make_durable(g);
            if
            :: !pass.failed -> commit_receiver(1 - (g))
            :: else
            fi;
#else
            commit_receiver(1 - (g));
#endif
            if
            :: !pass.failed && !pass.again -> commit_giver(g)
            :: else
            fi
        :: else
        fi
    :: else -> break
    od
}
