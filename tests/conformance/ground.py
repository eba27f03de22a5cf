"""The server and its router. One database that is made anew for each run, so that no run finds another's rests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.config import load
from shardmove.postgres.embedded import LOOPBACK, SUPERUSER, Cluster
from tests.conformance.suites import Address
from tests.support.router import Router, Routers

DBNAME: Final = "conformance"
SETTINGS: Final = {"fsync": "off", "jit": "off", "max_connections": "200"}
SPLIT: Final = "CREATE TABLE split_rows (tenant_id bigint PRIMARY KEY, note text)"
"""A split table, so that routing is on; what the suites create is in no keyspace, and lives at home."""


class Ground:
    """A context manager. `binaries`: of the server; suites use what Debian calls contrib, where it is there."""

    def __init__(self, directory: Path, binaries: Path | None, **router: Any) -> None:
        self._directory = directory
        self._cluster = Cluster(("cat", "s1"), binaries=binaries, settings=SETTINGS)
        self._settings = router

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._cluster.__exit__(*error)

    @contextmanager
    def direct(self) -> Iterator[Address]:
        """The server itself."""
        self._create()
        yield Address(LOOPBACK, self._cluster["s1"].port, SUPERUSER, DBNAME)

    @contextmanager
    def routed(self) -> Iterator[tuple[Address, Router]]:
        """A router before it, all of whose statements go home."""
        self._create()
        directory = Path(tempfile.mkdtemp(prefix="router-", dir=self._directory))
        config = directory / "cluster.toml"
        config.write_text(self._document(), encoding="utf-8")
        with Catalog.install(load(config).catalog_dsn) as catalog:
            catalog.apply(load(config))
        with Routers(directory) as routers:
            router = routers.start(config, **self._settings)
            yield Address(LOOPBACK, router.port, SUPERUSER, DBNAME), router

    def _create(self) -> None:
        for name in ("cat", "s1"):
            with psycopg.connect(self._cluster[name].dsn, autocommit=True) as connection:
                name_ = sql.Identifier(DBNAME)
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name_))
                connection.execute(sql.SQL("CREATE DATABASE {}").format(name_))
        with psycopg.connect(self._cluster["s1"].dsn_for(DBNAME), autocommit=True) as connection:
            connection.execute(SPLIT)

    def _document(self) -> str:
        catalog = self._cluster["cat"].dsn_for(DBNAME)
        shard = self._cluster["s1"].dsn_for(DBNAME, tcp=True)
        return f"""
[catalog]
dsn = "{catalog}"
[shards.s1]
dsn = "{shard}"
[keyspaces.split.tables]
split_rows = "tenant_id"
[[keyspaces.split.routes]]
range = ":"
shard = "s1"
"""
