"""One statement of a text while it is planned: its tokens, and what was learnt of it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from router.statements.lexer import Literal, Token
from router.statements.tables import Tables

_NONE: Final = Token("", "", 0, 0)


class Statement:
    """Tokens `first` to `last` of the text, the end exclusive. Positions given to its methods count from `first`."""

    def __init__(
        self,
        text: str,
        tokens: Sequence[Token],
        first: int,
        last: int,
        literals: Sequence[Literal],
        tables: Tables,
    ) -> None:
        self.text = text
        self.all_tokens = tokens
        self.first = first
        self.tokens = tokens[first:last]
        self.literals = literals
        self.tables = tables
        self.needs_literals = False
        """A literal's value decided something: the plan is good for this text only."""

    def token(self, position: int) -> Token:
        return self.tokens[position] if 0 <= position < len(self.tokens) else _NONE

    def word(self, position: int) -> str:
        return self.token(position).word

    def words(self, position: int, count: int) -> tuple[str, ...]:
        return tuple(self.word(position + number) for number in range(count))

    def after(self, position: int) -> Statement:
        """The statement that begins at this token of it, as EXPLAIN and PREPARE have one in them."""
        return self.slice(position, len(self.tokens))

    def slice(self, begin: int, end: int) -> Statement:
        return Within(self, self.first + begin, self.first + end)

    def literal(self, token: Token) -> Literal:
        """A literal's value, noting that the plan rests on it."""
        self.note_literal()
        return self.literals[token.literal]

    def note_literal(self) -> None:
        self.needs_literals = True


class Within(Statement):
    """A statement in another one: what it learns of literals, the outer one knows as well."""

    def __init__(self, outer: Statement, first: int, last: int) -> None:
        super().__init__(outer.text, outer.all_tokens, first, last, outer.literals, outer.tables)
        self._outer = outer

    def note_literal(self) -> None:
        super().note_literal()
        self._outer.note_literal()
