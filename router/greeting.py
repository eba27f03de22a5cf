"""The beginning of a client's connection: TLS, the startup packet, authentication; then a session takes over.

What a client may do before it is known is little, and bounded: a few kilobytes, one timer for all of it, so many such
connections at a time. Nothing outlives the connection: whenever it ends, there is no task, timer or entry left.

    connection ──┬─ SSLRequest, answered S ──┬─ TLS handshake ──┬─ startup packet ─ SCRAM ─ checks ─ Session
                 └─ direct TLS ──────────────┘                  └─ CancelRequest ─ closed
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from router.tls import ALPN
from shardmove.config import Address, Authentication
from shardmove.domain.errors import ShardmoveError
from shardmove.wire import messages
from shardmove.wire.messages import Frames, ProtocolViolation
from shardmove.wire.scram import MECHANISM, ScramServer
from shardmove.wire.startup import Cancel, DirectTls, Ready, Startup, WantsGss, WantsTls

if TYPE_CHECKING:
    from router.door import Door

AUTHENTICATION_BYTES_MAX: Final = 8192
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 60, 10, 3
EARLY_BYTES_MAX: Final = 65_536

_PASSWORD, _TERMINATE = b"pX"
_log = structlog.get_logger("shardmove.router")


@dataclass(frozen=True, slots=True)
class ClientLogin:
    """Who a client is.

    Attributes:
        parameters: of the startup packet, without user and database; `options` as it was given.
        client_key: recovered from the client's proof; None without SCRAM. A secret.
        server_key: of the same user's verifier, which a login with `client_key` needs to know the server by. A secret.
        protocol: the minor version that is spoken.
    """

    user: str
    database: str
    parameters: Mapping[str, str]
    client_key: bytes | None = field(default=None, repr=False)
    protocol: int = 0
    server_key: bytes | None = field(default=None, repr=False)


class Refusal(ShardmoveError):
    """The client is known, or not even asked, and not let in.

    Attributes:
        sqlstate: the code with which it is told.
    """

    def __init__(self, sqlstate: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate

    def __reduce__(self) -> tuple[Callable[..., Refusal], tuple[object, ...]]:
        return _refusal, (self.sqlstate, self.message, self.hint)


def _refusal(sqlstate: str, message: str, hint: str | None) -> Refusal:
    return Refusal(sqlstate, message, hint=hint)


class Greeting(asyncio.Protocol):
    """One connection until it is known whose it is."""

    def __init__(self, door: Door, *, is_local: bool) -> None:
        self._door = door
        self._settings = door.settings
        self._context = None if is_local else door.context
        self._is_local = is_local
        self._startup = Startup(
            has_tls=self._context is not None, requires_tls=door.settings.tls_required and not is_local
        )
        self._frames = Frames(AUTHENTICATION_BYTES_MAX)
        self._ready: Ready | None = None
        self._scram: ScramServer | None = None
        self._is_first_answer = True
        self._is_upgrading = False
        self._is_over = False
        self._early = b""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle
        self._transport: asyncio.Transport

    # --- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not derived from it
        self._door.greetings.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._settings.login_timeout_s, self._end)
        if not self._is_local:
            _keep_alive(transport)
        if self._door.is_crowded:
            self.refuse(Refusal("53300", "too many connections are in their greeting"))

    def data_received(self, data: bytes) -> None:
        if self._is_upgrading:
            # Decrypted already: the handshake is over, and the coroutine that waits for it has not run yet.
            self._early += data
            if len(self._early) > EARLY_BYTES_MAX:
                self._end()
        elif not self._is_over:
            self._take(data)

    def eof_received(self) -> None:
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True  # also for what came early: there is nobody to make a session for
        self._forget()

    # --- ends

    def refuse(self, error: ProtocolViolation | Refusal) -> None:
        """Tells the client why, and closes. The timer goes on: whoever does not read that is thrown out by it."""
        if self._is_over:
            return
        self._is_over = True
        self._door.stats.logins_refused += 1
        _log.info("login refused", sqlstate=error.sqlstate, reason=error.message, client=address_of(self._transport))
        frame = messages.error_response(error.sqlstate, error.message, severity="FATAL", hint=error.hint)
        if self._is_upgrading:
            self._transport.abort()
            return
        self._transport.write(frame)
        self._transport.close()

    def _end(self) -> None:
        """Ends the connection without a word: its time is up, or the client has left."""
        self._is_over = True
        self._transport.abort()

    def _forget(self) -> None:
        self._timer.cancel()
        self._door.greetings.discard(self)

    # --- what the client says

    def _take(self, data: bytes) -> None:
        try:
            if self._ready is None:
                for event in self._startup.feed(data):
                    self._on_event(event)
            else:
                self._frames.feed(data)
                self._authenticate()
        except (ProtocolViolation, Refusal) as error:
            self.refuse(error)

    def _on_event(self, event: WantsTls | WantsGss | DirectTls | Cancel | Ready) -> None:
        match event:
            case WantsTls(b"S"):
                self._transport.pause_reading()  # what comes next is the handshake's, not ours
                self._transport.write(b"S")
                self._is_upgrading = True
                self._run(self._upgrade())
            case WantsTls(answer) | WantsGss(answer):
                self._transport.write(answer)
            case DirectTls(data):
                self._transport.pause_reading()
                self._is_upgrading = True
                self._run(self._upgrade(data))
            case Cancel(pid, secret):
                self._is_over = True
                self._run(self._cancel(pid, secret))
            case Ready():
                self._begin(event)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(coroutine)  # kept: the loop itself would forget it

    async def _cancel(self, pid: int, secret: bytes) -> None:
        self._timer.cancel()  # the request is bounded by itself
        try:
            await self._door.cancel(pid, secret)
        finally:
            self._transport.close()

    # --- encryption

    async def _upgrade(self, first: bytes = b"") -> None:
        """The handshake. `first` is its beginning where the client did not ask before."""
        try:
            self._transport = await self._handshake(first)
        except (Exception, asyncio.CancelledError) as error:  # uvloop has errors of its own beside OSErrors
            _log.info("handshake failed", reason=getattr(error, "reason", None) or type(error).__name__)
            self._is_over = True
            self._transport.abort()
            self._forget()  # connection_lost is not called while the protocol is between two hands
            return
        finally:
            self._is_upgrading = False
        if self._is_over:  # its time was up meanwhile
            self._transport.abort()
            self._forget()
            return
        if first and self._transport.get_extra_info("ssl_object").selected_alpn_protocol() != ALPN:
            self.refuse(ProtocolViolation("direct TLS needs the protocol postgresql to be negotiated (ALPN)"))
        early, self._early = self._early, b""
        if early and not self._is_over:
            self._take(early)

    async def _handshake(self, first: bytes) -> asyncio.Transport:
        assert self._context is not None
        plain, loop = self._transport, asyncio.get_running_loop()
        handshake = loop.create_task(
            loop.start_tls(
                plain,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._settings.login_timeout_s,
            )
        )
        try:
            if first:
                await asyncio.sleep(0)  # by now TLS has put itself in our place, and waits for the client's first bytes
                _feed(plain.get_protocol(), first)
            # Its own bound does not hold where the connection is closed beneath it (uvloop then never says so).
            async with asyncio.timeout(self._settings.login_timeout_s):
                secured = await handshake
        finally:
            handshake.cancel()
        if secured is None:  # asyncio's word for a connection that was lost meanwhile
            raise ConnectionResetError
        return secured

    # --- authentication

    def _begin(self, ready: Ready) -> None:
        self._ready = ready
        if ready.negotiate is not None:
            self._transport.write(ready.negotiate)
        if self._settings.authentication == Authentication.TRUST:
            self._admit(b"", None, ready.leftover)
            return
        user = ready.parameters["user"]
        self._scram = ScramServer(self._door.verifiers.get(user), user=user, secret=self._door.mock_secret)
        self._transport.write(messages.authentication_sasl([MECHANISM]))
        self._frames.feed(ready.leftover)
        self._authenticate()

    def _authenticate(self) -> None:
        for kind, frame in self._frames:
            if kind == _TERMINATE:
                self._end()
                return
            if kind != _PASSWORD:
                raise ProtocolViolation(f"expected SASL response, got message type {kind}")
            if self._is_first_answer:
                self._challenge(frame[5:])
            else:
                self._check(frame[5:])
                return

    def _challenge(self, body: bytes) -> None:
        assert self._scram is not None
        self._is_first_answer = False
        mechanism, data = messages.decode_sasl_initial_response(body)
        if mechanism != MECHANISM:
            raise ProtocolViolation("client selected an invalid SASL authentication mechanism")
        self._transport.write(messages.authentication_sasl_continue(self._scram.first(data or b"")))

    def _check(self, body: bytes) -> None:
        assert self._scram is not None
        final = self._scram.final(body)
        self._admit(messages.authentication_sasl_final(final), self._scram.client_key, self._frames.take_rest())

    def _admit(self, final: bytes, client_key: bytes | None, leftover: bytes) -> None:
        """Hands the connection over. Not one step of this waits: nothing can arrive in between."""
        assert self._ready is not None
        parameters = dict(self._ready.parameters)
        user, database = parameters.pop("user"), parameters.pop("database")
        server_key = None if client_key is None else self._door.verifiers[user].server_key
        login = ClientLogin(user, database, parameters, client_key, self._ready.minor, server_key)
        self._transport.write(final + messages.AUTHENTICATION_OK)
        take_over = self._door.admit(login)
        self._is_over = True
        self._forget()
        key = self._door.keys.new(self._door.clients, login.protocol)
        self._transport.set_protocol(take_over(self._transport, login, leftover, key))


def address_of(transport: asyncio.BaseTransport) -> str:
    """Where a client is, for people."""
    peer = transport.get_extra_info("peername")
    return str(Address(peer[0], peer[1])) if isinstance(peer, tuple) else "local"


def _feed(protocol: Any, data: bytes) -> None:
    """Hands bytes to a BufferedProtocol as its transport does."""
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        protocol.buffer_updated(count)
        data = data[count:]


def _keep_alive(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    ):
        if hasattr(socket, name):  # not all systems know them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
