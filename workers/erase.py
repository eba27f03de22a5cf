"""Erasing the rows of a range on the side that does not own it, interval by interval (I6)."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from shardmove.domain.moves import Move
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.locks import GIVE_WAY
from shardmove.postgres.sql import Interval
from shardmove.protocol import drift, fence
from shardmove.protocol.catch_up import in_move
from shardmove.protocol.replica import become_replica
from workers.connections import Connections
from workers.cuts import walk


@dataclass(frozen=True, slots=True)
class EraseBatch:
    """Deletes the move's rows in one interval of one table.

    Attributes:
        shard: the name of the shard that is erased; its identity is compared with what the move recorded.
        rows_max: how many rows one transaction deletes at most, as far as the walk could tell.
        drop_record: the interval's batch record goes too, together with its last rows.
    """

    move: Move
    ordinal: int
    table: Table
    interval: Interval
    lease_number: int
    shard: str
    dsn: str
    rows_max: int
    drop_record: bool = False

    def run(self, connections: Connections) -> int:
        """Returns how many rows it deleted. When it returns, none of the range is left in the interval.

        Raises (what earlier transactions of the same task deleted stays deleted, the record stays):
            LeaseLost, Refused: this side may not be erased, or not by this process. Checked in each transaction.
            ServerChanged: the shard is another server than the move began with.
            psycopg.Error: anything else.
        """
        connection = connections.get(self.dsn, self.move.id)
        pieces = walk(connection, self.move, self.table, self.interval, lambda: self.rows_max)
        return sum(self._erase(connection, piece) for piece in pieces)

    def _erase(self, connection: Connection, piece: Interval) -> int:
        with effects.writing(connection, Effect.ERASE):
            connection.execute(GIVE_WAY)
            fence.check_erasable(connection, self.move.id, self.lease_number)
            drift.check_identity(connection, self.shard, self.move.identities)
            become_replica(connection, self.move.id, [self.table])
            deleted = connection.execute(delete_sql(self.move, self.table, piece)).rowcount
            is_last = piece[1] == self.interval[1]
            if is_last and self.drop_record:
                drop_record(connection, self.move.id, self.ordinal, self.interval)
        return deleted


def delete_sql(move: Move, table: Table, interval: Interval) -> sql.Composed:
    """Only rows of the range: on a live shard the same interval may hold rows of others."""
    return sql.SQL("DELETE FROM {} WHERE {} AND {}").format(table.rows, in_move(move, table), table.within(interval))


def drop_record(connection: Connection, move_id: str, ordinal: int, interval: Interval) -> None:
    after, upto = (None if end is None else list(end) for end in interval)
    connection.execute(
        "DELETE FROM shardmove.batch WHERE move_id = %s AND ordinal = %s"
        " AND after IS NOT DISTINCT FROM %s::text[] AND upto IS NOT DISTINCT FROM %s::text[]",
        (move_id, ordinal, after, upto),
    )
