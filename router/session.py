"""One client: cuts its stream into units, sends each to the shard that its statements need, and gives back the replies.

    the client says              the router
    ---------------------------  ------------------------------------------------------------------------------------
    BEGIN                        answers itself; no shard is known yet
    a statement with a key       attaches a connection to the key's shard, says what is owed to it (settings, BEGIN,
                                 savepoints), then the statement
    another one in it            the same shard: passed on; another shard: refused, by an error of the server's own
                                 making (a message that must fail) whose text is replaced, so that the transaction's
                                 state is the server's in every case
    a statement without one      where the transaction is, else where the session was last; the transaction *floats*:
                                 a key may still take it to another shard, where what it said is said again
    ReadyForQuery says I         the connection is free: for this client (session pooling) or for any (transaction)

Everything on the way of an ordinary statement happens inside `data_received`: no task, no await. What has to wait (for
a connection, a hold, a setting to be carried over) runs in one task at most, while the client's further bytes wait too.

Transaction state comes from ReadyForQuery alone, never from SQL.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from router import everywhere, placing, scatter
from router.copying import CopyIn
from router.greeting import address_of
from router.opening import NoServer
from router.server import Server, ServerError, ServerLost
from router.statements import Action, Facts, Hint, Planned
from router.units import ANYWHERE, FLOATING, Change, Item, Kind, Need, Portal, Refusal, Statement, Unit, surviving
from shardmove.domain.errors import ShardmoveError
from shardmove.wire import messages
from shardmove.wire.messages import ProtocolViolation
from shardmove.wire.streams import HIDDEN, Owed

if TYPE_CHECKING:
    from router.cancel import BackendKey
    from router.greeting import ClientLogin
    from router.service import Router

log = structlog.get_logger("shardmove.router")
IDLE, IN_TRANSACTION, FAILED = b"ITE"
GONE_TEXT = b'DEALLOCATE "shardmove: gone"'
READY = {status: messages.ready_for_query(bytes([status])) for status in (IDLE, IN_TRANSACTION, FAILED)}
FENCE_PREFIX = "shardmove:"
SERIALIZATION_FAILURE = "40001"
IMPOSSIBLE = b"shardmove: refused"
"""A name that no statement and no savepoint has: asking for it makes the server refuse."""


class Session(asyncio.Protocol):
    """A client that has logged in.

    Attributes:
        status: what the client was told last: I, T or E.
        server: the connection that the unit or transaction under way runs on.
        servers: by shard, the connections that this client keeps (session pooling).
        settings: what the client set for its session: the statement for each name.
        initial: those of its startup packet.
        firm: the transaction has had an effect, or a key: it stays where it is.
        replay: what the transaction said so far that has to be said again where it moves to.
        touched: moves whose range the transaction wrote to.
    """

    def __init__(
        self, router: Router, transport: asyncio.Transport, login: ClientLogin, leftover: bytes, key: BackendKey
    ) -> None:
        self.router = router
        self.transport = transport
        self.user = login.user
        self.database = login.database
        self.login = login
        self.pid = key.pid
        self.secret = key.secret
        self.address = address_of(transport)
        self.since = time.monotonic()
        self.limits = router.settings
        self.keeps_servers = router.settings.pooling == "session"
        self.status = IDLE
        self.server: Server | None = None
        self.servers: dict[str, Server] = {}
        self.last_shard: str | None = None
        self.settings: dict[str, bytes] = {}
        self.initial: dict[str, bytes] = {}
        self.parameters: dict[bytes, bytes] = {}
        self.statements: dict[bytes, Statement] = {}
        self.portals: dict[bytes, Portal] = {}
        self.unit: Unit | None = None
        self.firm = False
        self.replay: list[bytes] = []
        self.touched: set[str] = set()
        self.facts = Facts()
        self.lot = (key.pid * 2654435761 % 2**32) / 2**32
        self.hints: dict[str, str] = {}
        self.is_blocked = True
        self.is_closing = False
        self.held_bytes = 0
        self.copy: CopyIn | None = None
        self._is_skipping = False
        self.is_copying = False
        self._is_sync_last = False
        self._is_before_copy = False
        self._rolled_back = False
        self._pending_changes: list[Change] = []
        self._kept: list[bytes] | None = None
        self._kept_bytes = 0
        self.is_muted = False
        self._is_told = False
        self._poisons: list[bytes] = []
        self._replacement: bytes | None = None
        self._described: deque[Statement] = deque()
        self._waiting: list[bytes] = [leftover] if leftover else []
        self._waiting_bytes = len(leftover)
        self._missing = 0
        self._is_reading = True
        self._task: asyncio.Task[None] | None = None
        self.is_held = False
        self._watch: asyncio.TimerHandle | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        router.add_session(self)
        self.spawn(self._start())

    # --- for whoever looks

    @property
    def state(self) -> str:
        if self.is_held:
            return "held"
        if self._task is not None:
            return "waiting"
        if self.unit is not None:
            return "active"
        return "idle" if self.status == IDLE else "in transaction"

    @property
    def shard(self) -> str | None:
        return self.server.shard if self.server is not None else None

    # --- asyncio

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closing = True
        self.router.remove_session(self)
        if self._task is not None:
            self._task.cancel()
        kept = set(self.servers.values())
        for server in kept | ({self.server} if self.server is not None else set()):
            self.router.take_back(server, is_shared=not self.keeps_servers and server not in kept)
        self.servers = {}
        self.server = None

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.writable.clear()
        if self.server is not None:
            self.server.transport.pause_reading()

    def resume_writing(self) -> None:
        self.writable.set()
        if self.server is not None:
            self.server.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.router.stats.bytes_in += len(data)
        if self._waiting or self.is_blocked:
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            if self.is_blocked:
                if self._waiting_bytes > self.limits.buffer_bytes:
                    self._read(False)
                return
            if self._waiting_bytes < self._missing:
                return
            data = self._take_waiting()
        self._advance(data)

    def _take_waiting(self) -> bytes:
        data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting = []
        self._waiting_bytes = self._missing = 0
        return data

    def _read(self, is_reading: bool) -> None:
        if self._is_reading != is_reading and not self.is_closing:
            self._is_reading = is_reading
            if is_reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # --- the client's messages

    def _advance(self, data: bytes) -> None:
        """Handles whole messages as long as nothing has to be waited for; the rest waits."""
        at, size, missing = 0, len(data), 5
        try:
            while not self.is_blocked and not self.is_closing and size - at >= 5:
                end = at + 1 + int.from_bytes(data[at + 1 : at + 5], "big")
                if end > size or end < at + 5:
                    missing = self._checked_length(data[at], end - at - 1)
                    break
                handler = _HANDLERS.get(data[at])
                if handler is None:
                    raise ProtocolViolation(f"there is no message {chr(data[at])!r}")
                if self.is_copying and data[at] not in _IN_COPY:
                    handler = Session._break_copy
                elif handler is Session._on_copy and not self.is_copying and self._may_begin_copy():
                    break
                handler(self, data[at:end])
                at = end
            self._send_begun()
        except ProtocolViolation as error:
            self.fatal(error.sqlstate, error.message, hint=error.hint)
            return
        if at < size:
            self._waiting = [data[at:]] if at else [data]
            self._waiting_bytes = size - at
            self._missing = missing
            if self.is_blocked and self._waiting_bytes > self.limits.buffer_bytes:
                self._read(False)

    def _send_begun(self) -> None:
        """What came in one piece goes out in one piece."""
        unit = self.unit
        if unit is not None and unit.is_begun and unit.waiting and self.server is not None and not self.is_blocked:
            self.send_waiting(unit)

    def _checked_length(self, kind: int, length: int) -> int:
        if length < 4:
            raise ProtocolViolation(f"a message {chr(kind)!r} of length {length}")
        if length > self.limits.message_bytes_max:
            raise messages.MessageTooLarge(
                f"a message of {length} bytes is above the router's limit of {self.limits.message_bytes_max}",
                hint="raise [router] message_bytes_max, or send it in parts",
            )
        return length + 1

    def resume(self) -> None:
        """The unit is done, or what was waited for is there: on with what the client has sent meanwhile."""
        self.is_blocked = False
        if self._waiting:
            self._advance(self._take_waiting())
        if not self.is_blocked:
            self._read(True)

    @property
    def _ignores(self) -> bool:
        """After an error everything up to the next Sync counts for nothing, a simple query too."""
        return self._is_skipping or (self.unit is not None and self.unit.failed)

    def _on_query(self, frame: bytes) -> None:
        if self._ignores:
            return
        self.router.stats.queries += 1
        text = messages.decode_query(frame[5:])
        planned = self.router.plan(text)
        unit = self._open_unit()
        unit.ask, unit.is_simple = (planned, None), True
        need = unit.need = self._decide(unit)
        unit.needs.append(need)
        unit.is_complete = True
        if self.server is None and not unit.is_begun and not unit.waiting and self._answer_alone(need):
            self.unit = None
            return
        if need.kind is Kind.FREE and need.tag:
            unit.waiting.append(_GONE)
            frame = messages.query(GONE_TEXT)
        unit.waiting.append(Item(Owed.QUERY, frame))
        self.statements.pop(b"", None)
        self._proceed(unit, need)

    def _answer_alone(self, need: Need) -> bool:
        """BEGIN, and the end of a transaction that no shard has seen yet."""
        if need.kind is Kind.BEGIN and self.status == IDLE and need.replayed is not None:
            self.replay = [need.replayed]
            self._say(messages.command_complete(need.tag), IN_TRANSACTION)
            return True
        if need.kind is Kind.END and self.status == IN_TRANSACTION:
            self.replay = []
            self._say(messages.command_complete(need.tag), IDLE)
            return True
        if need.kind is Kind.FREE and need.tag:  # DEALLOCATE of a name that only we know
            self.statements.pop(need.changes[0].name.encode(), None)
            self._say(messages.command_complete(need.tag), self.status)
            return True
        return False

    def _on_parse(self, frame: bytes) -> None:
        if self._ignores:
            return
        name, text, oids = messages.decode_parse(frame[5:])
        unit = self._open_unit()
        before = self.statements.get(name)
        if before is not None and name and self._fails_there(before, text):
            unit.parsed.append((name, before))
            unit.waiting.append(Item(Owed.PARSE, frame))
            return
        if before is not None and name:
            unit.waiting.append(Item(Owed.POISON, frame))
            self._fail_in_place(unit, Refusal("42P05", f'prepared statement "{_text(name)}" already exists'))
            return
        statement = self.router.statement(name, text, oids)
        if not self.keeps_servers and self._deallocates(statement):
            gone = self.router.statement(name, GONE_TEXT, oids)
            statement = Statement(name, GONE_TEXT, oids, statement.planned, gone.alias)
            frame = messages.parse(name, GONE_TEXT, oids)
        self.statements[name] = statement
        unit.parsed.append((name, before))
        unit.waiting.append(Item(Owed.PARSE, frame, statement))

    def _fails_there(self, known: Statement, text: bytes) -> bool:
        """The server refuses a Parse of this known name by itself: for the name, or for something before that."""
        if self.server is None:
            return False
        if self.keeps_servers:
            return self.server.statements.get(known.name) is known
        return self.status == FAILED and not self._may_end(self.router.plan(text))

    @staticmethod
    def _may_end(planned: Planned) -> bool:
        """Whether a failed transaction takes it: its end, or that of a part of it."""
        return any(part.action in _ENDING for part in planned.plan.parts)

    def _deallocates(self, statement: Statement) -> bool:
        """A name that has another one on connections which several clients share."""
        part = statement.planned.plan.parts[0]
        return part.action is Action.DEALLOCATE and part.name.encode() in self.statements

    def _on_bind(self, frame: bytes) -> None:
        if self._ignores:
            return
        bind = messages.decode_bind(frame[5:])
        unit = self._open_unit()
        statement = self.statements.get(bind.statement)
        if unit.is_gathering:
            unit.waiting.append(Item(Owed.BIND, frame, statement))  # refused when the unit is answered
            return
        if statement is None:
            self.portals.pop(bind.portal, None)
            unit.waiting.append(Item(Owed.BIND, frame))
            return
        unit.ask = (statement.planned, self.router.arguments(bind, statement.types))
        need = self._decide(unit)
        self.portals[bind.portal] = Portal(statement, need)
        unit.waiting.append(Item(Owed.BIND, frame, statement))
        if need.kind in FLOATING and need.shard is None and need.refusal is None:
            return
        unit.need = need
        self._proceed(unit, need)

    def _on_describe(self, frame: bytes) -> None:
        if self._ignores:
            return
        kind, name = messages.decode_describe(frame[5:])
        unit = self._open_unit()
        if kind == b"S":
            unit.waiting.append(Item(Owed.DESCRIBE_STATEMENT, frame, self.statements.get(name)))
        else:
            unit.waiting.append(Item(Owed.DESCRIBE_PORTAL, frame))

    def _on_execute(self, frame: bytes) -> None:
        if self._ignores:
            return
        self.router.stats.queries += 1
        portal, _ = messages.decode_execute(frame[5:])
        unit = self._open_unit()
        if (known := self.portals.get(portal)) is not None:
            unit.needs.append(known.need)
            if known.need.tag and known.need.kind is Kind.FREE:
                unit.waiting.append(_GONE)
        unit.waiting.append(Item(Owed.EXECUTE, frame))

    def _on_close(self, frame: bytes) -> None:
        if self._ignores:
            return
        kind, name = messages.decode_close(frame[5:])
        unit = self._open_unit()
        statement = None
        if kind == b"S":
            statement = self.statements.pop(name, None)
            unit.parsed.append((name, statement))
        else:
            self.portals.pop(name, None)
            unit.parsed.append((b"", self.statements.get(b"")))  # no change: it takes its place among those that are
        unit.waiting.append(Item(Owed.CLOSE, frame, statement))

    def _on_flush(self, frame: bytes) -> None:
        unit = self.unit
        if self._ignores or self.is_copying or unit is None:
            return
        unit.waiting.append(Item(None, frame))
        if unit.is_gathering:
            self.spawn(self._carry_out(unit, unit.need))
            return
        if not unit.is_begun:
            self._proceed(unit, unit.need)
        self._answer_now()

    def _on_sync(self, frame: bytes) -> None:
        if self.is_copying:
            self._is_sync_last = True  # ignored in copy-in mode, by the server too, unless it failed meanwhile
            return
        if self._is_skipping:
            self._is_skipping = False
            self.unit = None
            self._say(b"", self.status)
            return
        unit = self.unit
        if unit is None and self.server is None:
            self._say(b"", self.status)
            return
        if unit is None:  # a simple query may have left a transaction of the messages before it: its server ends it
            unit = self._open_unit()
            unit.is_begun = True
        unit.waiting.append(Item(Owed.SYNC, frame))
        unit.is_complete = True
        if self.touched and self._kept is None and unit.is_begun:
            self._hold_back()
        if unit.is_begun:
            self.is_blocked = True
            self.send_waiting(unit)
        else:
            self._proceed(unit, unit.need)

    def _on_call(self, frame: bytes) -> None:
        if self._ignores:
            return
        unit = self._open_unit()
        unit.need = Need(Kind.ROUTED, shard=self.router.home, is_write=True)
        unit.needs.append(unit.need)
        unit.waiting.append(Item(Owed.CALL, frame))
        unit.is_complete = unit.is_simple = True
        self._proceed(unit, unit.need)

    def _on_copy(self, frame: bytes) -> None:
        """CopyData, CopyDone, CopyFail. After an error they come late, and are nobody's: dropped, as by the server."""
        if not self.is_copying:
            return
        self._is_sync_last = False
        if self.copy is not None:
            self.copy.feed(frame)
        else:
            self.pass_copy(frame)

    def pass_copy(self, frame: bytes) -> None:
        """To the server that takes the rows."""
        if self.server is not None:
            self.server.send(frame)
            if frame[0] != ord("d"):
                self._end_copy()

    def fail_copy(self, refusal: Refusal) -> None:
        """Makes the server fail the COPY; its error is replaced. What the client still sends of it is dropped."""
        self.router.stats.refused += 1
        self._replacement = _error(refusal)
        self.pass_copy(messages.copy_fail(refusal.message))

    def _end_copy(self) -> None:
        self.is_copying = False
        self.copy = None
        if self.unit is not None and self.unit.is_complete:
            self.is_blocked = True

    def _may_begin_copy(self) -> bool:
        """Rows came before the server asked for them: whether it will, or drops them, its next replies say."""
        unit, server = self.unit, self.server
        if unit is None or unit.failed or not unit.is_begun or server is None:
            return False
        if not unit.waiting and server.replies.is_empty:
            return False
        unit.waiting.append(Item(None, messages.FLUSH))
        self.send_waiting(unit)
        if server.replies.is_empty:
            return False
        self.is_blocked = self._is_before_copy = True
        return True

    def _break_copy(self, frame: bytes) -> None:
        """A statement where rows were due: the server fails the COPY for it, and drops it."""
        self.pass_copy(frame)

    def _on_terminate(self, _frame: bytes) -> None:
        self.is_closing = True
        self.transport.close()

    # --- where to

    def _open_unit(self) -> Unit:
        if self.unit is None:
            self.unit = Unit()
            self.is_muted = False
        return self.unit

    def _decide(self, unit: Unit) -> Need:
        assert unit.ask is not None
        if self.status == FAILED and unit.ask[0].plan.parts[0].action is not Action.SAVEPOINT:
            return ANYWHERE  # the server refuses everything but the end of the transaction, and knows what that is
        return self.router.decide(*unit.ask, self)

    def asked_again(self, unit: Unit) -> Need:
        """Where the unit has to go by the routes as they are now."""
        if unit.again is not None:
            return unit.again()
        return unit.need if unit.ask is None else self._decide(unit)

    def _proceed(self, unit: Unit, need: Need) -> None:
        """Attaches what the statement needs, and sends what waits: at once where nothing has to be waited for."""
        if need.refusal is not None:
            self._refuse(unit, need.refusal)
            return
        if need.notice:
            self._write(need.notice)
        if need.kind in _SLOW_KINDS:
            self._gather(unit, need)
            return
        server = self.server
        if server is None:
            server = placing.at_once(self, unit, need)
            if server is None:
                self.spawn(self.place(unit))
                return
        elif need.shard is not None and need.shard != server.shard:
            if self.firm or unit.is_bound:
                self._refuse(unit, placing.wrong_shard(server.shard, need))
            else:
                self.spawn(self.place(unit))
            return
        elif not self.firm and placing.must_wait(self, need):
            self.spawn(self.place(unit))
            return
        self.settle(unit, need)
        unit.is_begun = True
        if unit.is_complete:
            self.is_blocked = True
            self.send_waiting(unit)

    def _gather(self, unit: Unit, need: Need) -> None:
        """What several shards answer is answered whole; a COPY begins at once."""
        if (self.firm or unit.is_bound) and need.kind is not Kind.COPY_IN:
            self._refuse(unit, Refusal("0A000", "a statement for several shards cannot follow another one", _ALONE))
        elif need.kind is Kind.COPY_IN or (unit.is_complete and not unit.is_begun):
            self.spawn(self._carry_out(unit, need))
        else:
            unit.is_gathering = True
            if unit.is_begun:
                self.spawn(self._leave(unit))

    async def _leave(self, unit: Unit) -> bool:
        await placing.leave(self, unit)
        return True

    def settle(self, unit: Unit, need: Need) -> None:
        """The unit runs where `self.server` is."""
        if need.kind not in FLOATING:
            self.router.stats.routed += 1
            is_first = not self.firm and not unit.is_bound and self._is_all_answered(unit)
            self.firm = unit.is_bound = True
            if need.is_at_target and is_first and unit.sent is not None:
                self._hold_back()
                patience_s = self.limits.target_patience_s
                loop = asyncio.get_running_loop()
                self._watch = loop.call_later(patience_s, self._give_up_target, unit, "it took too long")
            if need.is_write:
                for route in need.routes:
                    if route.move_id is not None:
                        self.touched.add(route.move_id)
                if is_first and unit.sent is not None:
                    self._hold_back()
        if self.touched and unit.is_complete and self._kept is None:
            self._hold_back()  # whether a commit is told late is decided when it is there

    def _hold_back(self) -> None:
        """Replies wait until it is clear that there will be no second try."""
        self._kept = []
        self._kept_bytes = 0

    async def _attach_at_target(self, unit: Unit) -> None:
        """At the source, where the target of the move has no connection for it."""
        try:
            async with asyncio.timeout(self.limits.target_patience_s):
                await placing.attach(self, unit)
        except (NoServer, ServerLost, TimeoutError) as error:
            self.router.give_up_target(unit.need, str(error) or "no connection in time")
            unit.stays_at_source = True
            self._drop_server()
            await placing.attach(self, unit)

    def _give_up_target(self, unit: Unit, reason: str) -> bool:
        """A read at a move's target goes to the source instead, unless some of its answer was told already."""
        if self.unit is not unit or not unit.need.is_at_target or unit.stays_at_source or self._kept is None:
            return False
        if unit.sent is None or self._task is not None:
            return False
        self.router.give_up_target(unit.need, reason)
        unit.stays_at_source = True
        self.spawn(self._read_at_source(unit))
        return True

    async def _read_at_source(self, unit: Unit) -> bool:
        self._drop_server()
        self.firm = False
        return await self._again(unit)

    def _drop_server(self) -> None:
        """Closes the connection: it is slow, or in no known state."""
        server, self.server = self.server, None
        if server is not None:
            server.holder = None
            server.abort()
            self.servers.pop(server.shard, None)
            self.router.forget(server)

    def _is_all_answered(self, unit: Unit) -> bool:
        """Nothing of the unit that was sent is still to be answered, or would have to be sent again."""
        return not unit.is_begun or (not unit.sent and self.server is not None and self.server.replies.is_empty)

    async def place(self, unit: Unit) -> bool:
        """Runs the unit on the one shard that it needs."""
        unit.is_gathering = False
        if unit.need.is_at_target:
            await self._attach_at_target(unit)
        else:
            await placing.attach(self, unit)
        self.settle(unit, unit.need)
        self.send_waiting(unit)
        return not unit.is_complete

    async def _carry_out(self, unit: Unit, need: Need) -> bool:
        """What is not one shard's: several at once, or a COPY whose rows decide."""
        if need.kind is Kind.COPY_IN:
            self.copy = CopyIn(self, unit, need)
            return await self.copy.begin()
        if need.kind is Kind.EVERYWHERE:
            return await everywhere.carry_out(self, unit, need)
        return await scatter.carry_out(self, unit, need)

    def spawn(self, work: Coroutine[Any, Any, bool]) -> None:
        """Begins what has to wait. What it returns: whether the client's next message can be looked at after it."""
        self.is_blocked = True
        self._task = asyncio.get_running_loop().create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, bool]) -> None:
        """Runs what has to wait; whatever it raises becomes an error for the client, and the session goes on."""
        try:
            goes_on = await work
            self._task = None
            self.is_held = False
            if goes_on:
                self.resume()
        except asyncio.CancelledError:
            if self.is_closing:
                return
            self._refuse_late(Refusal("57014", "canceling statement due to user request"))
        except placing.Refused as error:
            self._refuse_late(error.refusal)
        except NoServer as error:
            self._refuse_late(Refusal(error.sqlstate, error.message, error.hint))
        except (ServerError, placing.Failed) as error:
            self._refuse_late(error.frame)
        except ServerLost as error:
            self._refuse_late(Refusal("08006", error.message))
        except ProtocolViolation as error:
            self.fatal(error.sqlstate, error.message)
        except Exception:  # ours: this client pays for it, no other
            log.exception("a session failed", client=self.address)
            self.fatal("XX000", "the router met an error of its own, and ends this connection")

    def _refuse_late(self, refusal: Refusal | bytes) -> None:
        self._task = None
        self.is_held = self.is_muted = self.is_copying = False
        self.copy = None
        if self.is_closing:
            return
        if self.unit is None:
            self._error(refusal)
            self.transport.close()
            return
        self.is_blocked = False
        self._refuse(self.unit, refusal)
        if not self.is_blocked:
            self.resume()

    def _refuse(self, unit: Unit, refusal: Refusal | bytes) -> None:
        """An error in the reply's place. Where a server is attached, it fails too: its state is the client's."""
        self.router.stats.refused += 1
        error = refusal if isinstance(refusal, bytes) else _error(refusal)
        if self.server is not None:
            self._poison(unit, error)
        elif self.status == IN_TRANSACTION:
            unit.again = lambda: ANYWHERE  # the block is open and no shard knows: it begins somewhere, and fails there
            self.spawn(self._fail_somewhere(unit, error))
        else:
            self._refuse_alone(unit, error)

    def _fail_in_place(self, unit: Unit, refusal: Refusal) -> None:
        """As _refuse, where earlier messages of the unit are to have their effect."""
        if self.server is None and self.status == IDLE and len(unit.waiting) > 1:
            self.router.stats.refused += 1
            self.spawn(self._fail_somewhere(unit, _error(refusal)))
        else:
            self._refuse(unit, refusal)

    async def _fail_somewhere(self, unit: Unit, error: bytes) -> bool:
        try:
            await placing.attach(self, unit)
        except (ShardmoveError, placing.Refused) as trouble:
            if self.status == IDLE and self.server is None:
                self._refuse_alone(unit, error)
                return True
            self._write(error)
            self.fatal("08006", f"the transaction was given up: {trouble}")
            return False
        self._poison(unit, error)
        return not unit.is_complete

    def _refuse_alone(self, unit: Unit, error: bytes) -> None:
        self._forget_names(unit, -unit.acknowledged)
        self.router.stats.errors += 1
        if unit.is_simple or unit.is_complete:
            self.unit = None
            self._say(error, self.status)
        else:
            self._write(error)
            self._is_skipping = True

    def _poison(self, unit: Unit, error: bytes) -> None:
        """Makes the server fail where the refused message would have stood; its error is replaced."""
        server = self.server
        assert server is not None
        if unit.is_simple:
            before = [item for item in unit.waiting if item.owed not in (Owed.QUERY, Owed.CALL)]
            refused = Item(Owed.QUERY, messages.query(b'ROLLBACK TO SAVEPOINT "' + IMPOSSIBLE + b'"'))
            unit.waiting = [*before, refused]
            self._replacement = error
            unit.is_complete = True
        else:
            ends = [item for item in unit.waiting if item.owed is Owed.SYNC]
            before = [item for item in unit.waiting if item.owed is not Owed.SYNC]
            if before and before[-1].owed in (Owed.BIND, Owed.POISON):
                before.pop()  # the refused one
            unit.waiting = [*before, Item(Owed.POISON, messages.bind(b"", IMPOSSIBLE, ())), *ends]
            self._poisons.append(error)
        if unit.is_complete:
            self.is_blocked = True
        self.send_waiting(unit)

    # --- to the server

    def send_waiting(self, unit: Unit) -> None:
        """Everything that waits, in one write."""
        server = self.server
        assert server is not None
        items, unit.waiting = unit.waiting, []
        unit.is_begun = True
        unit.remember(items, self.limits.buffer_bytes)
        self.last_shard = server.shard
        out: list[bytes] = []
        sent = server.replies.sent
        for item in items:
            owed = item.owed
            if item.statement is not None:
                self._name(server, item, out)
                continue
            if owed is not None:
                sent(owed | HIDDEN if item.is_hidden else owed)
                if owed is Owed.PARSE:
                    server.close_statement(None)  # of ours, or one that fails: no name changes
                elif owed is Owed.QUERY:
                    server.statements.pop(b"", None)
                elif owed is Owed.CLOSE:
                    server.close_statement(None)
            out.append(item.frame)
        if out:
            server.send(out[0] if len(out) == 1 else b"".join(out))

    def _name(self, server: Server, item: Item, out: list[bytes]) -> None:
        """A message about a prepared statement, which this connection may not have yet, or under another name."""
        statement, owed = item.statement, item.owed
        assert statement is not None
        assert owed is not None
        there = statement.name if self.keeps_servers else statement.alias
        replies = server.replies
        if owed is Owed.CLOSE:
            self._close_statement(server, statement, item.frame, out)
            return
        if owed is Owed.PARSE:
            if there and server.statements.get(there) is not None:
                is_taken = self.status != FAILED or self._may_end(statement.planned)
                if is_taken and _is_same(server.statements[there], statement):
                    server.statements[there] = statement
                    self._inject(server, messages.PARSE_COMPLETE)
                    return
                self._drop(server, there, out)
            replies.sent(Owed.PARSE)
            out.append(item.frame if there == statement.name else _parse(there, statement))
            server.prepare(there, statement)
            return
        known = server.statements.get(there)
        if known is not statement and not (there and _is_same(known, statement)):
            if known is not None and there:
                self._drop(server, there, out)
            replies.sent(Owed.PARSE | HIDDEN)
            out.append(_parse(there, statement))
            server.prepare(there, statement)
        replies.sent(owed)
        if owed is Owed.DESCRIBE_STATEMENT:
            self._described.append(statement)
        out.append(item.frame if there == statement.name else _renamed(item.frame, owed, there))

    def _drop(self, server: Server, name: bytes, out: list[bytes]) -> None:
        server.replies.sent(Owed.CLOSE | HIDDEN)
        out.append(messages.close(b"S", name))
        server.close_statement(name)

    def _close_statement(self, server: Server, statement: Statement, frame: bytes, out: list[bytes]) -> None:
        is_its_own = self.keeps_servers or not statement.name
        if is_its_own and server.statements.get(statement.name) is statement:
            server.replies.sent(Owed.CLOSE)
            server.close_statement(statement.name)
            out.append(frame)
        else:
            self._inject(server, messages.CLOSE_COMPLETE)

    def _inject(self, server: Server, reply: bytes) -> None:
        if at_once := server.replies.inject(reply):
            self.on_replies(server, at_once)

    # --- from the server

    def on_replies(self, server: Server, data: bytes) -> None:
        if self._is_before_copy and server.replies.is_empty:
            self._is_before_copy = False
            asyncio.get_running_loop().call_soon(self._resume_failed, self.unit)
        if self.is_muted:
            return
        if self._kept is not None:
            self._kept.append(data)
            self._kept_bytes += len(data)
            if self._kept_bytes > self.limits.buffer_bytes and not self.router.acknowledges_late(self.touched):
                self._let_go()
            return
        self.router.stats.bytes_out += len(data)
        self.transport.write(data)

    def _let_go(self) -> None:
        """Replies that were kept back for a second try go to the client: there will be none."""
        kept, self._kept = self._kept, None
        if kept:
            self._write(b"".join(kept))

    def _answer_now(self) -> None:
        """The client waits for what is there before it says more: a second try is not possible any more."""
        self._let_go()
        if self.unit is not None and self.copy is None:
            self.unit.sent = None if self.unit.is_bound else []

    def on_parsed(self) -> None:
        """The router has answered a Parse or Close itself."""
        if self.unit is not None:
            self.unit.acknowledged += 1

    def renumbered(self, server: Server, frame: bytes) -> bytes:
        """A notification with the number that clients know its sender by."""
        told = messages.decode_notification(frame[5:])
        pid = self.router.client_number(server.shard, told.pid)
        return frame if pid is None else messages.notification_response(pid, told.channel, told.payload)

    def on_types(self, frame: bytes) -> None:
        """What the server takes parameters for: the client binds them as that, and we read them as that."""
        if self._described:
            self._described.popleft().types = messages.decode_parameter_description(frame[5:])

    def on_complete(self, frame: bytes) -> None:
        self._rolled_back = frame[5:13] == b"ROLLBACK"
        if self._kept is not None and not self.touched:
            self._let_go()

    def on_copy_in(self, server: Server) -> None:
        """The client's rows are due. In the extended protocol the Sync that it sent already counts for nothing."""
        self.is_copying = True
        self._is_sync_last = False
        self._answer_now()
        if self.unit is not None and not self.unit.is_simple:
            self.unit.is_complete = False
        if self.copy is not None:
            self.copy.on_copy_in()
        asyncio.get_running_loop().call_soon(self._resume_copy)

    def _resume_copy(self) -> None:
        if self.is_copying and self._task is None:
            self.resume()

    def on_parameter(self, name: bytes, value: bytes) -> None:
        self.parameters[name] = value
        self._note_facts()

    def _note_facts(self) -> None:
        """What of the session's settings changes how a key is read."""
        key, zone = self.hints.get("shardmove.key"), self.parameters.get(b"TimeZone")
        self.facts = Facts(
            None if zone is None else zone.decode("utf-8", "replace"),
            self.parameters.get(b"client_encoding") == b"UTF8",
            None if key is None else Hint(key, self.hints.get("shardmove.keyspace")),
        )

    def on_poisoned(self, server: Server) -> bytes:
        error = self._poisons[0]
        if self.unit is not None:
            self._fail(server, self.unit)
        return error

    def on_error(self, server: Server, frame: bytes) -> bytes:
        unit = self.unit
        self.router.stats.errors += 1
        if self.is_copying:
            self._stop_copying(unit)
        self._is_told = b"\0VFATAL\0" in frame
        if self._replacement is not None:
            frame, self._replacement = self._replacement, None
        if unit is None:
            return frame
        if self._is_told and self._give_up_target(unit, "its server ended the connection"):
            self._is_told = False
            return b""
        if self.copy is not None:
            if self.is_muted:
                self.copy.on_error(frame)
                return b""
            self.copy = None
        if self._kept is not None and unit.sent is not None and unit.is_complete and _is_fenced(frame):
            self._kept = None
            self.is_muted = True
            return b""
        self._fail(server, unit)
        return frame

    def _stop_copying(self, unit: Unit | None) -> None:
        """The server failed the COPY. A Sync behind the row which failed it was taken for one in copy-in mode."""
        self.is_copying = False
        self.is_blocked = unit is not None and unit.is_complete
        if self._is_sync_last and unit is not None:
            self._waiting.insert(0, messages.SYNC)
            self._waiting_bytes += len(messages.SYNC)
            asyncio.get_running_loop().call_soon(self._resume_failed, unit)

    def _fail(self, server: Server, unit: Unit) -> None:
        """The server met an error, and may ignore what was sent behind it."""
        unit.failed = True
        self._poisons.clear()
        self._described.clear()
        self._let_go()
        self._forget_names(unit, server.replies.dropped)
        if server.replies.is_skipping and (unit.is_complete or self._is_before_copy):
            unit.is_complete = unit.is_simple = False  # a simple query or a call behind it is ignored, too
            asyncio.get_running_loop().call_soon(self._resume_failed, unit)

    def _resume_failed(self, unit: Unit | None) -> None:
        self._is_before_copy = False
        if unit is not None and self.unit is unit and not unit.is_complete and self._task is None:
            self.resume()

    def on_ready(self, server: Server, status: int) -> None:
        unit = self.unit
        if unit is None:
            raise ProtocolViolation("ReadyForQuery came for nothing")
        if self.is_muted:
            if self.copy is not None:
                self.copy.on_ready()
            else:
                self.spawn(self._retry(unit))
            return
        if self._kept is not None and self.router.acknowledges_late(self.touched):
            self.spawn(self._acknowledge(unit, status))
            return
        self._let_go()
        self._finish(unit, status)
        self.resume()

    def on_server_lost(self, server: Server, error: Exception) -> None:
        if self.servers.get(server.shard) is server:
            del self.servers[server.shard]
        self.router.forget(server)
        if server is not self.server:
            return
        self.server = None
        if self.unit is not None and self._give_up_target(self.unit, str(error)):
            return
        if self._is_told:  # by the server itself
            self.is_closing = True
            self.transport.close()
        elif self._task is None or self.status != IDLE:
            self._write(server.farewell)
            self.fatal("08006", f"{error}", hint="whether what was under way was committed is not known")

    def on_server_writable(self, is_writable: bool) -> None:
        self._read(is_writable and not self.is_blocked)

    def _finish(self, unit: Unit, status: int) -> None:
        """What the unit leaves in the session."""
        self.status = status
        self.unit = None
        self.router.stats.query_seconds.observe(time.monotonic() - unit.began)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not unit.failed:
            self._note(unit, status)
            if status == IDLE and self.router.is_comparing:
                self.router.comparing.after(self, unit)
        if status != IDLE:
            return
        self.router.stats.transactions += 1
        changes, self._pending_changes = self._pending_changes, []
        if not unit.failed and not self._rolled_back:
            for change in surviving(changes):
                self._apply(change)
        if self.touched:
            self.router.wake(self.touched)
            self.touched = set()
        self.firm = False
        self.replay = []
        self.portals.clear()
        self._rolled_back = False
        self._detach()

    def _note(self, unit: Unit, status: int) -> None:
        for need in unit.needs:
            self._pending_changes.extend(need.changes)
            if need.replayed is not None and status == IN_TRANSACTION and not self.firm:
                self.replay.append(need.replayed)

    def _apply(self, change: Change) -> None:
        server = self.server
        match change.what:
            case "set":
                self.settings[change.name] = change.text
                if change.name.startswith("shardmove.") and change.value is not None:
                    self.hints[change.name] = change.value
                    self._note_facts()
                if server is not None:
                    server.applied[change.name] = change.text
            case "reset":
                self._reset(change.name)
            case "deallocate":
                self._deallocate(change.name.encode())
            case "discard":
                self._reset("")
                self._deallocate(b"")
                self._leave_others()
            case "pin":
                self.keep_server()

    def _reset(self, name: str) -> None:
        """Back to what the client said when it began; the server went back to its own, and is told again."""
        self._forget_hints(name)
        for each in [name] if name else list(self.settings):
            self.settings.pop(each, None)
            if each in self.initial:
                self.settings[each] = self.initial[each]
        if self.server is not None:
            for each in [name] if name else list(self.server.applied):
                self.server.applied.pop(each, None)

    def _leave_others(self) -> None:
        """DISCARD ALL is for every connection that the client has."""
        for shard, server in list(self.servers.items()):
            if server is not self.server:
                del self.servers[shard]
                self.router.take_back(server, is_shared=False)

    def _forget_hints(self, name: str) -> None:
        for each in [name] if name else list(self.hints):
            self.hints.pop(each, None)
        self._note_facts()

    def _deallocate(self, name: bytes) -> None:
        server = self.server
        if name:
            self.statements.pop(name, None)
            if server is not None:
                server.statements.pop(name, None)
        else:
            self.statements.clear()
            if server is not None:
                server.statements.clear()

    def keep_server(self) -> None:
        """What the session did there lives in that one connection: it is not given to others from now on."""
        if self.server is not None:
            self.servers[self.server.shard] = self.server

    def _detach(self) -> None:
        """The transaction is over: the connection is free."""
        server, self.server = self.server, None
        if server is None or self.servers.get(server.shard) is server:
            return
        if self.keeps_servers:
            self.servers[server.shard] = server
        else:
            self.router.take_back(server, is_shared=True)

    async def _retry(self, unit: Unit) -> bool:
        """A fence refused it, and nothing of it was answered: once more, where the range is now."""
        self.router.stats.retried += 1
        await placing.move_on(self, unit)
        return await self._again(unit)

    async def _again(self, unit: Unit) -> bool:
        assert unit.sent is not None
        self.is_muted = False
        self._kept = None
        unit.waiting, unit.sent, unit.sent_bytes = unit.sent, [], 0
        unit.is_begun = unit.is_bound = False
        unit.acknowledged = 0
        return await self.place(unit)

    async def _acknowledge(self, unit: Unit, status: int) -> bool:
        """The commit is told only once the other side has it (phase 4)."""
        if status == IDLE:
            await self.router.mirrored(self.touched)
        self._let_go()
        self._finish(unit, status)
        return True

    def _forget_names(self, unit: Unit, dropped: int) -> None:
        """Takes back what the last messages about names did: those that wait, and so many that were sent."""
        dropped += sum(item.owed in (Owed.PARSE, Owed.CLOSE) and not item.is_hidden for item in unit.waiting)
        for _ in range(min(dropped, len(unit.parsed))):
            name, before = unit.parsed.pop()
            if before is None:
                self.statements.pop(name, None)
            else:
                self.statements[name] = before

    # --- to the client

    def tell(self, data: bytes) -> None:
        self._write(data)

    def answered(self, unit: Unit, data: bytes) -> bool:
        """The rest of what several shards answered; the unit ends with it, unless its Sync is still to come."""
        self._write(data)
        unit.waiting = []
        if unit.is_complete:
            self._write(READY[IDLE])
            self._finish(unit, IDLE)
        else:
            unit.is_answered = True
        return True

    def _write(self, data: bytes) -> None:
        if data and not self.is_closing:
            self.router.stats.bytes_out += len(data)
            self.transport.write(data)

    def _say(self, data: bytes, status: int) -> None:
        self.status = status
        self._write(data + READY[status])

    def _error(self, refusal: Refusal | bytes) -> None:
        self._write(refusal if isinstance(refusal, bytes) else _error(refusal, severity="FATAL"))

    def fatal(self, sqlstate: str, message: str, *, hint: str | None = None) -> None:
        """The last words: the session ends with them. What was open on shards is rolled back there."""
        if not self.is_closing:
            self._write(messages.error_response(sqlstate, message, severity="FATAL", hint=hint))
            self.is_closing = True
            self.transport.close()

    # --- beginning and end

    async def _start(self) -> bool:
        settings = placing.initial_settings(self.login.parameters)
        self.settings = {name: placing.set_config(name, value) for name, value in settings.items()}
        self.initial = dict(self.settings)
        self.hints = {name: value for name, value in settings.items() if name.startswith("shardmove.")}
        self.parameters = await placing.welcome(self)
        self._note_facts()
        out = [messages.parameter_status(name, value) for name, value in self.parameters.items()]
        out.append(messages.backend_key_data(self.pid, self.secret))
        self._say(b"".join(out), IDLE)
        return True

    def cancel(self) -> Awaitable[None] | None:
        """The client asks to cancel what is under way. Waiting ends at once; a running statement is for its server.

        Until the server has taken the request in, the connection is not given to another client.
        """
        if self._task is not None:
            self._task.cancel()
            return None
        if self.server is None or self.unit is None:
            return None
        return self.router.cancel_at(self.server)


