"""Clients driven step by step, pauses at control points, and questions to the shards by plain SQL.

with Clerk(world, "s1") as clerk, Pause("close.after_lock") as closing:
    join = in_background(lambda: world.cut_over(move))
    closing.wait()                       # the coordinator stands still there
    clerk.rename(25, "written meanwhile")
    closing.release()
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, LiteralString, Self

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.demo import check, ledger, shop
from shardmove.demo.ledger import Image, Ledger, Outcome, Write
from shardmove.domain import points
from shardmove.domain.keys import KeyRange
from shardmove.postgres.connect import Connection
from shardmove.protocol import fence
from tests.support.engine import until
from tests.support.servers import connect
from tests.support.world import World

BOUND_S: Final = 180.0
LEVELS: Final = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
MOVED: Final = KeyRange(20, None)  # what `world.split()` moves
STRANGER: Final = 999  # a tenant of that range that no shard has


class Killed(BaseException):
    """A coordinator's death: no handler of the product sees it, so nothing is settled."""


def take_baseline(world: World) -> Path:
    """Every row as it is before the first write, unless that was written down already. Returns the ledger's place."""
    directory = world.directory / "ledger"
    if not ledger.has_baseline(directory):
        routes = world.catalog.routes()["shop"]
        check.take_baseline(directory, world.shards, lambda tenant: routes.at(tenant).shard)
    return directory


# --- clients


class Clerk:
    """One client of the shop on one shard, which asks no route table: a forgotten cron job, a stale router.

    What a shard told it is committed goes into the world's external ledger; what was refused does not.
    """

    def __init__(self, world: World, shard: str, name: str = "clerk") -> None:
        directory = take_baseline(world)
        self.name = name
        self.shard = shard
        self._ledger = Ledger(ledger.new_ledger_path(directory, ledger.next_generation(directory), name))
        self._number = 0
        self._rows: list[tuple[str, str, Image]] = []
        self._in_block = False
        self.connection: psycopg.Connection[Any] = psycopg.connect(
            shop.pinned(world.dsns[shard]), autocommit=True, application_name=name
        )
        self.pid = self.connection.info.backend_pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()
        self._ledger.close()

    def execute(self, statement: str) -> None:
        self.connection.execute(statement.encode())

    def begin(self, level: str = "READ COMMITTED") -> None:
        """Begins a transaction, and takes its snapshot where the level has one for the whole of it."""
        self.execute(f"BEGIN ISOLATION LEVEL {level}")
        self.execute("SELECT 1")
        self._in_block = True

    def rename(self, tenant: int, name: str) -> None:
        """A row of the range gets a new value."""
        self._write(shop.TENANTS, "UPDATE tenants t SET name = {} WHERE tenant_id = {}", name, tenant)

    def add_tenant(self, tenant: int, name: str = "new") -> None:
        self._write(shop.TENANTS, "INSERT INTO tenants AS t (name, tenant_id) VALUES ({}, {})", name, tenant)

    def add_order(self, tenant: int, note: str) -> None:
        """An order of one of the tenant's customers, its number given by the shard's sequence."""
        self._write(
            shop.ORDERS,
            "INSERT INTO orders AS t (tenant_id, customer_id, amount, note)"
            " SELECT tenant_id, min(customer_id), 1, {} FROM customers WHERE tenant_id = {} GROUP BY tenant_id",
            note,
            tenant,
        )

    def delete_all(self, from_tenant: int) -> None:
        """Every row of the tenants from that one on, table by table."""
        self.begin()
        self._write(shop.ITEMS, "DELETE FROM order_items t WHERE tenant_id >= {}", from_tenant, is_delete=True)
        self._write(shop.ORDERS, "DELETE FROM orders t WHERE tenant_id >= {}", from_tenant, is_delete=True)
        self._write(shop.CUSTOMERS, "DELETE FROM customers t WHERE tenant_id >= {}", from_tenant, is_delete=True)
        self._write(shop.TENANTS, "DELETE FROM tenants t WHERE tenant_id >= {}", from_tenant, is_delete=True)
        self.commit()

    def rename_unseen(self, tenant: int, name: str) -> None:
        """With every trigger off, ours too: nothing journals it, no fence sees it. The transaction stays open."""
        self.begin()
        self.execute("ALTER TABLE tenants DISABLE TRIGGER ALL")
        self.rename(tenant, name)

    def commit_unseen(self, move_id: str) -> None:
        """The triggers as they were before `rename_unseen`."""
        self.execute("ALTER TABLE tenants ENABLE TRIGGER ALL")
        for event in ("insert", "update", "delete", "truncate"):
            self.execute(f"ALTER TABLE tenants ENABLE ALWAYS TRIGGER shardmove_{move_id}_{event}")
        self.commit()

    def _write(self, table: shop.Table, statement: LiteralString, *values: Any, is_delete: bool = False) -> None:
        """In the open transaction, or in one of its own that is committed at once."""
        query = sql.SQL(statement + " RETURNING {}").format(*map(sql.Literal, values), table.image)
        alone = not self._in_block
        if alone:
            self.execute("BEGIN")
        try:
            rows = self.connection.execute(query).fetchall()
        except psycopg.Error as error:
            self._in_block = False
            with suppress(psycopg.Error):
                self.execute("ROLLBACK")
            self._rows.clear()
            if not isinstance(error, psycopg.errors.SerializationFailure):
                self._conclude(Outcome.FAILED, repr(error))
            raise
        assert rows, "the clerk found nothing to write to"
        self._rows += [(table.name, row[0], None if is_delete else row[1]) for row in rows]
        if alone:
            self.commit()

    def savepoint(self, name: str) -> None:
        self.execute(f"SAVEPOINT {name}")

    def roll_back_to(self, name: str) -> None:
        """To a savepoint that was made before the transaction's first write."""
        self.execute(f"ROLLBACK TO {name}")
        self._rows.clear()

    def commit(self, statement: str = "COMMIT") -> None:
        """Acknowledged, and in the ledger, when it returns."""
        self._in_block = False
        self._number += 1
        self._ledger.intend(self._number, self._rows)
        self._rows = []
        try:
            self.execute(statement)
        except psycopg.errors.SerializationFailure:
            self._conclude(Outcome.FAILED, "refused at COMMIT")
            raise
        self._conclude(Outcome.ACKNOWLEDGED, None)

    def _conclude(self, outcome: Outcome, error: str | None) -> None:
        now = time.monotonic()
        self._ledger.conclude(
            Write(self._number, outcome, self.name, 0, "by hand", "", now, now, self.shard, 1, error=error)
        )


