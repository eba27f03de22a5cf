"""The cutover, struck at each of its steps: it ends given up with the giver open, or done; nothing in between stays.

A fault strikes in the coordinator's own thread, at a control point: an error, sessions that are ended on the catalog,
the giver or the receiver, or its death, which settles nothing. Writers write all the while, and keep their ledger.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeAlias

import psycopg
import pytest

from shardmove.catalog.store import Catalog
from shardmove.config import parse
from shardmove.coordinator import cutover, planner
from shardmove.coordinator.attending import Attendant
from shardmove.coordinator.cutover import cut_over
from shardmove.domain import points
from shardmove.domain.errors import CutoverGaveUp, Failed, ShardmoveError, Unreachable
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, Outcome, State
from shardmove.domain.routes import Routes
from tests.support.engine import until
from tests.support.twins import spawn
from tests.support.twins_fence import (
    BOUND_S,
    Killed,
    Pause,
    accepts,
    another_catalog,
    at,
    end_sessions,
    lose_lease,
    owners,
    raising,
)
from tests.support.world import World

MakeWorld: TypeAlias = Callable[..., World]
Ready: TypeAlias = Callable[..., tuple[World, str]]

PATIENT: Final = {"max_stall_ms": 30_000}
OURS: Final = "shardmove m1"  # what our sessions for the first move are called

POINTS: Final = (
    "catch_up.giver.after",
    "cutover.after_guards",
    "open_attempt.before",
    "open_attempt.after",
    "cutover.after_hold",
    "close.after_lock",
    "close.before",
    "close.after",
    "cutover.after_empty",
    "flip.before",
    "flip.after",
    "open.before",
    "open.after",
    "give_away.after",
)
"""In the order of the steps."""


@pytest.fixture
def ready(make_world: MakeWorld) -> Ready:
    """A world whose tenants from 20 on are ready to go from s1 to s2."""

    def make(**limits: Any) -> tuple[World, str]:
        world = make_world(limits=limits)
        move = world.split()
        world.run(move, State.READY)
        return world, move

    return make


def direction_of(world: World, move: str) -> Direction:
    return Direction.FORWARD if world.move(move).state is State.READY else Direction.BACK


def giver(world: World, move: str) -> str:
    return world.move(move).giver(direction_of(world, move))


def receiver(world: World, move: str) -> str:
    return world.move(move).receiver(direction_of(world, move))


def is_settled(world: World) -> bool:
    """One owner, the one that the route table names; nothing is held, and no attempt is open."""
    route = world.catalog.routes()["shop"].at(25)
    return not route.held and not world.catalog.open_attempts() and owners(world) == [route.shard]


def assert_settled(world: World, move: str, after: str = "") -> None:
    assert is_settled(world), after
    owner = {State.READY: "s1", State.SWITCHED: "s2"}[world.move(move).state]
    assert world.owner(25) == owner


# --- a fault at each step

Fault: TypeAlias = Callable[[World, str], object]


def cut_the_catalog(world: World, _move: str) -> None:
    end_sessions(world, "cat", "shardmove")
    with suppress(Unreachable):
        world.catalog.routes()  # the world's own connection notices, and is opened anew


FAULTS: Final[Mapping[str, Fault]] = {
    "an error": lambda *_: raising(Failed("struck"))(),
    "the catalog is cut off": cut_the_catalog,
    "the lease is lost": lose_lease,
    "the giver is cut off": lambda world, move: end_sessions(world, giver(world, move), OURS),
    "the receiver is cut off": lambda world, move: end_sessions(world, receiver(world, move), OURS),
}


class Strike:
    """The fault, and whether it came to it."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.happened = False

    def __call__(self) -> None:
        self.happened = True
        self.act()


@pytest.mark.fault
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_each_step(ready: Ready, fault: str) -> None:
    """The coordinator lives: it has settled what it began when the command ends, whatever it says."""
    world, move = ready(cutover_attempts=3, **PATIENT)
    with world.writers(rate=150.0) as fleet:
        fleet.await_writes(10)  # or there is nothing to be carried at the first point
        for point in POINTS:
            struck = Strike(lambda: FAULTS[fault](world, move))
            with suppress(ShardmoveError), world.hold(move) as held, at(point, struck):
                cut_over(held, direction_of(world, move))
            assert struck.happened, point
            assert_settled(world, move, point)
            fleet.await_writes(10)
    world.assert_nothing_lost()


