"""Verbs on the cluster as a whole: its shape, its routes, our objects in it."""

from __future__ import annotations

from typing import Annotated

import structlog
import typer

from shardmove.catalog.store import Catalog
from shardmove.cli import documents, render
from shardmove.cli.desk import Desk, verb
from shardmove.cli.root import DryRun, app
from shardmove.coordinator import uninstalling
from shardmove.coordinator.diagnose import diagnose as find
from shardmove.coordinator.shards import ask, extend_fences, require_answers
from shardmove.coordinator.shards import grants as needed
from shardmove.domain.keys import Key
from shardmove.domain.moves import Keyspace


@verb(app)
def apply(desk: Desk) -> None:
    """Put the configuration into the catalog, which is created or upgraded; then ask every shard."""
    config = desk.config()
    with Catalog.install(config.catalog_dsn, routes_file=config.routes_file) as catalog:
        changes = [*catalog.apply(config), *extend_fences(config, catalog)]
    answers = ask(config)
    desk.show(documents.applied(changes, answers), render.applied)
    require_answers(answers)


@verb(app)
def grants(
    desk: Desk,
    role: Annotated[str, typer.Option(help="The role that shardmove connects as; it need not exist yet.")],
    on: Annotated[str | None, typer.Option(metavar="S", help="Only for this shard, or `catalog`.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what the role holds already.")] = False,
) -> None:
    """Print the SQL that gives a role the rights that it lacks: `shardmove grants --role R --on S | psql …`."""
    desk.show(documents.grants(role, needed(desk.config(), role, place=on, everything=all_)), render.grants)


@verb(app)
def shards(desk: Desk) -> None:
    """Show the shards: whether they answer, and what they own."""
    config = desk.config()
    with desk.catalog(config) as catalog:
        desk.show(documents.shards(ask(config), catalog.routes()), render.shards)


@verb(app)
def routes(
    desk: Desk,
    at: Annotated[str | None, typer.Option(metavar="KEY", help="Only the route of this key.")] = None,
    keyspace: Annotated[str | None, typer.Option(help="Only the routes of this keyspace.")] = None,
) -> None:
    """Show the route table: which shard owns which key range."""
    with desk.catalog(desk.config()) as catalog:
        table = catalog.routes()
        names = list(table.keyspaces) if keyspace is None else [catalog.keyspace(keyspace).name]
        places = {name: None if at is None else _place(catalog.keyspace(name), at) for name in names}
        chosen = {name: documents.at(table[name], place) for name, place in places.items()}
        desk.show(documents.routes(table, chosen), render.routes)


def _place(keyspace: Keyspace, key: str) -> Key:
    return keyspace.place(keyspace.key_type.parse(key))


@verb(app)
def diagnose(
    desk: Desk, any_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this plan or move.")] = None
) -> None:
    """Say what is stuck, left over or inconsistent, and the command that mends it."""
    config = desk.config()
    with desk.catalog(config) as catalog:
        moves = None if any_id is None else catalog.resolve(any_id)
        desk.show(documents.findings(find(config, catalog, moves)), render.findings)


@verb(app)
def uninstall(desk: Desk, dry_run: DryRun = False) -> None:
    """List every object of ours on every shard and in the catalog, and remove them all."""
    config, log = desk.config(), structlog.get_logger("shardmove")
    with desk.catalog(config) as catalog:
        items = uninstalling.uninstall(config, catalog, dry_run=dry_run, tell=lambda text: log.info("step", text=text))
    desk.show(documents.objects(items, is_dry_run=dry_run), render.objects)
