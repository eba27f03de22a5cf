"""Tables of keyspaces, by their names alone: for statements that are not walked."""

from __future__ import annotations

from router.statements.statement import Statement
from router.statements.tables import Split


def named_tables(statement: Statement) -> list[Split]:
    """Tables of keyspaces whose names stand anywhere in the statement."""
    found: dict[object, Split] = {}
    for position, token in enumerate(statement.tokens):
        if token.kind not in ("word", "identifier"):
            continue
        schema = None
        if position > 1 and statement.token(position - 1).text == ".":
            schema = statement.token(position - 2).name
        split = statement.tables.find(schema, token.name) or statement.tables.find(None, token.name)
        if split is not None:
            found[split.table] = split
    return list(found.values())
