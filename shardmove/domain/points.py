"""Control points: named places in the protocol where a test may stop, kill or interleave.

The product calls `reach(name)` at each; nothing happens unless somebody armed the name in this process.
A point's name is `step.before_effect` or `step.after_effect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Hook: TypeAlias = Callable[[str], None]

_armed: dict[str, Hook] = {}


def reach(name: str) -> None:
    """Runs what is armed at the point, if anything. What the hook raises goes through the step."""
    hook = _armed.get(name)
    if hook is not None:
        hook(name)


def arm(name: str, hook: Hook) -> None:
    """Calls the hook with the point's name each time the point is reached in this process."""
    _armed[name] = hook


def disarm(name: str) -> None:
    _armed.pop(name, None)


@contextmanager
def armed(name: str, hook: Hook) -> Iterator[None]:
    """Armed within the block only."""
    arm(name, hook)
    try:
        yield
    finally:
        disarm(name)
