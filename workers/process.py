"""What runs in a worker process: one task after the other, from a pipe and back into it.

A worker never outlives the coordinator: a thread waits for the coordinator's end, however it comes, and ends the
process at once, also in the middle of a COPY; the servers roll back. Kept light: it imports neither the catalog nor
the command line.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiprocess.connection import wait
from multiprocess.process import parent_process

from shardmove import faults
from shardmove.domain.errors import Failed, ShardmoveError
from workers.connections import Connections
from workers.tasks import Task, run


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a task. `memory_bytes`: the most that the worker was ever resident with."""

    result: Any
    error: ShardmoveError | None
    memory_bytes: int


def serve(pipe: Any) -> None:
    """Runs tasks until the pipe ends. Ctrl-C goes to the whole process group: the coordinator decides, not we."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faults.arm_as_ordered("worker")
    threading.Thread(target=_end_with_the_coordinator, name="leash", daemon=True).start()
    # A coordinator that was killed with our answer unread leaves no EOF, but a reset: the pipe has ended all the same.
    with Connections() as connections, suppress(EOFError, OSError):
        while True:
            task: Task[Any] = pipe.recv()
            pipe.send(_answer(task, connections))


def _end_with_the_coordinator() -> None:
    coordinator = parent_process()
    assert coordinator is not None, "a worker is always started by a coordinator"
    wait([coordinator.sentinel])
    os._exit(1)


def _answer(task: Task[Any], connections: Connections) -> Reply:
    try:
        return Reply(run(task, connections), None, memory_bytes())
    except Exception as error:
        return Reply(None, _portable(error), memory_bytes())


def _portable(error: Exception) -> ShardmoveError:
    """An error that certainly arrives: ours as it is, any other by its type's name and its words."""
    if isinstance(error, ShardmoveError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return Failed(f"{type(error).__name__}: {error}", hint=error.hint)
        return error
    return Failed(f"a worker met {type(error).__name__}: {error}")


def memory_bytes() -> int:
    """The peak of this process's resident memory."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not on Linux: there, this number begins with what the parent had.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
