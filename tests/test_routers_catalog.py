"""Routers and traffic phases in the catalog: conditions that hold whoever calls, and in whatever order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from shardmove.catalog.moves import NewMove
from shardmove.catalog.routes import retried
from shardmove.catalog.session import connect
from shardmove.catalog.store import Catalog
from shardmove.catalog.upgrade import HOOKS, upgrade
from shardmove.config import Config, parse
from shardmove.domain.errors import IllegalTransition, LeaseLost, NotFound, Refused
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Attempt, Direction, State
from shardmove.domain.routes import Routes, RouteTable
from tests.support.followers import until
from tests.support.servers import Databases
from tests.support.world import in_background

CONFIG: Config = parse(
    {
        "catalog": {"dsn": "dbname=catalog"},
        "shards": {"s1": {"dsn": "dbname=one"}, "s2": {"dsn": "dbname=two"}},
        "keyspaces": {"shop": {"tables": {"orders": "tenant_id"}, "routes": [{"range": ":", "shard": "s1"}]}},
    }
)
TO_READY = (State.PENDING, State.INITIALIZING, State.COPYING, State.VERIFYING, State.READY)


class Site:
    """A catalog with one move, and what an outsider says to its database."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.catalog = Catalog.install(dsn)
        self.catalog.apply(CONFIG)
        self.move_id = self.plan()
        self.lease = 1

    def plan(self, lower: int = 0) -> str:
        ranges = (KeyRange(lower, lower + 10),)
        return self.catalog.create_plan("move", "", [NewMove("shop", ranges, "s1", "s2")]).move_ids[0]

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def go(self, *states: State) -> None:
        """Through these states, as the holder of the lease."""
        self.execute("UPDATE shardmove_catalog.move SET lease_number = 1 WHERE lease_number < 1")
        for before, after in pairwise(states):
            self.catalog.transition(self.move_id, before, after, lease_number=1, detail={})

    def set_phase(self, before: int, after: int, **options: Any) -> int:
        return self.catalog.set_phase(self.move_id, before, after, lease_number=self.lease, **options)

    def phase(self) -> int:
        return self.catalog.traffic(self.move_id).phase

    def beat(self, name: str, *, acknowledged: int = 0, silent_s: float = 0.0, confirm_s: float = 3.0) -> None:
        self.catalog.beat_router(name, name, "here", 1, confirm_s, acknowledged)
        self.execute(
            "UPDATE shardmove_catalog.router SET beat_at = beat_at - make_interval(secs => %s) WHERE id = %s",
            silent_s,
            name,
        )

    def kinds(self) -> list[str]:
        return [event.kind for event in self.catalog.events(self.move_id)]

    def flip(self, direction: Direction = Direction.FORWARD) -> None:
        before, after = (State.READY, State.SWITCHED)[:: 1 if direction is Direction.FORWARD else -1]
        move = self.catalog.move(self.move_id)

        def routes(table: RouteTable, owner: str, *, held: bool) -> Routes:
            return table["shop"].assign(move.ranges, shard=owner, move_id=move.id, held=held)

        def open_attempt() -> Attempt:
            table = self.catalog.routes()
            hold = routes(table, move.giver(direction), held=True)
            return self.catalog.open_attempt(move.id, direction, lease_number=1, hold=hold, base_epoch=table.epoch)

        attempt = retried(open_attempt)

        def flip() -> None:
            table = self.catalog.routes()
            self.catalog.flip(
                attempt,
                lease_number=1,
                before=before,
                after=after,
                routes=routes(table, move.receiver(direction), held=False),
                base_epoch=table.epoch,
                detail={},
            )

        retried(flip)


@pytest.fixture
def site(databases: Databases) -> Iterator[Site]:
    made = Site(databases("cat")["cat"])
    yield made
    made.catalog.close()


@pytest.fixture
def ready(site: Site) -> Site:
    site.go(*TO_READY)
    return site


# --- routers


def test_only_those_that_live_and_have_not_acknowledged_are_late(site: Site) -> None:
    site.beat("slow", confirm_s=60)
    site.beat("done", acknowledged=1, confirm_s=60)
    site.beat("almost", silent_s=40, confirm_s=60)
    site.beat("dead", silent_s=76, confirm_s=60)
    site.beat("patient", silent_s=300, confirm_s=600)
    assert [each.name for each in site.catalog.late_routers(1)] == ["almost", "patient", "slow"]
    assert {each.name: each.is_live for each in site.catalog.routers()} == {
        "slow": True, "done": True, "almost": True, "dead": False, "patient": True,
    }  # fmt: skip
    site.catalog.acknowledge("slow", 1)
    site.catalog.forget_router("patient")
    assert [each.name for each in site.catalog.late_routers(1)] == ["almost"]


