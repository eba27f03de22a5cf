"""What a router does beside routing: rows are on the other side when it says so; what is decided is carried out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest

from router import mirroring
from router.mirroring import Mirroring
from shardmove.domain import points
from shardmove.domain.errors import Failed, Unreachable
from shardmove.domain.moves import Direction, Outcome, State
from shardmove.domain.points import Effect
from tests.support.followers import PATIENCE_S, Follower, following, until
from tests.support.twins import Mechanism, mechanism
from tests.support.world import World, in_background

__all__ = ["mechanism"]
NAME = "SELECT name FROM tenants WHERE tenant_id = 20"


class Parts:
    """A ready move, a follower, and the mirroring of a router."""

    def __init__(self, world: World, follower: Follower) -> None:
        self.world = world
        self.follower = follower
        self.move_id = world.split(at=20)
        world.run(self.move_id, State.READY)
        self.await_state(State.READY)
        self.mirroring = Mirroring(follower.config, follower.epochs)

    def await_state(self, state: State) -> None:
        self.follower.await_view(lambda v: self.move_id in v.moves and v.moves[self.move_id].state is state)

    def write(self, name: str, shard: str = "s1") -> None:
        with self.world.connect(shard) as application:
            application.execute("UPDATE tenants SET name = %s WHERE tenant_id = 20", (name,))

    def name(self, shard: str = "s2") -> str:
        return str(self.world.fetch(shard, NAME)[0][0])

    def done(self) -> None:
        self.mirroring.pass_after(self.move_id).result(PATIENCE_S)


@pytest.fixture
def parts(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    monkeypatch.setattr(mirroring, "WAIT_MS", int(PATIENCE_S * 1000))  # no pass fails because the machine is slow
    with following(world.config, confirm_s=0.8) as follower:
        made = Parts(world, follower)
        yield made
        made.mirroring.stop()


# --- catch-ups


def test_a_pass_after_a_commit_has_it_on_the_other_side(parts: Parts) -> None:
    for number in range(20):
        parts.write(f"n{number}")
        parts.done()
        assert parts.name() == f"n{number}"
    assert parts.mirroring.troubles == {}


def test_requests_that_come_together_are_answered_together(parts: Parts) -> None:
    passes: list[str] = []
    parts.done()
    with points.armed("catch_up.after_pass", passes.append):
        parts.write("x")
        asked = [parts.mirroring.pass_after(parts.move_id) for _ in range(200)]
        for future in asked:
            future.result(PATIENCE_S)
    assert parts.name() == "x"
    assert len(passes) < 200


def test_a_pass_that_began_before_the_commit_answers_nobody_who_asked_after_it(
    parts: Parts, mechanism: Mechanism
) -> None:
    """In the twin whoever asks is answered by the pass that is under way: its snapshot is older than the commit."""

    def take_later_too(self: mirroring._Carrier, asked: list[Any]) -> None:
        self._catch_up(must_be_empty=bool(asked))
        asked += self._waiting
        self._waiting.clear()
        for future in asked:
            future.set_result(None)

    mechanism.replace(mirroring._Carrier, "serve", take_later_too)
    under_way, go_on = threading.Event(), threading.Event()

    def wait(_: str) -> None:
        under_way.set()
        go_on.wait(PATIENCE_S)

    parts.done()
    damage: list[str] = []
    judged = threading.Event()

    def judge(_: object) -> None:
        damage.extend([parts.name()] if parts.name() != "later" else [])
        judged.set()

    with points.armed("catch_up.after_giver_snapshot", wait):
        first = parts.mirroring.pass_after(parts.move_id)
        assert under_way.wait(PATIENCE_S)
        parts.write("later")
        second = parts.mirroring.pass_after(parts.move_id)
        second.add_done_callback(judge)
        points.disarm("catch_up.after_giver_snapshot")
        go_on.set()
        first.result(PATIENCE_S)
        second.result(PATIENCE_S)
    assert judged.wait(PATIENCE_S)
    mechanism.judge(damage)


def test_a_commit_wakes_the_mirror(parts: Parts) -> None:
    parts.write("woken")
    parts.mirroring.wake(parts.move_id)
    until(lambda: parts.name() == "woken", "mirrored")


def test_more_than_one_pass_takes_is_carried_before_it_is_done(world: World) -> None:
    with following(world.config) as follower:
        parts = Parts(world, follower)
        object.__setattr__(follower.config.limits, "mirror_rows", 5)
        with world.connect("s1") as application:
            count = application.execute("UPDATE orders SET note = 'many' WHERE tenant_id >= 20").rowcount
        assert count > 50
        parts.done()
        assert world.fetch("s2", "SELECT count(*) FROM orders WHERE note = 'many'") == [(count,)]
        parts.mirroring.stop()


def test_after_a_cutover_it_mirrors_back(parts: Parts) -> None:
    parts.write("before")
    parts.done()
    parts.world.cut_over(parts.move_id)
    parts.await_state(State.SWITCHED)
    parts.write("after", "s2")
    parts.done()
    assert parts.name("s1") == "after"


def test_a_commit_just_before_the_cutover_is_done_also_where_the_router_has_not_heard_of_it(parts: Parts) -> None:
    parts.done()
    parts.follower.epochs._reading = None  # nothing is handed over from here on
    with points.armed(Effect.BEAT_ROUTER.before, _unreachable):
        view = parts.follower.epochs.view
        parts.write("last")
        parts.world.cut_over(parts.move_id)
        parts.follower.epochs.view = view
        parts.done()
        assert parts.name() == "last"


def _unreachable(point: str) -> None:
    raise Unreachable(point)


def test_what_is_not_mirrored_is_done_at_once(parts: Parts) -> None:
    parts.world.run(parts.move_id, State.COMPLETED)
    parts.follower.await_view(lambda v: not v.moves)
    parts.done()
    assert parts.mirroring.troubles == {}


def test_it_may_run_beside_every_other_mirror(parts: Parts) -> None:
    world, stop = parts.world, threading.Event()
    other = Mirroring(parts.follower.config, parts.follower.epochs)

    def mirror() -> None:
        with world.mirror(parts.move_id) as one:
            while not stop.is_set():
                one.catch_up()

    others = list(range(21, 40))
    with world.attended(), world.writers(rate=100.0, tenants=others, focus=others):
        join = in_background(mirror)
        for number in range(60):
            parts.write(f"n{number}")
            parts.mirroring.wake(parts.move_id)
            other.pass_after(parts.move_id).result(PATIENCE_S)
            assert parts.name() == f"n{number}"
        stop.set()
        join()
    other.stop()
    parts.write("Tenant 20")  # as the ledger knows it
    world.assert_nothing_lost()


# --- trouble


def test_a_failing_pass_fails_those_who_wait_and_the_next_one_goes_on(parts: Parts) -> None:
    def fail(_: str) -> None:
        raise Failed("somebody is in the way")

    parts.write("x")
    with points.armed("catch_up.after_receiver_lock", fail):
        with pytest.raises(Failed, match="in the way"):
            parts.done()
        assert parts.mirroring.troubles == {parts.move_id: "somebody is in the way"}
    until(lambda: parts.name() == "x", "tried again by itself")
    parts.done()
    assert parts.mirroring.troubles == {}


def test_catch_ups_that_fail_are_counted_for_the_gates(parts: Parts) -> None:
    with parts.world.hold(parts.move_id) as held:
        parts.world.catalog.set_phase(parts.move_id, 2, 3, lease_number=held.lease.number)
    parts.follower.await_phase(parts.move_id, 3)
    parts.done()
    with points.armed("catch_up.after_receiver_lock", _fail), pytest.raises(Failed):
        parts.done()
    until(lambda: parts.world.catalog.traffic(parts.move_id).failures > 0, "failures are told")
    assert parts.world.catalog.traffic(parts.move_id).passes > 0


def _fail(point: str) -> None:
    raise Failed(point)


def test_lost_connections_are_opened_anew(parts: Parts) -> None:
    parts.done()
    for shard in ("s1", "s2"):
        with psycopg.connect(parts.world.dsns[shard], autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE application_name = 'shardmove {parts.move_id}' AND datname = current_database()".encode()
            )
        parts.write(f"after {shard}")
        with pytest.raises(Unreachable):
            parts.done()
        parts.done()
        assert parts.name() == f"after {shard}"


def test_a_server_that_is_not_there_is_named_and_harms_nobody(parts: Parts) -> None:
    config = parts.follower.config
    object.__setattr__(config, "shards", {**config.shards, "s2": "host=127.0.0.1 port=1 dbname=x password=hunter2"})
    with pytest.raises(Unreachable) as caught:
        parts.done()
    assert "hunter2" not in str(caught.value)
    assert parts.move_id in parts.mirroring.troubles


def test_after_the_end_everything_fails_at_once(parts: Parts) -> None:
    parts.done()
    parts.mirroring.stop()
    with pytest.raises(Failed, match="ending"):
        parts.done()
    with pytest.raises(Failed, match="ending"):
        parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    parts.mirroring.wake(parts.move_id)
    until(lambda: all(helper.is_idle for helper in parts.mirroring._carriers.values()), "the threads have ended")


def test_threads_are_bounded_and_those_without_work_make_room(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirroring, "MOVES_MAX", 1)
    parts.done()
    with pytest.raises(Failed, match="under way here already"):
        parts.mirroring.pass_after("m99").result(PATIENCE_S)
    parts.mirroring._carriers[parts.move_id].stop()
    until(lambda: parts.mirroring._carriers[parts.move_id].is_idle, "the thread has ended")
    assert parts.mirroring.pass_after("m99").result(PATIENCE_S) is None


def test_a_thread_without_work_ends_and_the_next_request_starts_one(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirroring, "IDLE_S", 0.01)
    for number in range(5):
        parts.write(f"n{number}")
        parts.done()
        assert parts.name() == f"n{number}"
        until(lambda: parts.mirroring._carriers[parts.move_id].is_idle, "the thread has ended")


# --- attempts


class Died(BaseException):
    """Ends a coordinator where it stands: it settles nothing."""


@contextmanager
def dying_at(point: str) -> Iterator[None]:
    def die(_: str) -> None:
        raise Died

    with points.armed(point, die), pytest.raises(Died):
        yield


def accepts(world: World, shard: str) -> bool:
    with world.connect(shard) as application:
        try:
            application.execute("UPDATE tenants SET name = name WHERE tenant_id = 20")
        except psycopg.errors.SerializationFailure:
            return False
    return True


def test_a_flip_whose_coordinator_died_is_carried_out(parts: Parts) -> None:
    with dying_at(Effect.FLIP.after):
        parts.world.cut_over(parts.move_id)
    assert not accepts(parts.world, "s1")
    assert not accepts(parts.world, "s2")
    assert parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    assert accepts(parts.world, "s2")
    assert not accepts(parts.world, "s1")


def test_an_open_attempt_is_left_alone(parts: Parts) -> None:
    with dying_at(Effect.CLOSE.after):
        parts.world.cut_over(parts.move_id)
    assert not parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    move = parts.world.move(parts.move_id)
    assert parts.world.catalog.attempt(move.id, move.last_attempt).outcome is Outcome.OPEN
    assert not accepts(parts.world, "s1")
    parts.world.catalog.settle_attempt(move, move.last_attempt, "test")
    assert parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    assert accepts(parts.world, "s1")


def test_a_move_without_attempts_is_open(parts: Parts) -> None:
    assert parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    parts.world.cut_over(parts.move_id)
    for _ in range(3):
        assert parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    assert accepts(parts.world, "s2")


def test_openings_beside_a_coordinator_are_in_nobodys_way(parts: Parts) -> None:
    """But a coordinator ends whoever is within a transaction when it begins: that one is opened anew."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with suppress(Unreachable):
                parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)

    join = in_background(ask)
    for direction in (Direction.FORWARD, Direction.BACK, Direction.FORWARD):
        parts.world.cut_over(parts.move_id, direction)
    stop.set()
    join()
    assert accepts(parts.world, "s2")
    assert not accepts(parts.world, "s1")
    assert parts.mirroring.ensure_open(parts.move_id).result(PATIENCE_S)
    until(lambda: parts.mirroring.troubles == {}, "no trouble is left")
