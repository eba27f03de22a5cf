"""What moves will carry, and for how long: from the statistics of the shards that own the rows. Rough, and free.

Rows are what the planner expects of the range, bytes the part of the tables' disk that these rows make up, with
indexes, TOAST and partitions; so much does the target need, at least. Nothing is read but catalogs and statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.domain.errors import Failed, ShardmoveError
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Keyspace, Move, Scheme, State, TableName
from shardmove.postgres.connect import Connection, connect, explain
from shardmove.postgres.introspect import Table, estimate_rows, size_bytes, stored_columns
from shardmove.postgres.sql import TRUE, in_ranges, type_name

DEFAULT_RATE_ROWS_S: Final = 20_000.0
"""Rows a second where nobody named a rate and no move has measured one: on the slow side for small rows."""
STATEMENT_TIMEOUT: Final = "5s"
"""EXPLAIN waits for whoever changes the table; a plan does not wait for that long."""
HASHES: Final = 2**64


@dataclass(frozen=True, slots=True)
class Size:
    """So many rows, and the bytes that they take on disk."""

    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rate:
    """Rows a second, and whence: `--rate`, the id of the move that measured it, or `default`."""

    rows_s: float
    origin: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a move will carry; where that cannot be had, `trouble` says why."""

    move: Move
    size: Size | None
    trouble: str | None = None


def choose_rate(catalog: Catalog, wanted_rows_s: float | None) -> Rate:
    """The rate that was asked for, else that of the copy of the newest completed move, else the default."""
    if wanted_rows_s is not None:
        return Rate(wanted_rows_s, "--rate")
    completed = [move for move in catalog.moves() if move.state is State.COMPLETED]
    for move in sorted(completed, key=lambda m: m.state_since, reverse=True):
        measured = catalog.stats(move.id).get("rate_rows_s")
        if measured:
            return Rate(float(measured), move.id)
    return Rate(DEFAULT_RATE_ROWS_S, "default")


def estimates(statistics: Statistics, moves: Iterable[Move]) -> list[Estimate]:
    """One a move. A shard that does not answer costs its moves their figures, and no more."""
    found = []
    for move in moves:
        try:
            found.append(Estimate(move, statistics.size(move.keyspace, move.ranges, move.source)))
        except ShardmoveError as error:
            found.append(Estimate(move, None, error.message))
    return found


class Statistics:
    """The shards' own statistics; a connection to each, made when it is first asked."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = ExitStack()
        self._known: dict[str, Connection | ShardmoveError] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def size(self, keyspace: Keyspace, ranges: Sequence[KeyRange], shard: str) -> Size:
        """What the shard holds of the ranges, over all tables of the keyspace.

        Raises:
            Unreachable: it does not answer; it is not asked again.
            Refused, Failed: a table or its key column is missing, may not be read, or is being changed.
        """
        connection = self._connection(shard)
        try:
            sizes = [_size(connection, keyspace, ranges, name, key) for name, key in keyspace.tables.items()]
        except psycopg.Error as error:
            raise Failed(f"shard {shard}: {explain(error)}") from error
        return Size(sum(each.rows for each in sizes), sum(each.size_bytes for each in sizes))

    def _connection(self, shard: str) -> Connection:
        if shard not in self._known:
            try:
                opened = connect(self._config.shard_dsn(shard), application_name="shardmove plan")
                self._stack.callback(opened.close)
                opened.execute("SELECT pg_catalog.set_config('statement_timeout', %s, false)", (STATEMENT_TIMEOUT,))
                self._known[shard] = opened
            except ShardmoveError as error:
                self._known[shard] = error
        known = self._known[shard]
        if isinstance(known, ShardmoveError):
            raise known
        return known


def _size(
    connection: Connection, keyspace: Keyspace, ranges: Sequence[KeyRange], name: TableName, key_column: str
) -> Size:
    _, is_partitioned = stored_columns(connection, name)
    table = Table(name, key_column, columns=(), keyset=(), binary=False, is_partitioned=is_partitioned)
    if not _has_pages(connection, table):
        return Size(0, 0)  # of an empty table the planner would expect ten pages full
    total = estimate_rows(connection, table, TRUE)
    rows = min(total, _rows(connection, table, keyspace, ranges, total))
    return Size(rows, size_bytes(connection, name) * rows // max(1, total))


def _has_pages(connection: Connection, table: Table) -> bool:
    row = connection.execute(
        "SELECT bool_or(pg_catalog.pg_relation_size(relid) > 0) FROM (SELECT to_regclass(%(name)s)::oid AS relid"
        " UNION SELECT relid FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass(%(name)s))) AS family",
        {"name": sql.Identifier(table.name.schema, table.name.name).as_string(connection)},
    ).fetchone()
    return row == (True,)


def _rows(connection: Connection, table: Table, keyspace: Keyspace, ranges: Sequence[KeyRange], total: int) -> int:
    column = sql.Identifier(table.key_column)
    if keyspace.scheme is Scheme.RANGE:
        return estimate_rows(connection, table, in_ranges(column, ranges, keyspace))
    # No statistics tell how hashes are spread: evenly, that is what they are for. A hash alone has the rows of a key.
    hashes = sum(map(_width, ranges))
    if hashes > len(ranges):
        return round(total * (hashes / HASHES))
    any_key = sql.SQL("{} = (SELECT NULL::{})").format(column, type_name(keyspace.key_type))
    return hashes * estimate_rows(connection, table, any_key)


def _width(range_: KeyRange) -> int:
    """How many hashes are in it."""
    lower, upper = (end if isinstance(end, int) else None for end in (range_.lower, range_.upper))
    return (HASHES // 2 if upper is None else upper) - (-HASHES // 2 if lower is None else lower)
