"""Keys and key ranges.

A key is a Python value that sorts as PostgreSQL sorts the key's type: int, str (by code points, which is the order of
collation "C" in UTF-8), UUID, date, datetime in UTC. A key range is half-open, `[lower, upper)`; `None` is an open end.

Its text form is `L:U`, an open end is empty; an end that holds a colon, a quote or outer blanks stands in double
quotes, a quote within doubled: `"2026-01-01 00:00:00+00:00":`. Key types know how to read a key, which keys exist, and
which PostgreSQL type carries them; ranges never look inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from typing import Any, Protocol
from uuid import UUID

from shardmove.domain.errors import ConfigurationError


class Key(Protocol):
    """A value that sorts among its kind: int, str, UUID, date or datetime; never two kinds in one keyspace."""

    def __lt__(self, other: Any, /) -> bool: ...
    def __le__(self, other: Any, /) -> bool: ...
    def __gt__(self, other: Any, /) -> bool: ...
    def __ge__(self, other: Any, /) -> bool: ...


class KeyType(StrEnum):
    """The types a shard key may have. The value is PostgreSQL's own name of the type."""

    SMALLINT = "smallint"
    INTEGER = "integer"
    BIGINT = "bigint"
    TEXT = "text"
    UUID = "uuid"
    DATE = "date"
    TIMESTAMPTZ = "timestamptz"

    @property
    def least(self) -> Key | None:
        """The smallest key, where a range can name it; dates and times begin at -infinity, which no range names."""
        return _LEAST.get(self)

    def parse(self, text: str) -> Key:
        """Reads one key. Raises ConfigurationError where the text is no key of this type."""
        try:
            return _READ[self](text)
        except (ValueError, OverflowError):
            raise ConfigurationError(f"{text!r} is not a key of type {self}", hint=_HOW.get(self)) from None

    def parse_range(self, text: str) -> KeyRange:
        """Reads `L:U`. Raises ConfigurationError for anything else, and for an empty range."""
        found = _RANGE.fullmatch(text)
        if found is None:
            raise ConfigurationError(
                f"{text!r} is not a key range",
                hint='write L:U; an open end is empty, e.g. 100: ; an end with a colon in it stands in "double quotes"',
            )
        lower, upper = (_read_end(self, quoted, plain) for quoted, plain in (found.group(1, 2), found.group(3, 4)))
        if upper is not None and upper == self.least:
            raise ConfigurationError(f"the key range {text} is empty: no key is below its upper end")
        return KeyRange(None if lower == self.least else lower, upper)

    def range_of(self, lower: str | None, upper: str | None) -> KeyRange:
        """A range from its ends as `key_text` wrote them; None is an open end."""
        return KeyRange(
            None if lower is None else self.parse(lower),
            None if upper is None else self.parse(upper),
        )

    def successor(self, key: Key) -> Key | None:
        """The next key; None after the last one. `[key, successor)` holds this key alone.

        Raises ConfigurationError where the next key exists and cannot be written: after the year 9999.
        """
        match key:
            case str():
                return key + "\x01"  # PostgreSQL's texts hold no character 0
            case int():
                return None if key == _BOUNDS[self][1] else key + 1
            case UUID():
                return None if key.int == 2**128 - 1 else UUID(int=key.int + 1)
            case date():  # a datetime is one too
                step = timedelta(microseconds=1) if isinstance(key, datetime) else timedelta(days=1)
                try:
                    return key + step
                except OverflowError:
                    raise ConfigurationError(f"there is no key after {key} that a range could name") from None
            case _:
                raise ConfigurationError(f"{key!r} is not a key of type {self}")


_BOUNDS: Mapping[KeyType, tuple[int, int]] = {
    type_: (-(2**bits), 2**bits - 1)
    for type_, bits in ((KeyType.SMALLINT, 15), (KeyType.INTEGER, 31), (KeyType.BIGINT, 63))
}
_LEAST: Mapping[KeyType, Key] = {
    **{type_: smallest for type_, (smallest, _) in _BOUNDS.items()},
    KeyType.TEXT: "",
    KeyType.UUID: UUID(int=0),
}


def _read_integer(type_: KeyType, text: str) -> int:
    key = int(text.strip())
    smallest, largest = _BOUNDS[type_]
    if not smallest <= key <= largest:
        raise ConfigurationError(f"key {key} does not fit into {type_} ({smallest} to {largest})")
    return key


def _read_text(text: str) -> str:
    if "\0" in text:
        raise ValueError(text)
    text.encode()  # a lone surrogate is no text
    return text


def _read_datetime(text: str) -> datetime:
    key = datetime.fromisoformat(text.strip())
    if key.tzinfo is None:
        raise ValueError(text)
    return key.astimezone(UTC)


