"""Checks of what happens by itself: triggers and rules of the tables, policies, publications, event triggers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import LiteralString

import psycopg
from psycopg import errors, sql

from shardmove.coordinator.checks.asking import ask, gathered, shown
from shardmove.coordinator.checks.site import Checks, Note, Problem, Site, on
from shardmove.domain.errors import Refused
from shardmove.domain.moves import TableName
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, explain
from shardmove.postgres.introspect import Table
from shardmove.protocol import objects
from shardmove.protocol.replica import become_replica


def _triggers(site: Site) -> Problem | None:
    """We write as a replica: a trigger or rule that fires even then would do its work once more for each row that is
    mirrored or erased; a foreign key's own would cascade."""
    return gathered(
        Problem(
            f"the {kind} {name} of {shown(relation)} on {shard} fires for replicas too (ENABLE ALWAYS or REPLICA)",
            on({shard: [f"ALTER TABLE {relation} ENABLE {kind.upper()} {name};"]}),
        )
        for shard, connection in site.sides
        for kind, name, relation in ask(connection, site.move.keyspace.tables, _FOR_REPLICAS)
    )


# Triggers of ours are known by their function. Those of a partition that are clones go with what they were cloned from.
_FOR_REPLICAS: LiteralString = """
    SELECT 'trigger', pg_catalog.quote_ident(t.tgname), t.tgrelid::regclass::text
    FROM family f JOIN pg_catalog.pg_trigger t ON t.tgrelid = f.oid AND t.tgenabled IN ('A', 'R')
    JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname <> 'shardmove'
    UNION ALL
    SELECT 'rule', pg_catalog.quote_ident(r.rulename), r.ev_class::regclass::text
    FROM family f JOIN pg_catalog.pg_rewrite r ON r.ev_class = f.oid AND r.ev_enabled IN ('A', 'R')
    ORDER BY 3, 1, 2
"""


def _one_sided(site: Site) -> Problem | None:
    """What a shard does for its application in triggers and policies is not carried by a move: after the cutover the
    target's own are what the application meets."""
    if site.move.id in objects.makers(site.target):
        return None  # they come after the copy
    ours, theirs = (
        dict(ask(connection, site.move.keyspace.tables, _OWN_EFFECTS)) for connection in (site.source, site.target)
    )
    only = [(site.move.source, site.move.target, each) for each in sorted(ours.keys() - theirs.keys())]
    only += [(site.move.target, site.move.source, each) for each in sorted(theirs.keys() - ours.keys())]
    return gathered(
        Note(
            f"{what} is on {there} and not on {missing}, or is another there",
            on({missing: [f"{(ours | theirs)[what]};"]}),
        )
        for there, missing, what in only
    )


_OWN_EFFECTS: LiteralString = """
    SELECT pg_catalog.format('the trigger %%I of %%s (%%s)', t.tgname, t.tgrelid::regclass,
                             CASE t.tgenabled WHEN 'D' THEN 'disabled, ' ELSE '' END || t.tgfoid::regprocedure),
           pg_catalog.regexp_replace(pg_catalog.pg_get_triggerdef(t.oid), '^CREATE (CONSTRAINT )?TRIGGER',
                                     CASE WHEN t.tgconstraint = 0 THEN 'CREATE OR REPLACE TRIGGER'
                                          ELSE 'CREATE CONSTRAINT TRIGGER' END)
           || CASE t.tgenabled WHEN 'D' THEN pg_catalog.format('; ALTER TABLE %%s DISABLE TRIGGER %%I',
                                                               t.tgrelid::regclass, t.tgname) ELSE '' END
    FROM family f JOIN pg_catalog.pg_trigger t ON t.tgrelid = f.oid AND NOT t.tgisinternal AND t.tgparentid = 0
    JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE f.is_root AND n.nspname <> 'shardmove'
    UNION ALL
    SELECT pg_catalog.format('row security of %%s', c.oid::regclass),
           pg_catalog.format('ALTER TABLE %%s ENABLE ROW LEVEL SECURITY', c.oid::regclass)
    FROM family f JOIN pg_catalog.pg_class c USING (oid) WHERE f.is_root AND c.relrowsecurity
    UNION ALL
    SELECT pg_catalog.format('the policy %%I of %%s (%%s)', y.polname, y.polrelid::regclass, said.text),
           pg_catalog.format('DROP POLICY IF EXISTS %%I ON %%s; CREATE POLICY %%I ON %%s %%s',
                             y.polname, y.polrelid::regclass, y.polname, y.polrelid::regclass, said.text)
    FROM family f JOIN pg_catalog.pg_policy y ON y.polrelid = f.oid
    CROSS JOIN LATERAL (SELECT pg_catalog.concat_ws(
        ' ', CASE WHEN y.polpermissive THEN 'AS PERMISSIVE' ELSE 'AS RESTRICTIVE' END,
        CASE y.polcmd WHEN 'r' THEN 'FOR SELECT' WHEN 'a' THEN 'FOR INSERT' WHEN 'w' THEN 'FOR UPDATE'
                      WHEN 'd' THEN 'FOR DELETE' ELSE 'FOR ALL' END,
        'TO ' || (SELECT pg_catalog.string_agg(CASE role WHEN 0 THEN 'PUBLIC' ELSE role::regrole::text END, ', '
                                               ORDER BY role::regrole::text) FROM unnest(y.polroles) AS role),
        'USING (' || pg_catalog.pg_get_expr(y.polqual, y.polrelid) || ')',
        'WITH CHECK (' || pg_catalog.pg_get_expr(y.polwithcheck, y.polrelid) || ')')) AS said(text)
    WHERE f.is_root
"""


