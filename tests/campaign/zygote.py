"""A warm process that forks commands: each is a process of its own, with an environment and files of its own.

Starting an interpreter and importing the command line costs more than most of what is played here. Requests come as
JSON lines on standard input, news goes out as JSON lines on standard output: {"pid": …} for a request, in order, and
{"ended": pid, "status": …}. Worker processes are forked likewise, from a fork server that knows the tasks.

When standard input ends, everything that was forked is killed.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
from contextlib import suppress
from functools import partial
from typing import Any, Final

from tests.campaign import worker

_PRELOADED: Final = (
    "shardmove.cli.verbs",
    "shardmove.demo.ledger",
    "shardmove.coordinator.operating",
    "workers.copy",
    "workers.digest",
    "workers.erase",
    "workers.pool",
    "multiprocess.popen_forkserver",
    "psycopg_binary",
    "tests.campaign.twins",
)
_PRELOADED_BY_WORKERS: Final = (
    "tests.campaign.worker",
    "workers.process",
    "workers.copy",
    "workers.digest",
    "workers.erase",
    "psycopg_binary",
)


def main() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    from multiprocess import forkserver

    forkserver.set_forkserver_preload(list(_PRELOADED_BY_WORKERS))
    forkserver.ensure_running()
    gc.collect()
    gc.freeze()
    _serve()


def _serve() -> None:
    bell, rope = os.pipe()
    os.set_blocking(rope, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(rope)
    alive: set[int] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([0, bell], [], [])
        if bell in ready:
            os.read(bell, 4096)
            _reap(alive)
        if 0 not in ready:
            continue
        received = os.read(0, 65536)
        if not received:
            break
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            pid = _fork(json.loads(line))
            alive.add(pid)
            _tell({"pid": pid})
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reap(alive: set[int]) -> None:
    for pid in tuple(alive):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            alive.discard(pid)
            _tell({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(news: dict[str, Any]) -> None:
    os.write(1, json.dumps(news).encode() + b"\n")


def _fork(request: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become(request, parent)
        except SystemExit as ended:
            os._exit(_flushed(ended.code if isinstance(ended.code, int) else 1))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(_flushed(1))
        os._exit(_flushed(0))
    return pid


def _flushed(code: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _become(request: dict[str, Any], parent: int) -> None:
    """This process is the command from here on."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    worker.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    for number, (path, flags) in enumerate(
        (
            (os.devnull, os.O_RDONLY),
            (request["out"], os.O_WRONLY | os.O_CREAT),
            (request["err"], os.O_WRONLY | os.O_CREAT),
        )
    ):
        handle = os.open(path, flags | os.O_APPEND, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    os.environ.update(request["env"])
    faulthandler.register(signal.SIGUSR1)
    sys.modules["__main__"].__spec__ = None  # workers import no main module: none of ours
    del sys.modules["__main__"].__file__
    _fork_workers(request)
    sys.argv = ["shardmove", *request["argv"]]
    if os.environ.get(worker.TWIN):
        from tests.campaign import twins

        twins.take_away(os.environ[worker.TWIN])
    from shardmove.cli import app

    app.main()


def _fork_workers(request: dict[str, Any]) -> None:
    """The pool's workers come from the fork server; else they are as `spawn` makes them."""
    from multiprocess import forkserver
    from multiprocess.context import ForkServerContext

    from workers import pool

    forkserver._forkserver.ensure_running = lambda: None  # it runs; it is not our child, so it cannot be asked
    pool.SpawnContext = ForkServerContext  # type: ignore[misc]
    pool.serve = partial(worker.work, request["env"], request["err"])  # type: ignore[assignment]


if __name__ == "__main__":
    main()
