"""Opening a connection to a shard: address, TLS, login. What libpq would do with the same connection string."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from router.server import Server
from router.tls import Host, Resolved, client_context
from shardmove.domain.errors import ShardmoveError, Unreachable
from shardmove.wire import messages
from shardmove.wire.login import Login, LoginRefused

APPLICATION_NAME = "shardmove router"


class NoServer(ShardmoveError):
    """No connection to the shard could be had in time, or at all. Nothing was sent.

    Attributes:
        sqlstate: what the client is told: 53300 (too many), 08006 (the shard does not answer), or the shard's own.
    """

    def __init__(self, message: str, *, hint: str | None = None, sqlstate: str = "08006") -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate

    def __reduce__(self) -> tuple[Callable[..., NoServer], tuple[object, ...]]:
        return _no_server, (self.message, self.hint, self.sqlstate)


def _no_server(message: str, hint: str | None, sqlstate: str) -> NoServer:
    return NoServer(message, hint=hint, sqlstate=sqlstate)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What we log in with where no password is known: keys that the client's own proof gave us."""

    client_key: bytes | None = None
    server_key: bytes | None = None


class _Greeter(asyncio.Protocol):
    """The beginning of a connection: the byte that answers SSLRequest, then the login; then the Server takes over."""

    def __init__(self) -> None:
        self.byte: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.logged_in: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.login: Login | None = None
        self.transport: asyncio.Transport
        self._frames = messages.Frames(1 << 20)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's own

    def data_received(self, data: bytes) -> None:
        try:
            if self.login is None:
                if not self.byte.done():
                    self.byte.set_result(data)
                return
            self._frames.feed(data)
            for kind, frame in self._frames:
                if answer := self.login.receive(kind, frame[5:]):
                    self.transport.write(answer)
                if self.login.is_done:
                    if not self.logged_in.done():  # whoever waited may have given up
                        self.logged_in.set_result(b"")
                    return
        except ShardmoveError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(Unreachable(f"the connection was closed{f': {exc}' if exc else ' by the server'}"))
        if not self.closed.done():
            self.closed.set_result(None)

    def _fail(self, error: Exception) -> None:
        for each in (self.byte, self.logged_in):
            if not each.done():
                each.set_exception(error)
                each.exception()


async def open_server(shard: str, options: Resolved, credentials: Credentials, *, timeout_s: float) -> Server:
    """A connection that has logged in, to the first of the addresses that answers.

    Raises:
        NoServer: the shard does not answer, refuses us, or does not talk TLS as its sslmode asks. Nothing stays open.
    """
    trouble: Exception | str = "it has no address"
    for host in options.hosts:
        for with_tls in options.attempts(host):
            try:
                async with asyncio.timeout(options.connect_timeout_s or timeout_s):
                    return await _open_at(shard, host, options, credentials, with_tls=with_tls)
            except TimeoutError:
                trouble = f"{host.address} gave no answer within {options.connect_timeout_s or timeout_s:g} s"
            except (OSError, ShardmoveError) as error:
                trouble = error
    if isinstance(trouble, LoginRefused):
        raise NoServer(
            f"shard {shard} refuses {options.user}: {trouble.message}", hint=trouble.hint, sqlstate=trouble.sqlstate
        ) from trouble
    raise NoServer(f"shard {shard} does not answer: {trouble}", hint="`shardmove shards` tries each")


async def _open_at(shard: str, host: Host, options: Resolved, credentials: Credentials, *, with_tls: bool) -> Server:
    context = await asyncio.to_thread(client_context, options, host) if with_tls else None
    transport, greeter = await _connect(host)
    try:
        if context is not None:
            transport = await _secured(transport, greeter, context, host, may_be_plain=options.sslmode == "prefer")
        return await _log_in(shard, host, transport, greeter, options, credentials)
    except BaseException:
        transport.abort()
        raise


async def _connect(host: Host) -> tuple[asyncio.Transport, _Greeter]:
    loop = asyncio.get_running_loop()
    if host.is_local:
        return await loop.create_unix_connection(_Greeter, host.socket_path)
    transport, greeter = await loop.create_connection(_Greeter, host.address, host.port)
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return transport, greeter


async def _secured(
    transport: asyncio.Transport, greeter: _Greeter, context: ssl.SSLContext, host: Host, *, may_be_plain: bool
) -> asyncio.Transport:
    transport.write(messages.SSL_REQUEST)
    answer = await greeter.byte
    if answer == b"S":
        secured = await asyncio.get_running_loop().start_tls(transport, greeter, context, server_hostname=host.host)
        if secured is None:  # the connection was lost in the handshake
            raise Unreachable("the connection was closed in the TLS handshake")
        greeter.transport = secured
        return secured
    if answer != b"N":  # more than the one byte would be somebody's words before the handshake
        raise Unreachable("it answers the request for TLS with something else than S or N")
    if not may_be_plain:
        raise Unreachable("it does not support TLS, and sslmode asks for it")
    return transport


async def _log_in(
    shard: str,
    host: Host,
    transport: asyncio.Transport,
    greeter: _Greeter,
    options: Resolved,
    credentials: Credentials,
) -> Server:
    login = Login(
        options.user,
        password=host.password,
        client_key=credentials.client_key,
        server_key=credentials.server_key,
        may_send_cleartext=host.is_local or transport.get_extra_info("ssl_object") is not None,
    )
    greeter.login = login
    parameters = {"database": options.database, "application_name": APPLICATION_NAME}
    if options.options:
        parameters["options"] = options.options
    transport.write(login.start(parameters))
    await greeter.logged_in
    if options.target_session_attrs in ("read-write", "primary"):
        for name in (b"in_hot_standby", b"default_transaction_read_only"):
            if login.parameters.get(name) == b"on":
                raise Unreachable(f"{host.address} is not read-write, and target_session_attrs asks for it")
    server = Server(shard, options.user)
    server.host = host
    server.pid, server.secret = login.pid, login.secret
    server.parameters = dict(login.parameters)
    server.connection_made(transport)
    transport.set_protocol(server)
    return server


async def cancel(host: Host, pid: int, secret: bytes, *, timeout_s: float) -> bool:
    """Asks the server to cancel what that connection does. Returns when the server has closed the request's own: True,
    or after a while: False, and it may still come.

    Never raises for a server that is away: its statement is gone, too. Not by TLS: the request holds no secret that an
    eavesdropper could use for more than a cancel, and libpq of release 16 and older sends it so as well.
    """
    try:
        async with asyncio.timeout(timeout_s):
            transport, greeter = await _connect(host)
            transport.write(messages.cancel_request(pid, secret))
            await asyncio.wait([greeter.closed])
            transport.abort()
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
