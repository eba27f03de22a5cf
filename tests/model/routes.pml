/*
 * Scenario `routes`: two moves publish route tables at the same time, each for its own range.
 *
 * Who publishes reads the newest table, computes the next one from it, and publishes it on the condition that what it
 * read is the newest still; else it does so again.
 */

byte epoch;                      /* of the newest table */
bit route_of[2];                 /* the newest table: which shard owns which range */
bit decided[2];                  /* ghost: the owner by the flips made */

proctype Publisher(byte me; bit mine) {
    byte base, flips;
    bit table[2];
    do
    :: flips < 2 ->
        d_step {                 /* (commit) one query */
            base = epoch; table[0] = route_of[0]; table[1] = route_of[1];
            printf(". %d reads the routes | epoch %d\n", me, base)
        };
        table[mine] = 1 - table[mine];
        d_step {                 /* (commit) */
            if
#ifdef WITHOUT_EPOCH
            :: 1 ->
#else
            :: epoch == base ->
#endif
                printf("@ %d publish | range %d goes to shard %d: ranges are on %d and %d\n", me, mine, table[mine], table[0], table[1]);
                decided[mine] = table[mine];
                HOLDS(I7, table[0] == decided[0] && table[1] == decided[1]);
                route_of[0] = table[0]; route_of[1] = table[1];
                epoch++;
                flips++
#ifndef WITHOUT_EPOCH
            :: else -> printf(". %d is refused | epoch %d is not the newest any more\n", me, base)
#endif
            fi;
            base = 0; table[0] = 0; table[1] = 0
        }
    :: else -> break
    od;
    done = done | bit_of(me)
}

init {
    atomic { run Publisher(COORD_A, 0); run Publisher(COORD_B, 1) };
    done == (bit_of(COORD_A) | bit_of(COORD_B));
    HOLDS(I7, route_of[0] == decided[0] && route_of[1] == decided[1] && epoch == 4)
}
