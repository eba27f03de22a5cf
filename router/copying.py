"""COPY … FROM STDIN into a split table: its rows say which shard it goes to.

All rows of one COPY belong to one shard: a COPY is one transaction, and one that ended on a shard while it failed on
another would leave half of its rows. The statement begins where the session is, since the client sends no row before a
server has said which columns it takes; its first key takes it elsewhere where that is not the right shard. A row of
another shard fails the COPY, whole, wherever it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from router import asking, placing
from router.refusing import error_of
from router.statements import CopyKeys
from router.statements.values import Unreadable
from router.units import ANYWHERE, Kind, Need, Refusal, Unit
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.keys import Key
from shardmove.domain.routes import Route
from shardmove.wire import messages
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.session import Session

_DATA, _FAIL = b"df"


class CopyIn:
    """One COPY under way.

    Attributes:
        is_open: the shard that takes the rows is known, and takes them.
    """

    def __init__(self, session: Session, unit: Unit, need: Need) -> None:
        assert need.decision is not None
        assert need.decision.part is not None
        assert need.decision.part.copy is not None
        self.spec = need.decision.part.copy
        self.is_open = False
        self._session = session
        self._unit = unit
        assert unit.ask is not None
        facts = asking.facts(session, unit.ask[0])
        self._keys = CopyKeys(self.spec, facts, row_bytes_max=session.limits.message_bytes_max)
        self._first: Key | None = None
        self._shard: str | None = None
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._is_failing = False
        self._left: asyncio.Future[None] | None = None
        self._opened: asyncio.Future[None] | None = None

    async def begin(self) -> bool:
        """Says the statement where the session is."""
        self._unit.again = lambda: ANYWHERE
        await placing.attach(self._session, self._unit)
        self._session.send_waiting(self._unit)
        return not self._unit.is_complete

    def feed(self, frame: bytes) -> None:
        """CopyData, CopyDone or CopyFail of the client."""
        if self._is_failing:
            return
        try:
            self._look(frame)
        except Unreadable as error:
            self._fail(error.refusal)
            return
        except ShardmoveError as error:
            self._fail(Refusal("22P04", error.message, error.hint))
            return
        if self._is_failing:
            return
        if self.is_open:
            pass_on(self._session, frame)
            return
        self._early.append(frame)
        self._early_bytes += len(frame)
        if self._early_bytes > self._session.limits.message_bytes_max:
            self._fail(Refusal("54000", "the first row of the COPY is longer than [router] message_bytes_max"))
        elif self._shard is not None or frame[0] != _DATA:
            self._session.spawn(self._open())

    def _look(self, frame: bytes) -> None:
        """Every key in it belongs to the same shard as the first one."""
        if frame[0] == _FAIL:
            return
        rows = self._keys.feed(frame[5:]) if frame[0] == _DATA else self._keys.finish()
        for _, key in rows:
            if key is None:
                continue
            shard = self._route(key).shard
            if self._shard is None:
                self._shard, self._first = shard, key
            elif shard != self._shard:
                self._fail(
                    Refusal(
                        "0A000",
                        f"the rows of one COPY belong to one shard, and these belong to {self._shard} and {shard}",
                        "send the rows of each shard in a COPY of their own",
                    )
                )
                return

    def _route(self, key: Key) -> Route:
        known = self._session.router.known
        return known.routes[self.spec.keyspace].at(known.tables.keyspaces[self.spec.keyspace].place(key))

    def _need(self) -> Need:
        if self._first is None:
            return ANYWHERE
        route = self._route(self._first)
        return Need(Kind.ROUTED, route.shard, (route,), is_write=True)

    async def _open(self) -> bool:
        """The rows that came early, and all others, go to the shard of the first key."""
        session, unit = self._session, self._unit
        unit.again = self._need
        need = self._need()
        server = session.server
        if session.firm and server is not None and need.shard not in (None, server.shard):
            self._fail(placing.wrong_shard(server.shard, need))
            return not unit.is_complete
        if server is None or need.shard not in (None, server.shard) or placing.must_wait(session, need):
            await self._move_or_drop()
        session.settle(unit, self._need())
        self.is_open = True
        early, self._early = self._early, []
        for frame in early:
            pass_on(session, frame)
        return session.is_copying or not unit.is_complete

    async def _move_or_drop(self) -> None:
        """As _move. A cancel may come between any two of its words: the connection is in no known state then."""
        session = self._session
        try:
            await self._move()
        except asyncio.CancelledError:
            if (server := session.server) is not None:
                session.router.in_background(_cancelled(session.router.cancel_at(server)))
                placing.drop(session)
            raise

    async def _move(self) -> None:
        """Ends the COPY where it began, without a row, and says it again where it belongs; the client sees neither."""
        session, unit = self._session, self._unit
        loop = asyncio.get_running_loop()
        server = session.server
        assert server is not None
        if unit.sent is None:
            raise placing.Refused(Refusal("54000", "the COPY statement is too long to be sent to another shard"))
        said = [item for item in unit.sent if item.owed is not Owed.SYNC]
        self._left = loop.create_future()
        session.replies.is_muted = True
        server.send(messages.copy_fail("shardmove: its rows belong to another shard"))
        if not unit.is_simple:
            server.replies.sent(Owed.SYNC)
            server.send(messages.SYNC)
        await self._left
        await placing.leave(session, unit)
        unit.waiting, unit.sent, unit.sent_bytes, unit.is_begun, unit.failed = said, [], 0, False, False
        await placing.attach(session, unit)
        self._opened = loop.create_future()
        session.send_waiting(unit)
        if not unit.is_simple:
            assert session.server is not None
            session.server.send(messages.message(b"H"))
        await self._opened
        session.replies.is_muted = False

    def on_ready(self) -> None:
        """It ended where it began."""
        if self._left is not None and not self._left.done():
            self._left.set_result(None)
        elif self._opened is not None and not self._opened.done():
            self._opened.set_exception(placing.Refused(Refusal("XX000", "the COPY ended before its first row")))

    def on_copy_in(self) -> None:
        if self._opened is not None and not self._opened.done():
            self._opened.set_result(None)

    def on_error(self, frame: bytes) -> None:
        """The shard that the rows belong to refuses the statement that another one took."""
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(placing.Failed(frame))

    def on_server_lost(self, error: Exception) -> None:
        for waited in (self._left, self._opened):
            if waited is not None and not waited.done():
                waited.set_exception(error)

    def _fail(self, refusal: Refusal) -> None:
        """Makes the server fail the COPY; its error is replaced. What the client still sends of it is dropped."""
        session = self._session
        self._is_failing = True
        session.router.stats.refused += 1
        session.replies.replacement = error_of(refusal)
        pass_on(session, messages.copy_fail(refusal.message))


async def _cancelled(cancel: Awaitable[None]) -> None:
    """What the connection waits for, a lock maybe, would keep its backend long after the client's end is gone."""
    await cancel


def pass_on(session: Session, frame: bytes) -> None:
    """To the server that takes the rows. Whatever is no row ends the COPY."""
    if session.server is None:
        return
    session.server.send(frame)
    if frame[0] != _DATA:
        session.is_copying = False
        session.copy = None
        if session.unit is not None and session.unit.is_complete:
            session.is_blocked = True
