"""What a role needs on each database, right by right; checks of our own role, and what `shardmove grants` prints.

A right is asked of the server by the name of the role, so that it can be asked for a role that nobody is connected as,
or that does not exist yet: then it has what PUBLIC has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, TypeAlias

from psycopg import sql

from shardmove.coordinator.checks.asking import ask
from shardmove.coordinator.checks.site import CATALOG_PLACE, Check, Checks, Note, Problem, Site, on
from shardmove.domain.moves import Keyspace, TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, table_oid
from shardmove.postgres.sql import table as relation
from shardmove.postgres.sql import type_name
from shardmove.protocol import sequences
from shardmove.protocol.replica import PARAMETER_GRANTS_SINCE, firing

NAMED_MAX = 5
SET_OPTION_SINCE = 160000


@dataclass(frozen=True, slots=True)
class Right:
    """One right, in words that go on from `may`, and the statement with which a superuser or the owner gives it."""

    what: str
    statement: str
    held: bool
    makes_superuser: bool = False


@dataclass(frozen=True, slots=True)
class Grantee:
    """A role on one database, and the tables there that it is to move.

    Attributes:
        exists: False for a role that has yet to be made.
        references: reference tables.
    """

    connection: Connection
    role: str
    exists: bool
    tables: Sequence[Table] = ()
    references: Sequence[Table] = ()
    inherits: bool = True

    @classmethod
    def of(cls, connection: Connection, keyspaces: Iterable[Keyspace] = (), role: str | None = None) -> Grantee:
        """`role`: None is whoever the connection acts as. Tables that are missing here are left out."""
        listed = list(keyspaces)
        if role is None:
            ((role,),) = connection.execute("SELECT current_user::text").fetchall()
        row = connection.execute("SELECT rolinherit FROM pg_catalog.pg_roles WHERE rolname = %s", (role,)).fetchone()
        return cls(
            connection,
            str(role),
            row is not None,
            _present(connection, (each for keyspace in listed for each in keyspace.tables.items())),
            _present(connection, ((name, "") for keyspace in listed for name in keyspace.reference_tables)),
            row != (False,),
        )

    @property
    def asked(self) -> str:
        """Whom the server is asked about."""
        return self.role if self.exists else "public"

    def holds(self, question: LiteralString, *values: object) -> bool:
        """Asks one of the has_…_privilege functions; `{}` is the role."""
        query = sql.SQL("SELECT {}").format(sql.SQL(question).format(sql.Literal(self.asked)))
        return self.connection.execute(query, values).fetchone() == (True,)

    def is_member(self, owner: str) -> bool:
        """It has the owner's privileges (superusers have everybody's)."""
        return self.exists and self.holds("pg_catalog.pg_has_role({}, %s, 'USAGE')", owner)

    def sql(self, template: LiteralString, *parts: sql.Composable | str) -> str:
        """A statement; texts are names, and the role is the last of them."""
        composed = [sql.Identifier(part) if isinstance(part, str) else part for part in (*parts, self.role)]
        return sql.SQL(template).format(*composed).as_string(self.connection)

    def membership(self, owner: str, what: str) -> Right:
        """To be whoever owns something. From PostgreSQL 16 on without the right to act as the owner."""
        held = self.is_member(owner)
        if self.connection.info.server_version >= SET_OPTION_SINCE:
            statement = self.sql("GRANT {} TO {} WITH INHERIT TRUE, SET FALSE;", owner)
        elif self.inherits:
            statement = self.sql("GRANT {} TO {};", owner)
        else:
            statement = self.sql("GRANT {} TO {};", owner) + " " + self.sql("ALTER ROLE {} INHERIT;")
        return Right(what, statement, held)


Need: TypeAlias = Callable[[Grantee], Iterator[Right]]


def _present(connection: Connection, named: Iterable[tuple[TableName, str]]) -> Sequence[Table]:
    return [Table(name, key, (), (), False) for name, key in named if table_oid(connection, name) is not None]


def printed(name: str) -> sql.SQL:
    """A name as the server's own regclass, regprocedure or quote_ident printed it: it comes quoted, from the server."""
    return type_name(name)


