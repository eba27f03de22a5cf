"""SIGKILL of the coordinator at random moments, under writers; the same command again, each time.

The moments are drawn from the run's seed. A move that comes to its end is followed by one that carries the range back,
until all kills are spent; then a last, undisturbed run must end right, with nothing lost and nothing left over.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest

from shardmove.coordinator import planner
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Move, State
from tests.support.engine import until
from tests.support.world import World

KILLS = int(os.environ.get("SHARDMOVE_KILLS", "15"))
MOVED = KeyRange(20, None)
RUN_BOUND_S = 300.0
LIFE_S = 4.0
"""Kills fall within so many seconds after the coordinator took the lease; a whole move takes about as long."""


class Coordinator:
    """`shardmove run ID --until completed` in a process of its own."""

    def __init__(self, world: World, move: Move) -> None:
        self.world = world
        self.move = move
        self.process = world.spawn("run", move.id, "--until", "completed")

    def has_begun(self) -> None:
        """Returns when it holds the move's lease, or has ended."""
        deadline = time.monotonic() + RUN_BOUND_S
        while self.process.poll() is None:
            holder = self.world.catalog.holder(self.move.id)
            if holder is not None and holder.process_id == self.process.pid:
                return
            assert time.monotonic() < deadline, "the coordinator does not begin"

    def killed_after(self, seconds: float) -> bool:
        """Kills it then; False where it had come to its end before, which must have been a good one."""
        try:
            _, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            until(self._is_cut_off, "the session of a dead coordinator lives on")
            return True
        assert self.process.returncode == 0, errors.decode()
        return False

    def _is_cut_off(self) -> bool:
        """Only a server that has noticed lets the next one have the lease at once."""
        holder = self.world.catalog.holder(self.move.id)
        return holder is None or not holder.is_connected

    def ends_well(self) -> None:
        _, errors = self.process.communicate(timeout=RUN_BOUND_S)
        assert self.process.returncode == 0, errors.decode()


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_sigkill_at_random_moments(world: World, rng: random.Random) -> None:
    states: dict[State, int] = {}
    with world.writers(rate=150.0):
        move = _next_move(world)
        for _ in range(KILLS):
            coordinator = Coordinator(world, move)
            coordinator.has_begun()
            was_killed = coordinator.killed_after(rng.uniform(0.0, LIFE_S))
            state = world.move(move.id).state
            states[state] = states.get(state, 0) + was_killed
            if state is State.COMPLETED:
                Coordinator(world, move).ends_well()
                _assert_nothing_left(world, move)
                move = _next_move(world)
        Coordinator(world, move).ends_well()
    print("killed in:", {str(state): count for state, count in sorted(states.items())})
    world.assert_nothing_lost(absent_on={_other(world.owner(25)): [MOVED]})
    _assert_nothing_left(world, move)


def _next_move(world: World) -> Move:
    """Carries the range to where it is not."""
    target = _other(world.owner(25))
    plan = planner.move(world.config, world.catalog, "shop", range_=MOVED, to=target)
    return world.move(plan.move_ids[0])


def _other(shard: str) -> str:
    return {"s1": "s2", "s2": "s1"}[shard]


def _assert_nothing_left(world: World, move: Move) -> None:
    assert world.leftovers("s1", move.id) == []
    assert world.leftovers("s2", move.id) == []
    assert world.sessions(move.id) == []
