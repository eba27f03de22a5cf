"""Which tables are split, by what, and which every shard holds whole.

A name without a schema is that of `public`, unless there is no such table in a keyspace and exactly one schema has one
of that name in a keyspace: search_path is not followed. Names arrive here folded, as PostgreSQL folds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName


class Split(NamedTuple):
    """A split table, or one that every shard holds whole: then `column` is None."""

    table: TableName
    keyspace: Keyspace
    column: str | None

    @property
    def key_type(self) -> KeyType:
        return self.keyspace.key_type

    @property
    def scheme(self) -> Scheme:
        return self.keyspace.scheme


class Columns(NamedTuple):
    """A table's columns in their order, and which of them COPY leaves out."""

    names: tuple[str, ...]
    generated: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Tables:
    """`columns`: of tables into which INSERT or COPY may put rows without naming theirs."""

    keyspaces: Mapping[str, Keyspace]
    columns: Mapping[TableName, Columns]

    def __init__(self, keyspaces: Mapping[str, Keyspace], columns: Mapping[TableName, Columns] | None = None) -> None:
        object.__setattr__(self, "keyspaces", dict(keyspaces))
        object.__setattr__(self, "columns", dict(columns or {}))
        known: dict[TableName, Split] = {}
        for keyspace in keyspaces.values():
            for table in keyspace.reference_tables:
                known.setdefault(table, Split(table, keyspace, None))
            for table, column in keyspace.tables.items():
                known[table] = Split(table, keyspace, column)
        by_name: dict[str, list[Split]] = {}
        for split in known.values():
            by_name.setdefault(split.table.name, []).append(split)
        object.__setattr__(self, "_known", known)
        object.__setattr__(self, "_by_name", by_name)

    _known: Mapping[TableName, Split]
    _by_name: Mapping[str, Sequence[Split]]

    def find(self, schema: str | None, name: str) -> Split | None:
        """The table of a keyspace that the name means, or None."""
        if schema:
            return self._known.get(TableName(schema, name))
        there = self._by_name.get(name, ())
        if len(there) == 1:
            return there[0]
        return self._known.get(TableName("public", name))
