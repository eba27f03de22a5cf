"""Checks of the constraints that tie rows to each other: none may tie a row that moves to one that stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, LiteralString

from psycopg.rows import dict_row

from shardmove.coordinator.checks.asking import ask, entry, gathered, shown
from shardmove.coordinator.checks.site import Checks, Problem, Site, on
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection


def _unique(site: Site) -> Problem | None:
    """A unique or exclusion constraint without the key column, or that takes different keys for equal, lets a row that
    moves collide with one that is on the target already, now or after the cutover."""
    return gathered(
        Problem(
            f"the {'exclusion constraint' if excludes else 'unique index'} {shown(name)} of {shown(relation)} on"
            f" {shard} does not hold the key column {key_column} as {'=' if excludes else 'it is'}",
            on({shard: [*before, mend]}),
        )
        for shard, connection in site.sides
        for relation, name, key_column, excludes, before, mend in ask(
            connection, site.move.keyspace.tables, _WITHOUT_KEY
        )
    )


# The index of a partition that belongs to an index of the whole table is answered for by that one. An exclusion
# constraint has to compare the key column by =, and no index may compare it by a collation that takes different texts
# for equal. `before`: foreign keys that rest on the constraint, which can be made anew over the key; a gist index
# compares plain types with btree_gist.
_WITHOUT_KEY: LiteralString = """
    SELECT i.indrelid::regclass::text, i.indexrelid::regclass::text, f.key_column, i.indisexclusion,
           ARRAY(SELECT 'CREATE EXTENSION IF NOT EXISTS btree_gist;' FROM pg_catalog.pg_class x
                 JOIN pg_catalog.pg_am m ON m.oid = x.relam AND m.amname = 'gist' WHERE x.oid = i.indexrelid) ||
           ARRAY(SELECT pg_catalog.format('ALTER TABLE %%s DROP CONSTRAINT %%I;', r.conrelid::regclass, r.conname)
                 FROM pg_catalog.pg_constraint r
                 WHERE r.contype = 'f' AND r.conindid = i.indexrelid AND r.conparentid = 0),
           CASE WHEN k.oid IS NULL THEN pg_catalog.format(
                    'DROP INDEX %%s; %%s;', i.indexrelid::regclass,
                    pg_catalog.regexp_replace(pg_catalog.pg_get_indexdef(i.indexrelid), '( USING \\w+ \\()',
                                              '\\1' || pg_catalog.quote_ident(f.key_column) || ', '))
                ELSE pg_catalog.format(
                    'ALTER TABLE %%s DROP CONSTRAINT %%I, ADD CONSTRAINT %%I %%s;', i.indrelid::regclass, k.conname,
                    k.conname, pg_catalog.regexp_replace(
                        pg_catalog.pg_get_constraintdef(k.oid), '\\(', '(' || pg_catalog.quote_ident(f.key_column)
                        || CASE WHEN k.contype = 'x' THEN ' WITH =, ' ELSE ', ' END))
           END
    FROM family f JOIN pg_catalog.pg_index i ON i.indrelid = f.oid AND (i.indisunique OR i.indisexclusion)
    LEFT JOIN pg_catalog.pg_constraint k ON k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_inherits h WHERE h.inhrelid = i.indexrelid)
      AND NOT EXISTS (
        SELECT FROM unnest((i.indkey::int2[])[0:i.indnkeyatts - 1], i.indcollation::oid[])
            WITH ORDINALITY AS part(attnum, sorted_by, place)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attnum = part.attnum AND a.attname = f.key_column
        LEFT JOIN pg_catalog.pg_collation co ON co.oid = part.sorted_by
        WHERE coalesce(co.collisdeterministic, true)
          AND (k.conexclop IS NULL OR EXISTS (SELECT FROM pg_catalog.pg_operator o
                                              WHERE o.oid = k.conexclop[part.place] AND o.oprname = '=')))
    ORDER BY 1, 2
