/*
 * The move protocol as a finite machine, for Spin. docs/model.md says what it shows and how to run it.
 *
 * THEORY. Two shards, a catalog, and parties that act on them by transactions. Every fact that survives a crash is a
 * global variable, every fact that a process merely believes is a local one. A transaction is a row of steps between
 * which anybody else may act; its locks are global, its writes become visible with its commit, which is one step. So
 * the checker looks at every order of the steps of all parties, at every place where a session, a process or a server
 * may die, and at every age of what a party believes.
 *
 * WHAT ONE STEP IS. `d_step` marks what nobody can come between. There are only three reasons for one:
 *   (commit)   the server does it at once: a commit, or the catalog's functions, which are one message each;
 *   (lock)     a lock is taken and what it protects is read: who comes between the two commutes with the taking, as he
 *              succeeded while the lock was held, so he would have without (Lipton's reduction);
 *   (ghost)    book-keeping of the checker, and forgetting of variables that are dead, which keeps the state space small.
 * Each one says which.
 *
 * WHAT IS PROVED. Assertions are named after the invariants of ARCHITECTURE.md: `HOLDS(I4, …)`. They stand where a
 * commit could break them, which is enough, as nothing else changes what they speak of. No run can go on for ever (the
 * search for cycles shows it), no state is a dead end but those where everybody is done, and there `at_rest` holds: so
 * from wherever faults leave the move, it comes to a good end.
 *
 * A mechanism is taken out by -DWITHOUT_…; each of these models must break the invariant that docs/model.md names.
 *
 * READING. `say` lines beginning with @ are effects of the protocol, named as in the code; others are not ours.
 */

/* --- sizes: how many of everything there are in this run, unless the driver says otherwise */
#ifndef FAULTS
#define FAULTS 1          /* sessions lost, processes killed, servers restarted, together */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2        /* cutover attempts, in either direction */
#endif
#ifndef ROUNDS
#define ROUNDS 1          /* what an attendant does: passes and settlings, one after the other */
#endif

/* --- parties; a party's number is also its bit in the masks of locks */
#define WRITER_RC 0       /* an application, READ COMMITTED, by a router with the newest routes */
#define WRITER_RR 1       /* an application, REPEATABLE READ, by a router with whatever routes */
#define COORD_A 2         /* the coordinator; taken for dead at any time, and then a zombie */
#define COORD_B 3         /* the next one */
#define ATTENDANT 4
#define ATTENDANT_2 5
#define WORKER_A 6        /* workers of coordinator A, or of B: one batch each */
#define WORKER_B 7
#define NOBODY 9
#define bit_of(p) (1 << (p))
#define has(mask, p) (((mask) >> (p)) & 1)

#define HOLDS(invariant, condition) assert(condition)

#include "catalog.pml"
#include "shards.pml"
#include "catch_up.pml"
#include "fence.pml"

#ifdef CUTOVER
#include "cutover.pml"
#endif
#ifdef COPY
#include "copy.pml"
#endif
#ifdef ENDING
#include "ending.pml"
#endif
#ifdef ROUTES
#include "routes.pml"
#endif
