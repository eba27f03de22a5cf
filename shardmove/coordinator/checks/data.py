"""Checks of the rows that are there: that the target has room for them, and takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, LiteralString

import psycopg
from psycopg import errors, sql

from shardmove.coordinator.checks.asking import USED_TYPES, ask, gathered, shown
from shardmove.coordinator.checks.effects import TRIALS
from shardmove.coordinator.checks.site import Checks, Problem, Site, on
from shardmove.domain.errors import Refused
from shardmove.domain.moves import State, TableName
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, explain
from shardmove.postgres.introspect import Table, describe_both, plain_tables
from shardmove.postgres.sql import names, type_name
from shardmove.protocol.catch_up import copy_in, in_move
from shardmove.protocol.replica import become_replica

VALUES_MAX: Final = 1_000
"""So many different values of a column that names database objects are looked up, and so many rows are counted."""
TRIAL_ROWS: Final = 100


def _in_range(site: Site, relation: Table) -> sql.Composed:
    return sql.SQL("FROM {} WHERE {}").format(relation.rows, in_move(site.move, relation))


def _target_empty(site: Site) -> Problem | None:
    """Rows of the range on the target belong to nobody that we know: they would be mixed with what is carried there."""
    if site.move.state not in (State.PENDING, State.INITIALIZING):
        return None
    return gathered(
        Problem(
            f"the target {site.move.target} holds {'more than ' if count > VALUES_MAX else ''}"
            f"{min(count, VALUES_MAX)} rows of {site.move.ranges_text} in {each.name} already",
            "look whose they are, plan another range, or remove them\n"
            + on({site.move.target: [f"DELETE {_in_range(site, each).as_string(site.target)};"]}),
        )
        for each in plain_tables(site.target, site.move.keyspace.tables)
        for count in [_count(site, each)]
        if count
    )


def _count(site: Site, relation: Table) -> int:
    query = sql.SQL("SELECT count(*) FROM (SELECT {} LIMIT {}) AS counted").format(
        _in_range(site, relation), sql.Literal(VALUES_MAX + 1)
    )
    row = site.target.execute(query, prepare=False).fetchone()
    return int(row[0]) if row else 0


# --- rows that the target would refuse


def _unproven(site: Site) -> Problem | None:
    """A constraint that is NOT VALID is asked of each row that is written: rows from before it, which break it, cannot
    be carried, nor mirrored once they change."""
    return gathered(
        problem
        for schema, name, key, is_partitioned, *constraint in ask(site.source, site.move.keyspace.tables, _NOT_VALID)
        for problem in _broken(site, Table(TableName(schema, name), key, (), (), False, is_partitioned), *constraint)
    )


# `breaks`: true for a row that breaks the constraint. A domain's is asked by reading the value anew, which raises.
_NOT_VALID: LiteralString = (
    USED_TYPES
    + """
    SELECT n.nspname::text, c.relname::text, f.key_column, c.relkind = 'p', c.oid::regclass::text,
           pg_catalog.format('ALTER TABLE %%s DROP CONSTRAINT %%I;', c.oid::regclass, k.conname), k.conname::text,
           CASE k.contype WHEN 'c' THEN '(' || pg_catalog.pg_get_expr(k.conbin, k.conrelid) || ') IS FALSE'
                          ELSE pg_catalog.format('%%I IS NULL', a.attname) END
    FROM family f JOIN pg_catalog.pg_class c USING (oid) JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_constraint k ON k.conrelid = f.oid AND k.contype IN ('c', 'n') AND NOT k.convalidated
        AND coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::boolean, true) AND (f.is_root OR k.coninhcount = 0)
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND k.contype = 'n' AND a.attnum = k.conkey[1]
    UNION ALL
    SELECT f.schema_name, f.table_name, f.key_column, c.relkind = 'p', f.oid::regclass::text,
           pg_catalog.format('ALTER DOMAIN %%s DROP CONSTRAINT %%I;', k.contypid::regtype, k.conname), k.conname::text,
           pg_catalog.format('%%I::text::%%s IS NULL', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod))
    FROM family f JOIN pg_catalog.pg_class c USING (oid) JOIN used u ON u.root = f.oid
    JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attname = u.attname
    JOIN pg_catalog.pg_constraint k ON k.contypid = u.oid AND k.contype = 'c' AND NOT k.convalidated
    WHERE f.is_root
    ORDER BY 5, 7
