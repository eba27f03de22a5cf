"""Plans, moves and their marks; events."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import psycopg
import pytest

from shardmove.catalog.leases import Lease
from shardmove.catalog.moves import NewMove
from shardmove.catalog.store import Catalog
from shardmove.config import parse
from shardmove.domain.errors import (
    ConfigurationError,
    EpochConflict,
    IllegalTransition,
    LeaseLost,
    NotFound,
    Refused,
)
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import TRANSITIONS, ServerIdentity, State

TABLES = {"tables": {"orders": "tenant_id"}, "routes": [{"range": ":", "shard": "s1"}]}
CONFIG = parse(
    {
        "catalog": {"dsn": "dbname=catalog"},
        "shards": {name: {"dsn": f"dbname={name}"} for name in ("s1", "s2", "s3")},
        "keyspaces": {"shop": TABLES, "log": TABLES},
    }
)


@pytest.fixture
def dsn(databases: Any) -> str:
    return str(databases("cat")["cat"])


@pytest.fixture
def catalog(dsn: str) -> Iterator[Catalog]:
    with Catalog.install(dsn) as catalog:
        catalog.apply(CONFIG)
        yield catalog


@pytest.fixture
def lease(catalog: Catalog) -> Iterator[Lease]:
    catalog.create_plan("move", "", [new(0, 100)])
    with catalog.acquire("m1", holder="test", ttl_s=60) as lease:
        yield lease


def new(lower: int | None, upper: int | None, *, keyspace: str = "shop", target: str = "s2") -> NewMove:
    return NewMove(keyspace, (KeyRange(lower, upper),), "s1", target)


def test_a_plan_and_its_moves_are_as_they_were_asked_for(catalog: Catalog) -> None:
    two = NewMove("shop", (KeyRange(50, 60), KeyRange(-5, 7)), "s1", "s3")
    plan = catalog.create_plan("split", "two of them", [new(100, None), two])
    assert (plan.id, plan.kind, plan.description, plan.move_ids) == ("p1", "split", "two of them", ("m1", "m2"))
    assert catalog.plan("p1") == plan
    assert catalog.plans() == [plan]
    moves = catalog.moves(plan_id="p1")
    assert [move.id for move in moves] == ["m1", "m2"]
    assert moves[1].ranges == (KeyRange(-5, 7), KeyRange(50, 60))
    assert moves[1].keyspace == CONFIG.keyspace("shop")
    assert (moves[1].source, moves[1].target, moves[1].state) == ("s1", "s3", State.PENDING)
    assert (moves[1].lease_number, moves[1].last_attempt, moves[1].paused, moves[1].error) == (0, 0, False, None)


def test_either_kind_of_id_is_resolved(catalog: Catalog) -> None:
    catalog.create_plan("split", "", [new(0, 10), new(10, 20)])
    assert [move.id for move in catalog.resolve("p1")] == ["m1", "m2"]
    assert [move.id for move in catalog.resolve("m2")] == ["m2"]
    with pytest.raises(NotFound) as caught:
        catalog.resolve("m3")
    assert caught.value.hint is not None
    assert "m2" in caught.value.hint
    with pytest.raises(NotFound):
        catalog.move("p1")
    with pytest.raises(NotFound):
        catalog.plan("m1")


@pytest.mark.parametrize(("lower", "upper"), [(0, 100), (-9, 1), (99, None), (None, None), (None, 1), (5, 6), (9, 10)])
def test_a_range_is_in_one_unfinished_move_at_most(catalog: Catalog, lower: int | None, upper: int | None) -> None:
    catalog.create_plan("move", "", [new(0, 100)])
    with pytest.raises(Refused, match="overlaps 0:100 of the unfinished move m1"):
        catalog.create_plan("move", "", [new(200, 300), new(lower, upper, target="s3")])
    assert [move.id for move in catalog.moves()] == ["m1"]
    assert len(catalog.plans()) == 1


@pytest.mark.parametrize(("lower", "upper"), [(100, 200), (None, 0), (-10, -9), (1000, None)])
def test_ranges_that_touch_or_lie_apart_may_move_together(
    catalog: Catalog, lower: int | None, upper: int | None
) -> None:
    catalog.create_plan("move", "", [new(0, 100)])
    catalog.create_plan("move", "", [new(lower, upper)])
    catalog.create_plan("move", "", [new(lower, upper, keyspace="log")])


def test_overlapping_ranges_within_one_plan_are_refused(catalog: Catalog) -> None:
    with pytest.raises(Refused, match="overlaps"):
        catalog.create_plan("split", "", [new(0, 10), new(9, 20)])
    with pytest.raises(Refused, match="overlaps"):
        catalog.create_plan("split", "", [NewMove("shop", (KeyRange(0, 5), KeyRange(4, 6)), "s1", "s2")])


def test_of_concurrent_plans_for_one_range_exactly_one_is_made(catalog: Catalog, dsn: str) -> None:
    barrier = threading.Barrier(4)

    def plan(worker: int) -> int:
        made = 0
        with Catalog.connect(dsn) as own:
            for start in range(0, 100, 10):
                barrier.wait()
                try:
                    own.create_plan("move", "", [new(start - worker, start + 1)])
                    made += 1
                except Refused:
                    pass
        return made

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(plan, range(4))) == 10


def test_plain_sql_cannot_overlap_an_unfinished_move(catalog: Catalog, dsn: str) -> None:
    catalog.create_plan("move", "", [new(0, 10), new(50, 60)])
    with psycopg.connect(dsn) as connection:
        with pytest.raises(psycopg.Error) as caught:
            connection.execute("INSERT INTO shardmove_catalog.move_range VALUES ('m2', '9', '12')")
        assert caught.value.diag.sqlstate == "SM006"
        connection.rollback()
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with pytest.raises(psycopg.Error, match="READ COMMITTED"):
            connection.execute("INSERT INTO shardmove_catalog.move_range VALUES ('m2', '70', '80')")


def test_without_the_guard_a_range_is_in_two_moves(catalog: Catalog, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("ALTER TABLE shardmove_catalog.move_range DISABLE TRIGGER guard")
    catalog.create_plan("move", "", [new(0, 10)])
    catalog.create_plan("move", "", [new(5, 10)])


def test_a_range_that_is_not_its_sources_is_refused(catalog: Catalog) -> None:
    catalog.change_routes("shop", lambda routes: routes.assign([KeyRange(5, 6)], shard="s3"), "a test")
    with pytest.raises(Refused, match="belongs to s3, not to s1"):
        catalog.create_plan("move", "", [new(0, 10)])
    assert catalog.moves() == []


def test_a_plan_names_what_is_known(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match="s9"):
        catalog.create_plan("move", "", [new(0, 10, target="s9")])
    with pytest.raises(NotFound, match="shp"):
        catalog.create_plan("move", "", [new(0, 10, keyspace="shp")])
    with pytest.raises(ConfigurationError, match="both s1"):
        catalog.create_plan("move", "", [new(0, 10, target="s1")])
    with pytest.raises(ConfigurationError):
        catalog.create_plan("move", "", [])


def go(catalog: Catalog, lease: Lease, before: State, after: State) -> bool:
    return catalog.transition("m1", before, after, lease_number=lease.number, detail={"why": "test"})


def test_a_transition_writes_its_event_and_may_be_repeated(catalog: Catalog, lease: Lease) -> None:
    catalog.set_error("m1", "it went wrong", lease.number)
    assert go(catalog, lease, State.PENDING, State.INITIALIZING)
    assert not go(catalog, lease, State.PENDING, State.INITIALIZING)
    move = catalog.move("m1")
    assert (move.state, move.error) == (State.INITIALIZING, None)
    written = [event for event in catalog.events("m1") if event.kind == "state_changed"]
    assert [event.detail for event in written] == [{"before": "pending", "after": "initializing", "why": "test"}]
    assert written[0].plan_id == "p1"


def test_no_edge_outside_the_table_is_taken(catalog: Catalog, lease: Lease) -> None:
    for before in State:
        for after in set(State) - TRANSITIONS[before]:
            with pytest.raises(IllegalTransition):
                go(catalog, lease, before, after)
    assert catalog.move("m1").state is State.PENDING


def test_an_edge_from_a_state_that_the_move_is_not_in_is_refused(catalog: Catalog, lease: Lease) -> None:
    with pytest.raises(IllegalTransition, match="m1 is pending, not copying"):
        go(catalog, lease, State.COPYING, State.VERIFYING)
    assert catalog.move("m1").state is State.PENDING


def test_the_owner_never_changes_by_a_plain_transition(catalog: Catalog, lease: Lease) -> None:
    for before, after in ((State.READY, State.SWITCHED), (State.SWITCHED, State.READY)):
        with pytest.raises(IllegalTransition, match="flip only"):
            go(catalog, lease, before, after)


def test_a_move_that_nobody_made_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound):
        catalog.transition("m9", State.PENDING, State.INITIALIZING, lease_number=1, detail={})
    with pytest.raises(NotFound):
        catalog.acquire("m9", holder="test", ttl_s=60)
    with pytest.raises(NotFound):
        catalog.set_paused("m9", True)


def test_state_and_routes_change_together_or_not_at_all(catalog: Catalog, lease: Lease) -> None:
    marked = catalog.routes()["shop"].assign([KeyRange(0, 100)], shard="s1", move_id="m1")
    step = (State.PENDING, State.INITIALIZING)
    with pytest.raises(EpochConflict):
        catalog.transition("m1", *step, lease_number=lease.number, detail={}, routes=(marked, 0))
    assert catalog.move("m1").state is State.PENDING
    with pytest.raises(LeaseLost):
        catalog.transition("m1", *step, lease_number=lease.number - 1, detail={}, routes=(marked, 1))
    assert catalog.routes().epoch == 1
    assert catalog.transition("m1", *step, lease_number=lease.number, detail={}, routes=(marked, 1))
    assert not catalog.transition("m1", *step, lease_number=lease.number, detail={}, routes=(marked, 1))
    assert catalog.routes().epoch == 2
    assert catalog.routes()["shop"].at(5).move_id == "m1"


def test_a_finished_move_stays_finished_and_frees_its_range(catalog: Catalog, lease: Lease, dsn: str) -> None:
    go(catalog, lease, State.PENDING, State.ROLLING_BACK)
    go(catalog, lease, State.ROLLING_BACK, State.ROLLED_BACK)
    assert catalog.moves(unfinished_only=True) == []
    catalog.create_plan("move", "", [new(0, 100)])
    with psycopg.connect(dsn) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute("UPDATE shardmove_catalog.move SET state = 'pending' WHERE id = 'm1'")
    assert caught.value.diag.sqlstate == "SM006"


def test_marks_are_kept_beside_the_state(catalog: Catalog, lease: Lease) -> None:
    identities = {"s1": ServerIdentity("7361", 1), "s2": ServerIdentity("7362", 3)}
    catalog.set_identities("m1", identities, lease.number)
    catalog.set_stats("m1", {"rows_copied": 5, "bytes_copied": 10}, lease.number)
    catalog.set_stats("m1", {"rows_copied": 6}, lease.number)
    catalog.set_error("m1", "it went wrong", lease.number)
    for _ in range(2):
        catalog.set_paused("m1", True)
    move = catalog.move("m1")
    assert move.identities == identities
    assert (move.paused, move.error, move.state) == (True, "it went wrong", State.PENDING)
    assert catalog.stats("m1") == {"rows_copied": 6, "bytes_copied": 10}
    catalog.set_paused("m1", False)
    assert [event.kind for event in catalog.events("m1")] == ["error", "paused", "resumed"]


@pytest.mark.parametrize("was_paused", [False, True])
def test_nobody_marks_a_finished_move(catalog: Catalog, lease: Lease, was_paused: bool) -> None:
    """A `pause`, or a `resume`, that was stopped before its effect wakes up after the move's end."""
    catalog.set_paused("m1", was_paused)
    go(catalog, lease, State.PENDING, State.ROLLING_BACK)
    go(catalog, lease, State.ROLLING_BACK, State.ROLLED_BACK)
    before = catalog.events("m1")
    catalog.set_paused("m1", not was_paused)
    assert catalog.move("m1").paused is was_paused
    assert catalog.events("m1") == before


