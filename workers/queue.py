"""The bounded queue in front of every executor: planning runs ahead of the work by so much and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from shardmove.domain.errors import Interrupted
from workers.tasks import Result, Task


@dataclass(eq=False, slots=True)
class Job:
    """A task on its way, and who waits for it. `deaths`: how many workers died with it."""

    task: Task[Any]
    future: Future[Any] = field(default_factory=Future)
    deaths: int = 0


class Queue:
    """First in, first out; `put` blocks while it is full. Thread-safe; a signal handler may call `stop`."""

    def __init__(self, room: int, *, on_change: Callable[[], None] = lambda: None) -> None:
        self._room = room
        self._on_change = on_change
        self._jobs: deque[Job] = deque()
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    @property
    def is_drained(self) -> bool:
        """Stopped, and everything that was begun has been taken."""
        with self._changed:
            return self._stopped and not self._jobs

    def put(self, task: Task[Result]) -> Future[Result]:
        """Blocks while the queue is full. Raises Interrupted, also from within the wait, once it is stopped."""
        job = Job(task)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._jobs) < self._room)
            if self._stopped:
                raise Interrupted("the workers were told to stop; the task was not begun")
            self._jobs.append(job)
            self._changed.notify_all()
        self._on_change()
        return job.future

    def put_back(self, job: Job) -> None:
        """To the front, past the bound: it was taken before, so that `stop` does not cancel it."""
        with self._changed:
            self._jobs.appendleft(job)
            self._changed.notify_all()

    def take(self, *, wait: bool) -> Job | None:
        """The next job that nobody cancelled; None where there is none (`wait`: and there will be none)."""
        with self._changed:
            while True:
                if wait:
                    self._changed.wait_for(lambda: self._stopped or bool(self._jobs))
                if not self._jobs:
                    return None
                job = self._jobs.popleft()
                self._changed.notify_all()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    return job

    def stop(self) -> None:
        """Takes no more, wakes everybody who waits, and cancels what was not begun. Safe to repeat."""
        with self._changed:
            self._stopped = True
            waiting = [job for job in self._jobs if not job.future.running()]
            self._jobs = deque(job for job in self._jobs if job.future.running())
            self._changed.notify_all()
        for job in waiting:
            if job.future.cancel():
                job.future.set_running_or_notify_cancel()
        self._on_change()
