"""Verbs before a move begins: plans and their checklist."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmove.cli import documents, render
from shardmove.cli.desk import Desk, verb
from shardmove.cli.root import Id, app
from shardmove.cli.words import listed
from shardmove.coordinator import planner
from shardmove.coordinator.operating import checklist
from shardmove.domain.errors import Refused

plans = typer.Typer(help="Plan which ranges go where; prints the plan's id and its moves' ids.", no_args_is_help=True)
app.add_typer(plans, name="plan")

KeyspaceName = Annotated[str, typer.Argument(metavar="K", help="The keyspace.")]


@verb(plans)
def split(
    desk: Desk,
    keyspace: KeyspaceName,
    at: Annotated[str, typer.Option(metavar="X[,Y…]", help="The first key of each piece that moves.")],
    to: Annotated[str, typer.Option(metavar="S[,T…]", help="The target of each piece.")],
    range_: Annotated[str | None, typer.Option("--range", metavar="L:U", help="Only this part of the route.")] = None,
) -> None:
    """Split one route: the first piece stays, the others move."""
    config = desk.config()
    key_type = config.keyspace(keyspace).key_type
    with desk.catalog(config) as catalog:
        plan = planner.split(
            config,
            catalog,
            keyspace,
            at=[key_type.parse(key) for key in listed(at)],
            to=listed(to),
            within=None if range_ is None else key_type.parse_range(range_),
        )
        desk.show(documents.plan(plan, catalog.resolve(plan.id)), render.plan)


@verb(plans)
def move(
    desk: Desk,
    keyspace: KeyspaceName,
    range_: Annotated[str, typer.Option("--range", metavar="L:U", help="The keys that move; an open end is empty.")],
    to: Annotated[str, typer.Option(metavar="S", help="The target.")],
) -> None:
    """Move a key range to a shard, from wherever its keys are."""
    config = desk.config()
    parsed = config.keyspace(keyspace).key_type.parse_range(range_)
    with desk.catalog(config) as catalog:
        plan = planner.move(config, catalog, keyspace, range_=parsed, to=to)
        desk.show(documents.plan(plan, catalog.resolve(plan.id)), render.plan)


@verb(app)
def preflight(desk: Desk, any_id: Id) -> None:
    """Go through the whole checklist: pass, fail, and how to fix."""
    config = desk.config()
    with desk.catalog(config) as catalog:
        lists = {move.id: checklist(config, move) for move in catalog.resolve(any_id)}
    desk.show(documents.checklists(lists), render.checklists)
    failed = sum(not line.passed for lines in lists.values() for line in lines)
    if failed:
        raise Refused(f"{failed} checks of {any_id} fail", hint="mend what they name; nothing was changed")
