"""What a shard's own catalogs say about the tables that move.

`describe` makes the one description of a table that all SQL of a move is built from; it is written down on both shards
when the move begins, so that everybody who touches the move builds the same statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from psycopg import sql
from psycopg.rows import class_row

from shardmove.domain.errors import Refused
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import Interval, Position, names, table, type_name


@dataclass(frozen=True, slots=True)
class KeysetColumn:
    """A column of the keyset. `collated`: it sorts by a collation, so that we compare it in "C" order instead."""

    name: str
    type: str
    collated: bool

    @property
    def sorting(self) -> sql.Composable:
        column = sql.Identifier(self.name)
        return sql.SQL('{} COLLATE "C"').format(column) if self.collated else column


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a move, as both shards have it.

    Attributes:
        columns: every column that is stored (generated ones left out), by name, in the source's order.
        keyset: the columns of the unique NOT NULL key that batches are cut by.
        binary: the COPY stream may be binary: no column's encoding carries object ids.
    """

    name: TableName
    key_column: str
    columns: tuple[str, ...]
    keyset: tuple[KeysetColumn, ...]
    binary: bool

    @property
    def copy_options(self) -> sql.SQL:
        return sql.SQL("(FORMAT binary)") if self.binary else sql.SQL("(FORMAT text)")

    @property
    def keyset_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.keyset)

    @property
    def order(self) -> sql.Composed:
        return sql.SQL(", ").join(column.sorting for column in self.keyset)

    def keyset_as_text(self) -> sql.Composed:
        return sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(c.name)) for c in self.keyset)

    def _position(self, position: Position) -> sql.Composed:
        return sql.SQL(", ").join(
            sql.SQL("{}::{}").format(sql.Literal(value), type_name(column.type))
            for value, column in zip(position, self.keyset, strict=True)
        )

    def within(self, interval: Interval) -> sql.Composable:
        """True for keyset positions in (after, upto]: one row comparison an end, which an index can answer."""
        ends = zip((sql.SQL(">"), sql.SQL("<=")), interval, strict=True)
        parts = [
            sql.SQL("ROW({}) {} ROW({})").format(self.order, operator, self._position(end))
            for operator, end in ends
            if end is not None
        ]
        return sql.SQL("({})").format(sql.SQL(" AND ").join(parts)) if parts else sql.SQL("true")

    def unnested(self, positions: Sequence[Position]) -> sql.Composed:
        """The positions as a set of rows of the keyset's types, for a FROM."""
        arrays = sql.SQL(", ").join(
            sql.SQL("{}::text[]::{}[]").format(sql.Literal([p[i] for p in positions]), type_name(column.type))
            for i, column in enumerate(self.keyset)
        )
        return sql.SQL("unnest({})").format(arrays)

    def listed(self, positions: Sequence[Position]) -> sql.Composed:
        """True for the rows at these keyset positions, however many."""
        return sql.SQL("({}) IN (SELECT * FROM {})").format(names(self.keyset_names), self.unnested(positions))


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: str
    not_null: bool
    generated: bool
    kind: str
    is_array: bool
    type_base: str
    builtin: bool
    collated: bool


@dataclass(frozen=True, slots=True)
class _UniqueKey:
    name: str
    is_primary: bool
    immediate: bool
    columns: list[str]
    not_null: bool


_COLUMNS = """
    SELECT a.attname AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
           a.attgenerated <> '' AS generated, t.typtype AS kind, t.typelem <> 0 AND t.typlen = -1 AS is_array,
           t.typname AS type_base, t.typnamespace = 'pg_catalog'::regnamespace AS builtin,
           coalesce(co.collname NOT IN ('C', 'POSIX'), false) AS collated
    FROM pg_catalog.pg_attribute a
    JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
    WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
"""

_UNIQUE_KEYS = """
    SELECT i.indexrelid::regclass::text AS name, i.indisprimary AS is_primary, i.indimmediate AS immediate,
           array_agg(a.attname ORDER BY k.position) AS columns, bool_and(coalesce(a.attnotnull, false)) AS not_null
    FROM pg_catalog.pg_index i
    CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, position)
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum > 0
    WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
      AND k.position <= i.indnkeyatts
    GROUP BY i.indexrelid, i.indisprimary, i.indimmediate
    ORDER BY 1
"""


