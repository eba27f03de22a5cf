"""Tables of keyspaces, by their names alone: for statements that are not walked."""

from __future__ import annotations

from typing import NamedTuple

from router.statements.statement import Statement
from router.statements.tables import Split
from shardmove.domain.moves import TableName


class Named(NamedTuple):
    """Tables of keyspaces whose names stand anywhere in a statement, and the keyspaces of the split ones."""

    tables: tuple[TableName, ...]
    keyspaces: tuple[str, ...]


def named_in(statement: Statement) -> Named:
    found: dict[TableName, Split] = {}
    for position, token in enumerate(statement.tokens):
        if token.kind not in ("word", "identifier"):
            continue
        schema = None
        if position > 1 and statement.token(position - 1).text == ".":
            schema = statement.token(position - 2).name
        split = statement.tables.find(schema, token.name) or statement.tables.find(None, token.name)
        if split is not None:
            found[split.table] = split
    keyspaces = dict.fromkeys(split.keyspace.name for split in found.values() if split.column is not None)
    return Named(tuple(found), tuple(keyspaces))