def _error(refusal: Refusal, *, severity: str = "ERROR") -> bytes:
    return messages.error_response(refusal.sqlstate, refusal.message, severity=severity, hint=refusal.hint)


def _is_fenced(frame: bytes) -> bool:
    if SERIALIZATION_FAILURE.encode() not in frame:
        return False
    fields = messages.error_fields(frame[5:])
    return fields.get("C") == SERIALIZATION_FAILURE and fields.get("M", "").startswith(FENCE_PREFIX)


def _is_same(known: object, statement: Statement) -> bool:
    return isinstance(known, Statement) and known.alias == statement.alias


def _parse(name: bytes, statement: Statement) -> bytes:
    return messages.parse(name, statement.text, statement.oids)


def _renamed(frame: bytes, owed: Owed, name: bytes) -> bytes:
    """The same Bind or Describe, about the statement under the name that it has on this connection."""
    if owed is Owed.DESCRIBE_STATEMENT:
        return messages.describe(b"S", name)
    portal_end = frame.index(0, 5) + 1
    statement_end = frame.index(0, portal_end)
    return messages.message(b"B", frame[5:portal_end] + name + frame[statement_end:])


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


_ALONE = "send it alone: one Bind and one Execute before the Sync, outside of a transaction block"
_GONE = Item(Owed.PARSE, messages.parse(b"shardmove: gone", b"SELECT"), is_hidden=True)
"""Prepared to be deallocated: DEALLOCATE of a name that the client has, and the connection has not, must succeed."""
_ENDING = frozenset({Action.COMMIT, Action.ROLLBACK, Action.SAVEPOINT})
_IN_COPY = frozenset(b"dcfSHX")
_SLOW_KINDS = frozenset({Kind.EVERYWHERE, Kind.SCATTER, Kind.COPY_IN})
_HANDLERS: Mapping[int, Callable[[Session, bytes], None]] = {
    ord(kind): handler
    for kind, handler in {
        "Q": Session._on_query,
        "P": Session._on_parse,
        "B": Session._on_bind,
        "D": Session._on_describe,
        "E": Session._on_execute,
        "C": Session._on_close,
        "H": Session._on_flush,
        "S": Session._on_sync,
        "F": Session._on_call,
        "d": Session._on_copy,
        "c": Session._on_copy,
        "f": Session._on_copy,
        "X": Session._on_terminate,
    }.items()
}
