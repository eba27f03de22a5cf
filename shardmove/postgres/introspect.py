"""What a shard's own catalogs say about the tables that move.

`describe` makes the one description of a table that all SQL of a move is built from; it is written down on both shards
when the move begins, so that everybody who touches the move builds the same statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import LiteralString

from psycopg import sql
from psycopg.rows import class_row

from shardmove.domain.errors import Refused
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import Interval, Position, as_bytes, names, table, type_name


@dataclass(frozen=True, slots=True)
class KeysetColumn:
    """A column of the keyset. `collated`: it sorts by a collation, so that we compare it in "C" order instead."""

    name: str
    type: str
    collated: bool

    @property
    def sorting(self) -> sql.Composable:
        column = sql.Identifier(self.name)
        return as_bytes(column) if self.collated else column


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a move, as both shards have it.

    Attributes:
        columns: every column that is stored (generated ones left out), by name, in the source's order.
        keyset: the columns of the unique NOT NULL key that batches are cut by.
        binary: the COPY stream may be binary: no column's encoding carries object ids.
        is_partitioned: its partitions' rows are its rows. Of a table that others inherit from, only its own rows are.
        key_collated: the key column sorts by a collation; ranges compare it in "C" order.
    """

    name: TableName
    key_column: str
    columns: tuple[str, ...]
    keyset: tuple[KeysetColumn, ...]
    binary: bool
    is_partitioned: bool = False
    key_collated: bool = True

    @property
    def rows(self) -> sql.Composable:
        """The table in FROM, DELETE, LOCK and ALTER: never the rows of a table that inherits from it."""
        name = table(self.name)
        return name if self.is_partitioned else sql.SQL("ONLY {}").format(name)

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
        """A SELECT of the positions as rows of the keyset's types."""
        places = [sql.Identifier(f"p{number}") for number, _ in enumerate(self.keyset)]
        return sql.SQL("SELECT {} FROM unnest({}) AS position ({})").format(
            sql.SQL(", ").join(
                sql.SQL("{}::{}").format(place, type_name(column.type))
                for place, column in zip(places, self.keyset, strict=True)
            ),
            sql.SQL(", ").join(
                sql.SQL("{}::text[]").format(sql.Literal([p[i] for p in positions])) for i, _ in enumerate(self.keyset)
            ),
            sql.SQL(", ").join(places),
        )

    def listed(self, positions: Sequence[Position]) -> sql.Composed:
        """True for the rows at these keyset positions, however many."""
        return sql.SQL("({}) IN ({})").format(names(self.keyset_names), self.unnested(positions))


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    type: str
    not_null: bool
    generated: str
    kind: str
    is_array: bool
    type_base: str
    builtin: bool
    collated: bool
    deterministic: bool
    comparable: bool


@dataclass(frozen=True, slots=True)
class _UniqueKey:
    """`sorts_as_bytes`: the index holds each text by its bytes, as we compare them, so that it can answer us."""

    name: str
    is_primary: bool
    immediate: bool
    columns: list[str]
    not_null: bool
    sorts_as_bytes: bool


# Which collations compare texts by their bytes: "C" and "POSIX", all of the builtin provider, and the database's own
# where it is one of these. (Before PostgreSQL 15 a database has no provider to ask for: it is libc.)
_BY_BYTES = """
    SELECT co.oid FROM pg_catalog.pg_collation co
    CROSS JOIN (SELECT datcollate, coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c') AS provider
                FROM pg_catalog.pg_database d WHERE datname = pg_catalog.current_database()) AS db
    WHERE co.collname IN ('C', 'POSIX') OR co.collprovider = 'b'
       OR (co.collprovider = 'd' AND (db.provider = 'b' OR (db.provider = 'c' AND db.datcollate IN ('C', 'POSIX'))))
"""

