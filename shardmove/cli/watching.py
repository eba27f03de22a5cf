"""Verbs that watch: status and events."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Annotated

import typer
from rich.live import Live

from shardmove.catalog.events import Event
from shardmove.catalog.store import Catalog
from shardmove.cli import documents, render
from shardmove.cli.desk import Desk, stdout, verb
from shardmove.cli.root import app
from shardmove.config import Config
from shardmove.coordinator.status import status as figures

WATCH_EVERY_S = 1.0

OptionalId = Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this plan or move.")]


@verb(app)
def status(
    desk: Desk,
    any_id: OptionalId = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
) -> None:
    """Show moves: state, progress, backlog, stall, errors. Without an ID, every unfinished one."""
    config = desk.config()
    with desk.catalog(config) as catalog:
        if watch:
            _watch(desk, config, catalog, any_id)
        else:
            desk.show(_statuses(config, catalog, any_id), render.statuses)


def _statuses(config: Config, catalog: Catalog, any_id: str | None) -> documents.Document:
    moves = catalog.moves(unfinished_only=True) if any_id is None else catalog.resolve(any_id)
    shown = [figures(config, catalog, move) for move in moves]
    return documents.statuses(shown, catalog.routers(), catalog.epoch())


def _watch(desk: Desk, config: Config, catalog: Catalog, any_id: str | None) -> None:
    on_terminal = sys.stdout.isatty() and not desk.as_json
    shown = Live(console=stdout(), auto_refresh=False) if on_terminal else nullcontext()
    with suppress(KeyboardInterrupt), shown as live:
        while True:
            document = _statuses(config, catalog, any_id)
            if live is None:
                desk.show_line(document, render.statuses)
            else:
                live.update(render.statuses(document), refresh=True)
            time.sleep(WATCH_EVERY_S)


@verb(app)
def events(
    desk: Desk,
    any_id: OptionalId = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with each new one, until Ctrl-C.")] = False,
) -> None:
    """Show what happened, in order."""
    with desk.catalog(desk.config()) as catalog:
        concerns = _concerning(catalog, any_id)
        if not follow:
            listed = [documents.event(each) for each in _all(catalog) if concerns(each)]
            desk.show({"events": listed}, render.events)
            return
        with suppress(KeyboardInterrupt):
            for each in filter(concerns, catalog.follow()):
                desk.show_line(documents.event(each), render.event)


def _concerning(catalog: Catalog, any_id: str | None) -> Callable[[Event], bool]:
    """Whether an event is about the plan, or about one of the moves. Raises NotFound."""
    if any_id is None:
        return lambda each: True
    move_ids = {move.id for move in catalog.resolve(any_id)}
    return lambda each: each.move_id in move_ids or each.plan_id == any_id


def _all(catalog: Catalog) -> Iterator[Event]:
    """Every event, in pages."""
    page = catalog.events()
    while page:
        yield from page
        page = catalog.events(after_id=page[-1].id)
