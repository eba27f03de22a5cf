"""A moving table and its partitions at every level: whatever is not cloned by the server is done member by member."""

from __future__ import annotations

from itertools import groupby

from psycopg import sql

from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import FAMILY, Table, table_sql
from shardmove.postgres.sql import table as relation


def family(connection: Connection, table: Table) -> sql.Composed:
    """A CTE `family(oid)` of the table and its partitions at every level."""
    listed = [table_sql(table).as_string(connection)]
    return sql.SQL(FAMILY).format(tables=sql.Literal(listed))


def members(connection: Connection, table: Table) -> list[tuple[TableName, bool]]:
    """The table itself and its partitions at every level; each with whether it is partitioned, and so holds no rows."""
    rows = connection.execute(
        sql.SQL(
            "WITH RECURSIVE {} SELECT n.nspname, c.relname, c.relkind = 'p' FROM family f"
            " JOIN pg_catalog.pg_class c ON c.oid = f.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        ).format(family(connection, table))
    ).fetchall()
    return [(TableName(schema, name), is_partitioned) for schema, name, is_partitioned in rows]


def enable_always(connection: Connection, table: Table, prefix: str) -> None:
    """Every trigger of that prefix on every member fires always, also where somebody has disabled it."""
    for member, names in groupby(_not_always(connection, table, prefix), key=lambda each: each[0]):
        actions = [sql.SQL("ENABLE ALWAYS TRIGGER {}").format(sql.Identifier(name)) for _, name in names]
        connection.execute(sql.SQL("ALTER TABLE ONLY {} {}").format(relation(member), sql.SQL(", ").join(actions)))


def _not_always(connection: Connection, table: Table, prefix: str) -> list[tuple[TableName, str]]:
    rows = connection.execute(
        sql.SQL(
            "WITH RECURSIVE {} SELECT n.nspname, c.relname, t.tgname FROM family f"
            " JOIN pg_catalog.pg_trigger t ON t.tgrelid = f.oid JOIN pg_catalog.pg_class c ON c.oid = f.oid"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE t.tgenabled <> 'A' AND pg_catalog.starts_with(t.tgname, {}) ORDER BY c.oid, t.tgname"
        ).format(family(connection, table), sql.Literal(prefix))
    ).fetchall()
    return [(TableName(schema, name), trigger_) for schema, name, trigger_ in rows]
