"""Between commands and servers: relays TCP connections, cuts them, or lets them hang half open."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Self

HOST: Final = "127.0.0.1"
BOUND_S: Final = 60.0
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER for no time at all: closing sends RST."""


class Relay:
    """Listens on a port for each server. What happens to connections happens on a thread of its own."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._targets = dict(ports)
        self._links: dict[str, set[_Link]] = {name: set() for name in ports}
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self.ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(BOUND_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(BOUND_S)
        self._loop.close()

    def cut(self, name: str) -> int:
        """Resets every connection to that server, on both sides; returns how many they were."""
        return int(self._do(lambda: self._cut(name)))

    def freeze(self, name: str) -> int:
        """Nothing comes through any more on the connections that are there; new ones are as ever. See `cut_frozen`."""
        return int(self._do(lambda: self._freeze(name)))

    def cut_frozen(self) -> None:
        self._do(self._cut_frozen)

    # --- on the relay's thread

    def _do(self, work: Callable[[], Any]) -> Any:
        async def done() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(BOUND_S)

    async def _listen(self) -> None:
        for name in self._targets:
            server = await self._loop.create_server(self._protocol_for(name), HOST, 0)
            self._servers.append(server)
            self.ports[name] = server.sockets[0].getsockname()[1]

    def _protocol_for(self, name: str) -> Callable[[], _Side]:
        def new() -> _Side:
            link = _Link(self._links[name], lambda far: self._connect(name, far))
            return link.near

        return new

    async def _connect(self, name: str, far: _Side) -> None:
        await self._loop.create_connection(lambda: far, HOST, self._targets[name])

    def _cut(self, name: str) -> int:
        links = tuple(self._links[name])
        for link in links:
            link.reset()
        return len(links)

    def _freeze(self, name: str) -> int:
        for link in self._links[name]:
            link.freeze()
        return len(self._links[name])

    def _cut_frozen(self) -> None:
        for links in self._links.values():
            for link in tuple(links):
                if link.is_frozen:
                    link.reset()

    def _close(self) -> None:
        for server in self._servers:
            server.close()
        for name in self._links:
            self._cut(name)


class _Link:
    """A connection of a client, and ours to the server."""

    def __init__(self, siblings: set[_Link], connect: Callable[[_Side], Any]) -> None:
        self.near, self.far = _Side(self), _Side(self)
        self.near.other, self.far.other = self.far, self.near
        self.is_frozen = False
        self._siblings = siblings
        self._connect = connect
        siblings.add(self)

    async def open(self) -> None:
        try:
            await self._connect(self.far)
        except OSError:
            self.reset()

    def freeze(self) -> None:
        self.is_frozen = True
        for side in (self.near, self.far):
            if side.transport is not None:
                with suppress(RuntimeError):
                    side.transport.pause_reading()

    def reset(self) -> None:
        for side in (self.near, self.far):
            side.reset()
        self._siblings.discard(self)

    def ended(self, side: _Side) -> None:
        """One side closed: so does the other, but not what hangs."""
        if self.is_frozen:
            return
        if side.other.transport is not None:
            side.other.transport.close()
        self._siblings.discard(self)


class _Side(asyncio.Protocol):
    other: _Side

    def __init__(self, link: _Link) -> None:
        self.link = link
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for data in self._early:
            transport.write(data)
        self._early.clear()
        if self is self.link.near:
            self._opening = asyncio.get_running_loop().create_task(self.link.open())

    def data_received(self, data: bytes) -> None:
        if self.link.is_frozen:
            return
        if self.other.transport is None:
            self.other._early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.link.ended(self)

    def reset(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            with suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
