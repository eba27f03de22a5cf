"""Leases and cutover attempts: who was overtaken changes nothing, and an attempt is decided exactly once."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from shardmove.catalog.leases import Lease
from shardmove.catalog.moves import NewMove
from shardmove.catalog.store import Catalog
from shardmove.config import parse
from shardmove.domain import points
from shardmove.domain.errors import (
    AttemptDecided,
    EpochConflict,
    IllegalTransition,
    LeaseHeld,
    LeaseLost,
    NotFound,
    Refused,
    ShardmoveError,
    Unreachable,
)
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Attempt, Direction, Outcome, State
from shardmove.domain.routes import Routes
from tests.support.twins import once

RANGE = KeyRange(0, 100)
CONFIG = parse(
    {
        "catalog": {"dsn": "dbname=catalog"},
        "shards": {name: {"dsn": f"dbname={name}"} for name in ("s1", "s2")},
        "keyspaces": {"shop": {"tables": {"orders": "tenant_id"}, "routes": [{"range": ":", "shard": "s1"}]}},
    }
)
TO_READY = (State.PENDING, State.INITIALIZING, State.COPYING, State.VERIFYING, State.READY)


@pytest.fixture
def dsn(databases: Any) -> str:
    return str(databases("cat")["cat"])


@pytest.fixture
def catalog(dsn: str) -> Iterator[Catalog]:
    """With the move m1 of 0:100 from s1 to s2, pending."""
    with Catalog.install(dsn, application_name="first") as catalog:
        catalog.apply(CONFIG)
        catalog.create_plan("move", "", [NewMove("shop", (RANGE,), "s1", "s2")])
        yield catalog


@pytest.fixture
def lease(catalog: Catalog) -> Iterator[Lease]:
    """Of the move, which is ready."""
    with catalog.acquire("m1", holder="first", ttl_s=60) as lease:
        for before, after in pairwise(TO_READY):
            catalog.transition("m1", before, after, lease_number=lease.number, detail={})
        yield lease


def routes(catalog: Catalog, shard: str, *, held: bool = False) -> tuple[Routes, int]:
    table = catalog.routes()
    return table["shop"].assign([RANGE], shard=shard, move_id="m1", held=held), table.epoch


def opened(catalog: Catalog, number: int, direction: Direction = Direction.FORWARD) -> Attempt:
    hold, base = routes(catalog, "s1" if direction is Direction.FORWARD else "s2", held=True)
    return catalog.open_attempt("m1", direction, lease_number=number, hold=hold, base_epoch=base)


def flip(catalog: Catalog, attempt: Attempt, number: int, *, base: int | None = None) -> int:
    forward = attempt.direction is Direction.FORWARD
    given, newest = routes(catalog, "s2" if forward else "s1")
    before, after = (State.READY, State.SWITCHED) if forward else (State.SWITCHED, State.READY)
    return catalog.flip(
        attempt,
        lease_number=number,
        before=before,
        after=after,
        routes=given,
        base_epoch=newest if base is None else base,
        detail={},
    )


def abandon(catalog: Catalog, attempt: Attempt) -> Outcome:
    back, base = routes(catalog, "s1")
    return catalog.abandon("m1", attempt.number, reason="a test", routes=back, base_epoch=base)


def picture(dsn: str) -> list[Any]:
    """All that a holder may change."""
    tables = ("cluster", "move", "attempt", "event", "route")
    with psycopg.connect(dsn) as connection:
        return [
            connection.execute(f"SELECT t::text FROM shardmove_catalog.{t} t ORDER BY 1").fetchall() for t in tables
        ]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.002)


def backend(dsn: str, application: str) -> int:
    with psycopg.connect(dsn) as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
        row = connection.execute(query, (application,)).fetchone()
        assert row is not None
        return int(row[0])


def until_blocked(dsn: str, application: str) -> int:
    pid = backend(dsn, application)
    with psycopg.connect(dsn, autocommit=True) as connection:
        query = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
        until(lambda: connection.execute(query, (pid,)).fetchone() == (True,), f"{application} waits")
    return pid


def terminate(dsn: str, pid: int) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))


@contextmanager
def publishers_wait(dsn: str) -> Iterator[None]:
    """Within the block every transaction that publishes stops where it takes the epoch."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT FROM shardmove_catalog.cluster FOR UPDATE")
        yield


# Leases


