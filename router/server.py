"""One connection to a shard.

It serves one client at a time, or the router itself. What the client is owed goes through as bytes, in as few pieces as
they came in; what is hidden from it (`Replies`) is cut out. Rows are never assembled: a row larger than the buffer
passes in pieces, so that memory does not depend on what a query returns.

A connection whose state is not exactly known is closed, never given to somebody else.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from router.tls import Host
from shardmove.domain.errors import ShardmoveError
from shardmove.wire import messages
from shardmove.wire.messages import IDLE, ProtocolViolation
from shardmove.wire.streams import HIDDEN, Owed, Replies

PIECE_BYTES = 65_536
"""A message larger than this is passed on before it is whole, where it is a row."""
ASSEMBLED_BYTES_MAX = 16 * 1024 * 1024
"""Messages that have to be whole (errors, descriptions) are refused above this: no server sends such."""

_ROW, _COPY_DATA, _READY, _ERROR, _STATUS, _NOTICE, _NOTIFICATION = b"DdZESNA"
_PARSED, _CLOSED, _COMPLETE, _COPY_IN = b"13CG"
_ROWS = frozenset({_ROW, _COPY_DATA})
_ASYNCHRONOUS = frozenset({_STATUS, _NOTICE, _NOTIFICATION})
_TYPES = ord("t")
_NAMED = frozenset({_PARSED, _CLOSED})
_NOTEWORTHY = frozenset({_COMPLETE, _COPY_IN, _TYPES}) | _NAMED
_IN_BULK = frozenset({int(Owed.EXECUTE), int(Owed.QUERY)})


class ServerLost(ShardmoveError):
    """The connection to the shard ended. What was under way on it happened or not: nobody here knows."""


class ServerError(ShardmoveError):
    """The shard answered a statement of the router's own with an error: `frame`, as it came."""

    def __init__(self, message: str, *, hint: str | None = None, frame: bytes = b"") -> None:
        super().__init__(message, hint=hint)
        self.frame = frame

    def __reduce__(self) -> tuple[Callable[..., ServerError], tuple[object, ...]]:
        return _server_error, (self.message, self.hint, self.frame)

    @property
    def sqlstate(self) -> str:
        return messages.error_fields(self.frame[5:]).get("C", "XX000") if self.frame else "XX000"


def _server_error(message: str, hint: str | None, frame: bytes) -> ServerError:
    return ServerError(message, hint=hint, frame=frame)


class Holder(Protocol):
    """Whoever the connection serves: the session of a client."""

    pid: int

    def on_replies(self, server: Server, data: bytes) -> None: ...
    def on_ready(self, server: Server, status: int) -> None: ...
    def on_error(self, server: Server, frame: bytes) -> bytes: ...
    def on_poisoned(self, server: Server) -> bytes: ...
    def on_complete(self, frame: bytes) -> None: ...
    def on_types(self, frame: bytes) -> None: ...
    def renumbered(self, server: Server, frame: bytes) -> bytes: ...
    def on_copy_in(self, server: Server) -> None: ...
    def on_parameter(self, name: bytes, value: bytes) -> None: ...
    def on_server_lost(self, server: Server, error: Exception) -> None: ...
    def on_server_writable(self, is_writable: bool) -> None: ...


class Sink:
    """Takes the replies to one hidden unit. `done` has them all, or fails with ServerError or ServerLost."""

    __slots__ = ("done", "error", "frames", "on_frame")

    def __init__(self, on_frame: Callable[[int, bytes], None] | None = None) -> None:
        self.done: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        self.frames: list[bytes] = []
        self.error: bytes | None = None
        self.on_frame = on_frame

    def take(self, kind: int, frame: bytes) -> None:
        if kind == _ERROR:
            self.error = frame
        if self.on_frame is not None:
            self.on_frame(kind, frame)
        elif kind != _ERROR:
            self.frames.append(frame)

    def end(self, shard: str) -> None:
        if self.done.done():
            return
        if self.error is None:
            self.done.set_result(self.frames)
            return
        fields = messages.error_fields(self.error[5:])
        self.done.set_exception(ServerError(f"shard {shard}: {fields.get('M')}", frame=self.error))

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever asked may be gone: not worth a warning


