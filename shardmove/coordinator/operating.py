"""An operator's verbs: each is carried out on the moves of a plan one after the other, or on one move.

A verb holds the move's lease while it is at it. Of a dry run the lease is the only trace: no state, route, error mark
or row is another one afterwards.

A plan may be done in part: the same verb goes on with the rest. Moves that it has nothing to do for, or that it cannot
reach any more, are passed over, and that is said; a verb that can reach none of a plan's moves is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator import ending, phases, preflight
from shardmove.coordinator.checks.servers import ANSWERS, not_answering
from shardmove.coordinator.checks.site import CATALOG_PLACE, Site
from shardmove.coordinator.cutover import EDGES, Report, cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import ARMED, ours, recorded, run
from shardmove.coordinator.verifying import Verdict, compare_in_full, disregard_servers
from shardmove.domain.errors import (
    ConfigurationError,
    CutoverGaveUp,
    DifferencesFound,
    Failed,
    Interrupted,
    LeaseHeld,
    LeaseLost,
    Refused,
    ShardmoveError,
    Unreachable,
)
from shardmove.domain.moves import Direction, Move, State
from shardmove.postgres.connect import Connection, connect
from shardmove.protocol import fence

ARMING = frozenset({State.PENDING, State.INITIALIZING})
BEFORE_THE_CUTOVER = frozenset({State.INITIALIZING, State.COPYING, State.VERIFYING, State.READY})
COMPARABLE = frozenset({State.VERIFYING, State.READY, State.SWITCHED})
ENDED = frozenset({State.CLEANING, State.COMPLETED})
GIVEN_UP = frozenset({State.ROLLING_BACK, State.ROLLED_BACK})


class OnError(StrEnum):
    """What becomes of a move whose run failed before its cutover."""

    PAUSE = "pause"
    """It stays where it is, with the reason; the same command goes on."""
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Reach:
    """Which moves of a plan a verb is carried out on.

    Attributes:
        done: in these states there is nothing left to do for it.
        missed: in these it would be refused; that keeps nobody from the other moves.
    """

    done: frozenset[State]
    missed: frozenset[State]

    def within(self, moves: Sequence[Move]) -> Sequence[Move]:
        """The moves that are neither; where none is done and all are missed: all of them, to be refused."""
        left = [move for move in moves if move.state not in self.done]
        within = [move for move in left if move.state not in self.missed]
        return within if within or len(left) < len(moves) else left


RUN = Reach(done=frozenset({State.COMPLETED}), missed=frozenset({State.ROLLED_BACK}))
COMPLETE = Reach(done=frozenset({State.COMPLETED}), missed=GIVEN_UP)
ROLL_BACK = Reach(done=frozenset({State.ROLLED_BACK}), missed=ENDED)
CUT_OVER = {
    Direction.FORWARD: Reach(done=frozenset(), missed=ENDED | GIVEN_UP),
    Direction.BACK: Reach(done=frozenset(), missed=frozenset(State) - {State.READY, State.SWITCHED}),
}
"""Also a move that was cut over already is gone to: its shards may not have taken the decision yet."""
PHASE = Reach(done=frozenset(), missed=ENDED | GIVEN_UP)

Failure: TypeAlias = tuple[Move, Exception]


@dataclass(frozen=True, slots=True)
class Operator:
    """Carries out verbs for somebody who may stop them.

    Attributes:
        stop: once set, the steps under way end at their next safe place with Interrupted.
        watch: shows the progress of a move for as long as its block lasts; of several at a time, too.
        creates_schema: `run` makes the tables that a target lacks.
    """

    config: Config
    catalog: Catalog
    stop: threading.Event
    watch: Callable[[Move], AbstractContextManager[Progress]]
    creates_schema: bool = False

    # --- run

    def run(self, moves: Sequence[Move], goal: State, *, on_error: OnError = OnError.PAUSE, parallel: int = 1) -> None:
        """Brings each move to the goal, so many at a time as `parallel` says.

        The first failure keeps the moves that wait from being started, and those beside it from going beyond `ready`,
        which they are still brought to. Raises what `run.run` raises; of several errors the worst, which tells of the
        others. A rollback by `on_error` is told with its error.
        """
        for wave in self._waves(self._within(RUN, moves), parallel):
            failed = self._side_by_side(wave, goal) if len(wave) > 1 else self._in_order(wave, goal)
            if failed:
                if on_error is OnError.ROLLBACK:
                    failed = [(move, self._given_up(move, error)) for move, error in failed]
                raise worst([error for _, error in failed], moves[0].plan_id)

    def _side_by_side(self, moves: Sequence[Move], goal: State) -> list[Failure]:
        """Copied and compared at once; armed before, and switched and completed after it, one after the other.

        Our DDL does not wait in front of anybody for long: between the batches of another move on the same tables it
        would never come to its turn.
        """
        failed = self._in_order([move for move in moves if move.state in ARMING], ARMED)
        reached = [move for move in moves if self.catalog.move(move.id).state not in ARMING]
        failed += self._at_once(reached, State.READY)
        return failed or ([] if goal is State.READY else self._in_order(moves, goal))

    def _waves(self, moves: Sequence[Move], parallel: int) -> Iterator[Sequence[Move]]:
        """So many at a time; a target whose schema is being made takes one move at a time.

        What that move makes there is DDL to every other one, and its foreign keys would find their rows half copied.
        """
        left = list(moves)
        while left:
            wave: list[Move] = []
            for move in left:
                is_alone = not self.creates_schema or all(move.target != other.target for other in wave)
                if len(wave) < parallel and is_alone:
                    wave.append(move)
            left = [move for move in left if move not in wave]
            yield wave

    def _in_order(self, moves: Sequence[Move], goal: State) -> list[Failure]:
        """Ends with the first failure."""
        for move in moves:
            error = self._tried(move, goal)
            if error is not None:
                return [(move, error)]
        return []

    def _at_once(self, moves: Sequence[Move], goal: State) -> list[Failure]:
        """A thread a move, each with a catalog connection, a lease and workers of its own."""
        if not moves:
            return []
        with ThreadPoolExecutor(len(moves), thread_name_prefix="move") as threads:
            errors = list(threads.map(lambda move: self._tried_alone(move, goal), moves))
        return [(move, error) for move, error in zip(moves, errors, strict=True) if error is not None]

    def _tried_alone(self, move: Move, goal: State) -> Exception | None:
        try:
            with Catalog.connect(self.config.catalog_dsn, routes_file=self.config.routes_file) as catalog:
                return replace(self, catalog=catalog)._tried(move, goal)
        except ShardmoveError as error:
            return error

    def _tried(self, move: Move, goal: State) -> Exception | None:
        try:
            with self._held(move, "run", accepts_changed_servers=True, creates_schema=self.creates_schema) as held:
                run(held, goal)
        except Exception as error:
            return error
        return None

    def _given_up(self, move: Move, error: Exception) -> Exception:
        """Rolls back where the error calls for it; returns the error, with that news in it."""
        if not isinstance(error, ShardmoveError) or isinstance(error, NO_REASON_TO_GIVE_UP):
            return error
        try:
            with self._held(move, "rollback") as held:
                if held.move.state not in BEFORE_THE_CUTOVER:
                    return error
                with recorded(held):
                    ending.roll_back(held)
        except ShardmoveError as second:
            return type(error)(f"{error.message}; it could not be rolled back: {second.message}", hint=second.hint)
        return type(error)(f"{error.message}; it was rolled back", hint=error.hint)

    def _within(self, reach: Reach, moves: Sequence[Move]) -> Sequence[Move]:
        """The moves to go to; says which are passed over."""
        within = reach.within(moves)
        for move in moves:
            if move not in within:
                with self.watch(move) as progress:
                    progress.step(f"passed over: the move is {move.state}")
        return within

    # --- the other verbs

    def cut_over(self, moves: Sequence[Move], direction: Direction, *, dry_run: bool = False) -> list[Report]:
        """Cuts each move over. Raises what `cutover.cut_over` raises; moves before that one stay cut over."""
        reach, (_, after) = CUT_OVER[direction], EDGES[direction]
        if dry_run:
            reach = replace(reach, missed=reach.missed | {after})
        reports = []
        for move in self._within(reach, moves):
            with self._begun(move, f"cut over {direction}", dry_run) as held:
                if held.move.state is after:
                    held.progress.step(f"nothing to do: it is {after}")
                reports.append(cut_over(held, direction, dry_run=dry_run))
        return reports

    def change_phase(
        self,
        moves: Sequence[Move],
        wanted: int,
        *,
        share: float | None = None,
        sample: float | None = None,
        force: bool = False,
    ) -> None:
        """Brings each move to the traffic phase. Raises what `phases.change_phase` raises."""
        phases.check_words(wanted, share=share, sample=sample)
        for move in self._within(PHASE, moves):
            with self._begun(move, "phase", False) as held:
                phases.change_phase(held, wanted, share=share, sample=sample, force=force)

    def complete(self, moves: Sequence[Move], *, dry_run: bool = False) -> None:
        """Completes each move. Raises what `ending.complete` raises."""
        for move in self._within(COMPLETE, moves):
            with self._begun(move, "complete", dry_run) as held:
                ending.complete(held, dry_run=dry_run)

    def roll_back(self, moves: Sequence[Move], *, target_is_lost: bool = False, dry_run: bool = False) -> None:
        """Rolls each move back, the last one first; also a paused one. Raises what `ending.roll_back` raises.

        Args:
            target_is_lost: leave the target out of it: it will never answer again.
        """
        give_up = ending.roll_back_without_target if target_is_lost else ending.roll_back
        for move in reversed(self._within(ROLL_BACK, moves)):
            with (
                self._held(move, "rollback", target_is_lost=target_is_lost) as held,
                _told(held, dry_run),
            ):
                give_up(held, dry_run=dry_run)

    def compare(self, moves: Sequence[Move], *, repair: bool = False) -> list[Verdict]:
        """Reads both sides of each move again in full.

        Raises:
            Refused: a move has not been copied yet, or one of its sides was given up.
            whatever `verifying.compare_in_full` raises; differences are in the verdicts.
        """
        for move in moves:
            require_comparable(move)
        verdicts = []
        for move in moves:
            with self._held(move, "verify", accepts_changed_servers=repair) as held, ours(f"move {move.id}"):
                require_comparable(held.move)
                if repair:
                    disregard_servers(held)
                verdicts.append(compare_in_full(held, repair=repair))
        return verdicts

    @contextmanager
    def _held(
        self,
        move: Move,
        verb: str,
        *,
        accepts_changed_servers: bool = False,
        target_is_lost: bool = False,
        creates_schema: bool = False,
    ) -> Iterator[Hold]:
        with (
            self.watch(move) as progress,
            hold(
                self.config,
                self.catalog,
                move.id,
                holder=f"shardmove {verb}",
                stop=self.stop,
                progress=progress,
                accepts_changed_servers=accepts_changed_servers,
                target_is_lost=target_is_lost,
                creates_schema=creates_schema,
            ) as held,
        ):
            yield held

    @contextmanager
    def _begun(self, move: Move, verb: str, dry_run: bool) -> Iterator[Hold]:
        with self._held(move, verb) as held, _told(held, dry_run):
            preflight.require_unpaused(held.move)
            yield held


def _told(held: Hold, dry_run: bool) -> AbstractContextManager[None]:
    """Why a verb failed is kept beside the state; a dry run leaves that mark alone."""
    return ours(f"move {held.move.id}") if dry_run else recorded(held)


NO_REASON_TO_GIVE_UP: Final = (Interrupted, LeaseHeld, LeaseLost, CutoverGaveUp)
"""Nobody meant the move to end: it was interrupted, or somebody else is at it, or it can go on at a better time."""

_MILDEST_FIRST: Final = (Interrupted, Refused, ConfigurationError, Failed, DifferencesFound)


def worst(errors: Sequence[Exception], plan_id: str) -> Exception:
    """The worst one, with the others in its words; an error that nobody foresaw is worse than all."""
    chosen = max(errors, key=_badness)
    if len(errors) == 1 or not isinstance(chosen, ShardmoveError):
        return chosen
    others = "; ".join(str(error) for error in errors if error is not chosen)
    hint = f"`shardmove run {plan_id}` goes on from there" if isinstance(chosen, Interrupted) else chosen.hint
    return type(chosen)(f"{chosen.message}; and {others}", hint=hint)


def _badness(error: Exception) -> int:
    kinds = (number for number, kind in enumerate(_MILDEST_FIRST) if isinstance(error, kind))
    return next(kinds, len(_MILDEST_FIRST))


def require_comparable(move: Move) -> None:
    """Raises Refused where the two sides cannot be equal yet, or are not kept equal any more."""
    if move.state in COMPARABLE:
        return
    copied = move.state not in (State.PENDING, State.INITIALIZING, State.COPYING)
    raise Refused(
        f"move {move.id} is {move.state}: "
        + ("one of its sides was given up" if copied else "its rows are not all on the target yet"),
        hint=None if copied else f"`shardmove run {move.id}` copies and verifies them",
    )


def require_all_equal(moves: Sequence[Move], verdicts: Sequence[Verdict]) -> None:
    """Raises DifferencesFound that names the tables which are not equal."""
    unequal = [
        f"{move.id} {table.table.name}"
        for move, verdict in zip(moves, verdicts, strict=True)
        for table in verdict.tables
        if not table.equal
    ]
    if unequal:
        raise DifferencesFound(
            f"the two sides differ: {', '.join(unequal)}",
            hint="did somebody write behind the fence? `shardmove verify ID --repair` mends it",
        )


def checklist(config: Config, move: Move) -> list[preflight.Line]:
    """Every check of a move, over connections of its own; where somebody does not answer, that line alone.

    Changes nothing. Raises Unreachable where a connection is lost meanwhile.
    """
    reached: dict[str, Connection] = {}
    silent: dict[str, str] = {}
    databases = [(shard, config.shard_dsn(shard)) for shard in (move.source, move.target)]
    with ExitStack() as opened, ours(f"move {move.id}"):
        for place, dsn in [*databases, (CATALOG_PLACE, config.catalog_dsn)]:
            try:
                connection = connect(dsn, application_name=fence.application_name(move.id))
            except Unreachable as error:
                silent[place] = error.message
            else:
                reached[place] = opened.enter_context(connection)
        if silent:
            return [preflight.Line(ANSWERS, not_answering(silent))]
        return preflight.checklist(
            Site(move, reached[move.source], reached[move.target], config.limits, reached[CATALOG_PLACE])
        )
