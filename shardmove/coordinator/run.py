"""Running a move: from whatever state it is in, step by step, to where it should go. One command for every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import psycopg

from shardmove.coordinator import copying, creating, ending, initializing, preflight, verifying
from shardmove.coordinator.checks.schema import schema_difference
from shardmove.coordinator.checks.site import Problem, Site
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import Failed, Interrupted, LeaseLost, Refused, SchemaDrift, ShardmoveError
from shardmove.domain.moves import Direction, State
from shardmove.postgres.connect import explain, is_unreachable, translated

GOALS = (State.READY, State.SWITCHED, State.COMPLETED)
ARMED = State.COPYING
"""A goal, too: both sides are armed, and the first batch is not yet copied."""


def _begin(hold: Hold) -> None:
    if hold.creates_schema:
        creating.create_missing(hold)
    preflight.require(Site(hold.move, hold.source, hold.target, hold.config.limits))
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

_FORWARD = (State.COPYING, State.VERIFYING, State.READY, State.SWITCHED, State.CLEANING, State.COMPLETED)
_BEYOND: Mapping[State, frozenset[State]] = {
    goal: frozenset(_FORWARD[_FORWARD.index(goal) :]) for goal in (ARMED, *GOALS)
}


def run(hold: Hold, goal: State) -> None:
    """Brings the move to the goal, or beyond it where it is beyond already; finishes an ending that was begun.

    The reason of a failure is kept in the catalog beside the state; the same command goes on from there.

    Raises:
        Refused: it was rolled back, or is paused.
        whatever a step raises; what that step had committed stays, and is found again by the next run.
    """
    preflight.require_unpaused(hold.move)
    with recorded(hold), explained(hold):
        verifying.accept_servers(hold)
        verifying.compare_anew_if_drifted(hold)  # a step of these states would only say that it has to be done
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
def explained(hold: Hold) -> Iterator[None]:
    """Where the block fails and the two schemas have come apart, that is the error: what failed is a symptom of it.

    A mirror or a batch that meets a label, a column or a partition that only one side has says nothing of that.
    """
    try:
        yield
    except (Interrupted, LeaseLost, Refused):
        raise
    except (ShardmoveError, psycopg.Error) as error:
        difference = None if is_unreachable(error) else _difference(hold)
        if difference is None:
            raise
        raise SchemaDrift(
            f"move {hold.move.id}: {difference.message} (it stopped at: {_words(error)})", hint=difference.hint
        ) from error


def _difference(hold: Hold) -> Problem | None:
    with suppress(ShardmoveError, psycopg.Error):  # what failed first says more
        return schema_difference(Site(hold.move, hold.source, hold.target))
    return None


def _words(error: ShardmoveError | psycopg.Error) -> str:
    return error.message if isinstance(error, ShardmoveError) else explain(error)


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
            _keep(hold, error)
        raise


def _keep(hold: Hold, error: ShardmoveError) -> None:
    # The move may have ended with the very call whose answer was lost: then nobody has to look after it any more.
    if not hold.catalog.move(hold.move.id).state.is_final:
        hold.catalog.set_error(hold.move.id, error.message, hold.lease.number)


@contextmanager
def ours(where: str) -> Iterator[None]:
    """No error of psycopg leaves the block: it becomes SchemaDrift, Unreachable or Failed."""
    try:
        with translated(where):
            yield
    except psycopg.Error as error:
        raise Failed(f"{where}: a server said: {explain(error)}") from error
