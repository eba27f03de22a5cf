"""What a walk finds in a statement: references of split tables, and what each SELECT makes of their rows."""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from router.statements.contexts import Closure, Context, Node
from router.statements.scopes import Anchor, Rows, Scope
from router.statements.tables import Split


@dataclass
class Leaf:
    """A reference of a split table."""

    split: Split
    anchor: Anchor


@dataclass
class Level:
    """A SELECT whose own rows are the result, or part of it: what has to hold for a plain union of shards."""

    rows: Rows
    context: Context
    obstacle: str | None = None
    groups: list[list[Node | None]] | None = None
    """Each of these lists has to hold the key: GROUP BY, DISTINCT, PARTITION BY."""
    is_result: bool = False
    """Its rows are the statement's own: rows that every shard has alike would come several times."""


@dataclass
class Query:
    """A query of WITH: walked anew wherever it is named, unless it writes or recurs."""

    body: exp.Expr
    scope: Scope
    columns: list[str]
    rows: Rows | None = None
    is_used: bool = False


def level_obstacle(level: Level) -> str | None:
    if level.obstacle is not None:
        return level.obstacle
    required, others = level.rows.required, level.rows.others
    if not required and not others and not level.is_result:
        return None
    if not required:
        return "its rows are not all rows of a split table"
    closure = Closure(level.context)
    main = required[0].node
    for anchor in required[1:]:
        if not closure.same(anchor.node, main) and not Closure(anchor.context).same(anchor.node, main):
            return "it joins split tables by something else than their keys"
    for anchor in others:
        if not Closure(anchor.context).same(anchor.node, main):
            return "it joins split tables by something else than their keys"
    for group in level.groups or []:
        if not any(node is not None and closure.same(node, main) for node in group):
            return "it groups rows of different keys"
    return None
