"""Makes on the target of a move the tables that it lacks, as the source has them.

pg_dump describes the source; we choose from its table of contents, and run the choice in one transaction.

Made before the rows are copied (`Script.now`):
- the tables of the move that the target lacks, with their partitions and inheritance children; columns, defaults,
  identity, generated columns, checks, primary keys, unique and exclusion constraints, unique indexes, replica identity,
  row security and policies;
- the sequences that they own or draw defaults from;
- every type, function, procedure, aggregate, operator (with classes and families), cast, conversion, collation and text
  search object of the database that the target lacks, needed or not: what a function's body calls is recorded nowhere.
  Those that cannot be made there (they need a table, view, extension or C library that the target lacks) are left out;
- the schemas of all these;
- owners, grants and comments of everything made.

Made after the rows are copied (`Script.later`): other indexes, CLUSTER marks, foreign keys, constraints that are not
validated, triggers, rules, extended statistics. Rows arrive faster without them, a foreign key could not hold while its
tables fill side by side, and a constraint that is not validated may not hold at all.

Never made: roles, extensions, languages, views, foreign servers, publications, event triggers, default privileges,
security labels, functions and base types in C. Tablespaces and table access methods are the target's default. Whatever
is on the target already is left alone, with everything on it, also where it differs: preflight tells that. Nothing of
our own is ever copied.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg
from psycopg import errors, sql

from shardmove.domain.errors import NotFound, Refused
from shardmove.domain.moves import TableName
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, connect, explain, is_unreachable, translated
from shardmove.postgres.dump import Entry, Object, find_tools

APPLICATION_NAME: Final = "shardmove schema"


@dataclass(frozen=True, slots=True)
class Script:
    """SQL that makes what the target lacks; each text is complete, and makes one thing. Run them in this order.

    Attributes:
        now: all or nothing, by `create`, before the rows are copied.
        later: after it, each in a transaction of its own if one likes, with an empty search_path. None can be repeated.
    """

    now: tuple[str, ...] = ()
    later: tuple[str, ...] = ()


def missing_tables(source: Connection, target: Connection, tables: Iterable[TableName]) -> list[TableName]:
    """Those of the tables that the target lacks, with their partitions and inheritance children; by name.

    The children of a table that the target has are not looked at: they are the target's own affair.

    Raises:
        NotFound: the source has no such table.
    """
    return sorted(_missing(_tables(source), _tables(target), tables), key=str)


def script(source_dsn: str, target: Connection, tables: Iterable[TableName]) -> Script:
    """What `create` runs now and the move runs later, so that the target has the tables. Changes nothing.

    Raises:
        NotFound: the source has no such table.
        Refused: a role or an extension is missing on the target, or a table that one of the tables cannot do without;
            or there is no pg_dump of the source's version.
        Failed: pg_dump gave up, for instance because a lock on a table was held for too long.
    """
    with translated("copying the schema"), _snapshot(source_dsn) as (source, snapshot):
        choice = _choose(source, target, tables)
        if not choice.now:
            return Script()
        tools = find_tools(source.info.server_version)
        with tempfile.TemporaryDirectory(prefix="shardmove-") as directory:
            archive = Path(directory) / "schema"
            tools.dump(source_dsn, archive, snapshot=snapshot, without=choice.unwanted)
            now, later = _select(tools.contents(archive), choice)
            _require_roles(source, target, choice, [entry.object for entry in (*now, *later)])
            statements = tools.statements(archive, (*now, *later))

    def of(entries: Iterable[Entry]) -> tuple[str, ...]:
        return tuple(statements[entry.id] for entry in entries if entry.id in statements)

    return Script(of(now), of(later))


@contextmanager
def _snapshot(dsn: str) -> Iterator[tuple[Connection, str]]:
    """One snapshot for our questions and for pg_dump: the object ids that we choose by are those that it writes."""
    with connect(dsn, application_name=APPLICATION_NAME) as connection, effects.snapshot(connection):
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")  # pg_dump may take long
        row = connection.execute("SELECT pg_catalog.pg_export_snapshot()").fetchone()
        assert row is not None
        yield connection, row[0]


def create(target: Connection, statements: Sequence[str]) -> None:
    """Runs `Script.now` in the transaction that is open: with its commit all of it is there.

    Raises:
        Refused: the target's server would not; the message holds the beginning of the statement.
        Unreachable: the connection was lost, and with it the transaction.
    """
    with translated("creating the target's tables"):
        # A function may name a table that is made after it.
        target.execute("SET LOCAL check_function_bodies = off")
        for statement in statements:
            try:
                target.execute(statement.encode(), prepare=False)
            except psycopg.Error as error:
                if is_unreachable(error):
                    raise
                raise Refused(
                    f"the target refused `{statement.splitlines()[0]}`: {explain(error)}; nothing was made",
                    hint=_hint(error),
                ) from error


def _hint(error: psycopg.Error) -> str:
    match error:
        case errors.InsufficientPrivilege():
            return "connect to the target as a superuser, or as a member of the owner's role who may create there"
        case errors.DuplicateObject() | errors.DuplicateTable() | errors.DuplicateFunction() | errors.DuplicateSchema():
            return "something else on the target has this name: rename or drop it"
        case errors.OutOfMemory():
            return "raise max_locks_per_transaction on the target: the transaction locks every table that it makes"
        case errors.SyntaxError() | errors.FeatureNotSupported():
            return "the target may be too old for it: make the table there by hand"
        case _:
            return "make it on the target by hand, or mend what it needs there, then try again"


# --- which tables


@dataclass(frozen=True, slots=True)
class _Table:
    name: TableName
    oid: int
    is_partition: bool
    parents: list[int]


_TABLES = """
    SELECT c.oid::int8, n.nspname, c.relname, c.relispartition,
           ARRAY(SELECT i.inhparent::int8 FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f') AND c.relpersistence <> 't' AND c.oid >= 16384
"""


def _tables(connection: Connection) -> dict[TableName, _Table]:
    rows = connection.execute(_TABLES).fetchall()
    tables = [
        _Table(TableName(schema, name), oid, partition, parents) for oid, schema, name, partition, parents in rows
    ]
    return {table.name: table for table in tables}


def _missing(
    here: dict[TableName, _Table], there: dict[TableName, _Table], wanted: Iterable[TableName]
) -> dict[TableName, _Table]:
    children: dict[int, list[_Table]] = {}
    for table in here.values():
        for parent in table.parents:
            children.setdefault(parent, []).append(table)
    missing: dict[TableName, _Table] = {}
    queue = deque(wanted)
    while queue:
        name = queue.popleft()
        if name not in here:
            raise NotFound(f"the source has no table {name}")
        if name not in there and name not in missing:
            missing[name] = here[name]
            queue.extend(child.name for child in children.get(here[name].oid, ()))
    return missing


def _require_whole_trees(
    here: dict[TableName, _Table], there: dict[TableName, _Table], missing: dict[TableName, _Table]
) -> None:
    """Between a table that is made and one that is left alone there is nothing to attach or inherit anew.

    A child of a table that is there would take over its indexes before its own are made; to attach a child that is
    there would not leave it alone.
    """
    names = {table.oid: table.name for table in here.values()}
    for table in here.values():
        for parent in (names[oid] for oid in table.parents if oid in names):
            if parent in missing and table.name in there:
                raise Refused(
                    f"the target has the table {table.name}, but lacks {parent}, which it is a part of on the source",
                    hint=f"create {parent} on the target, or drop {table.name} there",
                )
            if table.name in missing and table.is_partition and parent in there:
                raise Refused(
                    f"the target has the table {parent}, but lacks its partition {table.name}",
                    hint=f"create the partition {table.name} on the target",
                )
            if table.name in missing and parent not in missing and parent not in there:
                raise Refused(
                    f"the target lacks {parent}, which {table.name} is a part of on the source",
                    hint=f"take {parent} into the keyspace, or create both on the target",
                )


# --- which objects


@dataclass(frozen=True, slots=True)
class _Known:
    """An object as every server would know it: `kind` and `identity` are the same wherever it exists."""

    object: Object
    kind: str
    identity: str
    owner: str | None
    in_c: bool


# Relations, and all that is not one and that a table or a function may need. pg_dump knows which of them an extension
# brought. Rowtypes and arrays come with what they belong to. Functions in C need a library of the server; those that an
# extension or a type (a range's constructor) brings come with it.
_OBJECTS = """
    SELECT o.catalog::oid::int8, o.oid::int8, i.type, i.identity, pg_catalog.pg_get_userbyid(o.owner), o.in_c
    FROM (
        SELECT 'pg_catalog.pg_class'::regclass, oid, relowner, false FROM pg_catalog.pg_class
        WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S') AND relpersistence <> 't'
        UNION ALL SELECT 'pg_catalog.pg_namespace'::regclass, oid, nspowner, false FROM pg_catalog.pg_namespace
        UNION ALL SELECT 'pg_catalog.pg_extension'::regclass, oid, extowner, false FROM pg_catalog.pg_extension
        UNION ALL SELECT 'pg_catalog.pg_type'::regclass, t.oid, t.typowner, false FROM pg_catalog.pg_type t
        LEFT JOIN pg_catalog.pg_class c ON c.oid = t.typrelid
        WHERE t.typelem = 0 AND t.typtype <> 'm' AND coalesce(c.relkind = 'c', true)
        UNION ALL SELECT 'pg_catalog.pg_proc'::regclass, p.oid, p.proowner,
            p.prokind <> 'a' AND l.lanname IN ('c', 'internal') AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid
                AND d.deptype IN ('e', 'i'))
        FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
        UNION ALL SELECT 'pg_catalog.pg_operator'::regclass, oid, oprowner, false FROM pg_catalog.pg_operator
        UNION ALL SELECT 'pg_catalog.pg_opclass'::regclass, oid, opcowner, false FROM pg_catalog.pg_opclass
        UNION ALL SELECT 'pg_catalog.pg_opfamily'::regclass, oid, opfowner, false FROM pg_catalog.pg_opfamily
        UNION ALL SELECT 'pg_catalog.pg_collation'::regclass, oid, collowner, false FROM pg_catalog.pg_collation
        UNION ALL SELECT 'pg_catalog.pg_conversion'::regclass, oid, conowner, false FROM pg_catalog.pg_conversion
        UNION ALL SELECT 'pg_catalog.pg_cast'::regclass, oid, NULL, false FROM pg_catalog.pg_cast
        UNION ALL SELECT 'pg_catalog.pg_ts_parser'::regclass, oid, NULL, false FROM pg_catalog.pg_ts_parser
        UNION ALL SELECT 'pg_catalog.pg_ts_template'::regclass, oid, NULL, false FROM pg_catalog.pg_ts_template
        UNION ALL SELECT 'pg_catalog.pg_ts_dict'::regclass, oid, dictowner, false FROM pg_catalog.pg_ts_dict
        UNION ALL SELECT 'pg_catalog.pg_ts_config'::regclass, oid, cfgowner, false FROM pg_catalog.pg_ts_config
    ) AS o(catalog, oid, owner, in_c)
    CROSS JOIN LATERAL pg_catalog.pg_identify_object(o.catalog, o.oid, 0) AS i
    WHERE (o.oid >= 16384 OR o.catalog = 'pg_catalog.pg_namespace'::regclass) AND i.identity IS NOT NULL
