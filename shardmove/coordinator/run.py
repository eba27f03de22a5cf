"""Running a move: from whatever state it is in, step by step, to where it should go. One command for every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import psycopg

from shardmove.coordinator import copying, ending, initializing, preflight, verifying
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import Failed, Interrupted, LeaseLost, Refused, ShardmoveError
from shardmove.domain.moves import Direction, State
from shardmove.postgres.connect import explain, translated

GOALS = (State.READY, State.SWITCHED, State.COMPLETED)


def _begin(hold: Hold) -> None:
    preflight.require(preflight.Site(hold.move, hold.source, hold.target, hold.config.limits.sequence_margin))
    initializing.begin(hold)


def _cut_over(hold: Hold) -> None:
    cut_over(hold, Direction.FORWARD)


STEPS: Mapping[State, Callable[[Hold], None]] = {
    State.PENDING: _begin,
    State.INITIALIZING: initializing.initialize,
    State.COPYING: copying.copy,
    State.VERIFYING: verifying.verify,
    State.READY: _cut_over,
    State.SWITCHED: ending.complete,
    State.CLEANING: ending.complete,
    State.ROLLING_BACK: ending.roll_back,
}
"""One function a state: it leads to the next state, or raises and leaves everything to be repeated."""

_BEYOND: Mapping[State, frozenset[State]] = {
    State.READY: frozenset({State.READY, State.SWITCHED, State.CLEANING, State.COMPLETED}),
    State.SWITCHED: frozenset({State.SWITCHED, State.CLEANING, State.COMPLETED}),
    State.COMPLETED: frozenset({State.COMPLETED}),
}


def run(hold: Hold, goal: State) -> None:
    """Brings the move to the goal, or beyond it where it is beyond already; finishes an ending that was begun.

    The reason of a failure is kept in the catalog beside the state; the same command goes on from there.

    Raises:
        Refused: it was rolled back, or is paused.
        whatever a step raises; what that step had committed stays, and is found again by the next run.
    """
    preflight.require_unpaused(hold.move)
    with recorded(hold):
        verifying.accept_servers(hold)
        while not _arrived(hold.move.state, goal):
            hold.check()
            STEPS[hold.move.state](hold)
            hold.refresh()
        verifying.compare_anew_if_drifted(hold)
    if hold.move.state is State.ROLLED_BACK:
        raise Refused(f"move {hold.move.id} was rolled back", hint="plan it again")


def _arrived(state: State, goal: State) -> bool:
    if state is State.CLEANING:
        return False  # half an ending helps nobody
    return state.is_final or state in _BEYOND[goal]


@contextmanager
def recorded(hold: Hold) -> Iterator[None]:
    """Keeps the reason of a failure in the catalog, beside the state; what a server said becomes an error of ours."""
    if hold.move.error is not None:
        hold.catalog.set_error(hold.move.id, None, hold.lease.number)
    try:
        with ours(f"move {hold.move.id}"):
            yield
    except (Interrupted, LeaseLost):
        raise
    except ShardmoveError as error:
        # Where the catalog is what failed, or the lease is gone, the step's own error says more.
        with suppress(ShardmoveError):
            hold.catalog.set_error(hold.move.id, error.message, hold.lease.number)
        raise


@contextmanager
def ours(where: str) -> Iterator[None]:
    """No error of psycopg leaves the block: it becomes SchemaDrift, Unreachable or Failed."""
    try:
        with translated(where):
            yield
    except psycopg.Error as error:
        raise Failed(f"{where}: a server said: {explain(error)}") from error
