"""Real servers, and databases on them that no other test has seen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest
from psycopg import sql

from shardmove.postgres.embedded import Cluster, Server

SERVERS: Final = ("s1", "s2", "s3", "cat")

_numbers = itertools.count(1)


class Databases:
    """Creates databases for one test: `databases("s1", "s2")` is a connection string each, under these names."""

    def __init__(self, servers: Cluster) -> None:
        self._servers = servers
        self._created: list[tuple[Server, str]] = []

    def __call__(self, *names: str, template: str = "template1") -> dict[str, str]:
        """One new database on each named server; all have the same name, which no other test uses."""
        dbname = f"test_{next(_numbers)}"
        return {name: self._create(self._servers[name], dbname, template) for name in names}

    def drop(self) -> None:
        """Drops them all, whoever is connected; starts servers again that the test left stopped."""
        for server, dbname in self._created:
            server.start()
            _execute(server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(dbname)))

    def _create(self, server: Server, dbname: str, template: str) -> str:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        _execute(server, create.format(sql.Identifier(dbname), sql.Identifier(template)))
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


def _execute(server: Server, statement: sql.Composed) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(statement)
