"""What is checked: the runs that must be free of errors, and the variants that must not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TRACES: Final = Path(__file__).parent / "counterexamples"
PROGRESS: Final = "progress"
"""What a dead end breaks: some state from which the move comes to no good end."""


@dataclass(frozen=True, slots=True)
class Run:
    """One exhaustive search: a scenario, and the macros that say who takes part in it and how much may go wrong."""

    scenario: str
    flags: tuple[str, ...]
    note: str
    endless: bool = False
    """Looks for a run that goes on for ever, too."""

    @property
    def defines(self) -> list[str]:
        return [f"-D{flag}" for flag in (self.scenario.upper(), *self.flags)]


@dataclass(frozen=True, slots=True)
class Variant:
    """The model without one mechanism, and the invariant that must break for it."""

    name: str
    macro: str
    scenario: str
    flags: tuple[str, ...]
    invariant: str
    without: str
    story: str

    @property
    def run(self) -> Run:
        return Run(self.scenario, (self.macro, *self.flags), self.without)

    @property
    def trace_file(self) -> Path:
        return TRACES / f"{self.name}.txt"


SMALL: Final[Sequence[Run]] = (
    Run("cutover", ("FAULTS=1", "NO_ATTENDANT"), "both writers, both coordinators, one fault"),
    Run("cutover", ("FAULTS=1", "NO_RR"), "the fresh writer, both coordinators, the attendant, one fault"),
    Run("cutover", ("FAULTS=1", "ASYNC", "NO_B"), "both writers, one commits asynchronously; one fault"),
    Run("copy", ("FAULTS=0", "NO_B"), "both writers, coordinator A, workers, both catch-ups"),
    Run("copy", ("FAULTS=1", "NO_B", "NO_RR"), "the fresh writer, coordinator A, workers, both catch-ups, one fault"),
    Run("copy", ("FAULTS=0", "NO_RR", "NO_ATTENDANT"), "the fresh writer, both coordinators, workers, the mirror"),
    Run("copy", ("FAULTS=1", "NO_RC", "NO_RR"), "both coordinators, workers, one fault, nobody writes"),
    Run("ending", ("FAULTS=1", "NO_RR"), "the fresh writer, both coordinators, the attendant, one fault"),
    Run("ending", ("FAULTS=1", "NO_RC", "NO_ATTENDANT"), "the stale writer, both coordinators, one fault"),
    Run("routes", ("FAULTS=0",), "two moves publish at the same time"),
    Run("cutover", ("FAULTS=1", "NO_RR", "NO_ATTENDANT"), "no run goes on for ever", endless=True),
    Run("copy", ("FAULTS=1", "NO_RR", "NO_B"), "no run goes on for ever", endless=True),
    Run("ending", ("FAULTS=1", "NO_RR", "NO_RC"), "no run goes on for ever", endless=True),
)
"""For every push: about a minute on two cores."""

LARGE: Final[Sequence[Run]] = (
    *SMALL,
    Run("cutover", ("FAULTS=0",), "everybody, no fault"),
    Run("cutover", ("FAULTS=1", "NO_RC"), "the stale writer, both coordinators, the attendant, one fault"),
    Run("cutover", ("FAULTS=2", "NO_RR", "NO_ATTENDANT"), "the fresh writer, both coordinators, two faults"),
    Run("cutover", ("FAULTS=1", "ROUNDS=2", "NO_RR", "NO_B"), "the attendant twice, one coordinator, one fault"),
    Run("cutover", ("FAULTS=0", "FINE", "NO_RR"), "each statement of a pass a step, the attendant, no fault"),
    Run("copy", ("FAULTS=1", "NO_B"), "both writers, coordinator A, workers, both catch-ups, one fault"),
    Run("copy", ("FAULTS=1", "NO_RC", "NO_ATTENDANT"), "the stale writer, both coordinators, workers, one fault"),
    Run("ending", ("FAULTS=0",), "everybody, no fault"),
    Run("ending", ("FAULTS=1", "NO_ATTENDANT"), "both writers, both coordinators, one fault"),
    Run("ending", ("FAULTS=1", "NO_RC"), "the stale writer, both coordinators, the attendant, one fault"),
)
"""Some minutes, some gigabytes."""

ALONE: Final = ("FAULTS=0", "NO_RC", "NO_RR", "NO_ATTENDANT")

VARIANTS: Final[Sequence[Variant]] = (
    Variant(
        "one-statement-guard",
        "WITHOUT_TWO_STATEMENTS",
        "cutover",
        ("FAULTS=0", "NO_RR", "NO_B", "NO_ATTENDANT"),
        "I4",
        "The trigger takes the lock and reads the state in one statement.",
        "What a statement reads, it reads as of its beginning. The writer reads “open”, waits behind the closing for"
        " the lock, gets it, and passes a closed fence: its write is acknowledged and will never be carried.",
    ),
    Variant(
        "old-snapshot-finds-no-fence",
        "WITHOUT_SEQUENCE",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_B", "NO_ATTENDANT"),
        "I4",
        "Writers read a plain fence row, not a sequence.",
        "A REPEATABLE READ transaction reads the row as it was when its snapshot was taken. It took it while the fence"
        " was open, and so it passes after the closing.",
    ),
    Variant(
        "late-opener",
        "WITHOUT_STAMPS_ON_GIVER",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR"),
        "I4",
        "The giver's fence is opened without the condition `attempt <= N`.",
        "The attendant abandons attempt 1 and falls asleep before it opens the source. The next coordinator opens it,"
        " closes it for attempt 2, and flips. Then the attendant wakes and opens the source: two owners.",
    ),
    Variant(
        "late-opener-of-the-receiver",
        "WITHOUT_STAMPS_ON_RECEIVER",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR", "NO_ATTENDANT"),
        "I4",
        "The receiver's fence is opened without the condition `attempt <= N`.",
        "Coordinator A flips attempt 1 and falls asleep before it opens the target. B finishes attempt 1, and goes"
        " back: attempt 2 flips to the source. Then A wakes and opens the target.",
    ),
    Variant(
        "plain-number-check",
        "WITHOUT_NUMBER_LOCK",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR", "NO_ATTENDANT"),
        "I8",
        "The lease's number is read by a plain SELECT before the effect.",
        "The old coordinator reads its own number, and sleeps; the next one takes the lease over; the old one wakes and"
        " opens an attempt for which nobody looks after it.",
    ),
    Variant(
        "stale-catch-up",
        "WITHOUT_RECEIVER_FIRST",
        "cutover",
        ("FAULTS=1", "NO_B"),
        "I3",
        "A catch-up takes the giver's snapshot first and the receiver's lock after.",
        "The attendant has read a row and loses its session on the giver, without noticing. The other catch-up carries"
        " a newer version of the row and empties the journal. Then the attendant gets the lock and writes the old"
        " version over it; no entry is left that would tell.",
    ),
    Variant(
        "journal-dedup",
        "WITHOUT_MULTISET",
        "cutover",
        ("FAULTS=0", "NO_B"),
        "I3",
        "An entry is not written where the journal has one of the key (ON CONFLICT DO NOTHING).",
        "The second write finds the entry of the first one, and adds none. But a catch-up has read the row before, and"
        " takes that entry away: the second write is forgotten.",
    ),
    Variant(
        "replay-from-image",
        "WITHOUT_REREAD",
        "cutover",
        ("FAULTS=0", "NO_B"),
        "I3",
        "The journal's images are applied in the order of their numbers; rows are not read again.",
        "Numbers are handed out before commits. The writer with the higher number commits first, the one with the lower"
        " number writes the row after it: the image with the highest number is not the row as it is.",
    ),
    Variant(
        "flip-of-a-decided-attempt",
        "WITHOUT_ATTEMPT_OPEN",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR", "NO_B"),
        "I4",
        "The flip does not ask whether its attempt is still open.",
        "The attendant takes the coordinator for dead, and abandons the attempt; the coordinator, which is alive, flips"
        " it; the attendant opens the source.",
    ),
    Variant(
        "open-before-abandon",
        "WITHOUT_ABANDON_FIRST",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR", "NO_B"),
        "I4",
        "Who gives an attempt up opens the giver first, and abandons after.",
        "Between the attendant's look and its opening the coordinator flips. The abandoning would have found that out;"
        " the opening does not.",
    ),
    Variant(
        "open-before-flip",
        "WITHOUT_FLIP_FIRST",
        "cutover",
        ("FAULTS=0", "NO_RC", "NO_RR", "NO_B", "NO_ATTENDANT"),
        "I4",
        "The coordinator opens the receiver, then flips.",
        "The target takes writes while the catalog says that the source owns the range: whoever abandons the attempt"
        " now makes a second owner.",
    ),
    Variant(
        "writer-in-flight",
        "WITHOUT_EXCLUSIVE",
        "cutover",
        ("FAULTS=0", "NO_RR", "NO_B", "NO_ATTENDANT"),
        "I4",
        "A closing does not take the fence's lock exclusively.",
        "The writer passed the open fence, and has not committed. The closing does not wait for it, and the write"
        " becomes visible after the last catch-up has looked.",
    ),
    Variant(
        "log-not-durable",
        "WITHOUT_FLUSH",
        "cutover",
        ("FAULTS=1", "ASYNC", "NO_B", "NO_RR"),
        "I3",
        "A catch-up commits on the receiver before the giver's log is durable.",
        "The application's commit was asynchronous, and a catch-up has carried its row. The giver's server restarts and"
        " forgets the write and its entry; the receiver remembers the row, and nothing tells that the sides differ.",
    ),
    Variant(
        "log-flushed-by-another-session",
        "WITHOUT_OWN_SESSION",
        "cutover",
        ("FAULTS=1", "ASYNC", "NO_B", "NO_RR"),
        "I3",
        "The giver's log is made durable by a session other than the one that read.",
        "The giver's server restarts between the reading and the flush, and forgets the write. A session that is opened"
        " after the restart flushes with success what is left, and the receiver commits what is no more.",
    ),
    Variant(
        "ungated-mirror",
        "WITHOUT_GATE",
        "copy",
        ("FAULTS=0", "NO_B", "NO_RR", "NO_ATTENDANT"),
        "I2",
        "A catch-up carries every key, whether its batch was copied or not.",
        "The mirror puts a row on the target whose batch is not there yet. The batch then meets its own row and can"
        " never be copied; where the row was deleted meanwhile, the batch brings it back.",
    ),
    Variant(
        "one-watermark",
        "WITHOUT_ISLANDS",
        "copy",
        ("FAULTS=0", "NO_B", "NO_RR", "NO_ATTENDANT"),
        PROGRESS,
        "The gate lets through what lies below the first gap, not every recorded batch.",
        "Batch 1 is copied first. Then its row gives a unique value to the row of batch 0. Batch 0 waits until the"
        " target's row 1 has let the value go; the mirror does not carry row 1 before batch 0 is there. Nothing moves"
        " any more.",
    ),
    Variant(
        "record-apart-from-the-rows",
        "WITHOUT_RECORD_IN_TRANSACTION",
        "copy",
        ("FAULTS=0", "NO_B", "NO_RR", "NO_ATTENDANT"),
        "I2",
        "The batch's record is committed on its own, before its rows.",
        "The record opens the gate for a row that is not there yet. A catch-up brings the row, and the batch collides"
        " with it. Had the worker died between the two, the rows would be missing for good.",
    ),
    Variant(
        "arming-does-not-wait",
        "WITHOUT_ARM_WAIT",
        "copy",
        ("FAULTS=0", "NO_B", "NO_RR", "NO_ATTENDANT"),
        "I1",
        "The triggers come without waiting for the table's writers in flight.",
        "The writer's statement ran before the trigger was there, and commits after the first batch's snapshot: the"
        " change is neither in the batch nor in the journal.",
    ),
    Variant(
        "erase-against-catch-up",
        "WITHOUT_RETIRE",
        "ending",
        ("FAULTS=0", "NO_B", "NO_RR"),
        "I6",
        "Rows are erased on a side that is still mirrored into.",
        "A row is erased; a catch-up that may still write there carries a newer version of it, and the row is back.",
    ),
    Variant(
        "erase-without-asking",
        "WITHOUT_ERASE_CHECK",
        "ending",
        ALONE,
        "I6",
        "The eraser does not ask the shard's own record in the erasing transaction.",
        "Coordinator A falls asleep before an erasure. B ends the move, and a later move brings the range to that very"
        " shard. A wakes and erases the owner's rows.",
    ),
    Variant(
        "fence-not-kept",
        "WITHOUT_KEPT",
        "ending",
        ("FAULTS=0", "NO_B", "NO_RC", "NO_ATTENDANT"),
        "I4",
        "The fence goes with the move's other objects.",
        "The move is over. A router that slept through all of it sends a write to the shard that gave the range up,"
        " which accepts it.",
    ),
    Variant(
        "routes-without-epoch",
        "WITHOUT_EPOCH",
        "routes",
        ("FAULTS=0",),
        "I7",
        "A route table is published without the condition that it was computed from the newest one.",
        "Both moves read epoch 0. The second to publish writes its own change and, without knowing it, undoes the first"
        " one's: programs go to a shard that gave the range away.",
    ),
)