class Server(asyncio.Protocol):
    """A connection that has logged in.

    Attributes:
        status: the last ReadyForQuery's: I, T or E, as a byte.
        parameters: what the server reported of its settings.
        applied: session settings that were set here, name by name, as the statement that set each.
        statements: what was prepared here, by its name on this connection; on one that is shared, used last comes last.
        is_spoilt: a cancel may still come, nobody knows when: it is for no other client.
        holds_state: a client has left something here that is not known, or cannot be said again elsewhere.
    """

    def __init__(self, shard: str, user: str) -> None:
        self.shard = shard
        self.user = user
        self.host: Host
        self.pid = 0
        self.secret = b""
        self.status = IDLE
        self.parameters: dict[bytes, bytes] = {}
        self.applied: dict[str, bytes] = {}
        self.statements: dict[bytes, object] = {}
        self.holds_state = False
        self.holder: Holder | None = None
        self.since = time.monotonic()
        self.is_closed = False
        self.cancels = 0
        self.is_spoilt = False
        self.when_cancelled: Callable[[], None] | None = None
        self.on_idle_loss: Callable[[Server], None] | None = None
        self.transport: asyncio.Transport
        self.replies = Replies()
        self._is_reading = True
        self._sinks: deque[Sink] = deque()
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._missing = 0
        self._passing = 0
        self._error = b""
        self.farewell = b""
        self._naming: deque[tuple[bytes, object] | None] = deque()

    def set_reading(self, is_reading: bool) -> None:
        """Whether what the shard says is taken: whoever has the connection may be unable to pass it on. Repeatable."""
        if self._is_reading != is_reading and not self.is_closed:
            self._is_reading = is_reading
            if is_reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # --- what is sent

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def run(self, text: bytes, on_frame: Callable[[int, bytes], None] | None = None) -> asyncio.Future[list[bytes]]:
        """A statement of the router's own, by the simple protocol. May be sent before the one before it is answered."""
        return self.exchange(messages.query(text), [Owed.QUERY], on_frame)

    def exchange(
        self, data: bytes, owed: list[Owed], on_frame: Callable[[int, bytes], None] | None = None
    ) -> asyncio.Future[list[bytes]]:
        """A whole unit of the router's own, hidden from the client. It must end in a Sync, or be one Query."""
        sink = Sink(on_frame)
        if self.is_closed:
            sink.fail(ServerLost(f"the connection to shard {self.shard} was lost"))
            return sink.done
        for each in owed:
            self.replies.sent(each | HIDDEN)
        self._sinks.append(sink)
        self.transport.write(data)
        return sink.done

    def prepare(self, name: bytes, statement: object) -> None:
        """A Parse was sent. It is believed until the server says otherwise."""
        if not self.replies.is_skipping:
            self._naming.append((name, self.statements.get(name)))
            self.statements[name] = statement

    def close_statement(self, name: bytes | None) -> None:
        """A Close was sent, believed likewise; None for one of a portal."""
        if not self.replies.is_skipping:
            self._naming.append(None if name is None else (name, self.statements.pop(name, None)))

    @property
    def is_passing(self) -> bool:
        """The beginning of a large row was told, and its end was not: nothing else may come between."""
        return self._passing > 0

    @property
    def address(self) -> str:
        return f"{self.host.address}:{self.host.port}"

    @property
    def is_clean(self) -> bool:
        """Nothing is owed and no transaction is open: another client may have it."""
        return self.status == IDLE and self.replies.is_ended and not self.is_closed and not self._passing

    def close(self) -> None:
        """Says good-bye where that makes sense, and closes. The server rolls back what was open."""
        if not self.is_closed:
            self.is_closed = True
            if self.replies.is_ended:
                self.transport.write(messages.TERMINATE)
                self.transport.close()
            else:
                self.transport.abort()

    def abort(self) -> None:
        self.is_closed = True
        self.transport.abort()

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's own

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(ServerLost(f"the connection to shard {self.shard} was lost{f': {exc}' if exc else ''}"))

    def pause_writing(self) -> None:
        if self.holder is not None:
            self.holder.on_server_writable(False)

    def resume_writing(self) -> None:
        if self.holder is not None:
            self.holder.on_server_writable(True)

    def data_received(self, data: bytes) -> None:
        try:
            if self._passing:
                data = self._pass_on(data)
                if not data:
                    return
            if self._parts:
                self._parts.append(data)
                self._parts_bytes += len(data)
                if self._parts_bytes < self._missing:
                    return
                data = b"".join(self._parts)
                self._parts = []
                self._parts_bytes = 0
            self._take(data)
        except ProtocolViolation as error:
            self.transport.abort()
            self._lost(ServerLost(f"shard {self.shard} broke the protocol, its connection was closed: {error}"))

    # --- what is received

    def _take(self, data: bytes) -> None:
        """Cuts the stream into messages; what the client is owed goes on in one piece where nothing is cut out."""
        replies = self.replies
        at = kept = 0
        size = len(data)
        is_bulk = False
        while size - at >= 5:
            kind = data[at]
            end = at + 1 + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > size or end < at + 5:
                break
            if kind in _ROWS and is_bulk:
                at = end
                continue
            if kind == _NOTIFICATION and self.holder is not None:
                self._forward(data[kept:at] + self.holder.renumbered(self, data[at:end]))
                at = kept = end
                continue
            if kind in _ASYNCHRONOUS:
                if self._asynchronous(kind, data[at:end]):
                    at = end
                    continue
                self._forward(data[kept:at])
                at = kept = end
                continue
            is_hidden = replies.received(kind) if kind != _ERROR else self._error_is_hidden(data, at, end)
            if is_hidden:
                self._forward(data[kept:at])
                self._hidden(kind, data[at:end])
                at = kept = end
                is_bulk = False
            elif kind == _READY:
                self.status = data[at + 5]
                at = end
                self._forward(data[kept:at])
                kept = at
                is_bulk = False
                if self.holder is not None:
                    self.holder.on_ready(self, self.status)
            elif kind == _ERROR:
                self._forward(data[kept:at])
                self._forward(self._error)
                at = kept = end
            else:
                if kind in _NOTEWORTHY:
                    kept = self._noteworthy(kind, data, kept, at, end)
                is_bulk = replies.first in _IN_BULK
                at = end
            if ours := replies.injected():
                self._forward(data[kept:at] + ours)
                kept = at
        self._rest(data, kept, at)

    def _noteworthy(self, kind: int, data: bytes, kept: int, at: int, end: int) -> int:
        holder = self.holder
        if holder is None:
            raise ProtocolViolation("a reply came that nobody waits for")
        if kind == _COMPLETE:
            holder.on_complete(data[at:end])
        elif kind in _NAMED:
            self._naming.popleft()
        elif kind == _TYPES:
            holder.on_types(data[at:end])
        else:
            self._forward(data[kept:end])
            holder.on_copy_in(self)
            return end
        return kept

    def _error_is_hidden(self, data: bytes, at: int, end: int) -> bool:
        """An error reply: whose is it? One of the client's may be replaced, or held back, by its session."""
        frame = data[at:end]
        if not self.replies.first:  # the server says good-bye: FATAL, and nothing was asked
            self.farewell = frame
            self.is_closed = True  # its end is on the way, and may be seen only after somebody has taken it
            self._error = b""
            return False
        was_poisoned = self.replies.first == Owed.POISON
        is_hidden = self.replies.received(_ERROR)
        self._forget_names(self.replies.dropped_here)
        if is_hidden:
            return True
        if self.holder is None:
            raise ProtocolViolation("an error came that nobody waits for")
        self._error = self.holder.on_poisoned(self) if was_poisoned else self.holder.on_error(self, frame)
        return False

    def _forget_names(self, count: int) -> None:
        """The next messages about names, so many of them, have no effect."""
        for change in reversed([self._naming.popleft() for _ in range(min(count, len(self._naming)))]):
            if change is not None:
                name, before = change
                if before is None:
                    self.statements.pop(name, None)
                else:
                    self.statements[name] = before

    def _hidden(self, kind: int, frame: bytes) -> None:
        """A reply to us: of a unit of our own, or to a message that was put into one of the client's."""
        if kind in _NAMED and self._naming:
            self._naming.popleft()
        if not self._sinks:
            return
        if kind == _READY:
            self.status = frame[5]
            self._sinks.popleft().end(self.shard)
        else:
            self._sinks[0].take(kind, frame)

    def _asynchronous(self, kind: int, frame: bytes) -> bool:
        """Whether it is for the client."""
        is_hidden = self.replies.first >= HIDDEN
        if kind == _STATUS:
            name, value = messages.decode_parameter_status(frame[5:])
            self.parameters[name] = value
            if self.holder is not None and not is_hidden:
                self.holder.on_parameter(name, value)
        return self.holder is not None and not is_hidden

    def _forward(self, data: bytes) -> None:
        if not data:
            return
        if self.holder is None:
            raise ProtocolViolation("a reply came that nobody waits for")
        self.holder.on_replies(self, data)

    def _rest(self, data: bytes, kept: int, at: int) -> None:
        """The end of what came in: whole messages go on, a large row's beginning too, the beginning of others waits."""
        size = len(data)
        if at == size:
            self._forward(data if kept == 0 else data[kept:])
            return
        self._forward(data[kept:at])
        tail = data[at:]
        if len(tail) < 5:
            self._parts, self._parts_bytes, self._missing = [tail], len(tail), 5
            return
        length = 1 + int.from_bytes(tail[1:5], "big")
        if length < 5:
            raise ProtocolViolation(f"a message of {length} bytes")
        if tail[0] in _ROWS and length > PIECE_BYTES and self.replies.first in _IN_BULK:
            self._passing = length - len(tail)
            self._forward(tail)
            return
        if length > ASSEMBLED_BYTES_MAX and self.replies.first < HIDDEN:
            raise ProtocolViolation(f"a message {chr(tail[0])!r} of {length} bytes")
        self._parts, self._parts_bytes, self._missing = [tail], len(tail), length

    def _pass_on(self, data: bytes) -> bytes:
        """The next piece of a large row. Returns what is behind it."""
        piece, rest = data[: self._passing], data[self._passing :]
        self._passing -= len(piece)
        self._forward(piece)
        return rest

    def _lost(self, error: ServerLost) -> None:
        self.is_closed = True
        while self._sinks:
            self._sinks.popleft().fail(error)
        holder, self.holder = self.holder, None
        if holder is not None:
            holder.on_server_lost(self, error)
        elif self.on_idle_loss is not None:
            self.on_idle_loss(self)
