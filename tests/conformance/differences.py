"""What passes directly and not through the router; each with a reason, or the run has failed."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from tests.conformance.runs import Outcomes

REASONS: Final = Path(__file__).with_name("reasons.toml")


@dataclass(frozen=True, slots=True)
class Reason:
    """`tests`: patterns of test ids, `*` stands for anything; brackets stand for themselves."""

    suite: str
    tests: Sequence[str]
    why: str

    def explains(self, suite: str, test: str) -> bool:
        return suite == self.suite and any(fnmatchcase(test, each.replace("[", "[[]")) for each in self.tests)


@dataclass(frozen=True, slots=True)
class Difference:
    """`why` is None where `reasons.toml` does not know it."""

    test: str
    routed: str
    said: str
    why: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    suite: str
    direct: int
    routed: int
    differences: Sequence[Difference]
    better: Sequence[str]

    @property
    def ratio(self) -> float:
        """Of what passes directly, the part that passes through the router."""
        return 1 - len(self.differences) / self.direct if self.direct else 1.0

    @property
    def unexplained(self) -> Sequence[Difference]:
        return [each for each in self.differences if each.why is None]


def load_reasons(path: Path = REASONS) -> list[Reason]:
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Reason(entry["suite"], entry["tests"], entry["why"]) for entry in document.get("difference", ())]


def compare(suite: str, direct: Outcomes, routed: Outcomes, reasons: Sequence[Reason]) -> Comparison:
    differences = []
    for test in sorted(direct.passed - routed.passed):
        why = next((reason.why for reason in reasons if reason.explains(suite, test)), None)
        differences.append(Difference(test, routed.of.get(test, "not collected"), routed.said.get(test, ""), why))
    better = sorted(routed.passed - direct.passed)
    return Comparison(suite, len(direct.passed), len(direct.passed & routed.passed), differences, better)


def told(comparison: Comparison) -> str:
    """The lines of the report: figures, then each reason with its tests, then what has none."""
    head = (
        f"{comparison.suite}: {comparison.direct} pass directly, {comparison.routed} of them through the router"
        f" ({comparison.ratio:.2%}); {len(comparison.better)} pass only through it"
    )
    lines = [head]
    for why in sorted({each.why for each in comparison.differences if each.why is not None}):
        lines.append(f"  {why}")
        lines += [f"      {each.test}" for each in comparison.differences if each.why == why]
    for each in comparison.unexplained:
        lines.append(f"  UNEXPLAINED {each.test}: {each.routed}: {' '.join(each.said.split())[:200]}")
    return "\n".join(lines)
