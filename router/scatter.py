"""One read on several shards: the union of their rows, in the order that was asked for.

    connect     to each shard, in one order for all clients, so that two of them never wait for each other
    open        Parse, Bind, Describe, Flush to all of them at once; BindComplete says that a shard's snapshot is taken
    look        the routes are still those that the parts were made for; else all is dropped, and begun again
    run         Execute, Sync; rows go to the client as they come, or merged

So each range is read on exactly one shard, its owner from before the first snapshot until after the last, and nothing
was sent to the client when that is found out. The snapshots are one for each shard: a transaction that writes on two
shards may be seen on one of them only.

A shard that is source or target of an unfinished move holds rows of somebody else: it is asked for those of its own
ranges only. So is every shard while the routes are not confirmed: a move may have begun.

Rows wait here while the client does not read, within a bound for each shard; beyond it the shard is not read.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from router import gathering, merging, placing
from router.gathering import Asked, Lent
from router.server import ServerError
from router.statements import Decision, Merge, restricted
from router.units import Kind, Need, Refusal, Unit
from shardmove.domain import points
from shardmove.domain.keys import KeyRange, merged
from shardmove.wire import messages
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.service import Known, Router
    from router.session import Session

_ROW, _DESCRIPTION, _NO_DATA, _BOUND, _ERROR, _PARAMETERS = b"DTn2Et"
_IMPOSSIBLE: Final = b"shardmove: nothing"
"""A statement that nobody has prepared."""
CLEANING_S = 5.0
CHUNK_ROWS = 256
"""So many rows are merged before they go to the client."""


async def carry_out(session: Session, unit: Unit, need: Need) -> bool:
    """Answers the unit. Raises Refused, Failed, NoServer, ServerError, ServerLost; what was answered then stays so."""
    rest = gathering.rest(unit)
    if rest is not None:
        return session.answered(unit, rest)
    asked = gathering.asked(unit)
    while True:
        plan = await _plan(session, unit)
        if plan is None:
            return await session.place(unit)
        read = _Read(session, asked, plan)
        try:
            await read.open()
            points.reach("scatter.after_snapshots")
            if plan == _plan_now(session, unit):
                assert unit.need.decision is not None
                assert unit.need.decision.merge is not None
                await read.run(unit.need.decision.merge)
                break
        except merging.Unmergeable as error:
            raise placing.Refused(Refusal("0A000", error.message, error.hint)) from None
        finally:
            await read.end()
        if time.monotonic() - unit.began > session.limits.hold_timeout_s:
            raise placing.Refused(
                Refusal("40001", "shardmove: the routes changed again and again while shards were read", "try again")
            )
    session.router.stats.scattered += 1
    return session.answered(unit, asked.behind_rows(session))


# --- which shard reads what


async def _plan(session: Session, unit: Unit) -> Mapping[str, bytes] | None:
    """The text for each shard, once nothing is held; None where one shard will do by now."""
    began = time.monotonic()
    while True:
        need = unit.need = session.asked_again(unit)
        if need.refusal is not None:
            raise placing.Refused(need.refusal)
        if need.kind is not Kind.SCATTER:
            return None
        if not need.is_held and not placing.must_wait(session, need):
            plan = _texts(session.router, unit, need)
            if plan is not None:
                return plan
        await placing.wait(session, unit, need, began)


def _plan_now(session: Session, unit: Unit) -> Mapping[str, bytes] | None:
    """As `_plan`, of this instant; None where it would have to wait, too."""
    need = session.asked_again(unit)
    if need.kind is not Kind.SCATTER or need.refusal is not None or need.is_held or placing.must_wait(session, need):
        return None
    return _texts(session.router, unit, need)


def _texts(router: Router, unit: Unit, need: Need) -> Mapping[str, bytes] | None:
    """None: the routes are too old to say which rows are whose. Raises Refused where they cannot be told apart."""
    assert unit.ask is not None
    assert need.decision is not None
    planned, part = unit.ask[0], need.decision.part
    assert part is not None
    is_fresh = router.is_fresh()
    moving = _in_moves(router.known, part.keyspaces)
    texts: dict[str, bytes] = {}
    for shard in sorted(need.decision.shards):
        if is_fresh and shard not in moving:
            texts[shard] = planned.text
        elif part.places is not None:
            texts[shard] = restricted(planned, _owned(router.known, part.keyspaces, shard))
        elif is_fresh:
            raise placing.Refused(_not_now(need.decision, moving[shard]))
        else:
            return None
    return texts


def _in_moves(known: Known, keyspaces: Iterable[str]) -> Mapping[str, str]:
    """The shards that may hold rows of another one, and the move that is why."""
    moves = [move for move in known.moves.values() if move.keyspace in keyspaces]
    return {shard: move.id for move in moves for shard in (move.source, move.target)}


def _owned(known: Known, keyspaces: Iterable[str], shard: str) -> dict[str, tuple[KeyRange, ...]]:
    return {
        name: merged(route.range for route in known.routes[name].routes if route.shard == shard) for name in keyspaces
    }


def _not_now(decision: Decision, move_id: str) -> Refusal:
    return Refusal(
        "0A000",
        f"move {move_id} is under way, and the statement cannot be told to leave out its copied rows",
        f"name a key in it, or wait until the move is completed; it reads {', '.join(decision.shards)}",
    )


# --- the parts


class _Part:
    """What one shard says. `changed` is set whenever there is something new."""

    def __init__(self, lent: Lent, changed: asyncio.Event, bytes_max: int) -> None:
        self.lent = lent
        self.server = lent.server
        self.rows: deque[bytes] = deque()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.statement = b""
        self.portal = b""
        self.is_running = False
        self.is_dropped = False
        self._changed = changed
        self._bytes_max = bytes_max
        self._bytes = 0
        self._is_bound = False
        self._parameters = b""
        self.done: asyncio.Future[list[bytes]]

    def open(self, asked: Asked, text: bytes) -> None:
        data, owed = asked.opening(text)
        # Execute and Sync are owed from the beginning: an error then is known to be hidden before they are sent
        data += messages.FLUSH
        self.done = self.server.exchange(data, [*owed, Owed.EXECUTE, Owed.SYNC], self._on_frame)
        self.done.add_done_callback(self._on_done)

    def run(self) -> None:
        self.is_running = True
        self.server.send(messages.execute(b"") + messages.SYNC)

    def drop(self) -> None:
        """Nobody wants its rows any more."""
        self.is_dropped = True
        self.rows.clear()
        self.server.set_reading(True)
        if not self.is_running and not self.done.done():
            self.server.send(messages.bind(b"", _IMPOSSIBLE) + messages.SYNC)  # instead of the Execute: it fails

    @property
    def is_over(self) -> bool:
        """All its rows are here. Raises what went wrong."""
        if not self.done.done():
            return False
        self.check()
        return True

    def check(self) -> None:
        if self.done.done() and (error := self.done.exception()) is not None:
            raise placing.Failed(error.frame) if isinstance(error, ServerError) else error

    def take(self) -> deque[bytes]:
        rows, self.rows = self.rows, deque()
        self._bytes = 0
        self.server.set_reading(True)
        return rows

    def pop(self) -> bytes:
        row = self.rows.popleft()
        self._bytes -= len(row)
        if self._bytes * 2 < self._bytes_max:
            self.server.set_reading(True)
        return row

    def _on_frame(self, kind: int, frame: bytes) -> None:
        if kind == _ROW:
            self._on_row(frame)
        elif kind == _BOUND:
            self._is_bound = True
        elif kind == _PARAMETERS:
            self._parameters = frame
        elif kind in (_DESCRIPTION, _NO_DATA):
            if not self._is_bound:
                self.statement = self._parameters + frame
                return
            self.portal = frame
            if not self.opened.done():
                self.opened.set_result(None)
        elif kind == _ERROR:
            self._fail(placing.Failed(frame))

    def _on_row(self, frame: bytes) -> None:
        if self.is_dropped:
            return
        self.rows.append(frame)
        self._bytes += len(frame)
        if self._bytes > self._bytes_max:
            self.server.set_reading(False)
        self._changed.set()

    def _on_done(self, done: asyncio.Future[list[bytes]]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._fail(error)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # whoever asked may be gone: not worth a warning


class _Read:
    """The parts of one read."""

    def __init__(self, session: Session, asked: Asked, plan: Mapping[str, bytes]) -> None:
        self._session = session
        self._asked = asked
        self._plan = plan
        self._parts: list[_Part] = []
        self._changed = asyncio.Event()
        self._left: int | None = None

    async def open(self) -> None:
        """Returns when every shard's snapshot is taken. No row was made so far."""
        bytes_max = max(1, self._session.limits.buffer_bytes // len(self._plan))
        lent: list[Lent] = []
        try:
            for shard in self._plan:
                lent.append(await gathering.take(self._session, shard))
        except BaseException:
            for each in lent:
                gathering.give_back(self._session, each)
            raise
        self._parts = [_Part(each, self._changed, bytes_max) for each in lent]
        for part in self._parts:
            part.open(self._asked, self._plan[part.server.shard])
        await asyncio.gather(*(part.opened for part in self._parts))

    async def run(self, merge: Merge) -> None:
        """Raises Refused before a row is made, Unmergeable, Failed and ServerLost at any time."""
        key = self._key(merge)
        self._left = merge.limit
        first = self._parts[0]
        for part in self._parts:
            part.run()
        self._session.tell(self._asked.before_rows(self._session, first.statement, first.portal))
        sent = await (self._merged(key) if key is not None else self._united())
        for part in self._parts:
            await self._await(part)
        self._session.tell(messages.command_complete(b"SELECT %d" % sent))

    def _key(self, merge: Merge) -> merging.RowKey | None:
        session = self._session
        columns = [_columns(part.portal) for part in self._parts]
        if any([column.name for column in each] != [column.name for column in columns[0]] for each in columns):
            raise placing.Refused(
                Refusal("42P13", "the shards' results have different columns", "make the tables equal on all shards")
            )
        if not merge.order:
            return None
        parameters = session.variables.reported
        settings = merging.Settings(
            is_iso=parameters.get(b"DateStyle", b"").startswith(b"ISO"),
            is_server_encoding=parameters.get(b"client_encoding") == parameters.get(b"server_encoding"),
        )
        return merging.row_key(merge.order, columns[0], settings)

    async def _united(self) -> int:
        sent = 0
        while True:
            self._changed.clear()
            is_over = [part.is_over for part in self._parts]  # before the rows are taken: none comes behind it
            for part in self._parts:
                rows = self._within_limit(part.take())
                sent += len(rows)
                await self._tell(rows)
            if all(is_over):
                return sent
            if self._left == 0:
                for part in self._parts:
                    part.drop()
            await self._changed.wait()

    async def _merged(self, key: merging.RowKey) -> int:
        heap: list[tuple[Any, int]] = []
        sent = 0
        out: list[bytes] = []
        waiting = list(range(len(self._parts)))
        while True:
            for at in waiting:
                if await self._has_row(self._parts[at]):
                    heapq.heappush(heap, (key(messages.decode_data_row(self._parts[at].rows[0][5:])), at))
            if not heap or self._left == 0:
                break
            at = heapq.heappop(heap)[1]
            out += self._within_limit([self._parts[at].pop()])
            waiting = [at]
            if len(out) >= CHUNK_ROWS or not self._parts[at].rows:
                sent += len(out)
                await self._tell(out)
                out = []
        for part in self._parts:
            part.drop()
        await self._tell(out)
        return sent + len(out)

    def _within_limit(self, rows: Iterable[bytes]) -> list[bytes]:
        found = list(rows)
        if self._left is not None:
            found = found[: self._left]
            self._left -= len(found)
        return found

    async def _has_row(self, part: _Part) -> bool:
        while not part.rows:
            self._changed.clear()
            if part.is_over:
                return bool(part.rows)
            for each in self._parts:
                each.check()
            await self._changed.wait()
        return True

    async def _await(self, part: _Part) -> None:
        while not part.is_over:
            self._changed.clear()
            await self._changed.wait()

    async def _tell(self, rows: list[bytes]) -> None:
        """To the client, no faster than it reads."""
        if rows:
            self._session.tell(b"".join(rows))
            await self._session.writable.wait()

    async def end(self) -> None:
        """Gives the connections back; what they still do is cancelled first. For a client that is gone: later."""
        parts, self._parts = self._parts, []
        for part in parts:
            part.drop()
        stopping = [self._session.router.in_background(_stop(self._session, part)) for part in parts]
        if stopping and not self._session.is_closing:
            await asyncio.wait(stopping)


async def _stop(session: Session, part: _Part) -> None:
    """Until the shard has nothing more to say; where that takes too long the connection is closed."""
    try:
        if not part.done.done():
            async with asyncio.timeout(CLEANING_S):
                if part.is_running:
                    await session.router.cancel_at(part.server)
                await asyncio.wait([part.done])
    except TimeoutError:
        pass
    finally:
        gathering.give_back(session, part.lent)


def _columns(description: bytes) -> tuple[messages.Column, ...]:
    return messages.decode_row_description(description[5:]) if description[0] == _DESCRIPTION else ()