"""

# What is on a table or a domain, and whether it is made later. An index behind a constraint is in no table of contents.
_PARTS = """
    SELECT 'pg_catalog.pg_attrdef'::regclass::oid::int8, oid::int8, false
    FROM pg_catalog.pg_attrdef WHERE adrelid = ANY (%(tables)s)
    UNION ALL
    SELECT 'pg_catalog.pg_constraint'::regclass::oid::int8, oid::int8, contype = 'f' OR NOT convalidated
    FROM pg_catalog.pg_constraint WHERE conrelid = ANY (%(tables)s) AND contype <> 't'
    UNION ALL
    SELECT 'pg_catalog.pg_constraint'::regclass::oid::int8, oid::int8, true
    FROM pg_catalog.pg_constraint WHERE contypid = ANY (%(types)s) AND NOT convalidated
    UNION ALL
    SELECT 'pg_catalog.pg_class'::regclass::oid::int8, indexrelid::int8, NOT indisunique
    FROM pg_catalog.pg_index WHERE indrelid = ANY (%(tables)s)
    UNION ALL
    SELECT 'pg_catalog.pg_trigger'::regclass::oid::int8, oid::int8, true
    FROM pg_catalog.pg_trigger
    WHERE tgrelid = ANY (%(tables)s) AND NOT tgisinternal AND NOT pg_catalog.starts_with(tgname, 'shardmove_')
    UNION ALL
    SELECT 'pg_catalog.pg_rewrite'::regclass::oid::int8, oid::int8, true
    FROM pg_catalog.pg_rewrite WHERE ev_class = ANY (%(tables)s)
    UNION ALL
    SELECT 'pg_catalog.pg_policy'::regclass::oid::int8, oid::int8, false
    FROM pg_catalog.pg_policy WHERE polrelid = ANY (%(tables)s)
    UNION ALL
    SELECT 'pg_catalog.pg_statistic_ext'::regclass::oid::int8, oid::int8, true
    FROM pg_catalog.pg_statistic_ext WHERE stxrelid = ANY (%(tables)s)