"""
)


def _broken(site: Site, member: Table, relation: str, drop: str, constraint: str, breaks: str) -> Iterator[Problem]:
    is_domains = drop.startswith("ALTER DOMAIN")
    condition = sql.SQL("{} AND {}").format(in_move(site.move, member), type_name(breaks))
    try:
        query = sql.SQL("SELECT FROM {} WHERE {} LIMIT 1").format(member.rows, condition)
        is_broken = bool(site.source.execute(query, prepare=False).fetchall()) and not is_domains
    except errors.CheckViolation:
        is_broken = True
    if is_broken:
        rows = "" if is_domains else f": SELECT * FROM {relation} WHERE {condition.as_string(site.source)}"
        yield Problem(
            f"rows of {shown(relation)} on {site.move.source} break the constraint {constraint}, which is NOT VALID:"
            f" {site.move.target} would refuse them",
            f"mend the rows{rows}; or drop it\n{on({shard: [drop] for shard, _ in site.sides})}",
        )


# --- values that mean something on their own server only


def _large_objects(site: Site) -> Problem | None:
    """What a column of type oid may name, a large object, is no row of the table, and stays on the source."""
    has_some = [
        shard
        for shard, connection in site.sides
        if connection.execute("SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)").fetchone() == (True,)
    ]
    if not has_some:
        return None
    return gathered(
        Problem(
            f"{shown(relation)}.{column} on {shard} may name large objects, and there are some on"
            f" {' and '.join(has_some)}: they would not be carried",
            "if it names large objects, on both shards, make it hold their contents:"
            f" ALTER TABLE {relation} ALTER {column} TYPE bytea USING lo_get({column})\nif it does not\n"
            + on({shard: [f"ALTER TABLE {relation} ALTER {column} TYPE bigint;"]}),
        )
        for shard, connection in site.sides
        for relation, column in ask(connection, site.move.keyspace.tables, _OIDS)
    )


_OIDS: LiteralString = (
    USED_TYPES
    + """
    SELECT DISTINCT u.root::regclass::text, pg_catalog.quote_ident(u.attname)
    FROM used u WHERE u.oid = 'pg_catalog.oid'::regtype ORDER BY 1, 2
"""
)


def _names_of_objects(site: Site) -> Problem | None:
    """Columns of reg* types and of aclitem name database objects and roles: each has to be there on the target."""
    there = {each.name for each in plain_tables(site.target, site.move.keyspace.tables)}
    return gathered(
        problem
        for schema, name, key, is_partitioned, *column in ask(site.source, site.move.keyspace.tables, _NAMING)
        if TableName(schema, name) in there
        for problem in _missing_names(site, Table(TableName(schema, name), key, (), (), False, is_partitioned), *column)
    )


_NAMING: LiteralString = (
    USED_TYPES
    + """
    SELECT DISTINCT f.schema_name, f.table_name, f.key_column, c.relkind = 'p', f.root::regclass::text,
           pg_catalog.quote_ident(u.attname), pg_catalog.format_type(a.atttypid, NULL)
    FROM family f JOIN pg_catalog.pg_class c USING (oid) JOIN used u ON u.root = f.oid
    JOIN pg_catalog.pg_type t ON t.oid = u.oid AND t.typnamespace = 'pg_catalog'::regnamespace
        AND (t.typname = 'aclitem' OR t.typname ~ '^reg(class|collation|config|database|dictionary|namespace|oper|'
                                                  '(operator)|(proc)|(procedure)|role|type)$')
    JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attname = u.attname
    WHERE f.is_root ORDER BY 5, 6
"""
)


def _missing_names(site: Site, table_: Table, relation: str, column: str, declared: str) -> Iterator[Problem]:
    values = site.source.execute(
        sql.SQL("SELECT DISTINCT {column}::text FROM {} WHERE {} AND {column} IS NOT NULL ORDER BY 1 LIMIT {}").format(
            table_.rows, in_move(site.move, table_), sql.Literal(VALUES_MAX), column=type_name(column)
        ),
        prepare=False,
    ).fetchall()
    missing = [value for (value,) in values if not _reads_back(site.target, value, declared)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        listed = ", ".join(missing[:5]) + more
        yield Problem(
            f"rows of {shown(relation)} hold in {column} what {site.move.target} does not have: {listed}",
            f"make it on {site.move.target}; or let the column hold text\n"
            + on({shard: [f"ALTER TABLE {relation} ALTER {column} TYPE text;"] for shard, _ in site.sides}),
        )


def _reads_back(connection: Connection, value: str, declared: str) -> bool:
    """The target reads the value, and writes it the same: the number of an object that has gone is read as any."""
    query = sql.SQL("SELECT {}::{}::text").format(sql.Literal(value), type_name(declared))
    try:
        return connection.execute(query, prepare=False).fetchone() == (value,)
    except (psycopg.DataError, psycopg.ProgrammingError):
        return False


def _readable_types(site: Site) -> Problem | None:
    """Values of some types are written by the server only, and xml is read by servers that were built with libxml."""
    return gathered(
        Problem(
            f"{shown(relation)}.{column} on {shard} is {declared}, which this server does not read",
            on({each: [f"ALTER TABLE {relation} ALTER {column} TYPE text;"] for each, _ in site.sides}),
        )
        for shard, connection in site.sides
        for relation, column, declared, kind in ask(connection, site.move.keyspace.tables, _UNREADABLE)
        if kind != "xml" or not _reads_xml(connection)
    )


_UNREADABLE: LiteralString = (
    USED_TYPES
    + """
    SELECT DISTINCT u.root::regclass::text, pg_catalog.quote_ident(u.attname),
           pg_catalog.format_type(a.atttypid, a.atttypmod), t.typname
    FROM used u JOIN pg_catalog.pg_type t ON t.oid = u.oid AND t.typnamespace = 'pg_catalog'::regnamespace
    JOIN pg_catalog.pg_attribute a ON a.attrelid = u.root AND a.attname = u.attname
    WHERE t.typname IN ('xml', 'pg_node_tree', 'pg_ndistinct', 'pg_dependencies', 'pg_mcv_list', 'gtsvector',
                        'pg_brin_bloom_summary', 'pg_brin_minmax_multi_summary')
    ORDER BY 1, 2
