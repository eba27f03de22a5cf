"""Dual reads (phase 3 of a move): a sample of the reads is made on source and target once more, and compared.

It happens behind the client's back, after its answer: on connections of the pool that nobody waits for, so many at once
and no more; what comes beyond that is counted and dropped. The statement runs in a READ ONLY transaction on each side.

The mirror is behind, so two answers that differ say little. Then, a few times:

    the source is read; the mirror catches up; the target is read; the source is read again

The target's answer must be one of the source's two. If it is not, and the source's two are the same, and all of that
comes out once more just like it, nothing is on its way any more that could mend it: this is a difference.

What an order that nobody asked for can change is not compared: LIMIT, window functions, aggregates like array_agg;
nor are functions that are volatile, or of which nothing is known.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from router import placing
from router.epochs import MoveFact
from router.greeting import ClientLogin
from router.opening import NoServer
from router.server import Server, ServerError, ServerLost
from router.statements import Action, Arguments, Decision, Facts, Planned
from router.statements.calls import calls_of
from router.statements.functions import AGGREGATES, SCALAR, UNEQUAL, UNEQUAL_WORDS
from router.statements.lexer import Token, text_of, tokens
from router.statements.statement import Statement
from router.statements.tables import Tables
from router.statements.values import Unreadable, keys_of
from router.units import Kind, Unit
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.keys import key_text
from shardmove.wire import messages
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.service import Router
    from router.session import Session

PHASE: Final = 3
RUNNING_MAX: Final = 4
ATTEMPTS: Final = 4
BOUND_S: Final = 10.0
"""Of one comparison, all its reads together."""
BYTES_MAX: Final = 1_048_576
"""A longer answer is not compared."""
SHOWN_MAX: Final = 10_000
"""Characters of each side's rows that are recorded."""

_ROW: Final = ord("D")
_BY_CHANCE: Final = frozenset(
    """
    LIMIT OFFSET FETCH OVER TABLESAMPLE CTID XMIN XMAX CMIN CMAX TABLEOID CURRENT_DATE
    ARRAY_AGG STRING_AGG JSON_AGG JSONB_AGG JSON_OBJECT_AGG JSONB_OBJECT_AGG XMLAGG ANY_VALUE
    """.split()  # noqa: SIM905
)
"""Words of statements whose answer may differ between two equal tables."""

Rows = Counter[bytes]


class TooLarge(Exception):
    """The answer is longer than BYTES_MAX."""


class _Case(NamedTuple):
    """A read to be made again, with all that its answer depends on."""

    move: MoveFact
    planned: Planned
    arguments: Arguments | None
    decision: Decision
    login: ClientLogin
    settings: Mapping[str, bytes]
    facts: Facts


class Comparing:
    """The comparisons of one router."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._running = 0

    def after(self, session: Session, unit: Unit) -> None:
        """A unit was answered, outside of a transaction block; returns at once."""
        case = _case(self._router, session, unit)
        if case is None or random.random() >= case.move.sample_rate:
            return
        if not is_comparable(case.planned.text):
            return
        if self._running >= RUNNING_MAX:
            self._router.stats.not_compared += 1
            return
        self._running += 1
        self._router.in_background(self._guarded(case))

    async def _guarded(self, case: _Case) -> None:
        try:
            async with asyncio.timeout(BOUND_S):
                is_decided = await self._compare(case)
        except (NoServer, ServerError, ServerLost, ShardmoveError, TooLarge, TimeoutError):
            is_decided = False
        finally:
            self._running -= 1
        if not is_decided:
            self._router.stats.not_compared += 1

    async def _compare(self, case: _Case) -> bool:
        """False where it came to nothing: the rows change all the time, or the move went on."""
        source = await self._borrow(case, case.move.source)
        try:
            target = await self._borrow(case, case.move.target)
            try:
                found = await self._difference(case, source, target)
            finally:
                self._router.take_back(target, is_shared=True)
        finally:
            self._router.take_back(source, is_shared=True)
        now = self._router.known.moves.get(case.move.id)
        if found is None or now is None or now.phase_number != case.move.phase_number:
            return False
        self._router.stats.compared += 1
        self._router.epochs.count(case.move, compared=1)
        if found:
            self._tell(case, *found)
        return True

    async def _borrow(self, case: _Case, shard: str) -> Server:
        pool = self._router.pool(shard, case.login)
        if pool.waiting:
            raise NoServer(f"clients wait for connections to shard {shard}")
        return await placing.borrow(pool, case.settings)

    async def _difference(self, case: _Case, source: Server, target: Server) -> tuple[Rows, ...] | None:
        """Both sides' rows; empty where they are the same, None where that cannot be told."""
        there, before = await _read(target, case), await _read(source, case)
        if there == before:
            return ()
        last: tuple[Rows, Rows] | None = None
        for _ in range(ATTEMPTS):
            before = await _read(source, case)
            await asyncio.wrap_future(self._router.mirroring.pass_after(case.move.id))
            there, after = await _read(target, case), await _read(source, case)
            if there in (before, after):
                return ()
            if before == after and last == (before, there):
                return last
            last = (before, there) if before == after else None
        return None

    def _tell(self, case: _Case, source_rows: Rows, target_rows: Rows) -> None:
        self._router.stats.differences += 1
        part = case.decision.part
        self._router.epochs.differs(
            case.move,
            table=", ".join(map(str, part.tables)) if part is not None else "",
            key=_key(self._router, case),
            source_rows=_shown(source_rows),
            target_rows=_shown(target_rows),
        )


