"""Drivers' own test suites through the router, beside the same suites without it.

make conformance PSYCOPG=DIRECTORY ASYNCPG=DIRECTORY
python -m tests.conformance --psycopg DIRECTORY --only 'tests/test_copy.py::*'

1 where something passes directly and not through the router, for no reason that reasons.toml knows.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

from shardmove.postgres.binaries import ENVIRONMENT_VARIABLE
from tests.conformance.differences import Comparison, compare, load_reasons, told
from tests.conformance.ground import Ground
from tests.conformance.runs import Outcomes, run
from tests.conformance.suites import SUITES, Place, prepare
from tests.support.servers import OLD_INSTALLED

SECOND_LOOKS: Final = 2
"""A test that differs is run again, in a new database and only with the others that do, before it counts: some depend
on the time, and some on what a test before them left behind."""
COUNTED: Final = ("clients", "statements", "parsed", "plan_hits", "plan_misses", "routed", "refused", "errors")


def main() -> int:
    asked = _asked()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, nothing of ours stays
    places = [
        prepare(SUITES[name], path, asked.directory, asked.only) for name in SUITES if (path := getattr(asked, name))
    ]
    if not places:
        print("name the source tree of a driver: --psycopg DIRECTORY, --asyncpg DIRECTORY", file=sys.stderr)
        return 2
    with Ground(asked.directory, asked.binaries, pooling=asked.pooling) as ground:
        comparisons = [_compared(ground, place) for place in places]
    worst = min(comparison.ratio for comparison in comparisons)
    unexplained = sum(len(comparison.unexplained) for comparison in comparisons)
    print(f"{unexplained} differences without a reason; the lowest ratio is {worst:.2%}", flush=True)
    return 1 if unexplained else 0


def _compared(ground: Ground, place: Place) -> Comparison:
    reasons = load_reasons()
    began = time.monotonic()
    with ground.direct() as address:
        direct = run(place, address, "direct")
    print(f"{place.suite.name} {place.release}: {time.monotonic() - began:.0f} s directly", flush=True)
    began = time.monotonic()
    routed = _routed(ground, place, "routed", None)
    for number in range(SECOND_LOOKS):
        if again := direct.passed - routed.passed:
            second = _routed(ground, place, f"again-{number}", again)
            for test in second.passed:
                routed.add(test, "passed", "")
    print(f"{place.suite.name} {place.release}: {time.monotonic() - began:.0f} s through the router", flush=True)
    comparison = compare(place.suite.name, direct, routed, reasons)
    print(told(comparison), flush=True)
    return comparison


def _routed(ground: Ground, place: Place, name: str, only: Collection[str] | None) -> Outcomes:
    """One run through a router of its own, and what the router has to say of it."""
    with ground.routed() as (address, router):
        outcomes = run(place, address, name, only=only)
        if router.is_running:
            counted = {row["name"]: row["value"] for row in router.show("STATS")}
            print(f"{name}: " + ", ".join(f"{what} {counted[what]}" for what in COUNTED if what in counted))
        else:
            print(f"{name}: the router ended by itself")
        log = place.directory / f"{name}.router"
        log.write_text(router.said, encoding="utf-8")
        if faults := router.said.count("Traceback"):
            print(f"{name}: {faults} tracebacks of the router, in {log}", flush=True)
    return outcomes


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SUITES:
        parser.add_argument(f"--{name}", type=Path, metavar="DIRECTORY", help=f"the source tree of a {name} release")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="of test ids; * for anything")
    parser.add_argument("--pooling", choices=("session", "transaction"), default="session")
    parser.add_argument(
        "--binaries", type=Path, help=f"of the server; else Debian's, {ENVIRONMENT_VARIABLE}'s, the wheel's"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("build/conformance").absolute(), help="of copies and runs"
    )
    asked = parser.parse_args()
    if asked.binaries is None and OLD_INSTALLED.exists():
        asked.binaries = OLD_INSTALLED
    return asked


if __name__ == "__main__":
    sys.exit(main())
