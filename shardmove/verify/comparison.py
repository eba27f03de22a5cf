"""The full comparison: every table of a move, interval by interval, on pairs of snapshots that must be equal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import xxhash
from psycopg import sql

from shardmove.config import Limits
from shardmove.domain.digests import Digest
from shardmove.domain.moves import Direction, Move
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, connect
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import Interval, Position, names
from shardmove.protocol import fence
from shardmove.protocol.catch_up import Mirror, in_move
from shardmove.verify.pairs import Pair, any_snapshots, equal_snapshots
from workers.cuts import BatchSizer, walk
from workers.digest import DigestInterval
from workers.executors import Executor

KEYS_LISTED_MAX = 10_000
"""So many keys of rows that differ are kept for each table and kind; all are counted."""


@dataclass(slots=True)
class TableComparison:
    """What the comparison of one table found. Rows are those of the move's ranges.

    Attributes:
        missing: keys that the owner has and the other side has not; extra: the other way round.
        different: keys that both have, with other values.
    """

    table: Table
    rows_owner: int = 0
    rows_other: int = 0
    digest_owner: str = ""
    digest_other: str = ""
    missing: list[Position] = field(default_factory=list)
    extra: list[Position] = field(default_factory=list)
    different: list[Position] = field(default_factory=list)
    intervals: int = 0
    keys_max: int = KEYS_LISTED_MAX
    counts: Counter[str] = field(default_factory=Counter)
    """How many rows differ, by kind, also those whose keys were not kept."""
    _hash_owner: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    _hash_other: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    @property
    def equal(self) -> bool:
        return not (self.missing or self.extra or self.different) and self.digest_owner == self.digest_other

    @property
    def found(self) -> int:
        """How many rows differ."""
        return self.counts.total()

    @property
    def keys(self) -> list[Position]:
        return [*self.missing, *self.extra, *self.different]

    def add(self, owner: Digest, other: Digest) -> None:
        """Takes in one interval; intervals come in keyset order, so equal sides have equal digests over all of them."""
        self.intervals += 1
        self.rows_owner += owner.rows
        self.rows_other += other.rows
        for state, digest in ((self._hash_owner, owner), (self._hash_other, other)):
            state.update(f"{digest.rows} {digest.hash}\n".encode())
        self.digest_owner, self.digest_other = self._hash_owner.hexdigest(), self._hash_other.hexdigest()


@dataclass(frozen=True, slots=True)
class Sides:
    """Which shard is which: the owner is mirrored into the other."""

    move: Move
    direction: Direction
    tables: Sequence[Table]
    dsn: Mapping[str, str]
    open_mirror: Callable[[], Mirror]

    @property
    def owner_dsn(self) -> str:
        return self.dsn[self.move.giver(self.direction)]

    @property
    def other_dsn(self) -> str:
        return self.dsn[self.move.receiver(self.direction)]


def compare(
    sides: Sides,
    executor: Executor,
    limits: Limits,
    *,
    check: Callable[[], None] = lambda: None,
    on_rows: Callable[[Table, int], None] = lambda _table, _rows: None,
    is_exact: bool = True,
) -> list[TableComparison]:
    """Reads both sides again in full and compares them, under live writes. Changes no row; carries the journal.

    Snapshots are renewed after `limits.snapshot_time_s`, so that vacuum is not held up for longer than that and one
    interval. Memory: digests of the intervals under way, and the keys of rows that differ.

    Args:
        check: called between intervals; what it raises ends the comparison.
        on_rows: called with the rows of each interval that was compared.
        is_exact: else the journal is left alone, and rows that are on their way count as differences.

    Raises:
        Failed: writers are faster than the mirror; whatever a catch-up or a worker raises. Nothing was changed.
    """
    return _Comparing(sides, executor, limits, check, on_rows, is_exact).run()


@dataclass(slots=True)
class _Comparing:
    sides: Sides
    executor: Executor
    limits: Limits
    check: Callable[[], None]
    on_rows: Callable[[Table, int], None]
    is_exact: bool

    def run(self) -> list[TableComparison]:
        # To mend by, every key is needed: those of rows on their way may come first.
        keys_max = KEYS_LISTED_MAX if self.is_exact else sys.maxsize
        found = [TableComparison(table, keys_max=keys_max) for table in self.sides.tables]
        name = fence.application_name(self.sides.move.id)
        with connect(self.sides.owner_dsn, application_name=name) as cutter:
            sizer = BatchSizer(self.limits)
            work = self._intervals(cutter, sizer)
            pending = next(work, None)
            while pending is not None:
                with self._snapshots(name) as pair:
                    pending = self._at_one_pair(pair, pending, work, found, sizer)
        return found

    def _snapshots(self, name: str) -> AbstractContextManager[Pair]:
        sides = self.sides
        if self.is_exact:
            return equal_snapshots(sides.open_mirror, giver_dsn=sides.owner_dsn, receiver_dsn=sides.other_dsn)
        return any_snapshots(giver_dsn=sides.owner_dsn, receiver_dsn=sides.other_dsn, application_name=name)

    def _intervals(self, cutter: Connection, sizer: BatchSizer) -> Iterator[tuple[int, Interval]]:
        for ordinal, table in enumerate(self.sides.tables, 1):
            for interval in walk(cutter, self.sides.move, table, (None, None), sizer.rows):
                yield ordinal, interval

    def _at_one_pair(
        self,
        pair: Pair,
        first: tuple[int, Interval],
        work: Iterator[tuple[int, Interval]],
        found: list[TableComparison],
        sizer: BatchSizer,
    ) -> tuple[int, Interval] | None:
        """Compares intervals at one pair of snapshots until it is too old; returns the first that is left, or None."""
        deadline = time.monotonic() + self.limits.snapshot_time_s
        current: tuple[int, Interval] | None = first
        under_way: list[_UnderWay] = []
        while current is not None and time.monotonic() < deadline:
            self.check()
            under_way.append(self._submit(pair, *current))
            if len(under_way) > self.executor.workers:
                self._settle(pair, under_way.pop(0), found, sizer)
            current = next(work, None)
        for each in under_way:
            self._settle(pair, each, found, sizer)
        return current

    def _submit(self, pair: Pair, ordinal: int, interval: Interval) -> _UnderWay:
        table = self.sides.tables[ordinal - 1]
        owner, other = (
            self.executor.submit(DigestInterval(self.sides.move, ordinal, table, interval, dsn, snapshot))
            for dsn, snapshot in ((self.sides.owner_dsn, pair.giver), (self.sides.other_dsn, pair.receiver))
        )
        return _UnderWay(ordinal, interval, owner, other, time.monotonic())

    def _settle(self, pair: Pair, each: _UnderWay, found: list[TableComparison], sizer: BatchSizer) -> None:
        owner, other = each.owner.result(), each.other.result()
        entry = found[each.ordinal - 1]
        entry.add(owner, other)
        sizer.learn(owner.rows, owner.size_bytes, time.monotonic() - each.begun)
        if owner != other and (self.is_exact or other.rows):  # a row that is missing is in nobody's way
            _list_differences(self.sides, pair, entry, each.interval)
        self.on_rows(entry.table, owner.rows)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    ordinal: int
    interval: Interval
    owner: Future[Digest]
    other: Future[Digest]
    begun: float


def _list_differences(sides: Sides, pair: Pair, entry: TableComparison, interval: Interval) -> None:
    """Names the rows of one interval that are not equal, from a hash of each row on each side."""
    owner = _row_hashes(sides, entry.table, interval, sides.owner_dsn, pair.giver)
    other = _row_hashes(sides, entry.table, interval, sides.other_dsn, pair.receiver)
    missing = [key for key in owner if key not in other]
    extra = [key for key in other if key not in owner]
    different = [key for key, hash_ in owner.items() if key in other and other[key] != hash_]
    if not (missing or extra or different):
        different = list(owner)  # the bytes differ where their text does not: any of these rows
    kinds = {"missing": missing, "extra": extra, "different": different}
    for (kind, keys), kept in zip(kinds.items(), (entry.missing, entry.extra, entry.different), strict=True):
        kept += keys[: entry.keys_max - len(kept)]
        entry.counts[kind] += len(keys)


def _row_hashes(sides: Sides, table: Table, interval: Interval, dsn: str, snapshot: str) -> dict[Position, str]:
    query = sql.SQL("SELECT {}, pg_catalog.md5(ROW({})::text) FROM {} WHERE {} AND {}").format(
        table.keyset_as_text(),
        names(table.columns),
        table.rows,
        in_move(sides.move, table),
        table.within(interval),
    )
    name = fence.application_name(sides.move.id)
    with connect(dsn, application_name=name) as connection, effects.snapshot(connection, snapshot):
        return {tuple(row[:-1]): row[-1] for row in connection.execute(query).fetchall()}