def _rows(grantee: Grantee, tables: Sequence[Table], query: LiteralString) -> list[tuple[Any, ...]]:
    """A query over `family`: the tables and their partitions."""
    return ask(grantee.connection, {table.name: table.key_column for table in tables}, query, role=grantee.asked)


# --- what is needed on a shard


def records(grantee: Grantee) -> Iterator[Right]:
    """The schema `shardmove`, to be made or to be changed."""
    yield from _own_schema(grantee, "shardmove")


def _own_schema(grantee: Grantee, schema: LiteralString) -> Iterator[Right]:
    rows = grantee.connection.execute(_OWNED, (schema,)).fetchall()
    if not rows:
        yield _create(grantee, f"create the schema {schema}")
    for kind, object_, owner, owner_is_superuser in rows:
        what = f"change the {kind.lower()} {object_}"
        if owner_is_superuser:  # nobody should be made a superuser's deputy for the sake of objects that are ours
            statement = grantee.sql("ALTER {} {} OWNER TO {};", sql.SQL(kind), printed(object_))
            yield Right(what, statement, grantee.is_member(owner))
        else:
            yield grantee.membership(owner, what)


# Sequences that belong to a column go with their table.
_OWNED = """
    WITH ours AS (SELECT n.oid, n.nspowner FROM pg_catalog.pg_namespace n WHERE n.nspname = %s)
    SELECT o.kind, o.name, r.rolname::text, r.rolsuper
    FROM (
        SELECT 'SCHEMA' AS kind, oid::regnamespace::text AS name, nspowner AS owner, 1 AS place FROM ours
        UNION ALL
        SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,
               c.oid::regclass::text, c.relowner, 2
        FROM pg_catalog.pg_class c JOIN ours ON ours.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'S') AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_depend d
            WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i'))
        UNION ALL
        SELECT 'FUNCTION', p.oid::regprocedure::text, p.proowner, 3
        FROM pg_catalog.pg_proc p JOIN ours ON ours.oid = p.pronamespace
    ) AS o JOIN pg_catalog.pg_roles r ON r.oid = o.owner
    ORDER BY o.place, o.name
"""


def _create(grantee: Grantee, what: str) -> Right:
    database = grantee.connection.info.dbname
    held = grantee.holds("pg_catalog.has_database_privilege({}, pg_catalog.current_database(), 'CREATE')")
    return Right(what, grantee.sql("GRANT CREATE ON DATABASE {} TO {};", database), held)


def ownership(grantee: Grantee) -> Iterator[Right]:
    """Whoever makes triggers on a table has to own it, or be a member of who does."""
    rows = _rows(grantee, grantee.tables, _OWNERS)
    for owner in dict.fromkeys(owner for _, owner in rows):
        owned = [name for name, whose in rows if whose == owner]
        yield grantee.membership(owner, f"make triggers on {_some(owned)}")


_OWNERS: LiteralString = """
    SELECT c.oid::regclass::text, pg_catalog.pg_get_userbyid(c.relowner)::text
    FROM family f JOIN pg_catalog.pg_class c USING (oid) ORDER BY 2, 1
"""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more


def schemas(grantee: Grantee) -> Iterator[Right]:
    """To own a table is not to be let into its schema."""
    for schema, held in _rows(grantee, [*grantee.tables, *grantee.references], _SCHEMAS):
        yield Right(f"use the schema {schema}", grantee.sql("GRANT USAGE ON SCHEMA {} TO {};", schema), held)


_SCHEMAS: LiteralString = """,
    named AS (
        SELECT oid FROM family
        UNION
        SELECT d.refobjid FROM pg_catalog.pg_attrdef ad JOIN family f ON f.oid = ad.adrelid
        JOIN pg_catalog.pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = ad.oid
        AND d.refclassid = 'pg_class'::regclass
    )
    SELECT DISTINCT n.nspname::text, pg_catalog.has_schema_privilege(%(role)s, n.oid, 'USAGE')
    FROM named JOIN pg_catalog.pg_class c USING (oid)
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY 1
"""


