"""A statement's tree, by sqlglot, in a form in which its literals and parameters can be told apart.

What sqlglot 30 reads wrongly, or not at all, never reaches it: utility statements; `$1,$2` (a dollar quote to it) and
`@ 5` (a parameter to it), since parameters become quoted identifiers; OVERRIDING … VALUE; WHERE CURRENT OF; ROW(…).
Each literal becomes its own number, so that a literal in the tree says which one of the text it is.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from router.statements.statement import Statement
from shardmove.domain.moves import TableName

PARAMETER_MARK: Final = "\x01"
logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it warns with the statement: a client's text is for no log


class Unplannable(Exception):
    """The statement cannot be planned: message and hint."""

    def __init__(self, message: str, hint: str | None = None, *, sqlstate: str = "0A000") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.sqlstate = sqlstate


NAME_COLUMNS: Final = "name the columns; a router asks a shard for those that are not named, and has no answer here"


class ColumnsUnknown(Unplannable):
    """It could be, if the columns of a table were known."""

    def __init__(self, table: TableName) -> None:
        super().__init__(f"INSERT into {table} does not name its columns", NAME_COLUMNS)
        self.table = table


class Tree(NamedTuple):
    root: exp.Expr
    token_at: dict[int, int]
    """From where a token begins in what sqlglot was given, to its number in the statement."""
    is_current_of: bool


def parsed(statement: Statement) -> Tree:
    """Raises Unplannable for what sqlglot does not read."""
    pieces: list[str] = []
    token_at: dict[int, int] = {}
    length = 0
    is_current_of = False
    tokens = statement.tokens
    position = 0
    while position < len(tokens):
        token = tokens[position]
        step, text = 1, token.text
        if token.kind == "number":
            text = str(token.literal)
        elif token.kind == "string":
            text = f"'{token.literal}'"
        elif token.kind == "parameter":
            text = f'"{PARAMETER_MARK}{token.text[1:]}"'
        elif token.kind == "odd" or PARAMETER_MARK in text:
            raise Unplannable("the statement has a character that the router cannot read", sqlstate="42601")
        elif token.kind == "word":
            step, text = _word(statement, position, text)
            is_current_of = is_current_of or (step == 3 and text == "TRUE")
        token_at[length] = position
        following = statement.token(position + step)
        is_apart = following.start != tokens[position + step - 1].end or token.kind == "number" or step > 1
        pieces.append(text + " " if is_apart else text)
        length += len(pieces[-1])
        position += step
    return Tree(_parse("".join(pieces)), token_at, is_current_of)


def _word(statement: Statement, position: int, text: str) -> tuple[int, str]:
    """How many tokens a word and its followers are, and what stands for them."""
    words = statement.words(position, 3)
    if words[:2] == ("CURRENT", "OF"):
        return 3, "TRUE"
    if words[0] == "OVERRIDING" and words[1] in ("SYSTEM", "USER") and words[2] == "VALUE":
        return 3, ""
    if words[0] == "ROW" and statement.token(position + 1).text == "(":
        return 1, ""
    if words[0] == "SOME" and statement.token(position + 1).text == "(":
        return 1, "ANY"
    return 1, text


def _parse(text: str) -> exp.Expr:
    try:
        trees = sqlglot.parse(text, dialect="postgres")
    except (SqlglotError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise Unplannable("the statement is nested too deeply for the router", sqlstate="54001") from None
        raise Unplannable("the router cannot parse the statement") from None
    except Exception:
        raise Unplannable("the router cannot parse the statement") from None
    if len(trees) != 1 or trees[0] is None or isinstance(trees[0], exp.Command):
        raise Unplannable("the router cannot parse the statement")
    return trees[0]
