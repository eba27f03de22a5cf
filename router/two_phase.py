"""A write to a table that every shard holds whole: one transaction on all of them.

    all shards           a session each, with an advisory lock of the write's name (see `router/recovering.py`)
    each, decider first  BEGIN; the statement; its answer is the same as the decider's; PREPARE TRANSACTION
    the decider          COMMIT PREPARED      this commit is the decision
    the others           COMMIT PREPARED

Whatever goes wrong before the decision: rolled back, on the others first, on the decider last, and there only if the
others are known to be rolled back. Where that is not known, or a commit behind the decision fails, the sessions are
closed, and the rest is left to recovery.

The decider is the first shard, for all routers: whoever writes the same rows waits for its locks, so nobody waits in a
circle. Readers may see the write on one shard before the other.
"""

from __future__ import annotations

import itertools
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from router import gathering, placing
from router.gathering import Lent
from router.recovering import GID_BYTES_MAX, Outcome, gid_of, lock_statement, quoted, unlock_statement
from router.server import Server, ServerError, ServerLost
from router.units import Refusal
from shardmove.domain import points
from shardmove.wire import messages
from shardmove.wire.messages import IDLE

if TYPE_CHECKING:
    from router.everywhere import Answer, Work

_ROW = ord("D")
_NOTICE_DEATH: Final = (
    b"SELECT pg_catalog.set_config(name, '1s', true) FROM pg_catalog.pg_settings"
    b" WHERE name = 'client_connection_check_interval'"
)
"""The session of a router that died ends soon, also while it waits for a lock."""
_numbers = itertools.count(1)


class _State(Enum):
    OPEN = auto()
    """Not prepared: its end is its rollback."""
    PREPARING = auto()
    PREPARED = auto()


async def write(work: Work) -> Answer:
    """The first shard's answer. Raises Refused, NoServer, ServerError, ServerLost; nothing is written then, but where
    the refusal says that this is not known (08007)."""
    two_phase = _TwoPhase(work)
    try:
        await two_phase.connect()
        try:
            answer = await two_phase.prepare()
        except BaseException:
            await two_phase.undo()
            raise
        await two_phase.decide()
        await two_phase.follow()
        return answer
    finally:
        await two_phase.end()


class _TwoPhase:
    def __init__(self, work: Work) -> None:
        self._work = work
        self._session = work.session
        self._router = work.session.router
        self._gid = gid_of(self._router.epochs.id, next(_numbers), work.shards[0])
        self._name = quoted(self._gid)
        self._lent: list[Lent] = []
        self._states: dict[Server, _State] = {}

    async def connect(self) -> None:
        """A session on each shard, which says that it can, and holds its lock."""
        if len(self._gid.encode()) > GID_BYTES_MAX:
            raise placing.Refused(Refusal("54000", f"the name of shard {self._work.shards[0]} is too long"))
        for shard in self._work.shards:
            self._lent.append(await gathering.take(self._session, shard))
            await self._require_prepared(self._lent[-1].server)
        for server in self._servers:
            await server.run(lock_statement(self._gid))

    @property
    def _servers(self) -> list[Server]:
        return [each.server for each in self._lent]

    async def _require_prepared(self, server: Server) -> None:
        if server.shard in self._router.prepares:
            return
        frames = await server.run(b"SHOW max_prepared_transactions")
        values = [messages.decode_data_row(frame[5:])[0] for frame in frames if frame[0] == _ROW]
        if values == [b"0"]:
            raise placing.Refused(
                Refusal(
                    "0A000",
                    f"a write of a reference table is prepared on every shard, and shard {server.shard} allows none",
                    "set max_prepared_transactions there, to one per connection of the routers, and restart it",
                )
            )
        self._router.prepares.add(server.shard)

    async def prepare(self) -> Answer:
        first: Answer | None = None
        for server in self._servers:
            self._states[server] = _State.OPEN
            await server.run(b"BEGIN")
            await server.run(_NOTICE_DEATH)
            answer = await self._work.ask(server)
            first = first or answer
            self._compare(first, answer, server.shard)
            self._states[server] = _State.PREPARING
            await server.run(b"PREPARE TRANSACTION" + self._name)
            self._states[server] = _State.PREPARED
            points.reach("two_phase.after_prepare")
        assert first is not None
        return first

    def _compare(self, first: Answer, answer: Answer, shard: str) -> None:
        if answer.is_too_large:
            raise placing.Refused(
                Refusal("54000", "the rows that the write returns are too many to compare", "leave RETURNING out")
            )
        if answer.sum != first.sum:
            raise placing.Refused(
                Refusal(
                    "55000",
                    f"shards {self._work.shards[0]} and {shard} give different answers: nothing was written",
                    "compare what the reference tables hold there, and give every value yourself instead of a default",
                )
            )

    async def undo(self) -> None:
        """On the others first: a decider without it would say that it was committed."""
        try:
            for server in reversed(self._servers):
                await self._undo_at(server)
        except (ServerError, ServerLost):
            self._leave_to_recovery()

    async def _undo_at(self, server: Server) -> None:
        state = self._states.get(server)
        if state is _State.PREPARED or (state is _State.PREPARING and server.is_closed):
            await server.run(b"ROLLBACK PREPARED" + self._name)
        elif not server.is_closed and server.status != IDLE:
            await server.run(b"ROLLBACK")

    async def decide(self) -> None:
        points.reach("two_phase.before_decision")
        try:
            await self._servers[0].run(b"COMMIT PREPARED" + self._name)
        except (ServerError, ServerLost) as error:
            self._leave_to_recovery()
            match await self._router.resolve(self._gid):
                case Outcome.COMMITTED:
                    return
                case Outcome.ROLLED_BACK:
                    raise placing.Refused(
                        Refusal("40001", f"shardmove: {error.message}; the write was rolled back", "try again")
                    ) from None
                case _:
                    raise placing.Refused(
                        Refusal("08007", f"{error.message}; whether the write was committed is not known")
                    ) from None
        points.reach("two_phase.after_decision")

    async def follow(self) -> None:
        """What is decided, on the others."""
        try:
            for server in self._servers[1:]:
                await server.run(b"COMMIT PREPARED" + self._name)
                points.reach("two_phase.after_commit")
        except (ServerError, ServerLost):
            self._leave_to_recovery()

    def _leave_to_recovery(self) -> None:
        """Ends the sessions, and with them the locks."""
        for server in self._servers:
            server.abort()
        self._router.recover_soon()

    async def end(self) -> None:
        for lent in self._lent:
            try:
                if not lent.server.is_closed:
                    await lent.server.run(unlock_statement(self._gid))
            except (ServerError, ServerLost):
                lent.server.abort()
            gathering.give_back(self._session, lent)
