"""Who owns the range now: carrying to the shards what the catalog has decided.

The catalog's attempt row decides, the fences follow. Any party may run this, at any time and as often as it likes: each
step is conditional on the shard's own record, so that a late one does nothing.

    flipped      the receiver's fence opens for the attempt; the giver records that it gave the range away
    abandoned    the giver's fence opens for the attempt; the catalog and the giver suffice
    open         somebody is at it; where that somebody is dead, the attempt is abandoned first

A catalog that lost its tail (a failover to an asynchronous standby, a restore) may have forgotten a flip, and would
abandon an attempt for which the receiver is open already: two owners. So the catalog must be the server that the move
began with, and a receiver that was opened for the attempt proves that it was flipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import psycopg

from shardmove.catalog.store import Catalog
from shardmove.domain.errors import ServerChanged, Unreachable
from shardmove.domain.moves import CATALOG, Attempt, Move, Outcome, Standing
from shardmove.postgres.connect import Connection
from shardmove.protocol import capture, drift, fence

Connect = Callable[[str], Connection]
"""A connection to a shard by its name; asked only for the shards that are needed."""


def carry_out(attempt: Attempt, move: Move, connect: Connect) -> None:
    """Makes the shards agree with how the attempt ended. Does nothing while it is open. Safe to repeat.

    Raises:
        ServerChanged: a shard is not the server that the move began with, or the catalog forgot a flip; no fence was
            changed.
        Unreachable, psycopg.Error: run it again.
    """
    giver, receiver = move.giver(attempt.direction), move.receiver(attempt.direction)
    match attempt.outcome:
        case Outcome.OPEN:
            return
        case Outcome.ABANDONED:
            _require_unopened(attempt, move, receiver, connect)
            open_for(attempt, move, giver, connect(giver))
        case Outcome.FLIPPED:
            open_for(attempt, move, receiver, connect(receiver))
            fence.give_away(connect(giver), move.id, attempt=attempt.number)
        case _:
            assert_never(attempt.outcome)


def _require_unopened(attempt: Attempt, move: Move, receiver: str, connect: Connect) -> None:
    """The receiver was not opened for an attempt that the catalog takes for abandoned. One that is down cannot say."""
    try:
        row = fence.read(connect(receiver), move.id)
    except (Unreachable, psycopg.OperationalError):
        return
    if row is not None and row.standing == Standing.OWNER and row.attempt >= attempt.number:
        raise ServerChanged(
            f"move {move.id}: {receiver} owns the range by its own record since attempt {row.attempt}, and the catalog"
            " knows nothing of it: the catalog has lost its last commits",
            hint="nothing was opened; bring the catalog's last state back",
        )


def open_for(attempt: Attempt, move: Move, shard: str, connection: Connection) -> None:
    """Opens the fence of the side that the attempt was decided for; where it is open for it already, does nothing."""
    row = fence.read(connection, move.id)
    if row is not None and row.is_open and row.attempt == attempt.number and _writers_pass(connection, move.id):
        return
    drift.check_identity(connection, shard, move.identities)
    fence.open_(connection, move.id, attempt=attempt.number)


def _writers_pass(connection: Connection, move_id: str) -> bool:
    return fence.state(connection, move_id) == capture.OPEN


def settle(catalog: Catalog, move: Move, number: int, connect: Connect, *, reason: str) -> None:
    """Decides the attempt if nobody has, and carries it out.

    To be called by the holder of the lease that opened it, or where that holder is dead.

    Raises:
        as `carry_out`.
    """
    attempt = catalog.attempt(move.id, number)
    if attempt.outcome is Outcome.OPEN:
        check_catalog(catalog, move)
        outcome = catalog.settle_attempt(move, attempt.number, reason)
        attempt = Attempt(attempt.move_id, attempt.number, attempt.direction, outcome)
    carry_out(attempt, move, connect)


def check_catalog(catalog: Catalog, move: Move) -> None:
    """Raises ServerChanged where the catalog is not the server that the move began with."""
    then, now = move.identities.get(CATALOG), catalog.identity()
    if then is not None and then != now:
        raise ServerChanged(
            f"the catalog is another server than move {move.id} began with (timeline {now.timeline}): it may have"
            " forgotten a cutover",
            hint=f"`shardmove run {move.id}` looks at the shards' own records, compares, and goes on",
        )


def is_carried_out(attempt: Attempt, move: Move, connect: Connect) -> bool:
    """The shards' own records agree with how the attempt ended."""
    if attempt.outcome is Outcome.OPEN:
        return False
    owner, other = move.receiver(attempt.direction), move.giver(attempt.direction)
    if attempt.outcome is Outcome.ABANDONED:
        owner, other = other, owner
    row = fence.read(connect(owner), move.id)
    if row is None or not row.is_open or not _writers_pass(connect(owner), move.id):
        return False
    given = fence.read(connect(other), move.id)
    return given is not None and given.standing != Standing.OWNER
