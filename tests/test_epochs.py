"""The follower of the catalog: what it hands over, what it tells the catalog, and when it trusts it no more."""

from __future__ import annotations

import os
import time

import psycopg
import pytest

from router import epochs as following_epochs
from router.epochs import Epochs
from shardmove.domain import points
from shardmove.domain.errors import ConfigurationError, Refused, ServerChanged, Unreachable
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import State
from shardmove.domain.points import Effect
from tests.support.followers import CONFIRM_S, PATIENCE_S, Follower, following, until
from tests.support.world import World


def publish(world: World, owner: str = "s1") -> int:
    """A new epoch; returns its number."""
    table = world.catalog.routes()
    routes = table["shop"].assign([KeyRange(30, None)], shard=owner)
    return world.catalog.publish(routes, base=table.epoch, reason="test")


def acknowledged(world: World, name: str = "r1") -> int | None:
    return next((each.acknowledged for each in world.catalog.routers() if each.name == name), None)


def _raise_unreachable(point: str) -> None:
    raise Unreachable(f"the catalog does not answer ({point})")


def test_the_first_view_is_there_when_start_returns(world: World) -> None:
    with following(world.config) as follower:
        view = follower.epochs.view
        assert view is not None
        assert view.epoch == world.catalog.routes().epoch
        assert view.routes == world.catalog.routes()
        assert view.keyspaces == world.catalog.keyspaces()
        assert view.moves == {}
        assert follower.epochs.is_fresh(time.monotonic())
    assert world.catalog.routers() == []


def test_a_new_epoch_is_handed_over_and_its_acknowledgement_reaches_the_catalog(world: World) -> None:
    with following(world.config, acknowledges=False) as follower:
        for owner in ("s2", "s1", "s2"):
            epoch = publish(world, owner)
            view = follower.await_view(lambda view, epoch=epoch: view.epoch == epoch)  # type: ignore[misc]
            assert view.routes["shop"].at(35).shard == owner
            assert [each.name for each in world.catalog.late_routers(epoch)] == ["r1"]
            follower.epochs.acknowledge(epoch)
            until(lambda epoch=epoch: acknowledged(world) == epoch, "acknowledged")  # type: ignore[misc]
            assert world.catalog.late_routers(epoch) == []


def test_acknowledgements_rise_only(world: World) -> None:
    with following(world.config) as follower:
        epoch = publish(world, "s2")
        until(lambda: acknowledged(world) == epoch, "acknowledged")
        follower.epochs.acknowledge(epoch - 1)
        world.catalog.acknowledge(follower.epochs.id, epoch - 1)
        assert acknowledged(world) == epoch