_READ: Mapping[KeyType, Callable[[str], Key]] = {
    KeyType.SMALLINT: lambda text: _read_integer(KeyType.SMALLINT, text),
    KeyType.INTEGER: lambda text: _read_integer(KeyType.INTEGER, text),
    KeyType.BIGINT: lambda text: _read_integer(KeyType.BIGINT, text),
    KeyType.TEXT: _read_text,
    KeyType.UUID: lambda text: UUID(text.strip()),
    KeyType.DATE: lambda text: date.fromisoformat(text.strip()),
    KeyType.TIMESTAMPTZ: _read_datetime,
}
_HOW: Mapping[KeyType, str] = {
    KeyType.DATE: "write YYYY-MM-DD",
    KeyType.TIMESTAMPTZ: "write YYYY-MM-DD HH:MM:SS+00:00, with its offset",
}

_END = r'\s*(?:"((?:[^"]|"")*)"|([^":]*))\s*'
_RANGE = re.compile(f"{_END}:{_END}", re.DOTALL)


def _read_end(type_: KeyType, quoted: str | None, plain: str | None) -> Key | None:
    if quoted is not None:
        return type_.parse(quoted.replace('""', '"'))
    return type_.parse(plain.strip()) if plain and plain.strip() else None


def key_text(key: Key) -> str:
    """The key as PostgreSQL and `KeyType.parse` read it."""
    return key.isoformat(sep=" ") if isinstance(key, datetime) else str(key)


def end_text(end: Key | None) -> str:
    """An end as it stands in a range's text: empty where it is open, in quotes where it has to be."""
    if end is None:
        return ""
    text = key_text(end)
    plain = text and ":" not in text and '"' not in text and text == text.strip()
    return text if plain else '"' + text.replace('"', '""') + '"'


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Every key k with lower <= k < upper. Never empty."""

    lower: Key | None
    upper: Key | None

    def __post_init__(self) -> None:
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ConfigurationError(f"the key range {self} is empty: its lower end is not below its upper end")

    def __str__(self) -> str:
        return f"{end_text(self.lower)}:{end_text(self.upper)}"

    @property
    def ends(self) -> tuple[str | None, str | None]:
        """The ends as text, None where the range is open: what `KeyType.range_of` reads."""
        return (
            None if self.lower is None else key_text(self.lower),
            None if self.upper is None else key_text(self.upper),
        )

    @property
    def position(self) -> tuple[bool, Key]:
        """Sorts ranges by their lower ends; the range without one comes first."""
        return self.lower is not None, 0 if self.lower is None else self.lower

    def __contains__(self, key: Key) -> bool:
        return (self.lower is None or key >= self.lower) and (self.upper is None or key < self.upper)

    def intersection(self, other: KeyRange) -> KeyRange | None:
        """The keys that are in both, or None where there are none."""
        lowers = [end for end in (self.lower, other.lower) if end is not None]
        uppers = [end for end in (self.upper, other.upper) if end is not None]
        lower, upper = max(lowers, default=None), min(uppers, default=None)
        if lower is not None and upper is not None and lower >= upper:
            return None
        return KeyRange(lower, upper)

    def difference(self, other: KeyRange) -> Iterator[KeyRange]:
        """What is left of this range without the other: no, one or two ranges, ascending."""
        common = self.intersection(other)
        if common is None:
            yield self
            return
        if common.lower is not None and (self.lower is None or self.lower < common.lower):
            yield KeyRange(self.lower, common.lower)
        if common.upper is not None and (self.upper is None or common.upper < self.upper):
            yield KeyRange(common.upper, self.upper)

    def pieces(self, points: Iterable[Key]) -> tuple[KeyRange, ...]:
        """Cuts the range at the points: n points give n + 1 pieces, ascending.

        Raises ConfigurationError where a point is outside, at the lower end, or named twice.
        """
        cuts = sorted(points)
        for point in cuts:
            if point not in self or point == self.lower:
                raise ConfigurationError(f"{point} does not cut the key range {self} in two")
        if len(set(cuts)) != len(cuts):
            raise ConfigurationError("a cut point is named twice")
        ends = [self.lower, *cuts, self.upper]
        return tuple(KeyRange(lower, upper) for lower, upper in pairwise(ends))


def ascending(ranges: Iterable[KeyRange]) -> tuple[KeyRange, ...]:
    """Sorted by their lower ends."""
    return tuple(sorted(ranges, key=lambda r: r.position))


def merged(ranges: Iterable[KeyRange]) -> tuple[KeyRange, ...]:
    """The same keys in as few ranges as possible, ascending. The input may overlap."""
    out: list[KeyRange] = []
    for range_ in ascending(ranges):
        last = out[-1] if out else None
        touches = last is not None and (last.upper is None or range_.lower is None or range_.lower <= last.upper)
        if last is None or not touches:
            out.append(range_)
        elif last.upper is not None:
            upper = None if range_.upper is None else max(last.upper, range_.upper)
            out[-1] = KeyRange(last.lower, upper)
    return tuple(out)


def subtract(ranges: Iterable[KeyRange], taken: Iterable[KeyRange]) -> tuple[KeyRange, ...]:
    """The keys of `ranges` that are in none of `taken`, merged and ascending."""
    left = list(ranges)
    for hole in taken:
        left = [piece for range_ in left for piece in range_.difference(hole)]
    return merged(left)
