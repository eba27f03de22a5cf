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

Who does what with a unit, in its order:

    router/inbox.py        bytes wait until they are whole messages
    router/reading.py      each message is added to the unit
    router/dispatching.py  its statement is sent on at once, or to several shards; what must wait: `router/placing.py`
    router/refusing.py     or an error stands in its place
    router/prepared.py     statements are given the name that they have on the connection
    router/replies.py      what comes back is told, or kept for a while
    router/retrying.py     a second try
    router/finishing.py    what it leaves: `router/variables.py`, prepared statements, connections
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from router import finishing, placing, reading, retrying
from router.greeting import address_of
from router.inbox import Inbox
from router.opening import NoServer
from router.prepared import Prepared
from router.refusing import error_of, refuse
from router.replies import Replies
from router.server import Server, ServerError, ServerLost
from router.statements import Action
from router.units import ANYWHERE, FLOATING, Change, Need, Refusal, Unit
from router.variables import Variables
from shardmove.wire import messages
from shardmove.wire.messages import FAILED, IDLE, READY, ProtocolViolation
from shardmove.wire.streams import HIDDEN, Owed

if TYPE_CHECKING:
    from router.cancel import BackendKey
    from router.copying import CopyIn
    from router.greeting import ClientLogin
    from router.service import Router
    from router.statements import Planned

log = structlog.get_logger("shardmove.router")
LAST_WORDS_S = 5.0


def _leads_on(planned: Planned) -> bool:
    """Behind its first part a failed transaction is none any more: what follows goes where it belongs."""
    first = planned.plan.parts[0].action
    return first is Action.SAVEPOINT or (first in reading.ENDS and len(planned.plan.parts) > 1)