def test_who_waits_is_woken_by_the_acknowledgement(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmove.catalog.routers.LOOK_EVERY_S", PATIENCE_S)  # by nothing else
    world.catalog.listen_for_acknowledgements()
    with following(world.config) as follower:
        until(lambda: acknowledged(world) == follower.epochs.view.epoch, "acknowledged")  # type: ignore[union-attr]
        started = time.monotonic()
        for owner in ("s2", "s1"):
            assert world.catalog.await_acknowledgements(publish(world, owner), PATIENCE_S) == []
        assert time.monotonic() - started < PATIENCE_S


def test_a_moves_facts_are_those_of_the_catalog(world: World) -> None:
    with following(world.config) as follower:
        move_id = world.split(at=20)
        world.run(move_id, State.READY)
        fact = follower.await_view(lambda v: v.moves[move_id].state is State.READY if v.moves else False).moves[move_id]
        assert (fact.source, fact.target, fact.ranges, fact.phase) == ("s1", "s2", (KeyRange(20, None),), 2)
        assert (fact.last_attempt, fact.outcome, fact.mirrored_until) == (0, None, -following_epochs.FOREVER)
        world.cut_over(move_id)
        view = follower.await_view(lambda v: v.moves[move_id].phase == 5)
        assert (view.moves[move_id].last_attempt, str(view.moves[move_id].outcome)) == (1, "flipped")
        assert view.routes["shop"].at(20).shard == "s2"
        assert not view.routes["shop"].at(20).held


def test_a_view_without_news_is_not_handed_over(world: World) -> None:
    with following(world.config, confirm_s=0.2) as follower:
        first = follower.await_view()
        began = follower.epochs._confirmed_at
        until(lambda: follower.epochs._confirmed_at > began + 0.2, "confirmed some times")
        assert follower.views.empty()
        assert follower.epochs.view is first


# --- what is not trusted


def is_given_up(follower: Follower) -> bool:
    """It is not fresh any more because it has met with trouble, and not because it got no turn."""
    return follower.epochs.trouble is not None and not follower.epochs.is_fresh(time.monotonic())


def test_a_router_that_cannot_beat_is_not_fresh_for_long_and_keeps_its_view(world: World) -> None:
    with following(world.config, confirm_s=0.4) as follower:
        view = follower.epochs.view
        with points.armed(Effect.BEAT_ROUTER.before, _raise_unreachable):
            until(lambda: is_given_up(follower), "not fresh any more")
            assert follower.epochs.view is view
            assert isinstance(follower.epochs.trouble, Unreachable)
        until(lambda: follower.epochs.is_fresh(time.monotonic()), "fresh again")


@pytest.mark.parametrize("beats_first", [True, False], ids=["with", "twin_without"])
def test_who_is_not_waited_for_serves_no_moving_range(
    world: World, beats_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router cannot write to the catalog, and reads it well. Where reading alone confirmed its view, it would go on
    after the others have stopped to wait for it."""
    if not beats_first:
        monkeypatch.setattr(Epochs, "_beat", lambda self, catalog: setattr(self, "_beaten_at", time.monotonic()))
    with following(world.config, confirm_s=0.4, acknowledges=False) as follower:
        if not beats_first:
            world.catalog.beat_router(follower.epochs.id, "r1", "here", os.getpid(), 0.4, 0)
        with points.armed(Effect.BEAT_ROUTER.before, _raise_unreachable):
            until(lambda: world.catalog.late_routers(99) == [], "not waited for any more")
            if beats_first:
                assert not follower.epochs.is_fresh(time.monotonic())
            else:
                until(lambda: follower.epochs.is_fresh(time.monotonic()), "the twin goes on")
                assert world.catalog.late_routers(99) == []


def test_a_server_that_is_away_is_found_again(world: World) -> None:
    with following(world.config, confirm_s=0.4) as follower:
        for _ in range(3):
            with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'shardmove router' AND datname = current_database()"
                )
            epoch = publish(world, "s2")
            follower.await_view(lambda view, epoch=epoch: view.epoch == epoch)  # type: ignore[misc]
        until(lambda: acknowledged(world) == epoch, "acknowledged")


def test_an_older_epoch_is_neither_taken_nor_confirmed(world: World) -> None:
    """A catalog that lost its tail: what it says now led to the former owner."""
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute("ALTER TABLE shardmove_catalog.cluster DISABLE TRIGGER USER")
        epoch = publish(world, "s2")
        with following(world.config, confirm_s=0.4) as follower:
            view = follower.epochs.view
            assert view is not None
            assert view.epoch == epoch
            connection.execute("UPDATE shardmove_catalog.cluster SET epoch = epoch - 1")
            connection.execute("NOTIFY shardmove_routes")
            until(lambda: is_given_up(follower), "not fresh any more")
            assert follower.epochs.view is view
            assert isinstance(follower.epochs.trouble, ServerChanged)
            assert "lost its last commits" in follower.epochs.trouble.message


def test_a_catalog_that_is_upgraded_beneath_is_not_followed(world: World) -> None:
    with following(world.config, confirm_s=0.4) as follower:
        with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
            connection.execute("INSERT INTO shardmove_catalog.upgrade_hook VALUES (1000, '9.9.0', '9.9.0')")
        until(lambda: is_given_up(follower), "not fresh any more")
        assert isinstance(follower.epochs.trouble, Refused)
        with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
            connection.execute("DELETE FROM shardmove_catalog.upgrade_hook WHERE number = 1000")
        until(lambda: follower.epochs.is_fresh(time.monotonic()), "fresh again")


def test_a_catalog_of_another_release_is_refused_at_the_start(world: World) -> None:
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute("INSERT INTO shardmove_catalog.upgrade_hook VALUES (1000, '9.9.0', '9.9.0')")
        with pytest.raises(Refused, match="version skew"):
            Follower(world.config).epochs.start()
        connection.execute("DELETE FROM shardmove_catalog.upgrade_hook WHERE number IN (3, 1000)")
        with pytest.raises(ConfigurationError, match="older release"):
            Follower(world.config).epochs.start()


def test_a_view_that_was_not_taken_is_handed_over_again(world: World) -> None:
    with following(world.config) as follower:
        follower.await_view()
        taken = follower.epochs._on_view
        failures = iter([True, False])

        def take(view: following_epochs.View) -> None:
            if next(failures, False):
                raise RuntimeError("not taken")
            taken(view)

        follower.epochs._on_view = take
        epoch = publish(world, "s2")
        assert follower.await_view().epoch == epoch


# --- what the catalog is told


def test_counts_reach_the_phase_that_they_belong_to(world: World) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with following(world.config, confirm_s=0.4) as follower, world.hold(move_id) as held:
        world.catalog.set_phase(move_id, 2, 3, lease_number=held.lease.number, sample_rate=1.0)
        fact = follower.await_phase(move_id, 3).moves[move_id]
        follower.epochs.count(fact, compared=7, passes=2, failures=1)
        follower.epochs.differs(fact, table="orders", key="20", source_rows="(1)", target_rows="(2)")
        until(lambda: world.catalog.traffic(move_id).differing == 1, "counted")
        traffic = world.catalog.traffic(move_id)
        assert (traffic.compared, traffic.passes, traffic.failures) == (7, 2, 1)
        until(lambda: world.catalog.differences(move_id) != [], "recorded")
        (found,) = world.catalog.differences(move_id)
        assert (found.router, found.table, found.key, found.source_rows) == ("r1", "orders", "20", "(1)")
        world.catalog.set_phase(move_id, 3, 2, lease_number=held.lease.number)
        world.catalog.set_phase(move_id, 2, 3, lease_number=held.lease.number)
        follower.epochs.count(fact, compared=5)  # of the phase before
        again = follower.await_phase(move_id, 3).moves[move_id]
        follower.epochs.count(again, compared=1)
        until(lambda: world.catalog.traffic(move_id).compared > 0, "counted")
        assert world.catalog.traffic(move_id).compared == 1


def test_falling_back_is_heard_by_everybody(world: World) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        world.catalog.set_phase(move_id, 2, 4, lease_number=held.lease.number, read_share=1.0)
    with following(world.config) as one, following(world.config, name="r2") as other:
        fact = one.await_phase(move_id, 4).moves[move_id]
        assert fact.mirrored_until == following_epochs.FOREVER
        assert one.epochs.fall_back(move_id, fact.phase_number, "it does not answer").result(PATIENCE_S)
        assert not other.epochs.fall_back(move_id, fact.phase_number, "it does not answer").result(PATIENCE_S)
        for follower in (one, other):
            assert follower.await_phase(move_id, 3).moves[move_id].read_share == 0
        kinds = [(event.kind, event.detail.get("router")) for event in world.catalog.events(move_id)]
        assert kinds.count(("phase_fell_back", "r1")) == 1
        assert ("phase_fell_back", "r2") not in kinds


def test_falling_back_asks_once_and_fails_where_the_catalog_is_away(world: World) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        world.catalog.set_phase(move_id, 2, 4, lease_number=held.lease.number, read_share=1.0)
    asked: list[str] = []
    with following(world.config, confirm_s=0.4) as follower:
        fact = follower.await_phase(move_id, 4).moves[move_id]
        with points.armed(Effect.BEAT_ROUTER.before, _raise_unreachable):
            until(lambda: follower.epochs.trouble is not None, "the catalog is away")
            with pytest.raises(Unreachable):
                follower.epochs.fall_back(move_id, fact.phase_number, "test").result(PATIENCE_S)
            assert world.catalog.traffic(move_id).phase == 4
            with points.armed(Effect.FALL_BACK.before, asked.append):
                several = [follower.epochs.fall_back(move_id, fact.phase_number, "test") for _ in range(50)]
                several[7].cancel()
                with pytest.raises(Unreachable):
                    several[0].result(PATIENCE_S)
                points.disarm(Effect.BEAT_ROUTER.before)
                until(lambda: world.catalog.traffic(move_id).phase == 3, "what was asked for is done")
        assert 1 <= len(asked) < 10  # what failed meanwhile is asked for once more
        assert not follower.epochs.fall_back(move_id, fact.phase_number, "test").result(PATIENCE_S)


def test_commits_are_mirrored_first_until_everybody_has_heard_that_the_reads_ended(world: World) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        world.catalog.set_phase(move_id, 2, 4, lease_number=held.lease.number, read_share=0.5)
        with following(world.config) as one, following(world.config, name="r2", acknowledges=False) as other:
            view = other.await_phase(move_id, 4)
            other.epochs.acknowledge(view.epoch)
            world.catalog.set_phase(move_id, 4, 3, lease_number=held.lease.number)
            fact = one.await_phase(move_id, 3).moves[move_id]
            assert time.monotonic() < fact.mirrored_until < time.monotonic() + 1.25 * CONFIRM_S + 1
            other.epochs.acknowledge(other.await_phase(move_id, 3).epoch)
            one.await_view(lambda v: v.moves[move_id].mirrored_until == -following_epochs.FOREVER)


def test_a_killed_router_is_waited_for_until_it_has_been_silent_for_long(world: World) -> None:
    follower = Follower(world.config, confirm_s=5.0)
    follower.epochs.start()
    epoch = publish(world, "s2")
    until(lambda: acknowledged(world) == epoch, "acknowledged")
    with (
        points.armed(Effect.BEAT_ROUTER.before, _raise_unreachable),
        points.armed(Effect.ACKNOWLEDGE.before, _raise_unreachable),
    ):
        epoch = publish(world, "s1")
        assert world.catalog.await_acknowledgements(epoch, 0.01) != []
        assert world.catalog.await_acknowledgements(epoch, PATIENCE_S) == []
        assert not follower.epochs.is_fresh(time.monotonic())
    follower.epochs.stop()