# `comparable`: it sorts the same on every server. A composite with a collated attribute, or a range over a collated
# type, sorts by a collation that no expression of ours can replace; reg* types sort by numbers that each server gives.
_COLUMNS = """
    WITH by_bytes AS MATERIALIZED ({by_bytes})
    SELECT a.attname AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull AS not_null,
           a.attgenerated::text AS generated, t.typtype AS kind, t.typelem <> 0 AND t.typlen = -1 AS is_array,
           t.typname AS type_base, t.typnamespace = 'pg_catalog'::regnamespace AS builtin,
           a.attcollation <> 0 AND a.attcollation NOT IN (SELECT oid FROM by_bytes) AS collated,
           coalesce(co.collisdeterministic, true) AS deterministic,
           NOT EXISTS (SELECT FROM pg_catalog.pg_attribute part JOIN pg_catalog.pg_type p ON p.oid = part.atttypid
                       WHERE part.attrelid = t.typrelid AND part.attnum > 0 AND NOT part.attisdropped
                         AND (p.typtype IN ('c', 'r', 'm') OR p.typelem <> 0 AND p.typlen = -1
                              OR part.attcollation <> 0 AND part.attcollation NOT IN (SELECT oid FROM by_bytes)))
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_range r
                           WHERE t.oid IN (r.rngtypid, r.rngmultitypid) AND r.rngcollation <> 0
                             AND r.rngcollation NOT IN (SELECT oid FROM by_bytes))
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_type named
                           WHERE named.oid IN (t.oid, t.typelem, t.typbasetype) AND named.typname LIKE 'reg%'
                             AND named.typnamespace = 'pg_catalog'::regnamespace) AS comparable
    FROM pg_catalog.pg_attribute a
    JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
    WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
"""

_UNIQUE_KEYS = """
    WITH by_bytes AS MATERIALIZED ({by_bytes})
    SELECT i.indexrelid::regclass::text AS name, i.indisprimary AS is_primary, i.indimmediate AS immediate,
           array_agg(a.attname ORDER BY k.position) AS columns,
           bool_and(coalesce(a.attnotnull, false) AND u.conrelid IS NULL) AS not_null,
           bool_and(k.sorted_by = 0 OR k.sorted_by IN (SELECT oid FROM by_bytes)) AS sorts_as_bytes
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
    JOIN pg_catalog.pg_am m ON m.oid = c.relam AND m.amname = 'btree'
    CROSS JOIN LATERAL unnest(i.indkey::int2[], i.indcollation::oid[], i.indclass::oid[])
        WITH ORDINALITY AS k(attnum, sorted_by, class, position)
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum AND k.attnum > 0
    LEFT JOIN pg_catalog.pg_constraint u  -- NOT NULL NOT VALID: rows from before may still hold NULL
        ON u.conrelid = i.indrelid AND u.contype = 'n' AND NOT u.convalidated AND u.conkey = ARRAY[k.attnum]
    WHERE i.indrelid = {oid} AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
      AND k.position <= i.indnkeyatts
    GROUP BY i.indexrelid, i.indisprimary, i.indimmediate
    HAVING bool_and(coalesce((SELECT o.opcdefault FROM pg_catalog.pg_opclass o WHERE o.oid = k.class), false))
    ORDER BY 1
"""


FAMILY: LiteralString = """family(oid) AS (
        SELECT unnest({tables}::regclass[])::oid
        UNION
        SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN family f ON i.inhparent = f.oid
        JOIN pg_catalog.pg_class p ON p.oid = i.inhparent AND p.relkind = 'p'
    )"""
"""For WITH RECURSIVE: the tables, and their partitions at every level; not what inherits from a plain table."""


def table_oid(connection: Connection, name: TableName) -> int | None:
    """The oid of an ordinary or partitioned table of that name, or None."""
    return (_find(connection, name) or (None, False))[0]


def oids(connection: Connection, tables: Iterable[TableName]) -> list[str]:
    """For FAMILY: the tables that are here, by number; a name is looked up only for who may use its schema."""
    return [str(oid) for name in tables if (oid := table_oid(connection, name)) is not None]