def test_a_lease_that_lives_is_not_given_to_another(catalog: Catalog, dsn: str) -> None:
    with catalog.acquire("m1", holder="run", ttl_s=60) as lease, Catalog.connect(dsn) as other:
        assert lease.number == 1
        with pytest.raises(LeaseHeld) as caught:
            other.acquire("m1", holder="serve", ttl_s=60)
        for named in ("m1", "run", socket.gethostname(), str(os.getpid()), "since 20"):
            assert named in str(caught.value)
        lease.beat()
        present = other.holder("m1")
        assert present is not None
        assert present.is_connected
        assert present.silent_s < 60


def test_a_lease_that_was_released_is_taken_at_once(catalog: Catalog) -> None:
    for number in (1, 2, 3):
        with catalog.acquire("m1", holder="run", ttl_s=60) as lease:
            assert lease.number == number
        assert catalog.holder("m1") is None
        assert not lease.lost.is_set()
    lease.release()


def test_who_stands_still_behind_giving_back_is_in_nobodys_way(catalog: Catalog) -> None:
    lease = catalog.acquire("m1", holder="run", ttl_s=60)
    taken: list[int] = []

    def take() -> None:
        with catalog.acquire("m1", holder="serve", ttl_s=60) as successor:
            taken.append(successor.number)

    with once("give_back.after", take):
        lease.release()
    assert taken == [2]


def test_a_holder_whose_connection_died_is_succeeded_at_once(catalog: Catalog, dsn: str) -> None:
    lease = catalog.acquire("m1", holder="run", ttl_s=3600)
    terminate(dsn, backend(dsn, "first lease m1"))
    with catalog.acquire("m1", holder="serve", ttl_s=3600) as successor:
        assert successor.number == 2
        with pytest.raises(LeaseLost):
            lease.beat()
        assert lease.lost.is_set()
        lease.release()
        successor.beat()


def test_a_silent_holder_has_its_backend_ended(catalog: Catalog, dsn: str) -> None:
    lease = catalog.acquire("m1", holder="run", ttl_s=3600)
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE shardmove_catalog.lease SET beat_at = beat_at - interval '1 minute'")
    with pytest.raises(LeaseHeld):
        catalog.acquire("m1", holder="serve", ttl_s=90)
    with catalog.acquire("m1", holder="serve", ttl_s=30) as successor:
        assert successor.number == 2
        with pytest.raises(LeaseLost):
            lease.beat()
        lease.release()


def test_a_lease_beats_by_itself_and_notices_that_it_is_lost(catalog: Catalog, dsn: str) -> None:
    query = "SELECT beat_at > acquired_at FROM shardmove_catalog.lease"
    with catalog.acquire("m1", holder="run", ttl_s=0.1) as lease, psycopg.connect(dsn, autocommit=True) as connection:
        until(lambda: connection.execute(query).fetchone() == (True,), "a beat")
        terminate(dsn, backend(dsn, "first lease m1"))
        assert lease.lost.wait(30)


def test_of_concurrent_takers_exactly_one_holds(catalog: Catalog, dsn: str) -> None:
    barrier = threading.Barrier(4)

    def take(worker: int) -> list[int]:
        numbers = []
        with Catalog.connect(dsn) as own:
            for _ in range(6):
                barrier.wait()
                try:
                    taken = own.acquire("m1", holder=f"worker {worker}", ttl_s=60)
                except LeaseHeld:
                    taken = None
                barrier.wait()
                if taken is not None:
                    numbers.append(taken.number)
                    taken.release()
        return numbers

    with ThreadPoolExecutor(4) as pool:
        numbers = [number for worker in pool.map(take, range(4)) for number in worker]
    assert sorted(numbers) == list(range(1, 7))


def acts_of_a_holder(catalog: Catalog, attempt: Attempt, number: int) -> dict[str, Callable[[], object]]:
    return {
        "transition": lambda: catalog.transition("m1", State.READY, State.ROLLING_BACK, lease_number=number, detail={}),
        "repeated transition": lambda: catalog.transition(
            "m1", State.VERIFYING, State.READY, lease_number=number, detail={}
        ),
        "open_attempt": lambda: opened(catalog, number),
        "flip": lambda: flip(catalog, attempt, number),
        "set_error": lambda: catalog.set_error("m1", "late", number),
        "set_stats": lambda: catalog.set_stats("m1", {"rows_copied": 0}, number),
        "set_identities": lambda: catalog.set_identities("m1", {}, number),
        "record_step": lambda: catalog.record_step("schema_created", "m1", number),
    }


