"""A client's session variables: what it set, what it is told of them, and what of them says how a key is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.statements import Facts, Hint
from router.units import surviving

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from router.server import Server
    from router.units import Change

_OURS = "shardmove."
IDENTITY = ("session_authorization", "role")
"""Who the session is: RESET ALL leaves it."""


class Variables:
    """The same on every connection that the client is given.

    Attributes:
        wanted: what the client set for its session: the statement for each name.
        initial: those of its startup packet.
        hints: values of the router's own settings.
        reported: what servers report of theirs (ParameterStatus), as the client was told.
        facts: what of all this says how a key is read.
    """

    def __init__(self) -> None:
        self.wanted: dict[str, bytes] = {}
        self.initial: dict[str, bytes] = {}
        self.hints: dict[str, str] = {}
        self.reported: dict[bytes, bytes] = {}
        self.facts = Facts()

    def begin(self, values: Mapping[str, str], statements: dict[str, bytes]) -> None:
        """With those of the startup packet."""
        self.wanted = statements
        self.initial = dict(statements)
        self.hints = {name: value for name, value in values.items() if name.startswith(_OURS)}

    def set(self, change: Change, server: Server | None) -> None:
        """The client did, on this connection."""
        self.wanted.pop(change.name, None)  # the last one comes last: one may rest on another, as role does
        self.wanted[change.name] = change.text
        if change.name.startswith(_OURS) and change.value is not None:
            self.hints[change.name] = change.value
            self.note_facts()
        if server is not None:
            server.applied[change.name] = change.text

    def reset(self, name: str, server: Server | None, *, keeps_identity: bool = True) -> None:
        """Back to what the client said when it began; the server went back to its own, and is told again.

        An empty name is for all, but who the session is, unless that is said.
        """
        kept = IDENTITY if keeps_identity else ()
        for each in [name] if name else list(self.hints):
            self.hints.pop(each, None)
        self.note_facts()
        for each in [name] if name else [each for each in self.wanted if each not in kept]:
            self.wanted.pop(each, None)
            if each in self.initial:
                self.wanted[each] = self.initial[each]
        if server is not None:
            for each in [name] if name else [each for each in server.applied if each not in kept]:
                server.applied.pop(each, None)

    def report(self, name: bytes, value: bytes) -> None:
        self.reported[name] = value
        self.note_facts()

    def note_facts(self) -> None:
        self.facts = self._facts(self.hints)

    def facts_within(self, changes: Iterable[Change]) -> Facts:
        """In a transaction that has made these changes so far."""
        hints = dict(self.hints)
        for change in surviving(changes):
            if change.what in ("set", "set local") and change.is_hint and change.value is not None:
                hints[change.name] = change.value
            elif change.what in ("reset", "discard"):
                for each in [change.name] if change.name else list(hints):
                    hints.pop(each, None)
        return self._facts(hints)

    def _facts(self, hints: Mapping[str, str]) -> Facts:
        key, zone = hints.get("shardmove.key"), self.reported.get(b"TimeZone")
        return Facts(
            None if zone is None else zone.decode("utf-8", "replace"),
            self.reported.get(b"client_encoding") == b"UTF8",
            None if key is None else Hint(key, hints.get("shardmove.keyspace")),
        )
