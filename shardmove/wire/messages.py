"""The messages of PostgreSQL's protocol 3, both directions: from values to bytes and back.

A message is a byte that says its kind, the length of what follows as an Int32 that counts itself, and a body. Encoders
give whole messages; decoders take a body. Names, texts and values stay bytes: their encoding is the client's business.

What a peer sends is not to be trusted. Every decoder either accounts for each byte of the body or raises
`ProtocolViolation`, and no length is believed before the bytes are there: a decoder needs memory in proportion to the
body that it was given, `Frames` in proportion to the largest message that it accepts.

Source: PostgreSQL manual, Frontend/Backend Protocol, Message Formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from struct import Struct
from struct import error as StructError
from typing import ClassVar, Final, NamedTuple, TypeVar

from shardmove.domain.errors import ShardmoveError

HEADER_BYTES: Final = 5
MESSAGE_BYTES_MAX: Final = 0x3FFFFFFF  # PostgreSQL takes no message larger than it can allocate at once, 1 GB

CANCEL_CODE: Final = 1234 << 16 | 5678
SSL_CODE: Final = 1234 << 16 | 5679
GSS_CODE: Final = 1234 << 16 | 5680
MAJOR: Final = 3

_INT16: Final = Struct(">H")
_INT32: Final = Struct(">i")
_UINT32: Final = Struct(">I")
_HEADER: Final = Struct(">cI")
_COLUMN: Final = Struct(">IhIhiH")
_COPY: Final = Struct(">BH")
_INT16_AT: Final = _INT16.unpack_from
_INT32_AT: Final = _INT32.unpack_from
_NULL: Final = b"\xff\xff\xff\xff"
_CODES: Final = [Struct(f">{count}H") for count in range(64)]
_OIDS: Final = [Struct(f">{count}I") for count in range(64)]

T = TypeVar("T")


class ProtocolViolation(ShardmoveError):
    """The peer sent what the protocol does not allow. Nothing after it can be made sense of.

    Attributes:
        sqlstate: the code with which the peer is told; of the class, so that it survives a pickle round trip.
    """

    sqlstate: ClassVar[str] = "08P01"


class MessageTooLarge(ProtocolViolation):
    """A message's length is above what this side accepts; its body was not read."""

    sqlstate = "54000"


class Parse(NamedTuple):
    name: bytes
    text: bytes
    oids: tuple[int, ...]


class Bind(NamedTuple):
    """`formats` holds no code (all text), one (for all values), or one for each; likewise `result_formats`."""

    portal: bytes
    statement: bytes
    formats: tuple[int, ...]
    values: tuple[bytes | None, ...]
    result_formats: tuple[int, ...]


class Column(NamedTuple):
    """One column of a RowDescription. Type OIDs above the built-in ones differ from server to server."""

    name: bytes
    table_oid: int
    attnum: int
    type_oid: int
    type_size: int
    type_modifier: int
    format: int


class CopyResponse(NamedTuple):
    format: int
    column_formats: tuple[int, ...]


class FunctionCall(NamedTuple):
    oid: int
    formats: tuple[int, ...]
    values: tuple[bytes | None, ...]
    result_format: int


class Notification(NamedTuple):
    pid: int
    channel: bytes
    payload: bytes


# --- Whole messages -------------------------------------------------------------------------------------------------


def message(kind: bytes, body: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(body) + 4) + body


def cstring(value: bytes | str) -> bytes:
    """As a string of the protocol, with its final zero.

    Raises:
        ProtocolViolation: it has a zero inside; what follows it would be read as the next field.
    """
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if b"\0" in data:
        raise ProtocolViolation("a text of the protocol cannot hold a zero byte")
    return data + b"\0"


PARSE_COMPLETE: Final = message(b"1")
BIND_COMPLETE: Final = message(b"2")
CLOSE_COMPLETE: Final = message(b"3")
NO_DATA: Final = message(b"n")
EMPTY_QUERY: Final = message(b"I")
PORTAL_SUSPENDED: Final = message(b"s")
COPY_DONE: Final = message(b"c")
SYNC: Final = message(b"S")
FLUSH: Final = message(b"H")
TERMINATE: Final = message(b"X")

SSL_REQUEST: Final = _UINT32.pack(8) + _UINT32.pack(SSL_CODE)
GSS_REQUEST: Final = _UINT32.pack(8) + _UINT32.pack(GSS_CODE)

AUTHENTICATION_OK: Final = message(b"R", _UINT32.pack(0))
AUTHENTICATION_CLEARTEXT: Final = message(b"R", _UINT32.pack(3))


