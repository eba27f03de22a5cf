"""Whole moves under writers: start → rollback → start → cutover → revert → cutover → complete, and what surrounds them."""

from __future__ import annotations

import psycopg
import pytest

from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from tests.support.world import World

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