def test_without_routers_nobody_is_waited_for(site: Site) -> None:
    assert site.catalog.await_acknowledgements(10**9, 3600.0) == []


def test_one_that_is_silent_for_ten_minutes_is_forgotten_by_the_next_beat_of_another(site: Site) -> None:
    site.beat("gone", silent_s=601)
    assert site.catalog.routers() == []
    site.beat("other")
    assert site.execute("SELECT id FROM shardmove_catalog.router") == [("other",)]


def test_a_beat_keeps_what_was_acknowledged(site: Site) -> None:
    site.beat("r1")
    site.catalog.acknowledge("r1", 7)
    site.beat("r1", acknowledged=3)
    assert [each.acknowledged for each in site.catalog.routers()] == [7]


def test_what_was_acknowledged_of_a_lost_epoch_is_nothing_that_was_published_since(site: Site) -> None:
    site.beat("r1", acknowledged=50)
    assert [each.acknowledged for each in site.catalog.routers()] == [site.catalog.routes().epoch]


def test_one_that_lags_behind_an_old_epoch_is_told_from_one_that_has_just_not_heard(ready: Site) -> None:
    newest = ready.catalog.routes().epoch
    ready.beat("lags", acknowledged=newest, confirm_s=LAG_S)
    ready.set_phase(2, 3)
    ready.beat("slow", acknowledged=newest, confirm_s=3600)
    until(lambda: _beaten(ready, "lags") == ["lags"], "the epoch is old by its measure")


LAG_S = 1.0
"""Longer than it takes from the beat to the look."""


def _beaten(site: Site, name: str) -> list[str]:
    site.beat(name, confirm_s=LAG_S)
    return [each.name for each in site.catalog.lagging_routers()]


# --- phases


def test_the_phase_follows_the_state_by_itself(site: Site) -> None:
    assert site.phase() == 1
    for before, after, phase in (
        (State.PENDING, State.INITIALIZING, 1),
        (State.INITIALIZING, State.COPYING, 2),
        (State.COPYING, State.VERIFYING, 2),
        (State.VERIFYING, State.READY, 2),
    ):
        site.go(before, after)
        assert site.phase() == phase
    site.flip()
    assert site.phase() == 5
    site.flip(Direction.BACK)
    assert site.phase() == 2
    site.go(State.READY, State.ROLLING_BACK)
    assert site.phase() == 1


def test_any_of_two_three_and_four_is_one_change_of_the_route_table(ready: Site) -> None:
    for before, after in ((2, 3), (3, 4), (4, 2), (2, 4), (4, 3), (3, 2)):
        epoch = ready.catalog.routes().epoch
        share = 0.25 if after == 4 else 0.0
        assert ready.set_phase(before, after, read_share=share, detail={"why": "test"}) == epoch + 1
        assert ready.catalog.routes().epoch == epoch + 1
        event = ready.catalog.events(ready.move_id)[-1]
        assert event.kind == "phase_changed"
        expected = {"before": before, "after": after, "read_share": share, "epoch": epoch + 1, "why": "test"}
        assert event.detail.items() >= expected.items()
    assert ready.catalog.traffic(ready.move_id).number == 6


def test_a_change_of_phase_keeps_the_routes(ready: Site) -> None:
    before = ready.catalog.routes()
    ready.set_phase(2, 3)
    assert ready.catalog.routes().keyspaces == before.keyspaces


def test_a_phase_is_set_while_the_move_is_ready_and_by_who_holds_it(site: Site) -> None:
    site.go(*TO_READY[:-1])
    with pytest.raises(IllegalTransition, match="verifying"):
        site.set_phase(2, 3)
    site.go(State.VERIFYING, State.READY)
    with pytest.raises(IllegalTransition, match="in phase 2, not 3"):
        site.set_phase(3, 4)
    site.lease = 0
    with pytest.raises(LeaseLost):
        site.set_phase(2, 3)
    site.lease = 1
    with pytest.raises(NotFound):
        site.catalog.set_phase("m99", 2, 3, lease_number=1)
    table = site.catalog.routes()
    site.catalog.open_attempt(
        site.move_id, Direction.FORWARD, lease_number=1, hold=table["shop"], base_epoch=table.epoch
    )
    with pytest.raises(Refused, match="open cutover attempt"):
        site.set_phase(2, 3)
    assert "phase_changed" not in site.kinds()
    assert site.catalog.routes().epoch == table.epoch + 1


