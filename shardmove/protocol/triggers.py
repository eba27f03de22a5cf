"""The triggers of a move on its tables: three row triggers and a TRUNCATE trigger, on both shards.

A row trigger of a partitioned table is cloned to each partition, also to those that come later. A TRUNCATE trigger is
not: each member of the family gets its own. Every one is ENABLE ALWAYS, member by member: what a subscription applies
is a change too, and our own writes as a replica must be seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from shardmove.domain.moves import Move, TableName
from shardmove.domain.points import Effect
from shardmove.postgres import locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, table_sql
from shardmove.postgres.sql import table as relation
from shardmove.protocol import capture, kept, parts
from shardmove.protocol.families import enable_always, family, members
from shardmove.protocol.parts import EVENTS, Part, capture_function, trigger, trigger_prefix


def install_triggers(connection: Connection, part: Part, patience: locks.Patience, *, lease_number: int) -> None:
    """Arms every table of the move, one transaction a table. Safe to repeat: an armed table is left alone.

    From the commit on, each write to the range passes the fence and is journalled: CREATE TRIGGER's lock has waited for
    the table's writers in flight, and who writes later sees the trigger, also from an older snapshot. On a shard
    whose kept fence overlaps the move's ranges, the same transaction replaces that fence by what remains of it.

    Raises:
        Failed: a table could not be locked; those before it stay armed, which harms nothing.
        LeaseLost: as above.
    """
    with kept.changing(connection, part.move.keyspace):
        _arm(connection, part, patience, lease_number)


def _arm(connection: Connection, part: Part, patience: locks.Patience, lease_number: int) -> None:
    move = part.move
    remainder = kept.remainder(connection, move)
    for ordinal, table in enumerate(part.tables, 1):
        kept_is_there = kept.is_on(connection, table)
        # Kept triggers are set anew also on an armed table: another move's ending may have widened them again since.
        if is_armed(connection, move.id, table) and not kept_is_there:
            continue

        def arm(ordinal: int = ordinal, table: Table = table, kept_is_there: bool = kept_is_there) -> None:
            if not is_armed(connection, move.id, table):
                create_triggers(connection, move, ordinal, table)
            if kept_is_there:
                kept.set_triggers(connection, table, remainder, move.keyspace)

        locks.change_table(
            connection,
            table.name,
            Effect.ARM,
            arm,
            patience=patience,
            readers_block=kept_is_there and not remainder,  # the kept triggers are dropped
            check=lambda: parts.hold_lease(connection, move.id, lease_number),
        )
    kept.record(connection, move.keyspace, remainder, move.id, lease_number)


def create_triggers(connection: Connection, move: Move, ordinal: int, table: Table) -> None:
    """The row triggers, and a TRUNCATE trigger for each member; whatever was there of the move is replaced."""
    for event in EVENTS:
        rows_in_range = capture.when(event, table.key_column, move.ranges, move.keyspace)
        connection.execute(
            sql.SQL(
                "CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW WHEN (({}) AND {}) EXECUTE FUNCTION {}()"
            ).format(
                trigger(move.id, event),
                sql.SQL(event),
                table_sql(table),
                rows_in_range,
                capture.not_our_own(connection, move.id),
                capture_function(move.id, ordinal),
            )
        )
    for member, _ in members(connection, table):
        connection.execute(
            sql.SQL(
                "CREATE OR REPLACE TRIGGER {} BEFORE TRUNCATE ON {} EXECUTE FUNCTION shardmove.refuse_truncate()"
            ).format(trigger(move.id, "TRUNCATE"), relation(member))
        )
    enable_always(connection, table, trigger_prefix(move.id))


def is_armed(connection: Connection, move_id: str, table: Table) -> bool:
    """All four triggers of the move are on the table and on each partition, and fire always."""
    row = connection.execute(
        sql.SQL(
            "WITH RECURSIVE {} SELECT min(armed) FROM (SELECT count(t.oid) AS armed FROM family f"
            " LEFT JOIN pg_catalog.pg_trigger t ON t.tgrelid = f.oid AND t.tgenabled = 'A'"
            " AND pg_catalog.starts_with(t.tgname, {}) GROUP BY f.oid) AS counted"
        ).format(family(connection, table), sql.Literal(trigger_prefix(move_id)))
    ).fetchone()
    return row == (len(EVENTS) + 1,)


def remove_triggers(connection: Connection, move_id: str, patience: locks.Patience, *, lease_number: int) -> None:
    """Takes the move's triggers off every table that has some, also off what was a partition of a moving table once.

    Raises:
        Failed: a table could not be locked; run it again.
        LeaseLost: another coordinator has taken over.
    """
    for name, triggers in _carriers(connection, trigger_prefix(move_id)):
        _remove(connection, move_id, name, triggers, patience, lease_number)


def _carriers(connection: Connection, prefix: str) -> list[tuple[TableName, list[str]]]:
    """The tables that have triggers of that prefix, and which; clones go with what they were cloned from."""
    rows = connection.execute(
        "SELECT n.nspname, c.relname, array_agg(t.tgname ORDER BY t.tgname) FROM pg_catalog.pg_trigger t"
        " JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE t.tgparentid = 0 AND NOT t.tgisinternal AND pg_catalog.starts_with(t.tgname, %s)"
        " GROUP BY n.nspname, c.relname ORDER BY 1, 2",
        (prefix,),
    ).fetchall()
    return [(TableName(schema, name), triggers) for schema, name, triggers in rows]


def _remove(
    connection: Connection,
    move_id: str,
    name: TableName,
    present: Sequence[str],
    patience: locks.Patience,
    lease_number: int,
) -> None:
    # DISABLE is not blocked by readers, DROP is: disarm at once, drop when nobody reads.
    def check() -> None:
        parts.hold_lease(connection, move_id, lease_number)

    def disarm() -> None:
        for each in present:
            connection.execute(
                sql.SQL("ALTER TABLE {} DISABLE TRIGGER {}").format(relation(name), sql.Identifier(each))
            )

    def drop() -> None:
        for each in present:
            connection.execute(sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(each), relation(name)))

    locks.change_table(connection, name, Effect.DISARM, disarm, patience=patience, check=check)
    locks.change_table(connection, name, Effect.DROP_TRIGGERS, drop, patience=patience, readers_block=True, check=check)
