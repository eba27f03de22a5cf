"""Conditions become facts (see `contexts`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sqlglot import exp

from router.statements.actions import Origin
from router.statements.calls import calls_of
from router.statements.contexts import Context, Node, Terms
from router.statements.functions import AGGREGATES, SCALAR, WINDOW
from router.statements.levels import Leaf, Level, Query
from router.statements.parsing import Tree, Unplannable
from router.statements.scopes import Anchor, Output, Rows, Scope
from router.statements.statement import Statement
from router.statements.tables import Split
from router.statements.terms import INTEGER_TYPES, TermReader, type_name
from router.statements.trees import branches, can_push, conjuncts, is_aggregate, single, unwrapped
from shardmove.domain.keys import KeyType


class State:
    """What a walk has found so far, and the nodes it has made."""

    def __init__(self, statement: Statement, tree: Tree) -> None:
        self.statement = statement
        self.tables = statement.tables
        self.tree = tree
        self.terms = TermReader()
        self.leaves: list[Leaf] = []
        self.levels: list[Level] = []
        self.inside: list[Anchor] = []
        """Tables in expressions that no level has taken as its own yet."""
        self.queries: list[Query] = []
        self.assigned: list[tuple[str, Terms]] = []
        self.linked: list[tuple[Split, Node, Context]] = []
        """Rows that are given the keys of other rows."""
        self.unnamed: dict[int, tuple[str, ...]] = {}
        self.met: set[int] = set()
        self.refs: list[tuple[exp.Table, Split | None]] = []
        self.written: list[Split | None] = []
        self.names_home = False
        self.names_catalog = False
        self.obstacle: str | None = None
        self.locks_rows = False
        self.types: dict[Node, KeyType] = {}
        self.values: dict[Node, Terms] = {}
        self._nodes = 0
        calls = list(calls_of(statement))
        self.unknown_calls = {name for name in calls if name not in SCALAR and name not in AGGREGATES | WINDOW}
        aggregates = sum(name in AGGREGATES for name in calls)
        self.is_unsure = aggregates > sum(is_aggregate(node) for node in tree.root.find_all(exp.Func))
        self.calls = calls

    def node(self) -> Node:
        self._nodes += 1
        return self._nodes

    def constant(self, terms: Terms | None, facts: Context) -> Node | None:
        """A new node that is bound to the terms."""
        if not terms:
            return None
        node = self.node()
        self.values[node] = terms
        facts.constants.append((node, terms))
        return node

    def cast_node(self, inner: Node, expression: exp.Cast, facts: Context) -> Node | None:
        """A column cast: constants are cast with it; a key stays the same among types of its kind."""
        name = type_name(expression.args.get("to"))
        terms = self.values.get(inner)
        if terms is not None:
            return self.constant(tuple(replace(term, casts=(*term.casts, name)) for term in terms), facts)
        key_type = self.types.get(inner)
        is_same = key_type is not None and (
            name == str(key_type)
            or (name in INTEGER_TYPES and str(key_type) in INTEGER_TYPES)
            or (name == "varchar" and key_type is KeyType.TEXT)
        )
        return inner if is_same else None

    def comparable(self, one: Node, other: Node) -> bool:
        """Equality carries over only among types that compare as themselves."""
        types = self.types.get(one), self.types.get(other)
        if None in types or types[0] is types[1]:
            return True
        return all(str(type_) in INTEGER_TYPES for type_ in types)

    def relinked(self, rows: Rows, link: Context) -> Rows:
        """The rows with new nodes for their columns, so that what is said of them outside is not said inside."""
        fresh: dict[Node, Node] = {}

        def renewed(node: Node | None) -> Node | None:
            if node is None:
                return None
            if node not in fresh:
                fresh[node] = self.node()
                link.equal.append((fresh[node], node))
                if node in self.types:
                    self.types[fresh[node]] = self.types[node]
                if node in self.values:
                    self.values[fresh[node]] = self.values[node]
            return fresh[node]

        outputs = None if rows.outputs is None else [Output(o.name, renewed(o.node)) for o in rows.outputs]
        columns = {name: new for name, node in rows.columns.items() if (new := renewed(node)) is not None}
        return Rows(outputs, columns, rows.required, rows.others, link)


class Conditions(State):
    """Facts out of conditions, and the sub-selects in them."""

    def query(
        self,
        node: exp.Expr,
        scope: Scope,
        context: Context | None,
        *,
        is_top: bool = False,
        is_level: bool = True,
        is_result: bool = False,
    ) -> Rows:
        raise NotImplementedError

    def values_rows(self, node: exp.Values, scope: Scope, context: Context) -> Rows:
        raise NotImplementedError

    def facts(self, condition: exp.Expr, scope: Scope, context: Context) -> None:
        """Takes from a condition what holds wherever it is true, and walks its sub-selects."""
        for one in conjuncts(condition):
            if isinstance(one, exp.In) and self._in_query(one, scope, context):
                continue
            for node, terms in self._bindings(one, scope):
                context.constants.append((node, terms))
            for left, right in self._equalities(one, scope):
                context.equal.append((left, right))
            self.expression(one, scope, context)

    def _bindings(self, one: exp.Expr, scope: Scope) -> Iterator[tuple[Node, Terms]]:
        """Columns that a condition binds to constants."""
        match one:
            case exp.Paren():
                yield from self._bindings(one.this, scope)
            case exp.EQ() | exp.NullSafeEQ():
                for sides in ((one.this, one.expression), (one.expression, one.this)):
                    for node, terms in self._equal_constants(*sides, scope):
                        if isinstance(one, exp.EQ) or all(term.origin is Origin.LITERAL for term in terms):
                            yield node, terms  # IS NOT DISTINCT FROM NULL holds where an outer join left a row out
            case exp.In():
                yield from self._in_list(one, scope)
            case exp.Or():
                yield from self._in_every_branch(one, scope)

    def _equal_constants(self, column: exp.Expr, value: exp.Expr, scope: Scope) -> Iterator[tuple[Node, Terms]]:
        column, value = unwrapped(column), unwrapped(value)
        if isinstance(column, exp.Tuple) and isinstance(value, exp.Tuple):
            if len(column.expressions) == len(value.expressions):
                for one, other in zip(column.expressions, value.expressions, strict=True):
                    yield from self._equal_constants(one, other, scope)
            return
        node = scope.resolve(self._uncast(column, scope))
        if node is None:
            return
        terms = self.terms.array(value.this) if isinstance(value, exp.Any) else single(self.terms.term(value))
        if terms is not None:
            yield node, terms

    def _uncast(self, column: exp.Expr, scope: Scope) -> exp.Expr:
        """`t.id::bigint` is `t.id` as far as equality goes."""
        if type(column) is exp.Cast:
            inner = scope.resolve(unwrapped(column.this))
            if inner is not None and inner not in self.values and self.cast_node(inner, column, Context()) == inner:
                return unwrapped(column.this)
        return column

    def _in_list(self, one: exp.In, scope: Scope) -> Iterator[tuple[Node, Terms]]:
        if not one.expressions or any(one.args.get(name) for name in ("query", "unnest", "field", "is_global")):
            return
        column = unwrapped(one.this)
        values = one.expressions
        if len(values) == 1 and isinstance(values[0], exp.Values):
            values = [row.expressions[0] if len(row.expressions) == 1 else row for row in values[0].expressions]
        if isinstance(column, exp.Tuple):
            rows = [unwrapped(value) for value in values]
            if not all(isinstance(row, exp.Tuple) and len(row.expressions) == len(column.expressions) for row in rows):
                return
            for number, part in enumerate(column.expressions):
                yield from self._one_of(part, [row.expressions[number] for row in rows], scope)
            return
        yield from self._one_of(column, values, scope)

    def _one_of(self, column: exp.Expr, values: list[exp.Expr], scope: Scope) -> Iterator[tuple[Node, Terms]]:
        node = scope.resolve(self._uncast(unwrapped(column), scope))
        terms = self.terms.all_of(values) if node is not None else None
        if node is not None and terms is not None:
            yield node, terms

    def _in_every_branch(self, one: exp.Or, scope: Scope) -> Iterator[tuple[Node, Terms]]:
        bound = [dict(b for c in conjuncts(branch) for b in self._bindings(c, scope)) for branch in branches(one)]
        for node in bound[0]:
            if all(node in branch for branch in bound):
                yield node, tuple(term for branch in bound for term in branch[node])

    def _equalities(self, one: exp.Expr, scope: Scope) -> Iterator[tuple[Node, Node]]:
        one = unwrapped(one)
        if not isinstance(one, exp.EQ):
            return
        left, right = unwrapped(one.this), unwrapped(one.expression)
        pairs = [(left, right)]
        if isinstance(left, exp.Tuple) and isinstance(right, exp.Tuple):
            pairs = (
                list(zip(left.expressions, right.expressions, strict=False))
                if len(left.expressions) == len(right.expressions)
                else []
            )
        for a, b in pairs:
            nodes = scope.resolve(self._uncast(unwrapped(a), scope)), scope.resolve(self._uncast(unwrapped(b), scope))
            if nodes[0] is not None and nodes[1] is not None and self.comparable(nodes[0], nodes[1]):
                yield nodes[0], nodes[1]

    def _in_query(self, one: exp.In, scope: Scope, context: Context) -> bool:
        """`key IN (SELECT key …)`: the sub-select's rows of other keys do not matter."""
        query = one.args.get("query")
        column = scope.resolve(unwrapped(one.this))
        if query is None or column is None or not isinstance(query, exp.Subquery) or not can_push(query):
            return False
        self.expression(one.this, scope, context)
        inner = context.child()
        rows = self.query(query, scope, inner, is_level=False)
        self.note_inside(rows)
        output = rows.outputs[0].node if rows.outputs is not None and len(rows.outputs) == 1 else None
        if output is not None and self.comparable(column, output):
            context.equal.append((column, output))
            if rows.facts is not None:
                context.imported.append(rows.facts)
        return True

    def expression(self, node: Any, scope: Scope, context: Context) -> None:
        """Walks the sub-selects of an expression, wherever they are in it."""
        if not isinstance(node, exp.Expr):
            return
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if isinstance(one, (exp.Select, exp.SetOperation, exp.Subquery)):
                self.note_inside(self.query(one, scope, context, is_level=False))
                continue
            if isinstance(one, exp.Values):
                self.values_rows(one, scope, context)
                continue
            if isinstance(one, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
                raise Unplannable("the router cannot read a write in this place")
            waiting.extend(child for child in one.iter_expressions() if isinstance(child, exp.Expr))

    def note_inside(self, rows: Rows) -> None:
        """Tables in expressions have to be of the key of the row that the expression is computed for."""
        self.inside.extend([*rows.required, *rows.others])