def test_a_flip_takes_the_phase_along_and_the_way_back_begins_at_two(ready: Site) -> None:
    ready.set_phase(2, 4, read_share=1.0)
    ready.flip()
    assert ready.phase() == 5
    ready.flip(Direction.BACK)
    traffic = ready.catalog.traffic(ready.move_id)
    assert (traffic.phase, traffic.read_share) == (2, 0.0)


@pytest.mark.parametrize("after", [State.VERIFYING, State.ROLLING_BACK])
def test_who_leaves_ready_without_an_epoch_of_its_own_gets_one_to_acknowledge(ready: Site, after: State) -> None:
    ready.set_phase(2, 4, read_share=1.0)
    epoch = ready.catalog.routes().epoch
    ready.go(State.READY, after)
    assert ready.catalog.routes().epoch == epoch + 1
    assert ready.phase() == (2 if after is State.VERIFYING else 1)


def test_a_move_without_phases_gets_no_epochs_for_them(ready: Site) -> None:
    epoch = ready.catalog.routes().epoch
    ready.go(State.READY, State.VERIFYING, State.READY, State.ROLLING_BACK)
    assert ready.catalog.routes().epoch == epoch


def test_of_fallers_back_one_wins_and_a_late_one_changes_nothing(ready: Site) -> None:
    ready.set_phase(2, 4, read_share=1.0, sample_rate=0.5)
    number = ready.catalog.traffic(ready.move_id).number
    assert ready.catalog.fall_back(ready.move_id, number, "r1", "silent")
    assert not ready.catalog.fall_back(ready.move_id, number, "r2", "silent")
    assert (ready.phase(), ready.kinds().count("phase_fell_back")) == (3, 1)
    ready.set_phase(3, 4, read_share=1.0)
    assert not ready.catalog.fall_back(ready.move_id, number, "r3", "woke up late")
    assert ready.phase() == 4


def test_twin_without_the_number_a_late_one_undoes_what_an_operator_set_since(ready: Site) -> None:
    ready.set_phase(2, 4, read_share=1.0)
    number = ready.catalog.traffic(ready.move_id).number
    ready.set_phase(4, 3)
    ready.set_phase(3, 4, read_share=1.0)
    (source,) = ready.execute("SELECT pg_get_functiondef('shardmove_catalog.fall_back'::regproc)")[0]
    assert "AND number = the_number" in source
    ready.execute(source.replace("AND number = the_number", ""))
    ready.catalog.fall_back(ready.move_id, number, "r1", "woke up late")
    assert ready.phase() == 3


def test_falling_back_beside_changes_of_the_operator_ends_in_one_of_both(ready: Site) -> None:
    """Locks in one order: nobody meets a deadlock, and every epoch has one reason."""
    began = ready.catalog.routes().epoch
    changes = 0
    ready.set_phase(2, 4, read_share=1.0)

    def fall() -> None:
        with Catalog.connect(ready.dsn) as catalog:
            for _ in range(60):
                catalog.fall_back(ready.move_id, catalog.traffic(ready.move_id).number, "r1", "test")

    def beat() -> None:
        with Catalog.connect(ready.dsn) as catalog:
            for _ in range(60):
                catalog.beat_router("r1", "r1", "here", 1, 3.0, 0)
                catalog.acknowledge("r1", catalog.routes().epoch)

    joins = [in_background(fall), in_background(fall), in_background(beat)]
    for _ in range(40):
        before = ready.phase()
        try:
            ready.set_phase(before, 4, read_share=1.0)
        except IllegalTransition:
            continue
        changes += 1
    for join in joins:
        join()
    fell = ready.kinds().count("phase_fell_back")
    assert fell > 0
    assert ready.catalog.routes().epoch == began + 1 + changes + fell


def test_flips_and_fallers_back_take_their_locks_in_one_order(ready: Site) -> None:
    """A flip that met a deadlock would be given up, with writes waiting."""
    stop = threading.Event()

    def fall() -> None:
        with Catalog.connect(ready.dsn) as catalog:
            while not stop.is_set():
                catalog.fall_back(ready.move_id, catalog.traffic(ready.move_id).number, "r1", "test")

    joins = [in_background(fall), in_background(fall)]
    for _ in range(15):
        ready.set_phase(2, 4, read_share=1.0)
        ready.flip()
        ready.flip(Direction.BACK)
    stop.set()
    for join in joins:
        join()
    assert ready.phase() == 2


