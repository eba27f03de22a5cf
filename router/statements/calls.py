"""Which functions a statement calls, by its tokens: sqlglot's trees hide some of them under other names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from router.statements.functions import MAY_BE_NAMES, is_syntax
from router.statements.statement import Statement

_BEFORE_CALLS: Final = frozenset(
    """
    SELECT WHERE AND OR NOT ON BY IN THEN ELSE WHEN CASE HAVING RETURNING FROM JOIN SET VALUES DISTINCT ALL
    LIMIT OFFSET BETWEEN LIKE ILIKE IS CROSS LATERAL END NULL TRUE FALSE DO TO ZONE FOR PLACING BOTH LEADING
    TRAILING VARIADIC SYMMETRIC ASYMMETRIC VALUE ESCAPE PASSING DEFAULT CONTENT DOCUMENT PATH VERSION RANGE GROUPS
    """.split()  # noqa: SIM905
)


class _Outline(NamedTuple):
    """What a pass over the tokens tells of places: looked for from each word, it would take the square of the time."""

    between_queries: frozenset[int]
    """The commas between the queries of a WITH."""
    before_expressions: frozenset[int]
    """The `)` of `DISTINCT ON (…)` and `OPERATOR(…)`: others end an operand, or a list that a name may follow."""
    group: int
    """The first GROUP."""


def calls_of(statement: Statement) -> Iterator[str]:
    """The names of what looks like a function's call; with its schema, unless it is pg_catalog."""
    outline = _outline(statement)
    for position, token in enumerate(statement.tokens):
        if token.kind in ("word", "identifier") and statement.token(position + 1).text == "(":
            is_qualified = statement.token(position - 1).text == "."
            schema = statement.token(position - 2).name if is_qualified else "pg_catalog"
            if schema == "pg_catalog" and _is_syntax_here(statement, position, outline):
                continue
            begin = _begin(statement, position)
            if statement.word(begin - 1) in ("INTO", "AS", "RECURSIVE", "WITH"):
                continue  # a table, an alias or a query's name with its columns
            if not is_qualified and _is_alias_list(statement, position, outline):
                continue
            yield token.name if schema == "pg_catalog" else f"{schema}.{token.name}"


def _outline(statement: Statement) -> _Outline:
    between_queries: set[int] = set()
    before_expressions: set[int] = set()
    group = len(statement.tokens)
    is_in_with = False
    outer: list[tuple[bool, str]] = []
    for position, token in enumerate(statement.tokens):
        if token.text == "(":
            outer.append((is_in_with, statement.word(position - 1)))
            is_in_with = False
        elif token.text == ")" and outer:
            is_in_with, word = outer.pop()
            if word in ("ON", "OPERATOR"):
                before_expressions.add(position)
        elif token.text == "," and is_in_with:
            between_queries.add(position)
        elif token.word == "FROM":
            is_in_with = False
        elif token.word == "WITH" and statement.word(position + 1) not in _BEHIND_OTHER_WITHS:
            is_in_with = True
        elif token.word == "GROUP":
            group = min(group, position)
    return _Outline(frozenset(between_queries), frozenset(before_expressions), group)


_BEHIND_OTHER_WITHS: Final = frozenset({"ORDINALITY", "TIME", "TIES", "UNIQUE"})


def _begin(statement: Statement, position: int) -> int:
    """Where the qualified name begins whose last part is at the position."""
    while statement.token(position - 1).text == ".":
        position -= 2
    return position


def _is_syntax_here(statement: Statement, position: int, outline: _Outline) -> bool:
    """Some of the words call nothing at their places in the syntax only: `FETCH NEXT (1)`, but `SELECT next(1)`."""
    word = statement.word(position)
    if word not in MAY_BE_NAMES:
        return is_syntax(word)
    before = statement.token(position - 1)
    if word in ("CUBE", "ROLLUP"):
        return position > outline.group
    if (before.word, word) in (("ON", "CONFLICT"), ("THEN", "INSERT")):
        return True
    if word == "MATERIALIZED" and statement.words(position - 2, 2) == ("AS", "NOT"):
        return True
    if before.kind == "operator":
        return before.text == "]" or (before.text == ")" and position - 1 not in outline.before_expressions)
    return before.kind != "" and before.word not in _BEFORE_CALLS


def _is_alias_list(statement: Statement, position: int, outline: _Outline) -> bool:
    """`FROM t x (a, b)`, `, x (a) AS (SELECT …)`: names of columns in parentheses, rather than arguments."""
    before = statement.token(position - 1)
    if before.text == ",":
        return position - 1 in outline.between_queries and _follows_as(statement, position)
    if before.text == ")":
        return position - 1 not in outline.before_expressions
    if before.kind == "word":
        return not is_syntax(before.word) and before.word not in _BEFORE_CALLS
    return before.kind == "identifier"


def _follows_as(statement: Statement, position: int) -> bool:
    depth = 0
    for ahead in range(position + 1, min(position + 200, len(statement.tokens))):
        text = statement.token(ahead).text
        depth += (text == "(") - (text == ")")
        if depth == 0:
            is_query = statement.token(ahead + 2).text == "(" or statement.word(ahead + 2) in ("MATERIALIZED", "NOT")
            return statement.word(ahead + 1) == "AS" and is_query
    return False
