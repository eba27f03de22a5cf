"""Names: which table a column's name means, as PostgreSQL resolves it, as far as keys may stand in the column.

A name that is not certain is nothing (None), never a guess: an unqualified one in a scope with tables whose columns are
not known, unless a split table there has it as its key (then PostgreSQL takes that, or finds it ambiguous).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlglot import exp

from router.statements.contexts import Context, Node
from router.statements.lexer import folded, quoted
from router.statements.tables import Split


class Output(NamedTuple):
    name: str | None
    node: Node | None


class Anchor(NamedTuple):
    """A split table's key where it stands: rows of other keys do not meet this table's in `context`."""

    context: Context
    node: Node


@dataclass
class Rows:
    """What a query gives: its columns (None: not all of them are known), and what its rows are made of."""

    outputs: list[Output] | None
    columns: dict[str, Node] = field(default_factory=dict)
    required: list[Anchor] = field(default_factory=list)
    """Each row has a row of each of these in it."""
    others: list[Anchor] = field(default_factory=list)
    facts: Context | None = None
    """What holds for its rows outside, too."""


@dataclass
class Ref:
    name: str | None
    columns: dict[str, Node]
    outputs: list[Output] | None = None
    split: Split | None = None
    is_aliased: bool = True


class Scope:
    def __init__(self, parent: Scope | None = None) -> None:
        self.parent = parent
        self.refs: list[Ref] = []
        self.queries: dict[str, object] = {}
        """Those of WITH, by name."""
        self.hidden = 0
        """So many of the first tables cannot be named: in a condition of ON, those before the last comma."""
        self.merged: set[str] = set()
        """Columns that USING of an outer join made one."""
        self.is_merged_unknown = False
        """An outer NATURAL JOIN did so to who knows which."""

    def chain(self) -> Iterator[Scope]:
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def query(self, name: str) -> object | None:
        return next((scope.queries[name] for scope in self.chain() if name in scope.queries), None)

    def resolve(self, column: exp.Expr | None) -> Node | None:
        """The node that a column's name means, if that is certain."""
        if not isinstance(column, exp.Column) or not isinstance(column.this, exp.Identifier):
            return None
        name, table = name_of(column.this), column.args.get("table")
        if table is None:
            return self._unqualified(name)
        return self._qualified(name, name_of(table), column.args.get("db"))

    def _qualified(self, name: str, table: str, schema: exp.Expr | None) -> Node | None:
        for scope in self.chain():
            found = [number for number, ref in enumerate(scope.refs) if ref.name == table]
            if found:
                ref = scope.refs[found[0]]
                if len(found) > 1 or found[0] < scope.hidden or (schema is not None and not _is_of(ref, schema)):
                    return None
                return ref.columns.get(name)
        return None

    def _unqualified(self, name: str) -> Node | None:
        if not self.refs:
            return self.parent._unqualified(name) if self.parent is not None else None
        found = [number for number, ref in enumerate(self.refs) if name in ref.columns]
        if not found:
            return None  # it may be a column of any table here, or of one further out
        is_merged = self.is_merged_unknown or name in self.merged
        if found[0] < self.hidden or (is_merged and found[0] != 0):
            return None
        return self.refs[found[0]].columns[name]


def name_of(identifier: exp.Expr) -> str:
    if not isinstance(identifier, exp.Identifier):
        return identifier.name
    name = str(identifier.this)
    return folded(quoted(name)) if identifier.args.get("quoted") else folded(name)


def _is_of(ref: Ref, schema: exp.Expr) -> bool:
    return not ref.is_aliased and ref.split is not None and ref.split.table.schema == name_of(schema)
