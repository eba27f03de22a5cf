"""What is known of the rows that matter, and where it holds: equalities between key columns, and with constants.

A *node* stands for a column that may hold shard keys. A *context* is a place in a statement where rows meet conditions:
the rows of FROM (inner joins' conditions), all of WHERE, the condition of one outer join. Its facts hold for every
combination of rows that goes on from there, and so do those of the contexts around it. Hence the one rule that all
rests on:

    A table's row that does not satisfy the facts of the context in which the table stands, and of those around it,
    can be absent without changing the result.

- Only top-level conjuncts are facts, and only equality, which no NULL satisfies.
- LEFT JOIN: its condition is a fact for the right side alone. A fact of WHERE holds for both sides: without the row
  that broke it, its partner comes with NULLs, and an equality that named the row fails again.
- FULL JOIN: its condition is a fact for neither side.
- A sub-select in an expression stands within the context of that expression: what it computes for rows that do not go
  on does not matter. Nothing that it says holds outside of it.
- What a sub-select in FROM says holds where it stands, for its rows; on the side that an outer join may leave out,
  only there, as it may speak of columns of outer queries. Of LATERAL nothing is taken: its columns may be those of
  other tables, and NULL where these are not. An aggregate without groups has a row whatever WHERE says.
- What is said outside holds inside only if the rows that go on are its own rows one by one: no grouping, no window, no
  LIMIT, no set operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from router.statements.actions import Term

Node: TypeAlias = int
Terms: TypeAlias = tuple[Term, ...]


class Context:
    """`is_root`: the outermost one of a query. Where its rows are imported, what is around it is not."""

    def __init__(self, parent: Context | None = None, *, is_root: bool = False) -> None:
        self.parent = parent
        self.is_root = is_root
        self.equal: list[tuple[Node, Node]] = []
        self.constants: list[tuple[Node, Terms]] = []
        self.imported: list[Context] = []

    def child(self) -> Context:
        return Context(self)

    def around(self) -> Iterator[Context]:
        """It, those around it, and those whose rows came into one of them."""
        seen: set[tuple[int, bool]] = set()
        waiting: list[tuple[Context, bool]] = [(self, False)]
        while waiting:
            context, is_import = waiting.pop()
            if (id(context), is_import) in seen:
                continue
            seen.add((id(context), is_import))
            yield context
            waiting.extend((one, True) for one in context.imported)
            if context.parent is not None and not (is_import and context.is_root):
                waiting.append((context.parent, is_import))


class Closure:
    """The classes of equal nodes in a context, by union-find."""

    def __init__(self, context: Context) -> None:
        self._parents: dict[Node, Node] = {}
        self._terms: dict[Node, list[Terms]] = {}
        contexts = list(context.around())
        for one in contexts:
            for a, b in one.equal:
                self._parents[self.find(a)] = self.find(b)
        for one in contexts:
            for node, terms in one.constants:
                self._terms.setdefault(self.find(node), []).append(terms)

    def find(self, node: Node) -> Node:
        root = node
        while (above := self._parents.get(root, root)) != root:
            root = above
        self._parents[node] = root
        return root

    def same(self, one: Node, other: Node) -> bool:
        return self.find(one) == self.find(other)

    def terms(self, node: Node) -> Terms | None:
        """What the node is bound to: the shortest of its alternatives, each of which holds."""
        return min(self._terms.get(self.find(node), ()), key=_cost, default=None)


def _cost(terms: Terms) -> tuple[int, int]:
    return sum(100 if term.is_array else 1 for term in terms), sum(len(term.casts) for term in terms)
