"""A shard's part in a move, and the names of the objects that it has there.

Everything of ours is in the schema `shardmove`, but for the triggers, which are called `shardmove_<move>_…`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg import sql

from shardmove.domain.errors import LeaseLost
from shardmove.domain.moves import Move, Standing
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table

MARKER = "shardmove.mirror"
"""The setting by which the move's triggers know its own writes: it names the move."""
XID = "shardmove_xid"
"""The journal's own column; the others are named as the keyset columns are, so that they share predicates."""
EVENTS: tuple[LiteralString, ...] = ("INSERT", "UPDATE", "DELETE")
KEPT_PREFIX = "shardmove_kept_"


@dataclass(frozen=True, slots=True)
class Part:
    """One shard's part in a move when it begins: the source owns the range and is open, the target is neither."""

    move: Move
    tables: Sequence[Table]
    is_source: bool

    @property
    def peer(self) -> str:
        return self.move.target if self.is_source else self.move.source

    @property
    def standing(self) -> Standing:
        return Standing.OWNER if self.is_source else Standing.MIRROR


def state_sequence(move_id: str) -> sql.Identifier:
    return sql.Identifier("shardmove", f"state_{move_id}")


def journal(move_id: str, ordinal: int) -> sql.Identifier:
    return sql.Identifier("shardmove", f"journal_{move_id}_{ordinal}")


def capture_function(move_id: str, ordinal: int) -> sql.Identifier:
    return sql.Identifier("shardmove", f"capture_{move_id}_{ordinal}")


def trigger_prefix(move_id: str) -> str:
    return f"shardmove_{move_id}_"


def trigger(move_id: str, event: str) -> sql.Identifier:
    return sql.Identifier(trigger_prefix(move_id) + event.lower())


# --- whose objects they are (I8)


def hold_lease(connection: Connection, move_id: str, lease_number: int) -> None:
    """In the transaction of every change of objects: our number is the newest here, and the move has not ended here.

    The row is locked until the transaction ends: a takeover waits for it, or ends the session.

    Raises:
        LeaseLost: neither is changed, nor anything else by this transaction.
    """
    row = connection.execute(
        "SELECT number FROM shardmove.lease WHERE move_id = %s AND NOT has_ended FOR SHARE", (move_id,)
    ).fetchone()
    if row != (lease_number,):
        raise LeaseLost(f"move {move_id}: another coordinator has taken over, or the move has ended on this shard")


def has_ended(connection: Connection, move_id: str) -> bool:
    """The move's objects were taken off this shard, for good."""
    row = connection.execute("SELECT has_ended FROM shardmove.lease WHERE move_id = %s", (move_id,)).fetchone()
    return row == (True,)