"""

# Sequences of the tables' columns: owned (also those of identity columns, which come with the table), or in a default.
_SEQUENCES = """
    SELECT d.classid::int8, d.objid::int8, d.deptype = 'i'
    FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_class s ON s.oid = d.objid AND s.relkind = 'S'
    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass
      AND d.refobjid = ANY (%(tables)s) AND d.deptype IN ('a', 'i')
    UNION
    SELECT d.refclassid::int8, d.refobjid::int8, false
    FROM pg_catalog.pg_attrdef a
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND d.objid = a.oid
    JOIN pg_catalog.pg_class s ON s.oid = d.refobjid AND s.relkind = 'S'
    WHERE a.adrelid = ANY (%(tables)s) AND d.refclassid = 'pg_catalog.pg_class'::regclass
"""

# What cannot be made without what. Automatic dependencies are left out: the object goes with the other when that is
# dropped, but can be made before it (the sequence of a column). The columns of a composite type are those of a relation
# behind it, which depends on the type, and not the other way round.
_DEPENDENCIES = """
    SELECT refclassid::int8, refobjid::int8, classid::int8, objid::int8
    FROM pg_catalog.pg_depend WHERE deptype IN ('n', 'i', 'e') AND refobjid >= 16384
    UNION ALL
    SELECT 'pg_catalog.pg_class'::regclass::oid::int8, typrelid::int8,
           'pg_catalog.pg_type'::regclass::oid::int8, oid::int8
    FROM pg_catalog.pg_type WHERE typrelid >= 16384
