"""The shards as they answer now, and what our role needs on them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator.checks.privileges import (
    ON_SHARDS,
    Grantee,
    Need,
    Right,
    applying,
    catalog,
    connecting,
    statistics,
)
from shardmove.coordinator.checks.site import CATALOG_PLACE
from shardmove.domain.errors import ShardmoveError, Unreachable
from shardmove.postgres.connect import connect, safe_dsn, translated
from shardmove.postgres.locks import Patience
from shardmove.protocol import kept, objects

APPLICATION_NAME = "shardmove"


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


def extend_fences(config: Config, catalog: Catalog) -> list[str]:
    """Makes tables that came to a keyspace later refuse, on each shard, what that shard gave away before (I4).

    A line for each table; shards that do not answer are left out. Safe to repeat.
    """
    patience = Patience(config.limits.ddl_lock_timeout_ms, config.limits.ddl_patience_s)
    lines = []
    for shard, dsn in config.shards.items():
        with suppress(Unreachable), connect(dsn, application_name=APPLICATION_NAME) as connection:
            if objects.has_schema(connection):
                objects.check_schema(connection, catalog.cluster_id())
                lines += [
                    f"{shard}: {table.name} refuses the ranges of {keyspace.name} that were given away"
                    for keyspace in catalog.keyspaces().values()
                    for table in kept.extend(connection, keyspace, patience)
                ]
    return lines


def require_answers(answers: list[Answer]) -> None:
    """Raises Unreachable that names the shards which did not answer."""
    silent = [f"shard {each.shard}: {each.trouble}" for each in answers if each.trouble is not None]
    if silent:
        raise Unreachable("; ".join(silent), hint="mend [shards] in the configuration, or start the server")


# --- grants


@dataclass(frozen=True, slots=True)
class Grants:
    """Statements for one database; `place` is a shard's name, or `catalog`. The role may have yet to be made there."""

    place: str
    role_exists: bool
    statements: tuple[str, ...]


def grants(config: Config, role: str, *, place: str | None = None, everything: bool = False) -> list[Grants]:
    """The SQL that gives a role the rights that it lacks, per database. Runs none of it.

    Args:
        place: only this shard, or the catalog.
        everything: what it holds already, too.

    Raises Unreachable, NotFound (no such place).
    """
    if place not in (None, CATALOG_PLACE):
        config.shard_dsn(place)
    found = []
    for name, dsn in [(CATALOG_PLACE, config.catalog_dsn), *config.shards.items()]:
        if place in (None, name):
            with connect(dsn, application_name=APPLICATION_NAME) as connection, translated(name):
                keyspaces = () if name == CATALOG_PLACE else config.keyspaces.values()
                found.append(_grants(name, Grantee.of(connection, keyspaces, role), everything))
    return found


def _grants(place: str, grantee: Grantee, everything: bool) -> Grants:
    on_shards: tuple[Need, ...] = (*ON_SHARDS.values(), statistics)
    needs = (connecting, *((applying, catalog) if place == CATALOG_PLACE else on_shards))
    rights = [right for need in needs for right in need(grantee) if everything or not right.held]
    return Grants(place, grantee.exists, tuple(dict.fromkeys(_statement(right) for right in rights)))


def _statement(right: Right) -> str:
    if right.makes_superuser:  # nobody becomes a superuser by a pipe into psql
        return f"-- before PostgreSQL 15 only a superuser may {right.what}: {right.statement}"
    return right.statement
