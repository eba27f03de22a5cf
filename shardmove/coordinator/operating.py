"""An operator's verbs: each is carried out on the moves of a plan one after the other, or on one move.

A verb holds the move's lease while it is at it. Of a dry run the lease is the only trace: no state, route, error mark
or row is another one afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator import ending, preflight
from shardmove.coordinator.cutover import Report, cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import ours, recorded, run
from shardmove.coordinator.verifying import Verdict, compare_in_full, disregard_servers
from shardmove.domain.errors import (
    CutoverGaveUp,
    DifferencesFound,
    Interrupted,
    LeaseHeld,
    LeaseLost,
    Refused,
    ShardmoveError,
)
from shardmove.domain.moves import Direction, Move, State
from shardmove.postgres.connect import connect
from shardmove.protocol import fence

BEFORE_THE_CUTOVER = frozenset({State.INITIALIZING, State.COPYING, State.VERIFYING, State.READY})
COMPARABLE = frozenset({State.VERIFYING, State.READY, State.SWITCHED})


class OnError(StrEnum):
    """What becomes of a move whose run failed before its cutover."""

    PAUSE = "pause"
    """It stays where it is, with the reason; the same command goes on."""
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Operator:
    """Carries out verbs for somebody who may stop them.

    Attributes:
        stop: once set, the step under way ends at its next safe place with Interrupted.
        watch: shows the progress of a move for as long as its block lasts.
    """

    config: Config
    catalog: Catalog
    stop: threading.Event
    watch: Callable[[Move], AbstractContextManager[Progress]]

    def run(self, moves: Sequence[Move], goal: State, *, on_error: OnError = OnError.PAUSE) -> None:
        """Brings each move to the goal. Raises what `run.run` raises; a rollback by `on_error` is told with it."""
        for move in moves:
            with self._held(move, "run", accepts_changed_servers=True) as held:
                try:
                    run(held, goal)
                except ShardmoveError as error:
                    if on_error is OnError.ROLLBACK and _calls_for_rollback(held, error):
                        _give_up(held, error)
                    raise

    def cut_over(self, moves: Sequence[Move], direction: Direction, *, dry_run: bool = False) -> list[Report]:
        """Cuts each move over. Raises what `cutover.cut_over` raises; moves before that one stay cut over."""
        reports = []
        for move in moves:
            with self._begun(move, f"cut over {direction}", dry_run) as held:
                reports.append(cut_over(held, direction, dry_run=dry_run))
        return reports

    def complete(self, moves: Sequence[Move], *, dry_run: bool = False) -> None:
        """Completes each move. Raises what `ending.complete` raises."""
        for move in moves:
            with self._begun(move, "complete", dry_run) as held:
                ending.complete(held, dry_run=dry_run)

    def roll_back(self, moves: Sequence[Move], *, target_is_lost: bool = False, dry_run: bool = False) -> None:
        """Rolls each move back, the last one first; also a paused one. Raises what `ending.roll_back` raises.

        Args:
            target_is_lost: leave the target out of it: it will never answer again.
        """
        give_up = ending.roll_back_without_target if target_is_lost else ending.roll_back
        for move in reversed(moves):
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
        self, move: Move, verb: str, *, accepts_changed_servers: bool = False, target_is_lost: bool = False
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


def _calls_for_rollback(held: Hold, error: ShardmoveError) -> bool:
    """Nobody interrupted it, nobody else is at it, and the range is the source's still."""
    if isinstance(error, (Interrupted, LeaseHeld, LeaseLost, CutoverGaveUp)):
        return False
    return held.move.state in BEFORE_THE_CUTOVER


def _give_up(held: Hold, error: ShardmoveError) -> None:
    """Rolls back, then raises the error with that news in it."""
    with recorded(held):
        ending.roll_back(held)
    raise type(error)(f"{error.message}; it was rolled back", hint=error.hint) from error


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
    """Every check of a move, over connections of its own. Changes nothing. Raises Unreachable."""
    name = fence.application_name(move.id)
    with (
        connect(config.shard_dsn(move.source), application_name=name) as source,
        connect(config.shard_dsn(move.target), application_name=name) as target,
        ours(f"move {move.id}"),
    ):
        return preflight.checklist(preflight.Site(move, source, target, config.limits.sequence_margin))
