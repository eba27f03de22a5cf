"""Executors: who runs tasks, behind one protocol."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Protocol, Self

from workers.connections import Connections
from workers.queue import Job, Queue
from workers.tasks import Result, Task, run

WAITING_PER_WORKER = 2
"""So many tasks wait for each worker at most; then `submit` blocks."""


class Executor(Protocol):
    """Runs tasks, several at a time. Leaving the `with` block closes it."""

    @property
    def workers(self) -> int:
        """How many tasks run at a time."""
        ...

    def submit(self, task: Task[Result]) -> Future[Result]:
        """Queues a task; blocks while 2 tasks a worker are waiting. Callbacks of the future must not submit.

        The future's exception is what the task raised. WorkerDied: it was given up after several workers died with it.

        Raises:
            Interrupted: the executor was stopped, before or during the wait. The task was not begun.
        """
        ...

    def stop(self) -> None:
        """Takes no more tasks, cancels those not begun, wakes blocked submits, and does not wait.

        From any thread, and from a signal handler.
        """
        ...

    def close(self) -> None:
        """Stops, waits for the tasks under way, and leaves no thread or process behind. Safe to repeat."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class InlineExecutor:
    """Runs tasks in threads of this process: for small moves, and where functions of the product are replaced."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._queue = Queue(WAITING_PER_WORKER * workers)
        self._threads = [
            threading.Thread(target=self._work, name=f"shardmove worker {number}", daemon=True)
            for number in range(1, workers + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task[Result]) -> Future[Result]:
        return self._queue.put(task)

    def stop(self) -> None:
        self._queue.stop()

    def close(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        with Connections() as connections:
            while (job := self._queue.take(wait=True)) is not None:
                _settle(job, connections)


def _settle(job: Job, connections: Connections) -> None:
    try:
        result = run(job.task, connections)
    except BaseException as error:
        job.future.set_exception(error)
    else:
        job.future.set_result(result)
