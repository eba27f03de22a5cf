"""The matrix: which cells there are, and what a run of one is, drawn from the seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardmove.domain.points import PLACES, Effect
from tests.campaign.play import Recording
from tests.campaign.scenarios import SCENARIOS
from tests.campaign.strikes import AFTERMATHS, NETWORK, SERVERS, VICTIMS, WORKER, Spec

EACH_POINT: Final = frozenset([*(point for effect in Effect for point in (effect.before, effect.after)), *PLACES])

OF_ROUTERS: Final = (
    Effect.BEAT_ROUTER,
    Effect.ACKNOWLEDGE,
    Effect.FORGET_ROUTER,
    Effect.FALL_BACK,
    Effect.REPORT_TRAFFIC,
    Effect.RECORD_DIFFERENCE,
)
NOT_REACHED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (Effect.PUBLISH.before, Effect.PUBLISH.after),
        "no command publishes routes alone: what changes them does so in its own transaction",
    ),
    **dict.fromkeys(
        (point for effect in OF_ROUTERS for point in (effect.before, effect.after)),
        "what a router does in the catalog: no router plays along here",
    ),
}
"""Points that no scenario reaches, each with the reason."""

_WEIGHTS: Final = {
    ("complete", 0): 3.0,
    ("rollback", 0): 2.0,
    ("rollback", 1): 3.0,
    ("undo", 0): 0.5,
    ("undo", 1): 3.0,
    ("revert", 0): 0.5,
    ("revert", 1): 3.0,
    ("revert", 2): 2.0,
    ("revert", 3): 2.0,
    ("served", 0): 1.0,
    ("served", 1): 2.0,
    ("served", 2): 2.0,
    ("phases", 1): 3.0,
    ("phases", 2): 3.0,
}
"""How often a step is chosen for a point that it reaches: the shorter what follows it, the more."""
_SPECIAL: Final = 0.25
_NTH_MAX: Final = 12


@dataclass(frozen=True, slots=True)
class Cell:
    """A control point, who reaches it, and a victim.

    Attributes:
        places: scenario, step, and how often the point was reached there.
    """

    role: str
    point: str
    victim: str
    places: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        return f"{self.role}:{self.point}:{self.victim}"

    def draw(self, seed: int, run: int, again: int = 0) -> Spec:
        """The run of that number. The same arguments and recordings, the same spec."""
        dice = random.Random(f"{seed} {self} {run} {again}")
        weights = [_WEIGHTS.get(place[:2], _SPECIAL) for place in self.places]
        ((scenario, step, count),) = dice.choices(self.places, weights)
        # where a point is passed often, how often differs from run to run
        nth = dice.randint(1, min(count if count <= 4 else count // 2, _NTH_MAX))
        servers = SERVERS[1:] if self.role == WORKER else SERVERS
        server = dice.choice(servers) if self.victim in NETWORK else ""
        return Spec(
            scenario, step, self.role, self.point, nth, self.victim, server, self._aftermath(scenario, run),
            dice.random() < 0.5,
        )  # fmt: skip

    def _aftermath(self, scenario: str, run: int) -> str:
        """Another one in each of a cell's runs."""
        known = AFTERMATHS[:2] if SCENARIOS[scenario].is_quiet else AFTERMATHS
        return known[(random.Random(str(self)).randrange(len(AFTERMATHS)) + run) % len(known)]


def cells(recordings: Iterable[Recording], only: str = "") -> list[Cell]:
    """All of them; of those that match the expression, the places that do."""
    reached: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for recording in recordings:
        for (step, role, point), count in sorted(recording.counts.items()):
            reached.setdefault((role, point), []).append((recording.scenario, step, count))
    found = []
    for (role, point), places in sorted(reached.items()):
        for victim in VICTIMS[role]:
            chosen = [place for place in places if re.search(only, f"{place[0]}:{place[1]}:{role}:{point}:{victim}")]
            if chosen:
                found.append(Cell(role, point, victim, tuple(chosen)))
    return found


def not_recorded(recordings: Sequence[Recording]) -> set[str]:
    """The points that no scenario reaches."""
    return set(EACH_POINT) - {point for recording in recordings for _, _, point in recording.counts}
