"""Where in its text a statement names split tables, so that a predicate can be put there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlglot import exp

from router.statements.actions import Place
from router.statements.parsing import Tree
from router.statements.scopes import name_of
from router.statements.statement import Statement
from router.statements.tables import Split


def places_of(
    statement: Statement, tree: Tree, refs: Sequence[tuple[exp.Table, Split | None]]
) -> tuple[Place, ...] | None:
    """None where one of them cannot be replaced by a sub-select: its columns are named by schema, or it is sampled."""
    if any(column.args.get("db") is not None for column in tree.root.find_all(exp.Column)):
        return None
    places: dict[int, Place] = {}
    for table, split in refs:
        if split is None or split.column is None:
            continue
        place = _place(statement, tree, table, split)
        if place is None:
            return None
        places[place.start] = place
    return tuple(places[start] for start in sorted(places))


def token_of(tree: Tree, identifier: Any) -> int | None:
    """The number of its token in the statement."""
    start = identifier.meta.get("start") if isinstance(identifier, exp.Identifier) else None
    return None if start is None else tree.token_at.get(start)


def _place(statement: Statement, tree: Tree, table: exp.Table, split: Split) -> Place | None:
    last = token_of(tree, table.this)
    schema = table.args.get("db")
    first = last if schema is None else token_of(tree, schema)
    if first is None or last is None or table.args.get("sample") is not None:
        return None
    if statement.token(last).name != name_of(table.this):
        return None
    if first > 0 and statement.word(first - 1) == "ONLY":
        first -= 1
    if statement.token(last + 1).text == "*":
        last += 1
    alias = table.args.get("alias")
    if statement.word(first - 1) == "TABLE" or (alias is not None and alias.args.get("columns") and alias.this is None):
        return None
    assert split.column is not None
    return Place(
        start=statement.first + first,
        end=statement.first + last + 1,
        alias=statement.token(last).text,
        has_alias=alias is not None and alias.this is not None,
        keyspace=split.keyspace.name,
        column=split.column,
        key_type=split.key_type,
        scheme=split.scheme,
    )
