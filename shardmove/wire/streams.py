"""What a server still owes us, message for message: the one place that knows where in the stream we are.

Every message that asks for a reply puts an entry into the queue when it is sent; every reply is checked against the
first entry. Some replies are for us and not for the client (*hidden*: a Parse that the client believes to be done, a
BEGIN that was deferred), some are made by us and not by the server (*injected*), and both must keep their place in the
order (the protocol's order is a queue, not a reaction).

    entry               replies                                                       done at
    ------------------  ------------------------------------------------------------  -----------
    PARSE               ParseComplete                                                 1
    BIND                BindComplete                                                  2
    DESCRIBE_STATEMENT  ParameterDescription, then RowDescription or NoData           T n
    DESCRIBE_PORTAL     RowDescription or NoData                                      T n
    EXECUTE             DataRow…, CommandComplete, EmptyQuery or PortalSuspended; or COPY   C I s
    CLOSE               CloseComplete                                                 3
    SYNC                ReadyForQuery                                                 Z
    QUERY, CALL         anything, errors too                                          Z

ErrorResponse: in QUERY and CALL a reply among others; else all entries up to the next SYNC are gone, for the server
reads on to the next Sync. CopyInResponse for EXECUTE: what was sent behind it is read in copy-in mode, where Sync and
Flush are ignored: those entries are gone too. NoticeResponse, ParameterStatus and NotificationResponse come any time.

A reply that no row has is a ProtocolViolation: where we are is not known any more, and the connection must be closed.

Source: PostgreSQL manual, chapters 54.2 (message flow) and 54.7 (formats).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import IntEnum

from shardmove.wire.messages import ProtocolViolation


class Owed(IntEnum):
    PARSE = 1
    BIND = 2
    DESCRIBE_STATEMENT = 3
    DESCRIBE_PORTAL = 4
    EXECUTE = 5
    CLOSE = 6
    SYNC = 7
    QUERY = 8
    CALL = 9
    POISON = 10
    """A Bind that must fail: its error is replaced by one of ours."""


HIDDEN = 0x40
"""Added to an entry whose replies are for us."""
_CODE = 0x3F

_ROWS = {"D": False, "C": True, "I": True, "s": True}
_COPY = {"G": False, "H": False, "W": False, "d": False, "c": False}
_ANYTHING = dict.fromkeys("TtnDCIsGHWdc123V", False) | {"Z": True}
_TABLE: Mapping[Owed, Mapping[str, bool]] = {
    Owed.PARSE: {"1": True},
    Owed.BIND: {"2": True},
    Owed.DESCRIBE_STATEMENT: {"t": False, "T": True, "n": True},
    Owed.DESCRIBE_PORTAL: {"T": True, "n": True},
    Owed.EXECUTE: _ROWS | _COPY,
    Owed.CLOSE: {"3": True},
    Owed.SYNC: {"Z": True},
    Owed.QUERY: _ANYTHING,
    Owed.CALL: _ANYTHING,
    Owed.POISON: {},
}
TRANSITIONS: Mapping[int, Mapping[int, bool]] = {
    int(owed): {ord(kind): is_last for kind, is_last in row.items()} for owed, row in _TABLE.items()
}
"""Per entry, the replies it may get, and whether each is its last."""

ASYNCHRONOUS = frozenset(b"NSA")
_ERROR, _COPY_IN = ord("E"), ord("G")
_SIMPLE = frozenset({int(Owed.QUERY), int(Owed.CALL)})
_NAMING = frozenset({int(Owed.PARSE), int(Owed.CLOSE)})
_ENDS = _SIMPLE | {int(Owed.SYNC)}


class Replies:
    """The queue of one connection to a server.

    Attributes:
        is_skipping: the server has met an error and ignores everything up to the next Sync, which is not sent yet.
        is_open: messages were sent that no Sync has ended yet: the server is in a transaction of its own, even where it
            owes nothing.
        dropped: how many messages about prepared statements' names, ours that were injected among them, the last error
            left without an effect.
        dropped_here: as `dropped`, those that the server was sent: hidden ones among them, injected ones not.
    """

    __slots__ = ("_queue", "dropped", "dropped_here", "is_open", "is_skipping")

    def __init__(self) -> None:
        self._queue: deque[int | bytes] = deque()
        self.is_skipping = False
        self.is_open = False
        self.dropped = self.dropped_here = 0

    def sent(self, owed: int) -> None:
        """A message was sent that owes this. `owed` is an Owed, or one + HIDDEN."""
        if self.is_skipping:
            if owed & _CODE != Owed.SYNC:
                return
            self.is_skipping = False
        self.is_open = owed & _CODE not in _ENDS
        self._queue.append(owed)

    def inject(self, reply: bytes) -> bytes:
        """A reply of ours, in its place. Returns it at once where nothing is owed before it, else b"" """
        if self.is_skipping:
            return b""
        if not self._queue:
            return reply
        self._queue.append(reply)
        return b""

    @property
    def is_empty(self) -> bool:
        """Nothing is owed, though messages may be there that no Sync has ended."""
        return not self._queue and not self.is_skipping

    @property
    def is_ended(self) -> bool:
        """All units are answered: with the status of ReadyForQuery, the state of the connection is exactly known."""
        return not self._queue and not self.is_skipping and not self.is_open

    @property
    def first(self) -> int:
        """The entry that the next reply answers; 0 where there is none."""
        return self._queue[0] if self._queue else 0  # type: ignore[return-value]  # injected ones never stay first

    def received(self, kind: int) -> bool:
        """Takes one reply that is not an asynchronous one. Returns whether it is hidden.

        After it, `injected()` has to be asked. Raises ProtocolViolation where nothing owes such a reply.
        """
        if not self._queue:
            raise ProtocolViolation(f"the server sent {chr(kind)!r}, and nothing was asked of it")
        first: int = self._queue[0]  # type: ignore[assignment]
        code = first & _CODE
        is_last = TRANSITIONS[code].get(kind)
        if is_last is None:
            if kind == _ERROR:
                self.dropped = self.dropped_here = 0
                return first >= HIDDEN if code in _SIMPLE else self._fail(first)
            raise ProtocolViolation(f"the server sent {chr(kind)!r} where the reply to {Owed(code).name} was due")
        if is_last:
            self._queue.popleft()
        elif kind == _COPY_IN and code == Owed.EXECUTE:
            self._forget_behind_copy()
        return first >= HIDDEN

    def injected(self) -> bytes:
        """Our own replies whose turn it is now."""
        queue = self._queue
        if not queue or not isinstance(queue[0], bytes):
            return b""
        turn = []
        while queue and isinstance(queue[0], bytes):
            turn.append(queue.popleft())
        return b"".join(turn)  # type: ignore[arg-type]

    def _fail(self, failed: int) -> bool:
        """Entries up to the next Sync are gone. The error is hidden where both what failed and its Sync are: a hidden
        message within a client's unit fails that, and a hidden Sync may end a client's messages.
        """
        queue = self._queue
        while queue:
            entry = queue[0]
            if isinstance(entry, int) and entry & _CODE == Owed.SYNC:
                return failed >= HIDDEN and entry >= HIDDEN
            if isinstance(entry, bytes):
                self.dropped += 1
            elif entry & _CODE in _NAMING:
                self.dropped_here += 1
                self.dropped += entry < HIDDEN
            queue.popleft()
        self.is_skipping = True
        return False

    def _forget_behind_copy(self) -> None:
        """Sync counts for nothing in copy-in mode; another message fails the COPY, and a Sync behind it counts."""
        first = self._queue.popleft()
        while self._queue and self._queue[0] == Owed.SYNC:
            self._queue.popleft()
        self._queue.appendleft(first)
        self.is_open = self.is_open or len(self._queue) == 1
