"""The objects of a move on its two shards, and the schema `shardmove` that holds them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib.resources import files

from psycopg import sql

from shardmove.domain import points
from shardmove.domain.errors import Refused
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres import effects, locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import KeysetColumn, Table
from shardmove.postgres.sql import type_name
from shardmove.protocol import capture, parts
from shardmove.protocol.kept import refused
from shardmove.protocol.parts import XID, Part, capture_function, journal, state_sequence
from shardmove.protocol.triggers import remove_triggers

LAYOUT = 2


def install_schema(connection: Connection, cluster_id: str) -> None:
    """Makes the schema `shardmove` on a shard, or brings the one of an older release up to date. Safe to repeat.

    A move that an older release began goes on: nothing of it is changed here.

    Raises:
        Refused: the shard belongs to another catalog, or was touched by a newer release. Nothing was changed.
    """
    with effects.writing(connection, Effect.INSTALL_SCHEMA):
        # Other moves wait for this lock: where this process is stopped, the server ends the session.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = '10s'")
        connection.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('shardmove schema', 0))"
        )
        if not has_schema(connection):
            connection.execute(files("shardmove.protocol").joinpath("shard.sql").read_bytes())
            connection.execute("INSERT INTO shardmove.about VALUES (%s, 1)", (cluster_id,))
        for layout in range(check_schema(connection, cluster_id) + 1, LAYOUT + 1):
            connection.execute(files("shardmove.protocol").joinpath(f"shard_{layout}.sql").read_bytes())
            connection.execute("UPDATE shardmove.about SET layout = %s", (layout,))


def check_schema(connection: Connection, cluster_id: str) -> int:
    """The layout of the shard's schema. Raises Refused unless it was made by this catalog and by no newer release."""
    row = connection.execute("SELECT cluster_id FROM shardmove.about").fetchone()
    if row is None or row[0] != cluster_id:
        raise Refused(
            "this shard belongs to another shardmove catalog",
            hint="if that catalog is gone: `shardmove uninstall` with it, or DROP SCHEMA shardmove CASCADE by hand",
        )
    return check_layout(connection)


def check_layout(connection: Connection) -> int:
    """The layout of the shard's schema. Raises Refused where a newer release made it: nobody here knows what it
    means."""
    row = connection.execute("SELECT layout FROM shardmove.about").fetchone()
    layout = 0 if row is None else int(row[0])
    if layout > LAYOUT:
        raise Refused("this shard was touched by a newer release of shardmove", hint="use that release")
    return layout


def has_schema(connection: Connection) -> bool:
    """The schema is there. Asked of the catalog's rows: to_regclass() may answer from what the session saw before."""
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'shardmove' AND c.relname = 'about')"
    ).fetchone()
    return row == (True,)


def makers(connection: Connection) -> frozenset[str]:
    """The moves that have made tables on this shard whose indexes, foreign keys and triggers are still to come."""
    if not has_schema(connection):
        return frozenset()
    row = connection.execute("SELECT pg_catalog.to_regclass('shardmove.later') IS NOT NULL").fetchone()
    if row != (True,):
        return frozenset()
    return frozenset(each[0] for each in connection.execute("SELECT DISTINCT move_id FROM shardmove.later").fetchall())


def install_move(connection: Connection, part: Part, *, lease_number: int) -> None:
    """Makes the fence row, the state sequence, the journals and the functions of a move on one shard.

    One transaction; where the fence row is there already it changes nothing, so that a repeat never opens or closes
    anything. Raises LeaseLost.
    """
    move_id = part.move.id
    with effects.writing(connection, Effect.INSTALL):
        parts.hold_lease(connection, move_id, lease_number)
        made = connection.execute(
            "INSERT INTO shardmove.fence (move_id, keyspace, peer, standing, is_open, is_whole, lease_number,"
            " fence_key, mirror_key, kept_before) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (move_id) DO NOTHING",
            (
                move_id,
                part.move.keyspace.name,
                part.peer,
                part.standing,
                part.is_source,
                part.is_source,
                lease_number,
                secrets.randbelow(2**63),
                secrets.randbelow(2**63),
                [str(range_) for range_ in refused(connection, part.move)],
            ),
        ).rowcount
        if not made:
            return
        state = state_sequence(move_id)
        connection.execute(sql.SQL("CREATE SEQUENCE {} MINVALUE 0").format(state))
        set_state(connection, move_id, capture.OPEN if part.is_source else capture.CLOSED)
        for ordinal, table in enumerate(part.tables, 1):
            _record_table(connection, move_id, ordinal, table)
            _create_journal(connection, move_id, ordinal, table)
            connection.execute(capture.capture_sql(connection, part, ordinal, table))


