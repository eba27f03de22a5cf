"""The router's door with a stand-in behind it: what is tested is who is let in, and how."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from router.cancel import BackendKey
from router.door import Door
from router.greeting import ClientLogin
from router.metrics import Stats
from router.peers import Peers
from shardmove.config import RouterSettings
from shardmove.wire import messages
from shardmove.wire.messages import Column, Frames
from shardmove.wire.scram import ScramClient, Verifier
from tests.support.engine import until

T = TypeVar("T")
PASSWORD = "correct horse"
USERS = {"joe": str(Verifier.make(PASSWORD)), "ann": str(Verifier.make(PASSWORD))}
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
DEADLINE_S = 60.0


class StandIn(asyncio.Protocol):
    """Answers every query with a row that says 1."""

    def __init__(
        self, house: House, transport: asyncio.Transport, login: ClientLogin, leftover: bytes, key: BackendKey
    ) -> None:
        self.house, self.transport, self.login, self.key = house, transport, login, key
        self.secret = key.secret
        self.cancelled = 0
        self.frames = Frames()
        house.clients[key.pid] = self
        house.logins.append(login)
        parameters = {"server_version": "15.0", "client_encoding": "UTF8", "standard_conforming_strings": "on"}
        hello = [messages.parameter_status(name, value) for name, value in parameters.items()]
        hello.append(messages.backend_key_data(key.pid, key.secret))
        transport.write(b"".join(hello) + messages.ready_for_query(b"I"))
        if leftover:
            self.data_received(leftover)

    def cancel(self) -> None:
        self.cancelled += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.house.clients.pop(self.key.pid, None)

    def data_received(self, data: bytes) -> None:
        self.frames.feed(data)
        for kind, _ in self.frames:
            if kind in b"SQ":
                row = messages.row_description([Column(b"one", 0, 0, 23, 4, -1, 0)]) + messages.data_row([b"1"])
                said = row + messages.command_complete("SELECT 1") if kind == ord("Q") else b""
                self.transport.write(said + messages.ready_for_query(b"I"))
            elif kind == ord("X"):
                self.transport.close()


@dataclass
class House:
    """A door that is open, its loop in a thread."""

    loop: asyncio.AbstractEventLoop
    directory: Path
    clients: dict[int, Any] = field(default_factory=dict)
    logins: list[ClientLogin] = field(default_factory=list)
    door: Door = field(init=False)
    port: int = 0

    def call(self, function: Callable[[], T]) -> T:
        """Runs it in the loop."""

        async def inside() -> T:
            return function()

        return self.run(inside())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)

    def dsn(self, **changes: object) -> dict[str, Any]:
        words = {"host": "127.0.0.1", "port": self.port, "user": "joe", "password": PASSWORD, "dbname": "shop"}
        return words | {"connect_timeout": 60, "sslrootcert": "/nowhere", "sslmode": "disable"} | changes

    def connected(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def tasks(self) -> int:
        return self.call(lambda: len(asyncio.all_tasks(self.loop)) - 1)

    def wait_until_empty(self) -> None:
        """Nothing is left of any connection."""
        eventually(lambda: not self.call(lambda: len(self.door.greetings)) and not self.clients)
        eventually(lambda: self.tasks() == 0)


def eventually(is_so: Callable[[], object], what: str = "") -> None:
    until(is_so, what or "it did not come about in time", timeout_s=DEADLINE_S)


@contextmanager
def opened(directory: Path, loop: str = "uvloop", **settings: Any) -> Iterator[House]:
    """A door with these settings; `joe` and `ann` are known."""
    house = House(LOOPS[loop](), directory)
    troubles: list[object] = []
    house.loop.set_exception_handler(lambda _, context: troubles.append(context))
    thread = threading.Thread(target=house.loop.run_forever)
    thread.start()

    async def start() -> list[asyncio.Server]:
        house.door = Door(
            RouterSettings(**{"users": USERS, "home": "s1"} | settings),
            stats=Stats(),
            clients=house.clients,
            peers=Peers(None, 0, 1),
            mock_secret=b"secret",
            session=lambda *given: StandIn(house, *given),
            console=lambda *given: StandIn(house, *given),
        )
        tcp = await house.loop.create_server(house.door.greeter(is_local=False), "127.0.0.1", 0)
        house.port = tcp.sockets[0].getsockname()[1]
        path = directory / f".s.PGSQL.{house.port}"
        return [tcp, await house.loop.create_unix_server(house.door.greeter(is_local=True), str(path))]

    async def stop(servers: list[asyncio.Server]) -> None:
        for server in servers:
            server.close()
        house.door.close()
        for client in list(house.clients.values()):
            client.transport.abort()
        await asyncio.sleep(0)

    try:
        servers = house.run(start())
        yield house
        house.run(stop(servers))
    finally:
        house.loop.call_soon_threadsafe(house.loop.stop)
        thread.join()
        house.loop.close()
    assert not troubles


@pytest.fixture(params=list(LOOPS))
def house(request: pytest.FixtureRequest, short_path: Path) -> Iterator[House]:
    with opened(short_path, loop=request.param) as house:
        yield house


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sockets: their names may have some hundred characters only."""
    return tmp_path_factory.mktemp("s")


class RawClient:
    """A client by hand: what it says can be cut anywhere."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.frames = Frames()

    def say(self, data: bytes, piece: int = 1 << 20) -> None:
        for at in range(0, len(data), piece):
            self.sock.sendall(data[at : at + piece])

    def next(self) -> tuple[bytes, bytes] | None:
        """The next message's kind and body, or None at the end."""
        while True:
            for kind, frame in self.frames:
                return bytes([kind]), frame[5:]
            data = self.sock.recv(65_536)
            if not data:
                return None
            self.frames.feed(data)

    def expect(self, kind: bytes) -> bytes:
        found = self.next()
        assert found is not None, f"the connection ended before {kind!r}"
        assert found[0] == kind, found
        return found[1]

    def error(self) -> dict[str, str]:
        """Of a connection that ends with it."""
        fields = messages.error_fields(self.expect(b"E"))
        assert fields["S"] == fields["V"] == "FATAL"
        assert self.next() is None
        return fields

    def log_in(self, user: str, password: str, piece: int = 1 << 20) -> None:
        """SCRAM, after the startup packet."""
        assert messages.decode_authentication(self.expect(b"R"))[0] == 10
        client = ScramClient(password=password)
        self.say(messages.sasl_initial_response(b"SCRAM-SHA-256", client.first()), piece)
        code, said = messages.decode_authentication(self.expect(b"R"))
        assert code == 11
        self.say(messages.sasl_response(client.final(said)), piece)

    def until_ready(self) -> dict[bytes, list[bytes]]:
        """All messages up to ReadyForQuery, by kind."""
        found: dict[bytes, list[bytes]] = {}
        while b"Z" not in found:
            message = self.next()
            assert message is not None
            found.setdefault(message[0], []).append(message[1])
        return found


def startup(minor: int = 0, **parameters: str) -> bytes:
    return messages.startup_message(messages.version_code(minor), {"user": "joe", "database": "shop"} | parameters)
