"""Verbs before a move begins: plans and their checklist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import typer

from shardmove.catalog.moves import Plan
from shardmove.catalog.store import Catalog
from shardmove.cli import documents, render
from shardmove.cli.desk import Desk, verb
from shardmove.cli.root import Id, app
from shardmove.cli.words import listed
from shardmove.config import Config
from shardmove.coordinator import planner
from shardmove.coordinator.checks.servers import ANSWERS
from shardmove.coordinator.estimating import Statistics, choose_rate, estimates
from shardmove.coordinator.operating import checklist
from shardmove.domain.errors import Refused, Unreachable

plans = typer.Typer(
    help="Plan which ranges go where; prints the plan's id and its moves' ids, and what they will carry.",
    no_args_is_help=True,
)
app.add_typer(plans, name="plan")

KeyspaceName = Annotated[str, typer.Argument(metavar="K", help="The keyspace.")]
RangeText = Annotated[
    str, typer.Option("--range", metavar="L:U", help='The keys; an open end is empty, one with a colon in "quotes".')
]
Target = Annotated[str, typer.Option(metavar="S", help="The target.")]
Rate: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="ROWS_PER_S", help="Estimate the time by this rate, not by the last move's."),
]


@verb(plans)
def split(
    desk: Desk,
    keyspace: KeyspaceName,
    at: Annotated[
        str, typer.Option(metavar="X[,Y…]", help='The first key of each piece that moves; with a comma in "quotes".')
    ],
    to: Annotated[str, typer.Option(metavar="S[,T…]", help="The target of each piece.")],
    range_: Annotated[str | None, typer.Option("--range", metavar="L:U", help="Only this part of the route.")] = None,
    rate: Rate = None,
) -> None:
    """Split one route: the first piece stays, the others move."""

    def make(config: Config, catalog: Catalog) -> Plan:
        type_ = catalog.keyspace(keyspace).bound_type
        within = None if range_ is None else type_.parse_range(range_)
        points = [type_.parse(key) for key in listed(at)]
        return planner.split(config, catalog, keyspace, at=points, to=listed(to), within=within)

    _plan(desk, rate, make)


@verb(plans)
def move(desk: Desk, keyspace: KeyspaceName, range_: RangeText, to: Target, rate: Rate = None) -> None:
    """Move a key range to a shard, from wherever its keys are."""

    def make(config: Config, catalog: Catalog) -> Plan:
        parsed = catalog.keyspace(keyspace).bound_type.parse_range(range_)
        return planner.move(config, catalog, keyspace, range_=parsed, to=to)

    _plan(desk, rate, make)


@verb(plans)
def merge(desk: Desk, keyspace: KeyspaceName, range_: RangeText, to: Target, rate: Rate = None) -> None:
    """Make neighbouring routes one: all of the range goes to one shard, a move for each that owns a part."""

    def make(config: Config, catalog: Catalog) -> Plan:
        parsed = catalog.keyspace(keyspace).bound_type.parse_range(range_)
        return planner.merge(config, catalog, keyspace, range_=parsed, to=to)

    _plan(desk, rate, make)


@verb(plans)
def isolate(
    desk: Desk,
    keyspace: KeyspaceName,
    key: Annotated[str, typer.Option(metavar="X", help="The key, as it is; also in a keyspace by hash.")],
    to: Target,
    rate: Rate = None,
) -> None:
    """Move one key alone."""

    def make(config: Config, catalog: Catalog) -> Plan:
        parsed = catalog.keyspace(keyspace).key_type.parse(key)
        return planner.isolate(config, catalog, keyspace, key=parsed, to=to)

    _plan(desk, rate, make)


@verb(plans)
def drain(
    desk: Desk,
    shard: Annotated[str, typer.Argument(metavar="S", help="The shard to empty.")],
    to: Annotated[str, typer.Option(metavar="T[,U…]", help="Where its routes go, dealt out by size.")],
    rate: Rate = None,
) -> None:
    """Empty a shard, in all keyspaces: afterwards the configuration may drop it."""
    _plan(desk, rate, lambda config, catalog: planner.drain(config, catalog, shard, to=listed(to)))


def _plan(desk: Desk, rate_rows_s: float | None, make: Callable[[Config, Catalog], Plan]) -> None:
    """Makes the plan, and shows it with what its moves will carry."""
    config = desk.config()
    with desk.catalog(config) as catalog, Statistics(config) as statistics:
        plan = make(config, catalog)
        found = estimates(statistics, catalog.resolve(plan.id))
        desk.show(documents.plan(plan, found, choose_rate(catalog, rate_rows_s)), render.plan)


@verb(app)
def preflight(desk: Desk, any_id: Id) -> None:
    """Go through the whole checklist: pass, fail, and how to fix."""
    config = desk.config()
    with desk.catalog(config) as catalog:
        lists = {move.id: checklist(config, move) for move in catalog.resolve(any_id)}
    desk.show(documents.checklists(lists), render.checklists)
    for lines in lists.values():
        if lines[0].check == ANSWERS and lines[0].problem is not None:
            raise Unreachable(lines[0].problem.message, hint=lines[0].problem.hint)
    failed = sum(not line.passed for lines in lists.values() for line in lines)
    if failed:
        raise Refused(f"{failed} checks of {any_id} fail", hint="mend what they name; nothing was changed")
