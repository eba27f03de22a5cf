"""The order of rows that several shards sent, each in the order that was asked for: pure, by bytes.

A shard sorts by the values; here only what it sent is known, so a row's *key* is made of those bytes. A type is in the
table below if keys of it sort exactly as PostgreSQL sorts its values:

    type                        text form                        binary form
    --------------------------  -------------------------------  ----------------------------
    int2 int4 int8 oid          a number                         its bytes, big end first
    float4 float8               a number; NaN is the greatest    IEEE 754
    numeric                     a number; Infinity, then NaN     digits to the base of 10,000
    bool                        t, f                             a byte
    date timestamp timestamptz  ISO, with BC and infinity        days, microseconds
    uuid                        as written: lower case           its bytes
    bytea                       \\x… or escaped                   its bytes
    text varchar bpchar name    bytes, where the order is that of collation "C"; bpchar without blanks at its end

Other collations sort by the shard's operating system or ICU: what they do cannot be done again here. Text forms depend
on settings: dates have to come in style ISO, texts in the encoding that the server sorts them in.

Source: PostgreSQL 15, src/backend/utils/adt: numeric_send, timestamp_out, byteaout, bpcharcmp.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

from router.statements import OrderColumn
from shardmove.wire.messages import Column

Value = Callable[[bytes], Any]
RowKey = Callable[[Sequence[bytes | None]], Any]

TEXT_FORMAT = 0
DAY_US: Final = 86_400_000_000
_INFINITY: Final = 2**70
"""Beyond every timestamp, in microseconds."""

_DATE = re.compile(
    rb"(\d{4,})-(\d\d)-(\d\d)"
    rb"(?: (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?"
    rb"(?:([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?)?( BC)?"
)
_ESCAPED = re.compile(rb"\\(\\|[0-7]{3})")


class Unmergeable(Exception):
    """Rows cannot be put into that order here: message and hint."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Settings(NamedTuple):
    """What of the session's settings changes how values look."""

    is_iso: bool
    """DateStyle begins with ISO."""
    is_server_encoding: bool
    """client_encoding is the server's: texts come as the bytes that the server sorts."""