"""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What to take from the archive.

    Attributes:
        now, later: the objects that are made; none where the target has all tables.
        schemas: those that the target lacks; made where something is made in them.
        unwanted: the relations that pg_dump need not look at, by schema.
        owners: of whatever has one, made or not.
    """

    now: set[Object] = field(default_factory=set)
    later: set[Object] = field(default_factory=set)
    schemas: set[Object] = field(default_factory=set)
    unwanted: dict[str, list[str]] = field(default_factory=dict)
    owners: dict[Object, str] = field(default_factory=dict)


def _choose(source: Connection, target: Connection, wanted: Iterable[TableName]) -> _Choice:
    here, there = _tables(source), _tables(target)
    missing = _missing(here, there, wanted)
    if not missing:
        return _Choice()
    _require_whole_trees(here, there, missing)
    oids = {table.oid for table in missing.values()}
    known = _objects(source)
    lacking = _lacking(known, _objects(target))
    relations = {each.object for each in known if each.kind in _RELATIONS}
    made = {object_ for object_ in relations if object_[1] in oids} | _sequences(source, oids, lacking)
    out_of_reach = _out_of_reach(source, known, lacking, made)
    others = {each.object for each in known if each.kind not in _NOT_CODE and each.object in lacking}
    others -= out_of_reach.keys()
    types = [each.object[1] for each in known if each.kind == "type" and each.object in others]
    parts = source.execute(_PARTS, {"tables": list(oids), "types": types}).fetchall()
    now = made | {(catalog, oid) for catalog, oid, is_later in parts if not is_later}
    later = {(catalog, oid) for catalog, oid, is_later in parts if is_later}
    _require_reach(source, {object_: out_of_reach[object_] for object_ in now | later if object_ in out_of_reach})
    return _Choice(
        now=now | others,
        later=later,
        schemas={each.object for each in known if each.kind == "schema"} & lacking,
        unwanted=_names(source, relations - made),
        owners={each.object: each.owner for each in known if each.owner is not None},
    )


