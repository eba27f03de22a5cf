"""Counterexamples as text and as pictures: one line a step, and a sequence diagram for docs/model.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.model.cases import Run, Variant

PAGE: Final = Path(__file__).parents[2] / "docs" / "model.md"
BEGIN, END = "<!-- counterexamples: made by tests/model/check.py --write -->", "<!-- end of counterexamples -->"

ACTORS: Final[Mapping[int, str]] = {
    0: "writer, READ COMMITTED",
    1: "writer, REPEATABLE READ",
    2: "coordinator A",
    3: "coordinator B",
    4: "attendant",
    5: "second attendant",
    6: "worker of batch 0",
    7: "worker of batch 1",
    9: "the world",
}
SHARDS: Final = {"shard 0": "the source", "shard 1": "the target"}


@dataclass(frozen=True, slots=True)
class Step:
    """`effect`: whether the protocol changed something by this step; `action` is then named as in the code."""

    actor: str
    action: str
    about: str
    effect: bool

    @property
    def line(self) -> str:
        return f"{self.actor:24}{'*' if self.effect else ' '} {self.action:24} {self.about}".rstrip()


def steps(replayed: str) -> Iterator[Step]:
    """The steps of a replayed trail, in order."""
    for mark, actor, action, about in re.findall(r"^([@.]) (\d) ([^|]*) \| (.*)$", replayed, re.MULTILINE):
        yield Step(ACTORS[int(actor)], action, _named(about), mark == "@")


def _named(about: str) -> str:
    for number, name in SHARDS.items():
        about = about.replace(number, name)
    return re.sub(r"\b(the )?server of the ", "the server of the ", about)


def as_text(trace: Sequence[Step]) -> str:
    """What a kept counterexample looks like; effects of the protocol are marked with a star."""
    return "".join(step.line + "\n" for step in trace)


def diagram(trace: Sequence[Step]) -> str:
    """A Mermaid sequence diagram: one lane an actor, one for each shard, one for the catalog."""
    lanes = list(dict.fromkeys(lane for step in trace for lane in (step.actor, _place(step)) if lane))
    names = {lane: f"p{number}" for number, lane in enumerate(lanes)}
    lines = ["sequenceDiagram", *(f"    participant {name} as {lane}" for lane, name in names.items())]
    for step in trace:
        arrow = "->>" if step.effect else "-->>"
        text = f"{step.action}: {step.about}".replace(";", ",").replace("#", "")
        lines.append(f"    {names[step.actor]}{arrow}{names[_place(step)]}: {text}")
    return "\n".join(lines)


def _place(step: Step) -> str:
    for place in SHARDS.values():
        if place in step.about:
            return place.removeprefix("the ")
    return "catalog" if step.effect or "number" in step.action else step.actor


def sections(cases: Sequence[tuple[Variant, Sequence[Step]]]) -> str:
    parts: list[str] = []
    for variant, trace in cases:
        parts.append(
            f"### {variant.name}\n\n{variant.without} Broken: **{variant.invariant}**, after {len(trace)} steps.\n\n"
            f"{variant.story}\n\n```mermaid\n{diagram(trace)}\n```\n"
        )
    return "\n".join(parts)


def write_page(cases: Sequence[tuple[Variant, Sequence[Step]]]) -> None:
    _replace(BEGIN, END, sections(cases))


def write_runs(rows: Sequence[tuple[Run, int, int, int, float]]) -> None:
    """The table of runs: per run its states, transitions, depth and seconds, as measured."""
    table = ["| scenario | with | states | transitions | depth | s |", "|---|---|---:|---:|---:|---:|"]
    table += [
        f"| {run.scenario} | {run.note} | {states:,} | {transitions:,} | {depth} | {seconds:.0f} |"
        for run, states, transitions, depth, seconds in rows
    ]
    _replace("<!-- runs -->", "<!-- end of runs -->", "\n".join(table) + "\n")


def _replace(begin: str, end: str, made: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{made}\n{end}{after}", encoding="utf-8")
