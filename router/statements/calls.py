"""Which functions a statement calls, by its tokens: sqlglot's trees hide some of them under other names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from router.statements.functions import is_syntax
from router.statements.statement import Statement

_BEFORE_CALLS: Final = frozenset(
    """
    SELECT WHERE AND OR NOT ON BY IN THEN ELSE WHEN CASE HAVING RETURNING FROM JOIN SET VALUES DISTINCT ALL
    LIMIT OFFSET BETWEEN LIKE ILIKE IS CROSS LATERAL END NULL TRUE FALSE DO
    """.split()  # noqa: SIM905
)


def calls_of(statement: Statement) -> Iterator[str]:
    """The names of what looks like a function's call."""
    for position, token in enumerate(statement.tokens):
        if token.kind in ("word", "identifier") and statement.token(position + 1).text == "(":
            before = statement.word(position - 1)
            if token.kind == "word" and is_syntax(token.word):
                continue
            if before in ("INTO", "AS", "RECURSIVE", "WITH") or statement.token(position - 1).text == ")":
                continue  # a table, an alias or a query's name with its columns
            if _is_alias_list(statement, position):
                continue
            yield token.name


def _is_alias_list(statement: Statement, position: int) -> bool:
    """`FROM t x (a, b)`, `, x (a) AS (SELECT …)`: names of columns in parentheses, rather than arguments."""
    before = statement.token(position - 1)
    if before.text == "." and statement.word(position - 3) == "INTO":
        return True
    if before.text == "." or before.kind not in ("word", "identifier", "operator"):
        return False
    if before.kind != "operator":
        return before.kind == "identifier" or (not is_syntax(before.word) and before.word not in _BEFORE_CALLS)
    return before.text == "," and _follows_as(statement, position)


def _follows_as(statement: Statement, position: int) -> bool:
    depth = 0
    for ahead in range(position + 1, min(position + 200, len(statement.tokens))):
        text = statement.token(ahead).text
        depth += (text == "(") - (text == ")")
        if depth == 0:
            return statement.word(ahead + 1) == "AS" and statement.token(ahead + 2).text in (
                "(",
                "MATERIALIZED",
                "materialized",
            )
    return False
