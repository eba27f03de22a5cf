"""Where a key lies in the hash scheme: the 64-bit number that PostgreSQL's own extended hash function gives, seed 0.

PostgreSQL's hash partitioning rests on the same functions, and partitioned tables survive pg_upgrade: so the numbers
stay the same from version to version. They are signed here, as SQL shows them. `HASHES` computes them in Python, `SQL`
on the server. Both are equal where the database is in UTF-8 and the machine little-endian: what is hashed is bytes in
memory, and for text and uuid a big-endian server arrives at other numbers.

The function is Bob Jenkins' lookup3 with the changes of PostgreSQL's src/common/hashfn.c: three 32-bit words a, b, c
take in 12 bytes at a time, and b and c are the result. Python's integers do not overflow: a word is cut to 32 bits
where it is about to be rotated, and may be any number with the right lower bits elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from struct import Struct
from typing import Any, Final, LiteralString
from uuid import UUID

_BLOCK: Final = Struct("<3I")
_BEGIN: Final = 0x9E3779B9 + 3923095
_BEGIN_WORD: Final = _BEGIN + 4
_SIGN: Final = 1 << 31

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = _EPOCH.toordinal()


def _hash_bytes(data: bytes) -> int:
    a = b = c = _BEGIN + len(data)  # below 2**32: no value is longer than 1 GB
    *blocks, (last_a, last_b, last_c) = _BLOCK.iter_unpack(data + bytes(12 - len(data) % 12))
    for block_a, block_b, block_c in blocks:
        a += block_a
        b += block_b
        c = (c + block_c) & 0xFFFFFFFF
        a = ((a - c) ^ (c << 4 | c >> 28)) & 0xFFFFFFFF
        c += b
        b = ((b - a) ^ (a << 6 | a >> 26)) & 0xFFFFFFFF
        a += c
        c = ((c - b) ^ (b << 8 | b >> 24)) & 0xFFFFFFFF
        b += a
        a = ((a - c) ^ (c << 16 | c >> 16)) & 0xFFFFFFFF
        c += b
        b = ((b - a) ^ (a << 19 | a >> 13)) & 0xFFFFFFFF
        a += c
        c = ((c - b) ^ (b << 4 | b >> 28)) & 0xFFFFFFFF
        b += a
    return _finish(a + last_a, (b + last_b) & 0xFFFFFFFF, c + (last_c << 8))  # c's lowest byte is the length's


def _hash_integer(value: int) -> int:
    """Of 64 bits, folded so that a number that fits into fewer has the same hash as a bigint and as a smaller type."""
    high = value >> 32
    return _finish(_BEGIN_WORD + (value ^ (high if value >= 0 else ~high)), _BEGIN_WORD, _BEGIN_WORD)


def _finish(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - (b << 14 | b >> 18)) & 0xFFFFFFFF
    a = ((a ^ c) - (c << 11 | c >> 21)) & 0xFFFFFFFF
    b = ((b ^ a) - (a << 25 | a >> 7)) & 0xFFFFFFFF
    c = ((c ^ b) - (b << 16 | b >> 16)) & 0xFFFFFFFF
    a = ((a ^ c) - (c << 4 | c >> 28)) & 0xFFFFFFFF
    b = ((b ^ a) - (a << 14 | a >> 18)) & 0xFFFFFFFF
    c = ((c ^ b) - (b << 24 | b >> 8)) & 0xFFFFFFFF
    return ((b ^ _SIGN) - _SIGN) << 32 | c


def _hash_text(value: str) -> int:
    return _hash_bytes(value.encode())


def _hash_uuid(value: UUID) -> int:
    return _hash_bytes(value.bytes)


def _hash_date(value: date) -> int:
    return _hash_integer(value.toordinal() - _EPOCH_DAY)


def _hash_timestamptz(value: datetime) -> int:
    since = value - _EPOCH  # TypeError where it has no time zone
    return _hash_integer((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)


HASHES: Final[Mapping[str, Callable[[Any], int]]] = {
    "smallint": _hash_integer,
    "integer": _hash_integer,
    "bigint": _hash_integer,
    "text": _hash_text,
    "uuid": _hash_uuid,
    "date": _hash_date,
    "timestamptz": _hash_timestamptz,
}
"""By PostgreSQL's name of the type: from int, str, UUID, date or a datetime with a time zone."""

# Date and timestamptz have extended hash functions of their own since PostgreSQL 18. Before, and to the same effect,
# they hash as what they are stored as: days, or microseconds, since 2000, infinities as the extreme numbers. Dates have
# that number as their difference, unless they are infinite. The time zone is an interval: a name may mean anything.
SQL: Final[Mapping[str, LiteralString]] = {
    "smallint": "pg_catalog.hashint2extended({0}, 0)",
    "integer": "pg_catalog.hashint4extended({0}, 0)",
    "bigint": "pg_catalog.hashint8extended({0}, 0)",
    "text": 'pg_catalog.hashtextextended({0} COLLATE pg_catalog."C", 0)',
    "uuid": "pg_catalog.uuid_hash_extended({0}, 0)",
    "date": (
        "pg_catalog.hashint4extended(CASE"
        " WHEN {0} OPERATOR(pg_catalog.=) 'infinity'::pg_catalog.date THEN 2147483647"
        " WHEN {0} OPERATOR(pg_catalog.=) '-infinity'::pg_catalog.date THEN -2147483648"
        " ELSE {0} OPERATOR(pg_catalog.-) '2000-01-01'::pg_catalog.date END, 0)"
    ),
    "timestamptz": "pg_catalog.timestamp_hash_extended(pg_catalog.timezone('0'::pg_catalog.interval, {0}), 0)",
}
"""The same as an expression of a column, `{0}`, for PostgreSQL 14 and later: immutable, whatever the search_path."""
