"""A client's prepared statements, and their names on the connections that it is given.

A connection that several clients share knows a statement by its alias, which is made from its text: two clients may
give one name to different texts. One that does not have a statement yet is told it on the way, unseen by the client.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from router.statements import Action, Planned
from router.units import Item, Portal, Statement, Unit
from shardmove.wire import messages
from shardmove.wire.streams import HIDDEN, Owed

if TYPE_CHECKING:
    from router.server import Server

GONE_TEXT = b'DEALLOCATE "shardmove: gone"'
GONE = Item(Owed.PARSE, messages.parse(b"shardmove: gone", b"SELECT"), is_hidden=True)
"""Prepared to be deallocated: DEALLOCATE of a name that the client has, and the connection has not, must succeed."""
STATEMENTS_MAX = 500
"""On a connection that clients share. They cost the server memory, and who prepared them may be long gone."""
_ENDING = frozenset({Action.COMMIT, Action.ROLLBACK, Action.SAVEPOINT, Action.EMPTY})


class Prepared:
    """What the client has prepared.

    Attributes:
        statements: by the client's names.
        described: the statements whose parameters a server was asked for, in order.
    """

    def __init__(self, *, keeps_names: bool) -> None:
        self.statements: dict[bytes, Statement] = {}
        self.portals: dict[bytes, Portal] = {}
        self.described: deque[Statement] = deque()
        self._keeps_names = keeps_names

    def send(self, server: Server, item: Item, out: list[bytes], *, is_failed: bool) -> bytes:
        """A message about a statement, which this connection may not have yet, or under another name.

        Args:
            is_failed: so is the transaction, where the message was sent.

        Returns:
            What the client can be told at once: nothing has to be sent for it, and nothing else is to come before.
        """
        statement, owed = item.statement, item.owed
        assert statement is not None
        assert owed is not None
        there = statement.name if self._keeps_names else statement.alias
        replies = server.replies
        if owed is Owed.CLOSE:
            return self._close(server, statement, item.frame, out)
        if owed is Owed.PARSE:
            if there and server.statements.get(there) is not None:
                is_taken = not is_failed or may_end(statement.planned)
                if is_taken and _is_same(server.statements[there], statement):
                    del server.statements[there]
                    server.statements[there] = statement
                    return replies.inject(messages.PARSE_COMPLETE)
                _drop(server, there, out)
            self._make_room(server, there, out)
            replies.sent(Owed.PARSE)
            out.append(item.frame if there == statement.name else _parse(there, statement))
            server.prepare(there, statement)
            return b""
        known = server.statements.get(there)
        if known is not statement and not (there and _is_same(known, statement)):
            if known is not None and there:
                _drop(server, there, out)
            self._make_room(server, there, out)
            replies.sent(Owed.PARSE | HIDDEN)
            out.append(_parse(there, statement))
            server.prepare(there, statement)
        elif there and not self._keeps_names:
            server.statements[there] = server.statements.pop(there)
        replies.sent(owed)
        if owed is Owed.DESCRIBE_STATEMENT:
            self.described.append(statement)
        out.append(item.frame if there == statement.name else _renamed(item.frame, owed, there))
        return b""

    def _close(self, server: Server, statement: Statement, frame: bytes, out: list[bytes]) -> bytes:
        is_its_own = self._keeps_names or not statement.name
        if not is_its_own or server.statements.get(statement.name) is not statement:
            return server.replies.inject(messages.CLOSE_COMPLETE)
        server.replies.sent(Owed.CLOSE)
        server.close_statement(statement.name)
        out.append(frame)
        return b""

    def forget(self, server: Server, item: Item, out: list[bytes]) -> None:
        """Before a Bind or Describe of a name that the client has not: it may have closed it on another connection."""
        body = item.frame[5:]
        name = messages.decode_bind(body).statement if item.owed is Owed.BIND else messages.decode_describe(body)[1]
        if name in server.statements:
            _drop(server, name, out)

    def _make_room(self, server: Server, name: bytes, out: list[bytes]) -> None:
        """Closes the statement that was used least recently, unseen by the client, where there are too many."""
        if self._keeps_names or not name or len(server.statements) < STATEMENTS_MAX:
            return
        oldest = next(each for each in server.statements if each)
        _drop(server, oldest, out)

    def on_types(self, frame: bytes) -> None:
        """What the server takes parameters for: the client binds them as that, and we read them as that."""
        if self.described:
            self.described.popleft().types = messages.decode_parameter_description(frame[5:])

    def deallocate(self, name: bytes, server: Server | None) -> None:
        """The client did, on this connection. An empty name is for all."""
        for statements in (self.statements, server.statements) if server is not None else (self.statements,):
            if name:
                statements.pop(name, None)
            else:
                statements.clear()

    def take_back(self, unit: Unit, dropped: int) -> None:
        """What the unit's last messages about names did: those that wait, and so many that were sent."""
        dropped += sum(item.owed in (Owed.PARSE, Owed.CLOSE) and not item.is_hidden for item in unit.waiting)
        for _ in range(min(dropped, len(unit.parsed))):
            name, before = unit.parsed.pop()
            if before is None:
                self.statements.pop(name, None)
            else:
                self.statements[name] = before


def may_end(planned: Planned) -> bool:
    """Whether a failed transaction takes it: its end, or that of a part of it."""
    return any(part.action in _ENDING for part in planned.plan.parts)


def _drop(server: Server, name: bytes, out: list[bytes]) -> None:
    server.replies.sent(Owed.CLOSE | HIDDEN)
    out.append(messages.close(b"S", name))
    server.close_statement(name)


def _is_same(known: object, statement: Statement) -> bool:
    return isinstance(known, Statement) and known.alias == statement.alias


def _parse(name: bytes, statement: Statement) -> bytes:
    return messages.parse(name, statement.text, statement.oids)


def _renamed(frame: bytes, owed: Owed, name: bytes) -> bytes:
    """The same Bind or Describe, about the statement under the name that it has on this connection."""
    if owed is Owed.DESCRIBE_STATEMENT:
        return messages.describe(b"S", name)
    portal_end = frame.index(0, 5) + 1
    statement_end = frame.index(0, portal_end)
    return messages.message(b"B", frame[5:portal_end] + name + frame[statement_end:])