def _find(connection: Connection, name: TableName) -> tuple[int, bool] | None:
    """The oid, and whether it is partitioned."""
    row = connection.execute(
        "SELECT c.oid::int8, c.relkind = 'p'"
        " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')",
        (name.schema, name.name),
    ).fetchone()
    return None if row is None else (int(row[0]), bool(row[1]))


def describe(connection: Connection, name: TableName, key_column: str, *, keyset_of: Table | None = None) -> Table:
    """Describes one table.

    Args:
        keyset_of: use the keyset of this description, if there is such a key here, too.

    Raises:
        Refused: the table or its key column is missing, the key may be NULL, or there is no key to cut batches by.
    """
    found = _find(connection, name)
    if found is None:
        raise Refused(f"the table {name} does not exist on this shard")
    oid, is_partitioned = found
    values = {"oid": sql.Literal(oid), "by_bytes": sql.SQL(_BY_BYTES)}
    with connection.cursor(row_factory=class_row(_Column)) as cursor:
        columns = cursor.execute(sql.SQL(_COLUMNS).format(**values)).fetchall()
    keys = _unique_keys(connection, oid)
    by_name = {column.name: column for column in columns}
    _check_key_column(name, key_column, by_name)
    stored = [column for column in columns if not column.generated]
    keyset = _choose_keyset(name, key_column, keys, stored, () if keyset_of is None else keyset_of.keyset_names)
    return Table(
        name=name,
        key_column=key_column,
        columns=tuple(column.name for column in stored),
        keyset=tuple(KeysetColumn(c, by_name[c].type, by_name[c].collated) for c in keyset),
        binary=all(_binary_is_portable(column) for column in stored),
        is_partitioned=is_partitioned,
        key_collated=by_name[key_column].collated,
    )


def plain_tables(connection: Connection, tables: Mapping[TableName, str]) -> list[Table]:
    """The tables that are there, by name = key column, for ranges and triggers: columns and keyset are left out."""
    found = ((name, key_column, _find(connection, name)) for name, key_column in tables.items())
    return [Table(name, key_column, (), (), False, each[1]) for name, key_column, each in found if each is not None]


def stored_columns(connection: Connection, name: TableName) -> tuple[tuple[str, ...], bool]:
    """The columns of a table that are stored, in order; and whether it is partitioned.

    Raises Refused where it is missing.
    """
    found = _find(connection, name)
    if found is None:
        raise Refused(f"the table {name} does not exist on this shard")
    rows = connection.execute(
        "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped"
        " AND attgenerated = '' ORDER BY attnum",
        (found[0],),
    ).fetchall()
    return tuple(row[0] for row in rows), found[1]


def _unique_keys(connection: Connection, oid: int) -> list[_UniqueKey]:
    with connection.cursor(row_factory=class_row(_UniqueKey)) as cursor:
        query = sql.SQL(_UNIQUE_KEYS).format(oid=sql.Literal(oid), by_bytes=sql.SQL(_BY_BYTES))
        return cursor.execute(query).fetchall()


def index_answers(connection: Connection, table_: Table) -> bool:
    """A unique index on this shard holds the table's keyset in the order that batches are cut by."""
    oid = table_oid(connection, table_.name)
    keys = [] if oid is None else _unique_keys(connection, oid)
    return any(tuple(key.columns) == table_.keyset_names and key.sorts_as_bytes for key in keys)


def _check_key_column(name: TableName, key_column: str, columns: Mapping[str, _Column]) -> None:
    if key_column not in columns:
        raise Refused(f"the table {name} has no column {key_column}", hint="[keyspaces.….tables] table = key column")
    column = columns[key_column]
    if not column.not_null:
        raise Refused(
            f"the key column {name}.{key_column} may be NULL; a row without a key belongs to no shard",
            hint=f"ALTER TABLE {table(name).as_string()} ALTER {sql.Identifier(key_column).as_string()} SET NOT NULL",
        )
    if column.generated:
        raise Refused(
            f"the key column {name}.{key_column} is generated: the journal and the fence do not see what it will be",
            hint="name the column that it is generated from, or make it a plain column",
        )
    if not column.deterministic:
        raise Refused(
            f"the key column {name}.{key_column} has a collation that takes different texts for equal",
            hint="give the column a deterministic collation",
        )


