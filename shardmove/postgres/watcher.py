"""Servers end with their owner, also when the owner is given no chance to say goodbye.

An owner of embedded servers runs this file as a program of its own, names the servers' data directories, and keeps the
write end of its standard input. That pipe ends when the owner closes it or dies, however it dies. The program then ends
exactly the postmasters of those directories, removes the owner's temporary directory, and exits.

- A postmaster is known by the process id in its data directory *and* by the directory on that process's command line:
  a number that the system gave to somebody else meanwhile is left alone. Nothing is ever looked for by name.
- Whatever starts a server, or creates its directory, holds that server's start lock until it has ended. The watcher
  takes every lock before it looks, so that a start which outlived its owner cannot slip past it.

Runs without the rest of the package (`python -P watcher.py TEMPORARY DATA…`): it has to be ready within milliseconds.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

READY = b"watching\n"
"""What the watcher writes once it watches; from then on the promise holds."""

SHUTDOWN_PATIENCE_S = 10.0
"""PostgreSQL kills its own children 5 s into an immediate shutdown; who needs twice that is stuck."""

_POLL_S = 0.005


@contextmanager
def start_lock(data: Path) -> Iterator[IO[bytes]]:
    """Holds the right to start the server of `data`, or to declare it ended.

    The lock belongs to the open file that is yielded: a child that inherits it holds the lock too, until it ends.
    """
    with (data.parent / "start.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def postmaster_of(data: Path) -> psutil.Process | None:
    """The live postmaster of this data directory, or None. A zombie is not alive."""
    try:
        pid, directory, *_ = (data / "postmaster.pid").read_text().splitlines()
        process = psutil.Process(int(pid))
        arguments = process.cmdline()
    except (FileNotFoundError, ValueError, psutil.Error):
        return None
    if directory != str(data) or directory not in arguments or _is_gone(process):
        return None
    return process


def wait_gone(processes: Sequence[psutil.Process], bound_s: float) -> bool:
    """Whether all of them ended within `bound_s` seconds. They need not be children of ours, nor be reaped."""
    deadline = time.monotonic() + bound_s
    while not all(_is_gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def kill(postmaster: psutil.Process) -> None:
    """SIGKILL to the postmaster and to all its children; when it returns, none of them runs."""
    with suppress(psutil.NoSuchProcess):
        postmaster.suspend()  # else a child could be born between the list and the last signal
        doomed = [postmaster, *postmaster.children(recursive=True)]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_gone(doomed, SHUTDOWN_PATIENCE_S)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end_all(data_directories: Sequence[Path]) -> None:
    postmasters = [found for data in data_directories if (found := postmaster_of(data))]
    for postmaster in postmasters:
        with suppress(psutil.NoSuchProcess):
            postmaster.send_signal(signal.SIGQUIT)
    for postmaster in postmasters:
        if not wait_gone([postmaster], SHUTDOWN_PATIENCE_S):
            kill(postmaster)


def main(temporary: Path, data_directories: Sequence[Path]) -> None:
    """Waits for the end of standard input, then ends the servers and removes `temporary`."""
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    sys.stdin.buffer.read()
    with ExitStack() as locks:
        for data in data_directories:
            with suppress(FileNotFoundError):  # somebody removed the directory: no start can succeed there
                locks.enter_context(start_lock(data))
        _end_all(data_directories)
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
