"""Routers as processes, over a world: started, struck, started again.

def test_…(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), pooling="transaction")
    with psycopg.connect(router.dsn()) as connection: …
    router.kill()
    router.start()
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, Self

import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

ROOT: Final = Path(__file__).parents[2]
ADMIN_DATABASE: Final = "shardmove"
USER: Final = "postgres"  # the superuser of the embedded servers, who lets everybody in
START_BOUND_S: Final = 120.0
CONNECT_BOUND_S: Final = 60
STOP_BOUND_S: Final = 60.0

# Below the ephemeral ports, and apart from those of the embedded servers: while a router is down nobody else takes its
# port, and no client of it connects to itself.
_PORTS: Final = range(12_000, 19_000)
_claims: dict[int, list[socket.socket]] = {}

# Kills a process group when its standard input ends, that is when the test's process dies, however it dies.
_GUARD: Final = 'read _; kill -s KILL -- "-$1" 2>/dev/null'


class Router:
    """One `shardmove router serve` and its address, which stays the same from one start to the next.

    Attributes:
        incarnation: odd while the router runs, and increased just *before* it is struck: an error that a client met
            between two equal odd numbers is not the strike's doing.
    """

    def __init__(self, config: Path, directory: Path, *, name: str = "router", **settings: Any) -> None:
        """`config`: a cluster.toml without [router]. `settings`: entries of [router], over those that tests want."""
        self.port = free_port()
        self.name = name
        self.incarnation = 0
        self._log = directory / f"{name}.err"
        self._config = directory / f"{name}.toml"
        wanted = {"listen": f"127.0.0.1:{self.port}", "authentication": "trust", "admins": [USER], **settings}
        self._config.write_text(config.read_text(encoding="utf-8") + section(wanted), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """When it returns, the router accepts clients."""
        assert not self.is_running, f"{self.name} runs already"
        begins_at = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shardmove", "router", "serve", "-c", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        guard = ["/bin/sh", "-c", _GUARD, "sh", str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        self._await_ready(begins_at)
        self.incarnation += 1
        return self

    def _await_ready(self, begins_at: int) -> None:
        """It says so once its sockets are open and it has its first routes."""
        assert self._process is not None
        deadline = time.monotonic() + START_BOUND_S
        while b"router ready on" not in self._log.read_bytes()[begins_at:]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise AssertionError(f"{self.name} did not start:\n{self.said}")
            time.sleep(0.02)

    # --- how to reach it

    def dsn(self, dbname: str = "shop", **more: Any) -> str:
        """For psycopg, as the superuser of the embedded servers."""
        words = {"host": "127.0.0.1", "port": self.port, "user": USER, "dbname": dbname, **more}
        return make_conninfo("", **{"connect_timeout": CONNECT_BOUND_S, **words})

    def environment(self, dbname: str = "shop") -> dict[str, str]:
        """For programs that read libpq's variables."""
        return {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": USER, "PGDATABASE": dbname}

    def show(self, what: str) -> list[dict[str, Any]]:
        """The rows of `SHOW …` of the admin database."""
        with psycopg.connect(self.dsn(ADMIN_DATABASE), autocommit=True, prepare_threshold=None) as connection:
            cursor = psycopg.ClientCursor(connection)  # the simple protocol, as operators' psql speaks it
            cursor.execute(f"SHOW {what}".encode())
            columns = [column.name for column in cursor.description or ()]
            return [dict(zip(columns, row, strict=True)) for row in cursor]

    # --- what it is and was

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def said(self) -> str:
        """Its output so far, of all its lives."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The router's process, and those that it started."""
        if not self.is_running:
            return []
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def memory_bytes(self) -> int:
        """Resident memory, the shared pages counted in each process."""
        return sum(_of(process, lambda p: p.memory_info().rss) for process in self.processes())

    def cpu_s(self) -> float:
        """User and system time so far."""
        return sum(_of(process, lambda p: sum(p.cpu_times()[:2])) for process in self.processes())

    # --- its ends

    def kill(self) -> None:
        """SIGKILL to all of its processes. Safe to repeat."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; returns its exit code. Safe to repeat."""
        return self._end(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> int:
        process, guard = self._process, self._guard
        if process is None:
            return 0
        self.incarnation += self.incarnation % 2
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            elif process.poll() is None:
                process.send_signal(number)
        try:
            return process.wait(STOP_BOUND_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also where it did not end, or left children behind
            process.wait(STOP_BOUND_S)
            self._process = self._guard = None
            if guard is not None:
                guard.kill()
                guard.communicate()
            self._await_port()

    def _await_port(self) -> None:
        """Children that were killed with it may have the port for a moment longer, and keep the next start from it."""
        deadline = time.monotonic() + STOP_BOUND_S
        while time.monotonic() < deadline:
            with closing(socket.socket()) as probe, suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))
                return
            time.sleep(0.005)

    def put_away(self) -> None:
        """For good: its port is anybody's."""
        self.kill()
        for claim in _claims.pop(self.port, ()):
            claim.close()


class Routers:
    """Starts routers, and ends them all: `routers.start(config)`. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Router] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def start(self, config: Path, **settings: Any) -> Router:
        """One that runs; `settings` are entries of [router]."""
        with self._lock:
            router = Router(config, self._directory, name=f"router-{next(self._numbers)}", **settings)
            self._started.append(router)
        return router.start()

    def check(self) -> None:
        """None of them has met an error of its own."""
        for router in self._started:
            assert "Traceback" not in router.said, router.said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for router in self._started:
            router.put_away()


def cancelled(connection: psycopg.Connection, cancel: Callable[[], object]) -> BaseException:
    """How a long statement ends; `cancel` is called as often as it needs: the first one may come before it runs."""
    ended: list[BaseException] = []

    def sleep() -> None:
        try:
            connection.execute("SELECT pg_sleep(60)")
        except psycopg.Error as error:
            ended.append(error)

    thread = threading.Thread(target=sleep)
    thread.start()
    while thread.is_alive():
        cancel()
        thread.join(0.05)
    return ended[0]


@pytest.fixture
def routers(tmp_path: Path) -> Iterator[Routers]:
    with Routers(tmp_path) as started:
        yield started
        started.check()


def section(settings: dict[str, Any]) -> str:
    """The settings as TOML; JSON writes strings, numbers, booleans and lists of them as TOML does."""
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    lines = ["[router]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name not in tables]
    for name, entries in tables.items():
        lines += [f"[router.{name}]", *(f"{entry} = {json.dumps(value)}" for entry, value in entries.items())]
    return "\n" + "\n".join(lines) + "\n"


def free_port(count: int = 1) -> int:
    """The first of so many ports that nobody listens on, outside of the range that the system deals out by itself.

    They are this process's from now on, also before somebody listens there, and while a router is down: whoever looks
    for one claims it by a UDP socket of the same number, which no other process can have then.
    """
    for port in random.SystemRandom().sample(_PORTS, 200):  # a seeded generator may be at the same point elsewhere
        claims: list[socket.socket] = []
        try:
            for each in range(port, port + count):
                claims.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                claims[-1].bind(("127.0.0.1", each))
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            for claim in claims:
                claim.close()
        else:
            _claims[port] = claims
            return port
    raise AssertionError("no port is free")


def _of(process: psutil.Process, number: Callable[[psutil.Process], float]) -> Any:
    """Nothing, where the process ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return number(process)
    return 0
