"""Many runs, by one or several processes with servers of their own each."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, TypeAlias

from tests.campaign.cells import Cell, cells
from tests.campaign.ground import Ground
from tests.campaign.play import Recording, Result, play, record
from tests.campaign.scenarios import SCENARIOS
from tests.campaign.strikes import Spec

DRAWS_MAX: Final = 3
"""So many specs are drawn for a run before it counts as not hit."""

Task: TypeAlias = tuple[str, str]
"""'record' and a scenario, or 'play' and a spec."""


@dataclass(slots=True)
class Campaign:
    """What was done, and what it came to."""

    seed: int
    version: str = ""
    recordings: list[Recording] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    runs: list[tuple[Cell, Result]] = field(default_factory=list)
    not_hit: list[Cell] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        return [result for _, result in self.runs if not result.ok] + [
            each.result for each in self.recordings if not each.result.ok
        ]


class Job:
    """A process with servers of its own, that plays one run after the other."""

    def __init__(self, kept: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, kept), daemon=False)
        self._process.start()
        theirs.close()
        self.then: Callable[[Any], None] | None = None

    def give(self, task: Task, then: Callable[[Any], None]) -> None:
        self.then = then
        self.pipe.send(task)

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.close()
        self._process.join()


def _work(pipe: Connection, kept: Path) -> None:
    """In the job's process. It ends with the pipe; a run that leaves the servers unusable costs new ones."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pending: Task | None = None
    while True:
        with Ground(kept) as ground:
            while True:
                try:
                    what, word = task = pending or pipe.recv()
                except EOFError:
                    return
                tried_before, pending = pending is not None, None
                try:
                    answer = record(ground, word) if what == "record" else play(ground, Spec.parse(word))
                except Exception as error:
                    if not tried_before:
                        pending = task
                        break
                    answer = Result(word, hit=True, failures=[f"{type(error).__name__}: {error}"])
                    if what == "record":
                        answer = Recording(word, result=answer)
                try:
                    pipe.send((ground.version, answer))
                except OSError:  # stopped meanwhile
                    return


class Driver:
    """Records the scenarios, draws the runs, has them played, and tells of them line by line."""

    def __init__(self, *, seed: int, runs: int, only: str, minutes: float | None, jobs: int, kept: Path) -> None:
        self.campaign = Campaign(seed)
        self._runs = runs
        self._only = only
        self._ends = None if minutes is None else time.monotonic() + minutes * 60
        self._jobs = [Job(kept) for _ in range(jobs)]
        self._began = time.monotonic()
        self._again: list[tuple[Cell, int, int]] = []
        self._planned = 0
        self._done = 0

    def run(self) -> Campaign:
        try:
            self._carry_out(self._recordings())
            self.campaign.cells = cells(self.campaign.recordings, self._only)
            self._carry_out(self._plays())
        except KeyboardInterrupt:
            print("stopped", flush=True)
        finally:
            for job in self._jobs:
                job.close()
            self.campaign.seconds = time.monotonic() - self._began
        return self.campaign

    def _carry_out(self, tasks: Iterator[tuple[Task, Callable[[Any], None]]]) -> None:
        idle, busy = list(self._jobs), list[Job]()
        more = True
        while more or busy:
            while more and idle:
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                idle[-1].give(*task)
                busy.append(idle.pop())
            for ready in wait([job.pipe for job in busy]) if busy else ():
                job = next(each for each in busy if each.pipe is ready)
                self.campaign.version, answer = job.pipe.recv()
                assert job.then is not None
                job.then(answer)
                busy.remove(job)
                idle.append(job)

    def _recordings(self) -> Iterator[tuple[Task, Callable[[Any], None]]]:
        for name in SCENARIOS:
            yield ("record", name), self._recorded

    def _recorded(self, recording: Recording) -> None:
        self.campaign.recordings.append(recording)
        self.campaign.recordings.sort(key=lambda each: list(SCENARIOS).index(each.scenario))
        points = len({point for _, _, point in recording.counts})
        self._tell(f"recorded {recording.scenario}: {points} points", recording.result)

    def _plays(self) -> Iterator[tuple[Task, Callable[[Any], None]]]:
        """Each cell's first run before any second one."""
        self._planned = len(self.campaign.cells) * self._runs
        for run in range(self._runs):
            order = list(self.campaign.cells)
            random.Random(f"{self.campaign.seed} {run}").shuffle(order)
            for cell in order:
                if self._ends is not None and time.monotonic() > self._ends:
                    return
                yield self._one(cell, run, 0)
                while self._again:
                    yield self._one(*self._again.pop())
        while self._again:
            yield self._one(*self._again.pop())

    def _one(self, cell: Cell, run: int, again: int) -> tuple[Task, Callable[[Any], None]]:
        spec = cell.draw(self.campaign.seed, run, again)
        return ("play", str(spec)), lambda result: self._played(cell, run, again, result)

    def _played(self, cell: Cell, run: int, again: int, result: Result) -> None:
        if not result.hit and result.ok and again + 1 < DRAWS_MAX:
            self._again.append((cell, run, again + 1))
            return
        self._done += 1
        if result.hit or not result.ok:
            self.campaign.runs.append((cell, result))
        else:
            self.campaign.not_hit.append(cell)
        self._tell(f"{self._done}/{self._planned} {result.spec}", result, was_hit=result.hit)

    def _tell(self, head: str, result: Result, *, was_hit: bool = True) -> None:
        verdict = "FAILED" if not result.ok else "ok" if was_hit else "not hit"
        print(f"{verdict:7} {result.seconds:5.1f} s {result.writes:4} writes  {head}", flush=True)
        for note in result.notes:
            print(f"        note: {note}", flush=True)
        if not result.ok:
            print(told(result), flush=True)


def told(result: Result) -> str:
    """What was wrong, and how to see it again."""
    lines = [f"lost {result.lost}, different {result.different}"] if result.lost or result.different else []
    lines += [*result.failures[:12], *result.left[:12]]
    if ":" in result.spec:
        lines.append(f"again: python -m tests.campaign --replay {result.spec}")
    if result.evidence:
        lines.append(f"evidence: {result.evidence}")
    return "\n".join(f"        {line}" for line in lines)


def replay(specs: Sequence[str], kept: Path) -> list[Result]:
    """These runs, in this process."""
    with Ground(kept) as ground:
        results = []
        for spec in specs:
            result = play(ground, Spec.parse(spec))
            results.append(result)
            verdict = "FAILED" if not result.ok else "ok" if result.hit else "not hit"
            print(f"{verdict} {result.seconds:.1f} s {spec}", *result.story, told(result), sep="\n", flush=True)
        return results
