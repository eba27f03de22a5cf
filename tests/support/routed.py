"""Two shards with a table that is split between them, and routers in front: for tests of what a client sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg
import pytest

from shardmove.catalog.store import Catalog
from shardmove.config import load
from shardmove.postgres.embedded import Cluster
from tests.support.router import Router, Routers
from tests.support.servers import Databases, connect

SPLIT_AT: Final = 100
"""Tenants below it are on s1, which is the home shard, too; the others on s2."""

SCHEMA: Final = """
    CREATE TABLE items (
        tenant_id bigint NOT NULL,
        id integer NOT NULL,
        note text,
        amount integer NOT NULL DEFAULT 0,
        PRIMARY KEY (tenant_id, id)
    );
    CREATE INDEX items_by_amount ON items (tenant_id, amount);
    CREATE VIEW noted AS SELECT tenant_id, id FROM items WHERE note IS NOT NULL;
"""


class Routed:
    """The shards, and routers over them: `routed.router(pooling="transaction")`."""

    def __init__(self, databases: Databases, directory: Path, routers: Routers) -> None:
        self.databases = databases
        self.dsns = databases("cat", "s1", "s2")
        self.directory = directory
        self._routers = routers
        for shard in ("s1", "s2"):
            self.execute(shard, SCHEMA)
        self.config_file = directory / "cluster.toml"
        self.config_file.write_text(self._document(), encoding="utf-8")
        with Catalog.install(load(self.config_file).catalog_dsn) as catalog:
            catalog.apply(load(self.config_file))

    def _document(self) -> str:
        return f"""
[catalog]
dsn = "{self.dsns["cat"]}"
[shards.s1]
dsn = "{self.dsns["s1"]}"
[shards.s2]
dsn = "{self.dsns["s2"]}"
[keyspaces.shop.tables]
items = "tenant_id"
[[keyspaces.shop.routes]]
range = ":{SPLIT_AT}"
shard = "s1"
[[keyspaces.shop.routes]]
range = "{SPLIT_AT}:"
shard = "s2"
"""

    def router(self, **settings: Any) -> Router:
        return self._routers.start(self.config_file, **settings)

    def execute(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        """On a shard, around the routers."""
        with connect(self.dsns[shard], application_name="test") as connection:
            connection.execute("SET search_path = public")
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @property
    def dbname(self) -> str:
        """The databases of all shards have the same name."""
        return str(psycopg.conninfo.conninfo_to_dict(self.dsns["s1"])["dbname"])


Site = TypeVar("Site", bound=Routed)


@contextmanager
def standing(servers: Cluster, directory: Path, make: type[Site] = Routed) -> Iterator[Site]:  # type: ignore[assignment]
    """For the tests of a whole module. At the end none of its routers has met an error of its own."""
    databases = Databases(servers)
    with Routers(directory) as routers:
        yield make(databases, directory, routers)
        routers.check()
    databases.drop()


@pytest.fixture
def routed(databases: Databases, tmp_path: Path, routers: Routers) -> Routed:
    return Routed(databases, tmp_path, routers)
