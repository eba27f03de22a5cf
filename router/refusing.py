"""An error of the router's own, in the place of a reply.

Where a server is attached it is made to fail, too, by a message that cannot succeed: its error is replaced, and the
transaction's state is the server's in every case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router import placing
from router.units import ANYWHERE, Item, Refusal
from shardmove.domain.errors import ShardmoveError
from shardmove.wire import messages
from shardmove.wire.messages import IDLE, IN_TRANSACTION
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.session import Session
    from router.units import Unit

IMPOSSIBLE = b"shardmove: refused"
"""A name that no statement and no savepoint has: asking for it makes the server refuse."""


def error_of(refusal: Refusal, *, severity: str = "ERROR") -> bytes:
    return messages.error_response(refusal.sqlstate, refusal.message, severity=severity, hint=refusal.hint)


def refuse(session: Session, unit: Unit, refusal: Refusal | bytes) -> None:
    """An error in the reply's place. Where a server is attached, it fails too: its state is the client's."""
    session.router.stats.refused += 1
    error = refusal if isinstance(refusal, bytes) else error_of(refusal)
    if session.server is not None:
        _poison(session, unit, error)
    elif session.status == IN_TRANSACTION:
        unit.again = lambda: ANYWHERE  # the block is open and no shard knows: it begins somewhere, and fails there
        session.spawn(_fail_somewhere(session, unit, error))
    else:
        _refuse_alone(session, unit, error)


def fail_in_place(session: Session, unit: Unit, refusal: Refusal) -> None:
    """As refuse, where earlier messages of the unit are to have their effect."""
    if session.server is None and session.status == IDLE and len(unit.waiting) > 1:
        session.router.stats.refused += 1
        session.spawn(_fail_somewhere(session, unit, error_of(refusal)))
    else:
        refuse(session, unit, refusal)


async def _fail_somewhere(session: Session, unit: Unit, error: bytes) -> bool:
    try:
        await placing.attach(session, unit)
    except (ShardmoveError, placing.Refused) as trouble:
        if session.status == IDLE and session.server is None:
            _refuse_alone(session, unit, error)
            return True
        session.tell(error)
        session.fatal("08006", f"the transaction was given up: {trouble}")
        return False
    _poison(session, unit, error)
    return not unit.is_complete


def _refuse_alone(session: Session, unit: Unit, error: bytes) -> None:
    session.prepared.take_back(unit, -unit.acknowledged)
    session.router.stats.errors += 1
    if unit.is_simple or unit.is_complete:
        session.unit = None
        session.say(error, session.status)
    else:
        session.tell(error)
        session.is_skipping = True


def _poison(session: Session, unit: Unit, error: bytes) -> None:
    """Makes the server fail where the refused message would have stood; its error is replaced."""
    if unit.is_simple:
        before = [item for item in unit.waiting if item.owed not in (Owed.QUERY, Owed.CALL)]
        refused = Item(Owed.QUERY, messages.query(b'ROLLBACK TO SAVEPOINT "' + IMPOSSIBLE + b'"'))
        unit.waiting = [*before, refused]
        session.replies.replacement = error
        unit.is_complete = True
    else:
        ends = [item for item in unit.waiting if item.owed is Owed.SYNC]
        if unit.is_complete and not ends:
            ends = [Item(Owed.SYNC, messages.SYNC)]  # the client's own was sent, and answered, before a second try
        before = [item for item in unit.waiting if item.owed is not Owed.SYNC]
        if before and before[-1].owed in (Owed.BIND, Owed.POISON):
            before.pop()  # the refused one
        unit.waiting = [*before, Item(Owed.POISON, messages.bind(b"", IMPOSSIBLE, ())), *ends]
        session.replies.poisons.append(error)
    if unit.is_complete:
        session.is_blocked = True
    session.send_waiting(unit)
