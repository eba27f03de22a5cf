"""The greeting, as the server sees it: everything before the first authentication message, without a socket.

A client may ask for TLS, may ask for GSSAPI encryption, in either order, each once, and is answered one bare byte; it
may begin with TLS outright; then it sends its startup packet, or a request to cancel somebody's query. The table:

    state     what comes             next       event
    OPEN      SSLRequest             OPEN       WantsTls   answered N, where this side has no TLS
    OPEN      SSLRequest             ENCRYPTED  WantsTls   answered S: the caller answers, and does the handshake
    OPEN      GSSENCRequest          OPEN       WantsGss   always answered N
    OPEN      a byte 0x16, at first  ENCRYPTED  DirectTls  the caller does the handshake with the bytes of the event
    OPEN,
    ENCRYPTED CancelRequest          DONE       Cancel     answered nothing
    OPEN,
    ENCRYPTED startup packet         DONE       Ready

Everything else is a violation, and so are, for good reason:

- Bytes that came with a request for encryption, or after it and before its answer. They were sent in the clear, by
  whoever sits in between, and would be taken for what the client said inside the encryption: CVE-2021-3935. While the
  caller answers and does the handshake it must not feed this machine with what it reads from the socket.
- A request for encryption inside of an encryption, or a second one of its kind.

Source: PostgreSQL manual, Message Flow: SSL Session Encryption, and src/backend/tcop/backend_startup.c, whose bounds
these are.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final, TypeAlias

from shardmove.wire.messages import (
    CANCEL_CODE,
    GSS_CODE,
    MAJOR,
    SSL_CODE,
    MessageTooLarge,
    ProtocolViolation,
    negotiate_protocol_version,
)

MINOR_NEWEST: Final = 2
PACKET_BYTES_MAX: Final = 10_000  # without its length: MAX_STARTUP_PACKET_LENGTH
SECRET_BYTES: Final = range(4, 257)
TLS_HANDSHAKE: Final = 0x16
OPTION_PREFIX: Final = "_pq_."

_TWO: Final = Struct(">II")


class UnsupportedVersion(ProtocolViolation):
    """The client speaks another major version of the protocol."""

    sqlstate = "0A000"


class InvalidAuthorization(ProtocolViolation):
    """The client did not say who it is, or not in the way that is asked for."""

    sqlstate = "28000"


@dataclass(frozen=True, slots=True)
class WantsTls:
    """Answer with this one byte, without a header. After an S the handshake follows, and nothing else."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class WantsGss:
    """Answer with this one byte, without a header."""

    answer: bytes


