"""Plans of texts: cached by the text, and by its shape."""

from __future__ import annotations

from router.statements.actions import NOT_SUPPORTED, SYNTAX_ERROR, Action, Part, Plan, Planned, Refusal
from router.statements.lexer import MARK, Cut, cut, text_of, tokens
from router.statements.planning import plan_of
from router.statements.tables import Tables


class Plans:
    """Two caches: a text known byte for byte costs one look-up, one of a known shape a pass over its bytes.

    Not for several threads.
    """

    def __init__(self, tables: Tables, size: int = 10_000) -> None:
        self._tables = tables
        self._size = size
        self._texts: dict[bytes, Planned] = {}
        self._older_texts: dict[bytes, Planned] = {}
        self._shapes: dict[str, Plan] = {}
        self._older_shapes: dict[str, Plan] = {}
        self.hits = 0
        self.shape_hits = 0
        self.misses = 0

    def of(self, text: bytes) -> Planned:
        """Never raises for what a client sent."""
        planned = self._texts.get(text)
        if planned is not None:
            self.hits += 1
            return planned
        return self._of_shape(text)

    def _of_shape(self, data: bytes) -> Planned:
        planned = self._older_texts.get(data)
        if planned is None:
            text = text_of(data)
            shape = cut(text)
            # A mark that is the text's own stands for no literal: another text of this shape may be another statement.
            is_plain = shape.shape.count(MARK) == len(shape.literals)
            plan = self._shapes.get(shape.shape) or self._older_shapes.get(shape.shape) if is_plain else None
            if plan is None:
                self.misses += 1
                plan = self._plan(text, shape)
            else:
                self.shape_hits += 1
            if is_plain and not plan.needs_literals:
                self._keep_shape(shape.shape, plan)
            planned = Planned(plan, shape.literals, data)
        else:
            self.hits += 1
        if len(data) <= TEXT_BYTES_MAX:
            self._keep_text(data, planned)
        return planned

    def _keep_text(self, data: bytes, planned: Planned) -> None:
        """Two generations make an LRU of sorts for the price of a dict: what is used survives the older one's end."""
        if len(self._texts) >= self._size // 2:
            self._older_texts, self._texts = self._texts, {}
        self._texts[data] = planned

    def _keep_shape(self, shape: str, plan: Plan) -> None:
        if len(self._shapes) >= self._size // 2:
            self._older_shapes, self._shapes = self._shapes, {}
        self._shapes[shape] = plan

    def _plan(self, text: str, shape: Cut) -> Plan:
        found = list(tokens(text))
        count = sum(token.literal >= 0 for token in found)
        if shape.is_odd or count != len(shape.literals) or any(token.kind == "odd" for token in found):
            return _refused(SYNTAX_ERROR, "a string, identifier or comment has no end, or comments nest too deeply")
        if any(token.kind == "identifier" and token.text[0] != '"' for token in found):
            return _refused(NOT_SUPPORTED, 'the router reads no identifiers of the kind U&"…"', 'write the name in "…"')
        try:
            return plan_of(text, found, shape.literals, self._tables)
        except RecursionError:  # what sqlglot or our own walk cannot hold, PostgreSQL may: max_stack_depth is larger
            return _refused("54001", "the statement is nested too deeply for the router")
        except ValueError:  # Python reads no number of more than some thousand digits
            return _refused(SYNTAX_ERROR, "the statement has a number that the router cannot read")


TEXT_BYTES_MAX = 65_536
"""Longer texts are hardly sent twice, and would fill the memory."""


def _refused(sqlstate: str, message: str, hint: str | None = None) -> Plan:
    refusal = Refusal(sqlstate, message, hint)
    return Plan((Part(Action.REFUSED, refusal=refusal),), needs_literals=True)
