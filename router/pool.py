"""Connections to the shards: opened, lent and taken back.

A pool is one shard's, for one user. At most `servers_max` connections are open or being opened; who comes later waits
in line, for `queue_timeout_s` at most. A connection that comes back is lent again only if its state is exactly known.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from router.opening import Credentials, NoServer, open_server
from router.server import Server
from router.tls import Resolved


class Pool:
    """The connections to one shard for one user."""

    def __init__(
        self,
        shard: str,
        user: str,
        options: Callable[[], Resolved],
        *,
        servers_max: int,
        queue_timeout_s: float,
        connect_timeout_s: float,
    ) -> None:
        self.shard = shard
        self.user = user
        self.credentials = Credentials()
        self.servers: set[Server] = set()
        self.idle: list[Server] = []
        self.trouble: str | None = None
        self._options = options
        self._servers_max = servers_max
        self._queue_timeout_s = queue_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._opening = self._replacing = 0
        self._line: deque[asyncio.Future[Server]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    def take(self) -> Server | None:
        """An idle connection at once, if there is one: the one used last, so that others may grow old."""
        while self.idle:
            server = self.idle.pop()
            if server.is_clean:
                server.on_idle_loss = None
                return server
            self.discard(server)
        return None

    async def acquire(self) -> Server:
        """A connection, from the idle ones, a new one, or the first that comes back. Raises NoServer."""
        if not self._line and (server := self.take()) is not None:
            return server
        if len(self.servers) + self._opening < self._servers_max:
            return await self._open()
        waiting: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self._line.append(waiting)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                server = await waiting
        except (TimeoutError, asyncio.CancelledError) as error:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self.give_back(waiting.result())  # it came in the instant in which we gave up
            if isinstance(error, asyncio.CancelledError):
                raise
            raise NoServer(
                f"no connection to shard {self.shard} became free within {self._queue_timeout_s:g} s",
                hint="raise [router] servers_max, or shorten transactions",
                sqlstate="53300",
            ) from None
        finally:
            with suppress(ValueError):
                self._line.remove(waiting)
        if not server.is_clean:  # lost in the instant in which it was handed over
            self.discard(server)
            return await self.acquire()
        return server

    def give_back(self, server: Server) -> None:
        """Takes a connection back: the next in line gets it, or it rests; one whose state is not known is closed."""
        server.holder = None
        if not server.is_clean:
            self.discard(server)
            return
        server.since = time.monotonic()
        while self._line:
            waiting = self._line.popleft()
            if not waiting.done():
                waiting.set_result(server)
                return
        server.on_idle_loss = self.discard
        self.idle.append(server)

    def discard(self, server: Server) -> None:
        """Closes a connection for good. Whoever waits may open another."""
        server.holder = None
        self.servers.discard(server)
        with suppress(ValueError):
            self.idle.remove(server)
        server.close()
        self._refill()

    def close_older(self, age_s: float) -> None:
        """Closes what has been idle for so long."""
        edge = time.monotonic() - age_s
        for server in [each for each in self.idle if each.since < edge]:
            self.discard(server)

    def close(self) -> None:
        for server in list(self.servers):
            self.discard(server)

    async def _open(self) -> Server:
        self._opening += 1
        return await self._opened()

    async def _opened(self) -> Server:
        """One more connection, which is counted as being opened already."""
        is_open = False
        try:
            server = await open_server(
                self.shard,
                await asyncio.to_thread(self._options),  # reads files: the passfile may have changed
                self.credentials,
                timeout_s=self._connect_timeout_s,
            )
            is_open = True
        except NoServer as error:
            self.trouble = error.message
            self._fail_line(error)
            raise
        finally:
            self._opening -= 1
            if not is_open:
                self._refill()  # whoever is in line waited for this one, too
        self.trouble = None
        self.servers.add(server)
        return server

    def _fail_line(self, error: NoServer) -> None:
        """The shard takes no connection: those in line need not wait to hear that."""
        line, self._line = self._line, deque()
        for waiting in line:
            if not waiting.done():
                waiting.set_exception(error)

    def _refill(self) -> None:
        """Opens connections for those in line, as far as there is room."""
        while self._replacing < len(self._line) and len(self.servers) + self._opening < self._servers_max:
            self._opening += 1
            self._replacing += 1
            asyncio.get_running_loop().create_task(self._replace())

    async def _replace(self) -> None:
        try:
            server = await self._opened()
        except NoServer:
            return
        finally:
            self._replacing -= 1
        self.give_back(server)
