"""Checks of the tables as they are defined: that they are there, of kinds that move, and the same on both shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, LiteralString

from shardmove.coordinator.checks.asking import USED_TYPES, ask, entry, gathered, shown
from shardmove.coordinator.checks.constraints import CONSTRAINTS
from shardmove.coordinator.checks.effects import EFFECTS
from shardmove.coordinator.checks.keys import KEYS
from shardmove.coordinator.checks.numbers import SEQUENCES
from shardmove.coordinator.checks.site import Checks, Note, Problem, Site, on
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import signature, table_oid
from shardmove.postgres.sql import table as relation_sql
from shardmove.protocol import objects

# --- which tables


def _exist(site: Site) -> Problem | None:
    """What is named in the keyspace has to be a table of both shards, with all its partitions."""
    return gathered(
        problem
        for shard, connection in site.sides
        for problem in _existence(site, shard, connection, site.move.keyspace.tables)
    )


def _existence(site: Site, shard: str, connection: Connection, tables: Iterable[TableName]) -> Iterator[Problem]:
    listed = list(tables)
    rows = connection.execute(_NAMED, ([name.schema for name in listed], [name.name for name in listed])).fetchall()
    for schema, table, kind, root in rows:
        name = TableName(schema, table)
        if kind is None and connection is site.target:
            yield Problem(
                f"the table {name} does not exist on {shard}",
                f"`shardmove run {site.move.id} --create-schema` makes it",
            )
        elif kind is None:
            yield Problem(f"the table {name} does not exist on {shard}", f"{entry(site)}: take {name} out")
        elif schema == "shardmove":
            yield Problem(
                f"{name} on {shard} is in the schema of our own objects, which goes with them",
                f"{on({shard: [f'ALTER TABLE {_sql(name)} SET SCHEMA public;']})}\n{entry(site)}: {table}",
            )
        elif root is not None:
            yield Problem(f"{name} on {shard} is a partition of {shown(root)}", f"{entry(site)}: {shown(root)} instead")
        elif kind not in ("r", "p"):
            yield Problem(f"{name} on {shard} is {_KINDS.get(kind, 'no table')}", f"{entry(site)}: take {name} out")


_NAMED: LiteralString = """
    SELECT m.schema, m.name, c.relkind::text,
           CASE WHEN c.relispartition THEN pg_catalog.pg_partition_root(c.oid)::regclass::text END
    FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS m(schema, name, place)
    LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = m.schema
    LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = m.name
    ORDER BY m.place
"""
_KINDS: Final[Mapping[str, str]] = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
    "c": "a type",
    "i": "an index",
}


def _sql(name: TableName) -> str:
    return relation_sql(name).as_string()


def _movable(site: Site) -> Problem | None:
    """Every row of a table has to be in the shard's own database, durably, and to be carried: a foreign partition is
    elsewhere, an unlogged one is emptied by a crash, and a table that inherits from one that moves moves by itself."""
    return gathered(problem for shard, connection in site.sides for problem in _kind_problems(site, shard, connection))


def _kind_problems(site: Site, shard: str, connection: Connection) -> Iterator[Problem]:
    for relation, parent, kind, persistence, is_pending in ask(connection, site.move.keyspace.tables, _MEMBERS):
        if kind == "f":
            yield Problem(
                f"the partition {shown(relation)} of {shown(parent)} on {shard} is a foreign table",
                on({shard: [f"ALTER TABLE {parent} DETACH PARTITION {relation};"]}),
            )
        elif is_pending:
            yield Problem(
                f"the partition {shown(relation)} on {shard} is half detached",
                on({shard: [f"ALTER TABLE {parent} DETACH PARTITION {relation} FINALIZE;"]}),
            )
        elif kind == "r" and persistence == "u":
            yield Problem(
                f"{shown(relation)} on {shard} is unlogged: a crash would empty it",
                on({shard: [f"ALTER TABLE {relation} SET LOGGED;"]}),
            )
        elif persistence == "t":
            yield Problem(f"{shown(relation)} on {shard} is temporary", f"{entry(site)}: take it out")
    yield from _unnamed_heirs(site, shard, connection)


def _unnamed_heirs(site: Site, shard: str, connection: Connection) -> Iterator[Problem]:
    named = {(name.schema, name.name) for name in site.move.keyspace.tables}
    for parent, key_column, relation, schema, name, kind in ask(connection, site.move.keyspace.tables, _HEIRS):
        if (schema, name) in named:
            continue
        what = f"{shown(relation)} on {shard} inherits from {shown(parent)} and is not in the keyspace: its rows stay"
        if kind == "f":
            yield Problem(what, on({shard: [f"ALTER FOREIGN TABLE {relation} NO INHERIT {parent};"]}))
        else:
            name_ = json.dumps(str(TableName(schema, name)), ensure_ascii=False)
            yield Problem(what, f"{entry(site)}: add {name_} = {json.dumps(key_column, ensure_ascii=False)}")


_MEMBERS: LiteralString = """
    SELECT c.oid::regclass::text, i.inhparent::regclass::text, c.relkind::text, c.relpersistence::text,
           coalesce(i.inhdetachpending, false)
    FROM family f JOIN pg_catalog.pg_class c USING (oid)
    LEFT JOIN pg_catalog.pg_inherits i ON i.inhrelid = f.oid AND NOT f.is_root ORDER BY 1
