"""Plans of texts: cached by the text, and by its shape."""

from __future__ import annotations

from collections.abc import Sequence

from router.statements.actions import NOT_SUPPORTED, SYNTAX_ERROR, Action, Added, Part, Plan, Planned, Refusal, Unnamed
from router.statements.lexer import MARK, Cut, cut, quoted, text_of, tokens
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
            planned, is_known = self._planned(data)
            self.shape_hits += is_known
            self.misses += not is_known
            if unnamed := planned.plan.unnamed:
                text, added = _with_columns(text_of(data), unnamed)
                planned = self._planned(text.encode("utf-8", "surrogateescape"))[0]._replace(added=added)
        else:
            self.hits += 1
        if len(data) <= TEXT_BYTES_MAX and not planned.wants:
            self._keep_text(data, planned)
        return planned

    def _planned(self, data: bytes) -> tuple[Planned, bool]:
        """With whether its shape was known."""
        text = text_of(data)
        shape = cut(text)
        # A mark that is the text's own stands for no literal: another text of this shape may be another statement.
        is_plain = shape.shape.count(MARK) == len(shape.literals)
        known = self._shapes.get(shape.shape) or self._older_shapes.get(shape.shape) if is_plain else None
        plan = known or self._plan(text, shape)
        wants = plan.wants
        if is_plain and not plan.needs_literals and not wants:
            self._keep_shape(shape.shape, plan)
        return Planned(plan, shape.literals, data, wants=wants), known is not None

    def begin_anew(self, tables: Tables) -> None:
        """Other tables, or columns: nothing that was planned stands. The counters go on."""
        self._tables = tables
        for each in (self._texts, self._older_texts, self._shapes, self._older_shapes):
            each.clear()

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


def _with_columns(text: str, unnamed: Sequence[Unnamed]) -> tuple[str, tuple[Added, ...]]:
    """The text with the columns that it does not name."""
    found = list(tokens(text))
    pieces: list[str] = []
    added: list[Added] = []
    begin = 0
    for token, columns in sorted(unnamed):
        end = found[token].end
        pieces += [text[begin:end], f" ({', '.join(map(quoted, columns))})"]
        added.append(Added(end, len(pieces[-1])))
        begin = end
    return "".join([*pieces, text[begin:]]), tuple(added)


def _refused(sqlstate: str, message: str, hint: str | None = None) -> Plan:
    refusal = Refusal(sqlstate, message, hint)
    return Plan((Part(Action.REFUSED, refusal=refusal),), needs_literals=True)
