"""Ctrl-C: the first one asks the step under way to end at its next safe place, the second one ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable(*, timeout_s: float | None = None) -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT or SIGTERM sets, and the end of the timeout.

    The next signal ends the process at once, by that signal; what is committed stays.
    """
    stop, asked = threading.Event(), threading.Event()

    def ask(signum: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        asked.set()
        stop.set()
        # Not print: a signal may come while the stream's own lock is held.
        os.write(2, b"\nshardmove: stopping at the next safe place; once more ends it at once\n")

    before = {signum: signal.signal(signum, ask) for signum in _SIGNALS}
    timer = threading.Timer(timeout_s, stop.set) if timeout_s is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield stop
    finally:
        if timer is not None:
            timer.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)
