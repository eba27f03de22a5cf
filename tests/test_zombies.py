"""Commands that wake up late: their move has gone on without them, or has ended. They change nothing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from shardmove.catalog.store import Catalog
from shardmove.coordinator import planner, uninstalling
from shardmove.domain import points
from shardmove.domain.errors import LeaseLost, ShardmoveError, Unreachable
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from shardmove.postgres.connect import Connection
from shardmove.protocol import fence, parts
from tests.support.engine import until
from tests.support.servers import Databases, connect
from tests.support.world import World, in_background

MOVED = KeyRange(20, None)
BOUND_S = 240.0
"""Who sleeps, sleeps through a whole move."""


@contextmanager
def asleep_at(point: str, work: Callable[[], None], *, time: int = 1) -> Iterator[Callable[[], BaseException | None]]:
    """Runs the work in a thread that falls asleep when it reaches the point, or reaches it for the n-th time.

    Call the result to wake it up.

    Waking returns what the work ended with.
    """
    arrived, wake = threading.Event(), threading.Event()
    ended: list[BaseException | None] = []
    reached = itertools.count(1)

    def sleep(_: str) -> None:
        if next(reached) == time:
            arrived.set()
            assert wake.wait(BOUND_S)

    def guarded() -> None:
        try:
            work()
        except (ShardmoveError, psycopg.Error) as error:
            ended.append(error)
        else:
            ended.append(None)

    def wake_up() -> BaseException | None:
        wake.set()
        join(BOUND_S)
        return ended[0]

    with points.armed(point, sleep):
        join = in_background(guarded)
        try:
            assert arrived.wait(BOUND_S), f"{point} was not reached"
            yield wake_up
        finally:
            wake.set()


def take_lease_away(world: World, move_id: str) -> None:
    """The coordinator's lease session dies, as with its host; its other sessions live on."""
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE %s",
            (f"% lease {move_id}",),
        )


def move_range(world: World, range_: KeyRange, to: str) -> str:
    return planner.move(world.config, world.catalog, "shop", range_=range_, to=to).move_ids[0]


def accepts(world: World, shard: str, tenant: int) -> bool:
    """An application may write the tenant there."""
    try:
        with world.connect(shard) as connection:
            connection.execute("UPDATE tenants SET name = name || '.' WHERE tenant_id = %s", (tenant,))
            connection.execute("INSERT INTO tenants (tenant_id, name) VALUES (%s, 'probe')", (1000 + tenant,))
            connection.execute("DELETE FROM tenants WHERE tenant_id = %s", (1000 + tenant,))
    except psycopg.errors.SerializationFailure:
        return False
    return True