def counters(grantee: Grantee) -> Iterator[Right]:
    """Sequences are read on the giving side and set on the receiving one; after the cutover it is the other way."""
    for oid, name in sequences.names(grantee.connection, grantee.tables).items():
        for privilege in ("SELECT", "UPDATE"):
            held = grantee.holds("pg_catalog.has_sequence_privilege({}, %s::oid, %s)", oid, privilege)
            statement = grantee.sql("GRANT {} ON SEQUENCE {} TO {};", sql.SQL(privilege), printed(name))
            yield Right(f"{'read' if privilege == 'SELECT' else 'set'} the sequence {name}", statement, held)


def reference_tables(grantee: Grantee) -> Iterator[Right]:
    """They are read on both sides, and filled on the target: SHARE ROW EXCLUSIVE takes UPDATE before PostgreSQL 17."""
    for table in grantee.references:
        for privilege in ("SELECT", "INSERT", "UPDATE"):
            oid = table_oid(grantee.connection, table.name)
            held = grantee.holds("pg_catalog.has_table_privilege({}, %s::oid, %s)", oid, privilege)
            statement = grantee.sql("GRANT {} ON TABLE {} TO {};", sql.SQL(privilege), relation(table.name))
            yield Right(f"{privilege} on the reference table {table.name}", statement, held)


def functions(grantee: Grantee) -> Iterator[Right]:
    """Constraints, indexes and generated columns are computed by who writes; ours are the server's own."""
    rows = _rows(grantee, [*grantee.tables, *grantee.references], _FUNCTIONS)
    for signature, held in rows:
        statement = grantee.sql("GRANT EXECUTE ON FUNCTION {} TO {};", printed(signature))
        yield Right(f"execute {signature}", statement, held)


_FUNCTIONS: LiteralString = """,
    parts(class, oid) AS (
        SELECT 'pg_constraint'::regclass, k.oid FROM pg_catalog.pg_constraint k JOIN family f ON k.conrelid = f.oid
        UNION ALL
        SELECT 'pg_class'::regclass, i.indexrelid FROM pg_catalog.pg_index i JOIN family f ON i.indrelid = f.oid
        UNION ALL
        SELECT 'pg_attrdef'::regclass, ad.oid FROM pg_catalog.pg_attrdef ad JOIN family f ON ad.adrelid = f.oid
    )
    SELECT p.oid::regprocedure::text, pg_catalog.has_function_privilege(%(role)s, p.oid, 'EXECUTE') FROM parts
    JOIN pg_catalog.pg_depend d ON d.classid = parts.class AND d.objid = parts.oid
    JOIN pg_catalog.pg_proc p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid
    UNION
    SELECT p.oid::regprocedure::text, pg_catalog.has_function_privilege(%(role)s, p.oid, 'EXECUTE')
    FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname IN (
        'pg_control_system', 'pg_walfile_name', 'pg_current_wal_lsn', 'pg_current_snapshot', 'pg_snapshot_xmin',
        'pg_current_xact_id', 'pg_advisory_lock', 'pg_advisory_xact_lock', 'pg_advisory_xact_lock_shared',
        'pg_try_advisory_lock', 'pg_try_advisory_xact_lock', 'set_config', 'setval', 'hashtextextended',
        'pg_sequence_last_value', 'pg_terminate_backend')
    ORDER BY 1
"""


def replica(grantee: Grantee) -> Iterator[Right]:
    """Only where something would fire: plain tables move with ownership alone."""
    found = firing(grantee.connection, [*grantee.tables, *grantee.references])
    if not found:
        return
    what = f"set session_replication_role: for each row that is carried {_some([f'{w} of {n}' for n, w in found])}"
    what += " would fire once more"
    if grantee.connection.info.server_version >= PARAMETER_GRANTS_SINCE:
        held = grantee.holds("pg_catalog.has_parameter_privilege({}, 'session_replication_role', 'SET')")
        yield Right(what, grantee.sql("GRANT SET ON PARAMETER session_replication_role TO {};"), held)
    else:
        yield Right(what, grantee.sql("ALTER ROLE {} SUPERUSER;"), _is(grantee, superuser=True), True)


