"""Clients of the router while ranges change hands: they wait for some milliseconds, and that is all."""

from __future__ import annotations

import threading
import time
from collections import Counter

import psycopg
import pytest

from shardmove.domain.moves import Direction, State
from tests.support.router import Router, Routers
from tests.support.world import BOUND_S, World

CLIENTS = 6
MOVING = range(20, 40)


class Clients:
    """Threads that add to a counter of tenants, each with tenants of its own, and know what it must be."""

    def __init__(self, dsn: str, *, in_blocks: bool) -> None:
        self.errors: list[str] = []
        self.acknowledged: Counter[int] = Counter()
        self.slowest_s = 0.0
        self._dsn = dsn
        self._in_blocks = in_blocks
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(BOUND_S)

    def await_writes(self, count: int) -> None:
        wanted, deadline = self.acknowledged.total() + count, time.monotonic() + BOUND_S
        while self.acknowledged.total() < wanted and not self.errors:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not self.errors, self.errors

    def _run(self, number: int) -> None:
        tenants = list(MOVING)[number::CLIENTS]
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self._stop.is_set():
                    for tenant in tenants:
                        began = time.monotonic()
                        self._write(connection, tenant)
                        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                        self.acknowledged[tenant] += 1
        except (psycopg.Error, AssertionError) as error:
            self.errors.append(f"{type(error).__name__} {getattr(error, 'sqlstate', '')}: {error}")

    def _write(self, connection: psycopg.Connection, tenant: int) -> None:
        statement = "UPDATE tenants SET version = version + 1 WHERE tenant_id = %s"
        if not self._in_blocks:
            assert connection.execute(statement, (tenant,)).rowcount == 1
            return
        with connection.transaction():
            assert connection.execute(statement, (tenant,)).rowcount == 1
            connection.execute("SELECT count(*) FROM orders WHERE tenant_id = %s", (tenant,))


def versions(router: Router) -> dict[int, int]:
    with psycopg.connect(router.dsn(), autocommit=True) as connection:
        return {
            tenant: connection.execute("SELECT version FROM tenants WHERE tenant_id = %s", (tenant,)).fetchone()[0]
            for tenant in MOVING
        }


@pytest.fixture(params=["session", "transaction"])
def router(world: World, routers: Routers, request: pytest.FixtureRequest) -> Router:
    return routers.start(world.write_config(), pooling=request.param, hold_timeout_s=60.0)


@pytest.mark.parametrize("in_blocks", [False, True], ids=["single", "blocks"])
def test_no_client_sees_an_error_in_a_whole_move(world: World, router: Router, in_blocks: bool) -> None:
    before = versions(router)
    with Clients(router.dsn(), in_blocks=in_blocks) as clients:
        clients.await_writes(50)
        move_id = world.split(at=20)
        world.run(move_id, State.READY)
        clients.await_writes(50)
        for direction in (Direction.FORWARD, Direction.BACK, Direction.FORWARD):
            world.cut_over(move_id, direction)
            clients.await_writes(100)
        world.complete(move_id)
        clients.await_writes(50)
    assert not clients.errors
    after = versions(router)
    assert {t: after[t] - before[t] for t in MOVING} == {t: clients.acknowledged[t] for t in MOVING}
    stats = {row["name"]: row["value"] for row in router.show("STATS")}
    print(stats)
