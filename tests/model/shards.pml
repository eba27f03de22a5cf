/* A shard: what PostgreSQL keeps for us, and what dies with a session. */

#define SOURCE 0
#define TARGET 1

#define CLOSED 1
#define OPEN 2
#define NONE 0                   /* no state sequence: not found */

#define OWNER 1
#define MIRROR 2
#define RETIRED 3
#define GONE 0                   /* no fence row */

/* What a row holds: 0 as at the beginning, the number of a write, or nothing; 8 more where it has the unique value. */
#define ABSENT 7
#define write_of(party) ((party) + 1)

typedef Shard {
    byte row[2];                 /* the two keys' rows: which write they hold; key k lies in batch k */
    byte journal[2];             /* per key, the writes whose entries are there: a set, nothing is merged */
    byte recorded;               /* batches recorded as committed, a bit each */
    byte state;                  /* the sequence that writers read: changed in place, not rolled back */
    bit armed;                   /* the triggers are on the table */
    bit kept;                    /* the kept fence is on the table */
    byte standing;               /* the fence row from here on; GONE: there is none */
    bit is_open;
    bit whole;
    byte attempt;
    byte lease;
    /* locks, each a mask of parties; they end with the transaction */
    byte live;                   /* who has a transaction here */
    byte writing;                /* table lock of writers: ROW EXCLUSIVE, which triggers' DDL waits for */
    byte fence_shared;
    byte fence_exclusive;
    byte row_shared;             /* fence row FOR SHARE */
    byte row_exclusive;          /* fence row updated, not yet committed */
    byte mirror_lock;
    byte unique_lock;            /* a row with the unique value inserted, not yet committed */
    byte entry_lock              /* journal entries deleted, not yet committed */
};
Shard shard[2];

byte last[2];                    /* ghost: per key the last write that an application was told is committed */
byte done;                       /* ghost: who has ended */
byte crashed;                    /* processes killed and not yet aware of it: they never become so */
byte faults;

#define alive(s, me) has(shard[s].live, me)
#define row_is_free(s) (shard[s].row_shared == 0 && shard[s].row_exclusive == 0)

/* The fence row says: closed, mirrored from the other side. */
#define receives(s) (shard[s].standing == MIRROR && !shard[s].is_open)
#define is_copied(s, k) (shard[s].whole || has(shard[s].recorded, k))

/* I1 and I3 together: where a key is copied, both sides hold the same row, or an entry says that they do not. */
#ifdef WITHOUT_RETIRE
#define is_remembered(g, k) 1
#else
#define is_remembered(g, k) (!receives(1 - (g)) || !is_copied(1 - (g), k) || \
    shard[g].journal[k] != 0 || shard[0].row[k] == shard[1].row[k])
#endif

/* The server rolls back whatever these parties had in hand here. What setval did stays. */
inline roll_back(s, who) {
    shard[s].live = shard[s].live & ~(who);
    shard[s].writing = shard[s].writing & ~(who);
    shard[s].fence_shared = shard[s].fence_shared & ~(who);
    shard[s].fence_exclusive = shard[s].fence_exclusive & ~(who);
    shard[s].row_shared = shard[s].row_shared & ~(who);
    shard[s].row_exclusive = shard[s].row_exclusive & ~(who);
    shard[s].mirror_lock = shard[s].mirror_lock & ~(who);
    shard[s].unique_lock = shard[s].unique_lock & ~(who);
    shard[s].entry_lock = shard[s].entry_lock & ~(who)
}

/*
 * ASYNC: the fresh writer's session has synchronous_commit = off. Its commit is seen at once, but a restart of the server
 * undoes it, unless some synchronous commit made the log durable before. The application chose that; what it did not
 * choose is that the other shard remembers the write.
 */
#ifdef ASYNC
byte unflushed;                  /* 1 + the shard on which the write of key 0 is not yet durable */
byte row_before, last_before;
#define flush(s) unflushed = (unflushed == 1 + (s) -> 0 : unflushed)
inline forget_unflushed(s) {
    if
    :: unflushed == 1 + (s) ->
        shard[s].row[0] = row_before;
        last[0] = last_before;
        shard[s].journal[0] = shard[s].journal[0] & ~bit_of(WRITER_RC);
        unflushed = 0; row_before = 0; last_before = 0;
        printf(". %d undoes a commit | that was not durable, on shard %d\n", NOBODY, s);
        HOLDS(I3, is_remembered(s, 0))
    :: else
    fi
}
#else
#define flush(s) skip
#define forget_unflushed(s) skip
#endif

/* After a commit the same locks go. */
#define release(s, who) roll_back(s, who)

#ifdef ASYNC
#define something_to_lose(s) (shard[s].live != 0 || unflushed == 1 + (s))
#else
#define something_to_lose(s) (shard[s].live != 0)
#endif

inline restart_server(s) {
    d_step {
        (faults < FAULTS && something_to_lose(s)) ->
        faults++;
        roll_back(s, 255);
        printf(". %d restarts | the server of shard %d: what was in hand there is rolled back\n", NOBODY, s);
        forget_unflushed(s)
    }
}

inline lose_session(s, p) {
    d_step {
        (faults < FAULTS && alive(s, p)) ->
        faults++;
        roll_back(s, bit_of(p));
        printf(". %d loses its session | on shard %d\n", p, s)
    }
}

inline kill(p) {
    d_step {
        (faults < FAULTS && !has(done, p)) ->
        faults++;
        roll_back(SOURCE, bit_of(p));
        roll_back(TARGET, bit_of(p));
        crashed = crashed | bit_of(p);
        printf(". %d is killed | its transactions are rolled back\n", p)
    }
}
