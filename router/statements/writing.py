"""Writes: a key that rows are given counts like a key that they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlglot import exp

from router.statements.actions import Origin
from router.statements.contexts import Context, Node
from router.statements.froms import From
from router.statements.parsing import ColumnsUnknown, Unplannable
from router.statements.placing import token_of
from router.statements.reading import Reading
from router.statements.scopes import Ref, Rows, Scope, name_of
from router.statements.tables import Split
from router.statements.trees import alias_of, flat, unwrapped

GIVE_KEY: Final = "give the key of every row as a constant or parameter"
KEEP_KEY: Final = "insert the row under its new key, and delete the old one"


class Writing(Reading):
    """INSERT, UPDATE, DELETE and MERGE: rows that are met, and keys that rows are given."""

    def write(self, node: exp.Expr, scope: Scope) -> Rows:
        inner = Scope(scope)
        self.with_queries(node, inner)
        match node:
            case exp.Insert():
                return self._insert(node, inner)
            case exp.Update():
                return self._update(node, inner)
            case exp.Delete():
                return self._delete(node, inner)
            case exp.Merge():
                return self._merge(node, inner)
            case _:
                raise Unplannable("the router cannot read the statement")

    def _target(self, table: Any) -> tuple[exp.Table, Split | None]:
        if not isinstance(table, exp.Table) or not isinstance(table.this, exp.Identifier):
            raise Unplannable("the router cannot tell which table is written")
        self.met.add(id(table))
        split = self.find(table)
        self.written.append(split)
        if split is None:
            self.names_home = True
        return table, split

    def _written_ref(self, table: exp.Table, split: Split | None, scope: Scope, context: Context) -> Ref:
        """The target as a table that is read, too: its rows have to be found on this shard alone."""
        ref = self.table_ref(table, split, context)
        scope.refs.append(ref)
        return ref

    def _returning(self, node: exp.Expr, scope: Scope, context: Context) -> Rows:
        returning = node.args.get("returning")
        if returning is None:
            return Rows([], facts=context)
        select = exp.Select(expressions=returning.expressions)
        for one in returning.expressions:
            self.expression(one, scope, context)
        outputs, columns = self.outputs_of(select, scope, context)
        link = Context()
        link.imported.append(context)
        return self.relinked(Rows(outputs, columns, facts=context), link)

    def _insert(self, node: exp.Insert, scope: Scope) -> Rows:
        into = node.this
        names: list[str] | None = None
        if isinstance(into, exp.Schema):
            names = [name_of(one) for one in into.expressions]
            into = into.this
        table, split = self._target(into)
        source = node.args.get("expression")
        context = Context()
        columns: dict[str, Node] = {}
        if split is not None and split.column is not None:
            node_ = self._inserted(table, split, names, source, scope, context)
            columns = {split.column: node_}
        else:
            self._insert_source(source, scope)
        alias = alias_of(table)
        inner = Scope(scope)
        ref = Ref(alias or name_of(table.this), columns, None, split, alias is not None)
        inner.refs.append(ref)
        conflict = node.args.get("conflict")
        if conflict is not None:
            self._conflict(conflict, split, ref, inner, context)
            if split is not None and not _keeps_key(conflict, split):
                ref.columns = {}  # RETURNING gives the row that was there, whose key may be another
        return self._returning(node, inner, context)

    def _insert_source(self, source: Any, scope: Scope) -> Rows | None:
        if source is None:
            return None
        if isinstance(source, exp.Values):
            context = Context()
            for row in source.expressions:
                self.expression(row, scope, context)
            return None
        rows = self.query(source, scope, None, is_level=False)
        self.note_inside(rows)
        return rows

    def _inserted(
        self, table: exp.Table, split: Split, names: list[str] | None, source: Any, scope: Scope, context: Context
    ) -> Node:
        """The key of the rows that are inserted."""
        position = _key_position(split, self._known_columns(split) if names is None else names)
        result = self.node()
        self.types[result] = split.key_type
        if isinstance(source, exp.Values):
            self._insert_source(source, scope)
            rows = [flat(row) for row in source.expressions]
            if names is None:
                self._name_columns(table, split, max(map(len, rows)))
            if any(len(row) <= position for row in rows):
                raise Unplannable(f"a row does not give {split.column}", GIVE_KEY)
            terms = self.terms.all_of([row[position] for row in rows])
            if terms is None:
                raise Unplannable(f"the key {split.column} is not given as a constant or parameter", GIVE_KEY)
            self.assigned.append((split.keyspace.name, terms))
            context.constants.append((result, terms))
            return result
        found = self._insert_source(source, scope)
        if found is None or found.outputs is None or len(found.outputs) <= position:
            raise Unplannable(f"the key {split.column} cannot be found in what is inserted", GIVE_KEY)
        if names is None:
            self._name_columns(table, split, len(found.outputs))
        output = found.outputs[position].node
        if output is None or found.facts is None:
            raise Unplannable(f"the key {split.column} of the rows that are inserted is not certain", GIVE_KEY)
        self.linked.append((split, output, found.facts))
        context.imported.append(found.facts)
        context.equal.append((result, output))
        return result

    def _known_columns(self, split: Split) -> Sequence[str]:
        known = self.tables.columns.get(split.table)
        if known is None:
            raise ColumnsUnknown(split.table)
        return known.names

    def _name_columns(self, table: exp.Table, split: Split, count: int) -> None:
        """Those that the rows have, by their order: what is taken for the key is the key for the server, too."""
        known, token = self._known_columns(split), token_of(self.tree, table.this)
        if count > len(known):
            raise ColumnsUnknown(split.table)
        if token is None:
            raise Unplannable("the router cannot tell where the columns would be named", "name the columns")
        if self.statement.word(token + 1) == "AS":
            token += 2
        self.unnamed[self.statement.first + token] = tuple(known[:count])

    def _conflict(self, conflict: exp.Expr, split: Split | None, ref: Ref, scope: Scope, context: Context) -> None:
        inner = Scope(scope.parent)
        inner.refs = [Ref(ref.name, {}, None, split, ref.is_aliased), Ref("excluded", dict(ref.columns), None, None)]
        for name in ("conflict_keys", "index_where", "where"):
            value = conflict.args.get(name)
            for one in value if isinstance(value, list) else [value]:
                self.expression(one, inner, context)
        self._assignments(conflict.args.get("expressions") or [], split, inner, context, kept=set(ref.columns.values()))

    def _assignments(
        self, sets: Sequence[exp.Expr], split: Split | None, scope: Scope, context: Context, kept: set[Node]
    ) -> None:
        """SET lists: a key that changes has to be certain, and is met like any other key of the statement."""
        for one in sets:
            if not isinstance(one, exp.EQ):
                raise Unplannable("the router cannot read what is set")
            self.expression(one.expression, scope, context)
            if split is None or split.column is None:
                continue
            targets, values = flat(one.this), [one.expression]
            if isinstance(one.this, exp.Tuple):
                value = unwrapped(one.expression)
                values = value.expressions if isinstance(value, exp.Tuple) else []
            for number, target in enumerate(targets):
                if not isinstance(target, exp.Column):
                    raise Unplannable("the router cannot read what is set")
                if name_of(target.this) != split.column:
                    continue
                value_ = values[number] if len(values) == len(targets) else None
                self._assign_key(value_, split, scope, context, kept)

    def _assign_key(
        self, value: exp.Expr | None, split: Split, scope: Scope, context: Context, kept: set[Node]
    ) -> None:
        value = None if value is None else unwrapped(value)
        node = scope.resolve(value)
        if node is not None and node in kept:
            return
        if node is not None:
            self.linked.append((split, node, context))
            return
        term = self.terms.term(value)
        if term is None or term.origin is Origin.NULL:
            raise Unplannable(f"the new value of the key {split.column} is not certain", KEEP_KEY)
        self.assigned.append((split.keyspace.name, (term,)))

    def _update(self, node: exp.Update, scope: Scope) -> Rows:
        table, split = self._target(node.this)
        where = Context()
        from_ = From(self, scope, where)
        ref = self._written_ref(table, split, scope, from_.group)
        source = node.args.get("from_")
        if source is not None:
            from_.comma()
            from_.walk_items([source.this])
        self._where(node, scope, where)
        self._assignments(node.expressions, split, scope, from_.group, kept=set(ref.columns.values()))
        if split is not None and split.column in _targets(node.expressions):
            ref.columns, ref.outputs = {}, None  # what is known is known of the old key; RETURNING gives the new one
        return self._returning(node, scope, from_.group)

    def _delete(self, node: exp.Delete, scope: Scope) -> Rows:
        table, split = self._target(node.this)
        if node.args.get("tables") or node.args.get("joins"):
            raise Unplannable("the router cannot read the statement")
        where = Context()
        from_ = From(self, scope, where)
        self._written_ref(table, split, scope, from_.group)
        from_.comma()
        from_.walk_items(node.args.get("using") or [])
        self._where(node, scope, where)
        return self._returning(node, scope, from_.group)

    def _where(self, node: exp.Expr, scope: Scope, where: Context) -> None:
        condition = node.args.get("where")
        if condition is not None:
            self.facts(condition.this, scope, where)

    def _merge(self, node: exp.Merge, scope: Scope) -> Rows:
        """The source's rows are all met; the target's are those that the condition joins to them."""
        table, split = self._target(node.this)
        where = Context()
        from_ = From(self, scope, where)
        joined = where.child()
        ref = self._written_ref(table, split, scope, joined)
        from_.walk_items([node.args["using"]])
        if node.args.get("using_cond"):
            raise Unplannable("the router cannot read the statement")
        self.facts(node.args["on"], scope, joined)
        joined.imported.append(from_.group)
        for when in node.args["whens"].expressions:
            self._when(when, split, ref, scope, joined, from_.group)
        return self._returning(node, scope, Context())

    def _when(
        self, when: exp.Expr, split: Split | None, ref: Ref, scope: Scope, joined: Context, source: Context
    ) -> None:
        if not when.args.get("matched") and when.args.get("source") and split is not None and split.column is not None:
            raise Unplannable("WHEN NOT MATCHED BY SOURCE meets rows of every key")
        self.expression(when.args.get("condition"), scope, joined)
        then = when.args.get("then")
        if isinstance(then, exp.Update):
            self._assignments(then.expressions, split, scope, joined, kept=set(ref.columns.values()))
        elif isinstance(then, exp.Insert):
            self._merge_insert(then, split, scope, source)
        elif isinstance(then, exp.Expr) and not isinstance(then, exp.Var):
            raise Unplannable("the router cannot read what MERGE does")

    def _merge_insert(self, then: exp.Insert, split: Split | None, scope: Scope, source: Context) -> None:
        given = then.args.get("expression")
        values = [] if given is None else flat(given)
        for one in values:
            self.expression(one, scope, source)
        if split is None or split.column is None:
            return
        if not then.this:
            raise Unplannable("INSERT of a MERGE does not name its columns", "name the columns")
        position = _key_position(split, [name_of(one.this) for one in flat(then.this) if isinstance(one, exp.Column)])
        if position >= len(values):
            raise Unplannable(f"MERGE does not give the key {split.column}", GIVE_KEY)
        self._assign_key(values[position], split, scope, source, kept=set())


def _key_position(split: Split, names: Sequence[str]) -> int:
    assert split.column is not None
    if split.column not in names:
        raise Unplannable(f"INSERT into {split.table} does not give the key {split.column}", GIVE_KEY)
    return list(names).index(split.column)


def _targets(sets: Sequence[exp.Expr]) -> set[str]:
    """The columns that SET lists give values."""
    return {name_of(target.this) for one in sets for target in flat(one.this) if isinstance(target, exp.Column)}


def _keeps_key(conflict: exp.Expr, split: Split) -> bool:
    """Whether a row that ON CONFLICT updates has, and keeps, the key of the one that was to be inserted."""
    sets = conflict.args.get("expressions") or []
    columns = [one.this for one in conflict.args.get("conflict_keys") or [] if isinstance(one, exp.Ordered)]
    names = {name_of(one.this) for one in columns if isinstance(one, exp.Column)}
    return not sets or split.column in names - _targets(sets)
