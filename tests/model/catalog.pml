/* The catalog: one transaction a message, serialised by row locks, so each function is one step (commit). */

#define COPYING 1
#define READY 2
#define SWITCHED 3
#define CLEANING 4
#define COMPLETED 5
#define ROLLING_BACK 6
#define ROLLED_BACK 7

#define FORWARD 0
#define BACK 1

#define UNDECIDED 1
#define FLIPPED 2
#define ABANDONED 3

typedef Attempt { byte outcome; bit direction; byte lease };
typedef Catalog {
    byte lease;                  /* the newest lease number */
    byte state;
    byte newest;                 /* the newest attempt */
    Attempt attempt[ATTEMPTS + 1];
    bit route;                   /* which shard the newest epoch names … */
    bit held                     /* … and whether programs are asked to wait */
};
Catalog catalog;

/* Ghosts: who owns the range by the decisions made so far, and what each key's last acknowledged write was. */
bit owner;