class _Descending:
    """Sorts the other way round."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Descending) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


def row_key(order: Sequence[OrderColumn], columns: Sequence[Column], settings: Settings) -> RowKey:
    """What a row sorts by. Raises Unmergeable."""
    readers = [(*_place(each, columns, settings), each.is_descending, each.is_nulls_first) for each in order]

    def key(values: Sequence[bytes | None]) -> tuple[Any, ...]:
        parts: list[Any] = []
        for at, read, is_descending, is_nulls_first in readers:
            value = values[at]
            if value is None:
                parts.append((not is_nulls_first, 0))
            else:
                found = read(value)
                parts.append((is_nulls_first, _Descending(found) if is_descending else found))
        return tuple(parts)

    return key


def _place(wanted: OrderColumn, columns: Sequence[Column], settings: Settings) -> tuple[int, Value]:
    at = _position(wanted, columns)
    column = columns[at]
    return at, value_of(column.type_oid, column.format, settings, is_c_collated=wanted.is_c_collated)


def _position(wanted: OrderColumn, columns: Sequence[Column]) -> int:
    if wanted.position is not None:
        if wanted.position < len(columns):
            return wanted.position
        raise Unmergeable(f"the result has no column {wanted.position + 1} to sort by", "name a column of the result")
    found = [at for at, column in enumerate(columns) if column.name == wanted.name.encode()]
    if len(found) == 1:
        return found[0]
    raise Unmergeable(
        f"rows of several shards are sorted by a column of the result, and {len(found) or 'none'} of its columns are"
        f" called {wanted.name}",
        "select the column that is sorted by, under a name of its own",
    )


def value_of(oid: int, format_: int, settings: Settings, *, is_c_collated: bool = False) -> Value:
    """How values of the type are compared. Raises Unmergeable."""
    if oid in _COLLATED:
        if not is_c_collated:
            raise Unmergeable(
                "texts of several shards are sorted by code points only",
                'write ORDER BY … COLLATE "C", or name a key in the statement',
            )
        if not settings.is_server_encoding:
            raise Unmergeable(
                "texts are sorted as the server encodes them, and the client has them in another encoding",
                "SET client_encoding to the server's",
            )
        return _COLLATED[oid]
    found = _KINDS.get(oid)
    if found is None:
        raise Unmergeable(
            f"rows of several shards cannot be sorted by a value of the type with OID {oid}",
            "sort by numbers, dates, timestamps, uuid or bytea, cast to such a type, or name a key in the statement",
        )
    if oid in _DATES and format_ == TEXT_FORMAT and not settings.is_iso:
        raise Unmergeable("rows of several shards are sorted by dates in style ISO only", "SET DateStyle TO ISO")
    return found[format_]


# --- what values look like


def _float(text: bytes) -> tuple[bool, float]:
    return _ranked(float(text))


def _ranked(value: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(value) else (False, value)


def _float4(data: bytes) -> tuple[bool, float]:
    return _ranked(struct.unpack(">f", data)[0])


def _float8(data: bytes) -> tuple[bool, float]:
    return _ranked(struct.unpack(">d", data)[0])


def _numeric(text: bytes) -> tuple[bool, Decimal]:
    value = Decimal(text.decode("ascii"))
    return (True, Decimal(0)) if value.is_nan() else (False, value)


def _numeric_binary(data: bytes) -> tuple[bool, Decimal]:
    """Digits to the base of 10,000, the first of them worth 10,000 ** weight."""
    count, weight, sign, _ = struct.unpack_from(">HhHH", data)
    if sign == 0xC000:
        return True, Decimal(0)
    if sign in (0xD000, 0xF000):
        return False, Decimal("Infinity" if sign == 0xD000 else "-Infinity")
    digits = "".join(f"{digit:04d}" for digit in struct.unpack_from(f">{count}H", data, 8))
    return False, Decimal((1 if sign else 0, tuple(map(int, digits)), 4 * (weight - count + 1)))


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _unsigned(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _moment(text: bytes) -> int:
    """Microseconds since the first of March of the year 0, in UTC where an offset is given."""
    if text in (b"infinity", b"-infinity"):
        return _INFINITY if text == b"infinity" else -_INFINITY
    found = _DATE.fullmatch(text)
    if found is None:
        raise Unmergeable("a date did not come in style ISO", "SET DateStyle TO ISO")
    year, month, day, *time_, fraction, sign, hours, minutes, seconds, is_bc = found.groups()
    at = _days(1 - int(year) if is_bc else int(year), int(month), int(day)) * DAY_US
    if time_[0] is not None:
        at += _us(*time_) + int((fraction or b"0").ljust(6, b"0"))
    if sign is not None:
        offset = _us(hours, minutes or b"0", seconds or b"0")
        at += offset if sign == b"-" else -offset
    return at


def _us(hours: bytes, minutes: bytes, seconds: bytes) -> int:
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1_000_000


def _days(year: int, month: int, day: int) -> int:
    """In the Gregorian calendar, which PostgreSQL uses for all times; a year begins in March here: February is last."""
    if month <= 2:
        year, month = year - 1, month + 12
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * (month - 3) + 2) // 5 + day - 1


def _bytea(text: bytes) -> bytes:
    if text.startswith(b"\\x"):
        return bytes.fromhex(text[2:].decode("ascii"))
    return _ESCAPED.sub(lambda found: b"\\" if found[1] == b"\\" else bytes([int(found[1], 8)]), text)


def _as_it_is(value: bytes) -> bytes:
    return value


def _without_blanks(value: bytes) -> bytes:
    return value.rstrip(b" ")


_INTEGER = (int, _signed)
_DATES: Final = frozenset({1082, 1114, 1184})
_KINDS: Final[Mapping[int, tuple[Value, Value]]] = {
    16: (_as_it_is, _as_it_is),  # bool: f before t, 0 before 1
    17: (_bytea, _as_it_is),
    20: _INTEGER,
    21: _INTEGER,
    23: _INTEGER,
    26: (int, _unsigned),
    700: (_float, _float4),
    701: (_float, _float8),
    1082: (_moment, _signed),
    1114: (_moment, _signed),
    1184: (_moment, _signed),
    1700: (_numeric, _numeric_binary),
    2950: (_as_it_is, _as_it_is),
}
_COLLATED: Final[Mapping[int, Value]] = {
    19: _as_it_is,
    25: _as_it_is,
    1042: _without_blanks,
    1043: _as_it_is,
}
