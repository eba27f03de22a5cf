"""SELECT, VALUES, set operations and WITH."""

from __future__ import annotations

from typing import Final

from sqlglot import exp

from router.statements.conditions import Conditions
from router.statements.contexts import Closure, Context, Node, Terms
from router.statements.froms import From
from router.statements.levels import Leaf, Level, Query
from router.statements.parsing import Unplannable
from router.statements.scopes import Anchor, Output, Ref, Rows, Scope, name_of
from router.statements.tables import Split
from router.statements.trees import (
    alias_of,
    bare,
    columns_of,
    flat,
    has_row_of_none,
    in_window,
    is_aggregate,
    is_arm,
    is_cut_unordered,
    is_of_outer,
    names_query,
    output_name,
    own_expressions,
    own_nodes,
    single,
    snapshot,
    unwrapped,
)

_SELECT_ARGS: Final = frozenset(
    """
    kind expressions from_ joins laterals where group having order limit offset distinct windows locks with_
    into hint operation_modifiers
    """.split()  # noqa: SIM905
)

REFERENCES_MAX: Final = 300
"""Of tables in one statement: a query of WITH counts as often as it is named."""


class Reading(Conditions):
    """Queries: what they read, what their columns are, and what a plain union of several shards' answers needs."""

    def write(self, node: exp.Expr, scope: Scope) -> Rows:
        raise NotImplementedError

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
        """Walks a query. `context`: the one it stands in; None: nothing outside restricts its rows."""
        match node:
            case exp.Select():
                return self.select(node, scope, context, is_level=is_level, is_top=is_top, is_result=is_result)
            case exp.SetOperation():
                return self.set_operation(node, scope, context, is_top=is_top, is_result=is_result)
            case exp.Subquery():
                return self._subquery(node, scope, context, is_top=is_top, is_level=is_level, is_result=is_result)
            case exp.Values():
                if is_result:
                    self.obstacle = self.obstacle or "it has VALUES"
                return self.values_rows(node, scope, context or Context())
            case _:
                raise Unplannable("the router cannot read a part of the statement")

    def _subquery(
        self,
        node: exp.Subquery,
        scope: Scope,
        context: Context | None,
        *,
        is_top: bool,
        is_level: bool,
        is_result: bool,
    ) -> Rows:
        inner = node.this
        if isinstance(inner, exp.Table):
            raise Unplannable("the router cannot read a table in parentheses there")
        tails = [
            node.args.get(name) for name in ("with_", "where", "order", "limit", "offset", "joins", "locks", "sample")
        ]
        if any(tails):
            inner_scope = Scope(scope)
            self.with_queries(node, inner_scope)
            self.obstacle = self.obstacle or "it orders or limits a query in parentheses"
            self.locks(node)
            for tail in ("where", "joins", "sample"):
                if node.args.get(tail):
                    raise Unplannable("the router cannot read a query in parentheses with more behind it")
            for tail in ("order", "limit", "offset"):
                self.expression(node.args.get(tail), inner_scope, Context())
            return self.query(inner, inner_scope, context, is_level=is_level)
        return self.query(inner, scope, context, is_top=is_top, is_level=is_level, is_result=is_result)

    def select(
        self,
        node: exp.Select,
        outer: Scope | None,
        context: Context | None,
        *,
        is_level: bool,
        is_top: bool,
        is_result: bool,
    ) -> Rows:
        scope = Scope(outer)
        self.with_queries(node, scope)
        if node.args.get("into") is not None:
            raise Unplannable("SELECT INTO is not supported", "create the table, then INSERT … SELECT")
        self._require_known_args(node)
        where = Context(context, is_root=True)
        marks = len(self.inside)
        from_ = From(self, scope, where)
        from_.walk(node)
        condition = node.args.get("where")
        if condition is not None:
            self.facts(condition.this, scope, where)
        self._expressions_of(node, scope, from_.group)
        self.locks(node)
        facts = Context() if self.is_unsure or has_row_of_none(node, scope) else from_.group
        outputs, columns = self.outputs_of(node, scope, facts)
        inside = self.inside[marks:]
        del self.inside[marks:]
        rows = Rows(outputs, columns, from_.required, from_.others + inside, facts)
        if is_level:
            self.levels.append(self._level(node, scope, rows, from_, is_top=is_top, is_result=is_result))
        return rows

    def _require_known_args(self, node: exp.Select) -> None:
        for name, value in node.args.items():
            if value and name not in _SELECT_ARGS:
                raise Unplannable(f"the router cannot read {name.strip('_').upper()} in the statement")

    def _expressions_of(self, node: exp.Select, scope: Scope, context: Context) -> None:
        """Sub-selects in everything but FROM and WHERE."""
        self.is_unsure = self.is_unsure or any(
            is_aggregate(n) and is_of_outer(n, scope) for one in own_expressions(node) for n in own_nodes(one)
        )
        for name in ("expressions", "group", "having", "order", "limit", "offset", "distinct", "windows"):
            value = node.args.get(name)
            for one in value if isinstance(value, list) else [value]:
                self.expression(one, scope, context)

    def _level(
        self, node: exp.Select, scope: Scope, rows: Rows, from_: From, *, is_top: bool, is_result: bool
    ) -> Level:
        level = Level(rows, from_.group, from_.obstacle, [], is_result=is_result)
        assert level.groups is not None
        group = node.args.get("group")
        own = [n for one in own_expressions(node) for n in own_nodes(one)]
        if group is not None:
            if any(value for name, value in group.args.items() if name != "expressions") or any(
                isinstance(one, (exp.Rollup, exp.Cube, exp.GroupingSets)) for one in group.expressions
            ):
                level.obstacle = level.obstacle or "it groups by several sets"
            level.groups.append([self._grouped(one, node, scope) for one in group.expressions])
        elif node.args.get("having") is not None or any(is_aggregate(n) for n in own if not in_window(n)):
            level.groups.append([])
        for window in (n for n in own if isinstance(n, exp.Window)):
            level.groups.append([scope.resolve(one) for one in window.args.get("partition_by") or []])
        if node.args.get("windows"):
            level.groups.append([])
        distinct = node.args.get("distinct")
        if distinct is not None:
            on = distinct.args.get("on")
            if on is not None:
                level.groups.append([self._distinct_on(one, node, scope) for one in flat(on)])
            else:
                level.groups.append([scope.resolve(bare(one)) for one in node.expressions])
        if node.args.get("offset") is not None:
            level.obstacle = level.obstacle or "it has OFFSET"
        if node.args.get("limit") is not None and not is_top:
            level.obstacle = level.obstacle or "it has LIMIT in a part of it"
        if node.args.get("order") is not None and not is_top and is_cut_unordered(self.tree.root):
            level.obstacle = level.obstacle or "it has LIMIT outside of ORDER BY"
        return level

    def _distinct_on(self, one: exp.Expr, node: exp.Select, scope: Scope) -> Node | None:
        """DISTINCT ON (name) means the output of that name before a column."""
        if not isinstance(one, exp.Column) or one.args.get("table"):
            return scope.resolve(one)
        outputs = [e for e in node.expressions if not e.is_star]
        named = [e for e in outputs if output_name(e) == name_of(one.this)]
        if named:
            return scope.resolve(bare(named[0])) if len(named) == 1 else None
        has_unknown = any(output_name(e) is None for e in outputs)
        has_unknown = has_unknown or (len(outputs) < len(node.expressions) and len(scope.refs) > 1)
        return None if has_unknown else scope.resolve(one)

    def _grouped(self, one: exp.Expr, node: exp.Select, scope: Scope) -> Node | None:
        """GROUP BY 2 means the second output."""
        if isinstance(one, exp.Literal):
            literal = self.statement.literals[int(one.this)]
            self.statement.note_literal()
            position = int(literal.text) - 1 if literal.text.isdigit() else -1
            if any(isinstance(bare(e), exp.Star) or e.is_star for e in node.expressions) or not 0 <= position < len(
                node.expressions
            ):
                return None
            return scope.resolve(bare(node.expressions[position]))
        found = scope.resolve(one)
        if found is None and isinstance(one, exp.Column) and not one.args.get("table"):
            named = [
                e
                for e in node.expressions
                if isinstance(e, exp.Alias) and name_of(e.args["alias"]) == name_of(one.this)
            ]
            return scope.resolve(bare(named[0])) if len(named) == 1 else None
        return found

    def set_operation(
        self, node: exp.SetOperation, outer: Scope | None, context: Context | None, *, is_top: bool, is_result: bool
    ) -> Rows:
        scope = Scope(outer)
        self.with_queries(node, scope)
        self.locks(node)
        for name in ("order", "limit", "offset"):
            self.expression(node.args.get(name), scope, Context())
        if not is_top or not isinstance(node, exp.Union) or node.args.get("distinct") is not False:
            self.obstacle = self.obstacle or "it has UNION, INTERSECT or EXCEPT"
        if node.args.get("offset") is not None:
            self.obstacle = self.obstacle or "it has OFFSET"
        arms = [
            self.query(unwrapped(arm), scope, context, is_top=is_arm(arm, is_top), is_result=is_result)
            for arm in (node.this, node.expression)
        ]
        return self._united(arms)

    def _united(self, arms: list[Rows]) -> Rows:
        """A column is bound to what it is bound to in one arm or the other."""
        link = Context()
        outputs: list[Output] | None = None
        first, second = arms
        if first.outputs is not None and second.outputs is not None and len(first.outputs) == len(second.outputs):
            outputs = []
            closures = [Closure(arm.facts) if arm.facts is not None else None for arm in arms]
            for one, other in zip(first.outputs, second.outputs, strict=True):
                terms: Terms | None = ()
                for output, closure in ((one, closures[0]), (other, closures[1])):
                    found = closure.terms(output.node) if closure is not None and output.node is not None else None
                    terms = None if terms is None or found is None else terms + found
                node = None
                if terms is not None:
                    node = self.node()
                    link.constants.append((node, terms))
                outputs.append(Output(one.name, node))
        anchors = [anchor for arm in arms for anchor in (*arm.required, *arm.others)]
        return Rows(outputs, columns_of(outputs), [], anchors, link)

    def values_rows(self, node: exp.Values, scope: Scope, context: Context) -> Rows:
        """VALUES: a column of constants is bound to them."""
        rows = [flat(row) for row in node.expressions]
        for row in rows:
            for one in row:
                self.expression(one, scope, context)
        facts = Context()
        outputs: list[Output] = []
        for number in range(len(rows[0]) if rows else 0):
            terms = self.terms.all_of([row[number] for row in rows]) if all(len(row) > number for row in rows) else None
            outputs.append(Output(f"column{number + 1}", self.constant(terms, facts)))
        return Rows(outputs, columns_of(outputs), facts=facts)

    # What a query gives

    def outputs_of(self, node: exp.Select, scope: Scope, facts: Context) -> tuple[list[Output] | None, dict[str, Node]]:
        outputs: list[Output] | None = []
        columns: dict[str, Node] = {}
        doubles: set[str] = set()
        for one in node.expressions:
            if isinstance(one, exp.Star) or one.is_star:
                given, named = self._star(one, scope)
            else:
                given = [Output(output_name(one), self._output_node(one, scope, facts))]
                named = columns_of(given)
                doubles |= {output.name for output in given if output.name is not None and output.name in columns}
            outputs = None if outputs is None or given is None else outputs + given
            doubles |= columns.keys() & named.keys()
            columns |= named
        return outputs, {name: found for name, found in columns.items() if name not in doubles}

    def _star(self, one: exp.Expr, scope: Scope) -> tuple[list[Output] | None, dict[str, Node]]:
        refs = scope.refs
        if isinstance(one, exp.Column):
            table = one.args.get("table")
            refs = [ref for ref in refs if table is not None and ref.name == name_of(table)]
        outputs: list[Output] | None = None
        if len(refs) == 1 and refs[0].outputs is not None:
            outputs = list(refs[0].outputs)
        columns: dict[str, Node] = {}
        seen: set[str] = set()
        for ref in refs:
            seen |= columns.keys() & ref.columns.keys()
            columns |= ref.columns
        if scope.merged or scope.is_merged_unknown:
            return None, {}
        if isinstance(one, exp.Star) and (one.args.get("except_") or one.args.get("replace") or one.args.get("rename")):
            return None, {}
        return outputs, {name: node for name, node in columns.items() if name not in seen}

    def _output_node(self, one: exp.Expr, scope: Scope, facts: Context) -> Node | None:
        expression = bare(one)
        found = scope.resolve(expression)
        if found is not None:
            return found
        if type(expression) is exp.Cast:
            inner = scope.resolve(bare(expression.this))
            if inner is not None:
                return self.cast_node(inner, expression, facts)
        return self.constant(single(self.terms.term(expression)), facts)

    # WITH

    def with_queries(self, node: exp.Expr, scope: Scope) -> None:
        with_ = node.args.get("with_")
        if with_ is None:
            return
        queries: list[Query] = []
        for cte in with_.expressions:
            alias = cte.args["alias"]
            query = Query(cte.this, scope, [name_of(column) for column in alias.args.get("columns") or []])
            name = name_of(alias.this)
            if any(cte.args.get(option) for option in ("search", "cycle", "key_expressions")):
                raise Unplannable("the router cannot read SEARCH and CYCLE")
            if with_.args.get("recursive") and names_query(cte.this, name):
                query.rows = self.recursive(cte.this, name, query.columns, scope)
            elif isinstance(cte.this, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
                query.rows = self.write(cte.this, scope)
            else:
                query.scope = snapshot(scope)
            scope.queries[name] = query
            queries.append(query)
        self.queries.extend(queries)

    def recursive(self, body: exp.Expr, name: str, columns: list[str], scope: Scope) -> Rows:
        """A recursive query: a column is bound by the first arm if the second hands it on as it is."""
        if not isinstance(body, exp.Union):
            raise Unplannable("the router cannot read this recursive query")
        self.obstacle = self.obstacle or "it is recursive"
        base = self.query(unwrapped(body.this), scope, None, is_level=False)
        self.note_inside(base)
        names = [o.name for o in base.outputs or []]
        names[: len(columns)] = columns[: len(names)] if base.outputs is not None else []
        kept = {number for number, output in enumerate(base.outputs or []) if output.node is not None}
        marks = len(self.leaves), len(self.linked)
        while True:
            del self.leaves[marks[0] :], self.linked[marks[1] :]
            outputs = [Output(names[n], o.node if n in kept else None) for n, o in enumerate(base.outputs or [])]
            rows = Rows(outputs if base.outputs is not None else None, columns_of(outputs), facts=base.facts)
            inner = Scope(scope)
            inner.queries[name] = Query(body, scope, [], rows)
            again = self.query(unwrapped(body.expression), inner, None, is_level=False)
            closure = Closure(again.facts) if again.facts is not None else None
            handed = {
                number
                for number in kept
                if closure is not None and again.outputs is not None and number < len(again.outputs)
                and (found := again.outputs[number].node) is not None
                and (start := outputs[number].node) is not None and closure.same(found, start)
            }  # fmt: skip
            if handed == kept:
                self.note_inside(again)
                return rows
            kept = handed

    # Tables

    def find(self, table: exp.Table) -> Split | None:
        if table.args.get("catalog") is not None:
            raise Unplannable("a table of another database is named")
        schema = table.args.get("db")
        return self.tables.find(None if schema is None else name_of(schema), name_of(table.this))

    def table_ref(self, table: exp.Table, split: Split | None, context: Context) -> Ref:
        self.met.add(id(table))
        alias = alias_of(table)
        name = alias or name_of(table.this)
        if split is None or split.column is None:
            return Ref(name, {}, None, split, alias is not None)
        self.refs.append((table, split))
        node = self.node()
        self.types[node] = split.key_type
        self.leaves.append(Leaf(split, Anchor(context, node)))
        if len(self.leaves) > REFERENCES_MAX:
            raise Unplannable("the statement names too many tables for the router", sqlstate="54001")
        renamed = table.args.get("alias") is not None and bool(table.args["alias"].args.get("columns"))
        return Ref(name, {} if renamed else {split.column: node}, None, split, alias is not None)

    def locks(self, node: exp.Expr) -> None:
        for lock in node.args.get("locks") or []:
            self.locks_rows = True
            for table in lock.expressions:
                self.met.add(id(table))
