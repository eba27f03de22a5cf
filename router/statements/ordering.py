"""ORDER BY and LIMIT of a statement that several shards answer: how their answers are put together."""

from __future__ import annotations

from collections.abc import Sequence

from sqlglot import exp

from router.statements.actions import MergePlan, OrderColumn, Origin, Term
from router.statements.scopes import name_of
from router.statements.statement import Statement
from router.statements.terms import TermReader


def merge_plan(root: exp.Expr, terms: TermReader, statement: Statement) -> MergePlan | str:
    """The plan, or why there is none."""
    while isinstance(root, exp.Subquery):
        if any(root.args.get(name) for name in ("order", "limit", "offset")):
            return "it orders or limits a query in parentheses"
        root = root.this
    limit = _limit(root.args.get("limit"), terms)
    if isinstance(limit, str):
        return limit
    first = root
    while isinstance(first, exp.SetOperation):
        first = first.this
        while isinstance(first, exp.Subquery):
            first = first.this
    order = root.args.get("order")
    columns: list[OrderColumn] = []
    for ordered in order.expressions if order is not None else []:
        column = _column(ordered, first, statement, is_united=root is not first)
        if column is None:
            return "it is ordered by something else than a column of its result"
        columns.append(column)
    return MergePlan(tuple(columns), limit)


def _limit(limit: exp.Expr | None, terms: TermReader) -> Term | str | None:
    if limit is None:
        return None
    if isinstance(limit, exp.Fetch):
        options = limit.args.get("limit_options")
        if options is not None and (options.args.get("with_ties") or options.args.get("percent")):
            return "it has FETCH … WITH TIES"
        count = limit.args.get("count")
    else:
        count = limit.expression
    if isinstance(count, exp.Var) and count.name.upper() == "ALL":
        return None
    term = terms.term(count)
    if term is None or term.is_negative:
        return "its LIMIT is no constant"
    return None if term.origin is Origin.NULL else term


def _column(ordered: exp.Expr, first: exp.Expr, statement: Statement, *, is_united: bool) -> OrderColumn | None:
    if not isinstance(ordered, exp.Ordered) or ordered.args.get("with_fill"):
        return None
    by, is_c = ordered.this, False
    if isinstance(by, exp.Collate) and isinstance(by.expression, exp.Identifier):
        is_c = by.expression.name in ("C", "POSIX", "ucs_basic")
        if not is_c:
            return None
        by = by.this
    outputs: Sequence[exp.Expr] = first.expressions if isinstance(first, exp.Select) else []
    stars = [number for number, one in enumerate(outputs) if isinstance(one, exp.Star) or one.is_star]
    is_name = by is ordered.this  # with COLLATE it is an expression, which cannot name outputs
    position = _position(by, first, outputs, statement, may_be_name=is_name, may_be_expression=not is_united)
    name = ""
    if position is None or (stars and position > stars[0]):
        if not (stars and _is_only_table(first) and isinstance(by, exp.Column)):
            return None
        name, position = name_of(by.this), None
    is_descending = bool(ordered.args.get("desc"))
    nulls_first = ordered.args.get("nulls_first")
    return OrderColumn(position, name, is_descending, is_descending if nulls_first is None else bool(nulls_first), is_c)


def _position(
    by: exp.Expr,
    first: exp.Expr,
    outputs: Sequence[exp.Expr],
    statement: Statement,
    *,
    may_be_name: bool,
    may_be_expression: bool,
) -> int | None:
    if isinstance(by, exp.Literal):
        statement.note_literal()
        text = statement.literals[int(by.this)].text
        return int(text) - 1 if not by.is_string and text.isdigit() and 0 < int(text) <= len(outputs) else None
    if may_be_name and isinstance(by, exp.Column) and not by.args.get("table"):
        name = name_of(by.this)
        named = [n for n, one in enumerate(outputs) if _name(one) == name]
        if named:
            return named[0] if len(named) == 1 else None
    if not may_be_expression:
        return None
    for number, one in enumerate(outputs):
        bare = one.this if isinstance(one, exp.Alias) else one
        if bare == by or (_is_only_table(first) and _same_column(bare, by)):
            return number
    return None


def _name(one: exp.Expr) -> str | None:
    if isinstance(one, exp.Alias):
        return name_of(one.args["alias"])
    if isinstance(one, exp.Column) and isinstance(one.this, exp.Identifier):
        return name_of(one.this)
    return None


def _same_column(one: exp.Expr, other: exp.Expr) -> bool:
    return (
        isinstance(one, exp.Column)
        and isinstance(other, exp.Column)
        and isinstance(one.this, exp.Identifier)
        and isinstance(other.this, exp.Identifier)
        and name_of(one.this) == name_of(other.this)
    )


def _is_only_table(first: exp.Expr) -> bool:
    return isinstance(first, exp.Select) and first.args.get("from_") is not None and not first.args.get("joins")
