"""What can be told of sqlglot's trees by looking at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlglot import exp

from router.statements.contexts import Node, Terms
from router.statements.functions import AGGREGATES, SCALAR
from router.statements.scopes import Output, Scope, name_of
from router.statements.statement import Statement
from router.statements.terms import parameter_of


def is_aggregate(node: exp.Expr) -> bool:
    if isinstance(node, exp.AggFunc):
        return True
    name = node.name if isinstance(node, exp.Anonymous) else ""
    return name.lower() in AGGREGATES or type(node).__name__ in ("JSONArrayAgg", "JSONObjectAgg", "JSONBObjectAgg")


def is_of_outer(node: exp.Expr, scope: Scope) -> bool:
    """An aggregate over nothing but an outer query's columns is that query's."""
    names = {ref.name for ref in scope.refs}
    columns = [one.args.get("table") for one in node.find_all(exp.Column) if parameter_of(one) is None]
    return bool(columns) and all(not names if table is None else name_of(table) not in names for table in columns)


def in_window(node: exp.Expr) -> bool:
    parent = node.parent
    while isinstance(parent, (exp.Filter, exp.WithinGroup, exp.IgnoreNulls, exp.RespectNulls)):
        parent = parent.parent
    return isinstance(parent, exp.Window)


def own_expressions(node: exp.Select) -> Iterator[exp.Expr]:
    for name in ("expressions", "having", "order", "distinct", "group"):
        value = node.args.get(name)
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, exp.Expr))


def own_nodes(node: exp.Expr) -> Iterator[exp.Expr]:
    """The nodes of an expression without those of its sub-selects."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        if not isinstance(one, exp.Query):
            waiting.extend(child for child in one.iter_expressions() if isinstance(child, exp.Expr))


def can_push(node: exp.Expr) -> bool:
    """Whether a query's rows are its tables' rows one by one, so that conditions on them are conditions on those."""
    if isinstance(node, exp.Subquery):
        return not has_tail(node) and can_push(node.this)
    if not isinstance(node, exp.Select):
        return False
    if any(node.args.get(name) for name in ("group", "having", "limit", "offset", "windows")):
        return False
    distinct = node.args.get("distinct")
    if distinct is not None and distinct.args.get("on") is not None:
        return False
    own = (n for one in own_expressions(node) for n in own_nodes(one))
    return not any(isinstance(n, exp.Window) or is_aggregate(n) or is_unknown(n) for n in own)


def has_row_of_none(node: exp.Select, scope: Scope) -> bool:
    """Whether it may have a row where WHERE holds for none: an aggregate without groups, or with the empty one."""
    if node.args.get("group") is None and any(_is_own_column(bare(one), scope) for one in node.expressions):
        return False  # each of its rows is a row of FROM, or PostgreSQL refuses it
    group = node.args.get("group")
    if group is not None:
        return any(value for name, value in group.args.items() if name != "expressions") or any(
            isinstance(one, (exp.Rollup, exp.Cube, exp.GroupingSets))
            or (isinstance(one, exp.Tuple) and not one.expressions)
            for one in group.expressions
        )
    own = (n for one in own_expressions(node) for n in own_nodes(one))
    return node.args.get("having") is not None or any(
        (is_aggregate(n) or is_unknown(n)) and not in_window(n) for n in own
    )


def _is_own_column(one: exp.Expr, scope: Scope) -> bool:
    """A column of one of the tables here, or all of them; False where that is not certain."""
    if not isinstance(one, (exp.Column, exp.Star)):
        return False
    table = one.args.get("table")
    refs = [ref for ref in scope.refs if table is None or ref.name == name_of(table)]
    if one.is_star:
        return any(ref.columns for ref in refs)
    return bool(refs) if table is not None else any(name_of(one.this) in ref.columns for ref in refs)


def is_cut_unordered(root: exp.Expr) -> bool:
    """LIMIT of the whole statement, of rows in the order that a sub-select gave them."""
    while isinstance(root, exp.Subquery) and not has_tail(root):
        root = root.this
    return root.args.get("limit") is not None and root.args.get("order") is None


def is_unknown(node: exp.Expr) -> bool:
    """A function of which nothing is known may be an aggregate."""
    return isinstance(node, exp.Anonymous) and node.name.lower() not in SCALAR


def has_tail(node: exp.Expr) -> bool:
    return any(
        node.args.get(name)
        for name in ("with_", "where", "order", "limit", "offset", "joins", "locks", "sample", "pivots")
    )


def columns_of(outputs: Sequence[Output] | None) -> dict[str, Node]:
    """Names that are there once."""
    names = [output.name for output in outputs or ()]
    return {
        output.name: output.node
        for output in outputs or ()
        if output.name is not None and output.node is not None and names.count(output.name) == 1
    }


def conjuncts(node: exp.Expr) -> Iterator[exp.Expr]:
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, exp.And):
            waiting.extend((one.expression, one.this))
        elif isinstance(one, exp.Paren):
            waiting.append(one.this)
        else:
            yield one


def branches(node: exp.Expr) -> Iterator[exp.Expr]:
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, exp.Or):
            waiting.extend((one.expression, one.this))
        elif isinstance(one, exp.Paren) and isinstance(one.this, exp.Or):
            waiting.append(one.this)
        else:
            yield one


def unwrapped(node: exp.Expr) -> exp.Expr:
    while isinstance(node, exp.Paren):
        node = node.this
    return node


def bare(node: exp.Expr) -> exp.Expr:
    return unwrapped(node.this if isinstance(node, exp.Alias) else node)


def flat(node: exp.Expr) -> list[exp.Expr]:
    """The parts of a row."""
    if isinstance(node, exp.Tuple):
        return list(node.expressions)
    return [unwrapped(node)]


def single(term: Any) -> Terms | None:
    return None if term is None else (term,)


def alias_of(node: exp.Expr) -> str | None:
    alias = node.args.get("alias")
    if isinstance(alias, exp.TableAlias) and alias.this is not None:
        return name_of(alias.this)
    return None


def output_name(node: exp.Expr) -> str | None:
    if isinstance(node, exp.Alias):
        return name_of(node.args["alias"])
    if isinstance(node, exp.Column) and parameter_of(node) is None and isinstance(node.this, exp.Identifier):
        return name_of(node.this)
    if type(node) is exp.Cast and isinstance(node.this, exp.Column):
        return output_name(node.this)
    return None


def is_arm(arm: exp.Expr, is_top: bool) -> bool:
    return is_top and isinstance(arm, exp.SetOperation)


def names_query(node: exp.Expr, name: str) -> bool:
    return any(
        isinstance(table.this, exp.Identifier) and not table.args.get("db") and name_of(table.this) == name
        for table in node.find_all(exp.Table)
    )


def snapshot(scope: Scope) -> Scope:
    """A query of WITH sees those before it."""
    seen = Scope(scope.parent)
    seen.queries = dict(scope.queries)
    return seen


def parameter_counts(statement: Statement) -> dict[int, int]:
    counts: dict[int, int] = {}
    for token in statement.tokens:
        if token.kind == "parameter":
            number = int(token.text[1:])
            counts[number] = counts.get(number, 0) + 1
    return counts
