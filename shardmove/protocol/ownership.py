"""Who owns the range now: carrying to the shards what the catalog has decided.

The catalog's attempt row decides, the fences follow. Any party may run this, at any time and as often as it likes: each
step is conditional on the shard's own record, so that a late one does nothing.

    flipped      the receiver's fence opens for the attempt; the giver records that it gave the range away
    abandoned    the giver's fence opens for the attempt; the catalog and the giver suffice
    open         somebody is at it; where that somebody is dead, `settle_dead` abandons the attempt first
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from shardmove.catalog.store import Catalog
from shardmove.domain.moves import Attempt, Move, Outcome
from shardmove.postgres.connect import Connection
from shardmove.protocol import drift, fence, objects


def carry_out(attempt: Attempt, move: Move, connect: Callable[[str], Connection]) -> None:
    """Makes the shards agree with how the attempt ended. Does nothing while it is open. Safe to repeat.

    Args:
        connect: a connection to a shard by its name; asked only for the shards that are needed.

    Raises:
        ServerChanged: a shard is not the server that the move began with; its fence was left alone.
        Unreachable, psycopg.Error: run it again.
    """
    giver, receiver = move.giver(attempt.direction), move.receiver(attempt.direction)
    match attempt.outcome:
        case Outcome.OPEN:
            return
        case Outcome.ABANDONED:
            open_for(attempt, move, giver, connect(giver))
        case Outcome.FLIPPED:
            open_for(attempt, move, receiver, connect(receiver))
            fence.give_away(connect(giver), move.id, attempt=attempt.number)
        case _:
            assert_never(attempt.outcome)


def open_for(attempt: Attempt, move: Move, shard: str, connection: Connection) -> None:
    """Opens the fence of the side that the attempt was decided for."""
    drift.check_identity(connection, shard, move.identities)
    fence.open_(connection, move.id, attempt=attempt.number)


def settle_newest(catalog: Catalog, move: Move, connect: Callable[[str], Connection], *, reason: str) -> None:
    """Decides the newest attempt if nobody has, and carries it out.

    To be called by the holder of the lease, who knows that no other coordinator is at it, or where the holder is dead.

    Raises:
        as `carry_out`.
    """
    if move.last_attempt == 0:
        return
    attempt = catalog.attempt(move.id, move.last_attempt)
    if attempt.outcome is Outcome.OPEN:
        outcome = catalog.settle_attempt(move, attempt.number, reason)
        attempt = Attempt(attempt.move_id, attempt.number, attempt.direction, outcome)
    carry_out(attempt, move, connect)


def is_carried_out(attempt: Attempt, move: Move, connect: Callable[[str], Connection]) -> bool:
    """The shards' own records agree with how the attempt ended."""
    if attempt.outcome is Outcome.OPEN:
        return False
    owner = move.receiver(attempt.direction) if attempt.outcome is Outcome.FLIPPED else move.giver(attempt.direction)
    connection = connect(owner)
    row = fence.read(connection, move.id)
    return row is not None and row.is_open and fence.state(connection, move.id) == objects.OPEN
