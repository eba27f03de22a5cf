"""What a verb may say, of itself and with nothing happening to it: the protocol's answers, as a function of where
things stand. Whatever else it says is a finding, and so is its success where it must not succeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardmove.domain.errors import CutoverGaveUp, Failed, Interrupted, Refused, SchemaDrift, ShardmoveError
from shardmove.domain.moves import State

if TYPE_CHECKING:
    from tests.machine.story import Story


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a verb may say, of itself and with nothing happening to it."""

    errors: tuple[type[ShardmoveError], ...]
    must_fail: bool
    because: str
    may_lack_locks: bool = False

    def allows(self, error: ShardmoveError) -> bool:
        if self.may_lack_locks and type(error) is Failed and "could not lock" in error.message:
            return True
        return isinstance(error, self.errors)

    @classmethod
    def of(cls, story: Story, verb: str, goal: str, act: str | None) -> Allowed:
        state = story.move.state
        errors: list[type[ShardmoveError]] = []
        because: list[str] = []
        must = False
        if verb == "copy":
            errors.append(Interrupted)
        one_sided = len(set(story.extra.values())) > 1
        crosses = (
            (verb == "cut_over" and state is State.READY)
            or (verb in ("revert", "roll_back") and state is State.SWITCHED)
            or (verb == "run" and goal in ("switched", "completed") and state not in _CROSSED)
        )
        if state not in _STATES[verb]:
            errors.append(Refused)
            must = True
            because.append(f"it is {state}")
        if one_sided:
            errors += [SchemaDrift, Refused]
            because.append("the schemas differ")
            must = must or crosses
        elif story.drift != "none" and verb != "run":
            errors += [SchemaDrift, Refused]
            because.append(f"the schema changed ({story.drift})")
            must = must or (crosses and story.drift == "open")
        giver = story.move.giver(story.move.flow)
        if crosses and story.has_writers_on(giver):
            errors.append(CutoverGaveUp)
            because.append(f"a transaction that wrote to the range is open on {giver}")
            must = True
        if act in ("begin", "sleep"):  # in a hurry, whether or not it comes to that
            errors.append(CutoverGaveUp)
        is_busy = bool(story.clients) or act == "begin"
        if is_busy and state is State.PENDING:
            errors.append(Refused)  # preflight names a transaction that is old enough
        if is_busy:
            because.append("transactions are open")
        return cls(tuple(errors), must, "; ".join(because), is_busy or act == "sleep")


_CROSSED: Final = frozenset({State.SWITCHED, State.CLEANING, State.COMPLETED, State.ROLLING_BACK, State.ROLLED_BACK})
_ALL: Final = frozenset(State)
_STATES: Final = {
    "run": _ALL - {State.ROLLED_BACK, State.ROLLING_BACK},
    "copy": _ALL - {State.ROLLED_BACK, State.ROLLING_BACK},
    "cut_over": frozenset({State.READY, State.SWITCHED}),
    "revert": frozenset({State.READY, State.SWITCHED}),
    "complete": frozenset({State.SWITCHED, State.CLEANING, State.COMPLETED}),
    "roll_back": _ALL - {State.CLEANING, State.COMPLETED},
}
