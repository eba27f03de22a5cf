"""The shards as they answer now, and what our role needs on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from psycopg import sql

from shardmove.config import Config
from shardmove.domain.errors import ShardmoveError, Unreachable
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection, connect, safe_dsn, translated

APPLICATION_NAME = "shardmove"
PARAMETER_GRANTS_SINCE = 150000


@dataclass(frozen=True, slots=True)
class Answer:
    """What a shard said when it was asked. `dsn` has no password in it; `trouble` is None where it answered."""

    shard: str
    dsn: str
    server_version: str | None
    trouble: str | None


def ask(config: Config) -> list[Answer]:
    """Connects to every shard of the configuration, in its order."""
    return [_ask(shard, dsn) for shard, dsn in config.shards.items()]


def _ask(shard: str, dsn: str) -> Answer:
    try:
        with connect(dsn, application_name=APPLICATION_NAME) as connection:
            version = connection.info.parameter_status("server_version")
            return Answer(shard, safe_dsn(dsn), version, None)
    except ShardmoveError as error:
        return Answer(shard, safe_dsn(dsn), None, error.message)


def require_answers(answers: list[Answer]) -> None:
    """Raises Unreachable that names the shards which did not answer."""
    silent = [f"shard {each.shard}: {each.trouble}" for each in answers if each.trouble is not None]
    if silent:
        raise Unreachable("; ".join(silent), hint="mend [shards] in the configuration, or start the server")


# --- grants


@dataclass(frozen=True, slots=True)
class Grants:
    """Statements for one database; `place` is a shard's name, or `catalog`."""

    place: str
    statements: tuple[str, ...]


def grants(config: Config, role: str) -> list[Grants]:
    """The SQL that gives a role the least it needs, per database. Runs none of it. Raises Unreachable."""
    found = []
    with connect(config.catalog_dsn, application_name=APPLICATION_NAME) as connection:
        found.append(Grants("catalog", (_create_on_database(connection, role),)))
    for shard, dsn in config.shards.items():
        with connect(dsn, application_name=APPLICATION_NAME) as connection, translated(f"shard {shard}"):
            found.append(Grants(shard, tuple(_shard_grants(connection, config, role))))
    return found


def _shard_grants(connection: Connection, config: Config, role: str) -> Iterator[str]:
    yield _create_on_database(connection, role)
    for owner in _owners(connection, config):
        if owner != role:  # whoever makes triggers on a table has to own it, or be a member of who does
            yield _statement("GRANT {} TO {};", owner, role)
    if connection.info.server_version >= PARAMETER_GRANTS_SINCE:
        yield _statement("GRANT SET ON PARAMETER session_replication_role TO {};", role)
    else:
        yield "-- tables with foreign keys or user triggers need a superuser before PostgreSQL 15"
    # Else the transactions of other roles that a closing would wait for are not seen beforehand.
    yield _statement("GRANT pg_read_all_stats TO {};", role)


def _create_on_database(connection: Connection, role: str) -> str:
    return _statement("GRANT CREATE ON DATABASE {} TO {};", connection.info.dbname, role)


def _statement(template: str, *names: str) -> str:
    return template.format(*(sql.Identifier(name).as_string() for name in names))


def _owners(connection: Connection, config: Config) -> list[str]:
    """Who owns the tables of the keyspaces here, each once."""
    tables: list[TableName] = [table for keyspace in config.keyspaces.values() for table in keyspace.tables]
    rows = connection.execute(
        "SELECT DISTINCT pg_catalog.pg_get_userbyid(c.relowner)::text FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest(%s::text[], %s::text[])) ORDER BY 1",
        ([table.schema for table in tables], [table.name for table in tables]),
    ).fetchall()
    return [row[0] for row in rows]
