"""Parties of the engine as threads: a coordinator with its verb, a mirror with its pass; and what befalls them.

What befalls a party is a *fault*: at the n-th time that it reaches a control point, something happens there. Points are
told apart by name, threads by whose they are: the thread that runs the verb, those that it started, and sleepers.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shardmove.domain import points

HANGS_S: Final = 120.0
"""No step takes a tenth of that, also on a machine that is rather busy."""


class Killed(BaseException):
    """A death: no handler of the product sees it, so nothing is settled."""


@dataclass(slots=True)
class Fault:
    """What happens where a point is reached for the n-th time, or any point.

    Attributes:
        repeats: at every time from then on.
        by_any_thread: also in threads that the party started, as its mirror.
        happened: the points at which it did.
    """

    at: str | None
    act: Callable[[str], None]
    nth: int = 1
    repeats: bool = False
    by_any_thread: bool = True
    happened: list[str] = field(default_factory=list)
    _seen: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def reached(self, point: str) -> None:
        if self.at is not None and point != self.at:
            return
        with self._guard:
            self._seen += 1
            if self._seen < self.nth or (self._seen > self.nth and not self.repeats):
                return
            self.happened.append(point)
        self.act(point)


class Party:
    """A thread that runs one thing to its end, or falls asleep in the middle of it."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.asleep_at: str | None = None
        self.on_wake: Callable[[], None] = lambda: None
        self._work = work
        self._changed = threading.Condition()
        self._may_go_on = threading.Event()
        self._ended = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Returns when it has ended, or sleeps."""
        self.thread.start()
        self._await(lambda: self._ended or self.asleep_at is not None)

    @property
    def is_asleep(self) -> bool:
        return self.asleep_at is not None and not self._ended

    def sleep(self, point: str) -> None:
        """To be called in its own thread, at a control point."""
        with self._changed:
            self.asleep_at = point
            self._changed.notify_all()
        self._may_go_on.wait()
        self.on_wake()

    def wake(self) -> None:
        """Returns when it has ended."""
        self._may_go_on.set()
        self._await(lambda: self._ended)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _await(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, HANGS_S):
                raise Hangs(f"{self.name} hangs:\n{self.stack()}")

    def stack(self) -> str:
        frame = sys._current_frames().get(self.thread.ident or 0)
        return "".join(traceback.format_stack(frame)[-8:]) if frame else "(ended)"


class Hangs(AssertionError):
    """A party does not come to an end."""


class Points:
    """What is armed at the control points of this process: one hook at all of them, for one story at a time."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.party: Party | None = None
        self.sleepers: set[threading.Thread] = set()
        self.seen: list[tuple[str, bool]] = []
        """Every point of the last party, in order, and whether its own thread reached it."""
        points.arm_all(self._reached)

    def _reached(self, point: str) -> None:
        thread = threading.current_thread()
        if self.party is None or thread in self.sleepers or thread.name.startswith("lease of"):
            return
        is_own = thread is self.party.thread
        self.seen.append((point, is_own))
        if self.fault is not None and (is_own or self.fault.by_any_thread):
            self.fault.reached(point)


POINTS: Final = Points()
