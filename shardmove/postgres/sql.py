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

from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import TableName

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


def in_ranges(column: sql.Composable, ranges: Iterable[KeyRange], key_type: KeyType) -> sql.Composable:
    """True for the rows whose key is in one of the ranges. Never NULL for a key that is not NULL."""
    parts = [_in_range(column, range_, key_type) for range_ in ranges]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts)) if parts else sql.SQL("false")


def _in_range(column: sql.Composable, range_: KeyRange, key_type: KeyType) -> sql.Composable:
    cast_to = type_name(key_type)
    ends = [(sql.SQL(">="), range_.lower), (sql.SQL("<"), range_.upper)]
    parts = [
        sql.SQL("{} {} {}::{}").format(column, operator, sql.Literal(str(end)), cast_to)
        for operator, end in ends
        if end is not None
    ]
    return sql.SQL(" AND ").join(parts) if parts else TRUE
