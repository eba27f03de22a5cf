"""Digest: how many rows, and the xxh3_128 of their COPY stream in keyset order (DESIGN §5)."""

from __future__ import annotations

from dataclasses import dataclass, field

import xxhash


@dataclass(frozen=True, slots=True)
class Digest:
    """Rows, size and hash of one table in one keyset interval. Equal digests: equal rows in equal order."""

    rows: int
    size_bytes: int
    hash: str

    def __str__(self) -> str:
        return f"{self.rows} rows {self.hash}"


@dataclass(slots=True)
class Hasher:
    """Builds a Digest from the blocks of a COPY TO stream, as they come."""

    size_bytes: int = 0
    _state: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def update(self, block: bytes | bytearray | memoryview) -> None:
        self.size_bytes += len(block)
        self._state.update(block)

    def digest(self, rows: int) -> Digest:
        return Digest(rows, self.size_bytes, self._state.hexdigest())
