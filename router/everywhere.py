"""A statement for every shard: DDL, and writes to tables that every shard holds whole (reference tables).

DDL runs on one shard after the other, each in a transaction of its own: where a later one fails, the error says where
it is done. A write to a reference table is one transaction on all of them, see `router/two_phase.py`.

What has begun goes on to its end, also when the client leaves. A client that cancels stops what runs on a shard.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from router import gathering, placing, two_phase
from router.gathering import Asked
from router.opening import NoServer
from router.server import Server, ServerError, ServerLost
from router.statements import Action, Arguments, Planned
from router.statements.lexer import text_of, tokens
from router.units import Need, Refusal, Unit
from shardmove.wire import messages
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.session import Session

_ROW, _DESCRIPTION, _NO_DATA, _COMPLETE, _BOUND, _PARAMETERS, _EMPTY = b"DTnC2tI"
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
"""The rows of an answer wait here until every shard has given the same."""
_MOMENTS: Final = frozenset({"now", "today", "tomorrow", "yesterday"})
"""Texts that begin with one of these become another moment on each shard."""
_FIRST_WORD: Final = re.compile(r"[^a-z]{0,128}([a-z]+)", re.IGNORECASE)


async def carry_out(session: Session, unit: Unit, need: Need) -> bool:
    """Answers the unit. Raises Refused, Failed, NoServer, ServerError, ServerLost."""
    rest = gathering.rest(unit)
    if rest is not None:
        return session.answered(unit, rest)
    asked = gathering.asked(unit)
    need = await _settled(session, unit)
    assert need.decision is not None
    assert unit.ask is not None
    planned, arguments = unit.ask
    work = Work(session, asked, need.decision.shards)
    are_writes = [part.action is Action.REFERENCE_WRITE for part in planned.plan.parts]
    if any(are_writes):
        _refuse_moments(planned, arguments)
    if all(are_writes):
        answer = await work.to_its_end(two_phase.write(work))
    else:
        answer = await work.to_its_end(work.run_each())
    session.tell(answer)
    return session.answered(unit, b"")


async def _settled(session: Session, unit: Unit) -> Need:
    """What it needs by now, once nothing stands in its way."""
    while True:
        need = unit.need = session.asked_again(unit)
        if need.refusal is not None:
            raise placing.Refused(need.refusal)
        if not placing.must_wait(session, need):
            return need
        await placing.wait(session, unit, need, unit.began)


def _refuse_moments(planned: Planned, arguments: Arguments | None) -> None:
    """Beside functions, which planning has looked for."""
    found = {word for text in _texts(planned, arguments) for word in _first_words(text)} & _MOMENTS
    found |= {token.word.lower() for token in tokens(text_of(planned.text)) if token.word == "CURRENT_DATE"}
    if found:
        raise placing.Refused(
            Refusal(
                "0A000",
                f"a write of a reference table goes to every shard, and {', '.join(sorted(found))} may differ there",
                "send the value itself",
            )
        )


def _texts(planned: Planned, arguments: Arguments | None) -> Iterator[str]:
    """Every value that may be cast to a time; a text in binary is the same text."""
    for literal in planned.literals:
        if literal.kind != "n":
            yield literal.text if literal.kind == "s" else literal.text.partition("'")[2]
    for value in arguments.values if arguments is not None else ():
        if value is not None:
            yield value.decode("latin-1")


def _first_words(text: str) -> Iterator[str]:
    """A time's words may follow its digits, and an array or range has several times."""
    bare = text.strip()
    for piece in bare.split(",") if bare.startswith(("{", "[", "(")) else (bare,):
        if (found := _FIRST_WORD.match(piece)) is not None:
            yield found[1].lower()


