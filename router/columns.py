"""The columns of split tables, for INSERT and COPY that do not name theirs.

They are asked of a shard when a statement needs them first, and are then written into the statement: so the server puts
each value where the router took it to be, or refuses because the columns are others by now. Never the key in one place
for the router, and in another one for the server.

What was learnt is forgotten after DDL through this router, and when a server refuses such a statement; it is asked for
again after a while.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Final

import structlog

from router import placing
from router.opening import NoServer
from router.server import ServerError, ServerLost
from router.statements import Added
from router.statements.lexer import as_literal
from router.statements.tables import Columns
from shardmove.domain.moves import TableName
from shardmove.wire import messages

if TYPE_CHECKING:
    from router.greeting import ClientLogin
    from router.service import Router
    from router.session import Session

log = structlog.get_logger("shardmove.router")
AGE_MAX_S: Final = 60.0
ASKED_AGAIN_S: Final = 1.0
BOUND_S: Final = 5.0
STALE: Final = frozenset({"42601", "42703", "22P04"})
"""More values than columns, no such column, rows with more or fewer fields."""
_ROW: Final = ord("D")


class KnownColumns:
    """Attributes: by_table: what is known just now."""

    def __init__(self, router: Router) -> None:
        self.by_table: dict[TableName, Columns] = {}
        self._router = router
        self._asked: dict[TableName, tuple[float, ClientLogin]] = {}
        self._asking: dict[TableName, asyncio.Task[None]] = {}
        self._generation = 0

    def may_ask(self, tables: Sequence[TableName]) -> bool:
        """Not where a shard has just been asked: the answer would be the same."""
        return all(self._age_s(table) > ASKED_AGAIN_S for table in tables)

    def _age_s(self, table: TableName) -> float:
        return time.monotonic() - self._asked[table][0] if table in self._asked else inf

    async def learn(self, session: Session, tables: Sequence[TableName]) -> bool:
        """Asks a shard, as the session's user; several sessions ask once. The statement is looked at anew then."""
        router, began = self._router, time.monotonic()
        try:
            while router.is_paused and time.monotonic() - began < router.settings.hold_timeout_s:
                await router.next_view(placing.HELD_POLL_S)
            await asyncio.wait([self._begin(session.login, table) for table in tables])
        except asyncio.CancelledError:
            if session.is_closing:
                raise
        return True

    def _begin(self, login: ClientLogin, table: TableName) -> asyncio.Task[None]:
        task = self._asking.get(table)
        if task is None:
            task = self._asking[table] = self._router.in_background(self._ask(login, table))
            task.add_done_callback(lambda _: self._asking.pop(table, None))
        return task

    async def _ask(self, login: ClientLogin, table: TableName) -> None:
        columns: Columns | None = None
        try:
            async with asyncio.timeout(BOUND_S):
                generation = -1
                while generation != self._generation:  # else DDL came in between
                    generation = self._generation
                    columns = await self._read(login, table)
        except (NoServer, ServerError, ServerLost, TimeoutError) as error:
            log.warning("columns could not be asked for", table=str(table), error=str(error))
        self._asked[table] = time.monotonic(), login
        if columns == self.by_table.get(table):
            return
        if columns is None:
            del self.by_table[table]
        else:
            self.by_table[table] = columns
        self._router.plan_anew()

    async def _read(self, login: ClientLogin, table: TableName) -> Columns | None:
        """None where there is no such table, or where its names are such that clients' encodings matter."""
        router = self._router
        server = await placing.borrow(router.pool(router.owner_of(table), login), {})
        try:
            frames = await server.run(_query(table))
        finally:
            router.take_back(server, is_shared=True)
        rows = [messages.decode_data_row(frame[5:]) for frame in frames if frame[0] == _ROW]
        names = [(name or b"").decode("utf-8", "replace") for name, _ in rows]
        if not names or not all(name.isascii() for name in names):
            return None
        return Columns(
            tuple(names),
            frozenset(name for name, (_, is_generated) in zip(names, rows, strict=True) if is_generated == b"t"),
        )

    def forget(self) -> None:
        """They may be others now. Safe to repeat."""
        self._generation += 1
        self._asked.clear()
        if self.by_table:
            self.by_table.clear()
            self._router.plan_anew()

    def doubt(self) -> None:
        """A server refused what was written: they may be others; not where they have just been asked for."""
        if all(self._age_s(table) > ASKED_AGAIN_S for table in self.by_table):
            self.forget()

    def refresh(self) -> None:
        """Asks for those once more that are old."""
        for table in self.by_table:
            if self._age_s(table) > AGE_MAX_S:
                self._begin(self._asked[table][1], table)


def told_of(frame: bytes, added: Sequence[Added]) -> bytes:
    """A server's error about a statement that columns were put into, as one about the client's own text."""
    fields = frame[5:].split(b"\0")
    for at, field in enumerate(fields):
        if field[:1] == b"P" and field[1:].isdigit():
            fields[at] = b"P%d" % _as_said(int(field[1:]), added)
    return messages.message(b"E", b"\0".join(fields))


def _as_said(position: int, added: Sequence[Added]) -> int:
    """Positions count from 1. What is wrong in what was put in is told of the name before it."""
    before = shift = 0
    for each in added:
        before += max(0, min(each.length, position - each.position - shift))
        shift += each.length
    return position - before


def _query(table: TableName) -> bytes:
    schema, name = as_literal(table.schema), as_literal(table.name)
    return f"""
        SELECT a.attname, a.attgenerated <> ''
        FROM pg_catalog.pg_attribute a
        JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = {schema} AND c.relname = {name} AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY a.attnum
    """.encode()
