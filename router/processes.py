"""The processes of a router, and the parent that looks after them.

One process needs no parent. Several share the addresses; the parent serves nobody: it keeps the ports, starts its
children by fork (it has no thread and no loop, and its children share what it has imported), starts one again that
died, and hands on what it is told:

    SIGTERM, SIGINT   to the parent: SIGTERM to each child, and again if it comes again (then they end at once)
    SIGHUP            to the parent: the same to each child
    the parent dies   each child holds one end of a pair of sockets: it reads its end, and stops as on SIGTERM
    a child dies      the parent reads the end of the same pair, and starts another, at once or after a pause that grows
"""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Final

import structlog

from router.cancel import PROCESSES_MAX
from router.console import reloaded
from router.listening import Place, bound
from router.peers import private_directory
from router.running import OnReady, Seat, serve
from shardmove.config import Authentication, Config
from shardmove.domain.errors import ConfigurationError, Failed, ShardmoveError

PAUSE_MIN_S: Final = 0.1
PAUSE_MAX_S: Final = 10.0
STEADY_S: Final = 30.0
"""A child that lived for so long is started again at once when it dies."""

ASKS_MAX: Final = 2
"""So often children are asked to end; whoever asks once more has them killed."""
_READY: Final = b"R"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = structlog.get_logger("shardmove.router")


def run(load: Callable[[], Config], *, on_ready: OnReady) -> None:
    """Serves until it is told to stop.

    Args:
        load: reads the configuration; called again for each reload.
        on_ready: every process serves clients now, at these addresses.

    Raises:
        ConfigurationError, Unreachable: what keeps it from starting. Nothing is left running.
    """
    config = load()
    _check(config)
    with bound(config.router.addresses, is_shared=config.router.processes > 1) as places:
        if config.router.processes == 1:
            _run_loop(serve(config, places=places, seat=Seat(), load=load, on_ready=on_ready))
            return
        with private_directory() as directory:
            seat = Seat(processes=config.router.processes, directory=directory)
            _Parent(config, load, places, seat, on_ready).run()


def _check(config: Config) -> None:
    settings = config.router
    if settings.processes > PROCESSES_MAX:
        raise ConfigurationError(f"[router] processes can be {PROCESSES_MAX} at most, not {settings.processes}")
    if settings.authentication == Authentication.SCRAM and not settings.users:
        raise ConfigurationError(
            "[router.users] names nobody, so nobody could log in",
            hint="`shardmove router verifier` makes an entry for it from a password",
        )
    if settings.authentication == Authentication.TRUST:
        _log.warning("everybody who can connect is believed", authentication="trust", listen=settings.listen)


def _run_loop(work: Coroutine[Any, Any, None]) -> None:
    """With uvloop where there is one."""
    make_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with suppress(ImportError):
        from uvloop import new_event_loop as make_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(work)


@dataclass(slots=True)
class _Child:
    """One process. `channel` is the parent's end: a byte comes when it is ready, the end when it is dead."""

    process: int
    pid: int
    channel: socket.socket
    started: float = field(default_factory=time.monotonic)
    is_ready: bool = False


