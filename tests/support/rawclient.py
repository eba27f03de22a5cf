"""A client that speaks the protocol by hand: for what no driver does, such as not reading, or saying odd things.

Messages of the client are made with `shardmove.wire.messages`; what comes back is compared as it came (`frames`) or as
`told` renders it, without what differs from one server to another.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Self

from shardmove.wire import messages as wire

PROTOCOL_3: Final = 3 << 16
CHUNK_BYTES: Final = 1 << 20

Message = tuple[bytes, int, bytes]
"""Kind, length of the body, and the body where it was kept."""


class RawClient:
    """A session without TLS and without a password. A context manager. `bound_s`: of each wait for the other side."""

    def __init__(
        self,
        port: int,
        *,
        user: str = "postgres",
        dbname: str = "shop",
        bound_s: float = 60.0,
        parameters: Iterable[tuple[str, str]] = (),
        receive_bytes: int | None = None,
    ) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.settimeout(bound_s)
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.pid, self.secret = 0, b""
        words = {"user": user, "database": dbname, **dict(parameters)}
        self.socket.sendall(wire.startup_message(PROTOCOL_3, words))
        for kind, _, body in self.until_ready():
            if kind == b"K":
                self.pid, self.secret = int.from_bytes(body[:4], "big"), body[4:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    # --- towards the server

    def query(self, text: str) -> None:
        self.socket.sendall(wire.query(text))

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def trickle(self, data: bytes) -> None:
        """Byte by byte, each in a packet of its own."""
        for at in range(len(data)):
            self.socket.sendall(data[at : at + 1])

    def ask(self, *frames: bytes) -> list[str]:
        """Sends them, and returns what is told up to the next ReadyForQuery."""
        self.send(*frames)
        return told(self.until_ready(keep_max=1 << 30))

    # --- from the server

    def until(self, kinds: bytes, *, keep_max: int = 1 << 30) -> list[Message]:
        """All messages up to the first of one of these kinds, or to the end."""
        found = []
        for message in self.messages(keep_max=keep_max):
            found.append(message)
            if message[0] in kinds:
                break
        return found

    def until_ready(self, *, keep_max: int = 4096) -> list[Message]:
        """All messages up to ReadyForQuery; bodies longer than that are counted, not kept. Raises EOFError."""
        found = []
        for message in self.messages(keep_max=keep_max):
            found.append(message)
            if message[0] == b"Z":
                return found
        raise EOFError("the connection was closed")

    def messages(self, *, keep_max: int = 4096) -> Iterator[Message]:
        """Until the other side closes."""
        while (header := self._take(5)) is not None:
            kind, length = header[:1], int.from_bytes(header[1:], "big") - 4
            if length <= keep_max:
                body = self._take(length)
                if body is None:
                    return
                yield kind, length, body
            else:
                self._skip(length)
                yield kind, length, b""

    def _take(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            more = self.socket.recv(CHUNK_BYTES)
            if not more:
                return None
            self._buffer += more
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _skip(self, count: int) -> None:
        left = count - len(self._buffer)
        self._buffer = self._buffer[count:]
        while left > 0:
            more = self.socket.recv(min(CHUNK_BYTES, left))
            if not more:
                raise EOFError("the connection was closed within a message")
            left -= len(more)


def sqlstates(messages: list[Message]) -> list[str]:
    """The codes of the errors among them."""
    return [
        field[1:].decode()
        for kind, _, body in messages
        if kind == b"E"
        for field in body.split(b"\0")
        if field[:1] == b"C"
    ]


_REPORTED = "SCMDHP"
_USERS_TYPE = 16384
"""Numbers from here on are given by each database as its objects come."""
_NUMBERED = re.compile(r"\b(process|relation|database|PID|prepared statement) (\d+|\"[^\"]*\")")


def told(found: Iterable[Message]) -> list[str]:
    """What a client is told, in words, without what two servers that say the same differ in."""
    return [_TELL.get(kind, _plain)(kind.decode(), body) for kind, _, body in found]


def values(said: Sequence[str]) -> list[str]:
    """Of what was told: the first columns of the rows."""
    return [bytes.fromhex(each[2:])[6:].decode() for each in said if each.startswith("D ")]


def codes(said: Sequence[str]) -> list[str]:
    """The SQLSTATEs of the errors."""
    return [word[2:] for each in said if each[0] == "E" for word in each.split() if word.startswith("C=")]


def status(said: Sequence[str]) -> str:
    """Of the transaction: I, T or E."""
    return said[-1][3]


def _plain(kind: str, body: bytes) -> str:
    return f"{kind} {body.hex()}" if len(body) <= 64 else f"{kind} {len(body)} {hash(body)}"


def _report(kind: str, body: bytes) -> str:
    fields = wire.error_fields(body)
    return f"{kind} " + " ".join(
        _NUMBERED.sub(r"\1 N", f"{name}={fields[name]}") for name in _REPORTED if name in fields
    )


def _text(kind: str, body: bytes) -> str:
    return f"{kind} {body.decode('utf-8', 'replace')!r}"


def _columns(kind: str, body: bytes) -> str:
    columns = wire.decode_row_description(body)
    return f"{kind} " + " ".join(f"{c.name.decode()}:{min(c.type_oid, _USERS_TYPE)}:{c.format}" for c in columns)


def _notification(kind: str, body: bytes) -> str:
    return f"{kind} {body[4:]!r}"


_TELL = {b"E": _report, b"N": _report, b"T": _columns, b"A": _notification, b"C": _text, b"S": _text, b"Z": _text}
