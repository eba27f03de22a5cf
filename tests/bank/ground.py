"""Three shards, a catalog, and a bank whose tenants are all on the first shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psycopg

from shardmove.catalog.store import Catalog
from shardmove.config import Config, load
from shardmove.postgres.connect import Connection
from tests.support.servers import connect

SHARDS: Final = ("s1", "s2", "s3")
KEYSPACE: Final = "bank"
TENANTS: Final = 40
ACCOUNTS: Final = 8
OPENING: Final = 10_000
"""What every account holds at first. Balances may go below zero: nobody is refused for want of money."""

LIMITS: Final[Mapping[str, Any]] = {
    "batch_bytes": 40_000,
    "batch_rows_max": 500,
    "workers": 2,
    "ddl_patience_s": 30.0,
    "keep_source_s": 1.5,
    "max_stall_ms": 3_000,
}

SCHEMA: Final = """
    CREATE TABLE accounts (
        tenant_id bigint NOT NULL,
        id integer NOT NULL,
        balance bigint NOT NULL,
        touches bigint NOT NULL DEFAULT 0,
        PRIMARY KEY (tenant_id, id)
    );
    CREATE TABLE transfers (
        tenant_id bigint NOT NULL,
        id text COLLATE "C" NOT NULL,
        giver integer NOT NULL,
        receiver integer NOT NULL,
        amount bigint NOT NULL,
        PRIMARY KEY (tenant_id, id),
        FOREIGN KEY (tenant_id, giver) REFERENCES accounts (tenant_id, id)
    );
"""
OPEN_ACCOUNTS: Final = """
    INSERT INTO accounts (tenant_id, id, balance)
    SELECT tenant, account, %s FROM generate_series(0, %s - 1) tenant, generate_series(0, %s - 1) account
"""

STALE_AFTER_S: Final = 5.0
"""What `complete` waits for after a router was killed; the routers are told the same."""

ROUTER: Final[Mapping[str, float]] = {
    "stale_after_s": STALE_AFTER_S,
    "hold_timeout_s": 60.0,
    "queue_timeout_s": 60.0,
    "connect_timeout_s": 60.0,
}
"""Settings of every router: a machine that is slow is no reason to refuse a client."""


class Ground:
    """The databases of one run, by their connection strings: `cat` and the shards."""

    def __init__(self, dsns: Mapping[str, str], directory: Path) -> None:
        self.dsns = dict(dsns)
        self.directory = directory
        self.config_file = directory / "cluster.toml"
        self.config_file.write_text(self._document(), encoding="utf-8")
        config = load(self.config_file)
        self.config: Config = replace(config, router=replace(config.router, stale_after_s=STALE_AFTER_S))
        for shard in SHARDS:
            with self.connect(shard) as connection:
                connection.execute(SCHEMA.encode())
        with self.connect("s1") as connection:
            connection.execute(OPEN_ACCOUNTS, (OPENING, TENANTS, ACCOUNTS))
        with Catalog.install(self.config.catalog_dsn) as catalog:
            catalog.apply(self.config)

    def _document(self) -> str:
        lines = ["[catalog]", f'dsn = "{self.dsns["cat"]}"']
        for shard in SHARDS:
            lines += [f"[shards.{shard}]", f'dsn = "{self.dsns[shard]}"']
        lines += [f"[keyspaces.{KEYSPACE}.tables]", 'accounts = "tenant_id"', 'transfers = "tenant_id"']
        lines += [f"[[keyspaces.{KEYSPACE}.routes]]", 'range = ":"', 'shard = "s1"', "[limits]"]
        return "\n".join([*lines, *(f"{name} = {value}" for name, value in LIMITS.items())]) + "\n"

    def connect(self, shard: str) -> Connection:
        """A session on a shard as an application has it, around the routers."""
        connection = connect(self.dsns[shard], application_name="bank")
        connection.execute("SET search_path = public")
        return connection

    def fetch(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        with self.connect(shard) as connection:
            return connection.execute(statement.encode()).fetchall()

    def owners(self) -> dict[int, str]:
        """Who owns each tenant, by the catalog's routes."""
        with Catalog.connect(self.config.catalog_dsn) as catalog:
            routes = catalog.routes()[KEYSPACE]
        return {tenant: routes.at(tenant).shard for tenant in range(TENANTS)}


def create_databases(dsns: Mapping[str, str], name: str) -> None:
    """One of that name on each server, for runs that bring servers of their own."""
    for dsn in dsns.values():
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
