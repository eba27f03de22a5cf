"""From tokens to a plan: which kind of statement each part is, and who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from router.statements.actions import Action, Hint, Part, Plan, Refusal
from router.statements.lexer import Literal, Token, hint_settings, outer_comments
from router.statements.queries import QUERY_WORDS, query_part
from router.statements.statement import Statement
from router.statements.tables import Tables
from router.statements.utility import utility_part

_ENDS = frozenset({Action.COMMIT, Action.ROLLBACK, Action.PREPARED_TRANSACTION})


def plan_of(text: str, found: Sequence[Token], literals: Sequence[Literal], tables: Tables) -> Plan:
    """The plan of a text whose tokens are given."""
    parts: list[Part] = []
    needs_literals = False
    hint = _hint(text)
    if isinstance(hint, Refusal):
        return Plan((Part(Action.REFUSED, refusal=hint),), needs_literals=True)
    for first, last in _split(found):
        statement = Statement(text, found, first, last, literals, tables)
        part = part_of(statement)
        parts.append(replace(part, start=first, end=last, hint=hint))
        needs_literals = needs_literals or statement.needs_literals
    is_opaque = any(part.is_opaque or (part.inner is not None and part.inner.is_opaque) for part in parts)
    may_commit = any(part.action in _ENDS or part.kind in ("CALL", "DO") for part in parts)
    return Plan(tuple(parts) or (Part(Action.EMPTY),), needs_literals, is_opaque, may_commit)


def part_of(statement: Statement) -> Part:
    if statement.word(0) in QUERY_WORDS or statement.token(0).text == "(":
        return query_part(statement)
    return utility_part(statement, part_of)


def _hint(text: str) -> Hint | Refusal | None:
    """The hint of a comment `/* shardmove: key=…, keyspace=… */` before or behind the statements."""
    if "shardmove:" not in text:
        return None
    for comment in outer_comments(text):
        settings = hint_settings(comment)
        if settings is None:
            continue
        if "key" not in settings:
            return Refusal(
                "42601", f"the router cannot read the hint {comment}", "/* shardmove: key='…', keyspace=… */"
            )
        return Hint(settings["key"], settings.get("keyspace"))
    return None


def _split(found: Sequence[Token]) -> list[tuple[int, int]]:
    """Where statements begin and end, in tokens: at semicolons outside of parentheses and of BEGIN ATOMIC … END."""
    parts: list[tuple[int, int]] = []
    first = depth = 0
    for index, token in enumerate(found):
        if token.kind == "operator":
            depth += (token.text in "([") - (token.text in ")]")
            if token.text == ";" and depth <= 0:
                if index > first:
                    parts.append((first, index))
                first, depth = index + 1, 0
        elif token.word == "ATOMIC" and index > first and found[index - 1].word == "BEGIN":
            return [*parts, (first, len(found))]  # bodies hold semicolons, and CASE … END: all the rest is one
    if first < len(found):
        parts.append((first, len(found)))
    return parts
