"""Kept fences change under live clients: nobody loses a transaction to it, and nothing slips through meanwhile (I4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

import psycopg

from shardmove.coordinator import planner
from shardmove.domain.moves import State
from shardmove.postgres import locks
from tests.support.engine import until
from tests.support.twins import Mechanism, spawn
from tests.support.twins_fence import BOUND_S, MOVED, Clerk, accepts, damage
from tests.support.world import World

MakeWorld: TypeAlias = Callable[..., World]

PATIENT = {"ddl_lock_timeout_ms": 60_000}
"""Ours waits until the client has written: who loses is decided by the locks, and not by the clock."""


def test_a_client_that_has_read_and_writes_does_not_lose_to_a_fence_that_goes(
    mechanism: Mechanism, make_world: MakeWorld
) -> None:
    """The range comes back: triggers are made, and the kept ones dropped, on a table that the client has read.

    The twin holds CREATE TRIGGER's lock, and waits for DROP TRIGGER's: the client's write ends as a deadlock at once.
    """
    world = make_world(limits=PATIENT)
    world.run(world.split(), State.COMPLETED)
    back = planner.move(world.config, world.catalog, "shop", range_=MOVED, to="s1").move_ids[0]
    mechanism.replace(locks, "_lock", lambda *_, **__: None)
    with Clerk(world, "s1") as clerk, strays(world) as accepted:
        clerk.begin()
        clerk.execute("SELECT FROM tenants")
        running = spawn(lambda: world.run(back, State.READY))
        until(lambda: world.fetch("s1", WAITS) != [], timeout_s=BOUND_S)
        with suppress(psycopg.errors.DeadlockDetected):
            clerk.rename(5, "written by who had read")
            clerk.commit()
        running.result(BOUND_S)
    assert accepted == []
    assert world.fetch("s1", "SELECT FROM pg_trigger WHERE starts_with(tgname, 'shardmove_kept_')") == []
    mechanism.judge(damage(world))


# Only that lock: for a weaker one the twin may wait a moment, for a stray one, before it has anything that the client
# could wait for; and were the client to write then, ours would be the one that closes the circle, and loses.
WAITS: Final = """
    SELECT pid FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted AND relation = 'tenants'::regclass
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@contextmanager
def strays(world: World) -> Iterator[list[str]]:
    """A forgotten client tries to write to the range on s1 all the time; yields the list of what was let through."""
    accepted: list[str] = []
    enough = threading.Event()

    def stray() -> None:
        while not enough.is_set():
            if accepts(world, "s1"):
                accepted.append("s1 took a write")

    trying = spawn(stray)
    try:
        yield accepted
    finally:
        enough.set()
        trying.result(BOUND_S)