# --- What a server says ---------------------------------------------------------------------------------------------


def error_response(
    sqlstate: str, message: str, *, severity: str = "ERROR", detail: str | None = None, hint: str | None = None
) -> bytes:
    return _report(b"E", sqlstate, message, severity, detail, hint)


def notice_response(
    sqlstate: str, message: str, *, severity: str = "NOTICE", detail: str | None = None, hint: str | None = None
) -> bytes:
    return _report(b"N", sqlstate, message, severity, detail, hint)


def _report(kind: bytes, sqlstate: str, text: str, severity: str, detail: str | None, hint: str | None) -> bytes:
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": text, "D": detail, "H": hint}
    return encode_fields(kind, {code: value for code, value in fields.items() if value is not None})


def encode_fields(kind: bytes, fields: Mapping[str, str]) -> bytes:
    """An ErrorResponse or NoticeResponse of any fields. A text may quote what a client sent: zeros are left out."""
    parts = (code.encode() + value.replace("\0", "").encode("utf-8", "replace") for code, value in fields.items())
    return message(kind, b"".join(part + b"\0" for part in parts) + b"\0")


IDLE, IN_TRANSACTION, FAILED = b"ITE"
"""A session's status, as ReadyForQuery says it: outside a transaction, in one, in one that failed."""
READY: Final = {status: message(b"Z", bytes([status])) for status in (IDLE, IN_TRANSACTION, FAILED)}


def ready_for_query(status: bytes) -> bytes:
    """`status`: I, T or E."""
    return READY[status[0]]


def command_complete(tag: bytes | str) -> bytes:
    return message(b"C", cstring(tag))


def parameter_status(name: bytes | str, value: bytes | str) -> bytes:
    return message(b"S", cstring(name) + cstring(value))


def backend_key_data(pid: int, secret: bytes) -> bytes:
    """`secret`: 4 bytes in protocol 3.0, up to 256 in 3.2."""
    return message(b"K", _UINT32.pack(pid) + secret)


def row_description(columns: Sequence[Column]) -> bytes:
    parts = [_INT16.pack(len(columns))]
    parts += (cstring(column.name) + _COLUMN.pack(*column[1:]) for column in columns)
    return message(b"T", b"".join(parts))


def data_row(values: Sequence[bytes | None]) -> bytes:
    return message(b"D", _values(values))


def parameter_description(oids: Sequence[int]) -> bytes:
    return message(b"t", _INT16.pack(len(oids)) + _of(_OIDS, len(oids)).pack(*oids))


def copy_in_response(format: int, column_formats: Sequence[int]) -> bytes:
    return message(b"G", _COPY.pack(format, len(column_formats)) + _codes(column_formats))


def copy_out_response(format: int, column_formats: Sequence[int]) -> bytes:
    return message(b"H", _COPY.pack(format, len(column_formats)) + _codes(column_formats))


def notification_response(pid: int, channel: bytes, payload: bytes) -> bytes:
    return message(b"A", _UINT32.pack(pid) + cstring(channel) + cstring(payload))


def function_call_response(value: bytes | None) -> bytes:
    return message(b"V", _value(value))


def negotiate_protocol_version(newest_minor: int, unknown_options: Iterable[str]) -> bytes:
    """Where the manual speaks of a minor version, server and libpq mean the whole number, its major part included."""
    options = [cstring(option) for option in unknown_options]
    return message(b"v", _UINT32.pack(version_code(newest_minor)) + _UINT32.pack(len(options)) + b"".join(options))


def authentication_md5(salt: bytes) -> bytes:
    return _authentication(5, salt)


def authentication_sasl(mechanisms: Iterable[bytes]) -> bytes:
    return _authentication(10, b"".join(map(cstring, mechanisms)) + b"\0")


def authentication_sasl_continue(data: bytes) -> bytes:
    return _authentication(11, data)


def authentication_sasl_final(data: bytes) -> bytes:
    return _authentication(12, data)


def _authentication(code: int, data: bytes) -> bytes:
    return message(b"R", _UINT32.pack(code) + data)


# --- What a client says ---------------------------------------------------------------------------------------------


def query(text: bytes | str) -> bytes:
    return message(b"Q", cstring(text))


def parse(name: bytes, text: bytes | str, oids: Sequence[int] = ()) -> bytes:
    return message(b"P", cstring(name) + cstring(text) + _INT16.pack(len(oids)) + _of(_OIDS, len(oids)).pack(*oids))


