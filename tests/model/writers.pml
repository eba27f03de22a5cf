/*
 * Applications, each behind a router. The fresh router sends a write where the newest epoch says, heeds a hold, and asks
 * again when it was refused; it does not rest before the write is acknowledged. The stale one believes any table that
 * was ever published, asks nobody, and takes a refusal for an answer.
 *
 * Row locks among writers are left out: without them there are more orders, not fewer.
 */

#ifdef COPY
/* The fresh writer's transaction passes the unique value from row 1 to row 0; the other one leaves it where it is. */
#define new_value(s, k) (rr -> (write_of(me) | (shard[s].row[k] & 8)) : (k == 0 -> (write_of(me) | 8) : write_of(me)))
#define writes_both (!rr)
#else
#define new_value(s, k) write_of(me)
#define writes_both 0
#endif

/* What the trigger finds: the state as it is now, whatever the snapshot. */
#ifdef WITHOUT_SEQUENCE
#define refuses(s) (rr -> !seen_open : !(shard[s].is_open || shard[s].standing == GONE))
#else
#ifdef WITHOUT_TWO_STATEMENTS
#define refuses(s) (seen_state != OPEN)
#else
#define refuses(s) (shard[s].state != OPEN)
#endif
#endif

/* A write statement, with its trigger: table lock, the fence's shared lock, then, as a statement of its own, the state. */
inline write() {
    fired = shard[s].armed;
    if
    :: rr && !alive(s, me) -> refused = 1                     /* the session was lost since the snapshot */
    :: else ->
        refused = (rr && shard[s].row[k] != seen) || (fired && refuses(s)) || shard[s].kept
    fi;
    seen = 0;
    if
    :: refused ->
        release(s, bit_of(me));
        fired = 0;
        printf(". %d is refused | key %d on shard %d\n", me, k, s)
    :: else ->
        shard[s].live = shard[s].live | bit_of(me);
        shard[s].writing = shard[s].writing | bit_of(me);
        if
        :: fired -> shard[s].fence_shared = shard[s].fence_shared | bit_of(me)
        :: else
        fi;
        printf(". %d writes | key %d on shard %d, not yet committed\n", me, k, s)
    fi
}

#ifdef WITHOUT_MULTISET
#define is_to_be_noted(s, k) (shard[s].journal[k] == 0)          /* ON CONFLICT DO NOTHING */
#else
#define is_to_be_noted(s, k) 1
#endif

inline write_row(s, k) {
    shard[s].row[k] = new_value(s, k);
    last[k] = shard[s].row[k];
    if
    :: fired && is_to_be_noted(s, k) -> shard[s].journal[k] = shard[s].journal[k] | bit_of(me)
    :: else
    fi
}

inline commit() {
    if
    :: alive(s, me) ->
        printf(". %d commits | its write of key %d on shard %d is acknowledged\n", me, k, s);
        HOLDS(I4, owner == s);
        HOLDS(I4, !fired || shard[s].state == OPEN);
        HOLDS(I1, fired || !journal_is_needed(s));
#ifdef ASYNC
        if
        :: rr -> flush(s)
        :: !rr -> unflushed = 1 + s; row_before = shard[s].row[0]; last_before = last[0]
        fi;
#endif
        write_row(s, k);
        if
        :: writes_both -> write_row(s, 1)
        :: else
        fi
    :: else ->
        refused = 1;
        printf(". %d fails | its session was lost\n", me)
    fi;
    fired = 0;
    release(s, bit_of(me))
}

#define fence_is_free(s) (!shard[s].armed || shard[s].fence_exclusive == 0)

proctype Writer(byte me; bit rr; bit stale) {
    byte k, seen;
    bit s, refused, fired, told;
#ifdef WITHOUT_SEQUENCE
    bit seen_open;
#endif
#ifdef WITHOUT_TWO_STATEMENTS
    byte seen_state;
#endif
    do
    :: !stale && !told ->
        /* (lock) the route is the newest: what it was a moment ago is the stale one's story */
#ifdef WITHOUT_TWO_STATEMENTS
        d_step {
            (!catalog.held && takes_writes(catalog.route)) ->
            s = catalog.route;
            seen_state = shard[s].state;
            printf(". %d begins the statement | that locks and looks, on shard %d\n", me, s)
        };
        d_step { fence_is_free(s) -> write() };
#else
        d_step {
            (!catalog.held && takes_writes(catalog.route) && fence_is_free(catalog.route)) ->
            s = catalog.route;
            write()
        };
#endif
        d_step {                                    /* (commit) */
            if
            :: !refused -> commit()
            :: else
            fi;
            if
            :: !refused -> done = done | bit_of(me); told = 1
            :: else
            fi;
            s = 0; refused = 0
        }
    :: stale && !told ->
        if
        :: s = SOURCE
        :: was_published(TARGET) -> s = TARGET
        fi;
        if
        :: k = 0
        :: k = 1
        fi;
        d_step {                                    /* (commit) a snapshot is taken at once */
            seen = shard[s].row[k];
            shard[s].live = shard[s].live | bit_of(me);
#ifdef WITHOUT_SEQUENCE
            seen_open = shard[s].is_open || shard[s].standing == GONE;
#endif
            printf(". %d reads | on shard %d: its snapshot is taken\n", me, s)
        };
#ifdef WITHOUT_TWO_STATEMENTS
        d_step {
            seen_state = shard[s].state;
            printf(". %d begins the statement | that locks and looks, on shard %d\n", me, s)
        };
#endif
        d_step {                                    /* (lock) the shared lock is held when the state is read */
            (fence_is_free(s) || !alive(s, me)) -> write()
        };
        d_step {                                    /* (commit) */
            if
            :: !refused -> commit()
            :: else
            fi;
            done = done | bit_of(me);
            s = 0; k = 0; refused = 0; told = 1
        }
    :: else -> break
    od
}

inline run_writers() {
#ifdef NO_RC
    done = done | bit_of(WRITER_RC);
#else
    run Writer(WRITER_RC, 0, 0);
#endif
#ifdef NO_RR
    done = done | bit_of(WRITER_RR)
#else
    run Writer(WRITER_RR, 1, 1)
#endif
}
