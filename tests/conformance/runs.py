"""One run of a suite: to its end, whatever its tests do to its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.conformance.suites import Address, Place

RUN_BOUND_S: Final = 1_800.0
RESTARTS_MAX: Final = 10
HUNG: Final = "hung or crashed"


@dataclass(slots=True)
class Outcomes:
    """What became of each test, by its pytest id; `said` is the end of what a test that did not pass said."""

    of: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> set[str]:
        return {test for test, outcome in self.of.items() if outcome == "passed"}

    def add(self, test: str, outcome: str, said: str) -> None:
        self.of[test], self.said[test] = outcome, said


def run(place: Place, address: Address, name: str, *, only: Collection[str] | None = None) -> Outcomes:
    """All tests of the suite, or only those. A test that takes the process with it is one that hung or crashed; the
    rest runs in the next process."""
    outcomes = Outcomes()
    wanted = None if only is None else set(only)
    for number in range(RESTARTS_MAX):
        record = place.directory / f"{name}-{number}.jsonl"
        collected, unfinished = _process(place, address, record, wanted, outcomes)
        assert collected, f"nothing was collected; see {record.with_suffix('.out')}"
        wanted = collected - outcomes.of.keys()
        if unfinished is not None:
            outcomes.add(unfinished, HUNG, f"its process ended, or did not end; see {record.with_suffix('.out')}")
            wanted.discard(unfinished)
        if not wanted:
            break
    for test in wanted or ():
        outcomes.add(test, "not run", "")
    return outcomes


def _process(
    place: Place, address: Address, record: Path, wanted: Collection[str] | None, outcomes: Outcomes
) -> tuple[set[str], str | None]:
    """One process; returns what it collected, and the test that it was at when it ended."""
    record.unlink(missing_ok=True)
    shutil.rmtree(place.directory / ".pytest_cache", ignore_errors=True)  # psycopg's refuses to run after a crash
    environment = {**place.environment(address), "CONFORMANCE_RECORD": str(record)}
    if wanted is not None:
        chosen = record.with_suffix(".only")
        chosen.write_text(json.dumps(sorted(wanted)), encoding="utf-8")
        environment["CONFORMANCE_ONLY"] = str(chosen)
    with record.with_suffix(".out").open("wb") as out:
        process = subprocess.Popen(
            place.command(address),
            cwd=place.directory,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _ended(process), suppress(subprocess.TimeoutExpired):
            process.wait(RUN_BOUND_S)
    collected, began = set[str](), None
    for line in _records(record):
        collected.update(line.get("collected", ()))
        began = line.get("began", began)
        if "ended" in line:
            outcomes.add(line["ended"], line["outcome"], line["said"])
            began = None
    return collected, began


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what its tests had started
        process.wait()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))
