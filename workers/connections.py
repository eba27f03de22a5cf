"""A worker's connections: one per server and move, kept from task to task."""

from __future__ import annotations

from collections import OrderedDict
from typing import Self

import psycopg
from psycopg.pq import TransactionStatus

from shardmove.postgres.connect import Connection, connect
from shardmove.protocol.fence import application_name

CONNECTIONS_MAX = 8
"""Per worker: both ends of four moves. A worker that serves many moves must not use up a server's slots."""

_SETTINGS = {
    # Without it the backend of a dead worker that waits for a lock goes on waiting, and keeps the locks that it has.
    "client_connection_check_interval": "1s",
    # The server estimates a row comparison by its first column: behind a key that has most of the rows, it takes any
    # interval for most of the table, and reads and sorts all of it for one batch.
    "enable_seqscan": "off",
    # Where it reads a batch by a bitmap it sorts it, and nothing more than it: in memory.
    "work_mem": "16MB",
}
_SET = """
    SELECT pg_catalog.set_config(wanted.name, wanted.value, false)
    FROM unnest(%s::text[], %s::text[]) AS wanted(name, value)
    JOIN pg_catalog.pg_settings AS known ON known.name = wanted.name
"""


class Connections:
    """Opens a connection when it is first asked for, and again when it broke. Not thread-safe: one for each thread."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str], Connection] = OrderedDict()

    def get(self, dsn: str, move_id: str) -> Connection:
        """A connection in autocommit mode, outside any transaction. Raises Unreachable."""
        key = dsn, move_id
        connection = self._open.pop(key, None)
        if connection is None or not _is_usable(connection):
            self._make_room()
            connection = connect(dsn, application_name=application_name(move_id))
            connection.execute(_SET, (list(_SETTINGS), list(_SETTINGS.values())))
        self._open[key] = connection
        return connection

    def _make_room(self) -> None:
        while len(self._open) >= CONNECTIONS_MAX:
            self._open.popitem(last=False)[1].close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_usable(connection: Connection) -> bool:
    """Ends what a failed task left open; a connection that does not take even that is closed."""
    try:
        if connection.info.transaction_status != TransactionStatus.IDLE:
            connection.rollback()
        connection.execute("")  # a server that went away meanwhile is noticed here, not by the task
    except psycopg.Error:
        connection.close()
    return not connection.closed
