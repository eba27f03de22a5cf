"""DDL and table locks that never wait in front of the application.

A lock request that waits makes everybody behind it wait too. So: look first who would be in the way, ask with a short
lock_timeout (which is per lock) and a statement_timeout (which is not), one table at a time, and try again later.

Nor is the application ever the victim of a deadlock with us: a change waits for a table only while it has none locked.
Who held a weak lock and waited for a stronger one, or for a partition, would wait for a client that has read, and whose
write waits for us; the server then ends the one that closes the circle, which is the client, and at once.

Our own long writers, batches and erasures of any move, would be in the way one after the other for as long as they
have work. They give way: each holds an advisory lock shared while it writes, and who changes a table takes it
exclusively first, which makes no application wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import LiteralString

from psycopg import errors, sql

from shardmove.domain.errors import Failed
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import table as relation


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one try may hold up others, and how long tries are repeated."""

    lock_timeout_ms: int
    total_s: float


_IN_THE_WAY = """
    WITH family AS MATERIALIZED (
        SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %(schema)s AND c.relname = %(name)s
        UNION
        SELECT p.relid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        CROSS JOIN pg_catalog.pg_partition_tree(c.oid) AS p WHERE n.nspname = %(schema)s AND c.relname = %(name)s
    )
    SELECT DISTINCT a.pid, coalesce(nullif(a.application_name, ''), a.backend_type), a.usename,
           pg_catalog.extract('epoch', pg_catalog.clock_timestamp() - a.xact_start)::float8
    FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
    WHERE l.relation IN (SELECT oid FROM family)
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND l.granted AND l.mode <> 'SIReadLock' AND a.pid <> pg_catalog.pg_backend_pid()
      AND (%(givers_of_way)s OR NOT EXISTS (
            SELECT FROM pg_catalog.pg_locks way WHERE way.pid = a.pid AND way.granted AND way.locktype = 'advisory'
            AND way.objsubid = 1 AND way.database = l.database
            AND ((way.classid::int8 << 32) | way.objid::int8) = %(way)s))
      AND (%(readers)s OR l.mode NOT IN ('AccessShareLock', 'RowShareLock'))
      AND a.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %(longer_than_s)s)
    ORDER BY 4 DESC
"""


GIVE_WAY_MS = 10_000
"""How long one try waits for our own writers; a batch takes about a second."""
WAY = 5_108_411_773_921_046_528
"""The key of the advisory lock that says so; a number of our own choice."""
STOPPED_MS = 3_000
"""A process that stands still for so long between two statements is taken for stopped."""
GIVE_WAY: LiteralString = "SELECT pg_catalog.pg_advisory_xact_lock_shared(5108411773921046528)"
"""The first statement of a transaction of ours that writes to a moving table for long."""
_TAKE_WAY: LiteralString = "SELECT pg_catalog.pg_advisory_xact_lock(5108411773921046528)"


def in_the_way(
    connection: Connection, name: TableName, *, readers: bool, longer_than_s: float, givers_of_way: bool = True
) -> list[str]:
    """Who has held a lock on the table, or on a partition of it, for longer, oldest first, in words.

    `readers`: they would be in the way too. `givers_of_way`: those of ours that give way are named, too.
    """
    whose = {
        "schema": name.schema,
        "name": name.name,
        "readers": readers,
        "longer_than_s": longer_than_s,
        "givers_of_way": givers_of_way,
        "way": WAY,
    }
    rows = connection.execute(_IN_THE_WAY, whose).fetchall()
    return [f"pid {pid} ({application}, role {role}) for {age:.1f} s" for pid, application, role, age in rows]


def change_table(
    connection: Connection,
    name: TableName,
    effect: Effect,
    change: Callable[[], None],
    *,
    patience: Patience,
    readers_block: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Runs a DDL change of one table in a transaction of its own, in tries that stall nobody for long.

    Args:
        readers_block: the change needs the table without readers; it may take no stronger lock than it says here.
        check: what must hold, asked in the transaction before the table is locked.

    Raises:
        Failed: somebody was in the way until the patience ended; names them. Nothing was changed.
    """

    def checked_and_locked() -> None:
        check()
        _lock(connection, name, readers_block=readers_block)
        change()

    deadline = time.monotonic() + patience.total_s
    pause = threading.Event()  # a pause that nobody cuts short: retries of a lock have no event to wait for
    while True:
        long_s = patience.lock_timeout_ms / 1000
        blockers = in_the_way(connection, name, readers=readers_block, longer_than_s=long_s, givers_of_way=False)
        if not blockers and _try(connection, effect, checked_and_locked, patience.lock_timeout_ms):
            return
        if time.monotonic() > deadline:
            blockers = in_the_way(connection, name, readers=readers_block, longer_than_s=long_s)
            who = "; ".join(blockers) or "short transactions, one after the other"
            raise Failed(
                f"could not lock the table {name} within {patience.total_s:g} s: in the way: {who}",
                hint="end the transaction that is in the way, then run the same command again",
            )
        pause.wait(min(0.5, patience.lock_timeout_ms / 1000 * 2))


def _try(connection: Connection, effect: Effect, change: Callable[[], None], lock_timeout_ms: int) -> bool:
    try:
        with effects.writing(connection, effect):
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{GIVE_WAY_MS}ms",))
            connection.execute(_TAKE_WAY)
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{lock_timeout_ms}ms",))
            # A table stays locked neither by a long change, nor by a process that is stopped in the middle of one.
            longest_ms = lock_timeout_ms * 5
            connection.execute(
                "SELECT pg_catalog.set_config('statement_timeout', %s, true),"
                " pg_catalog.set_config('idle_in_transaction_session_timeout', %s, true)",
                (f"{longest_ms}ms", f"{max(longest_ms, STOPPED_MS)}ms"),
            )
            change()
    except (errors.LockNotAvailable, errors.QueryCanceled, errors.DeadlockDetected):
        return False
    return True


def _lock(connection: Connection, name: TableName, *, readers_block: bool) -> None:
    """The strongest lock that the change will need, on the whole family. It waits for the table alone, with none held.

    Raises LockNotAvailable: also where a partition is in use by who did not come by its parent.
    """
    mode = sql.SQL("ACCESS EXCLUSIVE" if readers_block else "SHARE ROW EXCLUSIVE")
    connection.execute(sql.SQL("LOCK TABLE ONLY {} IN {} MODE").format(relation(name), mode))
    named = relation(name).as_string(connection)
    # Not for a plain table: what inherits from one is another table, which the change does not touch.
    if connection.execute("SELECT FROM pg_catalog.pg_partition_tree(%s::regclass)", (named,)).rowcount:
        connection.execute(sql.SQL("LOCK TABLE {} IN {} MODE NOWAIT").format(relation(name), mode))