def test_events_are_read_in_pieces(catalog: Catalog) -> None:
    last = catalog.events()[-1].id
    for n in range(5):
        catalog.record("step", "m1" if n % 2 else None, number=n)
    piece = catalog.events(after_id=last, limit=3)
    assert [event.detail["number"] for event in piece] == [0, 1, 2]
    assert [event.detail["number"] for event in catalog.events(after_id=piece[-1].id)] == [3, 4]
    assert [event.detail["number"] for event in catalog.events("m1")] == [1, 3]


def test_a_follower_sees_every_event_of_concurrent_writers_once_and_in_order(catalog: Catalog, dsn: str) -> None:
    last = catalog.events()[-1].id

    def write(worker: int) -> None:
        with Catalog.connect(dsn) as own:
            for n in range(50):
                own.record("step", number=n, worker=worker)

    with ThreadPoolExecutor(4) as pool:
        follower = pool.submit(lambda: list(islice(catalog.follow(after_id=last, poll_s=300), 150)))
        list(pool.map(write, range(3)))
        seen = follower.result(timeout=200)
    assert [event.id for event in seen] == sorted({event.id for event in seen})
    assert {(event.detail["worker"], event.detail["number"]) for event in seen} == {
        (worker, n) for worker in range(3) for n in range(50)
    }
