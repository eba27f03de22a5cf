"""The mirror's thread: catch-ups one after the other while a step runs beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import psycopg

from shardmove.config import Limits
from shardmove.domain.errors import Failed, ShardmoveError, Unreachable
from shardmove.postgres.connect import explain, is_unreachable
from shardmove.protocol.catch_up import Mirror

PAUSE_BUSY_S = 0.01
"""A pass costs the same for one row as for some: what comes within a few milliseconds is carried together."""
PAUSE_IDLE_S = 0.1
PAUSE_UNREACHABLE_S = 1.0


class MirrorThread:
    """Keeps one direction of one move caught up until it is stopped or fails.

    A lost connection is opened anew, for as long as it takes: nothing is lost meanwhile, the journal grows. Any other
    error ends the thread; `check` raises it where the step that runs beside can see it.
    """

    def __init__(
        self, open_mirror: Callable[[], Mirror], limits: Limits, *, on_pass: Callable[[int, float], None]
    ) -> None:
        self._open = open_mirror
        self._limits = limits
        self._on_pass = on_pass
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._passed = threading.Condition()
        self._passes_begun = 0
        self._passes_done = 0
        self._in_step_since = time.monotonic()
        self.error: BaseException | None = None
        self.unreachable: str | None = None
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> MirrorThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def check(self) -> None:
        """Raises what ended the mirror, if anything did."""
        if self.error is not None:
            raise self.error

    def wait_for_pass(self, timeout_s: float) -> None:
        """Returns after a catch-up that began later than this call; raises what ended the mirror, or Failed."""
        with self._passed:
            wanted = self._passes_begun + 1
            self._wake.set()
            self._passed.wait_for(lambda: self._passes_done >= wanted or self.error is not None, timeout_s)
            done = self._passes_done >= wanted
        self.check()
        if not done:
            raise Failed(
                f"no catch-up came through within {timeout_s:g} s: {self.unreachable or 'the mirror is behind'}"
            )

    def _run(self) -> None:
        mirror: Mirror | None = None
        try:
            while not self._stop.is_set():
                pause = PAUSE_UNREACHABLE_S
                try:
                    if mirror is None or mirror.giver.closed or mirror.receiver.closed:
                        mirror = self._reopened(mirror)
                    pause = self._pass(mirror)
                    self.unreachable = None
                except (ShardmoveError, psycopg.Error) as error:
                    if not is_unreachable(error):
                        raise
                    self.unreachable = str(error)
                    if mirror is not None:
                        mirror.close()
                        mirror = None
                self._wake.wait(pause)
                self._wake.clear()
        except psycopg.Error as error:
            stopped = Failed(f"the mirror stopped: {explain(error)}")
            stopped.__cause__ = error
            self._end(stopped)
        except BaseException as error:
            self._end(error)
        finally:
            if mirror is not None:
                mirror.close()

    def _reopened(self, before: Mirror | None) -> Mirror:
        if before is not None:
            before.close()
        try:
            return self._open()
        except psycopg.OperationalError as error:
            raise Unreachable(str(error)) from error

    def _pass(self, mirror: Mirror) -> float:
        with self._passed:
            self._passes_begun += 1
            number = self._passes_begun
        began = time.monotonic()
        done = mirror.catch_up(rows_max=self._limits.mirror_rows)
        if done.is_empty:
            self._in_step_since = began
        self._on_pass(done.keys, time.monotonic() - self._in_step_since)
        with self._passed:
            self._passes_done = number
            self._passed.notify_all()
        return PAUSE_BUSY_S if done.keys else PAUSE_IDLE_S

    def _end(self, error: BaseException) -> None:
        with self._passed:
            self.error = error
            self._passed.notify_all()
