"""Moves and their states.

    pending → initializing → copying → verifying → ready ⇄ switched → cleaning → completed
                                            cutover: ready → switched    revert: switched → ready
    any state up to ready → rolling_back → rolled_back     (from switched: revert first)

`TRANSITIONS` is the whole table. A transition that is not in it raises and changes nothing. Paused, throttled and
unattended are marks beside the state, never states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from shardmove.domain import hashing
from shardmove.domain.errors import ConfigurationError, IllegalTransition
from shardmove.domain.keys import Key, KeyRange, KeyType


class State(StrEnum):
    PENDING = "pending"
    INITIALIZING = "initializing"
    COPYING = "copying"
    VERIFYING = "verifying"
    READY = "ready"
    SWITCHED = "switched"
    CLEANING = "cleaning"
    COMPLETED = "completed"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"

    @property
    def is_final(self) -> bool:
        return self in FINAL


FINAL = frozenset({State.COMPLETED, State.ROLLED_BACK})
MIRRORED = frozenset({State.COPYING, State.VERIFYING, State.READY, State.SWITCHED})
"""In these states changes are journalled on the owner and carried to the other side."""

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.INITIALIZING, State.ROLLING_BACK}),
    State.INITIALIZING: frozenset({State.COPYING, State.ROLLING_BACK}),
    State.COPYING: frozenset({State.VERIFYING, State.ROLLING_BACK}),
    # DDL on a moving table, or a changed server, sends a verified move back to a full comparison.
    State.VERIFYING: frozenset({State.READY, State.ROLLING_BACK}),
    State.READY: frozenset({State.SWITCHED, State.VERIFYING, State.ROLLING_BACK}),
    State.SWITCHED: frozenset({State.READY, State.CLEANING}),
    State.CLEANING: frozenset({State.COMPLETED}),
    State.COMPLETED: frozenset(),
    State.ROLLING_BACK: frozenset({State.ROLLED_BACK}),
    State.ROLLED_BACK: frozenset(),
}


def check_transition(move_id: str, before: State, after: State) -> None:
    """Raises IllegalTransition unless the table has the edge."""
    if after not in TRANSITIONS[before]:
        allowed = ", ".join(sorted(TRANSITIONS[before])) or "nothing: it is final"
        raise IllegalTransition(
            f"move {move_id} is {before}; it cannot become {after}", hint=f"from {before} it can become: {allowed}"
        )


class Standing(StrEnum):
    """What a shard's own record says of its part in a move."""

    OWNER = "owner"
    """It owns the range, or did until the attempt that is under way."""
    MIRROR = "mirror"
    """The range was never taken over, or was given away; the other side is mirrored into this one."""
    RETIRED = "retired"
    """As MIRROR, but mirroring has ended for good: the rows of the range may be erased here."""


class Direction(StrEnum):
    """Which way rows flow, and a cutover goes."""

    FORWARD = "forward"
    BACK = "back"


class Outcome(StrEnum):
    """How a cutover attempt ended. Only OPEN ever changes, and only once."""

    OPEN = "open"
    FLIPPED = "flipped"
    ABANDONED = "abandoned"


_PART = r'"(?:[^"]|"")+"|[^".]+'
_TABLE_NAME = re.compile(rf"(?:({_PART})\.)?({_PART})")


@dataclass(frozen=True, slots=True)
class TableName:
    schema: str
    name: str

    @classmethod
    def parse(cls, text: str) -> TableName:
        """`name` or `schema.name`, upper and lower case as written; the schema is `public` where it is not said.

        A part that holds a dot or a quote stands in double quotes, as in SQL. Raises ConfigurationError.
        """
        found = _TABLE_NAME.fullmatch(text)
        if found is None:
            raise ConfigurationError(f"{text!r} is not a table's name", hint='write name, schema.name or "odd.name"')
        schema, name = (part and _unquoted(part) for part in found.groups())
        return cls(schema or "public", name)

    def __str__(self) -> str:
        return _quoted(self.name) if self.schema == "public" else f"{_quoted(self.schema)}.{_quoted(self.name)}"


def _unquoted(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


def _quoted(part: str) -> str:
    return '"' + part.replace('"', '""') + '"' if "." in part or '"' in part else part


class Scheme(StrEnum):
    """What key ranges are ranges of."""

    RANGE = "range"
    """The keys, in their own order."""
    HASH = "hash"
    """Signed 64-bit numbers: PostgreSQL's extended hash of the key, with seed 0."""


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The tables that are split by the same key. `tables` maps each to its key column."""

    name: str
    key_type: KeyType
    scheme: Scheme
    tables: Mapping[TableName, str]
    reference_tables: tuple[TableName, ...] = ()

    @property
    def bound_type(self) -> KeyType:
        """The type of the ends of its ranges."""
        return KeyType.BIGINT if self.scheme is Scheme.HASH else self.key_type

    def place(self, key: Key) -> Key:
        """Where a key lies in the key space that ranges divide: the key itself, or its hash."""
        return hashing.HASHES[self.key_type](key) if self.scheme is Scheme.HASH else key


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """Tells one PostgreSQL history from another: a restored or promoted server differs in one of them."""

    system_identifier: str
    timeline: int


CATALOG = "(catalog)"
"""Under this name a move records the identity of the catalog's own server, beside those of its shards."""


@dataclass(frozen=True, slots=True)
class Move:
    """A move as the catalog has it. A value: read it again to see later changes.

    Attributes:
        ranges: the key ranges that are carried, ascending.
        lease_number: the number of the newest lease taken on it; 0 before the first.
        last_attempt: the number of the newest cutover attempt in either direction; 0 before the first.
        identities: system identifier and timeline of each shard, and of the catalog, as recorded at initializing.
    """

    id: str
    plan_id: str
    keyspace: Keyspace
    ranges: tuple[KeyRange, ...]
    source: str
    target: str
    state: State
    state_since: datetime
    lease_number: int
    last_attempt: int
    paused: bool
    error: str | None
    identities: Mapping[str, ServerIdentity]

    def giver(self, direction: Direction) -> str:
        """The shard that owns the range before a cutover in that direction, and is mirrored from."""
        return self.source if direction is Direction.FORWARD else self.target

    def receiver(self, direction: Direction) -> str:
        return self.target if direction is Direction.FORWARD else self.source

    @property
    def ranges_text(self) -> str:
        return ", ".join(str(range_) for range_ in self.ranges)

    @property
    def flow(self) -> Direction:
        """The way that changes flow while nothing is being cut over: from the owner to the other side."""
        return Direction.BACK if self.state is State.SWITCHED else Direction.FORWARD


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at changing the owner. Numbered for ever, per move; decided once."""

    move_id: str
    number: int
    direction: Direction
    outcome: Outcome