"""

_HEIRS: LiteralString = """, heir(key_column, parent, oid) AS (
        SELECT f.key_column, i.inhparent, i.inhrelid FROM family f
        JOIN pg_catalog.pg_class p ON p.oid = f.oid AND p.relkind = 'r'
        JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid WHERE f.is_root
        UNION
        SELECT h.key_column, i.inhparent, i.inhrelid FROM heir h JOIN pg_catalog.pg_inherits i ON i.inhparent = h.oid
    )
    SELECT h.parent::regclass::text, h.key_column, h.oid::regclass::text, n.nspname::text, c.relname::text,
           c.relkind::text
    FROM heir h JOIN pg_catalog.pg_class c USING (oid) JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    ORDER BY 3
"""

# --- the same on both shards


def schema_difference(site: Site) -> Problem | None:
    """A row has to mean, and be allowed, the same on both shards: columns in any order, their types down to the ground,
    defaults, constraints, unique indexes, partitions."""
    makers = objects.makers(site.target)
    others = sorted(makers - {site.move.id})
    if others:
        return Problem(
            f"{', '.join(others)} has made tables on {site.move.target}, whose foreign keys are still to come",
            "\n".join(f"`shardmove run {move_id}` makes them" for move_id in others),
        )
    is_unfinished = site.move.id in makers
    return gathered(_differences(site, site.move.keyspace.tables, is_unfinished=is_unfinished))


def _differences(site: Site, tables: Iterable[TableName], *, is_unfinished: bool) -> Iterator[Problem]:
    for name in tables:
        if table_oid(site.source, name) is None or table_oid(site.target, name) is None:
            continue
        ours, theirs = (
            signature(connection, name, is_unfinished=is_unfinished) for connection in (site.source, site.target)
        )
        for there, missing, facts, others in (
            (site.move.source, site.move.target, ours, theirs),
            (site.move.target, site.move.source, theirs, ours),
        ):
            only = facts - others
            for fact in sorted(only):
                if not _is_index_of_constraint(fact, only):
                    yield Problem(f"{name} has only on {there}: {fact}", _mend(name, there, missing, fact, others))


def _is_index_of_constraint(fact: str, only: Iterable[str]) -> bool:
    """The index comes and goes with a constraint that is named itself."""
    of = fact.partition(" USING btree ")[2].removesuffix(" NULLS NOT DISTINCT")
    return fact.startswith("unique index ") and any(
        each.startswith(("constraint UNIQUE", "constraint PRIMARY")) and of in each for each in only
    )


_USUAL: Final = " collate default"
_COLUMN: Final = re.compile(r"column (\S+|\"(?:[^\"]|\"\")+\") (.+?)( not null)?")


def _mend(name: TableName, there: str, missing: str, fact: str, others: set[str]) -> str:
    """What makes the one fact true on the side where it is missing, where one statement does."""
    kind, _, text = fact.partition(" ")
    column = _COLUMN.fullmatch(fact.removesuffix(_USUAL))
    statement = None
    if " in the partition " in fact:
        pass
    elif kind == "constraint" and not (text.startswith("PRIMARY") and _has(others, "constraint PRIMARY")):
        statement = f"ALTER TABLE {_sql(name)} ADD {text};"
    elif fact.startswith("foreign key "):
        statement = f"ALTER TABLE {_sql(name)} ADD {fact.removeprefix('foreign key ')};"
    elif fact.startswith("unique index "):
        statement = fact.removeprefix("unique index ").replace("CREATE UNIQUE ON", "CREATE UNIQUE INDEX ON", 1) + ";"
    elif fact.startswith("default of "):
        of, _, value = fact.removeprefix("default of ").partition(": ")
        statement = f"ALTER TABLE {_sql(name)} ALTER {of} SET DEFAULT {value};"
    elif column is not None and not re.search(" generated | identity | collate ", column[0]):
        of, type_, not_null = column.groups()
        if not_null and {f"column {of} {type_}", f"column {of} {type_}{_USUAL}"} & others:
            statement = f"ALTER TABLE {_sql(name)} ALTER {of} SET NOT NULL;"
        elif not _has(others, f"column {of} ") and not not_null:
            statement = f"ALTER TABLE {_sql(name)} ADD COLUMN {of} {type_};"
    if statement is None:
        return f"make {name} on {missing} as it is on {there}, or the other way round"
    return on({missing: [statement]})


def _has(facts: Iterable[str], *beginnings: str) -> bool:
    return any(fact.startswith(beginnings) for fact in facts)


def reference_tables(site: Site) -> Problem | None:
    """Rows that move reference rows of these on either shard: both shards have them, and alike."""
    tables = site.move.keyspace.reference_tables
    missing = [problem for shard, connection in site.sides for problem in _existence(site, shard, connection, tables)]
    return gathered([*missing, *_differences(site, tables, is_unfinished=site.move.id in objects.makers(site.target))])


def _extensions(site: Site) -> Problem | None:
    """The types of the columns, and what their indexes compare by, may come with an extension; releases of it may write
    the same value in other ways."""
    ours, theirs = (
        dict(ask(connection, site.move.keyspace.tables, _EXTENSIONS)) for connection in (site.source, site.target)
    )
    there: dict[str, str] = dict(
        site.target.execute("SELECT extname, extversion FROM pg_catalog.pg_extension").fetchall()
    )
    missing = [
        Problem(
            f"the extension {name} is missing on {site.move.target}",
            on({site.move.target: [f'CREATE EXTENSION "{name}";']}, "a superuser"),
        )
        for name in sorted(ours.keys() - there)
    ]
    other = [
        Note(
            f"the extension {name} is {ours[name]} on {site.move.source} and {theirs[name]} on {site.move.target}",
            on({shard: [f'ALTER EXTENSION "{name}" UPDATE;'] for shard, _ in site.sides}, "a superuser"),
        )
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    return gathered([*missing, *other])


_EXTENSIONS: LiteralString = (
    USED_TYPES
    + """
    SELECT e.extname::text, e.extversion::text FROM pg_catalog.pg_extension e
    JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
    WHERE (d.classid = 'pg_type'::regclass AND d.objid IN (SELECT oid FROM used))
       OR (d.classid = 'pg_opclass'::regclass AND d.objid IN (
            SELECT unnest(i.indclass::oid[]) FROM family f JOIN pg_catalog.pg_index i ON i.indrelid = f.oid))