@dataclass(frozen=True, slots=True)
class DirectTls:
    """The client did not ask, and began the handshake: `data` are its first bytes. It must negotiate `postgresql`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Cancel:
    """Compare the secret in constant time, answer nothing, close."""

    pid: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Ready:
    """The startup packet.

    Attributes:
        minor_requested: the client's minor version of protocol 3.
        minor: the one to speak with it.
        parameters: in the client's order, `user` and `database` among them (the latter is the user's name, unless
            given), options of the protocol not.
        unknown_options: those of the protocol, `_pq_.`, of which none is known here.
        negotiate: the message to send before the authentication is asked for, if version or options need one.
        leftover: what came after the packet.
    """

    minor_requested: int
    minor: int
    parameters: Mapping[str, str]
    unknown_options: tuple[str, ...]
    negotiate: bytes | None
    leftover: bytes


Event: TypeAlias = WantsTls | WantsGss | DirectTls | Cancel | Ready


class State(enum.Enum):
    OPEN = enum.auto()
    ENCRYPTED = enum.auto()
    DONE = enum.auto()
    BROKEN = enum.auto()


class Startup:
    """One client's greeting.

        for event in startup.feed(data): ...

    Attributes:
        state: DONE after Cancel and Ready; BROKEN after an error. Feeding it then is the caller's mistake.
    """

    def __init__(self, *, has_tls: bool = False, requires_tls: bool = False) -> None:
        """`requires_tls`: a startup packet in the clear is refused. Not so a CancelRequest: libpq before 17."""
        self.state = State.OPEN
        self._has_tls = has_tls
        self._requires_tls = requires_tls
        self._asked: set[int] = set()
        self._is_first = True
        self._buffer = b""

    def feed(self, data: bytes) -> list[Event]:
        """What the client said, in its order; empty while a packet is not complete.

        Raises:
            ProtocolViolation, MessageTooLarge, UnsupportedVersion, InvalidAuthorization: tell the client, FATAL with
                the error's `sqlstate`, and close. Nothing that the same data held before counts.
        """
        if self.state not in (State.OPEN, State.ENCRYPTED):
            raise AssertionError(f"the greeting is {self.state.name}")
        try:
            return self._feed(data)
        except ProtocolViolation:
            self.state, self._buffer = State.BROKEN, b""
            raise

    def _feed(self, data: bytes) -> list[Event]:
        self._buffer += data  # at most a packet and what arrived with it
        if self._is_first and self._buffer[:1] == bytes([TLS_HANDSHAKE]):
            return [self._direct_tls()]
        packet = self._cut()
        return [] if packet is None else [self._event(packet)]

    def _direct_tls(self) -> DirectTls:
        if not self._has_tls:
            raise ProtocolViolation("the connection began with a TLS handshake, and there is no TLS here")
        data, self._buffer = self._buffer, b""
        self._is_first = False
        self.state = State.ENCRYPTED
        return DirectTls(data)

    def _cut(self) -> bytes | None:
        """The packet without its length, if it is complete; what follows it stays in the buffer."""
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if length < 8:
            raise ProtocolViolation(f"a startup packet's length cannot be {length}")
        if length - 4 > PACKET_BYTES_MAX:
            raise MessageTooLarge(f"a startup packet of {length} bytes is too large")
        if len(self._buffer) < length:
            return None
        packet, self._buffer = self._buffer[4:length], self._buffer[length:]
        self._is_first = False
        return packet

    def _event(self, packet: bytes) -> Event:
        code = int.from_bytes(packet[:4], "big")
        if code == CANCEL_CODE:
            return self._cancel(packet)
        if code in (SSL_CODE, GSS_CODE):
            return self._encryption(code, packet)
        return self._ready(code, packet)

    def _encryption(self, code: int, packet: bytes) -> Event:
        if len(packet) != 4:
            raise ProtocolViolation("a request for encryption is malformed")
        if self.state is State.ENCRYPTED or code in self._asked:
            raise ProtocolViolation("encryption was asked for a second time")
        if self._buffer:
            raise ProtocolViolation("unencrypted data came after a request for encryption")
        self._asked.add(code)
        if code == GSS_CODE:
            return WantsGss(b"N")
        if not self._has_tls:
            return WantsTls(b"N")
        self.state = State.ENCRYPTED
        return WantsTls(b"S")

    def _cancel(self, packet: bytes) -> Cancel:
        if len(packet) - 8 not in SECRET_BYTES:
            raise ProtocolViolation("a request to cancel is malformed")
        self.state = State.DONE
        return Cancel(_TWO.unpack_from(packet)[1], packet[8:])

    def _ready(self, code: int, packet: bytes) -> Ready:
        major, minor = code >> 16, code & 0xFFFF
        if major != MAJOR:
            raise UnsupportedVersion(
                f"unsupported frontend protocol {major}.{minor}: this server supports 3.0 to 3.{MINOR_NEWEST}"
            )
        if self._requires_tls and self.state is not State.ENCRYPTED:
            raise InvalidAuthorization("this server takes encrypted connections only", hint="set sslmode=require")
        parameters = _parameters(packet[4:])
        unknown = tuple(name for name in parameters if name.startswith(OPTION_PREFIX))
        own = {name: value for name, value in parameters.items() if not name.startswith(OPTION_PREFIX)}
        if not own.get("user"):
            raise InvalidAuthorization("no PostgreSQL user name specified in startup packet")
        own["database"] = own.get("database") or own["user"]
        spoken = min(minor, MINOR_NEWEST)
        is_other = spoken < minor or bool(unknown)
        leftover, self._buffer, self.state = self._buffer, b"", State.DONE
        negotiate = negotiate_protocol_version(spoken, unknown) if is_other else None
        return Ready(minor, spoken, own, unknown, negotiate, leftover)


def _parameters(body: bytes) -> dict[str, str]:
    """Names and values until an empty name, which has to be the end. A name given twice has its last value."""
    *texts, terminator, rest = body.split(b"\0") if body.endswith(b"\0") else (b"", b"", b"x")
    if terminator or rest or len(texts) % 2 or not all(texts[::2]):
        raise ProtocolViolation("invalid startup packet layout: expected terminator as last byte")
    words = [text.decode("utf-8", "surrogateescape") for text in texts]
    return dict(zip(words[::2], words[1::2], strict=True))