class Session(asyncio.Protocol):
    """A client that has logged in.

    Attributes:
        status: what the client was told last: I, T or E.
        server: the connection that the unit or transaction under way runs on.
        servers: by shard, the connections that this client keeps (session pooling).
        cursors: by name, the shards of those that outlive their transaction (WITH HOLD).
        changes: what the transaction changes in the session, once it is committed.
        is_hinted: among those are hints of where statements go.
        firm: the transaction has had an effect, or a key: it stays where it is.
        replay: what the transaction said so far that has to be said again where it moves to.
        touched: moves whose range the transaction wrote to.
        task: what has to wait runs in it; the client's messages wait as long.
        watch: when a move's target has had its time to answer.
        is_skipping: after an error of the router's own, up to the next Sync.
        is_copying: the client's rows are due.
        is_sync_last: in that, the last message was a Sync.
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
        self.lot = (key.pid * 2654435761 % 2**32) / 2**32
        self.limits = router.settings
        self.keeps_servers = router.settings.pooling == "session"
        self.inbox = Inbox(self.limits, leftover)
        self.variables = Variables()
        self.prepared = Prepared(keeps_names=self.keeps_servers)
        self.replies = Replies(self)
        self.status = IDLE
        self.server: Server | None = None
        self.servers: dict[str, Server] = {}
        self.cursors: dict[str, str] = {}
        self.last_shard: str | None = None
        self.unit: Unit | None = None
        self.changes: list[Change] = []
        self.is_hinted = False
        self.firm = False
        self.replay: list[bytes] = []
        self.touched: set[str] = set()
        self.task: asyncio.Task[None] | None = None
        self.watch: asyncio.TimerHandle | None = None
        self.copy: CopyIn | None = None
        self.is_copying = False
        self.is_sync_last = False
        self.is_skipping = False
        self.is_blocked = True
        self.is_held = False
        self.is_closing = False
        self._is_reading = True
        self.writable = asyncio.Event()
        self.writable.set()
        router.add_session(self)
        self.spawn(self._start())

    # --- for whoever looks

    @property
    def state(self) -> str:
        if self.is_held:
            return "held"
        if self.task is not None:
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
        if self.task is not None:
            self.task.cancel()
        if self.watch is not None:
            self.watch.cancel()
        kept = set(self.servers.values())
        for server in kept | ({self.server} if self.server is not None else set()):
            self.router.take_back(server, is_shared=not self.keeps_servers and server not in kept)
        self.servers = {}
        self.server = None

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.writable.clear()
        self.set_reading(False)
        self._hear_servers(False)

    def resume_writing(self) -> None:
        self.writable.set()
        self.set_reading(not self.is_blocked)
        self._hear_servers(True)

    def _hear_servers(self, is_reading: bool) -> None:
        """Those that it keeps, too: they may have notifications for the client."""
        for server in (self.server, *self.servers.values()):
            if server is not None:
                server.set_reading(is_reading)

    def data_received(self, data: bytes) -> None:
        if self.is_closing:
            return
        self.router.stats.bytes_in += len(data)
        inbox = self.inbox
        if inbox.waiting or self.is_blocked:
            inbox.add(data)
            if self.is_blocked:
                if inbox.is_full:
                    self.set_reading(False)
                return
            if inbox.size < inbox.missing:
                return
            data = inbox.take()
        reading.take_in(self, data)

    def set_reading(self, is_reading: bool) -> None:
        if self._is_reading != is_reading and not self.is_closing:
            self._is_reading = is_reading
            if is_reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def resume(self) -> None:
        """The unit is done, or what was waited for is there: on with what the client has sent meanwhile."""
        self.is_blocked = False
        if self.inbox.waiting:
            reading.take_in(self, self.inbox.take())
        if not self.is_blocked:
            self.set_reading(self.writable.is_set())

    # --- the unit under way

    def open_unit(self) -> Unit:
        if self.unit is None:
            self.unit = Unit()
            self.replies.is_muted = False
        return self.unit

    def decide(self, unit: Unit) -> Need:
        assert unit.ask is not None
        if self.status == FAILED and not unit.has_ended and not _leads_on(unit.ask[0]):
            return ANYWHERE  # the server refuses everything but the end of the transaction, and knows what that is
        return self.router.decide(*unit.ask, self)

    def asked_again(self, unit: Unit) -> Need:
        """Where the unit has to go by the routes as they are now."""
        if unit.again is not None:
            return unit.again()
        return unit.need if unit.ask is None else self.decide(unit)

    async def place(self, unit: Unit) -> bool:
        """Runs the unit on the one shard that it needs."""
        unit.is_gathering = False
        await placing.attach(self, unit)
        self.settle(unit, unit.need)
        self.send_waiting(unit)
        return not unit.is_complete

    def settle(self, unit: Unit, need: Need) -> None:
        """The unit runs where `self.server` is."""
        replies = self.replies
        if self.firm and not unit.is_bound:
            unit.forbid_retry()  # what the transaction wrote before it cannot be said again
        if need.kind not in FLOATING:
            self.router.stats.routed += 1
            is_first = not self.firm and not unit.is_bound and self._is_all_answered(unit)
            self.firm = unit.is_bound = True
            if need.is_at_target and is_first and unit.sent is not None:
                retrying.watch_target(self, unit)
            if need.is_write:
                for route in need.routes:
                    if route.move_id is not None:
                        self.touched.add(route.move_id)
                if need.is_blind:
                    self.touched |= self.router.moves_from(need.shard)
                if is_first and unit.sent is not None:
                    replies.hold_back()
        if self.touched and unit.is_complete and replies.kept is None:
            replies.hold_back()  # whether a commit is told late is decided when it is there

    def _is_all_answered(self, unit: Unit) -> bool:
        """Nothing of the unit that was sent is still to be answered, or would have to be sent again."""
        return not unit.is_begun or (not unit.sent and self.server is not None and self.server.replies.is_empty)

    def send_waiting(self, unit: Unit) -> None:
        """Everything that waits, in one write."""
        server = self.server
        assert server is not None
        items, unit.waiting = unit.waiting, []
        unit.is_begun = True
        unit.remember(items, self.limits.buffer_bytes)
        if not unit.need.is_at_target:  # what floats there next would have nobody to answer it in time
            self.last_shard = server.shard
        out: list[bytes] = []
        sent = server.replies.sent
        for item in items:
            owed = item.owed
            if item.statement is not None:
                if at_once := self.prepared.send(server, item, out, is_failed=self.status == FAILED):
                    self.replies.on_replies(server, at_once)
                continue
            if owed is Owed.BIND or owed is Owed.DESCRIBE_STATEMENT:
                self.prepared.forget(server, item, out)
            if owed is not None:
                sent(owed | HIDDEN if item.is_hidden else owed)
                if owed is Owed.QUERY:
                    server.statements.pop(b"", None)
                elif owed in (Owed.PARSE, Owed.CLOSE):  # of ours, of a portal, or one that fails: no name changes
                    server.close_statement(None)
            out.append(item.frame)
        if out:
            server.send(out[0] if len(out) == 1 else b"".join(out))

    def on_parsed(self) -> None:
        """The router has answered a Parse or Close itself."""
        if self.unit is not None:
            self.unit.acknowledged += 1

    def answered(self, unit: Unit, data: bytes) -> bool:
        """The rest of what several shards answered; the unit ends with it, unless its Sync is still to come."""
        self.tell(data)
        unit.waiting = []
        if unit.is_complete:
            self.tell(READY[IDLE])
            finishing.finish(self, unit, IDLE)
        else:
            unit.is_answered = True
        return True

    # --- the connection that it runs on

    def attach(self, server: Server) -> None:
        """What it says is for the client, as fast as that reads."""
        server.holder = self.replies
        server.set_reading(self.writable.is_set())
        self.server = server

    def detach(self) -> None:
        """It is free: kept for this client, where it keeps its connections or this one, else for whoever comes next."""
        server, self.server = self.server, None
        if server is None:
            return
        if self.servers.get(server.shard) is server:
            return
        if self.keeps_servers:
            self.servers[server.shard] = server
        else:
            self.router.take_back(server, is_shared=True)

    def lose(self, server: Server) -> None:
        """It is not ours any more: whoever says so closes it, or gives it back."""
        if self.server is server:
            self.server = None
        if self.servers.get(server.shard) is server:
            del self.servers[server.shard]

    # --- what has to wait

    def spawn(self, work: Coroutine[Any, Any, bool]) -> None:
        """Begins it. What it returns: whether the client's next message can be looked at after it."""
        self.is_blocked = True
        self.task = asyncio.get_running_loop().create_task(self._guarded(work))
        self.task.add_done_callback(lambda _: work.close())  # a client may leave before its first step

    async def _guarded(self, work: Coroutine[Any, Any, bool]) -> None:
        """Runs what has to wait; whatever it raises becomes an error for the client, and the session goes on."""
        try:
            goes_on = await work
            self.task = None
            self.is_held = False
            if goes_on:
                self.resume()
        except asyncio.CancelledError:
            if self.is_closing:
                return
            self._refuse_late(Refusal("57014", "canceling statement due to user request"))
        except placing.Over:
            self._skip_rest()
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

    def _skip_rest(self) -> None:
        """Of a unit that has failed on its server, which has ended it: only its ReadyForQuery is still to be told."""
        self.task = None
        unit, server = self.unit, self.server
        assert unit is not None
        assert server is not None
        is_complete = unit.is_complete
        self.replies.let_go()
        finishing.finish(self, unit, server.status)
        if is_complete:
            self.tell(READY[self.status])
        self.is_skipping = not is_complete
        self.resume()

    def _refuse_late(self, refusal: Refusal | bytes) -> None:
        self.task = None
        self.is_held = self.replies.is_muted = self.is_copying = False
        self.copy = None
        if self.is_closing:
            return
        if self.unit is None:
            self.end(refusal if isinstance(refusal, bytes) else error_of(refusal, severity="FATAL"))
            return
        self.is_blocked = False
        refuse(self, self.unit, refusal)
        if not self.is_blocked:
            self.resume()

    # --- to the client

    def tell(self, data: bytes) -> None:
        if data and not self.is_closing:
            self.router.stats.bytes_out += len(data)
            self.transport.write(data)

    def say(self, data: bytes, status: int) -> None:
        """The end of a unit that no server answers."""
        self.status = status
        self.tell(data + READY[status])

    def end(self, last_words: bytes = b"", *, hears_out: bool = False) -> None:
        """The session ends. What was open on shards is rolled back there.

        `hears_out`: the client is still sending. A socket that is closed with bytes unread is reset, and the last words
        are lost with it; so what it says is read and thrown away for a while.
        """
        self.tell(last_words)
        self.is_closing = True
        if hears_out and self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self.transport.abort)

    def fatal(self, sqlstate: str, message: str, *, hint: str | None = None, hears_out: bool = False) -> None:
        """Ends the session with an error, unless it ends already."""
        if not self.is_closing:
            self.end(messages.error_response(sqlstate, message, severity="FATAL", hint=hint), hears_out=hears_out)

    # --- beginning and end

    async def _start(self) -> bool:
        variables = self.variables
        values = placing.initial_settings(self.login.parameters)
        variables.begin(values, {name: placing.set_config(name, value) for name, value in values.items()})
        variables.reported = await placing.welcome(self)
        variables.note_facts()
        out = [messages.parameter_status(name, value) for name, value in variables.reported.items()]
        out.append(messages.backend_key_data(self.pid, self.secret))
        self.say(b"".join(out), IDLE)
        return True

    def _cancel_task(self, task: asyncio.Task[None]) -> None:
        """Once it has taken its first step: one that is cancelled before never hears of it."""
        if self.task is task and not self.replies.is_acknowledging:
            task.cancel()

    def cancel(self) -> Awaitable[None] | None:
        """The client asks to cancel what is under way. Waiting ends at once; a running statement is for its server.

        Until the server has taken the request in, the connection is not given to another client.
        """
        if self.task is not None and not self.replies.is_acknowledging:  # what is committed is told, and as that
            asyncio.get_running_loop().call_soon(self._cancel_task, self.task)
            return None
        if self.server is None or self.unit is None:
            return None
        return self.router.cancel_at(self.server)