@pytest.mark.parametrize(
    "act",
    [
        "transition",
        "repeated transition",
        "open_attempt",
        "flip",
        "set_error",
        "set_stats",
        "set_identities",
        "record_step",
    ],
)
def test_a_zombie_changes_nothing(catalog: Catalog, lease: Lease, dsn: str, act: str) -> None:
    attempt = opened(catalog, lease.number)
    terminate(dsn, backend(dsn, "first lease m1"))
    with Catalog.connect(dsn) as other, other.acquire("m1", holder="second", ttl_s=60):
        before = picture(dsn)
        with pytest.raises(LeaseLost, match="lease 1 is lost, its number is 2 now"):
            acts_of_a_holder(catalog, attempt, lease.number)[act]()
        with pytest.raises(LeaseLost):
            lease.beat()
        assert picture(dsn) == before


def test_a_zombie_overtaken_while_it_waits_for_the_row_changes_nothing(
    catalog: Catalog, lease: Lease, dsn: str
) -> None:
    attempt = opened(catalog, lease.number)
    with psycopg.connect(dsn) as overtaking, ThreadPoolExecutor(1) as pool:
        overtaking.execute("UPDATE shardmove_catalog.move SET lease_number = lease_number + 1")
        late = pool.submit(flip, catalog, attempt, lease.number)
        until_blocked(dsn, "first")
        overtaking.commit()
        with pytest.raises(LeaseLost):
            late.result()
    assert catalog.attempt("m1", 1).outcome is Outcome.OPEN
    assert catalog.move("m1").state is State.READY


