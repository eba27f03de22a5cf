"""A unit on its way: to the one shard that it needs, at once where nothing has to be waited for, or to several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router import everywhere, placing, scatter
from router.copying import CopyIn
from router.refusing import refuse
from router.units import Kind, Refusal

if TYPE_CHECKING:
    from router.session import Session
    from router.units import Need, Unit

_ALONE = "send it alone: one Bind and one Execute before the Sync, outside of a transaction block"
_SLOW_KINDS = frozenset({Kind.EVERYWHERE, Kind.SCATTER, Kind.COPY_IN})


def proceed(session: Session, unit: Unit, need: Need) -> None:
    """Attaches what the statement needs, and sends what waits: at once where nothing has to be waited for."""
    if need.refusal is not None:
        refuse(session, unit, need.refusal)
        return
    if need.notice:
        session.tell(need.notice)
    if need.kind in _SLOW_KINDS:
        _gather(session, unit, need)
        return
    server = session.server
    if server is None:
        server = placing.at_once(session, unit, need)
        if server is None:
            session.spawn(session.place(unit))
            return
    elif need.shard is not None and need.shard != server.shard:
        if session.firm or unit.is_bound:
            refuse(session, unit, placing.wrong_shard(server.shard, need))
        else:
            session.spawn(session.place(unit))
        return
    elif not session.firm and placing.must_wait(session, need):
        session.spawn(session.place(unit))
        return
    session.settle(unit, need)
    unit.is_begun = True
    if unit.is_complete:
        session.is_blocked = True
        session.send_waiting(unit)


def _gather(session: Session, unit: Unit, need: Need) -> None:
    """What several shards answer is answered whole; a COPY begins at once."""
    if (session.firm or unit.is_bound) and need.kind is not Kind.COPY_IN:
        refuse(session, unit, Refusal("0A000", "a statement for several shards cannot follow another one", _ALONE))
    elif need.kind is Kind.COPY_IN or (unit.is_complete and not unit.is_begun):
        session.spawn(carry_out(session, unit, need))
    else:
        unit.is_gathering = True
        if unit.is_begun:
            session.spawn(_leave(session, unit))


async def _leave(session: Session, unit: Unit) -> bool:
    await placing.leave(session, unit)
    return True


async def carry_out(session: Session, unit: Unit, need: Need) -> bool:
    """What is not one shard's: several at once, or a COPY whose rows decide."""
    if need.kind is Kind.COPY_IN:
        session.copy = CopyIn(session, unit, need)
        return await session.copy.begin()
    if need.kind is Kind.EVERYWHERE:
        return await everywhere.carry_out(session, unit, need)
    return await scatter.carry_out(session, unit, need)
