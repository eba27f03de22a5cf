"""Cuts: where one batch ends and the next begins.

`walk` follows the keyset on the source, one look a batch, while the batches before it are being copied. The intervals
tile the gap exactly, whatever happens to the rows meanwhile: each begins where the one before it ended, the first where
the gap begins, and the last ends where the gap ends. `BatchSizer` says how many rows the next one should hold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

from psycopg import sql

from shardmove.config import Limits
from shardmove.domain.moves import Move
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import Interval, Position, names
from shardmove.protocol.catch_up import in_move

ROWS_FIRST = 1_000
GROWTH = 1.5


def walk(
    connection: Connection, move: Move, table: Table, gap: Interval, rows: Callable[[], int]
) -> Iterator[Interval]:
    """Cuts the gap into intervals of about `rows()` rows of the move, ascending; lazily, asking before each.

    The intervals tile (after, upto] of the gap exactly; a gap without rows is one interval. Each look is a statement of
    its own: the connection must be outside any transaction, and is free for other use between two intervals.
    """
    after, end = gap
    while True:
        row = connection.execute(cut_sql(move, table, (after, end), rows())).fetchone()
        upto: Position | None = None if row is None else tuple(row)
        if upto is None or upto == end:
            yield after, end
            return
        yield after, upto
        after = upto


def cut_sql(move: Move, table: Table, interval: Interval, rows: int) -> sql.Composed:
    """The position of the row that is number `rows` of the interval; no row where it holds fewer.

    The sub-select reads keyset columns alone and stops after `rows` of them: an index-only scan where the server has
    such an index, and one row that travels.
    """
    return sql.SQL(
        "SELECT {position} FROM (SELECT {keyset} FROM {table} WHERE {in_move} AND {within}"
        " ORDER BY {order} LIMIT 1 OFFSET {before}) AS batch"
    ).format(
        position=table.keyset_as_text(),
        keyset=names(table.keyset_names),
        order=table.order,
        table=table.rows,
        in_move=in_move(move, table),
        within=table.within(interval),
        before=sql.Literal(rows - 1),
    )


class BatchSizer:
    """How many rows the next batch should hold, learnt from those before. Thread-safe.

    It begins small, grows by at most GROWTH a batch, shrinks at once, and never passes `batch_rows_max`.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rows = min(ROWS_FIRST, limits.batch_rows_max)
        self._lock = threading.Lock()

    def rows(self) -> int:
        with self._lock:
            return self._rows

    def learn(self, rows: int, size_bytes: int, elapsed_s: float) -> None:
        """Takes in what a batch was: its rows, their bytes as a COPY stream, and how long it took."""
        with self._lock:
            self._rows = next_rows(self._limits, self._rows, rows, size_bytes, elapsed_s)


def next_rows(limits: Limits, now: int, rows: int, size_bytes: int, elapsed_s: float) -> int:
    """The rule: a batch that missed a target shrinks the next to what would have met it; else the next may grow.

    A batch that met both never shrinks anything: a short one, at the end of a gap, is all overhead.
    """
    room = min(limits.batch_bytes / max(size_bytes, 1), limits.batch_time_s / max(elapsed_s, 1e-6))
    fitting = math.floor(rows * room)
    if room < 1 and rows > 0:
        return max(1, min(now, fitting))
    return min(max(now, fitting), math.ceil(now * GROWTH), limits.batch_rows_max)