def test_without_the_check_a_zombie_changes_the_state(catalog: Catalog, lease: Lease, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE shardmove_catalog.move SET lease_number = lease_number + 1")
        connection.execute("""
            CREATE OR REPLACE FUNCTION shardmove_catalog.lock_move(the_move text, the_lease bigint)
            RETURNS void LANGUAGE sql AS ''""")
    catalog.transition("m1", State.READY, State.ROLLING_BACK, lease_number=lease.number, detail={})
    assert catalog.move("m1").state is State.ROLLING_BACK


# Attempts


def test_a_cutover_there_and_back(catalog: Catalog, lease: Lease) -> None:
    attempt = opened(catalog, lease.number)
    assert attempt == Attempt("m1", 1, Direction.FORWARD, Outcome.OPEN)
    assert catalog.routes()["shop"].at(5).held
    assert catalog.open_attempts() == [attempt]
    epoch = flip(catalog, attempt, lease.number)
    assert catalog.routes().epoch == epoch
    assert (catalog.routes()["shop"].at(5).shard, catalog.routes()["shop"].at(5).held) == ("s2", False)
    assert catalog.move("m1").state is State.SWITCHED
    back = opened(catalog, lease.number, Direction.BACK)
    flip(catalog, back, lease.number)
    assert catalog.routes()["shop"].at(5).shard == "s1"
    assert catalog.move("m1").state is State.READY
    assert catalog.move("m1").last_attempt == 2
    catalog.record_stall("m1", 1, 7.5)
    records = catalog.attempts("m1")
    assert [record.attempt.outcome for record in records] == [Outcome.FLIPPED, Outcome.FLIPPED]
    assert [record.stall_ms for record in records] == [7.5, None]
    assert catalog.open_attempts() == []


def test_attempts_are_numbered_for_ever(catalog: Catalog, lease: Lease) -> None:
    for number in (1, 2, 3):
        attempt = opened(catalog, lease.number)
        assert attempt.number == number
        assert abandon(catalog, attempt) is Outcome.ABANDONED
        assert not catalog.routes()["shop"].at(5).held


def test_an_attempt_opens_only_where_it_can_end(catalog: Catalog, lease: Lease) -> None:
    with pytest.raises(IllegalTransition, match="begins in switched"):
        opened(catalog, lease.number, Direction.BACK)
    opened(catalog, lease.number)
    with pytest.raises(Refused, match="open attempt already"):
        opened(catalog, lease.number)
    assert catalog.move("m1").last_attempt == 1


def test_no_other_step_is_taken_while_an_attempt_is_open(catalog: Catalog, lease: Lease) -> None:
    attempt = opened(catalog, lease.number)
    with pytest.raises(Refused, match="attempt 1 is open"):
        catalog.transition("m1", State.READY, State.ROLLING_BACK, lease_number=lease.number, detail={})
    abandon(catalog, attempt)
    assert catalog.transition("m1", State.READY, State.ROLLING_BACK, lease_number=lease.number, detail={})


def test_an_epoch_that_moved_on_stops_open_flip_and_abandon(catalog: Catalog, lease: Lease, dsn: str) -> None:
    hold, base = routes(catalog, "s1", held=True)
    catalog.publish(hold, base=base, reason="somebody was faster")
    with pytest.raises(EpochConflict):
        catalog.open_attempt("m1", Direction.FORWARD, lease_number=lease.number, hold=hold, base_epoch=base)
    assert catalog.open_attempts() == []
    attempt = opened(catalog, lease.number)
    before = picture(dsn)
    with pytest.raises(EpochConflict):
        flip(catalog, attempt, lease.number, base=base)
    with pytest.raises(EpochConflict):
        catalog.abandon("m1", 1, reason="", routes=hold, base_epoch=base)
    assert picture(dsn) == before
    flip(catalog, attempt, lease.number)


def test_a_decided_attempt_stays_decided(catalog: Catalog, lease: Lease, dsn: str) -> None:
    flipped = opened(catalog, lease.number)
    flip(catalog, flipped, lease.number)
    before = picture(dsn)
    assert abandon(catalog, flipped) is Outcome.FLIPPED
    assert catalog.settle_attempt(catalog.move("m1"), 1, "a test") is Outcome.FLIPPED
    assert picture(dsn) == before
    abandoned = opened(catalog, lease.number, Direction.BACK)
    assert catalog.settle_attempt(catalog.move("m1"), 2, "a test") is Outcome.ABANDONED
    with pytest.raises(AttemptDecided, match="attempt 2 of move m1 is abandoned already"):
        flip(catalog, abandoned, lease.number)
    with psycopg.connect(dsn) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute("UPDATE shardmove_catalog.attempt SET outcome = 'open', decided_at = NULL")
    assert caught.value.diag.sqlstate == "SM003"


def test_an_attempt_is_never_continued_under_another_lease(catalog: Catalog, lease: Lease, dsn: str) -> None:
    attempt = opened(catalog, lease.number)
    lease.release()
    with catalog.acquire("m1", holder="second", ttl_s=60) as second:
        with pytest.raises(Refused, match="opened under lease 1"):
            flip(catalog, attempt, second.number)
        assert catalog.settle_attempt(catalog.move("m1"), 1, "taken over") is Outcome.ABANDONED


def test_a_flip_gives_the_whole_range_to_the_receiver(catalog: Catalog, lease: Lease, dsn: str) -> None:
    attempt = opened(catalog, lease.number)
    table = catalog.routes()
    part = table["shop"].assign([KeyRange(0, 99)], shard="s2", move_id="m1")
    before = picture(dsn)
    with pytest.raises(Refused, match="belongs to s1, not to s2"):
        catalog.flip(
            attempt,
            lease_number=lease.number,
            before=State.READY,
            after=State.SWITCHED,
            routes=part,
            base_epoch=table.epoch,
            detail={},
        )
    assert picture(dsn) == before


def test_what_does_not_exist_is_not_found(catalog: Catalog, lease: Lease) -> None:
    missing = Attempt("m1", 9, Direction.FORWARD, Outcome.OPEN)
    with pytest.raises(NotFound):
        flip(catalog, missing, lease.number)
    with pytest.raises(NotFound):
        abandon(catalog, missing)
    with pytest.raises(NotFound):
        catalog.attempt("m1", 9)
    with pytest.raises(NotFound):
        catalog.record_stall("m1", 9, 1.0)


def test_of_flip_and_abandon_exactly_one_wins(catalog: Catalog, lease: Lease, dsn: str, rng: random.Random) -> None:
    """Many rounds; whoever loses learns it, and routes, state and outcome always tell the same story.

    In the first two one of them waits for the other; in all others chance decides who is late, and by how little.
    """
    direction = Direction.FORWARD
    wins = {Outcome.FLIPPED: 0, Outcome.ABANDONED: 0}
    with Catalog.connect(dsn) as other, ThreadPoolExecutor(2) as pool:
        for number in range(80):
            attempt = opened(catalog, lease.number, direction)
            owner = catalog.routes()["shop"].at(5).shard
            move = catalog.move("m1")
            barrier = threading.Barrier(2)
            is_decided = threading.Event()
            head_starts = [[0.0, 60.0], [60.0, 0.0]][number] if number < 2 else [rng.random() * 0.002 for _ in range(2)]

            def late(
                head_start_s: float,
                act: Callable[[], Any],
                barrier: threading.Barrier = barrier,
                is_decided: threading.Event = is_decided,
            ) -> Any:
                barrier.wait()
                is_decided.wait(head_start_s)
                try:
                    return act()
                finally:
                    is_decided.set()

            def try_flip(attempt: Attempt = attempt) -> Outcome:
                while True:
                    try:
                        flip(catalog, attempt, lease.number)
                        return Outcome.FLIPPED
                    except EpochConflict:
                        continue
                    except AttemptDecided:
                        return Outcome.ABANDONED

            flipping = pool.submit(late, head_starts[0], try_flip)
            settling = pool.submit(
                late, head_starts[1], lambda m=move, a=attempt: other.settle_attempt(m, a.number, "")
            )
            outcome = flipping.result()
            assert settling.result() is outcome
            assert catalog.attempt("m1", attempt.number).outcome is outcome
            route = catalog.routes()["shop"].at(5)
            assert not route.held
            assert (route.shard == owner) == (outcome is Outcome.ABANDONED)
            wins[outcome] += 1
            if outcome is Outcome.FLIPPED:
                direction = Direction.BACK if direction is Direction.FORWARD else Direction.FORWARD
            owned_by_target = catalog.routes()["shop"].at(5).shard == "s2"
            assert catalog.move("m1").state is (State.SWITCHED if owned_by_target else State.READY)
    assert all(wins.values()), wins


def test_a_flip_whose_backend_dies_before_the_commit_is_settled_as_abandoned(
    catalog: Catalog, lease: Lease, dsn: str
) -> None:
    attempt = opened(catalog, lease.number)
    with publishers_wait(dsn), ThreadPoolExecutor(1) as pool:
        doubtful = pool.submit(flip, catalog, attempt, lease.number)
        terminate(dsn, until_blocked(dsn, "first"))
        with pytest.raises(Unreachable):
            doubtful.result()
    assert catalog.settle_attempt(catalog.move("m1"), 1, "in doubt") is Outcome.ABANDONED
    assert catalog.routes()["shop"].at(5).shard == "s1"
    assert catalog.move("m1").state is State.READY


def test_a_flip_whose_answer_is_lost_is_settled_by_what_its_commit_did(
    catalog: Catalog, lease: Lease, dsn: str
) -> None:
    """The client's socket dies while the server still works on the flip: settling waits for it, and says flipped."""
    attempt = opened(catalog, lease.number)
    move = catalog.move("m1")
    catalog._connection.execute("SET client_connection_check_interval = 0")  # while it waits it would notice
    with Catalog.connect(dsn, application_name="second") as other, ThreadPoolExecutor(2) as pool:
        with publishers_wait(dsn):
            doubtful = pool.submit(flip, catalog, attempt, lease.number)
            until_blocked(dsn, "first")
            with socket.socket(fileno=os.dup(catalog._connection.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            with pytest.raises(Unreachable):
                doubtful.result()
            settling = pool.submit(other.settle_attempt, move, 1, "in doubt")
            until_blocked(dsn, "second")
        assert settling.result() is Outcome.FLIPPED
    assert catalog.routes()["shop"].at(5).shard == "s2"
    assert catalog.move("m1").state is State.SWITCHED


@pytest.mark.parametrize("step", ["open_attempt", "flip", "abandon", "transition"])
def test_a_step_stopped_before_its_effect_has_none_and_after_it_all(
    catalog: Catalog, lease: Lease, dsn: str, step: str
) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str) -> None:
        raise Stopped(name)

    attempt = opened(catalog, lease.number) if step in ("flip", "abandon") else None
    acts: dict[str, Callable[[], object]] = {
        "open_attempt": lambda: opened(catalog, lease.number),
        "flip": lambda: attempt and flip(catalog, attempt, lease.number),
        "abandon": lambda: attempt and abandon(catalog, attempt),
        "transition": lambda: catalog.transition(
            "m1", State.READY, State.ROLLING_BACK, lease_number=lease.number, detail={}
        ),
    }
    before = picture(dsn)
    with points.armed(f"{step}.before", stop), pytest.raises(Stopped):
        acts[step]()
    assert picture(dsn) == before
    with points.armed(f"{step}.after", stop), pytest.raises(Stopped):
        acts[step]()
    assert picture(dsn) != before


def test_a_connection_that_died_is_replaced_at_the_next_call(catalog: Catalog, dsn: str) -> None:
    terminate(dsn, backend(dsn, "first"))
    with pytest.raises(Unreachable):
        catalog.routes()
    assert catalog.routes().epoch == 1
    catalog.close()
    with pytest.raises(ShardmoveError):
        catalog.routes()
