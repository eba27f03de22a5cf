"""Constants of a tree: which literals and parameters an expression is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sqlglot import exp

from router.statements.actions import NULL, Origin, Term
from router.statements.contexts import Terms
from router.statements.parsing import PARAMETER_MARK

_TYPES: Final = {
    "INT": "integer", "BIGINT": "bigint", "SMALLINT": "smallint", "TEXT": "text", "VARCHAR": "varchar", "UUID": "uuid",
    "DATE": "date", "TIMESTAMPTZ": "timestamptz", "DECIMAL": "numeric",
}  # fmt: skip
INTEGER_TYPES: Final = frozenset({"smallint", "integer", "bigint"})


def type_name(type_: exp.Expr | None) -> str:
    """A type's plain name; that of a type which no key survives is what sqlglot calls it."""
    if not isinstance(type_, exp.DataType):
        return "?"
    word = getattr(type_.this, "value", str(type_.this))
    name = _TYPES.get(word, word.lower())
    return f"{name}()" if type_.expressions else name  # varchar(3) cuts, numeric(3) rounds


def parameter_of(node: exp.Expr) -> int | None:
    """The number of a parameter, from 1."""
    if isinstance(node, exp.Column) and not node.args.get("table") and node.name.startswith(PARAMETER_MARK):
        return int(node.name[1:])
    return None


class TermReader:
    """Notes which parameters stand where a key does: one that stands elsewhere too may have another type."""

    def __init__(self) -> None:
        self.uses: dict[int, set[int]] = {}

    def term(self, node: exp.Expr | None) -> Term | None:
        """The constant that an expression is, or None."""
        match node:
            case exp.Paren():
                return self.term(node.this)
            case exp.Literal():
                return Term(Origin.LITERAL, int(node.this))
            case exp.Null():
                return NULL
            case exp.Neg():
                return self._negative(node)
            case exp.Cast():
                return self._cast(node)
            case exp.Column():
                number = parameter_of(node)
                if number is None:
                    return None
                self.uses.setdefault(number, set()).add(id(node))
                return Term(Origin.PARAMETER, number - 1)
            case _:
                return None

    def _negative(self, node: exp.Neg) -> Term | None:
        inner = node.this
        while isinstance(inner, exp.Paren):
            inner = inner.this
        base = inner
        while isinstance(base, exp.Cast):
            base = base.this
        if not isinstance(base, exp.Literal) or base.is_string:
            return None
        term = self.term(inner)
        return None if term is None or term.is_negative else replace(term, is_negative=True)

    def _cast(self, node: exp.Cast) -> Term | None:
        if type(node) is not exp.Cast:
            return None
        term = self.term(node.this)
        if term is None:
            return None
        return replace(term, casts=(*term.casts, type_name(node.args.get("to"))))

    def all_of(self, nodes: list[exp.Expr]) -> Terms | None:
        """The constants that the expressions are; None where one is none."""
        terms = [self.term(node) for node in nodes]
        return None if any(term is None for term in terms) else tuple(term for term in terms if term is not None)

    def array(self, node: exp.Expr | None) -> Terms | None:
        """The elements of a constant array: ARRAY[…], '{…}' or a parameter, cast or not."""
        while isinstance(node, exp.Paren):
            node = node.this
        if isinstance(node, exp.Array):
            return self.all_of(node.expressions)
        if type(node) is exp.Cast:
            element = _element_type(node.args.get("to"))
            terms = self.array(node.this)
            if element is None or terms is None:
                return None
            return tuple(replace(term, casts=(*term.casts, element)) for term in terms)
        term = self.term(node)
        if term is None or term.origin is Origin.NULL or term.is_negative:
            return None
        return (replace(term, is_array=True),)

    def shared(self, counts: dict[int, int]) -> frozenset[int]:
        """The parameters, from 0, that stand in more places of the text than this reader was shown."""
        return frozenset(number - 1 for number, count in counts.items() if count > len(self.uses.get(number, ())))


def _element_type(type_: exp.Expr | None) -> str | None:
    if (
        not isinstance(type_, exp.DataType)
        or getattr(type_.this, "value", "") != "ARRAY"
        or len(type_.expressions) != 1
    ):
        return None
    return type_name(type_.expressions[0])


def with_shared(terms: Terms, shared: frozenset[int]) -> Terms:
    if not shared:
        return terms
    return tuple(
        replace(term, is_shared=True) if term.origin is Origin.PARAMETER and term.index in shared else term
        for term in terms
    )
