"""A move between two databases, installed and armed on both sides, before its first batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Move, Scheme, State, TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.identity import identity
from shardmove.postgres.introspect import Table, describe_all
from shardmove.postgres.locks import Patience
from shardmove.protocol import drift, fence, objects, parts, triggers
from tests.support.servers import Databases, connect

PATIENCE: Final = Patience(lock_timeout_ms=500, total_s=20)
LEASE: Final = 1

ORDERS: Final = """
    CREATE TABLE orders (
        tenant_id bigint NOT NULL,
        id bigint NOT NULL,
        note text,
        PRIMARY KEY (tenant_id, id)
    )
"""


@dataclass(frozen=True, slots=True)
class Engine:
    """A move, its tables as described, and how to reach both shards: `s1` gives, `s2` receives."""

    move: Move
    tables: tuple[Table, ...]
    dsn: Mapping[str, str]

    @property
    def table(self) -> Table:
        """The only table, in the many tests that need but one."""
        (table,) = self.tables
        return table

    def connect(self, shard: str) -> Connection:
        """A session as ours are, under a name that no takeover ends."""
        return connect(self.dsn[shard], application_name="test")

    def fetch(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        """Runs a statement in a session of its own; returns its rows, or [] where it has none."""
        with self.connect(shard) as connection:
            connection.execute("SET search_path = public")
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


def make_engine(
    dsn: Mapping[str, str],
    *,
    schema: str = ORDERS,
    tables: Mapping[str, str] | None = None,
    rows: str = "",
    ranges: str = "100:200",
    move_id: str = "m1",
) -> Engine:
    """Runs `schema` on both shards and `rows` on the source, then prepares the move as `initializing` does.

    Args:
        tables: table = key column.
        ranges: one range as `L:U`.
    """
    for statement, shards in ((schema, dsn.values()), (rows, [dsn["s1"]])):
        for each in shards:
            with connect(each, application_name="test") as connection:
                connection.execute(f"SET search_path = public; {statement}".encode())
    keyspace = Keyspace(
        "shop",
        KeyType.BIGINT,
        Scheme.RANGE,
        {TableName.parse(name): key for name, key in (tables or {"orders": "tenant_id"}).items()},
    )
    move = Move(
        id=move_id,
        plan_id="p1",
        keyspace=keyspace,
        ranges=(KeyType.BIGINT.parse_range(ranges),),
        source="s1",
        target="s2",
        state=State.COPYING,
        state_since=datetime.now(UTC),
        lease_number=LEASE,
        last_attempt=0,
        paused=False,
        error=None,
        identities={},
    )
    return _install(move, dsn)


def _install(move: Move, dsn: Mapping[str, str]) -> Engine:
    described: tuple[Table, ...] = ()
    for shard in (move.source, move.target):
        with connect(dsn[shard], application_name="test") as connection:
            described = described or describe_all(connection, move.keyspace.tables)
            move = replace(move, identities={**move.identities, shard: identity(connection)})
            part = parts.Part(move, described, is_source=shard == move.source)
            objects.install_schema(connection, "test")
            fence.raise_number(connection, move.id, LEASE)
            objects.install_move(connection, part, lease_number=LEASE)
            triggers.install_triggers(connection, part, PATIENCE, lease_number=LEASE)
            drift.record_fingerprint(connection, move.id, described, lease_number=LEASE)
    return Engine(move, described, dsn)


@pytest.fixture
def engine(databases: Databases) -> Callable[..., Engine]:
    """`engine(schema=…, rows=…)`: a move between two new databases; the arguments are those of `make_engine`."""
    return lambda **arguments: make_engine(databases("s1", "s2"), **arguments)


def until(
    condition: Callable[[], object],
    otherwise: str | Callable[[], object] = "it did not happen",
    *,
    timeout_s: float = 100,
) -> None:
    """Waits for something that happens in another process. Raises AssertionError, and says why, where it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise() if callable(otherwise) else otherwise
        time.sleep(0.01)