def _choose_keyset(
    name: TableName,
    key_column: str,
    keys: Sequence[_UniqueKey],
    stored: Sequence[_Column],
    wanted: Sequence[str],
) -> Sequence[str]:
    sortable = {column.name for column in stored if column.comparable and column.deterministic}
    usable = [key for key in keys if key.not_null and key.immediate and set(key.columns) <= sortable]
    if not usable:
        raise Refused(
            f"the table {name} has no primary key and no unique index over NOT NULL columns to cut batches by",
            hint="add a primary key, or a unique index whose columns are all NOT NULL; not deferrable, and not over"
            " expressions, generated columns, or composites and ranges of texts",
        )
    # First of all the index has to answer our comparisons; then one that begins with the key column finds the range.
    best = min(
        usable,
        key=lambda k: (
            tuple(k.columns) != wanted,
            not k.sorts_as_bytes,
            k.columns[0] != key_column,
            not k.is_primary,
            len(k.columns),
            k.name,
        ),
    )
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


def describe_all(
    connection: Connection, tables: Mapping[TableName, str], *, keysets_of: Mapping[TableName, Table] | None = None
) -> tuple[Table, ...]:
    """Every table of a keyspace, parents first. Raises Refused that names all tables at fault, not only the first.

    `keysets_of`: descriptions whose keysets are used where there are such keys here, too.
    """
    described: dict[TableName, Table] = {}
    refusals: list[Refused] = []
    for name, key_column in tables.items():
        try:
            described[name] = describe(connection, name, key_column, keyset_of=(keysets_of or {}).get(name))
        except Refused as refusal:
            refusals.append(refusal)
    if refusals:
        hint = next((refusal.hint for refusal in refusals if refusal.hint), None)
        raise Refused("; ".join(refusal.message for refusal in refusals), hint=hint)
    return tuple(described[name] for name in parents_first(described, foreign_keys(connection)))


def describe_both(
    source: Connection,
    target: Connection,
    tables: Mapping[TableName, str],
    *,
    keysets_of: Mapping[TableName, Table] | None = None,
) -> tuple[Table, ...]:
    """Every table as both shards can be spoken to about it, in the source's words, parents first.

    What sorts by a collation on either side counts as collated, and what travels as text for one does for both. Raises
    as `describe_all`, also for the target.
    """
    ours = describe_all(source, tables, keysets_of=keysets_of)
    theirs = describe_all(target, tables, keysets_of={each.name: each for each in ours})
    on_target = {each.name: each for each in theirs}
    return tuple(_as_both(each, on_target[each.name]) for each in ours)


def _as_both(ours: Table, theirs: Table) -> Table:
    collated = {column.name for column in theirs.keyset if column.collated}
    return replace(
        ours,
        keyset=tuple(replace(column, collated=column.collated or column.name in collated) for column in ours.keyset),
        binary=ours.binary and theirs.binary,
        key_collated=ours.key_collated or theirs.key_collated,
    )


MADE_OF: LiteralString = """(
            SELECT t.typelem AS oid WHERE t.typelem <> 0
            UNION ALL SELECT t.typbasetype WHERE t.typbasetype <> 0
            UNION ALL SELECT p.atttypid FROM pg_catalog.pg_attribute p
                      WHERE p.attrelid = t.typrelid AND p.attnum > 0 AND NOT p.attisdropped
            UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
        ) AS made_of"""
"""For CROSS JOIN LATERAL: what the type `t` is made of."""