def _case(router: Router, session: Session, unit: Unit) -> _Case | None:
    """The unit's one statement, where it is a read of one moving range in phase 3."""
    need = unit.need
    decision = need.decision
    if need.kind is not Kind.ROUTED or need.is_write or decision is None or len(need.routes) != 1:
        return None
    move = router.known.moves.get(need.routes[0].move_id or "")
    if move is None or move.phase != PHASE or need.shard != move.source or unit.ask is None or len(unit.needs) != 1:
        return None
    planned, arguments = unit.ask
    if decision.action is not Action.KEYED or len(planned.plan.parts) != 1:
        return None
    return _Case(
        move, planned, arguments, decision, session.login, dict(session.variables.wanted), session.variables.facts
    )


@lru_cache(maxsize=1000)
def is_comparable(text: bytes) -> bool:
    """Whether two equal tables give equal answers, as far as a look at the words can say."""
    shown = text_of(text)
    found = list(tokens(shown))
    for token, following in pairwise([*found, Token("", "", 0, 0)]):
        word = token.word
        if word in _BY_CHANCE or word in UNEQUAL_WORDS or (word == "DISTINCT" and following.word == "ON"):
            return False
    statement = Statement(shown, found, 0, len(found), (), Tables({}))
    return all(_is_steady(called) for called in calls_of(statement))


def _is_steady(function: str) -> bool:
    return function not in UNEQUAL and (function in SCALAR or function in AGGREGATES)


async def _read(server: Server, case: _Case) -> Rows:
    rows: Rows = Counter()
    size = 0

    def take(kind: int, frame: bytes) -> None:
        nonlocal size
        if kind == _ROW:
            size += len(frame)
            if size <= BYTES_MAX:
                rows[frame] += 1

    given = case.arguments or Arguments((), ())
    data = (
        messages.parse(b"", case.planned.text, given.oids)
        + messages.bind(b"", b"", given.values, formats=given.formats)
        + messages.execute(b"")
        + messages.SYNC
    )
    server.statements.pop(b"", None)
    await server.run(b"BEGIN READ ONLY")
    try:
        await server.exchange(data, [Owed.PARSE, Owed.BIND, Owed.EXECUTE, Owed.SYNC], take)
    except ServerError:
        await server.run(b"ROLLBACK")
        raise
    await server.run(b"ROLLBACK")
    if size > BYTES_MAX:
        raise TooLarge
    return rows


def _key(router: Router, case: _Case) -> str:
    """The keys that the statement named; those of another encoding stay out."""
    part = case.decision.part
    if part is None:
        return ""
    keyspaces = router.known.tables.keyspaces
    try:
        found = {
            key_text(key)
            for keys in part.keys
            for term in keys.terms
            for key in keys_of(
                term,
                keyspaces[keys.keyspace].key_type,
                case.planned.literals,
                case.arguments,
                case.facts,
                keys.is_assigned,
            )
        }
    except Unreadable:
        return ""
    return ", ".join(sorted(found))


def _shown(rows: Rows) -> str:
    lines = []
    for frame in sorted(rows.elements()):
        values = messages.decode_data_row(frame[5:])
        texts = ("NULL" if value is None else value.decode("utf-8", "replace") for value in values)
        lines.append(f"({', '.join(texts)})")
    return "\n".join(lines)[:SHOWN_MAX].replace("\0", "")
