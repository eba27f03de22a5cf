"""A pair of snapshots, one on each side of a move, that must show equal rows: under live writes, and exactly.

A catch-up that leaves the journal empty makes the receiver equal to the giver as of the catch-up's own snapshot. So the
giver's snapshot is exported in the middle of such a pass, the receiver's is taken right after its commit, and the
catch-up lock is held in between by the session that ran the pass: no other catch-up can slip in. Writers are not
held up at any time; other catch-ups wait for a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from psycopg import sql

from shardmove.domain import points
from shardmove.domain.errors import Failed
from shardmove.postgres.connect import Connection, connect
from shardmove.protocol import fence
from shardmove.protocol.catch_up import Mirror

TRIES = 50
BACKLOG_ROWS = 20_000
"""A backlog is worked off in passes of so many rows before the pass that must take all."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of exported snapshots, good while the `with` block lasts."""

    giver: str
    receiver: str


@contextmanager
def equal_snapshots(open_mirror: Callable[[], Mirror], *, giver_dsn: str, receiver_dsn: str) -> Iterator[Pair]:
    """Yields a pair at which every row of the move must be equal on both sides.

    Raises:
        Failed: the journal did not run empty in one pass, TRIES times: writers are faster than the mirror.
        whatever a catch-up raises.
    """
    with ExitStack() as stack:
        mirror = stack.enter_context(open_mirror())
        mirror.work_off(BACKLOG_ROWS)
        name = fence.application_name(mirror.move.id)
        giver = stack.enter_context(_holder(giver_dsn, name))
        receiver = stack.enter_context(_holder(receiver_dsn, name))
        with _catch_up_lock(mirror):
            _empty_pass(mirror, giver)
            points.reach("pairs.between_snapshots")
            receiver.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            pair = Pair(_exported(giver), _exported(receiver))
        yield pair


@contextmanager
def any_snapshots(*, giver_dsn: str, receiver_dsn: str, application_name: str) -> Iterator[Pair]:
    """A pair of about the same moment: what is on its way differs, too. Enough to mend by, never to verify by."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(_holder(dsn, application_name)) for dsn in (giver_dsn, receiver_dsn)]
        for session in sessions:
            session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        giver, receiver = map(_exported, sessions)
        yield Pair(giver, receiver)


@contextmanager
def _holder(dsn: str, application_name: str) -> Iterator[Connection]:
    """A session that stands in a transaction, for as long as the intervals of its snapshot take, and holds no lock."""
    connection = connect(dsn, application_name=application_name)
    try:
        connection.execute("SET idle_in_transaction_session_timeout = 0")
        yield connection
    finally:
        connection.close()


@contextmanager
def _catch_up_lock(mirror: Mirror) -> Iterator[None]:
    """Held by the receiver's session across the pass's transaction, which takes it once more."""
    row = fence.read(mirror.receiver, mirror.move.id)
    if row is None:
        raise Failed(f"move {mirror.move.id} has no objects on the receiving shard")
    mirror.receiver.execute("SELECT pg_catalog.pg_advisory_lock(%s)", (row.mirror_key,))
    try:
        yield
    finally:
        if not mirror.receiver.closed:
            mirror.receiver.execute("SELECT pg_catalog.pg_advisory_unlock(%s)", (row.mirror_key,))


def _empty_pass(mirror: Mirror, giver: Connection) -> None:
    """Passes until one leaves the journal empty; the giver's second session then stands at that pass's snapshot."""
    for _ in range(TRIES):
        done = mirror.catch_up(full_look=True, at_snapshot=lambda: _import(giver, _exported(mirror.giver)))
        if done.is_empty:
            return
    raise Failed(
        f"move {mirror.move.id}: the journal did not run empty in {TRIES} catch-ups: writes come faster than they are"
        " carried, or rows of batches that are not copied yet are waiting",
    )


def _exported(connection: Connection) -> str:
    row = connection.execute("SELECT pg_catalog.pg_export_snapshot()").fetchone()
    assert row is not None
    return str(row[0])


def _import(connection: Connection, snapshot: str) -> None:
    connection.rollback()  # of an earlier pass
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
    connection.execute("SELECT 1")