@pytest.fixture(params=[True, False], ids=["lease held", "twin: lease not held"])
def is_held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The twin leaves out the check of the lease in each change of objects."""
    if not request.param:
        monkeypatch.setattr(parts, "hold_lease", lambda *_: None)
    return bool(request.param)


def test_initializing_late_opens_nothing_that_was_given_away(world: World, is_held: bool) -> None:
    first = world.split(at=20)
    with asleep_at("initializing.before_objects", lambda: world.run(first, State.READY), time=2) as wake:
        take_lease_away(world, first)
        world.roll_back(first)
        second = world.split(at=20)
        world.run(second, State.COMPLETED)
        error = wake()
        assert isinstance(error, LeaseLost) or not is_held
    assert accepts(world, "s2", 25)
    two_owners = accepts(world, "s1", 25)
    assert two_owners is not is_held
    assert not is_held or world.leftovers("s1", first) == world.leftovers("s2", first) == []


def test_completing_late_refuses_nothing_that_came_back(world: World, is_held: bool) -> None:
    first = world.split(at=20)
    world.run(first, State.SWITCHED)
    with asleep_at("ending.before_keep", lambda: world.complete(first)) as wake:
        take_lease_away(world, first)
        world.complete(first)
        back = move_range(world, MOVED, "s1")
        world.run(back, State.COMPLETED)
        assert wake() is not None
    owner_refuses_its_own = not accepts(world, "s1", 25)
    assert owner_refuses_its_own is not is_held


def test_a_cutover_back_that_wakes_up_after_the_end_of_its_move_says_so(world: World) -> None:
    """It had read the sequences: meanwhile all of the margin was used up."""
    move_id = world.split(at=20)
    world.run(move_id, State.SWITCHED)
    with asleep_at("set_sequence.before", lambda: world.cut_over(move_id, Direction.BACK)) as wake:
        take_lease_away(world, move_id)
        world.cut_over(move_id, Direction.BACK)
        world.roll_back(move_id)
        query = "SELECT setval(pg_get_serial_sequence(%s, %s), 2000000)"
        with world.connect("s1") as application:
            for table in ("orders", "customers"):
                application.execute(query, (table, f"{table[:-1]}_id"))
        assert isinstance(wake(), LeaseLost)
    for table in ("orders", "customers"):
        drawn = f"SELECT nextval(pg_get_serial_sequence('{table}', '{table[:-1]}_id'))"
        assert world.fetch("s1", drawn) == [(2000001,)]


def test_an_uninstall_that_is_stopped_holds_no_other_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(world.split(at=20), State.COMPLETED)
    monkeypatch.setattr(uninstalling, "STOPPED_MS", 2_000)

    def uninstall() -> None:
        with Catalog.connect(world.config.catalog_dsn) as catalog:
            uninstalling.uninstall(world.config, catalog, dry_run=False, tell=lambda _: None)

    with asleep_at("uninstall_shard.before", uninstall, time=2) as wake:
        monkeypatch.setattr(uninstalling, "STOPPED_MS", 60_000)  # the other one is slow at the most
        in_background(uninstall)(BOUND_S)
        assert isinstance(wake(), Unreachable)
    for name in world.dsns:
        assert world.fetch(name, "SELECT FROM pg_namespace WHERE nspname LIKE 'shardmove%'") == []


def test_an_attendant_finishes_what_a_dead_coordinator_left_half_done(make_world: Callable[..., World]) -> None:
    """It died between opening the receiver and recording on the giver that the range was given away."""

    class Killed(BaseException):
        pass

    def kill(_: str) -> None:
        raise Killed

    world = make_world(limits={"max_stall_ms": 30_000})  # no watchdog comes before the attendant
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with points.armed("open.after", kill), pytest.raises(Killed):
        world.cut_over(move_id)
    assert world.fetch("s1", "SELECT standing FROM shardmove.fence") == [("owner",)]
    with world.attended():
        world.await_row("s1", "SELECT standing FROM shardmove.fence", ("mirror",))
    world.complete(move_id)
    assert accepts(world, "s2", 25)
    world.catalog.close()


def test_sessions_of_another_role_are_left_alone_by_who_takes_over(databases: Databases) -> None:
    """The role may look at them, and may not end them: that is no reason to fail."""
    dsn = databases("s1")["s1"]
    with connect(dsn, application_name="shardmove m1") as theirs, theirs.transaction():
        theirs.execute("CREATE TABLE public.held (id int)")
        theirs.execute("DROP ROLE IF EXISTS watcher")
        theirs.execute("CREATE ROLE watcher LOGIN IN ROLE pg_monitor")
    with connect(dsn, application_name="shardmove m1") as theirs, theirs.transaction():
        theirs.execute("LOCK TABLE public.held")
        with connect(make_conninfo(dsn, user="watcher"), application_name="test") as ours:
            fence.end_former(ours, "m1")
        theirs.execute("SELECT 1")
        with connect(dsn, application_name="test") as of_the_same_role:
            until(lambda: waits_for_its_client(of_the_same_role, theirs.info.backend_pid))
            fence.end_former(of_the_same_role, "m1")
        with pytest.raises(psycopg.OperationalError):
            theirs.execute("SELECT 1")
        theirs.close()


def waits_for_its_client(observer: Connection, pid: int) -> bool:
    """It has answered, and stands still: a session at work is not ended."""
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s"
    return observer.execute(query, (pid,)).fetchone() == ("Client",)
