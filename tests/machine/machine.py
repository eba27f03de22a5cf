"""The machine: stories that hypothesis makes up, and cuts down where one of them fails."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, FlakyStrategyDefinition
from hypothesis.stateful import (
    RULE_MARKER,
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shardmove.domain.moves import FINAL, MIRRORED, State
from tests.machine import application, oracle, story
from tests.machine.parties import POINTS
from tests.machine.place import SHARDS, Ground, Place
from tests.machine.story import Story

STEPS_MAX: Final = 20
FAILED: Final = Path(".hypothesis")
"""Where the script of a story that failed is put."""

VERBS: Final = ("run", "copy", "cut_over", "revert", "complete", "roll_back", "catch_up")
TOUR: Final = (
    "plan()",
    "copy(batches=2)",
    "write(op='update', tenant=150, id=2, n=3)",
    "catch_up()",
    "run()",
    "write(op='update', tenant=150, id=2, n=4)",
    "cut_over()",
    "write(op='update', tenant=150, id=2, n=5)",
    "revert()",
    "cut_over()",
    "complete()",
    "plan()",
    "run()",
    "roll_back()",
    "plan()",
    "run(goal='completed')",
)
"""Everything that can be done, with nothing in its way: tells which control points each verb comes by."""


UNFINISHED: Final = frozenset(State) - FINAL
COPYING: Final = frozenset({State.PENDING, State.INITIALIZING, State.COPYING, State.VERIFYING})
BEGINNINGS: Final = ((), ("plan",), ("plan", "copy"), ("plan", "run"), ("plan", "run", "cut_over"))


def tour(ground: Ground) -> Mapping[str, Sequence[str]]:
    """The control points of each verb, in the order of the first time."""
    reached: dict[str, dict[str, None]] = {verb: {} for verb in VERBS}
    with ground.place() as place:
        told = Story(place)
        for line in TOUR:
            POINTS.seen = []
            told.do(line)
            verb = line.partition("(")[0]
            if verb in reached:
                own = [point for point, is_own in POINTS.seen if is_own]
                others = sorted({point for point, is_own in POINTS.seen if not is_own})
                reached[verb].update(dict.fromkeys([*own, *others]))
        told.close()
    return {verb: tuple(names) for verb, names in reached.items()}


def line_of(step: str, **arguments: Any) -> str:
    said = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"{step}({said})"


class Machine(RuleBasedStateMachine):
    """Made by `machine`, which says where its stories happen."""

    ground: ClassVar[Ground]
    counts: ClassVar[Counter[str]]
    failed: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self._place: AbstractContextManager[Place] = self.ground.place()
        self.story = Story(self._place.__enter__())
        self.counts["examples"] += 1

    def teardown(self) -> None:
        self.story.close()
        self.counts.update(self.story.counts)
        self._place.__exit__(None, None, None)

    def tell(self, step: str, **arguments: Any) -> None:
        try:
            self.story.do(line_of(step, **arguments))
        except BaseException:
            self.failed.parent.mkdir(exist_ok=True)
            self.failed.write_text("\n".join(self.story.script) + "\n", encoding="utf-8")
            raise
        self.counts["steps"] += 1


def machine(
    ground: Ground,
    points: Mapping[str, Sequence[str]],
    *,
    failed: Path,
    acts: Sequence[str] = story.ACTS,
    steps: Collection[str] | None = None,
    beginnings: Sequence[int] = (0, 1, 2, 3, 3, 4, 4),
) -> type[Machine]:
    """A machine over these servers, whose faults strike at these points.

    Args:
        failed: where the script of a story that fails is put.
        acts: what may happen at a point.
        steps: the only rules; all where none are named.
        beginnings: how far a story may have come before its first step.
    """
    acting = st.sampled_from([act for act in acts if act != "storm"] or [""])
    nths = st.sampled_from((1, 1, 1, 2, 4))

    def faults(verb: str) -> st.SearchStrategy[Mapping[str, Any]]:
        if not acts:
            return st.just({})
        named = st.fixed_dictionaries({"at": st.sampled_from(points[verb]), "act": acting, "nth": nths})
        counted = st.fixed_dictionaries({"act": acting, "nth": st.integers(1, 15) | st.integers(1, len(points[verb]))})
        storms = [st.just({"act": "storm"})] if "storm" in acts else []
        return st.one_of(st.just({}), counted, counted, counted, named, *storms)

    tenants = st.sampled_from((*oracle.MOVING, *oracle.MOVING, *oracle.RESIDENTS))
    ids = st.sampled_from(oracle.IDS)
    small = st.integers(0, 4)
    clients = st.sampled_from(application.CLIENTS)

    class OnGround(Machine):
        @initialize(far=st.sampled_from(tuple(beginnings)))
        def set_out(self, far: int) -> None:
            for step in BEGINNINGS[far]:
                self.tell(step)

        @precondition(lambda self: self.story.known not in UNFINISHED)
        @rule()
        def plan(self) -> None:
            self.tell("plan")

        @precondition(lambda self: self.story.known in UNFINISHED)
        @rule(goal=st.sampled_from(("ready", "ready", "switched", "completed")), fault=faults("run"))
        def run(self, goal: str, fault: Mapping[str, Any]) -> None:
            self.tell("run", goal=goal, **fault)

        @precondition(lambda self: self.story.known in COPYING)
        @rule(batches=st.integers(1, 4), fault=faults("copy"))
        def copy(self, batches: int, fault: Mapping[str, Any]) -> None:
            self.tell("copy", batches=batches, **fault)

        @precondition(lambda self: self.story.known is State.READY)
        @rule(fault=faults("cut_over"))
        def cut_over(self, fault: Mapping[str, Any]) -> None:
            self.tell("cut_over", **fault)

        @precondition(lambda self: self.story.known is State.SWITCHED)
        @rule(fault=faults("revert"))
        def revert(self, fault: Mapping[str, Any]) -> None:
            self.tell("revert", **fault)

        @precondition(lambda self: self.story.known in (State.SWITCHED, State.CLEANING))
        @rule(fault=faults("complete"))
        def complete(self, fault: Mapping[str, Any]) -> None:
            self.tell("complete", **fault)

        @precondition(lambda self: self.story.known in UNFINISHED)
        @rule(fault=faults("roll_back"))
        def roll_back(self, fault: Mapping[str, Any]) -> None:
            self.tell("roll_back", **fault)

        @precondition(lambda self: self.story.known is not None)
        @rule(verb=st.sampled_from(VERBS))
        def out_of_turn(self, verb: str) -> None:
            """Whatever state the move is in."""
            self.tell(verb)

        @precondition(lambda self: self.story.known in MIRRORED)
        @rule(rows_max=st.sampled_from((None, None, 1, 2)), fault=faults("catch_up"))
        def catch_up(self, rows_max: int | None, fault: Mapping[str, Any]) -> None:
            self.tell("catch_up", rows_max=rows_max, **fault)

        @precondition(lambda self: not self.story.is_settled)
        @rule()
        def attend(self) -> None:
            self.tell("attend")

        @precondition(lambda self: self.story.sleeper is not None)
        @rule()
        def wake(self) -> None:
            self.tell("wake")

        @precondition(lambda self: self.story.sleeper is not None)
        @rule(server=st.sampled_from(SHARDS))
        def cut(self, server: str) -> None:
            self.tell("cut", server=server)

        @precondition(lambda self: self.story.known in UNFINISHED)
        @rule(server=st.sampled_from((*SHARDS, "cat")))
        def crash(self, server: str) -> None:
            self.tell("crash", server=server)

        @rule(op=st.sampled_from((*oracle.OPERATIONS, "set_extra")), tenant=tenants, id=ids, n=small)
        def write(self, op: str, tenant: int, id: int, n: int) -> None:
            self.tell("write", op=op, tenant=tenant, id=id, n=n)

        @precondition(lambda self: self.story.clients)
        @rule(op=st.sampled_from(tuple(oracle.OPERATIONS)), tenant=tenants, id=ids, n=small, client=clients)
        def write_in_transaction(self, op: str, tenant: int, id: int, n: int, client: str) -> None:
            self.tell("write", op=op, tenant=tenant, id=id, n=n, client=client)

        @rule(client=clients, shard=st.sampled_from(SHARDS), level=st.sampled_from(application.LEVELS))
        def begin(self, client: str, shard: str, level: str) -> None:
            self.tell("begin", client=client, shard=shard, level=level)

        @precondition(lambda self: self.story.clients)
        @rule(client=clients)
        def commit(self, client: str) -> None:
            self.tell("commit", client=client)

        @precondition(lambda self: self.story.clients)
        @rule(client=clients)
        def abort(self, client: str) -> None:
            self.tell("abort", client=client)

        @rule(on=st.sampled_from(("both", "both", *SHARDS)), add=st.booleans())
        def ddl(self, on: str, add: bool) -> None:
            self.tell("ddl", on=on, add=add)

    for name, _ in inspect.getmembers(OnGround, lambda member: hasattr(member, RULE_MARKER)):
        if steps is not None and name not in steps:
            delattr(OnGround, name)
    OnGround.ground, OnGround.failed, OnGround.counts = ground, failed, Counter()
    return OnGround


def play(made: type[Machine], *, number: int, examples: int, shrinks: bool = True) -> None:
    """So many stories from a seed. Raises what the shortest failing one raises; its script is in `made.failed`."""
    phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS_MAX,
        deadline=None,
        database=None,
        phases=phases,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example),
    )
    try:
        run_state_machine_as_test(seed(number)(made), settings=chosen)
    except FlakyFailure as flaky:  # threads and clocks are real: what failed once has failed
        raise flaky.exceptions[0] from flaky
    except FlakyStrategyDefinition:
        # The same draws came to another state: clocks again. Hypothesis cannot go on from it; nothing has failed.
        if made.failed.exists():
            raise


def replay(ground: Ground, script: str, *, tell: Any = print) -> None:
    """Tells a story again, from its script; prints each step and the state after it."""
    with ground.place() as place:
        told = Story(place, tell=tell)
        try:
            for line in script.splitlines():
                if line.partition("#")[0].strip():
                    told.do(line.partition("#")[0].rstrip())
        finally:
            told.close()


def told(counts: Counter[str], began: float) -> str:
    """How much was tried."""
    lines = [f"{counts['examples']} examples, {counts['steps']} steps in {time.monotonic() - began:.0f} s"]
    for kind in ("step", "state", "point"):
        found = sorted((n, name) for name, n in counts.items() if name.startswith(f"{kind} "))
        lines += [f"{kind}s:", *(f"{n:8}  {name.removeprefix(kind + ' ')}" for n, name in reversed(found))]
    return "\n".join(lines)
