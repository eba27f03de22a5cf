"""Embedded PostgreSQL servers: for the demo, the benchmarks and the tests; nothing has to be installed or configured.

    with Cluster(["s1", "s2"]) as cluster:
        psycopg.connect(cluster["s1"].dsn)

Each server is a real one with a system identifier of its own (hence an initdb each: a copied data directory would copy
the identifier, which the engine compares). It listens on a Unix socket and on the loopback address, and trusts whoever
connects: nothing here is for data that matters.

The servers end when the `with` block ends or the process that entered it dies, however it dies (see `watcher`).
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Literal, Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.domain.errors import ConfigurationError, Failed, NotFound, Refused
from shardmove.postgres import watcher
from shardmove.postgres.binaries import Binaries, find_binaries

Mode = Literal["smart", "fast", "immediate"]

SUPERUSER: Final = "postgres"
LOOPBACK: Final = "127.0.0.1"

SETTINGS: Final[Mapping[str, str]] = {
    "max_connections": "200",
    "max_prepared_transactions": "20",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %a ",
    "lc_messages": "C",
}
"""What differs from PostgreSQL's own defaults, unless the caller says otherwise."""

_SIGNALS: Final[Mapping[Mode, signal.Signals]] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

# Below every system's range of ephemeral ports. From inside it, while a server is down, a client's own outgoing port
# may be the server's: the restart then fails to bind, or the client's retries connect to themselves and succeed.
_PORTS: Final = range(20_000, 32_000)
_PORT_ATTEMPTS: Final = 20

_START_BOUND_S: Final = 60
_STOP_BOUND_S: Final = 60.0
_ORPHANS_BOUND_S: Final = 10.0
_DIRECTORY_BOUND_S: Final = 5.0
_SOCKET_PATH_BYTES_MAX: Final = 103  # sun_path of the strictest system is 104 bytes with its final zero

_NAME: Final = re.compile(r"[A-Za-z0-9_]{1,40}")


