"""The moves that are played: which commands, one after the other, and what is prepared for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

TENANTS: Final = range(12)
MOVED_FROM: Final = 4
"""Tenants from here on move from s1 to s2."""
STALE_TENANT: Final = 11
ROWS: Final = 40 * len(TENANTS)
MOVE: Final = "MOVE"
"""Stands in a command for the newest move's id."""

LIMITS: Final[Mapping[str, Any]] = {
    "workers": 2,
    "batch_bytes": 20_000,
    "batch_rows_max": 60,
    "erase_rows": 60,
    "ddl_patience_s": 6.0,
    "keep_source_s": 1.2,
    "lease_ttl_s": 1.5,
    "max_stall_ms": 1500,
    "cutover_grace_s": 2.0,
    "cutover_lag_ms": 1000.0,
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A move from its plan to its end.

    Attributes:
        steps: commands; each is repeated until it is done.
        ends: the state that the move is in then.
        before: a command that is struck on the way, always: (words, point, 'kill', 'error' or 'pause'). What was paused
            goes on after the last step.
        serve: an attendant runs beside all of it.
        is_quiet: nobody writes: the catalog is not there all the time.
        target_is_bare: the target has no table yet.
        alters: both sides get one more column before the step of that number.
        damages: rows of the receiving side are damaged behind the fence before the step of that number.
        is_removed: nothing of ours at all is left at the end.
    """

    name: str
    steps: tuple[str, ...]
    ends: str = "completed"
    before: tuple[str, str, str] | None = None
    serve: bool = False
    is_quiet: bool = False
    target_is_bare: bool = False
    alters: int | None = None
    damages: int | None = None
    is_removed: bool = False
    limits: Mapping[str, Any] = field(default_factory=dict)

    def words(self, step: int) -> list[str]:
        return self.steps[step].split()


SCENARIOS: Final[Mapping[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        Scenario("complete", (f"run {MOVE} --until completed",)),
        Scenario("rollback", (f"run {MOVE}", f"rollback {MOVE}"), ends="rolled_back"),
        Scenario(
            "revert",
            (f"run {MOVE} --until switched", f"revert {MOVE}", f"cutover {MOVE}", f"complete {MOVE}"),
        ),
        Scenario("undo", (f"run {MOVE} --until switched", f"rollback {MOVE}"), ends="rolled_back"),
        Scenario(
            "served",
            (f"run {MOVE} --until switched", f"revert {MOVE}", f"rollback {MOVE}"),
            ends="rolled_back",
            serve=True,
        ),
        Scenario(
            "phases",
            (
                f"run {MOVE}",
                f"phase {MOVE} 4 --force",
                f"phase {MOVE} 3",
                f"phase {MOVE} 5 --force",
                f"complete {MOVE}",
            ),
        ),
        Scenario("create", (f"run {MOVE} --until completed --create-schema",), target_is_bare=True),
        Scenario(
            "takeover",
            (f"run {MOVE} --until completed",),
            before=(f"run {MOVE} --until switched", "close.after", "pause"),
        ),
        Scenario(
            "pause",
            (f"pause {MOVE}", f"resume {MOVE}", f"run {MOVE}", f"rollback {MOVE}"),
            ends="rolled_back",
            before=(f"run {MOVE}", "batch.before", "error"),
        ),
        Scenario(
            "mend",
            (f"run {MOVE}", f"verify {MOVE} --repair", f"run {MOVE} --until completed"),
            damages=1,
            alters=2,
        ),
        Scenario(
            "estate",
            ("apply", "plan split shop --at 4 --to s2", f"run {MOVE} --until completed", "uninstall"),
            is_quiet=True,
            is_removed=True,
        ),
    )
}
