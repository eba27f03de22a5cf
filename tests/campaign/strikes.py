"""Who is struck, and one run's spec: a word that says all that was drawn, and replays it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Self

from tests.campaign.ground import SERVERS

COMMAND: Final = "command"
WORKER: Final = "worker"
ATTENDANT: Final = "attendant"

STOPPED_SERVERS: Final = {"source": "s1", "target": "s2", "catalog": "cat"}
"""Victims that are servers."""
NETWORK: Final = ("cut", "half-open")

VICTIMS: Final = {
    COMMAND: ("coordinator", "paused", "error", *STOPPED_SERVERS, *NETWORK),
    WORKER: ("worker", "coordinator", "error", "source", "target", *NETWORK),
    ATTENDANT: ("attendant", "attendant-paused"),
}
"""By who reaches the point:

coordinator        the command is killed; where a worker stands at the point, that one is stopped, and goes on later
paused             the command is stopped; another one takes over; then it goes on, and must not change anything
error              the step fails at the point
worker             the worker is killed
attendant          `serve` is killed
attendant-paused   `serve` is stopped, and goes on later
source …           that server is stopped, as by a loss of power, and started again
cut                all of the command's connections to one server are reset
half-open          they carry nothing any more, for a while; then they are reset
"""

AFTERMATHS: Final = ("again", "twice", "race", "serve")
"""What comes next:

again   the same command, until it is done
twice   and once more, which must change nothing
race    two of it at once, then the same command until it is done
serve   an attendant alone, until writes go on; then the same command
"""


@dataclass(frozen=True, slots=True)
class Spec:
    """One run.

    Attributes:
        step: the command of the scenario that is struck; with an attendant, while it runs or before the next one.
        nth: how often the point is reached before.
        server: whose connections are cut.
        late: a server is started only after the process went on; what was stopped goes on only at the end.
    """

    scenario: str
    step: int
    role: str
    point: str
    nth: int
    victim: str
    server: str
    aftermath: str
    late: bool

    def __str__(self) -> str:
        return ":".join(str(int(value) if isinstance(value, bool) else value) for value in self._values())

    @classmethod
    def parse(cls, word: str) -> Self:
        """Raises ValueError where it is none."""
        scenario, step, role, point, nth, victim, server, aftermath, late = word.split(":")
        return cls(scenario, int(step), role, point, int(nth), victim, server, aftermath, late == "1")

    def _values(self) -> list[object]:
        return [getattr(self, each.name) for each in fields(self)]


__all__ = ["AFTERMATHS", "ATTENDANT", "COMMAND", "NETWORK", "SERVERS", "STOPPED_SERVERS", "VICTIMS", "WORKER", "Spec"]