"""
)


def _collations(site: Site) -> Problem | None:
    """Uniqueness under a collation that takes different texts for equal is as the collation says: where the shards'
    differ, two rows that the source holds may be one and the same to the target."""
    ours, theirs = (
        dict(ask(connection, site.move.keyspace.tables, _LENIENT)) for connection in (site.source, site.target)
    )
    return gathered(
        Note(
            f"the collation {name} of a unique index is {ours[name]} on {site.move.source} and {theirs[name]} on"
            f" {site.move.target}",
            f"make the collation {name} the same on both shards, and REINDEX what uses it",
        )
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name] and "nondeterministic" in ours[name] + theirs[name]
    )


_LENIENT: LiteralString = """
    SELECT co.oid::regcollation::text,
           pg_catalog.concat_ws(' ', co.collprovider, pg_catalog.to_jsonb(co) ->> 'collcollate',
                                coalesce(pg_catalog.to_jsonb(co) ->> 'colllocale',
                                         pg_catalog.to_jsonb(co) ->> 'colliculocale'),
                                co.collversion,
                                CASE WHEN co.collisdeterministic THEN NULL ELSE 'nondeterministic' END)
    FROM family f JOIN pg_catalog.pg_index i ON i.indrelid = f.oid AND i.indisunique
    CROSS JOIN LATERAL unnest(i.indcollation::oid[]) AS used(oid)
    JOIN pg_catalog.pg_collation co ON co.oid = used.oid AND co.collprovider <> 'd'
"""

_TABLES: Checks = (
    ("every table is there on both shards", _exist),
    ("every table is of a kind that we can move", _movable),
)
_ALIKE: Checks = (
    ("the schema is the same on both shards", schema_difference),
    ("reference tables are there, and the same, on both shards", reference_tables),
    ("the target has the extensions that the tables need", _extensions),
    ("unique texts are unique alike on both shards", _collations),
)

SCHEMA: Checks = (
    *_TABLES,
    *KEYS,
    *_ALIKE,
    *CONSTRAINTS,
    *EFFECTS,
    *SEQUENCES,
)
