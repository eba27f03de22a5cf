"""What checks look at, and what they say.

A check returns None where it passes; a Problem stands in the way of the move; a Note does not, and the operator should
know. Both say what was found, and what to do about it: the advice, followed to the letter, makes the check pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmove.config import Limits
from shardmove.domain.moves import Move
from shardmove.postgres.connect import Connection

CATALOG_PLACE = "catalog"
"""What the catalog's database is called where places are listed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way, and what to do."""

    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Note(Problem):
    """What does not stand in the way, but should be known."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the checks look at: the move and a connection to either side.

    Attributes:
        catalog: None where the caller has just written to it, so that nothing of it is in question.
    """

    move: Move
    source: Connection
    target: Connection
    limits: Limits = field(default_factory=Limits)
    catalog: Connection | None = None

    @property
    def places(self) -> tuple[tuple[str, Connection], ...]:
        """Both sides, and the catalog where it is in question."""
        return self.sides if self.catalog is None else (*self.sides, (CATALOG_PLACE, self.catalog))

    @property
    def sides(self) -> tuple[tuple[str, Connection], tuple[str, Connection]]:
        return (self.move.source, self.source), (self.move.target, self.target)


def on(statements: Mapping[str, Sequence[str]], who: str | None = None) -> str:
    """Advice that is SQL: `on s1, as a superuser: …; …;`, a line for each place, to be run as it stands."""
    place = "on {}" if who is None else f"on {{}}, as {who}"
    return "\n".join(f"{place.format(name)}: {' '.join(listed)}" for name, listed in statements.items() if listed)


Check: TypeAlias = Callable[[Site], Problem | None]
Checks: TypeAlias = tuple[tuple[str, Check], ...]
"""Each check with the line that it has in the checklist: what holds where it passes."""
