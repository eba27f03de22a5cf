"""Builders for the SQL that differs from table to table: range predicates, keyset comparisons, column lists.

Every identifier goes through psycopg.sql. Predicates hold their values as quoted literals, since the same predicate
stands in triggers and in COPY, where there are no parameters; so a statement that holds one is run without parameters.
Keyset positions are tuples of text, the form in which PostgreSQL itself prints the values, and are cast back to the
columns' types wherever they are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import LiteralString, TypeAlias, cast

from psycopg import sql

from shardmove.domain import hashing
from shardmove.domain.keys import KeyRange, KeyType, key_text
from shardmove.domain.moves import Keyspace, Scheme, TableName

Position: TypeAlias = tuple[str, ...]
"""One keyset position: the values of the keyset columns as text."""

Interval: TypeAlias = tuple[Position | None, Position | None]
"""Keyset positions (after, upto]; None is an open end."""

TRUE = sql.SQL("true")


def table(name: TableName) -> sql.Identifier:
    return sql.Identifier(name.schema, name.name)


def type_name(name: str) -> sql.SQL:
    """A type as the server's own format_type() printed it: it comes quoted, and from the server only."""
    return sql.SQL(cast(LiteralString, name))  # type: ignore[redundant-cast]  # mypy knows no LiteralString


def names(columns: Iterable[str], *, prefix: sql.Composable | None = None) -> sql.Composed:
    """`a, b, c`, each behind the prefix (`NEW.`) where there is one."""
    dot = sql.SQL("") if prefix is None else prefix
    return sql.SQL(", ").join(sql.Composed([dot, sql.Identifier(column)]) for column in columns)


def in_ranges(
    column: sql.Composable, ranges: Iterable[KeyRange], keyspace: Keyspace, *, sorts_as_bytes: bool = False
) -> sql.Composable:
    """True for the rows whose key is in one of the ranges. Never NULL for a key that is not NULL.

    Args:
        sorts_as_bytes: the column is known to sort so by itself; an index on it can then answer.
    """
    place = place_of(column, keyspace, sorts_as_bytes=sorts_as_bytes)
    parts = [_in_range(place, range_, keyspace.bound_type) for range_ in ranges]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts)) if parts else sql.SQL("false")


def place_of(column: sql.Composable, keyspace: Keyspace, *, sorts_as_bytes: bool = False) -> sql.Composable:
    """Where a row's key lies, as `Keyspace.place` says it; texts in the order of their bytes."""
    if keyspace.scheme is Scheme.HASH:
        return sql.SQL(hashing.SQL[keyspace.key_type]).format(column)
    if keyspace.key_type is KeyType.TEXT and not sorts_as_bytes:
        return as_bytes(column)
    return column


def as_bytes(text: sql.Composable) -> sql.Composed:
    """A text that compares by its bytes, whatever its collation."""
    return sql.SQL('{} COLLATE pg_catalog."C"').format(text)


def _in_range(place: sql.Composable, range_: KeyRange, bound_type: KeyType) -> sql.Composable:
    cast_to = type_name(bound_type)
    ends = [(sql.SQL(">="), range_.lower), (sql.SQL("<"), range_.upper)]
    parts = [
        sql.SQL("{} {} {}::{}").format(place, operator, sql.Literal(key_text(end)), cast_to)
        for operator, end in ends
        if end is not None
    ]
    return sql.SQL(" AND ").join(parts) if parts else TRUE