class Answer:
    """What one shard said to the statement."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._is_bound = asked.is_simple
        self._described = b""
        self.statement = b""
        self.portal = b""
        self.frames: list[bytes] = []
        self.size = 0

    def take(self, kind: int, frame: bytes) -> None:
        if kind == _BOUND:
            self._is_bound = True
        elif kind == _PARAMETERS:
            self._described = frame
        elif kind in (_DESCRIPTION, _NO_DATA) and not self._asked.is_simple:
            if self._is_bound:
                self.portal = frame
            else:
                self.statement = self._described + frame
        elif kind in (_ROW, _COMPLETE, _EMPTY, _DESCRIPTION):
            self.size += len(frame)
            if self.size <= ANSWER_BYTES_MAX:
                self.frames.append(frame)

    @property
    def is_too_large(self) -> bool:
        return self.size > ANSWER_BYTES_MAX

    @property
    def sum(self) -> tuple[list[bytes], list[bytes]]:
        """Its rows in any order, and its tags. Descriptions name tables by numbers, which differ."""
        return (
            sorted(frame for frame in self.frames if frame[0] == _ROW),
            [frame for frame in self.frames if frame[0] in (_COMPLETE, _EMPTY)],
        )

    def reply(self, session: Session) -> bytes:
        if self._asked.is_simple:
            return b"".join(self.frames)
        before = self._asked.before_rows(session, self.statement, self.portal)
        return before + b"".join(self.frames) + self._asked.behind_rows(session)


class Work:
    """One statement on its way through the shards.

    Attributes:
        running: where it is just now, if a client's cancel may stop it there.
        is_cancelled: the client has asked for that, perhaps between two shards.
    """

    def __init__(self, session: Session, asked: Asked, shards: Sequence[str]) -> None:
        self.session = session
        self.shards = shards
        self.running: Server | None = None
        self.is_cancelled = False
        self._asked = asked

    async def to_its_end(self, work: Coroutine[Any, Any, Answer]) -> bytes:
        """The client's reply. Goes on without the client where that is gone."""
        task = self.session.router.in_background(work)
        while True:
            try:
                return (await asyncio.shield(task)).reply(self.session)
            except asyncio.CancelledError:
                if self.session.is_closing or task.cancelled():
                    raise
                self.is_cancelled = True
                if self.running is not None:
                    self.session.router.cancel_at(self.running)

    async def ask(self, server: Server) -> Answer:
        """The statement, once. Raises ServerError, ServerLost."""
        answer = Answer(self._asked)
        self.running = server
        try:
            if self._asked.is_simple:
                done = server.run(self._asked.text, answer.take)
            else:
                data, owed = self._asked.opening(self._asked.text)
                data += messages.execute(b"") + messages.SYNC
                done = server.exchange(data, [*owed, Owed.EXECUTE, Owed.SYNC], answer.take)
            if self.is_cancelled:
                self.session.router.cancel_at(server)
            await done
        finally:
            self.running = None
        return answer

    async def run_each(self) -> Answer:
        """One shard after the other; the first one's answer."""
        done: list[Answer] = []
        for number, shard in enumerate(self.shards):
            try:
                lent = await gathering.take(self.session, shard)
                try:
                    done.append(await self.ask(lent.server))
                finally:
                    gathering.give_back(self.session, lent)
            except (NoServer, ServerError, ServerLost) as error:
                if not done and not isinstance(error, ServerLost):
                    raise
                left = self.shards[number + 1 :]
                raise placing.Failed(_half_done(error, self.shards[:number], shard, left)) from None
        return done[0]


def _half_done(error: NoServer | ServerError | ServerLost, done: Sequence[str], at: str, left: Sequence[str]) -> bytes:
    sqlstate = "08006" if isinstance(error, ServerLost) else error.sqlstate
    here = f"on {at} nobody knows" if isinstance(error, ServerLost) else f"not on {', '.join([at, *left])}"
    more = f", not on {', '.join(left)}" if isinstance(error, ServerLost) and left else ""
    return messages.error_response(
        sqlstate,
        f"{error.message}; the statement is done on {', '.join(done) or 'no shard'}, {here}{more}",
        hint="make the shards equal again: undo it where it is done, or do it where it is not, on each shard directly",
    )
