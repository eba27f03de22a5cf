"""Routers as the catalog sees them: a follower with nothing behind it, and rows of routers that are none."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg

from router.epochs import Epochs, View
from shardmove.config import Config
from tests.support import engine
from tests.support.world import World

PATIENCE_S = 90.0
CONFIRM_S = 12.0
"""A follower that got no turn for a while is not to be taken for a dead one."""


class Follower:
    """An Epochs, and what it handed over. It acknowledges at once, unless it is told not to."""

    def __init__(
        self, config: Config, *, confirm_s: float = CONFIRM_S, acknowledges: bool = True, name: str = "r1"
    ) -> None:
        self.views: queue.Queue[View] = queue.Queue()
        self.acknowledges = acknowledges
        self.config = replace(config, router=replace(config.router, confirm_s=confirm_s))
        self.epochs = Epochs(self.config, name=name, on_view=self._take)

    def _take(self, view: View) -> None:
        self.views.put(view)
        if self.acknowledges:
            self.epochs.acknowledge(view.epoch)

    def await_view(self, wanted: Callable[[View], bool] = lambda view: True) -> View:
        """The first view of its kind that was not taken yet; fails after a while."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            view = self.views.get(timeout=max(0.001, deadline - time.monotonic()))
            if wanted(view):
                return view

    def await_phase(self, move_id: str, phase: int, share: float | None = None) -> View:
        def wanted(view: View) -> bool:
            fact = view.moves.get(move_id)
            return fact is not None and fact.phase == phase and share in (None, fact.read_share)

        return self.await_view(wanted)


@contextmanager
def following(
    config: Config, *, confirm_s: float = CONFIRM_S, acknowledges: bool = True, name: str = "r1"
) -> Iterator[Follower]:
    made = Follower(config, confirm_s=confirm_s, acknowledges=acknowledges, name=name)
    made.epochs.start()
    try:
        yield made
    finally:
        made.epochs.stop()


def register(world: World, name: str, *, acknowledged: int = 0, silent_s: float = 0.0, confirm_s: float = 3.0) -> None:
    """A router's row without a router: it never beats, and acknowledges nothing."""
    world.catalog.beat_router(name, name, "elsewhere", 1, confirm_s, acknowledged)
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute(
            "UPDATE shardmove_catalog.router SET beat_at = beat_at - make_interval(secs => %s) WHERE id = %s",
            (silent_s, name),
        )


def until(condition: Callable[[], bool], what: str) -> None:
    """Returns once it holds; fails after a while."""
    engine.until(condition, f"not within {PATIENCE_S:g} s: {what}", timeout_s=PATIENCE_S)
