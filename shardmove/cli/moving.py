"""Verbs that take moves on: run, cut over, revert, roll back, complete, verify; pause and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from shardmove.catalog.store import Catalog
from shardmove.cli import display, documents, render
from shardmove.cli.desk import Desk, verb
from shardmove.cli.root import DryRun, Id, app
from shardmove.cli.signals import stoppable
from shardmove.cli.words import seconds
from shardmove.config import Config
from shardmove.coordinator.operating import OnError, Operator, require_all_equal
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.status import status
from shardmove.domain.moves import Direction, Move, State


class Goal(StrEnum):
    """Where a run ends. From ready on, an operator cuts over."""

    READY = "ready"
    SWITCHED = "switched"
    COMPLETED = "completed"


@verb(app)
def run(
    desk: Desk,
    any_id: Id,
    until: Annotated[Goal, typer.Option(help="Where to end.")] = Goal.READY,
    on_error: Annotated[OnError, typer.Option(help="When it fails before the cutover.")] = OnError.PAUSE,
    timeout: Annotated[
        float | None, typer.Option(parser=seconds, metavar="D", help="Stop cleanly after 90s, 30m, 2h.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="Copy and compare so many moves of the plan at once.")
    ] = 1,
    create_schema: Annotated[
        bool, typer.Option("--create-schema", help="Make the tables that a target lacks, as the source has them.")
    ] = False,
) -> None:
    """Copy, mirror and verify, from wherever it stands. Ctrl-C stops it cleanly; the same command goes on."""
    with _operator(desk, any_id, timeout_s=timeout) as (operator, moves):
        creating = replace(operator, creates_schema=create_schema)
        creating.run(moves, State(until), on_error=on_error, parallel=parallel)
        _show_moves(desk, operator.config, operator.catalog, moves)


@verb(app)
def cutover(desk: Desk, any_id: Id, dry_run: DryRun = False) -> None:
    """Give the range to the target."""
    _carry_out(desk, any_id, dry_run, lambda o, moves: o.cut_over(moves, Direction.FORWARD, dry_run=dry_run))


@verb(app)
def revert(desk: Desk, any_id: Id, dry_run: DryRun = False) -> None:
    """Give the range back to the source; the target stays mirrored."""
    _carry_out(desk, any_id, dry_run, lambda o, moves: o.cut_over(moves, Direction.BACK, dry_run=dry_run))


@verb(app)
def phase(
    desk: Desk,
    any_id: Id,
    number: Annotated[int, typer.Argument(metavar="1..5", min=1, max=5, help="Who gets the reads and writes.")],
    share: Annotated[
        float | None, typer.Option(metavar="P", help="Phase 4: this percentage of the sessions reads from the target.")
    ] = None,
    sample: Annotated[
        float | None, typer.Option(metavar="F", help="Phase 3: this part of the reads, up to 1, is compared.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Although a gate is not met; it is recorded.")] = False,
) -> None:
    """Say who gets the reads of the range: 2 the source, 3 both, 4 the target; 5 is the cutover."""
    part = None if share is None else share / 100
    with _operator(desk, any_id) as (operator, moves):
        operator.change_phase(moves, number, share=part, sample=sample, force=force)
        _show_moves(desk, operator.config, operator.catalog, moves)


@verb(app)
def rollback(
    desk: Desk,
    any_id: Id,
    target_is_lost: Annotated[
        bool, typer.Option("--target-is-lost", help="The target will never answer again: leave it out of it.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Give the move up: revert where needed, then erase what was copied to the target."""
    _carry_out(
        desk, any_id, dry_run, lambda o, moves: o.roll_back(moves, target_is_lost=target_is_lost, dry_run=dry_run)
    )


@verb(app)
def complete(desk: Desk, any_id: Id, dry_run: DryRun = False) -> None:
    """End a switched move for good: erase the range on the source, which goes on refusing it."""
    _carry_out(desk, any_id, dry_run, lambda o, moves: o.complete(moves, dry_run=dry_run))


@verb(app)
def verify(
    desk: Desk,
    any_id: Id,
    repair: Annotated[bool, typer.Option("--repair", help="Mend through the mirror, then compare again.")] = False,
) -> None:
    """Read both sides again in full, and compare."""
    with _operator(desk, any_id) as (operator, moves):
        found = operator.compare(moves, repair=repair)
        desk.show(documents.verdicts(moves, found), render.verdicts)
        require_all_equal(moves, found)


@verb(app)
def pause(desk: Desk, any_id: Id) -> None:
    """Stop whoever is at it, within a second or two; nothing goes on until it is resumed."""
    _mark(desk, any_id, paused=True)


@verb(app)
def resume(desk: Desk, any_id: Id) -> None:
    """Let a paused move go on."""
    _mark(desk, any_id, paused=False)


def _mark(desk: Desk, any_id: str, *, paused: bool) -> None:
    config = desk.config()
    with desk.catalog(config) as catalog:
        moves = catalog.resolve(any_id)
        for move in moves:
            catalog.set_paused(move.id, paused)
        _show_moves(desk, config, catalog, moves)


def _carry_out(desk: Desk, any_id: str, dry_run: bool, work: Callable[[Operator, Sequence[Move]], object]) -> None:
    """Runs a verb on the moves, and shows where they are then; of a dry run, the steps."""
    told: dict[str, list[str]] = {}
    watch = display.collected(lambda move, text: told.setdefault(move.id, []).append(text))
    with _operator(desk, any_id, watch=watch if dry_run else None) as (operator, moves):
        work(operator, moves)
        if dry_run:
            desk.show(documents.dry_run(moves, told), render.steps)
        else:
            _show_moves(desk, operator.config, operator.catalog, moves)


@contextmanager
def _operator(
    desk: Desk,
    any_id: str,
    *,
    timeout_s: float | None = None,
    watch: Callable[[Move], AbstractContextManager[Progress]] | None = None,
) -> Iterator[tuple[Operator, Sequence[Move]]]:
    config = desk.config()
    with stoppable(timeout_s=timeout_s) as stop, desk.catalog(config) as catalog:
        yield Operator(config, catalog, stop, watch or display.Screen().watched), catalog.resolve(any_id)


def _show_moves(desk: Desk, config: Config, catalog: Catalog, moves: Sequence[Move]) -> None:
    """Where the moves are now."""
    figures = [status(config, catalog, catalog.move(move.id)) for move in moves]
    desk.show({"moves": figures}, render.moves)
