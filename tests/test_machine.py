"""The engine as a state machine: steps in any order, whatever dies in between; see `tests/machine`.

Each twin takes one mechanism away, and the machine must find damage within a bounded number of stories. They are told
to look where the mechanism is: what a machine with every step would find in an hour, it finds in seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from shardmove.postgres.embedded import Cluster
from shardmove.protocol import catch_up, fence, kept
from tests.conftest import SEED_VARIABLE
from tests.machine.application import Finding
from tests.machine.machine import machine, play, replay, told, tour
from tests.machine.parties import Hangs
from tests.machine.place import Ground
from tests.test_twins_mirror import all_pass

EXAMPLES = int(os.environ.get("SHARDMOVE_MACHINE_EXAMPLES", "12"))
TWIN_EXAMPLES = 40


@pytest.fixture(scope="session")
def ground(servers: Cluster) -> Ground:
    return Ground(servers)


@pytest.fixture(scope="session")
def points(ground: Ground) -> Mapping[str, Sequence[str]]:
    return tour(ground)


@pytest.mark.timeout(900)
def test_stories(ground: Ground, points: Mapping[str, Sequence[str]], tmp_path: Path) -> None:
    """With the seed of the run. A story that fails is printed as a script; `make machine SCRIPT=…` tells it again.

    As it was: to cut it down takes longer than a test may.
    """
    made = machine(ground, points, failed=tmp_path / "story.txt")
    began = time.monotonic()
    try:
        play(made, number=int(os.environ[SEED_VARIABLE]), examples=EXAMPLES, shrinks=False)
    finally:
        print(told(made.counts, began))
        if made.failed.exists():
            print(f"{made.failed}:\n{made.failed.read_text(encoding='utf-8')}")


STOPPED = {
    "in a pass of its mirror": """
        plan()
        run()
        cut_over()
        write(op='update', tenant=150, id=1, n=4)
        catch_up(at='make_durable.before', act='sleep')
        revert()
    """,
    "between the snapshots of a comparison": """
        plan()
        run(at='pairs.between_snapshots', act='sleep')
        run()
    """,
    "in the installation of the schema": """
        plan()
        run(at='install_schema.before', act='sleep')
        run()
    """,
    "while kept fences change": """
        plan()
        run(goal='switched')
        complete(at='record_kept.after', act='sleep')
        complete()
    """,
    "while triggers are dropped": """
        plan()
        run(goal='switched')
        complete(at='drop_triggers.before', act='sleep')
        write(op='update', tenant=150, id=1, n=4)
        complete()
    """,
}


@pytest.mark.parametrize("stopped", STOPPED)
def test_a_process_that_is_stopped_holds_up_nobody_who_takes_over(ground: Ground, stopped: str) -> None:
    replay(ground, dedent(STOPPED[stopped]) + "wake()\n")


@dataclass(frozen=True, slots=True)
class Twin:
    """A mechanism that is taken away, and where the machine is told to look."""

    owner: object
    name: str
    replacement: Callable[..., Any]
    steps: Sequence[str]
    beginnings: Sequence[int]
    acts: Sequence[str] = ()


TWINS = {
    "the closing waits for writers": Twin(
        fence, "lock_exclusively", lambda *_: None, ("cut_over", "revert"), (3,), ("begin",)
    ),
    "the gate": Twin(catch_up, "gate", all_pass, ("copy", "write", "catch_up"), (2,)),
    "the fence stays": Twin(kept, "keep_fence", lambda *_, **__: None, ("complete", "revert"), (4,)),
}
QUICK = {"the fence stays"}
"""Found within seconds; the others take a minute."""


@pytest.mark.parametrize(
    "twin", [twin if twin in QUICK else pytest.param(twin, marks=pytest.mark.slow) for twin in TWINS]
)
def test_without_a_mechanism_the_machine_finds_damage(
    ground: Ground,
    points: Mapping[str, Sequence[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    twin: str,
) -> None:
    without = TWINS[twin]
    made = machine(
        ground,
        points,
        failed=tmp_path / "story.txt",
        steps=without.steps,
        beginnings=without.beginnings,
        acts=without.acts,
    )
    monkeypatch.setattr(without.owner, without.name, without.replacement)
    with pytest.raises((Finding, Hangs)) as found:
        play(made, number=1, examples=TWIN_EXAMPLES, shrinks=False)
    print(made.failed.read_text(encoding="utf-8"), found.value, sep="\n")
    monkeypatch.undo()
    replay(ground, made.failed.read_text(encoding="utf-8"))
