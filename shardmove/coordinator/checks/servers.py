"""Checks of the servers: which they are, and that they can be talked to as a move has to."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardmove.coordinator.checks.site import CATALOG_PLACE, Checks, Note, Problem, Site, on
from shardmove.postgres.connect import Connection, connect, explain

SERVER_VERSION_MIN = 150000
"""Before it, the server keeps the clones of row triggers on partitions to itself: nobody but a superuser arms them, and
a disabled one is not told from its own."""

ANSWERS = "the catalog and both shards answer"


def _in_configuration(place: str) -> str:
    return "[catalog]" if place == CATALOG_PLACE else f"[shards.{place}]"


def _identifier(name: str) -> str:
    return sql.Identifier(name).as_string()


def _answers(site: Site) -> Problem | None:
    silent = {}
    for place, connection in site.places:
        try:
            connection.execute("SELECT 1")
        except psycopg.Error as error:
            silent[place] = explain(error)
    return not_answering(silent) if silent else None


def not_answering(silent: Mapping[str, str]) -> Problem:
    """What is said where somebody does not answer: the reason by place."""
    entries = ", ".join(_in_configuration(place) for place in silent)
    return Problem(
        "; ".join(f"{place} does not answer: {reason}" for place, reason in silent.items()),
        f"start the server, or mend {entries} in the configuration",
    )


def _versions(site: Site) -> Problem | None:
    old = [shard for shard, connection in site.sides if connection.info.server_version < SERVER_VERSION_MIN]
    if old:
        return Problem(
            f"{' and '.join(old)} runs a PostgreSQL older than {SERVER_VERSION_MIN // 10000}, the oldest that we know",
            f"upgrade it to {SERVER_VERSION_MIN // 10000} or newer, or name another server in the configuration",
        )
    source, target = (connection.info.server_version // 10000 for _, connection in site.sides)
    if target < source:
        return Note(
            f"{site.move.target} runs PostgreSQL {target}, which is older than {site.move.source}'s {source}: what the"
            " application uses of the newer one it will miss after the cutover",
            f"try the application on {target} first, or upgrade {site.move.target} to {source}",
        )
    return None


def _two_databases(site: Site) -> Problem | None:
    """Asked of the servers, not read from the connection strings: a server has many names."""
    query = (
        "SELECT c.system_identifier, d.oid FROM pg_catalog.pg_control_system() AS c, pg_catalog.pg_database d"
        " WHERE d.datname = pg_catalog.current_database()"
    )
    source, target = (connection.execute(query).fetchone() for _, connection in site.sides)
    if source != target:
        return None
    return Problem(
        f"{site.move.source} and {site.move.target} are the same database: a shard is named twice",
        f"name another database in [shards.{site.move.target}] of the configuration",
    )


def _no_pooler(site: Site) -> Problem | None:
    pooled = [place for place, connection in site.places if not _keeps_session(connection)]
    if not pooled:
        return None
    return Problem(
        f"{' and '.join(pooled)} is reached through a transaction pooler: settings and locks of a session do not last",
        f"name the server itself, or a pooler in session mode, in {', '.join(map(_in_configuration, pooled))} of the"
        " configuration",
    )


def _keeps_session(connection: Connection) -> bool:
    """A session's setting and its advisory lock still hold in a later transaction, while others are at work.

    Another session through the same address takes the server session that a pooler would give us otherwise.
    """
    key, nonce = secrets.randbelow(2**63), secrets.token_hex(8)
    password = {"password": connection.info.password} if connection.info.password else {}
    connection.execute("SELECT pg_catalog.set_config('shardmove.probe', %s, false)", (nonce,))
    connection.execute("SELECT pg_catalog.pg_advisory_lock(%s)", (key,))
    with connect(make_conninfo(connection.info.dsn, **password), application_name="shardmove probe") as other:
        other.execute("BEGIN READ ONLY")
        other.execute("SELECT 1")
        row = connection.execute(
            "SELECT coalesce(pg_catalog.current_setting('shardmove.probe', true), '') = %s"
            " AND pg_catalog.pg_advisory_unlock(%s)",
            (nonce, key),
        ).fetchone()
    return row == (True,)


def _primaries(site: Site) -> Problem | None:
    standbys = [
        place
        for place, connection in site.places
        if connection.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,)
    ]
    if not standbys:
        return None
    entries = ", ".join(_in_configuration(place) for place in standbys)
    return Problem(
        f"{' and '.join(standbys)} is in recovery: a standby, or a server that is being restored",
        f"name the primary in {entries} of the configuration, or promote it: on {standbys[0]}: SELECT pg_promote();",
    )


def _writable(site: Site) -> Problem | None:
    """Our own sessions say themselves that they write; the application's do not."""
    found = {shard: statement for shard, connection in site.sides if (statement := _read_only(connection))}
    if not found:
        return None
    kind = Problem if site.move.target in found else Note
    return kind(
        f"sessions on {' and '.join(found)} are read-only by default: the application could not write the range there",
        on({shard: [statement] for shard, statement in found.items()}, "a superuser or the database's owner"),
    )