_RELATIONS: Final = frozenset({"table", "foreign table", "view", "materialized view", "sequence"})
_NOT_CODE: Final = _RELATIONS | {"schema", "extension"}


def _objects(connection: Connection) -> list[_Known]:
    rows = connection.execute(_OBJECTS).fetchall()
    return [_Known((catalog, oid), kind, identity, owner, in_c) for catalog, oid, kind, identity, owner, in_c in rows]


def _lacking(here: Iterable[_Known], there: Iterable[_Known]) -> set[Object]:
    """The objects of the source that the target has no equal of."""
    existing = {(each.kind, each.identity) for each in there}
    return {each.object for each in here if (each.kind, each.identity) not in existing}


def _sequences(source: Connection, tables: Iterable[int], lacking: set[Object]) -> set[Object]:
    rows = source.execute(_SEQUENCES, {"tables": list(tables)}).fetchall()
    return {(catalog, oid) for catalog, oid, of_identity in rows if of_identity or (catalog, oid) in lacking}


def _names(source: Connection, relations: Iterable[Object]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    rows = source.execute(
        "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"
        " ON n.oid = c.relnamespace WHERE c.oid = ANY (%s) ORDER BY 1, 2",
        ([oid for _, oid in relations],),
    ).fetchall()
    for schema, name in rows:
        names.setdefault(schema, []).append(name)
    return names


def _out_of_reach(
    source: Connection, known: Iterable[_Known], lacking: set[Object], made: set[Object]
) -> dict[Object, _Known]:
    """What cannot be made on the target, each with the object at fault: it is not made, and all this needs it."""
    dependents: dict[Object, list[Object]] = {}
    for catalog, oid, dependent_catalog, dependent in source.execute(_DEPENDENCIES).fetchall():
        dependents.setdefault((catalog, oid), []).append((dependent_catalog, dependent))
    existing = {each.object for each in known} - lacking
    at_fault = [
        each
        for each in known
        if each.object in lacking
        and each.object not in made
        and (each.in_c or each.kind in _RELATIONS or each.kind == "extension")
    ]
    reasons: dict[Object, _Known] = {}
    # An extension explains what is wrong better than its own tables do.
    for reason in sorted(at_fault, key=lambda each: each.kind != "extension"):
        reached = [reason.object]
        while reached:
            object_ = reached.pop()
            if object_ not in reasons and object_ not in existing:
                reasons[object_] = reason
                reached.extend(dependents.get(object_, ()))
    return reasons


def _require_reach(source: Connection, out_of_reach: dict[Object, _Known]) -> None:
    if not out_of_reach:
        return
    rows = source.execute(
        "SELECT w.catalog, w.oid, i.type || ' ' || i.identity FROM unnest(%s::int8[], %s::int8[]) AS w(catalog, oid),"
        " LATERAL pg_catalog.pg_identify_object(w.catalog::oid, w.oid::oid, 0) AS i ORDER BY 3",
        ([catalog for catalog, _ in out_of_reach], [oid for _, oid in out_of_reach]),
    ).fetchall()
    reasons = [(what, out_of_reach[catalog, oid]) for catalog, oid, what in rows]
    hints = dict.fromkeys(_create_hint(source, reason) for _, reason in reasons)
    raise Refused(
        "; ".join(
            f"the {what} needs the {each.kind} {each.identity}, which the target lacks" for what, each in reasons
        ),
        hint=f"first, on the target: {'; '.join(hints)}",
    )


def _create_hint(source: Connection, reason: _Known) -> str:
    if reason.kind != "extension":
        return f"create the {reason.kind} {reason.identity}"
    row = source.execute(
        "SELECT extname, extnamespace::regnamespace::text FROM pg_catalog.pg_extension WHERE oid = %s",
        (reason.object[1],),
    ).fetchone()
    assert row is not None
    return sql.SQL("CREATE EXTENSION {} SCHEMA ").format(sql.Identifier(row[0])).as_string(source) + str(row[1])


# --- which entries


def _select(contents: Sequence[Entry], choice: _Choice) -> tuple[list[Entry], list[Entry]]:
    """The entries to make now and later, in the archive's order."""
    chosen = {entry.id for entry in contents if entry.object in choice.now or entry.object in choice.later}
    needed = frozenset[int]().union(*(entry.depends_on for entry in contents if entry.id in chosen))
    chosen |= {entry.id for entry in contents if entry.object in choice.schemas and entry.id in needed}
    later = {entry.id for entry in contents if entry.object in choice.later}
    for entry in contents:
        # Comments, grants, ATTACH and what else has no object of its own go with those that they are about.
        if entry.object[0] == 0 and entry.depends_on and entry.depends_on <= chosen:
            chosen.add(entry.id)
            if entry.depends_on & later:
                later.add(entry.id)
    return (
        [entry for entry in contents if entry.id in chosen and entry.id not in later],
        [entry for entry in contents if entry.id in later],
    )


_GRANTEES = """
    SELECT DISTINCT r.rolname
    FROM unnest(%s::int8[], %s::int8[]) AS made(catalog, oid)
    JOIN pg_catalog.pg_shdepend d ON d.classid = made.catalog::oid AND d.objid = made.oid::oid
    JOIN pg_catalog.pg_database b ON b.oid = d.dbid AND b.datname = pg_catalog.current_database()
    JOIN pg_catalog.pg_roles r ON d.refclassid = 'pg_catalog.pg_authid'::regclass AND r.oid = d.refobjid
    WHERE d.deptype IN ('o', 'a', 'r')
"""


def _require_roles(source: Connection, target: Connection, choice: _Choice, made: Iterable[Object]) -> None:
    """Owners, grantees and the roles of policies must exist on the target."""
    objects = list(made)
    named = source.execute(_GRANTEES, ([catalog for catalog, _ in objects], [oid for _, oid in objects])).fetchall()
    roles = {role for (role,) in named} | {choice.owners[object_] for object_ in objects if object_ in choice.owners}
    missing = sorted(roles - {role for (role,) in target.execute("SELECT rolname FROM pg_catalog.pg_roles").fetchall()})
    if missing:
        create_role = sql.SQL("CREATE ROLE {}")
        statements = [create_role.format(sql.Identifier(role)).as_string(target) for role in missing]
        raise Refused(
            f"the tables and what they need belong to, or are granted to, roles that the target lacks:"
            f" {', '.join(missing)}",
            hint=f"first, on the target: {'; '.join(statements)}",
        )