# A line a fact, in words that are the same on every server and release. Types are followed to what they are made of.
_SIGNATURE: LiteralString = (
    """
    WITH RECURSIVE attribute AS (
        SELECT a.*, ad.adbin FROM pg_catalog.pg_attribute a
        LEFT JOIN pg_catalog.pg_attrdef ad ON ad.adrelid = a.attrelid AND ad.adnum = a.attnum
        WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
    ), tree(oid, bounds) AS (
        SELECT %(oid)s::oid, '' COLLATE "C"
        UNION ALL
        SELECT c.oid, (m.bounds || ' / ' || pg_catalog.pg_get_expr(c.relpartbound, c.oid)) COLLATE "C"
        FROM tree m JOIN pg_catalog.pg_inherits i ON i.inhparent = m.oid
        JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition
    ), member(oid, bounds, place) AS (
        SELECT oid, bounds, CASE bounds WHEN '' THEN '' ELSE ' in the partition' || bounds END FROM tree
    ), used(oid) AS (
        SELECT atttypid FROM attribute
        UNION
        SELECT made_of.oid FROM used u JOIN pg_catalog.pg_type t ON t.oid = u.oid CROSS JOIN LATERAL """
    + MADE_OF
    + """
    ), own_type AS (
        SELECT t.*, pg_catalog.format_type(t.oid, NULL) AS name FROM used u JOIN pg_catalog.pg_type t USING (oid)
        WHERE t.typnamespace <> 'pg_catalog'::regnamespace
    )
    SELECT 'column ' || pg_catalog.quote_ident(a.attname) || ' '
           || pg_catalog.format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
           || CASE a.attgenerated WHEN 's' THEN ' generated stored' WHEN 'v' THEN ' generated virtual' ELSE '' END
           || CASE WHEN a.attgenerated <> '' THEN ' as ' || pg_catalog.pg_get_expr(a.adbin, a.attrelid) ELSE '' END
           || CASE a.attidentity WHEN 'a' THEN ' identity always' WHEN 'd' THEN ' identity by default' ELSE '' END
           || coalesce(' collate ' || co.collname, '')
    FROM attribute a LEFT JOIN pg_catalog.pg_collation co ON co.oid = a.attcollation
    UNION ALL
    SELECT 'default of ' || pg_catalog.quote_ident(a.attname) || ': ' || pg_catalog.pg_get_expr(a.adbin, a.attrelid)
    FROM attribute a WHERE a.attgenerated = '' AND pg_catalog.pg_get_expr(a.adbin, a.attrelid) !~ 'nextval'
    UNION ALL
    SELECT 'constraint ' || pg_catalog.pg_get_constraintdef(c.oid) || m.place
    FROM member m JOIN pg_catalog.pg_constraint c ON c.conrelid = m.oid AND c.contype IN ('p', 'u', 'c', 'x')
    WHERE m.bounds = '' OR (c.coninhcount = 0 AND c.conparentid = 0)
    UNION ALL
    SELECT 'foreign key ' || pg_catalog.pg_get_constraintdef(c.oid) FROM pg_catalog.pg_constraint c
    WHERE c.conrelid = %(oid)s AND c.contype = 'f' AND c.conparentid = 0 AND NOT %(is_unfinished)s
    UNION ALL
    SELECT 'unique index ' || pg_catalog.regexp_replace(
               pg_catalog.pg_get_indexdef(i.indexrelid),
               'INDEX .* ON ' || CASE m.bounds WHEN '' THEN '' ELSE '.* USING ' END,
               CASE m.bounds WHEN '' THEN 'ON ' ELSE 'USING ' END) || m.place
    FROM member m JOIN pg_catalog.pg_index i ON i.indrelid = m.oid AND i.indisunique
    WHERE m.bounds = '' OR NOT EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhrelid = i.indexrelid)
    UNION ALL
    SELECT 'column ' || pg_catalog.quote_ident(a.attname) || ' not null' || m.place
    FROM member m JOIN pg_catalog.pg_attribute a ON a.attrelid = m.oid AND a.attnotnull AND NOT a.attisdropped
    JOIN attribute p ON p.attname = a.attname AND NOT p.attnotnull WHERE m.bounds <> '' AND a.attnum > 0
    UNION ALL
    SELECT 'partitioned by ' || pg_catalog.pg_get_partkeydef(oid) FROM pg_catalog.pg_class
    WHERE oid = %(oid)s AND relkind = 'p'
    UNION ALL
    SELECT 'partition' || m.bounds
           || CASE c.relkind WHEN 'p' THEN ' partitioned by ' || pg_catalog.pg_get_partkeydef(m.oid) ELSE '' END
    FROM member m JOIN pg_catalog.pg_class c USING (oid) WHERE m.bounds <> ''
    UNION ALL
    SELECT 'parent ' || i.inhparent::regclass::text FROM pg_catalog.pg_inherits i WHERE i.inhrelid = %(oid)s
    UNION ALL
    SELECT 'enum ' || t.name || ' of ' || pg_catalog.string_agg(pg_catalog.quote_literal(e.enumlabel), ', '
                                                                ORDER BY e.enumsortorder)
    FROM own_type t JOIN pg_catalog.pg_enum e ON e.enumtypid = t.oid GROUP BY t.name
    UNION ALL
    SELECT 'domain ' || t.name || ' of ' || pg_catalog.format_type(t.typbasetype, t.typtypmod)
           || CASE WHEN t.typnotnull THEN ' not null' ELSE '' END
           || coalesce(' ' || (SELECT pg_catalog.string_agg(said.text, ' ' ORDER BY said.text COLLATE "C")
                               FROM pg_catalog.pg_constraint k
                               CROSS JOIN LATERAL pg_catalog.pg_get_constraintdef(k.oid) AS said(text)
                               WHERE k.contypid = t.oid AND k.contype = 'c'), '')
    FROM own_type t WHERE t.typtype = 'd'
    UNION ALL
    SELECT 'type ' || t.name || ' of (' || pg_catalog.string_agg(
               pg_catalog.quote_ident(p.attname) || ' ' || pg_catalog.format_type(p.atttypid, p.atttypmod), ', '
               ORDER BY p.attnum) || ')'
    FROM own_type t JOIN pg_catalog.pg_attribute p ON p.attrelid = t.typrelid AND p.attnum > 0 AND NOT p.attisdropped
    WHERE t.typtype = 'c' GROUP BY t.name
    UNION ALL
    SELECT 'range ' || t.name || ' of ' || pg_catalog.format_type(r.rngsubtype, NULL)
    FROM own_type t JOIN pg_catalog.pg_range r ON r.rngtypid = t.oid
"""
)


