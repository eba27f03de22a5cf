"""Checks the model of the move protocol: `python -m tests.model.check [small|large] [--variant NAME] [--write]`.

A run is searched exhaustively, and nothing may be wrong in it: no assertion fails, no state is a dead end. All runs of
a scenario together must reach every line that says something, or else the model proves nothing. A variant must break
the invariant that is named for it, and its shortest counterexample is kept beside the model and drawn in docs/model.md,
which `--write` makes anew.

Needs `spin` and a C compiler. Everything is done in a temporary directory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.model import drawing
from tests.model.cases import LARGE, PROGRESS, SMALL, VARIANTS, Run, Variant

HERE: Final = Path(__file__).parent
DEPTH_MAX: Final = 10_000
BUILD_S: Final = 120
SEARCH_S: Final = {"small": 300, "large": 1800}
MEMORY_MB: Final = {"small": 2_000, "large": 10_000}
PROCESSES: Final = 2
COMPACT: Final = ("-DCOLLAPSE", "-DVECTORSZ=512")

_SAYS: Final = re.compile(r'Printf\("((?:[^"\\]|\\.)*)"')
_NOTE: Final = """
#include <stdio.h>
#include <stdlib.h>
static const char *noted[512];
static void tell(void) { for (int i = 0; i < 512; i++) if (noted[i]) printf("reached: %s", noted[i]); }
static void note(const char *said)
{   unsigned i = (unsigned) (((unsigned long) said >> 2) % 512);
    static int armed;
    if (!armed) { armed = 1; atexit(tell); }
    while (noted[i] && noted[i] != said) i = (i + 1) % 512;
    noted[i] = said;
}
"""
"""What the verifier calls instead of printing: it only remembers what would have been said."""


class ToolMissing(Exception):
    """Spin or a C compiler is not installed."""


class NoVerdict(Exception):
    """The search did not end: out of time, memory or depth; or a tool failed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a search ended.

    Attributes:
        broken: the invariant that an assertion named, PROGRESS for a dead end, None where nothing is wrong.
        unsaid: the lines of the model that were never reached, as they are printed.
        said: those that were.
        trace: the counterexample, one line a step.
    """

    states: int
    transitions: int
    depth: int
    seconds: float
    memory_mb: float
    broken: str | None
    said: frozenset[str]
    unsaid: frozenset[str]
    trace: tuple[drawing.Step, ...]


def missing_tool() -> str | None:
    """What to install, or None where everything is there."""
    if shutil.which("spin") is None:
        return "the model checker is not installed: install the package `spin`"
    if shutil.which("cc") is None:
        return "there is no C compiler: install the package `gcc`"
    return None


# --- one search


def search(run: Run, *, shortest: bool = False, size: str = "small") -> Verdict:
    """Searches every state of the run; `shortest`: stops at the first error that a breadth-first search meets.

    Raises NoVerdict where the search does not end within the bounds of the size.
    """
    with _generated(run) as work:
        said_by_model = frozenset(_SAYS.findall((work / "pan.m").read_text()))
        _listen(work / "pan.c")
        flags = [*COMPACT, f"-DMEMLIM={MEMORY_MB[size]}", "-DNP" if run.endless else "-DSAFETY"]
        if shortest:
            flags += ["-DBFS"]
        _call(work, ["cc", "-O1" if shortest else "-O2", "-w", *flags, "-o", "pan", "pan.c"], BUILD_S)
        table = "-w20" if shortest else "-w23"  # a power of two of entries; it grows
        told = _call(work, ["./pan", f"-m{DEPTH_MAX}", table, *(["-l"] if run.endless else [])], SEARCH_S[size])
        broken, trace = _counterexample(work, run, told)
        said = frozenset(re.findall(r"^reached: (.*)$", told, re.MULTILINE))
        return Verdict(*_figures(told), broken, said, frozenset(_spoken(said_by_model)) - said, trace)


@contextmanager
def _generated(run: Run) -> Iterator[Path]:
    """A directory with the verifier's source."""
    lacking = missing_tool()
    if lacking is not None:
        raise ToolMissing(lacking)
    with tempfile.TemporaryDirectory(prefix="shardmove-model-") as name:
        work = Path(name)
        for source in HERE.glob("*.pml"):
            shutil.copy(source, work)
        _call(work, ["spin", "-a", *run.defines, "move.pml"], BUILD_S)
        yield work


