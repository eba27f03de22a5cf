"""A router within the test's process, its loop in a thread: for orders of events that no client can bring about."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from router.door import Door
from router.peers import Peers
from router.service import Router
from router.session import Session
from shardmove.config import load
from tests.support.router import section

Result = TypeVar("Result")
BOUND_S = 90.0


class Inside:
    """`troubles`: what escaped into the loop."""

    router: Router
    port: int

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.troubles: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, trouble: self.troubles.append(trouble))

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(BOUND_S)

    def call(self, what: Callable[[], Result]) -> Result:
        """In the loop's thread, within one step of the loop."""

        async def called() -> Result:
            return what()

        return self.run(called())

    @property
    def session(self) -> Session:
        """The newest client's."""
        return list(self.router.sessions.values())[-1]

    def pools(self) -> dict[str, tuple[int, int]]:
        """By shard, the connections: all, and those that are idle."""
        return self.call(lambda: {p.shard: (len(p.servers), len(p.idle)) for p in self.router.pools.values()})


@contextmanager
def inside(config_file: Path, *, is_uvloop: bool = True, **settings: Any) -> Iterator[Inside]:
    path = config_file.parent / "inside.toml"
    settings = {"authentication": "trust", "listen": "127.0.0.1:1", **settings}
    path.write_text(config_file.read_text(encoding="utf-8") + section(settings), encoding="utf-8")
    it = Inside(uvloop.new_event_loop() if is_uvloop else asyncio.new_event_loop())
    thread = threading.Thread(target=it.loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> asyncio.Server:
        config = load(path)
        it.router = Router(config)
        await it.router.start()
        door = Door(
            config.router,
            stats=it.router.stats,
            clients=it.router.sessions,
            peers=Peers(None, 0, 1),
            mock_secret=b"x" * 32,
            session=partial(Session, it.router),
            console=None,
        )
        server = await it.loop.create_server(door.greeter(is_local=False), "127.0.0.1", 0)
        it.port = server.sockets[0].getsockname()[1]
        return server

    server = it.run(begin())
    try:
        yield it
    finally:
        it.call(server.close)
        it.run(it.router.stop(0))
        it.loop.call_soon_threadsafe(it.loop.stop)
        thread.join(BOUND_S)