def bind(
    portal: bytes,
    statement: bytes,
    values: Sequence[bytes | None] = (),
    *,
    formats: Sequence[int] = (),
    result_formats: Sequence[int] = (),
) -> bytes:
    body = (
        cstring(portal)
        + cstring(statement)
        + _INT16.pack(len(formats))
        + _codes(formats)
        + _values(values)
        + _INT16.pack(len(result_formats))
        + _codes(result_formats)
    )
    return message(b"B", body)


def describe(kind: bytes, name: bytes) -> bytes:
    """`kind`: S for a prepared statement, P for a portal."""
    return message(b"D", kind + cstring(name))


def close(kind: bytes, name: bytes) -> bytes:
    """`kind`: as for `describe`."""
    return message(b"C", kind + cstring(name))


def execute(portal: bytes, max_rows: int = 0) -> bytes:
    return message(b"E", cstring(portal) + _INT32.pack(max_rows))


def copy_data(data: bytes) -> bytes:
    return message(b"d", data)


def copy_fail(reason: bytes | str) -> bytes:
    return message(b"f", cstring(reason))


def function_call(
    oid: int, values: Sequence[bytes | None], formats: Sequence[int] = (), result_format: int = 0
) -> bytes:
    codes = _INT16.pack(len(formats)) + _codes(formats)
    return message(b"F", _UINT32.pack(oid) + codes + _values(values) + _INT16.pack(result_format))


def password_message(password: bytes | str) -> bytes:
    return message(b"p", cstring(password))


def sasl_initial_response(mechanism: bytes, data: bytes) -> bytes:
    return message(b"p", cstring(mechanism) + _value(data))


def sasl_response(data: bytes) -> bytes:
    return message(b"p", data)


def version_code(minor: int) -> int:
    return MAJOR << 16 | minor


def startup_message(version: int, parameters: Mapping[str, str]) -> bytes:
    """`version`: as a whole number, see `version_code`. The only message, with `cancel_request`, that has no kind."""
    texts = b"".join(cstring(name) + cstring(value) for name, value in parameters.items())
    body = _UINT32.pack(version) + texts + b"\0"
    return _UINT32.pack(len(body) + 4) + body


def cancel_request(pid: int, secret: bytes) -> bytes:
    return _UINT32.pack(12 + len(secret)) + _UINT32.pack(CANCEL_CODE) + _UINT32.pack(pid) + secret


def _of(structs: Sequence[Struct], count: int) -> Struct:
    """That of so many numbers, made at once where they are unusually many."""
    return structs[count] if count < len(structs) else Struct(f">{count}{structs[1].format[-1]}")


def _codes(codes: Sequence[int]) -> bytes:
    return _of(_CODES, len(codes)).pack(*codes)


def _values(values: Sequence[bytes | None]) -> bytes:
    pack = _INT32.pack
    parts = [_INT16.pack(len(values))]
    for value in values:
        if value is None:
            parts.append(_NULL)
        else:
            parts.append(pack(len(value)))
            parts.append(value)
    return b"".join(parts)


def _value(value: bytes | None) -> bytes:
    return _NULL if value is None else _INT32.pack(len(value)) + value


# --- Decoding -------------------------------------------------------------------------------------------------------
# A slice that reaches past the end is short, not an error: so each cut moves a position by the length that was
# promised, and at the end the position has to be the body's end. What is read from behind it raises by itself.


def _checked(kind: str) -> Callable[[Callable[[bytes], T]], Callable[[bytes], T]]:
    """A decoder whose every failure to read is a violation."""

    def wrap(decode: Callable[[bytes], T]) -> Callable[[bytes], T]:
        @wraps(decode)
        def decode_checked(body: bytes) -> T:
            try:
                return decode(body)
            except (StructError, ValueError, IndexError):
                raise _malformed(kind) from None

        return decode_checked

    return wrap


def _malformed(kind: str) -> ProtocolViolation:
    return ProtocolViolation(f"a {kind} message is malformed")


def _end(body: bytes, at: int) -> None:
    if at != len(body):
        raise ValueError


def _text(body: bytes, at: int) -> tuple[bytes, int]:
    end = body.index(0, at)
    return body[at:end], end + 1


def _only_text(body: bytes) -> bytes:
    text, at = _text(body, 0)
    _end(body, at)
    return text


def _cut_codes(body: bytes, at: int) -> tuple[tuple[int, ...], int]:
    (count,) = _INT16_AT(body, at)
    at += 2
    if count == 0:
        return (), at
    if count == 1:
        return _INT16_AT(body, at), at + 2
    return _of(_CODES, count).unpack_from(body, at), at + 2 * count


