"""FROM: tables, joins, sub-selects, and in which context each stands (see `contexts`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlglot import exp

from router.statements.catalogs import is_catalog
from router.statements.contexts import Context, Node
from router.statements.levels import Query
from router.statements.parsing import Unplannable
from router.statements.scopes import Anchor, Output, Ref, Rows, Scope, name_of
from router.statements.trees import alias_of, can_push, columns_of, has_tail

if TYPE_CHECKING:
    from router.statements.reading import Reading


class From:
    """The tables of one FROM: `group` is the context of the rows that no outer join can leave out."""

    def __init__(self, walk: Reading, scope: Scope, where: Context) -> None:
        self.walk_ = walk
        self.scope = scope
        self.where = where
        self.group = where.child()
        self.required: list[Anchor] = []
        self.others: list[Anchor] = []
        self.obstacle: str | None = None
        self.hidden = 0

    def walk(self, node: exp.Select) -> None:
        from_ = node.args.get("from_")
        if from_ is not None:
            self.walk_items([from_.this])
        self._joins(node.args.get("joins") or [])
        if node.args.get("laterals"):
            raise Unplannable("the router cannot read LATERAL VIEW")

    def walk_items(self, items: Sequence[exp.Expr]) -> None:
        for item in items:
            anchors = self._item(item, self.group)
            self.required.extend(anchors)
            self._joins(item.args.get("joins") or [] if isinstance(item, exp.Table) else [])
            self.comma()
        self.hidden = 0

    def comma(self) -> None:
        """Conditions of joins that follow cannot name what stands before; LATERAL can."""
        self.hidden = len(self.scope.refs)

    def _joins(self, joins: Sequence[exp.Join]) -> None:
        for join in joins:
            self.join(join)

    def join(self, join: exp.Join) -> None:
        side = (join.args.get("side") or "").upper()
        kind = (join.args.get("kind") or "").upper()
        method = (join.args.get("method") or "").upper()
        if (
            kind not in ("", "INNER", "CROSS", "OUTER")
            or method not in ("", "NATURAL")
            or join.args.get("match_condition")
        ):
            raise Unplannable(f"the router cannot read {method or kind} JOIN")
        on, using = join.args.get("on"), join.args.get("using") or []
        if not side and not method and on is None and not using and kind != "CROSS":
            self.comma()
        if join.this.args.get("joins"):
            raise Unplannable("the router cannot read a join within a join")
        {"": self._inner, "LEFT": self._left, "RIGHT": self._right, "FULL": self._full}[side](join, on)
        if method == "NATURAL":
            self.scope.is_merged_unknown = self.scope.is_merged_unknown or bool(side)
        if side:
            self.scope.merged |= {name_of(one) for one in using}

    def _inner(self, join: exp.Join, on: exp.Expr | None) -> None:
        self.required.extend(self._joined(join, self.group))
        self._condition(join, on, self.group)

    def _left(self, join: exp.Join, on: exp.Expr | None) -> None:
        context = self.group.child()
        self.others.extend(self._joined(join, context))
        self._condition(join, on, context)

    def _right(self, join: exp.Join, on: exp.Expr | None) -> None:
        """What came before may be left out now; its own conditions stay its own."""
        before, self.group = self.group, self.where.child()
        between = self.group.child()
        before.parent = between
        self.others.extend(self.required)
        self.required = self._joined(join, self.group)
        self._condition(join, on, between)

    def _full(self, join: exp.Join, on: exp.Expr | None) -> None:
        before, self.group = self.group, self.where.child()
        before.parent = self.group
        self.others.extend(self.required)
        self.required = []
        self.others.extend(self._joined(join, self.group.child()))
        self.obstacle = self.obstacle or "it has a FULL JOIN"
        self._condition(join, on, Context(self.group))

    def _joined(self, join: exp.Join, context: Context) -> list[Anchor]:
        self._using_left = self._using_nodes(join)
        return self._item(join.this, context)

    def _using_nodes(self, join: exp.Join) -> dict[str, Node]:
        """The columns of USING on the left side, as far as they are certain."""
        nodes: dict[str, Node] = {}
        hidden = self.hidden
        for one in join.args.get("using") or []:
            name = name_of(one)
            found = [ref for ref in self.scope.refs[hidden:] if name in ref.columns]
            first = self.scope.refs[hidden:][:1]
            if found and (name not in self.scope.merged or found[:1] == first):
                nodes[name] = found[0].columns[name]
        return nodes

    def _condition(self, join: exp.Join, on: exp.Expr | None, context: Context) -> None:
        if on is not None:
            self.scope.hidden = self.hidden
            self.walk_.facts(on, self.scope, context)
            self.scope.hidden = 0
        if not self.scope.refs:
            return
        right = self.scope.refs[-1]
        for one in join.args.get("using") or []:
            name = name_of(one)
            left_node, right_node = self._using_left.get(name), right.columns.get(name)
            if left_node is not None and right_node is not None and self.walk_.comparable(left_node, right_node):
                context.equal.append((left_node, right_node))

    def _item(self, item: exp.Expr, context: Context) -> list[Anchor]:
        """One thing in FROM, which becomes a name in the scope. Returns the split tables that its rows are of."""
        match item:
            case exp.Table() if isinstance(item.this, exp.Identifier):
                return self._table(item, context)
            case exp.Subquery() if isinstance(item.this, exp.Table):
                return self._parenthesised(item, context)
            case exp.Subquery():
                return self._derived(item, item.this if not has_tail(item) else item, context, is_lateral=False)
            case exp.Lateral() if isinstance(item.this, exp.Subquery):
                return self._derived(item, item.this, context, is_lateral=True)
            case exp.Values():
                rows = self.walk_.values_rows(item, self.scope.parent or Scope(), context)
                self._add(item, rows)
                return []
            case exp.Unnest():
                return self._unnest(item, context)
            case _:
                return self._function(item, context)

    def _table(self, table: exp.Table, context: Context) -> list[Anchor]:
        walk = self.walk_
        if table.args.get("sample") is not None:
            self.obstacle = self.obstacle or "it samples a table"
        if table.args.get("db") is None:
            query = self.scope.query(name_of(table.this))
            if isinstance(query, Query):
                walk.met.add(id(table))
                return self._with_query(table, query, context)
        split = walk.find(table)
        if split is None:
            self._note_other(table)
        before = len(walk.leaves)
        ref = walk.table_ref(table, split, context)
        self.scope.refs.append(ref)
        if split is not None and split.column is None:
            walk.refs.append((table, split))
        return [leaf.anchor for leaf in walk.leaves[before:]]

    def _note_other(self, table: exp.Table) -> None:
        schema = name_of(table.args["db"]) if table.args.get("db") is not None else None
        if is_catalog(schema, name_of(table.this)):
            self.walk_.names_catalog = True
        else:
            self.walk_.names_home = True

    def _with_query(self, table: exp.Table, query: Query, context: Context) -> list[Anchor]:
        query.is_used = True
        if query.rows is not None:
            self._add(table, query.rows, query.columns)
            if query.rows.facts is not None:
                context.imported.append(query.rows.facts)
            return []
        return self._derived(table, query.body, context, is_lateral=False, scope=query.scope, columns=query.columns)

    def _derived(
        self,
        item: exp.Expr,
        body: exp.Expr,
        context: Context,
        *,
        is_lateral: bool,
        scope: Scope | None = None,
        columns: Sequence[str] = (),
    ) -> list[Anchor]:
        walk = self.walk_
        outer = scope or (self.scope if is_lateral else self.scope.parent) or Scope()
        if isinstance(body, exp.Subquery) and not has_tail(body):
            body = body.this
        if can_push(body) and not walk.is_unsure and not is_lateral:
            rows = walk.query(body, outer, context)
            if rows.facts is not None:
                context.imported.append(rows.facts)  # not further out: they may name columns of outer queries
            self._add(item, rows, columns)
            self.others.extend(rows.others)
            return rows.required
        rows = walk.query(body, outer, context if is_lateral else None)
        if is_lateral:
            self._add(item, Rows(None))
            self.others.extend([*rows.required, *rows.others])
            return []
        link = Context()
        if rows.facts is not None:
            link.imported.append(rows.facts)
        linked = walk.relinked(rows, link)
        context.imported.append(link)
        self._add(item, linked, columns)
        if isinstance(body, exp.SetOperation) or not rows.required:
            self.others.extend(rows.others)
            return []
        return [Anchor(context, rows.required[0].node)]

    def _parenthesised(self, item: exp.Subquery, context: Context) -> list[Anchor]:
        """`(a JOIN b ON …)`: its names are seen outside, unless it has one of its own."""
        if has_tail(item):
            raise Unplannable("the router cannot read a table in parentheses with more behind it")
        walk = self.walk_
        inner_where = Context(context, is_root=True)
        alias = alias_of(item)
        scope = Scope(self.scope.parent)
        inner = From(walk, scope, inner_where)
        inner.walk_items([item.this])
        for join in item.args.get("joins") or []:
            inner.join(join)
        context.imported.append(inner.group)
        self.others.extend(inner.others)
        self.obstacle = self.obstacle or inner.obstacle
        if alias is not None:
            self.scope.refs.append(Ref(alias, {}))
        else:
            self.scope.refs.extend(scope.refs)
            self.scope.merged |= scope.merged
            self.scope.is_merged_unknown = self.scope.is_merged_unknown or scope.is_merged_unknown
        return inner.required

    def _unnest(self, item: exp.Unnest, context: Context) -> list[Anchor]:
        walk = self.walk_
        facts = Context()
        outputs: list[Output] = []
        for one in item.expressions:
            walk.expression(one, self.scope, context)
            outputs.append(Output("unnest", walk.constant(walk.terms.array(one), facts)))
        alias = item.args.get("alias")
        if len(outputs) == 1 and alias is not None and alias.this is not None and not alias.args.get("columns"):
            outputs = [Output(name_of(alias.this), outputs[0].node)]
        if item.args.get("offset"):
            outputs.append(Output("ordinality", None))
        self._add(item, Rows(outputs, columns_of(outputs), facts=facts))
        context.imported.append(facts)
        return []

    def _function(self, item: exp.Expr, context: Context) -> list[Anchor]:
        """A function, or what else gives rows. No key is looked for in it; tables in it are missed in the end."""
        if isinstance(item, exp.Table):
            self.walk_.met.add(id(item))
        for one in item.args.get("rows_from") or []:
            self.walk_.met.add(id(one))
        for child in item.iter_expressions():
            if isinstance(child, exp.Expr) and not isinstance(child, (exp.TableAlias, exp.Join)):
                self.walk_.expression(child, self.scope, context)
        alias = alias_of(item)
        self.scope.refs.append(Ref(alias, {}))
        return []

    def _add(self, item: exp.Expr, rows: Rows, columns: Sequence[str] = ()) -> None:
        if rows.facts is not None and isinstance(item, exp.Values):
            self.where.imported.append(rows.facts)
        alias = item.args.get("alias")
        name = alias_of(item)
        if name is None and isinstance(item, exp.Table):
            name = name_of(item.this)
        names = list(columns)
        if alias is not None and alias.args.get("columns"):
            given = [name_of(one.this if isinstance(one, exp.ColumnDef) else one) for one in alias.args["columns"]]
            names[: len(given)] = given
        if not names:
            self.scope.refs.append(Ref(name, dict(rows.columns), rows.outputs))
            return
        outputs = None
        if rows.outputs is not None:
            outputs = [Output(names[n] if n < len(names) else o.name, o.node) for n, o in enumerate(rows.outputs)]
        self.scope.refs.append(Ref(name, columns_of(outputs), outputs))
