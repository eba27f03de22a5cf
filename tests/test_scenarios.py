"""Whole moves under writers: start → rollback → start → cutover → revert → cutover → complete, and the like."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest

from shardmove.coordinator import planner
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from tests.support.world import World, in_background

MOVED = KeyRange(20, None)


def test_start_rollback_start_cutover_revert_cutover_complete(world: World) -> None:
    with world.writers() as fleet:
        first = world.split(at=20)
        world.run(first, State.READY)
        world.roll_back(first)
        assert world.leftovers("s1", first) == world.leftovers("s2", first) == []
        assert world.fetch("s2", "SELECT count(*) FROM orders") == [(0,)]

        second = world.split(at=20)
        world.run(second, State.READY)
        world.cut_over(second)
        world.cut_over(second, Direction.BACK)
        world.cut_over(second)
        world.complete(second)
        assert fleet.acknowledged > 0
    world.assert_nothing_lost(absent_on={"s1": [MOVED]})
    assert world.leftovers("s1", second) == world.leftovers("s2", second) == []


def test_rows_written_after_the_cutover_survive_a_rollback(world: World) -> None:
    with world.writers():
        move = world.split(at=20)
        world.run(move, State.SWITCHED)
        world.roll_back(move)
    world.assert_nothing_lost(absent_on={"s2": [MOVED]})
    assert world.move(move).state is State.ROLLED_BACK
    with world.connect("s2") as late, pytest.raises(psycopg.errors.SerializationFailure):
        late.execute("UPDATE tenants SET name = 'stray' WHERE tenant_id = 25; INSERT INTO tenants VALUES (25, 'stray')")


@pytest.mark.timeout(900)
def test_a_split_at_two_points_goes_to_two_targets_at_once(world: World) -> None:
    with world.writers():
        plan = planner.split(world.config, world.catalog, "shop", at=[15, 30], to=["s2", "s3"])
        joins = [in_background(partial(world.run, move, State.COMPLETED)) for move in plan.move_ids]
        for join in joins:
            join(600.0)
    assert [world.owner(tenant) for tenant in (14, 15, 29, 30)] == ["s1", "s2", "s2", "s3"]
    world.assert_nothing_lost(absent_on={"s1": [KeyRange(15, None)]})


def test_a_target_that_is_live_keeps_its_own_rows(world: World) -> None:
    """A part of what was given away comes back to a shard that has been living with the rest."""
    with world.writers():
        away = world.split(at=20)
        world.run(away, State.COMPLETED)
        back = planner.move(world.config, world.catalog, "shop", range_=KeyRange(25, 30), to="s1").move_ids[0]
        world.run(back, State.READY)
        world.roll_back(back)
        again = planner.move(world.config, world.catalog, "shop", range_=KeyRange(25, 30), to="s1").move_ids[0]
        world.run(again, State.COMPLETED)
    owners = {tenant: world.owner(tenant) for tenant in (19, 20, 25, 29, 30)}
    assert owners == {19: "s1", 20: "s2", 25: "s1", 29: "s1", 30: "s2"}
    world.assert_nothing_lost(absent_on={"s1": [KeyRange(20, 25), KeyRange(30, None)], "s2": [KeyRange(25, 30)]})