def _cut_oids(body: bytes, at: int) -> tuple[tuple[int, ...], int]:
    (count,) = _INT16_AT(body, at)
    return _of(_OIDS, count).unpack_from(body, at + 2), at + 2 + 4 * count


def _cut_values(body: bytes, at: int) -> tuple[tuple[bytes | None, ...], int]:
    (count,) = _INT16_AT(body, at)
    at += 2
    values: list[bytes | None] = []
    for _ in range(count):
        (length,) = _INT32_AT(body, at)
        at += 4
        if length >= 0:
            values.append(body[at : at + length])
            at += length
        elif length == -1:
            values.append(None)
        else:
            raise ValueError
    return tuple(values), at


def decode_parse(body: bytes) -> Parse:
    try:
        name, at = _text(body, 0)
        text, at = _text(body, at)
        oids, at = _cut_oids(body, at)
        _end(body, at)
    except (StructError, ValueError):
        raise _malformed("Parse") from None
    return Parse(name, text, oids)


def decode_bind(body: bytes) -> Bind:
    try:
        portal_end = body.index(0)
        statement_end = body.index(0, portal_end + 1)
        formats, at = _cut_codes(body, statement_end + 1)
        values, at = _cut_values(body, at)
        result_formats, at = _cut_codes(body, at)
        _end(body, at)
    except (StructError, ValueError):
        raise _malformed("Bind") from None
    if len(formats) > 1 and len(formats) != len(values):
        raise ProtocolViolation(f"a Bind message has {len(formats)} parameter formats but {len(values)} parameters")
    return Bind(body[:portal_end], body[portal_end + 1 : statement_end], formats, values, result_formats)


@_checked("Describe")
def decode_describe(body: bytes) -> tuple[bytes, bytes]:
    """Its kind, S or P, and the name of the prepared statement or portal."""
    return _decode_named(body)


@_checked("Close")
def decode_close(body: bytes) -> tuple[bytes, bytes]:
    """As `decode_describe`."""
    return _decode_named(body)


def _decode_named(body: bytes) -> tuple[bytes, bytes]:
    kind = body[:1]
    if kind not in (b"S", b"P"):
        raise ValueError
    return kind, _only_text(body[1:])


@_checked("Execute")
def decode_execute(body: bytes) -> tuple[bytes, int]:
    """The portal's name and how many rows at most; zero, or below, means all."""
    portal, at = _text(body, 0)
    _end(body, at + 4)
    return portal, _INT32_AT(body, at)[0]


@_checked("Query")
def decode_query(body: bytes) -> bytes:
    return _only_text(body)


@_checked("FunctionCall")
def decode_function_call(body: bytes) -> FunctionCall:
    (oid,) = _UINT32.unpack_from(body, 0)
    formats, at = _cut_codes(body, 4)
    values, at = _cut_values(body, at)
    (result_format,) = _INT16_AT(body, at)
    _end(body, at + 2)
    return FunctionCall(oid, formats, values, result_format)


@_checked("CopyFail")
def decode_copy_fail(body: bytes) -> bytes:
    return _only_text(body)


@_checked("PasswordMessage")
def decode_password(body: bytes) -> bytes:
    return _only_text(body)


@_checked("SASLInitialResponse")
def decode_sasl_initial_response(body: bytes) -> tuple[bytes, bytes | None]:
    """The mechanism's name and what the client says first, or None where it waits to be asked."""
    mechanism, at = _text(body, 0)
    (length,) = _INT32_AT(body, at)
    data = None if length == -1 else body[at + 4 :]
    _end(body, at + 4 + max(length, 0))
    if length < -1:
        raise ValueError
    return mechanism, data


@_checked("ErrorResponse or NoticeResponse")
def error_fields(body: bytes) -> dict[str, str]:
    """By the field's letter: S severity, V the same untranslated, C SQLSTATE, M message, D detail, H hint ..."""
    *fields, terminator, rest = body.split(b"\0")
    if terminator or rest or not all(fields):
        raise ValueError
    return {chr(field[0]): field[1:].decode("utf-8", "replace") for field in fields}


@_checked("RowDescription")
def decode_row_description(body: bytes) -> tuple[Column, ...]:
    (count,) = _INT16_AT(body, 0)
    columns, at = [], 2
    for _ in range(count):
        name, at = _text(body, at)
        columns.append(Column(name, *_COLUMN.unpack_from(body, at)))
        at += _COLUMN.size
    _end(body, at)
    return tuple(columns)


@_checked("DataRow")
def decode_data_row(body: bytes) -> tuple[bytes | None, ...]:
    values, at = _cut_values(body, 0)
    _end(body, at)
    return values