# --- commits that are mirrored first


def left_s(site: Site) -> float | None:
    return site.catalog.reading().mirror_left_s.get(site.move_id)


def test_commits_are_mirrored_first_until_every_live_router_has_heard(ready: Site) -> None:
    for name in ("r1", "r2"):
        ready.beat(name, acknowledged=ready.set_phase(ready.phase(), 4, read_share=0.5), confirm_s=60)
    assert left_s(ready) is None
    epoch = ready.set_phase(4, 3)
    assert 20 < (left_s(ready) or 0) <= 75
    ready.catalog.acknowledge("r1", epoch)
    assert left_s(ready) is not None
    ready.beat("r2", silent_s=76, confirm_s=60)  # dead: the next beat of the other one lets it go
    ready.beat("r1", confirm_s=60)
    assert left_s(ready) is None


def test_a_share_of_nobody_needs_nothing_of_that(ready: Site) -> None:
    ready.beat("r1")
    ready.set_phase(2, 4)
    ready.set_phase(4, 3)
    assert left_s(ready) is None


# --- what routers report


def test_counts_of_another_phase_are_dropped(ready: Site) -> None:
    ready.set_phase(2, 3, sample_rate=0.5)
    number = ready.catalog.traffic(ready.move_id).number
    ready.catalog.report_traffic(ready.move_id, number, compared=10, differing=1, passes=4, failures=2)
    ready.catalog.report_traffic(ready.move_id, number - 1, compared=1000)
    traffic = ready.catalog.traffic(ready.move_id)
    assert (traffic.compared, traffic.differing, traffic.passes, traffic.failures) == (10, 1, 4, 2)
    ready.set_phase(3, 3, sample_rate=0.9)
    assert ready.catalog.traffic(ready.move_id).compared == 10
    ready.set_phase(3, 2)
    assert ready.catalog.traffic(ready.move_id).compared == 0


def test_a_bounded_number_of_differences_is_kept_per_move_and_each_is_bounded(ready: Site) -> None:
    other = ready.plan(20)
    ready.catalog.record_difference(
        other, router="r1", table="orders", key="k", source_rows="s" * 200_000, target_rows=""
    )
    with psycopg.connect(ready.dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT shardmove_catalog.record_difference(%s, 'r1', 'orders', n::text, 'a', 'b')"
            " FROM generate_series(1, 1005) n",
            (ready.move_id,),
        )
    ready.catalog.record_difference(
        ready.move_id, router="r1", table="orders", key="last", source_rows="(1)", target_rows=""
    )
    kept = ready.catalog.differences(ready.move_id)
    assert (len(kept), kept[-1].key, kept[0].key) == (1000, "last", "7")
    assert [len(each.source_rows) for each in ready.catalog.differences(other)] == [100_000]


# --- from the release before


def test_a_catalog_of_the_former_layout_is_brought_up_to_date_with_its_moves(databases: Databases) -> None:
    dsn = databases("cat")["cat"]
    with connect(dsn, application_name="test") as connection:
        assert upgrade(connection, HOOKS[:2]) == [1, 2]
    with psycopg.connect(dsn, autocommit=True) as before:
        before.execute(
            "INSERT INTO shardmove_catalog.shard VALUES ('s1', 'dbname=one'), ('s2', 'dbname=two');"
            "BEGIN; INSERT INTO shardmove_catalog.keyspace (name, key_type, scheme) VALUES ('shop', 'bigint', 'range');"
            'SELECT shardmove_catalog.publish(0, \'test\', \'[{"keyspace": "shop", "shard": "s1", "held": false}]\');'
            "COMMIT"
        )
        document = '[{"keyspace": "shop", "source": "s1", "target": "s2", "ranges": [["0", "9"]]}]'
        before.execute("SELECT shardmove_catalog.create_plan('move', '', %s)", (document,))
        before.execute("UPDATE shardmove_catalog.move SET state = 'ready', lease_number = 1")
    with Catalog.install(dsn) as catalog:
        traffic = catalog.traffic("m1")
        assert (traffic.phase, traffic.number, traffic.compared) == (2, 0, 0)
        assert catalog.routers() == []
        catalog.set_phase("m1", 2, 3, lease_number=1, sample_rate=0.1)
        assert catalog.traffic("m1").phase == 3
        (row,) = catalog.reading().moves
        assert row[0] == "m1"
