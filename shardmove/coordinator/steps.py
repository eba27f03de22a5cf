"""Steps: one list, that is performed, or told (a dry run).

A verb of the CLI is a list of steps. Performing runs each; telling runs those that only look, and prints the others:
the dry run is the real list with another executor, so it cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """One step in words, and what it does. `looks`: it changes nothing, so a dry run performs it too."""

    text: str
    run: Callable[[], None]
    looks: bool = False


class StepRunner(Protocol):
    def __call__(self, steps: Iterable[Step]) -> None: ...


def perform(tell: Callable[[str], None]) -> StepRunner:
    """Runs every step, telling each first."""

    def run(steps: Iterable[Step]) -> None:
        for step in steps:
            tell(step.text)
            step.run()

    return run


def pretend(tell: Callable[[str], None]) -> StepRunner:
    """Runs the steps that only look; tells the others."""

    def run(steps: Iterable[Step]) -> None:
        for step in steps:
            tell(f"check: {step.text}" if step.looks else f"would: {step.text}")
            if step.looks:
                step.run()

    return run