_WRITING = "SET default_transaction_read_only = off;"


def _read_only(connection: Connection) -> str | None:
    """The statement that takes the default back, or None. What one role alone has as its default is its own affair."""
    row = connection.execute(_READ_ONLY).fetchone()
    if row is None or not row[0]:
        return None
    if row[1] is not None:
        return f"{_WRITING} {row[1]} RESET default_transaction_read_only;"
    return f"{_WRITING} ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf();"


# The strongest that sets it: the database, all roles, the server; whether it is on, and the beginning of an ALTER.
_READ_ONLY = """
    WITH set_for(database, role, is_on) AS (
        SELECT s.setdatabase, s.setrole, pg_catalog.split_part(option, '=', 2)::boolean
        FROM pg_catalog.pg_db_role_setting s, unnest(s.setconfig) AS option
        WHERE pg_catalog.starts_with(option, 'default_transaction_read_only=')
    )
    SELECT is_on, CASE WHEN database = 0 THEN 'ALTER ROLE ALL'
                  ELSE 'ALTER DATABASE ' || pg_catalog.quote_ident(pg_catalog.current_database()) END, database
    FROM set_for
    WHERE role = 0 AND database IN (
        0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
    UNION ALL
    SELECT reset_val = 'on', NULL, NULL FROM pg_catalog.pg_settings
    WHERE name = 'default_transaction_read_only' AND NOT EXISTS (
        SELECT FROM set_for JOIN pg_catalog.pg_roles r ON r.oid = set_for.role WHERE r.rolname = session_user)
    ORDER BY 3 DESC NULLS LAST LIMIT 1
"""


def _encodings(site: Site) -> Problem | None:
    source, target = (connection.info.parameter_status("server_encoding") for _, connection in site.sides)
    both = f"{site.move.source} is in {source}, {site.move.target} in {target}"
    if source == target:
        return None
    if target != "UTF8":
        name = _identifier(f"{site.target.info.dbname}_utf8")
        make = f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C';"
        return Problem(
            f"{both}: there is text of the one that the other cannot hold",
            "carry the target's data over into a database in UTF8 (another locale of that encoding will do), and name"
            f" it in [shards.{site.move.target}] of the configuration:\n"
            + on({site.move.target: [make]}, "who may create databases"),
        )
    return Note(
        f"{both}: a character that {source} lacks, written after the cutover, could not be carried back",
        f"do not write such characters before `shardmove complete {site.move.id}`",
    )


SERVERS: Checks = (
    (ANSWERS, _answers),
    ("both servers run a version that we know", _versions),
    ("the source and the target are two databases", _two_databases),
    ("all are reached without a transaction pooler", _no_pooler),
    ("all are primaries", _primaries),
    ("sessions may write by default", _writable),
    ("the target can hold every text of the source", _encodings),
)
