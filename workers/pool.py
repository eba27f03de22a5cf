"""The process pool: n worker processes, a pipe to each, and one thread that hands out tasks and takes in replies.

    submit ──► Queue ──► dispatcher thread ──pipe──► worker 1..n

Everything that happens to workers happens in the dispatcher: it waits for their pipes, which end when they die, and for
its bell, and owns all state but the queue. A worker that dies is replaced as soon as there is work for it, and its task
goes to the next one: tasks are safe to repeat, and the servers roll back what the dead worker had begun. A task that
several workers died with is given up.

A new worker imports the coordinator's main module, as `spawn` does: keep what that imports light.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from multiprocess.connection import wait
from multiprocess.context import SpawnContext

from shardmove.domain.errors import Failed, WorkerDied
from workers.executors import WAITING_PER_WORKER
from workers.process import Reply, serve
from workers.queue import Job, Queue
from workers.tasks import Result, Task

DEATHS_MAX = 3
"""So many workers may die with one task before it is given up: it is likely what they die of."""

CLOSE_PATIENCE_S = 30.0
"""How long `close` waits for tasks under way before it kills their workers."""

_GOODBYE_S = 5.0


@dataclass(eq=False, slots=True)
class _Worker:
    process: Any
    pipe: Any
    job: Job | None = None


class ProcessExecutor:
    """Runs tasks in processes of its own. See `Executor`.

    Attributes:
        memory_bytes_max: the most that any worker was ever resident with, as of the last reply.
    """

    def __init__(self, workers: int = 2, *, close_patience_s: float = CLOSE_PATIENCE_S) -> None:
        self.workers = workers
        self.memory_bytes_max = 0
        self._close_patience_s = close_patience_s
        self._deadline: float | None = None
        self._context = SpawnContext()  # never fork: the coordinator has threads
        self._crew: list[_Worker] = []
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._queue = Queue(WAITING_PER_WORKER * workers, on_change=self._ring)
        self._dispatcher = threading.Thread(target=self._dispatch, name="shardmove dispatcher", daemon=True)
        self._dispatcher.start()

    def submit(self, task: Task[Result]) -> Future[Result]:
        return self._queue.put(task)

    def stop(self) -> None:
        self._queue.stop()

    def close(self) -> None:
        """As `Executor.close`; workers whose tasks do not end within the patience are killed: WorkerDied."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._close_patience_s
        self.stop()
        self._dispatcher.join()
        self._bell.close()
        self._rope.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers that run now."""
        return tuple(worker.process.pid for worker in tuple(self._crew))

    def _ring(self) -> None:
        with suppress(OSError):  # full: it rings already; closed: nobody is there any more
            self._rope.send(b"!")

    # --- what follows runs on the dispatcher's thread only

    def _dispatch(self) -> None:
        # Workers inherit the mask: a Ctrl-C while they start must not end them before they ignore it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self.workers):
                self._hire()
            while not self._is_finished():
                self._hand_out()
                self._take_in(self._await_news())
        finally:
            self._give_up_the_rest()
            self._dismiss()

    def _is_finished(self) -> bool:
        return self._queue.is_drained and all(worker.job is None for worker in self._crew)

    def _hire(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,), name="shardmove worker", daemon=True)
        process.start()
        theirs.close()  # the worker's copy is the only one now: the pipe ends with it
        worker = _Worker(process, ours)
        self._crew.append(worker)
        return worker

    def _hand_out(self) -> None:
        while True:
            idle = next((worker for worker in self._crew if worker.job is None), None)
            if idle is None and len(self._crew) >= self.workers:
                return
            job = self._queue.take(wait=False)
            if job is None:
                return
            self._assign(job, idle or self._hire())

    def _assign(self, job: Job, worker: _Worker) -> None:
        worker.job = job
        try:
            worker.pipe.send(job.task)
        except OSError:
            self._bury(worker)
        except Exception as error:
            worker.job = None
            job.future.set_exception(Failed(f"a task could not be sent to a worker: {type(error).__name__}: {error}"))

    def _await_news(self) -> list[Any]:
        """Pipes that have a reply or have ended; waits for them, for the bell, or for the end of the patience."""
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        ready: list[Any] = wait([self._bell, *(worker.pipe for worker in self._crew)], timeout_s)
        if not ready:
            for worker in self._crew:
                worker.process.kill()
            self._deadline = None  # their pipes end now, and that is the news
        if self._bell in ready:
            self._bell.recv(4096)
        return ready

    def _take_in(self, news: list[Any]) -> None:
        for worker in tuple(self._crew):
            if worker.pipe not in news:
                continue
            try:
                reply: Reply = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker)
            else:
                self._settle(worker, reply)

    def _settle(self, worker: _Worker, reply: Reply) -> None:
        job, worker.job = worker.job, None
        assert job is not None, "a worker replies to tasks, once each"
        self.memory_bytes_max = max(self.memory_bytes_max, reply.memory_bytes)
        if reply.error is None:
            job.future.set_result(reply.result)
        else:
            job.future.set_exception(reply.error)

    def _bury(self, worker: _Worker) -> None:
        """Takes a worker that died out of the crew. Its task goes to the next one, unless it was given up."""
        self._crew.remove(worker)
        exit_code = _end(worker)
        job = worker.job
        if job is None:
            return
        job.deaths += 1
        if job.deaths < DEATHS_MAX and not self._queue.is_stopped:
            self._queue.put_back(job)
        else:
            job.future.set_exception(_died(job, exit_code))

    def _give_up_the_rest(self) -> None:
        """Nobody waits for ever, also if the dispatcher itself failed."""
        self._queue.stop()
        jobs = [worker.job for worker in self._crew if worker.job is not None]
        while (job := self._queue.take(wait=False)) is not None:
            jobs.append(job)
        for job in jobs:
            job.future.set_exception(WorkerDied("the worker pool ended before the task did"))

    def _dismiss(self) -> None:
        for worker in self._crew:
            worker.pipe.close()  # which tells it to go
        while self._crew:
            _end(self._crew.pop())


def _end(worker: _Worker) -> int | None:
    """Waits for a process whose pipe has ended, and kills it where that does not help. Returns its exit code."""
    worker.pipe.close()
    worker.process.join(_GOODBYE_S)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    exit_code: int | None = worker.process.exitcode
    worker.process.close()
    return exit_code


def _died(job: Job, exit_code: int | None) -> WorkerDied:
    how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return WorkerDied(
        f"a worker process ended ({how}) while it ran {type(job.task).__name__}, the last of {job.deaths}",
        hint="signal 9 that nobody sent is the kernel's, for want of memory; fewer [limits] workers need less",
    )