def _deletable(site: Site) -> Problem | None:
    """The mirror, the erasure and the application delete rows on either side: a publication forbids that where a table
    has no replica identity, or one without what its filter asks. Tried on every partition, and rolled back."""
    return gathered(problem for shard, connection in site.sides for problem in _try_deleting(site, shard, connection))


def _try_deleting(site: Site, shard: str, connection: Connection) -> Iterator[Problem]:
    for schema, name, relation in ask(connection, site.move.keyspace.tables, _LEAVES):
        try:
            with effects.trying(connection):
                patience = f"{site.limits.ddl_lock_timeout_ms}ms"
                connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (patience,))
                become_replica(connection, site.move.id, [Table(TableName(schema, name), "", (), (), binary=False)])
                connection.execute(sql.SQL("DELETE FROM ONLY {} WHERE false").format(sql.Identifier(schema, name)))
        except (errors.ObjectNotInPrerequisiteState, errors.InvalidColumnReference) as error:
            yield Problem(
                f"rows of {shown(relation)} cannot be deleted on {shard}: {explain(error)}",
                on({shard: [f"ALTER TABLE {relation} REPLICA IDENTITY FULL;"]}),
            )
        except (Refused, errors.InsufficientPrivilege, errors.LockNotAvailable):
            continue  # another line asks for rights; a lock says nothing of the table


_LEAVES: LiteralString = """
    SELECT n.nspname, c.relname, c.oid::regclass::text
    FROM family f JOIN pg_catalog.pg_class c ON c.oid = f.oid AND c.relkind = 'r'
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace ORDER BY 3
"""


def _event_triggers(site: Site) -> Problem | None:
    """A move makes a schema, tables, functions and triggers on both shards: event triggers may forbid it. Where there
    are some, it is tried on a table of our own, and rolled back."""
    return gathered(problem for shard, connection in site.sides for problem in _try_ddl(shard, connection))


def _try_ddl(shard: str, connection: Connection) -> Iterator[Problem]:
    listed = connection.execute(
        "SELECT pg_catalog.quote_ident(evtname) FROM pg_catalog.pg_event_trigger"
        " WHERE evtenabled IN ('O', 'A') AND evtevent LIKE 'ddl%' ORDER BY 1"
    ).fetchall()
    if not listed:
        return
    try:
        with effects.trying(connection):
            for statement in _OUR_DDL:
                connection.execute(statement)
    except errors.InsufficientPrivilege:
        return  # another line asks for rights
    except psycopg.DatabaseError as error:
        names = [row[0] for row in listed]
        yield Problem(
            f"an event trigger on {shard} ({', '.join(names)}) refuses what a move has to make: {explain(error)}",
            on({shard: [f"ALTER EVENT TRIGGER {name} DISABLE;" for name in names]}, "a superuser"),
        )


_OUR_DDL: tuple[LiteralString, ...] = (
    "CREATE SCHEMA shardmove_trial",
    "CREATE TABLE shardmove_trial.moving (key bigint)",
    "CREATE TABLE shardmove_trial.journal (key bigint)",
    "CREATE INDEX ON shardmove_trial.journal (key)",
    "ALTER TABLE shardmove_trial.journal REPLICA IDENTITY FULL",
    "CREATE SEQUENCE shardmove_trial.state MINVALUE 0",
    "CREATE FUNCTION shardmove_trial.capture() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "CREATE TRIGGER capture AFTER INSERT ON shardmove_trial.moving FOR EACH ROW"
    " EXECUTE FUNCTION shardmove_trial.capture()",
    "ALTER TABLE shardmove_trial.moving ENABLE ALWAYS TRIGGER capture",
    "DROP TRIGGER capture ON shardmove_trial.moving",
    "DROP FUNCTION shardmove_trial.capture()",
    "DROP TABLE shardmove_trial.journal",
)

EFFECTS: Checks = (
    ("no trigger or rule fires for replicas", _triggers),
    ("triggers and policies are the same on both shards", _one_sided),
)
TRIALS: Checks = (
    ("rows can be deleted on both shards", _deletable),
    ("event triggers let our objects pass", _event_triggers),
)