def policies(grantee: Grantee) -> Iterator[Right]:
    """An owner sees every row, unless row security is forced; of a reference table, it need not be the owner."""
    for table in [*grantee.tables, *grantee.references]:
        rows = grantee.connection.execute(
            "SELECT c.relforcerowsecurity, pg_catalog.pg_get_userbyid(c.relowner) FROM pg_catalog.pg_class c"
            " WHERE c.oid = %s AND c.relrowsecurity",
            (table_oid(grantee.connection, table.name),),
        ).fetchall()
        ours = table in grantee.tables
        if any(is_forced or not (ours or grantee.is_member(owner)) for is_forced, owner in rows):
            yield Right(
                f"see every row of {table.name}, of which row security shows a part",
                grantee.sql("ALTER ROLE {} BYPASSRLS;"),
                _is(grantee, superuser=False),
            )


def _is(grantee: Grantee, *, superuser: bool) -> bool:
    """A superuser; else, who is let past row security."""
    query = "SELECT rolsuper OR (rolbypassrls AND NOT %s) FROM pg_catalog.pg_roles WHERE rolname = %s"
    return grantee.connection.execute(query, (superuser, grantee.role)).fetchone() == (True,)


def connecting(grantee: Grantee) -> Iterator[Right]:
    """No line of the checklist: who may not do this sees none."""
    statement = grantee.sql("GRANT CONNECT ON DATABASE {} TO {};", grantee.connection.info.dbname)
    held = grantee.holds("pg_catalog.has_database_privilege({}, pg_catalog.current_database(), 'CONNECT')")
    yield Right("connect", statement, held)


def statistics(grantee: Grantee) -> Iterator[Right]:
    """Else the transactions of other roles that a closing would wait for are not seen beforehand."""
    held = grantee.is_member("pg_read_all_stats")
    statement = grantee.membership("pg_read_all_stats", "").statement
    yield Right("see what other roles' sessions do: who is in the way of a move cannot be named", statement, held)


def applying(grantee: Grantee) -> Iterator[Right]:
    """`apply` takes that even where the schema is there. No line of the checklist: a move does without."""
    yield _create(grantee, "create or upgrade the schema shardmove_catalog")


def catalog(grantee: Grantee) -> Iterator[Right]:
    """In the catalog's database."""
    yield from _own_schema(grantee, "shardmove_catalog")


# --- the checks


ON_SHARDS: Mapping[str, Need] = {
    "our role may keep its records on both shards": records,
    "our role may use the schemas of the tables": schemas,
    "our role owns the tables and their partitions": ownership,
    "our role may read and set the sequences": counters,
    "our role may read the reference tables, and fill them": reference_tables,
    "our role may execute the functions behind the tables": functions,
    "our role may apply rows as a replica, where something would fire": replica,
    "our role sees every row": policies,
}
SEES_SESSIONS = "our role sees who is in its way"
ON_CATALOG = "our role may write to the catalog"


def _missing(grantee: Grantee, need: Need) -> list[Right]:
    return [right for right in need(grantee) if not right.held]


def _both(need: Need, kind: type[Problem] = Problem) -> Check:
    """Both sides, for the way back takes on the one what the way there takes on the other."""

    def check(site: Site) -> Problem | None:
        grantees = {shard: Grantee.of(connection, [site.move.keyspace]) for shard, connection in site.sides}
        return _problem({shard: (each, _missing(each, need)) for shard, each in grantees.items()}, kind)

    return check


def _problem(missing: Mapping[str, tuple[Grantee, list[Right]]], kind: type[Problem]) -> Problem | None:
    said = [
        f"the role {grantee.role} may not {right.what} (on {place})"
        for place, (grantee, rights) in missing.items()
        for right in rights
    ]
    if not said:
        return None
    statements = {
        place: list(dict.fromkeys(right.statement for right in rights)) for place, (_, rights) in missing.items()
    }
    more = f"; and {len(said) - NAMED_MAX} more" if len(said) > NAMED_MAX else ""
    return kind("; ".join(said[:NAMED_MAX]) + more, on(statements, "a superuser or the owner"))


def _catalog(site: Site) -> Problem | None:
    if site.catalog is None:
        return None
    grantee = Grantee.of(site.catalog)
    return _problem({CATALOG_PLACE: (grantee, _missing(grantee, catalog))}, Problem)


PRIVILEGES: Checks = (
    *((text, _both(need)) for text, need in ON_SHARDS.items()),
    (SEES_SESSIONS, _both(statistics, Note)),
    (ON_CATALOG, _catalog),
)
