"""Real servers, and databases on them that no other test has seen."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, LiteralString

import psycopg
import pytest
from psycopg import sql

from shardmove.postgres.connect import Connection
from shardmove.postgres.connect import connect as connect_ours
from shardmove.postgres.embedded import Cluster, Server

SERVERS: Final = ("s1", "s2", "s3", "cat")
OLD_SERVERS: Final = ("old1", "old2")

OLD_VARIABLE: Final = "SHARDMOVE_TEST_OLD_BIN"
OLD_INSTALLED: Final = Path("/usr/lib/postgresql/15/bin")  # where Debian puts it

DROP_BOUND_S: Final = 60.0

_numbers = itertools.count(1)


def connect(dsn: str, *, application_name: str) -> Connection:
    """A session with the settings of ours, but for one: it may write without saying which effect that is."""
    connection = connect_ours(dsn, application_name=application_name)
    connection.execute("SET default_transaction_read_only = off")
    return connection


class Databases:
    """Creates databases for one test: `databases("s1", "s2")` is a connection string each, under these names."""

    def __init__(self, servers: Cluster | Mapping[str, Server]) -> None:
        self._servers = servers
        self._created: list[tuple[Server, str]] = []

    def __call__(self, *names: str, template: str = "template1", options: LiteralString = "") -> dict[str, str]:
        """One new database on each named server; all have the same name, which no other test uses.

        `options`: further words of CREATE DATABASE; for another locale the template is template0.
        """
        dbname = f"test_{next(_numbers)}"
        return {name: self._create(self._servers[name], dbname, template, options) for name in names}

    def drop(self) -> None:
        """Drops them all, whoever is connected; starts servers again that the test left stopped."""
        for server, dbname in self._created:
            server.start()
            _drop(server, dbname)

    def _create(self, server: Server, dbname: str, template: str, options: LiteralString) -> str:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} {}")
        _execute(server, create.format(sql.Identifier(dbname), sql.Identifier(template), sql.SQL(options)))
        self._created.append((server, dbname))
        return server.dsn_for(dbname)


@pytest.fixture(scope="session")
def servers() -> Iterator[Cluster]:
    """Servers of this test process alone. A test that stops one need not start it again."""
    with Cluster(SERVERS, settings={"fsync": "off"}) as cluster:
        yield cluster


@pytest.fixture
def databases(servers: Cluster) -> Iterator[Databases]:
    factory = Databases(servers)
    yield factory
    factory.drop()


@pytest.fixture(scope="session")
def old_servers() -> Iterator[Cluster]:
    """Servers of an older PostgreSQL: that of the directory in the environment, else an installed PostgreSQL 15."""
    with Cluster(OLD_SERVERS, binaries=old_binaries(), settings={"fsync": "off"}) as cluster:
        yield cluster


def old_binaries() -> Path:
    """Skips the test where there are none."""
    named = os.environ.get(OLD_VARIABLE)
    if named is None and not OLD_INSTALLED.exists():
        pytest.skip(f"no older PostgreSQL: {OLD_INSTALLED} does not exist, and {OLD_VARIABLE} names no directory")
    return Path(named or OLD_INSTALLED)


@pytest.fixture
def old_databases(old_servers: Cluster) -> Iterator[Databases]:
    """As `databases`, on the older servers. `Databases` takes any mapping of names to servers where both are needed."""
    factory = Databases(old_servers)
    yield factory
    factory.drop()


def _drop(server: Server, dbname: str) -> None:
    """The server gives up where a session that it has told to end is still there after five seconds."""
    deadline = time.monotonic() + DROP_BOUND_S
    while True:
        try:
            return _execute(server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(dbname)))
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _execute(server: Server, statement: sql.Composed) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(statement)