@contextmanager
def attendant(world: World, move: str) -> Iterator[None]:
    """`shardmove serve`, for the one move."""
    thread = Attendant(world.config, lambda: Catalog.connect(world.config.catalog_dsn), move)
    thread.start()
    try:
        yield
    finally:
        thread.end()


@pytest.mark.fault
@pytest.mark.parametrize("who", ["the next command", "an attendant"])
def test_a_death_at_each_step(ready: Ready, who: str) -> None:
    """A dead coordinator settles nothing: who comes next decides the attempt, and carries it out."""
    world, move = ready(**PATIENT)
    with world.writers(rate=150.0) as fleet:
        fleet.await_writes(10)
        for point in POINTS:
            with pytest.raises(Killed), world.hold(move) as held, at(point, raising(Killed())):
                cut_over(held, direction_of(world, move))
            if who == "an attendant":
                with attendant(world, move):
                    until(lambda: is_settled(world), timeout_s=BOUND_S)
            else:
                with world.hold(move):
                    pass
            assert_settled(world, move, point)
            fleet.await_writes(10)
    world.assert_nothing_lost()
    outcomes = {record.attempt.outcome for record in world.catalog.attempts(move)}
    assert outcomes == {Outcome.ABANDONED, Outcome.FLIPPED}


# --- a COMMIT in doubt


@pytest.mark.fault
@pytest.mark.parametrize("lost", ["before the commit", "the answer"])
def test_a_flip_in_doubt_is_settled(ready: Ready, lost: str) -> None:
    """The backend is ended in the middle of the flip; or the flip is committed, and nobody hears of it."""
    world, move = ready(**PATIENT)
    with world.writers(rate=150.0) as fleet, world.hold(move) as held, psycopg.connect(world.dsns["cat"]) as blocker:
        flipping = held.catalog._connection
        flipping.execute("SET client_connection_check_interval = 0")  # the server is not to notice before the flip
        with at("flip.before", lambda: publishers_wait(blocker)) as reached:
            cutting = spawn(lambda: cut_over(held, Direction.FORWARD))
            assert reached.wait(BOUND_S)
            until(lambda: blocked(world) == 1)
            if lost == "the answer":
                with socket.socket(fileno=os.dup(flipping.fileno())) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                until(lambda: blocked(world) == 2)  # the flip, and who settles it, over a new connection
            else:
                backend = flipping.info.backend_pid
                world.fetch("cat", f"SELECT pg_terminate_backend({backend}, 10000)")
            blocker.rollback()
            report = cutting.result(BOUND_S)
        assert report.attempts == (1 if lost == "the answer" else 2)
        fleet.await_writes(10)
    assert world.move(move).state is State.SWITCHED
    assert_settled(world, move)
    world.assert_nothing_lost()


def publishers_wait(blocker: psycopg.Connection[Any]) -> None:
    blocker.execute("SELECT FROM shardmove_catalog.cluster FOR UPDATE")


def blocked(world: World) -> int:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND cardinality(pg_blocking_pids(pid)) > 0"
    )
    ((count,),) = world.fetch("cat", query)
    return int(count)


# --- giving up


def test_an_attempt_that_stalls_writers_for_too_long_gives_up_and_opens_again(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutover, "WATCHDOG_FACTOR", 1000)
    world, move = ready(max_stall_ms=300)
    pauses_s = iter([0.4, 0.4])  # one of the two attempts may be given up for another reason
    slow_server = points.armed("close.after", lambda _: threading.Event().wait(next(pauses_s, 0)))
    with world.writers(rate=150.0), slow_server:
        report = world.cut_over(move)
    assert report.attempts >= 2
    assert any("writes would have waited for longer than 300 ms" in each for each in report.gave_up)
    assert_settled(world, move)
    world.assert_nothing_lost()