"""


def _foreign_keys(site: Site) -> Problem | None:
    """Rows are applied and erased without a check of foreign keys: both ends must have one key and move together, or
    the referenced table be a reference table, which every shard holds whole."""
    return gathered(
        problem for shard, connection in site.sides for problem in _foreign_keys_of(site, shard, connection)
    )


def _foreign_keys_of(site: Site, shard: str, connection: Connection) -> Iterator[Problem]:
    moving = {(name.schema, name.name): key for name, key in site.move.keyspace.tables.items()}
    references = {(name.schema, name.name) for name in site.move.keyspace.reference_tables}
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(_FOREIGN_KEYS).fetchall()
    for each in found:
        child, parent = (TableName(*each[end]) for end in ("child_root", "parent_root"))
        child_key, parent_key = (moving.get(tuple(each[end])) for end in ("child_root", "parent_root"))
        drop = f"ALTER TABLE {each['child']} DROP CONSTRAINT {each['name']}"
        if child_key is not None and parent_key is not None:
            if (child_key, parent_key) not in zip(each["child_columns"], each["parent_columns"], strict=True):
                yield Problem(
                    f"the foreign key {each['name']} of {child} on {shard} does not tie {child_key} to"
                    f" {parent}.{parent_key}: a row that stays could reference one that moves",
                    on({shard: _made_anew(each, drop, child_key, parent_key)}),
                )
        elif child_key is not None and tuple(each["parent_root"]) not in references:
            yield _outside(site, shard, each, parent, drop, f"; or {entry(site)} or reference_tables: add {parent}")
        elif parent_key is not None:
            is_reference = tuple(each["child_root"]) in references
            add = "" if is_reference else f"; or {entry(site)}: add {child}"
            yield _outside(site, shard, each, child, drop, add)


def _made_anew(each: Mapping[str, Any], drop: str, child_key: str, parent_key: str) -> list[str]:
    if each["rest"] is None:
        return [f"{drop};"]
    return [*_unique_for(each, parent_key), f"{drop}, {_tied(each, child_key, parent_key)};"]


def _outside(site: Site, shard: str, each: Mapping[str, Any], outside: TableName, drop: str, otherwise: str) -> Problem:
    return Problem(
        f"the foreign key {each['name']} on {shard} ties {shown(each['child'])} to {shown(each['parent'])}, and"
        f" {outside} does not move",
        on({shard: [f"{drop};"]}) + otherwise,
    )


def _pairs(each: Mapping[str, Any], child_key: str, parent_key: str) -> list[tuple[str, str]]:
    """The columns of the constraint that ties the keys, quoted."""
    pairs = zip(
        each["child_columns"],
        each["parent_columns"],
        each["child_quoted"],
        each["parent_quoted"],
        strict=True,
    )
    others = [(ours, theirs) for child, parent, ours, theirs in pairs if child != child_key and parent != parent_key]
    return [(_quoted(child_key), _quoted(parent_key)), *others]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _tied(each: Mapping[str, Any], child_key: str, parent_key: str) -> str:
    ours, theirs = zip(*_pairs(each, child_key, parent_key), strict=True)
    return (
        f"ADD CONSTRAINT {each['name']} FOREIGN KEY ({', '.join(ours)})"
        f" REFERENCES {each['parent']} ({', '.join(theirs)}){each['rest']}"
    )


def _unique_for(each: Mapping[str, Any], parent_key: str) -> list[str]:
    """The unique constraint that the tied foreign key needs, where the referenced table has none like it."""
    wanted = {parent_key, *each["parent_columns"]}
    if any(set(columns) == wanted for columns in each["parent_unique"]):
        return []
    columns = ", ".join([_quoted(parent_key), *(_quoted(c) for c in each["parent_columns"] if c != parent_key)])
    return [f"ALTER TABLE {each['parent']} ADD UNIQUE ({columns});"]


# What a partition ties by a constraint of its own is tied for the whole table. `rest`: everything after the columns;
# NULL for a foreign key over a period, which is written otherwise.
_FOREIGN_KEYS: LiteralString = """
    SELECT pg_catalog.quote_ident(f.conname) AS name,
           f.conrelid::regclass::text AS child, f.confrelid::regclass::text AS parent,
           ARRAY[cn.nspname, c.relname]::text[] AS child_root, ARRAY[pn.nspname, p.relname]::text[] AS parent_root,
           child.columns AS child_columns, child.quoted AS child_quoted,
           parent.columns AS parent_columns, parent.quoted AS parent_quoted,
           CASE WHEN pg_catalog.starts_with(said.text, beginning.text)
                THEN pg_catalog.substr(said.text, pg_catalog.length(beginning.text) + 1) END AS rest,
           (SELECT coalesce(pg_catalog.json_agg(u.columns), '[]') FROM (
                SELECT pg_catalog.json_agg(a.attname) AS columns FROM pg_catalog.pg_constraint k
                JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
                WHERE k.conrelid = f.confrelid AND k.contype IN ('p', 'u') GROUP BY k.oid) AS u) AS parent_unique
    FROM pg_catalog.pg_constraint f
    CROSS JOIN LATERAL (SELECT coalesce(pg_catalog.pg_partition_root(f.conrelid), f.conrelid) AS child,
                               coalesce(pg_catalog.pg_partition_root(f.confrelid), f.confrelid) AS parent) AS root
    JOIN pg_catalog.pg_class c ON c.oid = root.child JOIN pg_catalog.pg_namespace cn ON cn.oid = c.relnamespace
    JOIN pg_catalog.pg_class p ON p.oid = root.parent JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname::text ORDER BY k.place) AS columns,
               array_agg(pg_catalog.quote_ident(a.attname) ORDER BY k.place) AS quoted
        FROM unnest(f.conkey) WITH ORDINALITY AS k(attnum, place)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = k.attnum) AS child
    CROSS JOIN LATERAL (
        SELECT array_agg(a.attname::text ORDER BY k.place) AS columns,
               array_agg(pg_catalog.quote_ident(a.attname) ORDER BY k.place) AS quoted
        FROM unnest(f.confkey) WITH ORDINALITY AS k(attnum, place)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = f.confrelid AND a.attnum = k.attnum) AS parent
    CROSS JOIN LATERAL pg_catalog.pg_get_constraintdef(f.oid) AS said(text)
    CROSS JOIN LATERAL pg_catalog.format(
        'FOREIGN KEY (%s) REFERENCES %s(%s)', pg_catalog.array_to_string(child.quoted, ', '), f.confrelid::regclass,
        pg_catalog.array_to_string(parent.quoted, ', ')) AS beginning(text)
    WHERE f.contype = 'f' AND f.conparentid = 0
    ORDER BY 2, 1
"""

CONSTRAINTS: Checks = (
    ("unique constraints hold the key column", _unique),
    ("foreign keys stay inside the keyspace", _foreign_keys),
)
