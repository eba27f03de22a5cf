/*
 * The fence row of a shard and the state beside it (protocol/fence.py), and carrying out what is decided
 * (protocol/ownership.py). Who runs this has `me`, and `ok` for how it ended.
 */

/* The number is locked, or changed under a condition, in the transaction of the effect. */
#ifdef WITHOUT_NUMBER_LOCK
#define number_is_current(s) believed
#define lease_is_current believed
#define look_at_number(now) d_step { believed = (now); printf(". %d reads the number | by a plain SELECT\n", me) }
#else
#define number_is_current(s) (shard[s].lease == lease)
#define lease_is_current (catalog.lease == lease)
#define look_at_number(now) skip
#endif

#define I8_HERE(s) HOLDS(I8, shard[s].lease == lease)

#ifdef WITHOUT_EXCLUSIVE
#define nobody_passed(s) 1
#else
#define nobody_passed(s) (shard[s].fence_shared == 0 && shard[s].fence_exclusive == 0)
#endif

/* Closing, first half: fence lock, row lock, condition, setval. It is seen at once, and never rolled back. */
inline close_begins(g) {
    d_step {                     /* (lock) writers are out, the row is ours */
        (row_is_free(g) && nobody_passed(g)) ->
        if
        :: shard[g].attempt < n && number_is_current(g) && shard[g].standing == OWNER ->
            shard[g].fence_exclusive = bit_of(me);
            shard[g].row_exclusive = bit_of(me);
            shard[g].live = shard[g].live | bit_of(me);
            shard[g].state = CLOSED;
            ok = 1;
            printf("@ %d set_state | shard %d closed\n", me, g)
        :: else ->
            ok = 0;
            printf(". %d cannot close | attempt %d on shard %d: another attempt, lease or owner\n", me, n, g)
        fi
    }
}

inline close_commits(g) {
    d_step {                     /* (commit) */
        if
        :: alive(g, me) ->
            printf("@ %d close | shard %d, attempt %d\n", me, g, n);
            I8_HERE(g);
            flush(g);
            shard[g].is_open = 0;
            shard[g].attempt = n;
            release(g, bit_of(me))
        :: else ->
            ok = 0;
            printf(". %d fails | the closing is rolled back, but for the state\n", me)
        fi
    }
}

#ifdef WITHOUT_STAMPS_ON_GIVER
#define may_open(s) (outcome == ABANDONED || shard[s].attempt <= n)
#else
#ifdef WITHOUT_STAMPS_ON_RECEIVER
#define may_open(s) (outcome == FLIPPED || shard[s].attempt <= n)
#else
#define may_open(s) (shard[s].attempt <= n)
#endif
#endif

#define is_open_for(s) (shard[s].is_open && shard[s].attempt == n && shard[s].state == OPEN)

/* Opening after n: conditional, by anybody, again and again while sessions are lost. */
inline open_for(s) {
    ok = 0;
    do
    :: !ok ->
        d_step {                 /* (lock) */
            (is_open_for(s) || row_is_free(s)) ->
            if
            :: is_open_for(s) -> ok = 1                           /* somebody else was faster */
            :: !is_open_for(s) && may_open(s) ->
                shard[s].row_exclusive = bit_of(me);
                shard[s].live = shard[s].live | bit_of(me);
                printf("@ %d set_state | shard %d open\n", me, s);
                shard[s].state = OPEN;
                HOLDS(I4, owner == s && shard[1 - (s)].state != OPEN)
            :: else ->
                ok = 1;
                printf(". %d opens nothing | shard %d has seen a later attempt than %d\n", me, s, n)
            fi
        };
        if
        :: !ok ->
            d_step {             /* (commit) */
                if
                :: alive(s, me) ->
                    printf("@ %d open | shard %d, attempt %d\n", me, s, n);
                    flush(s);
                    shard[s].is_open = 1;
                    shard[s].whole = 1;
                    shard[s].standing = OWNER;
                    shard[s].attempt = n;
                    release(s, bit_of(me));
                    ok = 1
                :: else -> printf(". %d fails | the opening is rolled back, but for the state\n", me)
                fi
            }
        :: else
        fi
    :: ok -> break
    od
}

inline give_away(g) {
    atomic {                     /* (commit) one conditional statement */
        row_is_free(g) ->
        if
        :: shard[g].attempt == n && !shard[g].is_open && shard[g].standing == OWNER ->
            flush(g);
            shard[g].standing = MIRROR;
            shard[g].whole = 1;
            printf("@ %d give_away | shard %d, attempt %d\n", me, g, n)
        :: else
        fi
    }
}

inline carry_out() {
    d = catalog.attempt[n].direction;
    if
    :: outcome == ABANDONED -> open_for(d)
    :: outcome == FLIPPED -> open_for(1 - d); give_away(d)
    :: else
    fi
}

/* Decides attempt n if nobody has. Anyone may; the row lock orders it before or after a flip. */
inline abandon() {
    d_step {                     /* (commit) */
        if
        :: catalog.attempt[n].outcome == UNDECIDED ->
            catalog.attempt[n].outcome = ABANDONED;
            catalog.held = 0;
            printf("@ %d abandon | attempt %d\n", me, n)
        :: else
        fi;
        outcome = catalog.attempt[n].outcome
    }
}

inline take_lease() {
    d_step {                     /* (commit) */
        catalog.lease++;
        lease = catalog.lease;
        printf("@ %d take_lease | number %d\n", me, lease)
    }
}

inline raise_number(s) {
    d_step {                     /* (commit) who has the row locked is waited for, or its session ended: a fault */
        row_is_free(s) ->
        ok = shard[s].lease <= lease;
        if
        :: shard[s].lease < lease ->
            flush(s);
            shard[s].lease = lease;
            printf("@ %d raise_number | shard %d to %d\n", me, s, lease)
        :: else
        fi
    }
}
