"""Uninstalling: every object of ours on every shard and in the catalog, listed, then removed.

With the objects go the fences that shards keep for ranges which they gave away: from then on nothing but the
application's own routing keeps a write from the wrong shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from psycopg import errors, sql

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator.steps import Step, perform, pretend
from shardmove.domain.errors import Failed, Refused
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, connect, translated
from shardmove.postgres.locks import STOPPED_MS, Patience, change_table
from shardmove.protocol import objects

APPLICATION_NAME = "shardmove uninstall"


@dataclass(frozen=True, slots=True)
class Item:
    """One object of ours. `place` is a shard's name, or `catalog`."""

    place: str
    kind: str
    name: str


# Without the clones on partitions: they come and go with what they were cloned from.
_TRIGGERS = """
    SELECT n.nspname, c.relname, t.tgname
    FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace
    WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND f.nspname = 'shardmove' ORDER BY 1, 2, 3
"""

_IN_SCHEMA = """
    SELECT CASE c.relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' ELSE 'table' END, c.relname
    FROM pg_catalog.pg_class c WHERE c.relnamespace = %(schema)s::text::regnamespace AND c.relkind IN ('r', 'S', 'v')
    UNION ALL
    SELECT 'function', p.proname FROM pg_catalog.pg_proc p WHERE p.pronamespace = %(schema)s::text::regnamespace
    UNION ALL
    SELECT 'schema', %(schema)s::text
    ORDER BY 1, 2
"""


def uninstall(config: Config, catalog: Catalog, *, dry_run: bool, tell: Callable[[str], None]) -> list[Item]:
    """Removes everything of ours: the shards first, the catalog last, so that a repeat finds what is left.

    Returns what was there; `tell` hears each step.

    Raises:
        Refused: a move is unfinished, tables that one made are, or a shard belongs to another catalog or was touched by
            a newer release. Nothing was removed.
        Unreachable: a shard does not answer. Nothing was removed.
        Failed: a table could not be locked. What was removed before stays removed; run it again.
    """
    _require_finished(catalog)
    with ExitStack() as stack:
        shards = {
            name: stack.enter_context(connect(dsn, application_name=APPLICATION_NAME))
            for name, dsn in config.shards.items()
        }
        cluster_id = catalog.cluster_id()
        ours = {name: connection for name, connection in shards.items() if objects.has_schema(connection)}
        for name, connection in ours.items():
            _require_ours(name, connection, cluster_id)
        items = [item for name, connection in ours.items() for item in _on_shard(name, connection)]
        items += _in_catalog(config)
        patience = Patience(config.limits.ddl_lock_timeout_ms, config.limits.ddl_patience_s)
        steps = [step for name, connection in ours.items() for step in _steps(name, connection, patience)]
        steps.append(Step("drop the schema shardmove_catalog in the catalog's database", catalog.uninstall))
        with translated("uninstall"):
            (pretend if dry_run else perform)(tell)(steps)
    return items


def _require_finished(catalog: Catalog) -> None:
    unfinished = [move.id for move in catalog.moves(unfinished_only=True)]
    if unfinished:
        raise Refused(
            f"unfinished moves need our objects: {', '.join(unfinished)}",
            hint="complete them or roll them back first: `shardmove status`",
        )


def _require_ours(shard: str, connection: Connection, cluster_id: str) -> None:
    try:
        objects.check_schema(connection, cluster_id)
    except Refused as error:
        raise Refused(f"shard {shard}: {error.message}", hint=error.hint) from error
    if objects.makers(connection):
        raise Refused(
            f"shard {shard}: tables that a move made lack indexes and foreign keys, and we alone know which",
            hint="run what is in shardmove.later there, in the order of its numbers, then delete its rows",
        )


def _on_shard(shard: str, connection: Connection) -> Iterator[Item]:
    for table, trigger in _triggers(connection):
        yield Item(shard, "trigger", f"{trigger} on {table}")
    for kind, name in connection.execute(_IN_SCHEMA, {"schema": "shardmove"}).fetchall():
        yield Item(shard, kind, name if kind == "schema" else f"shardmove.{name}")


def _in_catalog(config: Config) -> list[Item]:
    with connect(config.catalog_dsn, application_name=APPLICATION_NAME) as connection:
        rows = connection.execute(_IN_SCHEMA, {"schema": "shardmove_catalog"}).fetchall()
    return [Item("catalog", kind, name if kind == "schema" else f"shardmove_catalog.{name}") for kind, name in rows]


def _triggers(connection: Connection) -> list[tuple[TableName, str]]:
    rows = connection.execute(_TRIGGERS).fetchall()
    return [(TableName(schema, table), trigger) for schema, table, trigger in rows]


def _steps(shard: str, connection: Connection, patience: Patience) -> Iterator[Step]:
    by_table: dict[TableName, list[str]] = {}
    for table, trigger in _triggers(connection):
        by_table.setdefault(table, []).append(trigger)
    for table, triggers in by_table.items():
        yield Step(
            f"drop {', '.join(triggers)} on {table} on {shard}",
            lambda table=table, triggers=triggers: _drop_triggers(connection, table, triggers, patience),  # type: ignore[misc]
        )
    yield Step(f"drop the schema shardmove on {shard}", lambda: _drop_schema(connection, shard, patience))


def _drop_triggers(connection: Connection, table: TableName, triggers: Sequence[str], patience: Patience) -> None:
    def drop() -> None:
        for trigger in triggers:
            connection.execute(
                sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(
                    sql.Identifier(trigger), sql.Identifier(table.schema, table.name)
                )
            )

    change_table(connection, table, Effect.UNINSTALL_TABLE, drop, patience=patience, readers_block=True)


def _drop_schema(connection: Connection, shard: str, patience: Patience) -> None:
    try:
        with effects.writing(connection, Effect.UNINSTALL_SHARD):
            # Another `uninstall` waits for us to end: where this process is stopped, the server ends the session.
            connection.execute(
                "SELECT pg_catalog.set_config('lock_timeout', %s, true),"
                " pg_catalog.set_config('idle_in_transaction_session_timeout', %s, true)",
                (f"{max(1, round(patience.total_s * 1000))}ms", f"{STOPPED_MS}ms"),
            )
            connection.execute("DROP SCHEMA shardmove CASCADE")
    except errors.LockNotAvailable:
        raise Failed(
            f"could not drop the schema shardmove on {shard} within {patience.total_s:g} s: a transaction that used"
            " something in it is still open",
            hint="end that transaction (pg_locks has it), then run the same command again",
        ) from None
