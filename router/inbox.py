"""The bytes that a client sent ahead: they wait until whole messages are there, or until what is under way is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmove.wire import messages
from shardmove.wire.messages import ProtocolViolation

if TYPE_CHECKING:
    from shardmove.config import RouterSettings

_SYNC, _EXECUTE = b"SE"
_EXECUTION = frozenset(b"DE")


class Inbox:
    """What waits, in order.

    Attributes:
        waiting: pieces as they came in.
        size: of all of them, in bytes.
        missing: so many bytes are needed before there is a message to look at.
        taken: what is being looked at, message by message, and `at`: the end of the one under way.
        is_put_back: that one is to be looked at once more, when what is under way is done.
    """

    __slots__ = ("_limits", "at", "is_put_back", "missing", "size", "taken", "waiting")

    def __init__(self, limits: RouterSettings, leftover: bytes) -> None:
        self._limits = limits
        self.waiting: list[bytes] = [leftover] if leftover else []
        self.size = len(leftover)
        self.missing = 0
        self.taken = b""
        self.at = 0
        self.is_put_back = False

    @property
    def ends_unit(self) -> bool:
        """Behind the message under way come one Execute and the Sync, and no other statement, as far as is known."""
        data, at, executed = self.taken, self.at, 0
        while len(data) - at >= 5:
            if data[at] == _SYNC:
                return executed == 1
            if data[at] not in _EXECUTION:
                return False
            executed += data[at] == _EXECUTE
            at += 1 + int.from_bytes(data[at + 1 : at + 5], "big")
        return False

    @property
    def is_full(self) -> bool:
        """The client is not read from until some of it is gone."""
        return self.size > self._limits.buffer_bytes

    def add(self, data: bytes) -> None:
        self.waiting.append(data)
        self.size += len(data)

    def take(self) -> bytes:
        data = self.waiting[0] if len(self.waiting) == 1 else b"".join(self.waiting)
        self.waiting = []
        self.size = self.missing = 0
        return data

    def keep(self, rest: bytes, missing: int) -> None:
        """What is left of what was taken."""
        self.waiting = [rest]
        self.size = len(rest)
        self.missing = missing

    def put_first(self, data: bytes) -> None:
        """It is looked at once more, before everything else."""
        self.waiting.insert(0, data)
        self.size += len(data)

    def checked_length(self, kind: int, length: int) -> int:
        """The bytes of a message whose end is not there yet. Raises ProtocolViolation."""
        if length < 4:
            raise ProtocolViolation(f"a message {chr(kind)!r} of length {length}")
        if length > self._limits.message_bytes_max:
            raise messages.MessageTooLarge(
                f"a message of {length} bytes is above the router's limit of {self._limits.message_bytes_max}",
                hint="raise [router] message_bytes_max, or send it in parts",
            )
        return length + 1
