"""The digest of one table in one keyset interval, on one side, at a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from shardmove.domain.digests import Digest
from shardmove.domain.moves import Move
from shardmove.postgres import effects
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import Interval
from shardmove.protocol.catch_up import digest_of
from workers.connections import Connections
from workers.copy import rows_of


@dataclass(frozen=True, slots=True)
class DigestInterval:
    """Reads the move's rows of the interval at `snapshot` (as pg_export_snapshot() named it; None: now)."""

    move: Move
    ordinal: int
    table: Table
    interval: Interval
    dsn: str
    snapshot: str | None = None

    def run(self, connections: Connections) -> Digest:
        """Raises psycopg.Error; also where the exported snapshot is gone. Reads only."""
        connection = connections.get(self.dsn, self.move.id)
        with effects.snapshot(connection, self.snapshot):
            return digest_of(connection, rows_of(self.move, self.table, self.interval))
