"""The route table in the catalog: read whole, published whole, one epoch after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from psycopg.types.json import Jsonb

from shardmove.catalog.events import Events
from shardmove.catalog.export import export_routes
from shardmove.domain.errors import EpochConflict, ShardmoveError
from shardmove.domain.keys import KeyType
from shardmove.domain.points import Effect
from shardmove.domain.routes import Route, Routes, RouteTable

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRIES_MAX = 50
"""How often a change is computed anew because somebody else published in between. Each loss is another's progress."""


class RouteTables(Events):
    """Reading and publishing epochs. `routes_file`: where each published epoch is written too."""

    routes_file: Path | None = None

    def cluster_id(self) -> str:
        """What tells this catalog from every other one, on the shards."""
        return str(self._value("SELECT id FROM shardmove_catalog.cluster"))

    def epoch(self) -> int:
        """The number of the newest epoch."""
        return int(self._value("SELECT epoch FROM shardmove_catalog.cluster"))

    def routes(self) -> RouteTable:
        """The newest epoch, all keyspaces, as of one instant. Epoch 0 is a new catalog's and has no keyspaces."""
        rows = self._rows(
            """SELECT c.epoch, r.keyspace, k.bound_type, r.lower, r.upper, r.shard, r.move_id, r.held
               FROM shardmove_catalog.cluster c
               LEFT JOIN (shardmove_catalog.current_routes r
                          JOIN shardmove_catalog.keyspace k ON k.name = r.keyspace) ON true"""
        )
        found: dict[str, list[Route]] = {}
        for _, keyspace, bound_type, lower, upper, shard, move_id, held in rows:
            if keyspace is not None:
                range_ = KeyType(bound_type).range_of(lower, upper)
                found.setdefault(keyspace, []).append(Route(range_, shard, move_id, held))
        return RouteTable(rows[0][0], {name: Routes.of(name, found[name]) for name in sorted(found)})

    def publish(self, routes: Routes, *, base: int, reason: str) -> int:
        """Publishes one keyspace's routes, the others as they are, as epoch `base + 1`, which it returns.

        Raises EpochConflict where the newest epoch is not `base` any more; nothing is published then. After
        Unreachable the epoch may or may not be published: read the routes.
        """
        query = "SELECT shardmove_catalog.publish(%s, %s, %s)"
        epoch = int(self._changed(Effect.PUBLISH, query, (base, reason, as_json(routes))))
        self._published()
        return epoch

    def change_routes(self, keyspace: str, change: Callable[[Routes], Routes], reason: str) -> RouteTable:
        """Reads, changes and publishes one keyspace's routes; computed anew where somebody else was faster.

        A change that changes nothing publishes nothing. Returns the table with the change in it.
        """

        def once() -> RouteTable:
            table = self.routes()
            changed = change(table[keyspace])
            if changed != table[keyspace]:
                self.publish(changed, base=table.epoch, reason=reason)
                return table.following(changed)
            return table

        return retried(once)

    def _published(self) -> None:
        """Writes the newest epoch to the routes file, if there is one. Never raises: the epoch is committed."""
        if self.routes_file is None:
            return
        try:
            self._export(self.routes_file)
        except ShardmoveError as error:
            log.warning("routes_file_failed", extra={"path": str(self.routes_file), "error": str(error)})

    def _export(self, path: Path) -> None:
        """Until the file has the newest epoch: who did not get its turn while we were at it leaves its own to us."""
        exported = -1
        try:
            while exported < self.epoch():
                table = self.routes()
                export_routes(table, path, cluster_id=self.cluster_id())
                exported = table.epoch
        except OSError as error:
            log.warning("routes_file_failed", extra={"path": str(path), "error": str(error)})
            self.record("routes_file_failed", path=str(path), error=str(error))


def retried(once: Callable[[], T]) -> T:
    """Runs it until it meets no EpochConflict, at most RETRIES_MAX times."""
    for _ in range(RETRIES_MAX - 1):
        try:
            return once()
        except EpochConflict:
            continue
    return once()


def as_json(*keyspaces: Routes) -> Jsonb:
    """What the catalog's functions take as routes."""
    return Jsonb(
        [
            {
                "keyspace": routes.keyspace,
                "lower": route.range.ends[0],
                "upper": route.range.ends[1],
                "shard": route.shard,
                "move_id": route.move_id,
                "held": route.held,
            }
            for routes in keyspaces
            for route in routes.routes
        ]
    )