@dataclass(frozen=True, slots=True)
class Server:
    """One server. A plain value: it may be pickled, and used from any process that lives on the same machine.

    Every method may be repeated: stopping a stopped server and starting a running one change nothing.

    Attributes:
        directory: holds `data`, the server's data directory, and `server.log`.
        port: of the loopback address and in the socket's name; the same for as long as the cluster lives.
        dsn: to the database `postgres` as superuser, over the Unix socket.
    """

    name: str
    directory: Path
    port: int
    dsn: str
    binaries: Binaries

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None when the server is not running."""
        postmaster = watcher.postmaster_of(self.data)
        return None if postmaster is None else postmaster.pid

    @property
    def is_running(self) -> bool:
        return self.pid is not None

    def child_pids(self) -> tuple[int, ...]:
        """The process ids of backends and background processes, at this moment."""
        postmaster = watcher.postmaster_of(self.data)
        return () if postmaster is None else tuple(child.pid for child in postmaster.children(recursive=True))

    def dsn_for(self, dbname: str, *, tcp: bool = False) -> str:
        """The connection string to another database of this server, over the loopback address if `tcp`."""
        return make_conninfo(self.dsn, dbname=dbname, **({"host": LOOPBACK} if tcp else {}))

    def start(self) -> None:
        """Starts the server; when it returns, the server accepts connections.

        Raises:
            Failed: it did not start; the message holds the end of its log. It does not run.
        """
        with watcher.start_lock(self.data) as lock:
            if not self.is_running:
                self._forget_dead_postmaster()
                _retry_while_orphans_live(lambda: self._launch(lock))

    def stop(self, mode: Mode = "fast") -> None:
        """Stops the server as `pg_ctl stop` does; when it returns, its postmaster has ended.

        Raises:
            Failed: it still runs after a minute, for instance in `smart` mode with a client connected.
        """
        postmaster = watcher.postmaster_of(self.data)
        if postmaster is None:
            return
        postmaster.send_signal(_SIGNALS[mode])
        if not watcher.wait_gone([postmaster], _STOP_BOUND_S):
            raise Failed(
                f"server {self.name} (process {postmaster.pid}) still runs {_STOP_BOUND_S:.0f} s after a {mode} stop"
            )

    def restart(self, mode: Mode = "fast") -> None:
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL to the postmaster and its children, as when the machine loses power but keeps its disk cache."""
        postmaster = watcher.postmaster_of(self.data)
        if postmaster is not None:
            watcher.kill(postmaster)

    def _forget_dead_postmaster(self) -> None:
        """PostgreSQL would take a zombie, or whoever has the number by now, for its live predecessor."""
        sockets = Path(str(conninfo_to_dict(self.dsn)["host"]))
        (sockets / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _launch(self, lock: IO[bytes]) -> None:
        seen = self.log.stat().st_size if self.log.exists() else 0
        options = ("--wait", f"--timeout={_START_BOUND_S}", "--silent", f"--log={self.log}", f"--pgdata={self.data}")
        try:
            self.binaries.run("pg_ctl", "start", *options, lock=lock)
        except Failed as failure:
            if postmaster := watcher.postmaster_of(self.data):
                watcher.kill(postmaster)
            raise Failed(f"server {self.name} did not start: {self._log_from(seen) or failure}") from failure

    def _log_from(self, offset: int) -> str:
        with suppress(FileNotFoundError):
            return self.log.read_bytes()[offset:][-4000:].decode(errors="replace").strip()
        return ""


class Cluster:
    """Several embedded servers that live as long as the `with` block, and never longer than its process.

    Args:
        names: one server each.
        binaries: the directory of initdb, pg_ctl and postgres; else that of SHARDMOVE_PG_BIN; else the wheel's.
        settings: of every server, over `SETTINGS`. `fsync` is on unless they say `{"fsync": "off"}`.
        directory: keeps the servers' data for the next cluster that is given it; None: in a temporary directory,
            removed at the end. One cluster at a time.

    Raises (on entering; nothing runs and nothing temporary is left):
        ConfigurationError: the names or the binaries cannot be used.
        Refused: the directory is another cluster's, or one of its servers was started by somebody else.
        Failed: a server could not be created or started.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        binaries: Path | None = None,
        settings: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._names = _checked(names)
        self._wanted_binaries = binaries
        self._settings = {**SETTINGS, **(settings or {})}
        self._directory = None if directory is None else directory.resolve()
        self._servers: dict[str, Server] = {}
        self._ending = ExitStack()
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        self._owner = os.getpid()
        with ExitStack() as ending:
            temporary = _temporary_directory()
            leash = _Leash(temporary)
            ending.callback(leash.release)
            binaries = find_binaries(self._wanted_binaries, copies=temporary)
            binaries.own(temporary)
            root = self._directory or temporary
            homes = _make_homes(root, self._names, binaries)
            with _claimed(root) as claim:
                _refuse_strangers(homes.values())
                leash.tie([_data(home) for home in homes.values()], claim)
            self._servers = self._start_all(homes, temporary, binaries)
            if self._directory is not None:
                ending.callback(self._stop_orderly)
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._owner:  # a forked child leaves the block too, and owns nothing
            self._ending.close()

    def __getitem__(self, name: str) -> Server:
        try:
            return self._servers[name]
        except KeyError:
            raise NotFound(f"no embedded server is called {name!r}") from None

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers.values())

    def _start_all(self, homes: Mapping[str, Path], sockets: Path, binaries: Binaries) -> dict[str, Server]:
        def start(name: str) -> Server:
            _initialize(homes[name], binaries, is_durable=self._directory is not None)
            return _start_on_free_port(name, homes[name], sockets, binaries, self._settings)

        with ThreadPoolExecutor(len(homes)) as pool:
            return dict(zip(homes, pool.map(start, homes), strict=True))

    def _stop_orderly(self) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(Server.stop, self))


class _Leash:
    """The pipe whose end the watcher waits for: released by `release`, or by the death of the process that tied it."""

    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._watcher: subprocess.Popen[bytes] | None = None

    def tie(self, data_directories: Sequence[Path], claim: IO[bytes]) -> None:
        """When it returns, the watcher watches, and keeps the claim until it has ended."""
        self._watcher = subprocess.Popen(
            (sys.executable, "-P", watcher.__file__, self._temporary, *data_directories),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            pass_fds=(claim.fileno(),),
            start_new_session=True,  # Ctrl-C is for the owner
        )
        _leashes.add(self)
        assert self._watcher.stdout is not None
        with self._watcher.stdout as stdout:
            if stdout.readline() != watcher.READY:
                raise Failed("the watcher of the embedded servers did not start")

    def release(self) -> None:
        """Has the watcher end the servers that still run and remove the temporary directory; waits until it has."""
        if self._watcher is None:
            shutil.rmtree(self._temporary)
            return
        self.let_go()
        if status := self._watcher.wait():
            raise Failed(f"the watcher of the embedded servers ended with status {status}; see {self._temporary}")

    def let_go(self) -> None:
        """Closes this process's end of the pipe."""
        _leashes.discard(self)
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()


_leashes: set[_Leash] = set()


def _let_go_of_all() -> None:
    for leash in tuple(_leashes):
        leash.let_go()


# A forked child inherits the pipe, and would keep the servers alive after their owner's death.
os.register_at_fork(after_in_child=_let_go_of_all)


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    if not names or len(set(names)) != len(names) or not all(_NAME.fullmatch(name) for name in names):
        raise ConfigurationError(f"embedded servers need distinct names of letters, digits and _, not {list(names)}")
    return tuple(names)


def _temporary_directory() -> Path:
    """A new directory, whose path is short enough for a Unix socket in it."""
    path = Path(tempfile.mkdtemp(prefix="shardmove-")).resolve()
    if len(os.fsencode(path / f".s.PGSQL.{_PORTS.stop}")) <= _SOCKET_PATH_BYTES_MAX:
        return path
    path.rmdir()
    return Path(tempfile.mkdtemp(prefix="shardmove-", dir="/tmp")).resolve()


def _data(home: Path) -> Path:
    return home / "data"


def _make_homes(root: Path, names: Sequence[str], binaries: Binaries) -> dict[str, Path]:
    homes = {name: root / name for name in names}
    for directory in (root, *homes.values()):
        if not directory.exists():
            directory.mkdir(parents=True)
            binaries.own(directory)
    binaries.require_reach(root)
    return homes


@contextmanager
def _claimed(root: Path) -> Iterator[IO[bytes]]:
    """The open file that stands for the right to run servers in `root`; who inherits it keeps the right.

    Waits a little: the watcher of a cluster that has just died may still be ending its servers.
    """
    with (root / "cluster.lock").open("ab") as claim:
        deadline = time.monotonic() + _DIRECTORY_BOUND_S
        while True:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refused(f"{root} is in use by another cluster of embedded servers") from None
            time.sleep(0.02)
        yield claim


def _refuse_strangers(homes: Iterable[Path]) -> None:
    for home in homes:
        if stranger := watcher.postmaster_of(_data(home)):
            raise Refused(
                f"{_data(home)} is served by process {stranger.pid}, which no cluster of embedded servers looks after",
                hint=f"stop it: pg_ctl stop -D {_data(home)}",
            )


def _initialize(home: Path, binaries: Binaries, *, is_durable: bool) -> None:
    """Creates the data directory unless it exists; all of it or nothing, whenever we die."""
    data, unfinished = _data(home), home / "data.unfinished"
    with watcher.start_lock(data) as lock:
        if data.exists():
            return
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", f"--username={SUPERUSER}", "--no-instructions"]
        options += [] if is_durable else ["--no-sync"]
        binaries.run("initdb", *options, f"--pgdata={unfinished}", lock=lock)
        with (unfinished / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude_if_exists = 'shardmove.conf'\n")
        unfinished.rename(data)


def _start_on_free_port(
    name: str, home: Path, sockets: Path, binaries: Binaries, settings: Mapping[str, str]
) -> Server:
    """Another process may take a port between our look and the server's: then the next one."""
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        port = _free_port()
        own = {"listen_addresses": LOOPBACK, "port": str(port), "unix_socket_directories": str(sockets)}
        _write_settings(_data(home), {**settings, **own}, binaries)
        dsn = make_conninfo(host=str(sockets), port=port, user=SUPERUSER, dbname="postgres")
        server = Server(name, home, port, dsn, binaries)
        try:
            server.start()
        except Failed as failure:
            if "Address already in use" not in failure.message or attempt == _PORT_ATTEMPTS:
                raise
        else:
            return server
    raise AssertionError("the last attempt returns or raises")


def _free_port() -> int:
    choose = random.SystemRandom().choice  # never the seeded generator: parallel test processes share its seed
    for _ in range(1000):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.bind((LOOPBACK, port := choose(_PORTS)))
            return port
    raise Failed(f"no free port on {LOOPBACK} between {_PORTS.start} and {_PORTS.stop - 1}")


def _write_settings(data: Path, settings: Mapping[str, str], binaries: Binaries) -> None:
    path = data / "shardmove.conf"
    path.write_text("".join(f"{name} = {_quoted(value)}\n" for name, value in settings.items()))
    binaries.own(path)


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _retry_while_orphans_live(launch: Callable[[], None]) -> None:
    """After the death of a postmaster alone, its backends hold the shared memory until they notice."""
    deadline = time.monotonic() + _ORPHANS_BOUND_S
    while True:
        try:
            return launch()
        except Failed as failure:
            if "pre-existing shared memory block" not in failure.message or time.monotonic() > deadline:
                raise
        time.sleep(0.05)