# --- pauses


class Pause:
    """Whoever reaches the control point for the n-th time within the block stands still there until it is let go."""

    def __init__(self, point: str, *, nth: int = 1, when: Callable[[], bool] = lambda: True) -> None:
        self.point = point
        self.reached = threading.Event()
        self._nth = nth
        self._when = when
        self._seen = itertools.count(1)  # by several threads at once, perhaps
        self._go = threading.Event()

    def __enter__(self) -> Self:
        points.arm(self.point, self._stand)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        points.disarm(self.point)
        self._go.set()

    def _stand(self, _name: str) -> None:
        if not self._when():
            return
        if next(self._seen) == self._nth:
            self.reached.set()
            assert self._go.wait(BOUND_S), f"nobody let {self.point} go on"

    def wait(self) -> None:
        assert self.reached.wait(BOUND_S), f"{self.point} was not reached"

    def release(self) -> None:
        self._go.set()


@contextmanager
def at(point: str, act: Callable[[], object], *, nth: int = 1) -> Iterator[threading.Event]:
    """Runs `act` once, in the thread that reaches the point for the n-th time; yields an event: it was run."""
    seen = itertools.count(1)
    done = threading.Event()

    def hook(_name: str) -> None:
        if next(seen) == nth:
            act()
            done.set()

    with points.armed(point, hook):
        yield done


def raising(error: BaseException) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


# --- other parties


@contextmanager
def another_catalog(world: World) -> Iterator[Catalog]:
    """A connection to the catalog of its own, for what another party does meanwhile."""
    with Catalog.connect(world.config.catalog_dsn) as catalog:
        yield catalog


@contextmanager
def party(world: World, move_id: str) -> Iterator[Callable[[str], Connection]]:
    """How a party that is not the coordinator reaches the shards: for `ownership.carry_out`."""
    opened: list[Connection] = []

    def reach(shard: str) -> Connection:
        opened.append(connect(world.dsns[shard], application_name=fence.application_name(move_id)))
        return opened[-1]

    try:
        yield reach
    finally:
        for connection in opened:
            connection.close()


def end_sessions(world: World, server: str, application: str) -> None:
    """Ends every session of that name on a server; returns when they are gone."""
    world.fetch(
        server,
        "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity"
        f" WHERE datname = current_database() AND application_name = '{application}'",
    )


def lose_lease(world: World, move_id: str) -> None:
    """The coordinator's lease connection dies: from now on another one may take the move over."""
    end_sessions(world, "cat", f"shardmove lease {move_id}")


# --- what the shards say, by plain SQL


def waits(world: World, shard: str, application: str) -> bool:
    """A session of that name waits for a lock."""
    (row,) = world.fetch(
        shard,
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database()"
        f" AND application_name = '{application}' AND wait_event_type = 'Lock'",
    )
    return bool(row[0])


def until_it_waits(world: World, shard: str, application: str, *, or_: Callable[[], bool] = lambda: False) -> None:
    until(lambda: or_() or waits(world, shard, application), timeout_s=BOUND_S)


def accepts(world: World, shard: str, tenant: int = STRANGER) -> bool:
    """The shard lets a client write to the tenant. Tried, and rolled back."""
    with psycopg.connect(world.dsns[shard]) as connection:
        try:
            connection.execute(
                "INSERT INTO tenants AS t VALUES (%s, 'a try') ON CONFLICT (tenant_id) DO UPDATE SET plan = t.plan",
                (tenant,),
            )
        except psycopg.errors.SerializationFailure:
            return False
        finally:
            connection.rollback()
    return True


def owners(world: World, tenant: int = STRANGER) -> list[str]:
    """Every shard of s1 and s2 that lets clients write to the tenant: one, or the protocol is broken (I4)."""
    return [shard for shard in ("s1", "s2") if accepts(world, shard, tenant)]


def damage(world: World, *, one_owner: bool = True, absent_on: str | None = None, moved: KeyRange = MOVED) -> list[str]:
    """What the ledger and the shards say of the story's end. `absent_on`: nothing of the range may be on that shard."""
    report = world.check(absent_on={} if absent_on is None else {absent_on: [moved]})
    found = [] if report.ok and not report.failed else [str(report)]
    accepting = owners(world) if one_owner else [world.owner(STRANGER)]
    if accepting != [world.owner(STRANGER)]:
        found.append(f"{world.owner(STRANGER)} owns the range, and {accepting} accept writes to it")
    return found
