"""Checks of the columns that rows are placed and carried by: the key column of each table, and its keyset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, LiteralString

import psycopg
from psycopg import sql

from shardmove.coordinator.checks.asking import ask, entry, gathered, shown
from shardmove.coordinator.checks.site import Checks, Note, Problem, Site, on
from shardmove.domain.errors import Refused
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection, explain
from shardmove.postgres.introspect import Table, describe, index_answers, plain_tables
from shardmove.postgres.sql import names, type_name
from shardmove.protocol.parts import XID

# A narrower integer is compared, and hashed, as a wider one; a wider one may hold keys that no range can name. char(n)
# is left out: its blanks count in the program that looks for the shard, and not on the server.
_CARRIES: Final[Mapping[KeyType, tuple[str, ...]]] = {
    KeyType.SMALLINT: ("smallint",),
    KeyType.INTEGER: ("integer", "smallint"),
    KeyType.BIGINT: ("bigint", "integer", "smallint"),
    KeyType.TEXT: ("text", "character varying"),
    KeyType.UUID: ("uuid",),
    KeyType.DATE: ("date",),
    KeyType.TIMESTAMPTZ: ("timestamp with time zone",),
}
NULLS_COUNTED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class _KeyColumn:
    """`relation`, `quoted`, `declared` and `unproven` are SQL. `ground`: the type that a domain is made of."""

    relation: str
    schema_name: str
    table_name: str
    name: str
    quoted: str
    is_there: bool
    declared: str | None
    ground: str | None
    not_null: bool | None
    unproven: str | None
    generated: str | None
    deterministic: bool | None


_KEY_COLUMNS: LiteralString = """
    SELECT f.oid::regclass::text AS relation, f.schema_name, f.table_name, f.key_column AS name,
           pg_catalog.quote_ident(f.key_column) AS quoted, a.attname IS NOT NULL AS is_there,
           pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared,
           (WITH RECURSIVE ground(oid) AS (
                SELECT a.atttypid
                UNION ALL SELECT t.typbasetype FROM ground g JOIN pg_catalog.pg_type t ON t.oid = g.oid
                WHERE t.typtype = 'd')
            SELECT pg_catalog.format_type(t.oid, NULL) FROM ground JOIN pg_catalog.pg_type t USING (oid)
            WHERE t.typtype <> 'd') AS ground,
           a.attnotnull AS not_null,
           (SELECT pg_catalog.quote_ident(k.conname) FROM pg_catalog.pg_constraint k
            WHERE k.conrelid = f.oid AND k.contype = 'n' AND NOT k.convalidated AND k.conkey = ARRAY[a.attnum]
           ) AS unproven,
           a.attgenerated::text AS generated, coalesce(co.collisdeterministic, true) AS deterministic
    FROM family f
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attname = f.key_column AND a.attnum > 0
        AND NOT a.attisdropped
    LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
    WHERE f.is_root ORDER BY 1