def test_a_catch_up_that_takes_too_long_before_anything_is_held_is_tried_again(ready: Ready) -> None:
    world, move = ready(max_stall_ms=300)
    with world.connect("s2") as other:
        # The session goes by itself, and its lock with it.
        lock = "SET idle_session_timeout = '3s'; SELECT pg_advisory_lock(mirror_key) FROM shardmove.fence"
        with world.writers(rate=150.0), at("cutover.after_guards", lambda: other.execute(lock)):
            report = world.cut_over(move)
    assert "a catch-up takes longer than 300 ms" in report.gave_up
    assert_settled(world, move)
    world.assert_nothing_lost()


def test_a_coordinator_that_hangs_with_the_fence_closed_is_overtaken_by_its_own_watchdog(
    ready: Ready,
) -> None:
    world, move = ready(max_stall_ms=500)
    with world.writers(rate=150.0) as fleet, Pause("close.after") as hanging:
        cutting = spawn(lambda: world.cut_over(move))
        hanging.wait()
        until(lambda: accepts(world, "s1"), timeout_s=BOUND_S)
        fleet.await_writes(10)
        hanging.release()
        report = cutting.result(BOUND_S)
    assert report.attempts >= 2
    assert_settled(world, move)
    world.assert_nothing_lost()


def test_what_was_held_is_let_go_when_the_attempt_is_given_up(ready: Ready) -> None:
    world, move = ready(cutover_attempts=1, **PATIENT)
    held: list[bool] = []

    def look_and_fail() -> None:
        with another_catalog(world) as catalog:
            held.append(catalog.routes()["shop"].at(25).held)
        raise Failed("struck")

    with at("cutover.after_hold", look_and_fail), pytest.raises(CutoverGaveUp, match="struck"):
        world.cut_over(move)
    assert held == [True]
    assert not world.catalog.routes()["shop"].at(25).held
    assert_settled(world, move)


# --- beside others


@pytest.mark.parametrize("point", ["open_attempt.before", "flip.before"])
def test_an_epoch_published_for_another_keyspace_meanwhile(ready: Ready, point: str) -> None:
    world, move = ready(**PATIENT)
    world.catalog.apply(with_another_keyspace(world))

    def publish() -> None:
        with another_catalog(world) as catalog:
            catalog.change_routes("other", move_a_piece, "meanwhile")

    with at(point, publish) as published:
        report = world.cut_over(move)
    assert published.is_set()
    assert report.attempts == 1
    assert world.catalog.routes()["other"].at(5).shard == "s3"
    assert_settled(world, move)


def move_a_piece(routes: Routes) -> Routes:
    return routes.assign([KeyRange(0, 10)], shard="s3")


def with_another_keyspace(world: World) -> Any:
    first = [{"range": ":", "shard": "s1"}]
    return parse(
        {
            "catalog": {"dsn": world.dsns["cat"]},
            "shards": {name: {"dsn": dsn} for name, dsn in world.shards.items()},
            "keyspaces": {
                "shop": {"tables": dict.fromkeys(map(str, world.config.keyspace("shop").tables), "tenant_id"),
                         "routes": first},
                "other": {"tables": {"things": "thing_id"}, "routes": first},
            },
        }
    )  # fmt: skip


def test_two_moves_from_one_source_cut_over_at_once(make_world: MakeWorld) -> None:
    world = make_world()
    with world.writers(rate=150.0) as fleet:
        plan = planner.split(world.config, world.catalog, "shop", at=[20, 30], to=["s2", "s3"])
        for move in plan.move_ids:
            world.run(move, State.READY)
        for direction in (Direction.FORWARD, Direction.BACK, Direction.FORWARD):
            for cutting in [spawn(partial(world.cut_over, move, direction)) for move in plan.move_ids]:
                cutting.result(BOUND_S)
            fleet.await_writes(10)
    assert [world.owner(tenant) for tenant in (15, 25, 35)] == ["s1", "s2", "s3"]
    assert owners(world, 25) == ["s2"]
    assert [shard for shard in ("s1", "s3") if accepts(world, shard, 35)] == ["s3"]
    world.assert_nothing_lost()
