"""Checks of what goes on beside on the servers: replication, other sessions, and the room that there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, LiteralString

import psycopg

from shardmove.coordinator.checks.asking import ask, gathered
from shardmove.coordinator.checks.site import Checks, Note, Problem, Site, on
from shardmove.postgres.introspect import Table, estimate_rows, plain_tables, size_bytes
from shardmove.postgres.sql import TRUE
from shardmove.protocol.catch_up import in_move

SESSIONS_BESIDE_WORKERS: Final = 6
"""On each shard: the coordinator's own, its mirror's two, a cutover's guard, and two of whoever attends the move."""
LOCKING_BESIDE_WORKERS: Final = 2
"""How many of these lock every partition at a time."""


def _found(site: Site, query: LiteralString, **values: object) -> Iterator[tuple[str, Sequence[Any]]]:
    """The rows of a query over `family`, each with its shard."""
    for shard, connection in site.sides:
        for row in ask(connection, site.move.keyspace.tables, query, **values):
            yield shard, row


# --- replication


def _no_subscription(site: Site) -> Problem | None:
    """What a subscription applies is a change like any other, and one that the fence refuses stops it."""
    return gathered(
        Problem(
            f"the subscription {name} feeds {table} on {shard}: it would stop at the fence",
            on({shard: [f"ALTER SUBSCRIPTION {name} DISABLE;"]}, "its owner"),
        )
        if is_enabled
        else Note(
            f"the subscription {name}, which is disabled, feeds {table} on {shard}",
            "leave it disabled until the move is completed, and let it carry no rows of the range then",
        )
        for shard, (name, table, is_enabled) in _found(site, _SUBSCRIPTIONS)
    )


_SUBSCRIPTIONS: LiteralString = """
    SELECT DISTINCT pg_catalog.quote_ident(s.subname), r.srrelid::regclass::text, s.subenabled
    FROM pg_catalog.pg_subscription_rel r JOIN family f ON f.oid = r.srrelid
    JOIN pg_catalog.pg_subscription s ON s.oid = r.srsubid
    ORDER BY 1, 2
"""


def _followers(site: Site) -> Problem | None:
    return gathered(
        Note(
            f"{what} on {shard} passes on what we do: rows that are copied or erased, and where all tables are"
            " published, those of our schema shardmove",
            "let its consumers take the copies and the erasures for what they are, and ignore the schema shardmove",
        )
        for shard, (what,) in _found(site, _FOLLOWERS)
    )


_FOLLOWERS: LiteralString = """
    SELECT 'the publication ' || p.pubname FROM pg_catalog.pg_publication p
    WHERE p.puballtables OR EXISTS (
        SELECT FROM pg_catalog.pg_get_publication_tables(p.pubname) AS t JOIN pg_catalog.pg_class c ON c.oid = t.relid
        WHERE t.relid IN (SELECT oid FROM family) OR c.relnamespace = pg_catalog.to_regnamespace('shardmove'))
    UNION ALL
    SELECT 'the logical slot ' || s.slot_name FROM pg_catalog.pg_replication_slots s
    WHERE s.slot_type = 'logical' AND s.database = pg_catalog.current_database()
"""


# --- who is at work


def _prepared(site: Site) -> Problem | None:
    """Prepared and forgotten, it keeps its locks, and its snapshot, for ever."""
    return gathered(
        Problem(
            f"the prepared transaction {gid} is open on {shard}: triggers cannot be made behind it, and vacuum is held"
            " up",
            "let its transaction manager end it; where that is gone, end it by hand (or COMMIT PREPARED):\n"
            + on({shard: [f"ROLLBACK PREPARED {gid};"]}, "who prepared it or a superuser"),
        )
        for shard, (gid,) in _found(site, _PREPARED)
    )


_PREPARED: LiteralString = """
    SELECT pg_catalog.quote_literal(gid) FROM pg_catalog.pg_prepared_xacts
    WHERE database = pg_catalog.current_database() ORDER BY 1
"""


def _long_transactions(site: Site) -> Problem | None:
    """Whoever has written to a moving table is in front of CREATE TRIGGER; everybody else only holds up vacuum."""
    longer_than_s = site.limits.ddl_patience_s
    return gathered(
        Problem(
            f"pid {pid} on {shard} ({who}) has been in a transaction for {age_s:.0f} s, with locks that triggers wait"
            " for",
            "wait for its end, or end it:\n"
            + on({shard: [f"SELECT pg_catalog.pg_terminate_backend({pid}, 10000);"]}, "its own role or a superuser"),
        )
        if is_in_front
        else Note(
            f"pid {pid} on {shard} ({who}) has been in a transaction for {age_s:.0f} s: vacuum is held up, also of what"
            " a move leaves behind",
            "wait for its end, where it can be waited for",
        )
        for shard, (pid, who, age_s, is_in_front) in _found(site, _TRANSACTIONS, longer_than_s=longer_than_s)
    )


_TRANSACTIONS: LiteralString = """
    SELECT a.pid, 'application ' || coalesce(nullif(a.application_name, ''), '-') || ', role ' || a.usename,
           pg_catalog.extract('epoch', pg_catalog.clock_timestamp() - a.xact_start)::float8,
           EXISTS (
               SELECT FROM pg_catalog.pg_locks l
               WHERE l.pid = a.pid AND l.granted AND l.relation IN (SELECT oid FROM family)
                 AND l.database = a.datid AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'SIReadLock'))
    FROM pg_catalog.pg_stat_activity a
    WHERE a.datname = pg_catalog.current_database() AND a.pid <> pg_catalog.pg_backend_pid()
      AND a.backend_type = 'client backend'
      AND a.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %(longer_than_s)s)
    ORDER BY a.xact_start
"""