"""


def _key_columns(site: Site) -> Problem | None:
    """Each row is placed by its key: it needs one that every shard reads alike, and that is known when triggers run."""
    return gathered(
        problem
        for shard, connection in site.sides
        for column in _read_key_columns(site, connection)
        for problem in _column_problems(site, shard, connection, column)
    )


def _read_key_columns(site: Site, connection: Connection) -> list[_KeyColumn]:
    return [_KeyColumn(*row) for row in ask(connection, site.move.keyspace.tables, _KEY_COLUMNS)]


def _column_problems(site: Site, shard: str, connection: Connection, column: _KeyColumn) -> Iterator[Problem]:
    alter, what = f"ALTER TABLE {column.relation} ALTER {column.quoted}", f"the key column {column.quoted}"
    of = f"of {shown(column.relation)} on {shard}"
    if not column.is_there:
        yield Problem(
            f"there is no column {column.quoted} in {shown(column.relation)} on {shard}",
            f"{entry(site)} {json.dumps(shown(column.relation))}: name the column that holds the key",
        )
        return
    if column.generated:
        yield Problem(
            f"{what} {of} is generated: triggers and journal do not see what it will be",
            on({shard: _plain_column(column)}),
        )
        return
    if column.ground not in _CARRIES[site.move.keyspace.key_type]:
        wanted = site.move.keyspace.key_type
        yield Problem(
            f"{what} {of} is {column.declared}, the keyspace's keys are {wanted}",
            on({shard: [f"{alter} TYPE {wanted} USING {column.quoted}::text::{wanted};"]})
            + f"; or [keyspaces.{site.move.keyspace.name}] key_type, and plan anew",
        )
    elif not column.deterministic:
        yield Problem(
            f"{what} {of} has a collation that takes different texts for equal",
            on({shard: [f'{alter} TYPE {column.declared} COLLATE pg_catalog."C";']}),
        )
    if not column.not_null or column.unproven:
        yield _may_be_null(site, shard, connection, column)


def _plain_column(column: _KeyColumn) -> list[str]:
    if column.generated == "s":
        return [f"ALTER TABLE {column.relation} ALTER {column.quoted} DROP EXPRESSION;"]
    table = f"ALTER TABLE {column.relation}"
    return [
        f"{table} ADD COLUMN shardmove_key {column.declared};",
        f"UPDATE {column.relation} SET shardmove_key = {column.quoted};",
        f"{table} DROP COLUMN {column.quoted};",
        f"{table} RENAME COLUMN shardmove_key TO {column.quoted};",
        f"{table} ALTER {column.quoted} SET NOT NULL;",
    ]


def _may_be_null(site: Site, shard: str, connection: Connection, column: _KeyColumn) -> Problem:
    name = TableName(column.schema_name, column.table_name)
    (table,) = plain_tables(connection, {name: column.name})
    row = connection.execute(
        sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} IS NULL LIMIT {}) AS counted").format(
            table.rows, sql.Identifier(column.name), sql.Literal(NULLS_COUNTED_MAX)
        )
    ).fetchone()
    nulls = row[0] if row else 0
    mend = (
        f"ALTER TABLE {column.relation} VALIDATE CONSTRAINT {column.unproven};"
        if column.unproven
        else f"ALTER TABLE {column.relation} ALTER {column.quoted} SET NOT NULL;"
    )
    found = f", and is in {nulls}{' or more' if nulls == NULLS_COUNTED_MAX else ''} rows" if nulls else ""
    before = f"give these rows a key, or delete them: SELECT * FROM {column.relation} WHERE {column.quoted} IS NULL\n"
    return Problem(
        f"the key column {column.quoted} of {shown(column.relation)} on {shard} may be NULL{found}: a row without a key"
        " belongs to no shard",
        (before if nulls else "") + on({shard: [mend]}),
    )


# --- the keyset


def _keysets(site: Site) -> Problem | None:
    """Batches are cut by a unique key over NOT NULL columns, and the journal names rows by it. Where no index holds it
    in the order that we compare by, each batch sorts the whole table."""
    return gathered(
        problem
        for shard, connection in site.sides
        for table in plain_tables(connection, _with_sound_keys(site, shard, connection))
        for problem in _keyset_problems(shard, connection, table)
    )


def _with_sound_keys(site: Site, shard: str, connection: Connection) -> Mapping[TableName, str]:
    """What another line says of a key column is not said again."""
    return {
        TableName(column.schema_name, column.table_name): column.name
        for column in _read_key_columns(site, connection)
        if not any(_column_problems(site, shard, connection, column))
    }


def _keyset_problems(shard: str, connection: Connection, table: Table) -> Iterator[Problem]:
    try:
        described = describe(connection, table.name, table.key_column)
    except Refused as refusal:
        yield Problem(f"on {shard}: {refusal.message}", _new_keyset(shard, connection, table) or refusal.hint)
        return
    relation = table_text(connection, table)
    if XID in described.keyset_names:
        yield Problem(
            f"the journal has a column {XID} of its own, and {shown(relation)} has one of that name in its key",
            on({shard: [f"ALTER TABLE {relation} RENAME COLUMN {XID} TO row_xid;"]}),
        )
    error = _comparison_error(connection, described)
    if error is not None:
        yield Problem(
            f"the key of {shown(relation)} on {shard} ({', '.join(described.keyset_names)}) cannot be compared with an"
            f" empty search_path: {error}",
            _new_keyset(shard, connection, table) or "add a unique key of columns of built-in types",
        )
    if not index_answers(connection, described):
        columns = names(described.keyset_names).as_string(connection)
        yield Note(
            f"no index of {shown(relation)} on {shard} holds ({columns}) in the order of the texts' bytes: each batch"
            " sorts the table",
            _IN_PARTITIONS
            if described.is_partitioned
            else on({shard: [_bytewise_index(connection, described, relation)]}),
        )


_IN_PARTITIONS: Final = (
    'a partitioned table takes no such index beside its key: make it anew with columns COLLATE "C", or expect batches'
    " to take longer"
)


def table_text(connection: Connection, table: Table) -> str:
    """The table as the server itself writes it."""
    row = connection.execute(
        "SELECT c.oid::regclass::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
        " ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        (table.name.schema, table.name.name),
    ).fetchone()
    return str(row[0]) if row else str(table.name)


def _bytewise_index(connection: Connection, table: Table, relation: str) -> str:
    return f"CREATE UNIQUE INDEX CONCURRENTLY ON {relation} ({table.order.as_string(connection)});"


def _comparison_error(connection: Connection, table: Table) -> str | None:
    """What the server says to the comparisons of batches, catch-ups and triggers; it reads no row."""
    nulls = sql.SQL(", ").join(sql.SQL("NULL::{}").format(type_name(column.type)) for column in table.keyset)
    columns = names(table.keyset_names)
    query = sql.SQL(
        "SELECT FROM {rows} WHERE ROW({order}) > ROW({nulls}) AND ({columns}) IN (SELECT {nulls})"
        " AND ROW({columns}) IS DISTINCT FROM ROW({nulls}) LIMIT 0"
    ).format(rows=table.rows, order=table.order, nulls=nulls, columns=columns)
    try:
        connection.execute(query, prepare=False)
    except psycopg.ProgrammingError as error:
        return explain(error)
    return None


_MENDABLE: LiteralString = """
    SELECT pg_catalog.string_agg(pg_catalog.format('ALTER %%I SET NOT NULL', a.attname), ', ' ORDER BY k.place)
    FROM family f JOIN pg_catalog.pg_index i ON i.indrelid = f.oid AND i.indisunique AND i.indimmediate
        AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND NOT i.indisexclusion
    CROSS JOIN LATERAL unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(attnum, place)
    JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attnum = k.attnum AND NOT a.attnotnull
    WHERE f.is_root AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute x
        LEFT JOIN pg_catalog.pg_collation co ON co.oid = x.attcollation
        WHERE x.attrelid = f.oid AND x.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
          AND (x.attgenerated <> '' OR NOT coalesce(co.collisdeterministic, true)))
    GROUP BY i.indexrelid ORDER BY count(*) LIMIT 1
"""


def _new_keyset(shard: str, connection: Connection, table: Table) -> str | None:
    """A unique index that only lacks NOT NULL, made whole; or else a numbered column. None: no such advice fits all."""
    relation = table_text(connection, table)
    rows = ask(connection, {table.name: table.key_column}, _MENDABLE)
    if rows:
        return on({shard: [f"ALTER TABLE {relation} {rows[0][0]};"]})
    if table.is_partitioned:
        return None
    key = sql.Identifier(table.key_column).as_string(connection)
    return on(
        {
            shard: [
                f"ALTER TABLE {relation} ADD COLUMN row_number bigint GENERATED BY DEFAULT AS IDENTITY,"
                f" ADD UNIQUE ({key}, row_number);"
            ]
        }
    )


KEYS: Checks = (
    ("every table has a key column of the keyspace's type", _key_columns),
    ("every table has a unique key to cut batches by", _keysets),
)