def signature(connection: Connection, name: TableName, *, is_unfinished: bool = False) -> set[str]:
    """What has to be equal on both shards for a row to mean the same: columns, their types down to the ground,
    defaults, constraints, unique indexes, partitions; a line each.

    Args:
        is_unfinished: foreign keys are left out: they are still being made.
    """
    oid = table_oid(connection, name)
    if oid is None:
        return {"the table is missing"}
    rows = connection.execute(_SIGNATURE, {"oid": oid, "is_unfinished": is_unfinished}).fetchall()
    return {str(row[0]) for row in rows}


def size_bytes(connection: Connection, name: TableName) -> int:
    """How large a table is on disk, with its indexes and partitions."""
    row = connection.execute(
        "SELECT sum(pg_catalog.pg_total_relation_size(relid))::int8 FROM (SELECT %(oid)s::oid AS relid"
        " UNION SELECT relid FROM pg_catalog.pg_partition_tree(%(oid)s::oid)) AS family",
        {"oid": table_oid(connection, name)},
    ).fetchone()
    return int(row[0] or 0) if row else 0


def estimate_rows(connection: Connection, table_: Table, condition: sql.Composable) -> int:
    """How many rows the planner expects for the condition; rough, and free."""
    query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE {}").format(table_.rows, condition)
    row = connection.execute(query).fetchone()
    return 0 if row is None else int(row[0][0]["Plan"]["Plan Rows"])


def table_sql(table_: Table) -> sql.Identifier:
    return table(table_.name)
