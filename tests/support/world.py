"""A whole world for scenario tests: catalog, shards, a shop, writers with their ledger, and the product's own verbs.

    def test_…(world: World) -> None:
        move_id = world.split(at=20)                  # tenants from 20 on go from s1 to s2
        with world.writers():                         # threads of this process, all isolation levels
            world.run(move_id, State.READY)
            world.cut_over(move_id)
        world.assert_nothing_lost()

Everything of the coordinator runs in this process with the InlineExecutor, so that a twin can replace one function of
the product (`monkeypatch.setattr(fence, "lock_exclusively", …)`) and the external ledger must report the damage.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardmove.catalog.store import Catalog
from shardmove.config import Config, parse
from shardmove.coordinator import ending, planner
from shardmove.coordinator.attending import attend
from shardmove.coordinator.cutover import Report, cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.demo import shop
from shardmove.demo.check import Report as LedgerReport
from shardmove.demo.check import check as check_ledger
from shardmove.demo.writers import WriterFleet
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, Move, State
from shardmove.postgres.connect import Connection
from shardmove.protocol import objects
from shardmove.protocol.catch_up import Mirror
from tests.support.servers import Databases, connect
from workers.executors import InlineExecutor

TENANTS = range(40)
ROWS_A_TENANT = 40
BOUND_S = 200.0
"""So long is waited for what takes a moment: the machine may be slow, and a test ends after five minutes anyway."""
LIMITS: Mapping[str, Any] = {
    "batch_bytes": 20_000,
    "batch_rows_max": 200,
    "workers": 2,
    "ddl_patience_s": 60.0,
    "keep_source_s": 1.2,
}


class World:
    """A shop whose tenants 0–39 are on s1; s2 (and s3) are there and empty. Small batches, so that moves have many.

    Args:
        create: makes the shop's tables on a shard; another one than the shop's own may partition them, or the like.
        rows_a_tenant: about so many rows, all tables together.
    """

    def __init__(
        self,
        databases: Databases,
        directory: Path,
        *,
        limits: Mapping[str, Any] | None = None,
        create: Callable[[Connection], None] = shop.create,
        rows_a_tenant: int = ROWS_A_TENANT,
    ) -> None:
        self.dsns = databases("cat", "s1", "s2", "s3")
        self.shards = {name: dsn for name, dsn in self.dsns.items() if name != "cat"}
        self.directory = directory
        self.limits = dict(limits or {})
        self.config = self._configure({**LIMITS, **self.limits})
        for shard in self.shards:
            with self.connect(shard) as connection:
                create(connection)
        with self.connect("s1") as connection:
            shop.load(connection, TENANTS, rows=rows_a_tenant * len(TENANTS), seed=1)
        self.catalog = Catalog.install(self.config.catalog_dsn)
        self.catalog.apply(self.config)
        self.fleet: WriterFleet | None = None

    def _configure(self, limits: Mapping[str, Any]) -> Config:
        return parse(
            {
                "catalog": {"dsn": self.dsns["cat"]},
                "shards": {name: {"dsn": dsn} for name, dsn in self.shards.items()},
                "keyspaces": {"shop": {"tables": dict(shop.KEY_COLUMNS), "routes": [{"range": ":", "shard": "s1"}]}},
                "limits": dict(limits),
                "router": {"stale_after_s": 2.0},  # what `complete` waits for where a router has been killed
            }
        )

    def write_config(self) -> Path:
        """The same configuration as a file, for commands that run as processes of their own."""
        limits = {**LIMITS, **self.limits}
        lines = ["[catalog]", f'dsn = "{self.dsns["cat"]}"']
        for name, dsn in self.shards.items():
            lines += [f"[shards.{name}]", f'dsn = "{dsn}"']
        lines += ["[keyspaces.shop]", "[keyspaces.shop.tables]"]
        lines += [f'{table} = "{column}"' for table, column in shop.KEY_COLUMNS.items()]
        lines += ["[[keyspaces.shop.routes]]", 'range = ":"', 'shard = "s1"', "[limits]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in limits.items()]
        path = self.directory / "cluster.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """`shardmove …` in a process of its own, over this world; its output goes to standard error of the test."""
        return subprocess.Popen(
            [sys.executable, "-m", "shardmove", *command, "-c", str(self.write_config())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    # --- the verbs

    def split(self, at: int = 20, to: str = "s2") -> str:
        """Plans a split of the shop; returns the move's id."""
        return planner.split(self.config, self.catalog, "shop", at=[at], to=[to]).move_ids[0]

    @contextmanager
    def hold(self, move_id: str, **options: Any) -> Iterator[Hold]:
        """A coordinator of this process; over a catalog connection of its own, so that several may run as threads."""
        with Catalog.connect(self.config.catalog_dsn) as catalog:
            settings = {"holder": "test", "make_executor": lambda: InlineExecutor(2), "progress": Progress(), **options}
            with hold(self.config, catalog, move_id, **settings) as held:
                yield held

    def run(self, move_id: str, goal: State) -> None:
        with self.hold(move_id) as held:
            run(held, goal)

    def cut_over(self, move_id: str, direction: Direction = Direction.FORWARD) -> Report:
        with self.hold(move_id) as held:
            return cut_over(held, direction)

    def complete(self, move_id: str) -> None:
        with self.hold(move_id) as held:
            ending.complete(held)

    def roll_back(self, move_id: str) -> None:
        with self.hold(move_id) as held:
            ending.roll_back(held)

    def move(self, move_id: str) -> Move:
        return self.catalog.move(move_id)

    def mirror(self, move_id: str, direction: Direction = Direction.FORWARD) -> Mirror:
        """A mirror of its own connections; close it."""
        move = self.move(move_id)
        with self.connect(move.source) as connection:
            tables = objects.load_tables(connection, move_id)
        return Mirror.open(move, direction, tables, self.shards)

    @contextmanager
    def attended(self) -> Iterator[None]:
        """An attendant runs beside, as `shardmove serve` does."""
        stop = threading.Event()
        join = in_background(lambda: attend(self.config, lambda: Catalog.connect(self.config.catalog_dsn), stop))
        try:
            yield
        finally:
            stop.set()
            join()

    def await_row(self, shard: str, statement: str, row: tuple[Any, ...]) -> None:
        """Returns when the statement yields the row; fails after some minutes."""
        deadline = time.monotonic() + BOUND_S
        while self.fetch(shard, statement) != [row]:
            assert time.monotonic() < deadline, f"{statement} does not become {row}: {self.fetch(shard, statement)}"

    # --- the outside view

    def connect(self, shard: str) -> Connection:
        """A plain session on a shard, as an application's: autocommit, search_path public."""
        connection = connect(self.dsns[shard], application_name="application")
        connection.execute("SET search_path = public")
        return connection

    def fetch(self, shard: str, statement: str) -> list[tuple[Any, ...]]:
        with self.connect(shard) as connection:
            return connection.execute(statement.encode()).fetchall()

    @contextmanager
    def writers(self, **options: Any) -> Iterator[WriterFleet]:
        """Writers of the shop, as threads of this process, most of them in tenants from 20 on; stopped at the end."""
        settings: dict[str, Any] = {
            "tenants": list(TENANTS),
            "focus": [tenant for tenant in TENANTS if tenant >= 20],
            "processes": 0,
            "threads": 3,
            "rate": 300.0,
            **options,
        }
        ledger_dir = self.directory / "ledger"
        with WriterFleet(ledger_dir, self.dsns["cat"], self.shards, **settings) as fleet:
            self.fleet = fleet
            yield fleet

    def owner(self, tenant: int) -> str:
        return self.catalog.routes()["shop"].at(tenant).shard

    def check(self, *, absent_on: Mapping[str, Sequence[KeyRange]] | None = None) -> LedgerReport:
        """The external ledger's report; the writers must have stopped. Owners are those of the route table."""
        owners = {tenant: self.owner(tenant) for tenant in range(-10, 100)}
        return check_ledger(self.directory / "ledger", self.shards, lambda t: owners[t], absent_on=absent_on)

    def assert_nothing_lost(self, **options: Any) -> LedgerReport:
        report = self.check(**options)
        assert report.ok, str(report)
        assert report.failed == 0, str(report)
        return report

    def leftovers(self, shard: str, move_id: str) -> list[str]:
        """Names of objects of a move that are still on a shard: triggers, functions, relations, records."""
        pattern = f"%{move_id}%"
        with self.connect(shard) as connection:
            rows = connection.execute(
                "SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE 'shardmove\\_' || %(p)s"
                " UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'shardmove'::regnamespace"
                " AND proname LIKE %(p)s"
                " UNION ALL SELECT 'relation ' || relname FROM pg_class WHERE relnamespace = 'shardmove'::regnamespace"
                " AND relname LIKE %(p)s"
                " UNION ALL SELECT 'fence row' FROM shardmove.fence WHERE move_id = %(m)s"
                " UNION ALL SELECT 'batch' FROM shardmove.batch WHERE move_id = %(m)s",
                {"p": pattern, "m": move_id},
            ).fetchall()
        return [row[0] for row in rows]

    def sessions(self, move_id: str) -> list[str]:
        """Sessions of ours for a move that live on a shard; backends of a killed process are given time to notice."""
        deadline = time.monotonic() + BOUND_S
        while True:
            found = [
                f"{shard}: {row[0]}"
                for shard in ("s1", "s2")
                for row in self.fetch(
                    shard,
                    "SELECT pid || ' ' || coalesce(query, '') FROM pg_stat_activity"
                    f" WHERE application_name = 'shardmove {move_id}' AND datname = current_database()",
                )
            ]
            if not found or time.monotonic() > deadline:
                return found


@pytest.fixture
def world(databases: Databases, tmp_path: Path) -> Iterator[World]:
    made = World(databases, tmp_path)
    yield made
    made.catalog.close()


@pytest.fixture
def make_world(databases: Databases, tmp_path: Path) -> Callable[..., World]:
    """`make_world(limits={…})` for tests that need other limits."""
    return lambda **options: World(databases, tmp_path, **options)


def in_background(work: Callable[[], object]) -> Callable[[], None]:
    """Runs it in a thread; call the result to wait for its end, which raises what the work raised."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()

    def join(timeout_s: float = BOUND_S) -> None:
        thread.join(timeout_s)
        assert not thread.is_alive(), "the background work did not end"
        if failed:
            raise failed[0]

    return join
