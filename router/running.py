"""One process of the router, from its start to its end: everything put together, in one loop.

The end is graceful at first: nobody new is let in, idle clients are sent away, transactions may go on until
`shutdown_timeout_s`. Whoever asks a second time ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import structlog

from router.admin import AdminSession
from router.console import FIXED, Console, reloaded
from router.door import Door
from router.listening import Place
from router.metrics import exposed
from router.peers import Peers, Words
from router.service import Router
from router.session import Session
from shardmove.config import Address, Config
from shardmove.domain.errors import ShardmoveError

OnReady: TypeAlias = Callable[[Sequence[Address]], None]
_log = structlog.get_logger("shardmove.router")


@dataclass(frozen=True, slots=True)
class Seat:
    """What a process knows about itself and its siblings.

    Attributes:
        directory: of the siblings' private sockets; None for one that is alone.
        mock_secret: see `scram.mock_verifier`.
        lifeline: reads to its end when the parent is gone.
    """

    process: int = 0
    processes: int = 1
    directory: Path | None = None
    mock_secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    lifeline: socket.socket | None = None


async def serve(
    config: Config,
    *,
    places: Sequence[Place],
    seat: Seat,
    load: Callable[[], Config],
    on_ready: OnReady,
) -> None:
    """Serves until it is told to stop, by SIGTERM, SIGINT or the end of the lifeline.

    Args:
        load: reads the configuration again, for SIGHUP and RELOAD.
        on_ready: clients are served from now on, at these addresses.

    Raises:
        ConfigurationError, Unreachable: what keeps it from starting. Nothing is left running.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    router = Router(config, process=seat.process, name=f"{socket.gethostname()}:{places[0].address.port}")
    peers = Peers(seat.directory, seat.process, seat.processes)
    reload = _Reload(router, load)
    console = Console(router, peers, reload.run)
    door = Door(
        config.router,
        stats=router.stats,
        clients=router.sessions,
        peers=peers,
        mock_secret=seat.mock_secret,
        session=partial(Session, router),
        console=partial(AdminSession, console),
    )
    reload.door = door

    async def answer(question: Words) -> Words:
        if "cancel" in question:
            await door.cancel_here(question["cancel"], bytes.fromhex(question["secret"]))
            return {}
        return await console.answer(question)

    _watch(stop, now, reload, seat.lifeline)
    await router.start()
    try:
        await peers.start(answer)
        with exposed(router, config.router.metrics_address, seat.process) as metrics:
            async with _listening(door, places):
                _log.info("serving", process=seat.process, metrics=None if metrics is None else str(metrics))
                on_ready([place.address for place in places])
                await stop.wait()
                _log.info("stopping", clients=len(router.sessions))
            door.close()
            for each in list(console.sessions):
                each.close()
            await _stop(router, now)
    finally:
        await peers.stop()
        await router.stop(0)


@asynccontextmanager
async def _listening(door: Door, places: Sequence[Place]) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    servers: list[asyncio.Server] = []
    try:
        for place in places:
            is_local = place.address.is_local
            create = loop.create_unix_server if is_local else loop.create_server
            servers.append(await create(door.greeter(is_local=is_local), sock=place.listener()))
        yield
    finally:
        for server in servers:
            server.close()  # not wait_closed: it would wait for the clients, too


async def _stop(router: Router, now: asyncio.Event) -> None:
    """Ends sessions as they become idle, all of them when the time is up or somebody asks again."""
    stopping = asyncio.ensure_future(router.stop(router.settings.shutdown_timeout_s))
    asked = asyncio.ensure_future(now.wait())
    await asyncio.wait({stopping, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not stopping.done():
        stopping.cancel()
        await asyncio.wait({stopping})
        return  # whoever called us stops the router with no time to spare
    stopping.result()


def _watch(stop: asyncio.Event, now: asyncio.Event, reload: _Reload, lifeline: socket.socket | None) -> None:
    """Signals, and the parent's end."""
    loop = asyncio.get_running_loop()

    def ask() -> None:
        (now if stop.is_set() else stop).set()

    def parent_is_gone() -> None:
        assert lifeline is not None
        loop.remove_reader(lifeline)
        _log.warning("the parent process is gone")
        ask()

    loop.add_signal_handler(signal.SIGTERM, ask)
    loop.add_signal_handler(signal.SIGHUP, reload.begin)
    if lifeline is None:
        loop.add_signal_handler(signal.SIGINT, ask)
    else:  # Ctrl-C is for the parent, which says SIGTERM then
        loop.add_reader(lifeline, parent_is_gone)


class _Reload:
    """Adopts what the configuration says now, where that can change while clients are connected."""

    def __init__(self, router: Router, load: Callable[[], Config]) -> None:
        self.door: Door
        self._router = router
        self._load = load
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """On SIGHUP: what goes wrong is logged."""
        self._task = asyncio.get_running_loop().create_task(self._logged())

    async def _logged(self) -> None:
        try:
            await self.run()
        except ShardmoveError as error:
            _log.error("reload refused", reason=error.message, hint=error.hint)

    async def run(self) -> None:
        """Raises ShardmoveError; everything is as before then."""
        config = await asyncio.to_thread(self._load)
        old = self._router.settings
        settings = reloaded(old, config.router)
        self.door.adopt(settings)
        # What of the file is not [router], the shards above all, is as it was at the start.
        self._router.adopt(replace(self._router.config, router=settings))
        ignored = [name for name in sorted(FIXED) if getattr(config.router, name) != getattr(old, name)]
        _log.info("reloaded", needs_restart=ignored)
