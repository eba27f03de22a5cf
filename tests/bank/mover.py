"""Moves, one after the other, until told to stop: an operator's verbs, in an order that the seed decides."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from shardmove.catalog.store import Catalog
from shardmove.coordinator import ending, planner
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.domain.errors import CutoverGaveUp, Refused
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from tests.bank.ground import KEYSPACE, SHARDS, TENANTS, Ground
from workers.executors import InlineExecutor

CUTOVERS_MAX: Final = 5
"""So many cutovers of a move may use up their attempts before that is an error: clients are many and servers small."""


class Mover(threading.Thread):
    """Attributes: `done` counts what it did, `stalls_ms` are the cutovers' own; `failed` is why it ended early."""

    def __init__(self, ground: Ground, seed: int) -> None:
        super().__init__(name="mover", daemon=True)
        self._ground = ground
        self._random = random.Random(f"{seed} mover")
        self._enough = threading.Event()
        self.done: Counter[str] = Counter()
        self.stalls_ms: list[float] = []
        self.failed: BaseException | None = None

    def stop(self) -> None:
        """It ends with the plan under way, so that every range rests at last."""
        self._enough.set()

    def run(self) -> None:
        try:
            with Catalog.connect(self._ground.config.catalog_dsn) as catalog:
                while not self._enough.is_set():
                    for move_id in self._plan(catalog):
                        self._live(catalog, move_id)
        except BaseException as error:
            self.failed = error
            raise

    def _plan(self, catalog: Catalog) -> Sequence[str]:
        """The moves of a new plan; none, where there is nothing to carry."""
        kind = self._random.choice(("split", "split", "move", "merge"))
        try:
            plan = self._planned(catalog, kind)
        except Refused:
            return ()
        self.done[kind] += 1
        return plan.move_ids

    def _planned(self, catalog: Catalog, kind: str) -> planner.Plan:
        config, to = self._ground.config, self._random.choice(SHARDS)
        if kind == "split":
            point = self._random.randrange(1, TENANTS)
            route = catalog.routes()[KEYSPACE].at(point)
            if route.range.lower == point:
                raise Refused(f"{point} is where a route begins")
            to = self._random.choice([shard for shard in SHARDS if shard != route.shard])
            return planner.split(config, catalog, KEYSPACE, at=[point], to=[to])
        if kind == "move":
            lower, upper = sorted(self._random.sample(range(TENANTS + 1), 2))
            return planner.move(config, catalog, KEYSPACE, range_=KeyRange(lower, upper), to=to)
        return planner.merge(config, catalog, KEYSPACE, range_=KeyRange(None, None), to=to)

    # --- the life of one move

    def _live(self, catalog: Catalog, move_id: str) -> None:
        with self._held(catalog, move_id) as held:
            run(held, State.READY)
            if self._random.random() < 0.15 and self.done["cutover"]:  # a run is never without one
                self._roll_back(held)
                return
            self._cut_over(held, Direction.FORWARD)
            if self._random.random() < 0.5:
                self._cut_over(held, Direction.BACK)
                self._cut_over(held, Direction.FORWARD)
            if self._random.random() < 0.1:
                self._cut_over(held, Direction.BACK)
                self._roll_back(held)
                return
            ending.complete(held)
            self.done["complete"] += 1

    def _cut_over(self, held: Hold, direction: Direction) -> None:
        for last in range(CUTOVERS_MAX - 1, -1, -1):
            try:
                report = cut_over(held, direction)
                break
            except CutoverGaveUp:
                self.done["cutover given up"] += 1
                if not last:
                    raise
        self.done["cutover" if direction is Direction.FORWARD else "revert"] += 1
        if report.stall_ms is not None:
            self.stalls_ms.append(report.stall_ms)

    def _roll_back(self, held: Hold) -> None:
        ending.roll_back(held)
        self.done["rollback"] += 1

    @contextmanager
    def _held(self, catalog: Catalog, move_id: str) -> Iterator[Hold]:
        with hold(
            self._ground.config,
            catalog,
            move_id,
            holder="bank",
            make_executor=lambda: InlineExecutor(2),
            progress=Progress(),
        ) as held:
            yield held