def _call(work: Path, command: Sequence[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise NoVerdict(f"{command[0]} did not end in {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise NoVerdict(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _listen(source: Path) -> None:
    """Makes the verifier remember what the model says on the way."""
    text = source.read_text()
    head = "Printf(const char *fmt, ...)\n{"
    if head not in text:
        raise NoVerdict("this release of spin generates another verifier than expected")
    source.write_text(_NOTE + text.replace(head, head + "\tnote(fmt);"))


def _spoken(formats: frozenset[str]) -> Iterator[str]:
    return (each.removesuffix("\\n") for each in formats)


def _figures(told: str) -> tuple[int, int, int, float, float]:
    def figure(pattern: str) -> str:
        found = re.search(pattern, told)
        if found is None:
            raise NoVerdict(f"the verifier did not say how it ended: {told[-2000:]}")
        return found.group(1)

    return (
        int(figure(r"(\d+) states, stored")),
        int(figure(r"(\d+) transitions")),
        int(figure(r"depth reached (\d+)")),
        float(figure(r"elapsed time ([\d.]+) seconds")),
        float(figure(r"([\d.]+)\s+total actual memory usage")),
    )


def _counterexample(work: Path, run: Run, told: str) -> tuple[str | None, tuple[drawing.Step, ...]]:
    if "errors: 0" in told:
        if "Search not completed" in told or "max search depth too small" in told:
            raise NoVerdict("the search was not exhaustive")
        return None, ()
    if not (work / "move.pml.trail").exists():
        raise NoVerdict(told[-2000:])
    replayed = _replay(work, run)
    failed = re.search(r"spin: (\S+\.pml):(\d+), Error: assertion violated", replayed)
    steps = tuple(drawing.steps(replayed))
    if failed is None:
        return (PROGRESS if "invalid end state" in told else "unknown"), steps
    line = (HERE / failed.group(1)).read_text().splitlines()[int(failed.group(2)) - 1]
    named = re.search(r"HOLDS\((I\d)", line)
    return (named.group(1) if named else "rest"), steps


def _replay(work: Path, run: Run) -> str:
    done = subprocess.run(
        ["spin", "-t", "-T", *run.defines, "move.pml"],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    return done.stdout + done.stderr


# --- all of them


def check_variant(variant: Variant) -> Verdict:
    """Raises NoVerdict unless the variant breaks its invariant."""
    verdict = search(variant.run, shortest=True)
    if verdict.broken != variant.invariant:
        raise NoVerdict(f"{variant.name} breaks {verdict.broken}, not {variant.invariant}")
    return verdict


def never_said(verdicts: Sequence[tuple[Run, Verdict]]) -> list[str]:
    """Per scenario, what none of its runs reached."""
    missed: list[str] = []
    for scenario in sorted({run.scenario for run, _ in verdicts}):
        mine = [verdict for run, verdict in verdicts if run.scenario == scenario]
        said = frozenset[str]().union(*(verdict.said for verdict in mine))
        missed += [f"{scenario}: {line}" for line in sorted(frozenset[str]().union(*(v.unsaid for v in mine)) - said)]
    return missed


def check_runs(runs: Sequence[Run], size: str) -> list[tuple[Run, Verdict]]:
    with ThreadPoolExecutor(PROCESSES if size == "small" else 1) as pool:
        return list(zip(runs, pool.map(lambda run: search(run, size=size), runs), strict=True))


def _print_run(run: Run, verdict: Verdict) -> None:
    print(
        f"{run.scenario:8} {verdict.states:>12,} states {verdict.transitions:>12,} transitions"
        f"  depth {verdict.depth:>4}"
        f" {verdict.seconds:>7.1f} s {verdict.memory_mb:>6.0f} MB  {verdict.broken or 'no errors':9}  {run.note}"
    )
    for step in verdict.trace:
        print("    " + step.line)


def _print_variant(variant: Variant, verdict: Verdict) -> None:
    print(
        f"{variant.name:32} breaks {verdict.broken:8} after {len(verdict.trace):>2} steps  {verdict.states:>10,} states"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check the model of the move protocol")
    parser.add_argument("size", nargs="?", choices=("small", "large"), default="small")
    parser.add_argument("--variant", help="only this one", choices=[variant.name for variant in VARIANTS])
    parser.add_argument("--write", action="store_true", help="write counterexamples and docs/model.md anew")
    given = parser.parse_args(arguments)
    try:
        return _check(given.size, given.variant, write=given.write)
    except (ToolMissing, NoVerdict) as error:
        print(error, file=sys.stderr)
        return 2


def _check(size: str, only: str | None, *, write: bool) -> int:
    runs = [] if only else check_runs(LARGE if size == "large" else SMALL, size)
    for run, verdict in runs:
        _print_run(run, verdict)
    missed = never_said(runs)
    for line in missed:
        print(f"never reached: {line}")
    variants = [variant for variant in VARIANTS if only in (None, variant.name)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        broken = list(zip(variants, pool.map(check_variant, variants), strict=True))
    for variant, verdict in broken:
        _print_variant(variant, verdict)
        if write:
            variant.trace_file.write_text(drawing.as_text(verdict.trace))
    if write and not only:
        drawing.write_page([(variant, verdict.trace) for variant, verdict in broken])
    if write and size == "large" and not only:
        drawing.write_runs([(run, v.states, v.transitions, v.depth, v.seconds) for run, v in runs])
    return int(bool(missed) or any(verdict.broken for _, verdict in runs))


if __name__ == "__main__":
    sys.exit(main())
