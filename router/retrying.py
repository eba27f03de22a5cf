"""A second try of a unit, unseen by the client: where a fence refused it, or a move's target did not answer a read.

It is possible as long as nothing of the unit was told: its replies are kept back (`Replies.hold_back`), and what was
sent is remembered (`Unit.remember`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from router import placing
from shardmove.wire import messages

if TYPE_CHECKING:
    from router.session import Session
    from router.units import Unit

FENCE_PREFIX = "shardmove:"
SERIALIZATION_FAILURE = "40001"


def may_retry(unit: Unit, frame: bytes) -> bool:
    """The error is a fence's, and the unit is whole, and remembered."""
    return unit.sent is not None and unit.is_complete and _is_fenced(frame)


def _is_fenced(frame: bytes) -> bool:
    if SERIALIZATION_FAILURE.encode() not in frame:
        return False
    fields = messages.error_fields(frame[5:])
    return fields.get("C") == SERIALIZATION_FAILURE and fields.get("M", "").startswith(FENCE_PREFIX)


async def retry(session: Session, unit: Unit) -> bool:
    """A fence refused it, and nothing of it was answered: once more, where the range is now."""
    session.router.stats.retried += 1
    await placing.move_on(session, unit)
    return await _again(session, unit)


async def _again(session: Session, unit: Unit) -> bool:
    assert unit.sent is not None
    session.replies.is_muted = False
    session.replies.kept = None
    session.replies.commits = 0
    session.prepared.described.clear()
    unit.waiting, unit.sent, unit.sent_bytes = unit.sent, [], 0
    unit.is_begun = unit.is_bound = False
    unit.acknowledged = 0
    return await session.place(unit)


# --- reads at the target of a move


def watch_target(session: Session, unit: Unit) -> None:
    """It gets some time to answer."""
    session.replies.hold_back()
    _watch(session, unit)


def _watch(session: Session, unit: Unit) -> None:
    patience_s = session.limits.target_patience_s
    session.watch = asyncio.get_running_loop().call_later(patience_s, _took_too_long, session, unit)


def _took_too_long(session: Session, unit: Unit) -> None:
    if session.writable.is_set() or session.unit is not unit:
        give_up_target(session, unit, "it took too long")
    else:  # it is the client that does not read
        _watch(session, unit)


def give_up_target(session: Session, unit: Unit, reason: str) -> bool:
    """A read at a move's target goes to the source instead, unless some of its answer was told already."""
    if session.unit is not unit or not unit.need.is_at_target or unit.stays_at_source or session.replies.kept is None:
        return False
    if unit.sent is None or session.task is not None or session.is_closing:
        return False
    session.router.give_up_target(unit.need, reason)
    unit.stays_at_source = True
    session.spawn(_read_at_source(session, unit))
    return True


async def _read_at_source(session: Session, unit: Unit) -> bool:
    placing.drop(session)
    session.firm = False
    return await _again(session, unit)