"""
)


def _reads_xml(connection: Connection) -> bool:
    try:
        connection.execute("SELECT '<a/>'::xml")
    except errors.FeatureNotSupported:
        return False
    return True


# --- a few rows, tried


def _takes_rows(site: Site) -> Problem | None:
    """What nothing above foresees: some rows of each table are written on the target as a move writes them, with an
    empty search_path and as a replica, and rolled back. Functions in checks, generated columns and indexes run then."""
    try:
        tables = describe_both(site.source, site.target, site.move.keyspace.tables)
    except Refused:
        return None  # other lines say why
    return gathered(problem for table_ in tables for problem in _try_rows(site, table_))


def _try_rows(site: Site, table_: Table) -> Iterator[Problem]:
    rows = sql.SQL("COPY (SELECT {} FROM {} WHERE {} LIMIT {}) TO STDOUT {}").format(
        names(table_.columns), table_.rows, in_move(site.move, table_), sql.Literal(TRIAL_ROWS), table_.copy_options
    )
    try:
        with effects.trying(site.target), site.target.cursor() as writing:
            timeout = f"{site.limits.ddl_lock_timeout_ms}ms"
            site.target.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (timeout,))
            become_replica(site.target, site.move.id, [table_])
            with writing.copy(copy_in(table_)) as sink, site.source.cursor().copy(rows) as read:
                for block in read:
                    sink.write(block)
    except (Refused, errors.InsufficientPrivilege, errors.UniqueViolation, errors.ExclusionViolation):
        return  # other lines ask for rights, and for rows of the range
    except errors.LockNotAvailable:
        return  # says nothing of the rows
    except errors.SerializationFailure:
        return  # the range comes back: the fence that refuses it here makes way when the move begins
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.IntegrityError, psycopg.NotSupportedError) as error:
        yield Problem(
            f"{site.move.target} does not take the rows of {table_.name}: {explain(error)}",
            _pinned_functions(site, table_) or f"mend the rows, or what reads them on {site.move.target}",
        )


def _pinned_functions(site: Site, table_: Table) -> str:
    """Functions that find what they call by the search_path of whoever writes: they get one of their own."""
    tables = {table_.name: table_.key_column}
    return on(
        {
            shard: [
                f"ALTER FUNCTION {function} SET search_path = {path};"
                for function, path in ask(connection, tables, _FUNCTIONS)
            ]
            for shard, connection in site.sides
        }
    )


_FUNCTIONS: LiteralString = (
    USED_TYPES
    + """
    SELECT DISTINCT p.oid::regprocedure::text, pg_catalog.concat_ws(
               ', ', pg_catalog.quote_ident(n.nspname), CASE WHEN n.nspname <> 'public' THEN 'public' END, 'pg_temp')
    FROM pg_catalog.pg_depend d
    JOIN pg_catalog.pg_proc p ON p.oid = d.refobjid AND d.refclassid = 'pg_proc'::regclass
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    JOIN pg_catalog.pg_language l ON l.oid = p.prolang AND l.lanname NOT IN ('c', 'internal')
    WHERE NOT EXISTS (SELECT FROM unnest(p.proconfig) AS set WHERE set LIKE 'search_path=%%')
      AND (d.classid, d.objid) IN (
        SELECT 'pg_constraint'::regclass, k.oid FROM pg_catalog.pg_constraint k
        WHERE k.conrelid IN (SELECT oid FROM family) OR k.contypid IN (SELECT oid FROM used)
        UNION ALL SELECT 'pg_attrdef'::regclass, a.oid FROM pg_catalog.pg_attrdef a JOIN family f ON f.oid = a.adrelid
        UNION ALL SELECT 'pg_class'::regclass, i.indexrelid FROM pg_catalog.pg_index i
                  JOIN family f ON f.oid = i.indrelid
        UNION ALL SELECT 'pg_class'::regclass, f.oid FROM family f)
    ORDER BY 1
"""
)

DATA: Checks = (
    ("the target holds no row of the range", _target_empty),
    ("no row breaks a constraint that is NOT VALID", _unproven),
    ("no column names large objects", _large_objects),
    ("what columns name by reg* types is on the target", _names_of_objects),
    ("every column's type is read by the servers", _readable_types),
    *TRIALS,
    ("the target takes rows of every table", _takes_rows),
)
