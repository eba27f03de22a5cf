"""What a session keeps of its client's words: statements, what each message owes, and the unit under way.

A unit is what one ReadyForQuery answers: a simple query, a function call, or the messages of the extended protocol up
to a Sync. It runs on one connection, whole. Its messages wait here until the first of them says which shard it is for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from router.statements import Added, Arguments, Decision, Planned
from router.statements import Refusal as Refusal
from shardmove.domain.routes import Route
from shardmove.wire.streams import Owed


class Kind(Enum):
    """How a statement is carried out."""

    FREE = auto()
    """Anywhere: it touches no table, and has no effect that outlives its transaction."""
    ROUTED = auto()
    """On one shard."""
    BEGIN = auto()
    END = auto()
    """COMMIT or ROLLBACK, of whatever is open."""
    EVERYWHERE = auto()
    """On each of several shards: DDL, or a write to a reference table."""
    SCATTER = auto()
    COPY_IN = auto()
    """Rows of a COPY say where it goes."""


class Change(NamedTuple):
    """What a statement leaves in the session once it is committed. `name`: a setting, a statement, a savepoint."""

    what: str  # set, set local, reset, discard, deallocate, pin, hold, close (of cursors);
    # savepoint, release, rollback to; commit, rollback
    name: str = ""
    text: bytes = b""
    value: str | None = None

    @property
    def is_hint(self) -> bool:
        """It changes what the router goes by."""
        return self.name.startswith("shardmove.") or (self.what in ("reset", "discard") and not self.name)


class Need(NamedTuple):
    """What a statement needs, as decided with the routes of one view.

    Attributes:
        shard: where it has to run; None for anywhere.
        routes: the routes that it met.
        replayed: the text that has to be said again when its transaction floats to another shard.
        tag: of BEGIN, COMMIT and the like: what the router answers itself where no shard knows of the transaction.
        notice: what the client is told beforehand.
        is_at_target: a read that goes to the target of a move, which does not own the rows yet (phase 4).
        is_blind: it may write to rows that the router does not see: to any that its shard owns.
        leaves_state: something may be left in the connection that nobody can say again elsewhere, or undo by name.
    """

    kind: Kind
    shard: str | None = None
    routes: tuple[Route, ...] = ()
    is_write: bool = False
    refusal: Refusal | None = None
    changes: tuple[Change, ...] = ()
    replayed: bytes | None = None
    tag: bytes = b""
    notice: bytes = b""
    decision: Decision | None = None
    is_at_target: bool = False
    is_blind: bool = False
    leaves_state: bool = False

    @property
    def is_held(self) -> bool:
        return any(route.held for route in self.routes)


def surviving(changes: Iterable[Change]) -> list[Change]:
    """What is left of a transaction's changes at its end, or of several: what was rolled back is not.

    A connection that the client keeps stays its own whatever was rolled back: an advisory lock is still there.
    """
    left: list[Change] = []
    done: list[Change] = []
    for change in changes:
        if change.what in ("commit", "rollback"):
            is_kept = change.what == "commit"
            done += [each for each in left if each.what == "pin" or (is_kept and each.what != "set local")]
            left = []
            continue
        if change.what not in ("release", "rollback to"):
            left.append(change)
            continue
        marks = [at for at, each in enumerate(left) if each.what == "savepoint" and each.name == change.name]
        if marks and change.what == "rollback to":
            left[marks[-1] + 1 :] = [each for each in left[marks[-1] + 1 :] if each.what == "pin"]
        elif marks:
            left[marks[-1] :] = [each for each in left[marks[-1] :] if each.what != "savepoint"]
    return done + left


ANYWHERE = Need(Kind.FREE)
FLOATING = frozenset({Kind.FREE, Kind.BEGIN, Kind.END})
"""Statements of these kinds leave a transaction free to begin elsewhere."""


class Statement:
    """A prepared statement as the client knows it.

    Attributes:
        alias: its name on connections that several clients share.
        types: of its parameters: as the client declared them, then as a server described them.
    """

    __slots__ = ("alias", "name", "oids", "planned", "text", "types")

    def __init__(self, name: bytes, text: bytes, oids: tuple[int, ...], planned: Planned, alias: bytes) -> None:
        self.name = name
        self.text = text
        self.oids = oids
        self.planned = planned
        self.alias = alias
        self.types = oids


class Portal(NamedTuple):
    statement: Statement
    need: Need


class Item(NamedTuple):
    """One message: what it owes (None: nothing), the statement that it is about, and whether it is of ours."""

    owed: Owed | None
    frame: bytes
    statement: Statement | None = None
    is_hidden: bool = False


@dataclass(slots=True)
class Unit:
    """What is under way.

    Attributes:
        ask: the statement that decides where it goes, and its arguments; asked again whenever routes changed.
        again: what says where it goes now, where it is not the statement.
        waiting: messages not sent yet.
        sent: messages already sent, to be sent again where a fence refuses them; None once they are too many.
        is_complete: its last message is here.
        is_bound: a statement of it was bound to the shard: it cannot go to another one any more.
        is_gathering: several shards answer it, once its last message, or a Flush, is here.
        is_answered: they have, at a Flush.
        stays_at_source: it was tried at a move's target, which did not answer.
        parsed: names that its Parse messages gave, with what they named before; taken back where it fails.
        is_alone: it is one statement, and nothing else.
        has_ended: the end of a transaction block is among what was bound.
        has_changes: a statement of it changes something in the session, which counts for what comes behind it.
        is_hinted: that is a hint, for one.
        added: what was put into the text of a statement.
        is_once: nothing of it is ever sent again: a part of it may be committed, or was in a transaction before it.
    """

    began: float = field(default_factory=time.monotonic)
    ask: tuple[Planned, Arguments | None] | None = None
    again: Callable[[], Need] | None = None
    is_simple: bool = False
    need: Need = ANYWHERE
    waiting: list[Item] = field(default_factory=list)
    sent: list[Item] | None = field(default_factory=list)
    sent_bytes: int = 0
    is_complete: bool = False
    is_bound: bool = False
    is_begun: bool = False
    is_gathering: bool = False
    stays_at_source: bool = False
    is_answered: bool = False
    failed: bool = False
    parsed: list[tuple[bytes, Statement | None]] = field(default_factory=list)
    acknowledged: int = 0
    needs: list[Need] = field(default_factory=list)
    retries: int = 0
    was_held: bool = False
    is_alone: bool = False
    has_ended: bool = False
    has_changes: bool = False
    is_hinted: bool = False
    added: tuple[Added, ...] = ()
    is_once: bool = False

    def add(self, need: Need) -> None:
        """A statement that is executed."""
        self.needs.append(need)
        self.has_changes = self.has_changes or bool(need.changes)
        if need.changes and any(change.is_hint for change in need.changes):
            self.is_hinted = True
            self.forbid_retry()  # the hint is for what follows it, and a second look would take it for what came before

    def forbid_retry(self) -> None:
        self.is_once = True
        self.sent = None

    def remember(self, items: Sequence[Item], bytes_max: int) -> None:
        """Keeps what was sent, for a second try, unless it is too much."""
        if self.sent is None:
            return
        self.sent_bytes += sum(len(item.frame) for item in items)
        if self.sent_bytes > bytes_max:
            self.sent = None
        else:
            self.sent.extend(items)