def table_oid(connection: Connection, name: TableName) -> int | None:
    """The oid of an ordinary or partitioned table of that name, or None."""
    row = connection.execute(
        "SELECT c.oid::int8 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')",
        (name.schema, name.name),
    ).fetchone()
    return None if row is None else int(row[0])


def describe(connection: Connection, name: TableName, key_column: str) -> Table:
    """Describes one table.

    Raises:
        Refused: the table or its key column is missing, the key may be NULL, or there is no key to cut batches by.
    """
    oid = table_oid(connection, name)
    if oid is None:
        raise Refused(f"the table {name} does not exist on this shard")
    with connection.cursor(row_factory=class_row(_Column)) as cursor:
        columns = cursor.execute(_COLUMNS, (oid,)).fetchall()
    with connection.cursor(row_factory=class_row(_UniqueKey)) as cursor:
        keys = cursor.execute(_UNIQUE_KEYS, (oid,)).fetchall()
    by_name = {column.name: column for column in columns}
    _check_key_column(name, key_column, by_name)
    stored = [column for column in columns if not column.generated]
    keyset = _choose_keyset(name, key_column, keys, {column.name for column in stored})
    return Table(
        name=name,
        key_column=key_column,
        columns=tuple(column.name for column in stored),
        keyset=tuple(KeysetColumn(c, by_name[c].type, by_name[c].collated) for c in keyset),
        binary=all(_binary_is_portable(column) for column in stored),
    )


def _check_key_column(name: TableName, key_column: str, columns: Mapping[str, _Column]) -> None:
    if key_column not in columns:
        raise Refused(f"the table {name} has no column {key_column}", hint="[keyspaces.….tables] table = key column")
    column = columns[key_column]
    if not column.not_null:
        raise Refused(
            f"the key column {name}.{key_column} may be NULL; a row without a key belongs to no shard",
            hint=f"ALTER TABLE {name} ALTER {key_column} SET NOT NULL",
        )
    if column.generated:
        raise Refused(f"the key column {name}.{key_column} is generated; the journal cannot see it")


def _choose_keyset(name: TableName, key_column: str, keys: Sequence[_UniqueKey], stored: set[str]) -> Sequence[str]:
    usable = [key for key in keys if key.not_null and key.immediate and set(key.columns) <= stored]
    if not usable:
        raise Refused(
            f"the table {name} has no primary key and no unique index over NOT NULL columns to cut batches by",
            hint="add a primary key, or a unique index whose columns are all NOT NULL",
        )
    best = min(usable, key=lambda k: (k.columns[0] != key_column, not k.is_primary, len(k.columns), k.name))
    return list(best.columns)


_TEXT_ONLY = frozenset({"regclass", "regproc", "regprocedure", "regoper", "regoperator", "regtype", "regrole",
                        "regnamespace", "regconfig", "regdictionary", "regcollation", "tsvector", "tsquery",
                        "oidvector", "int2vector", "aclitem", "xml", "money"})  # fmt: skip


def _binary_is_portable(column: _Column) -> bool:
    """Binary only for plain built-in types and enums: arrays and composites carry oids, reg* are oids."""
    if column.kind == "e":
        return True
    return bool(column.kind == "b" and column.builtin and not column.is_array and column.type_base not in _TEXT_ONLY)


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """Columns of child and parent belong together by position."""

    name: str
    child: TableName
    parent: TableName
    child_columns: list[str]
    parent_columns: list[str]


_FOREIGN_KEY_COLUMNS = """
    SELECT f.conname, cn.nspname, c.relname, pn.nspname, p.relname,
           ARRAY(SELECT a.attname FROM unnest(f.conkey) WITH ORDINALITY AS k(attnum, place)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = k.attnum ORDER BY k.place),
           ARRAY(SELECT a.attname FROM unnest(f.confkey) WITH ORDINALITY AS k(attnum, place)
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = f.confrelid AND a.attnum = k.attnum ORDER BY k.place)
    FROM pg_catalog.pg_constraint f
    JOIN pg_catalog.pg_class c ON c.oid = f.conrelid JOIN pg_catalog.pg_namespace cn ON cn.oid = c.relnamespace
    JOIN pg_catalog.pg_class p ON p.oid = f.confrelid JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
    WHERE f.contype = 'f' AND f.conparentid = 0
    ORDER BY 2, 3, 1
"""