@_checked("CommandComplete")
def decode_command_complete(body: bytes) -> bytes:
    return _only_text(body)


@_checked("ParameterStatus")
def decode_parameter_status(body: bytes) -> tuple[bytes, bytes]:
    name, at = _text(body, 0)
    return name, _only_text(body[at:])


@_checked("BackendKeyData")
def decode_backend_key_data(body: bytes) -> tuple[int, bytes]:
    """The process id and the secret of 4 to 256 bytes."""
    secret = body[4:]
    if not 4 <= len(secret) <= 256:
        raise ValueError
    return _UINT32.unpack_from(body, 0)[0], secret


@_checked("ReadyForQuery")
def decode_ready_for_query(body: bytes) -> bytes:
    if len(body) != 1 or body[0] not in READY:
        raise ValueError
    return body


@_checked("ParameterDescription")
def decode_parameter_description(body: bytes) -> tuple[int, ...]:
    oids, at = _cut_oids(body, 0)
    _end(body, at)
    return oids


@_checked("CopyInResponse, CopyOutResponse or CopyBothResponse")
def decode_copy_response(body: bytes) -> CopyResponse:
    column_formats, at = _cut_codes(body, 1)
    _end(body, at)
    if body[0] > 1:
        raise ValueError
    return CopyResponse(body[0], column_formats)


@_checked("NotificationResponse")
def decode_notification(body: bytes) -> Notification:
    (pid,) = _UINT32.unpack_from(body, 0)
    channel, at = _text(body, 4)
    return Notification(pid, channel, _only_text(body[at:]))


@_checked("Authentication")
def decode_authentication(body: bytes) -> tuple[int, bytes]:
    """The request's code and its data."""
    return _UINT32.unpack_from(body, 0)[0], body[4:]


@_checked("NegotiateProtocolVersion")
def decode_negotiate_protocol_version(body: bytes) -> tuple[int, tuple[bytes, ...]]:
    """The version that the server speaks, as a whole number, and the options that it does not know."""
    version, count = _UINT32.unpack_from(body, 0)[0], _UINT32.unpack_from(body, 4)[0]
    *options, rest = body[8:].split(b"\0")
    if rest or len(options) != count:
        raise ValueError
    return version, tuple(options)


# --- Cutting a stream -----------------------------------------------------------------------------------------------


class Frames:
    """Cuts a stream of messages, however it arrives.

        frames.feed(data)
        for kind, message in frames: ...

    The messages before a broken one are handed out before the error is raised, and from then on the error is raised
    again. A loop that is left early goes on where it was at the next iteration; the stream may be fed meanwhile.

    Memory: what was fed and not yet iterated over, and at most one message that is not complete.
    """

    __slots__ = ("_at", "_buffer", "_message_bytes_max")

    def __init__(self, message_bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        """`message_bytes_max`: of a message as a whole, its kind and length included."""
        self._message_bytes_max = message_bytes_max
        self._buffer: bytes | bytearray = b""
        self._at = 0

    @property
    def pending_bytes(self) -> int:
        """How much was fed and not handed out."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes) -> None:
        if self._at == len(self._buffer):
            self._buffer = data  # the usual case: what came before is used up, and nothing is copied
        elif isinstance(self._buffer, bytearray):  # nothing of it was handed out
            self._buffer += data
        else:
            self._buffer = bytearray(memoryview(self._buffer)[self._at :])
            self._buffer += data
        self._at = 0

    def take_rest(self) -> bytes:
        """What was fed and not handed out, as it came; it is gone from here."""
        rest = bytes(self._buffer[self._at :])
        self._buffer, self._at = b"", 0
        return rest

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Each complete message: the number of its kind (`message[0]`), and the whole of it.

        Raises:
            ProtocolViolation: a length that cannot be.
            MessageTooLarge: a length above the bound, as soon as it is known.
        """
        while (at := self._at) + HEADER_BYTES <= len(self._buffer):
            buffer = self._buffer
            (length,) = _INT32_AT(buffer, at + 1)
            if not 4 <= length < self._message_bytes_max:
                raise self._refusal(length)
            end = at + 1 + length
            if end > len(buffer):
                return
            if isinstance(buffer, bytearray):  # that has grown to its first whole message: small ones may follow it
                self._buffer = buffer = bytes(buffer)
            self._at = end
            yield buffer[at], buffer[at:end]

    def _refusal(self, length: int) -> ProtocolViolation:
        if length < 4:
            return ProtocolViolation(f"a message's length cannot be {length}")
        return MessageTooLarge(
            f"a message of {length + 1} bytes is larger than the {self._message_bytes_max} bytes that are accepted"
        )