class _Parent:
    def __init__(
        self, config: Config, load: Callable[[], Config], places: Sequence[Place], seat: Seat, on_ready: OnReady
    ) -> None:
        self._config = config
        self._load = load
        self._places = places
        self._seat = seat
        self._on_ready = on_ready
        self._children: dict[int, _Child] = {}
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._is_announced = False
        self._stops = 0
        self._failure = 0
        self._selector = selectors.DefaultSelector()
        self._wakened, self._waker = socket.socketpair()

    def run(self) -> None:
        """Until all children have ended."""
        for end in (self._wakened, self._waker):
            end.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        before = {signum: signal.signal(signum, _nothing) for signum in _SIGNALS}
        previous = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            for process in range(self._seat.processes):
                self._start(process)
            while self._children or (self._due and not self._stops):
                self._wait()
        finally:
            for child in self._children.values():
                _signal(child, signal.SIGKILL)
            signal.set_wakeup_fd(previous)
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self._failure:
            raise Failed("a process of the router could not start", hint="the lines above say why")

    def _wait(self) -> None:
        now = time.monotonic()
        for process in [process for process, at in self._due.items() if at <= now and not self._stops]:
            del self._due[process]
            self._start(process)
        next_due = min(self._due.values(), default=None)
        for key, _ in self._selector.select(None if next_due is None else max(0.0, next_due - now)):
            if key.fileobj is self._wakened:
                self._on_signals(self._wakened.recv(4096))
            else:
                self._on_child(key.data)

    # --- children

    def _start(self, process: int) -> None:
        self._refresh()
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # a child would answer them as the parent does, at first
        pid = os.fork()
        if pid == 0:
            self._be_child(process, ours, theirs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        child = self._children[process] = _Child(process, pid, ours)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _refresh(self) -> None:
        """A child that is started late begins with what its siblings may have reloaded, if the file is right."""
        with suppress(ShardmoveError, OSError):
            settings = reloaded(self._config.router, self._load().router)
            self._config = replace(self._config, router=settings)

    def _be_child(self, process: int, parents_end: socket.socket, channel: socket.socket) -> None:
        """Never returns. No other process may keep a parent's end open, or nobody would notice that the parent died."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for signum, action in zip(_SIGNALS, (signal.SIG_DFL, signal.SIG_IGN, signal.SIG_IGN), strict=True):
                signal.signal(signum, action)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            for sock in (parents_end, self._wakened, self._waker, *(each.channel for each in self._children.values())):
                sock.close()
            seat = replace(self._seat, process=process, lifeline=channel)
            _run_loop(
                serve(
                    self._config,
                    places=self._places,
                    seat=seat,
                    load=self._load,
                    on_ready=lambda _: _tell(channel),
                )
            )
            code = 0
        except ShardmoveError as error:
            _log.error("could not start", process=process, reason=error.message, hint=error.hint)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _on_child(self, child: _Child) -> None:
        said = b""
        with suppress(ConnectionError):
            said = child.channel.recv(1)
        if said:
            child.is_ready = True
            self._announce()
        else:
            self._bury(child)

    def _announce(self) -> None:
        """Once, when all are ready for the first time."""
        ready = [child for child in self._children.values() if child.is_ready]
        if not self._is_announced and len(ready) == self._seat.processes:
            self._is_announced = True
            self._on_ready([place.address for place in self._places])

    def _bury(self, child: _Child) -> None:
        self._selector.unregister(child.channel)
        child.channel.close()
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        del self._children[child.process]
        if self._stops:
            return
        if not self._is_announced and code > 0:  # it could not start, and said why
            self._failure = code
            self._stop()
            return
        lived = time.monotonic() - child.started
        pause = 0.0 if lived > STEADY_S else min(PAUSE_MAX_S, self._pauses.get(child.process, 0.0) * 2 or PAUSE_MIN_S)
        self._pauses[child.process] = pause
        self._due[child.process] = time.monotonic() + pause
        _log.error(
            "a process died and is started again", process=child.process, pid=child.pid, code=code, pause_s=pause
        )

    # --- signals

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGHUP:
                self._tell_all(signal.SIGHUP)
            else:
                self._stop()

    def _stop(self) -> None:
        self._stops += 1
        self._tell_all(signal.SIGTERM if self._stops <= ASKS_MAX else signal.SIGKILL)

    def _tell_all(self, signum: signal.Signals) -> None:
        for child in self._children.values():
            _signal(child, signum)


def _nothing(_signum: int, _frame: FrameType | None) -> None:
    """The number arrives through the wakeup file."""


def _tell(channel: socket.socket) -> None:
    with suppress(OSError):  # the parent is gone: the lifeline will say so
        channel.send(_READY)


def _signal(child: _Child, signum: signal.Signals) -> None:
    """The process is ours and not waited for yet: its number means nobody else."""
    with suppress(ProcessLookupError):
        os.kill(child.pid, signum)