def foreign_key_columns(connection: Connection) -> list[ForeignKey]:
    """Every foreign key of the database, with its columns."""
    rows = connection.execute(_FOREIGN_KEY_COLUMNS).fetchall()
    return [
        ForeignKey(
            name, TableName(child_schema, child), TableName(parent_schema, parent), child_columns, parent_columns
        )
        for name, child_schema, child, parent_schema, parent, child_columns, parent_columns in rows
    ]


def foreign_keys(connection: Connection) -> list[tuple[TableName, TableName]]:
    """Every foreign key of the database as (child, parent)."""
    return [(each.child, each.parent) for each in foreign_key_columns(connection)]


def parents_first(tables: Iterable[TableName], keys: Iterable[tuple[TableName, TableName]]) -> list[TableName]:
    """The tables so that a referenced one comes before those that reference it; by name among equals.

    In a cycle no such order exists; then it is the order by name, which is right for us too: rows are applied as a
    replica, which checks no foreign keys.
    """
    wanted = sorted(tables, key=str)
    sorter: TopologicalSorter[TableName] = TopologicalSorter(dict.fromkeys(wanted, ()))
    for child, parent in keys:
        if child in wanted and parent in wanted and child != parent:
            sorter.add(child, parent)
    try:
        return list(sorter.static_order())
    except CycleError:
        return wanted


def describe_all(connection: Connection, tables: Mapping[TableName, str]) -> tuple[Table, ...]:
    """Every table of a keyspace, parents first. Raises Refused that names all tables at fault, not only the first."""
    described: dict[TableName, Table] = {}
    refusals: list[Refused] = []
    for name, key_column in tables.items():
        try:
            described[name] = describe(connection, name, key_column)
        except Refused as refusal:
            refusals.append(refusal)
    if refusals:
        hint = next((refusal.hint for refusal in refusals if refusal.hint), None)
        raise Refused("; ".join(refusal.message for refusal in refusals), hint=hint)
    return tuple(described[name] for name in parents_first(described, foreign_keys(connection)))


_SIGNATURE = """
    SELECT 'column ' || pg_catalog.quote_ident(a.attname),
           pg_catalog.format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
           || CASE WHEN a.attgenerated <> '' THEN ' generated' ELSE '' END
           || coalesce(' collate ' || co.collname, '')
    FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'constraint', pg_catalog.pg_get_constraintdef(c.oid)
    FROM pg_catalog.pg_constraint c WHERE c.conrelid = %(oid)s AND c.contype IN ('p', 'u', 'c', 'f', 'x')
    UNION ALL
    SELECT 'unique index', pg_catalog.regexp_replace(pg_catalog.pg_get_indexdef(i.indexrelid), 'INDEX .* ON ', 'ON ')
    FROM pg_catalog.pg_index i WHERE i.indrelid = %(oid)s AND i.indisunique
"""


def signature(connection: Connection, name: TableName) -> set[str]:
    """What has to be equal on both shards for a row to mean the same: columns, constraints, unique indexes."""
    oid = table_oid(connection, name)
    if oid is None:
        return {"the table is missing"}
    return {f"{what} {detail}" for what, detail in connection.execute(_SIGNATURE, {"oid": oid}).fetchall()}


def size_bytes(connection: Connection, name: TableName) -> int:
    """How large a table is on disk, with its indexes."""
    row = connection.execute(
        "SELECT pg_catalog.pg_total_relation_size(%s::oid)", (table_oid(connection, name),)
    ).fetchone()
    return int(row[0] or 0) if row else 0


def estimate_rows(connection: Connection, table_: Table, condition: sql.Composable) -> int:
    """How many rows the planner expects for the condition; rough, and free."""
    query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(table(table_.name), condition)
    row = connection.execute(query).fetchone()
    return 0 if row is None else int(row[0][0]["Plan"]["Plan Rows"])


def table_sql(table_: Table) -> sql.Identifier:
    return table(table_.name)