def _no_wraparound_vacuum(site: Site) -> Problem | None:
    """An ordinary autovacuum gives way to our locks; this one does not."""
    return gathered(
        Problem(
            f"autovacuum is at work on {name} on {shard} to prevent wraparound (pid {pid}): triggers cannot be made"
            " meanwhile",
            "wait for its end; how far it is:\n"
            + on({shard: [f"SELECT * FROM pg_catalog.pg_stat_progress_vacuum WHERE pid = {pid};"]}),
        )
        for shard, (pid, name) in _found(site, _WRAPAROUND)
    )


_WRAPAROUND: LiteralString = """
    SELECT DISTINCT a.pid, l.relation::regclass::text
    FROM pg_catalog.pg_stat_activity a JOIN pg_catalog.pg_locks l ON l.pid = a.pid AND l.database = a.datid
    WHERE a.datname = pg_catalog.current_database() AND l.granted AND l.relation IN (SELECT oid FROM family)
      AND a.query LIKE 'autovacuum: %%(to prevent wraparound)%%'
    ORDER BY 2, 1
"""


# --- room


def _connections(site: Site) -> Problem | None:
    needed = site.limits.workers + SESSIONS_BESIDE_WORKERS
    return gathered(
        Problem(
            f"{what} on {shard} leaves room for {max(free, 0)} more sessions (of {limit}), and a move with"
            f" {site.limits.workers} workers takes {needed}",
            f"fewer [limits] workers, or more room (for max_connections, restart {shard} then):\n"
            + on({shard: [statement + f"{limit + needed - free};"]}, "a superuser"),
        )
        for shard, (what, free, limit, statement) in _found(site, _CONNECTIONS)
        if free < needed
    )


# How many sessions are left, of how many, and the statement that gives more, up to the number.
_CONNECTIONS: LiteralString = """
    , ours AS (SELECT oid, rolname, rolsuper, rolconnlimit FROM pg_catalog.pg_roles WHERE rolname = session_user),
    sessions AS (
        SELECT usesysid, datid FROM pg_catalog.pg_stat_activity
        WHERE datid IS NOT NULL AND usesysid IS NOT NULL  -- workers of the server have room of their own
    )
    SELECT 'the server',
           current_setting('max_connections')::int - (SELECT count(*) FROM sessions)
           - CASE WHEN ours.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
                  + coalesce(current_setting('reserved_connections', true)::int, 0) END,
           current_setting('max_connections')::int, 'ALTER SYSTEM SET max_connections = '
    FROM ours
    UNION ALL
    SELECT 'the limit of our role', rolconnlimit - (SELECT count(*) FROM sessions WHERE usesysid = ours.oid),
           rolconnlimit, 'ALTER ROLE ' || pg_catalog.quote_ident(rolname) || ' CONNECTION LIMIT '
    FROM ours WHERE NOT rolsuper AND rolconnlimit >= 0
    UNION ALL
    SELECT 'the limit of the database', d.datconnlimit - (SELECT count(*) FROM sessions WHERE datid = d.oid),
           d.datconnlimit, 'ALTER DATABASE ' || pg_catalog.quote_ident(d.datname) || ' CONNECTION LIMIT '
    FROM ours, pg_catalog.pg_database d
    WHERE d.datname = pg_catalog.current_database() AND NOT rolsuper AND d.datconnlimit >= 0
"""


def _locks(site: Site) -> Problem | None:
    """A statement on a table locks its partitions and their indexes; all locks are kept in one table of the server."""
    sessions = site.limits.workers + LOCKING_BESIDE_WORKERS
    return gathered(
        Problem(
            f"{relations} tables, partitions and indexes on {shard} take up to {relations * sessions} locks, more than"
            " the server has room for beside the application's",
            f"restart {shard} after:\n"
            + on({shard: [f"ALTER SYSTEM SET max_locks_per_transaction = {enough};"]}, "a superuser"),
        )
        for shard, (relations, each, transactions) in _found(site, _LOCKS)
        if relations * sessions > each * transactions
        for enough in [each - (-relations * sessions // transactions)]
    )


_LOCKS: LiteralString = """
    SELECT (SELECT count(*) FROM family) + (SELECT count(*) FROM pg_catalog.pg_index JOIN family ON oid = indrelid),
           current_setting('max_locks_per_transaction')::int,
           current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int
"""


def _disk(site: Site) -> Problem | None:
    """How much is free, no server tells by SQL."""
    try:
        needed = sum(_bytes_of_range(site, table) for table in plain_tables(site.source, site.move.keyspace.tables))
    except psycopg.ProgrammingError:
        return None  # a key column of another type: another line says so
    if needed == 0:
        return None
    return Note(
        f"about {needed:,} bytes, indexes included, will be written on {site.move.target}",
        f"make sure that {site.move.target} has that much free, and as much again for its log",
    )


def _bytes_of_range(site: Site, table: Table) -> int:
    of_all = max(estimate_rows(site.source, table, TRUE), 1)
    share = min(estimate_rows(site.source, table, in_move(site.move, table)) / of_all, 1.0)
    return round(size_bytes(site.source, table.name) * share)


SURROUNDINGS: Checks = (
    ("no subscription feeds the tables", _no_subscription),
    ("nobody follows the changes of the tables", _followers),
    ("no prepared transaction is open", _prepared),
    ("no long transaction is in the way", _long_transactions),
    ("no vacuum against wraparound is at work on the tables", _no_wraparound_vacuum),
    ("there is room for our sessions", _connections),
    ("there is room for our locks", _locks),
    ("there is room on the target's disk", _disk),
)
