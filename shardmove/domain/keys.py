"""Keys and key ranges.

A key range is half-open, `[lower, upper)`; `None` is an open end. Its text form is `L:U`, an open end is empty.
Key types know how to read a key, which keys exist, and which PostgreSQL type carries them; ranges never look inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TypeAlias

from shardmove.domain.errors import ConfigurationError

Key: TypeAlias = int  # the integer schemes; other key types widen this alias


class KeyType(StrEnum):
    """The types a shard key may have. The value is PostgreSQL's own name of the type."""

    SMALLINT = "smallint"
    INTEGER = "integer"
    BIGINT = "bigint"

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest key, both inclusive."""
        bits = {KeyType.SMALLINT: 15, KeyType.INTEGER: 31, KeyType.BIGINT: 63}[self]
        return -(2**bits), 2**bits - 1

    def parse(self, text: str) -> Key:
        """Reads one key. Raises ConfigurationError where the text is no key of this type."""
        try:
            key = int(text.strip())
        except ValueError:
            raise ConfigurationError(f"{text!r} is not a key of type {self}") from None
        smallest, largest = self.bounds
        if not smallest <= key <= largest:
            raise ConfigurationError(f"key {key} does not fit into {self} ({smallest} to {largest})")
        return key

    def parse_range(self, text: str) -> KeyRange:
        """Reads `L:U`. Raises ConfigurationError for anything else, and for an empty range."""
        lower, colon, upper = text.partition(":")
        if not colon:
            raise ConfigurationError(f"{text!r} is not a key range", hint="write L:U; an open end is empty, e.g. 100:")
        return KeyRange(
            self.parse(lower) if lower.strip() else None,
            self.parse(upper) if upper.strip() else None,
        )


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Every key k with lower <= k < upper. Never empty."""

    lower: Key | None
    upper: Key | None

    def __post_init__(self) -> None:
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ConfigurationError(f"the key range {self} is empty: its lower end is not below its upper end")

    def __str__(self) -> str:
        return f"{'' if self.lower is None else self.lower}:{'' if self.upper is None else self.upper}"

    @property
    def position(self) -> tuple[bool, Key]:
        """Sorts ranges by their lower ends; the range without one comes first."""
        return self.lower is not None, self.lower or 0

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