def set_state(connection: Connection, move_id: str, state: int) -> None:
    """Sets what writers see. It is not rolled back: set it after the fence row, in the same transaction."""
    setting = sql.SQL("SELECT pg_catalog.setval({}::regclass, {})").format(
        sql.Literal(f'shardmove."state_{move_id}"'), sql.Literal(state)
    )
    with points.around(Effect.SET_STATE):
        connection.execute(setting)


def _record_table(connection: Connection, move_id: str, ordinal: int, table: Table) -> None:
    connection.execute(
        "INSERT INTO shardmove.moving_table VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            move_id,
            ordinal,
            table.name.schema,
            table.name.name,
            table.key_column,
            list(table.columns),
            list(table.keyset_names),
            [column.type for column in table.keyset],
            [column.collated for column in table.keyset],
            table.binary,
            table.is_partitioned,
            table.key_collated,
        ),
    )


def update_tables(connection: Connection, move_id: str, tables: Sequence[Table]) -> None:
    """Records other columns for the tables of a move; their keysets are what they were. In the caller's transaction."""
    for ordinal, table in enumerate(tables, 1):
        connection.execute(
            "UPDATE shardmove.moving_table SET columns = %s, is_binary = %s WHERE move_id = %s AND ordinal = %s",
            (list(table.columns), table.binary, move_id, ordinal),
        )


def load_tables(connection: Connection, move_id: str) -> tuple[Table, ...]:
    """The tables of a move as recorded on the shard when it began, parents first; () before that."""
    rows = connection.execute(
        "SELECT schema_name, table_name, key_column, columns, keyset, keyset_types, keyset_collated, is_binary,"
        # Not there before layout 2: this is read before anybody brings the schema up to date.
        " coalesce((pg_catalog.to_jsonb(m) ->> 'is_partitioned')::boolean, false),"
        " coalesce((pg_catalog.to_jsonb(m) ->> 'key_collated')::boolean, true)"
        " FROM shardmove.moving_table AS m WHERE move_id = %s ORDER BY ordinal",
        (move_id,),
    ).fetchall()
    return tuple(
        Table(
            TableName(schema, name),
            key_column,
            tuple(columns),
            tuple(KeysetColumn(*column) for column in zip(keyset, types, collated, strict=True)),
            binary,
            is_partitioned,
            key_collated,
        )
        for schema, name, key_column, columns, keyset, types, collated, binary, is_partitioned, key_collated in rows
    )


def _create_journal(connection: Connection, move_id: str, ordinal: int, table: Table) -> None:
    # No unique constraint, ever: an entry that is dropped as a duplicate is a change that is lost. FULL, so that a
    # publication FOR ALL TABLES does not make our DELETE fail.
    name = journal(move_id, ordinal)
    columns = sql.SQL(", ").join(
        sql.SQL("{} {} NOT NULL").format(sql.Identifier(column.name), type_name(column.type)) for column in table.keyset
    )
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} ({}, {} xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id())"
            " WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000)"
        ).format(name, columns, sql.Identifier(XID))
    )
    connection.execute(sql.SQL("CREATE INDEX ON {} ({})").format(name, sql.Identifier(XID)))
    connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(name))


def remove_move(connection: Connection, move_id: str, patience: locks.Patience, *, lease_number: int) -> None:
    """Takes every object of a move off one shard: triggers off first, then all else. Safe to repeat.

    What stays is the row that says that the move has ended here.

    Raises:
        Failed: a table could not be locked; run it again.
        LeaseLost: another coordinator has taken over.
    """
    if parts.has_ended(connection, move_id):
        return
    remove_triggers(connection, move_id, patience, lease_number=lease_number)
    with effects.writing(connection, Effect.REMOVE):
        parts.hold_lease(connection, move_id, lease_number)
        connection.execute("UPDATE shardmove.lease SET has_ended = true WHERE move_id = %s", (move_id,))
        for ordinal, _ in enumerate(load_tables(connection, move_id), 1):
            connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}()").format(capture_function(move_id, ordinal)))
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(journal(move_id, ordinal)))
        connection.execute(sql.SQL("DROP SEQUENCE IF EXISTS {}").format(state_sequence(move_id)))
        for owned in ("batch", "moving_table", "fence"):
            connection.execute(
                sql.SQL("DELETE FROM {} WHERE move_id = {}").format(
                    sql.Identifier("shardmove", owned), sql.Literal(move_id)
                )
            )
