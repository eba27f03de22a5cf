"""Cutover attempts: opened, then decided once, whoever decides and however often it is tried.

The row of an attempt is what a COMMIT in doubt is settled by: `abandon` and `flip` both turn it from open, under its
row lock, in the transaction that publishes what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import LiteralString

from psycopg.types.json import Jsonb

from shardmove.catalog.moves import Moves
from shardmove.catalog.routes import as_json, retried
from shardmove.domain.errors import IllegalTransition, NotFound
from shardmove.domain.moves import Attempt, Direction, Move, Outcome, State, check_transition
from shardmove.domain.points import Effect
from shardmove.domain.routes import Routes

_EDGES: Mapping[Direction, tuple[State, State]] = {
    Direction.FORWARD: (State.READY, State.SWITCHED),
    Direction.BACK: (State.SWITCHED, State.READY),
}


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt with its times. `stall_ms`: how long writes waited, where it was measured."""

    attempt: Attempt
    opened_at: datetime
    decided_at: datetime | None
    stall_ms: float | None
    reason: str | None


_ATTEMPTS: LiteralString = """
    SELECT move_id, number, direction, outcome, opened_at, decided_at, stall_ms, reason
    FROM shardmove_catalog.attempt
    WHERE (%(move)s::text IS NULL OR move_id = %(move)s) AND (%(number)s::bigint IS NULL OR number = %(number)s)
      AND (NOT %(open)s OR outcome = 'open')
    ORDER BY opened_at, move_id, number
"""


def unheld(routes: Routes, move_id: str) -> Routes:
    """The same routes with nothing held for the move."""
    return Routes.of(
        routes.keyspace,
        (replace(route, held=False) if route.move_id == move_id else route for route in routes.routes),
    )


class Attempts(Moves):
    def open_attempt(
        self, move_id: str, direction: Direction, *, lease_number: int, hold: Routes, base_epoch: int
    ) -> Attempt:
        """Opens the move's next attempt and publishes the routes that hold its range, in one transaction.

        Raises LeaseLost, IllegalTransition (the state does not allow the direction), Refused (one is open already),
        EpochConflict; nothing is changed then. After Unreachable: settle what `open_attempts()` shows.
        """
        number = self._changed(
            Effect.OPEN_ATTEMPT,
            "SELECT shardmove_catalog.open_attempt(%s, %s, %s, %s, %s)",
            (move_id, lease_number, direction.value, base_epoch, as_json(hold)),
        )
        self._published()
        return Attempt(move_id, int(number), direction, Outcome.OPEN)

    def flip(
        self,
        attempt: Attempt,
        *,
        lease_number: int,
        before: State,
        after: State,
        routes: Routes,
        base_epoch: int,
        detail: Mapping[str, object],
    ) -> int:
        """The cutover: attempt flipped, owner changed, state entered, event written, in one transaction and message.

        Only while epoch, state, lease number and "open" all hold, and where `routes` give the whole move to the
        attempt's receiver. Returns the epoch that it published.

        Raises EpochConflict (compute the routes anew and repeat), AttemptDecided, LeaseLost, IllegalTransition,
        Refused (another lease opened the attempt; the routes name another owner); nothing is changed then. After
        Unreachable it is in doubt: `settle_attempt` says how it ended.
        """
        check_transition(attempt.move_id, before, after)
        if _EDGES[attempt.direction] != (before, after):
            raise IllegalTransition(
                f"an attempt of move {attempt.move_id} to go {attempt.direction} cannot turn {before} into {after}"
            )
        epoch = self._changed(
            Effect.FLIP,
            "SELECT shardmove_catalog.flip(%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                attempt.move_id,
                attempt.number,
                lease_number,
                before.value,
                after.value,
                Jsonb(dict(detail)),
                base_epoch,
                as_json(routes),
            ),
        )
        self._published()
        return int(epoch)

    def abandon(self, move_id: str, number: int, *, reason: str, routes: Routes, base_epoch: int) -> Outcome:
        """Gives an open attempt up and publishes the routes in the same transaction; says how the attempt stands now.

        Anyone may, with or without the lease. Waits for a flip that is committing. An attempt that was decided before
        stays as it is, and nothing is published. Raises EpochConflict, NotFound; nothing is changed then. Safe to
        repeat.
        """
        outcome = self._changed(
            Effect.ABANDON,
            "SELECT shardmove_catalog.abandon(%s, %s, %s, %s, %s)",
            (move_id, number, reason, base_epoch, as_json(routes)),
        )
        self._published()
        return Outcome(outcome)

    def settle_attempt(self, move: Move, number: int, reason: str) -> Outcome:
        """Abandons the attempt if it is open still, with the move's range un-held, and says how it ended.

        It is what to call for a flip in doubt. The answer is final: FLIPPED or ABANDONED. Safe to repeat.
        """

        def once() -> Outcome:
            table = self.routes()
            routes = unheld(table[move.keyspace.name], move.id)
            return self.abandon(move.id, number, reason=reason, routes=routes, base_epoch=table.epoch)

        return retried(once)

    def attempt(self, move_id: str, number: int) -> Attempt:
        """Raises NotFound."""
        found = self._records(move_id, number, False)
        if not found:
            raise NotFound(f"move {move_id} has no attempt {number}")
        return found[0].attempt

    def attempts(self, move_id: str) -> list[AttemptRecord]:
        """All of a move's, in the order of their numbers."""
        return self._records(move_id, None, False)

    def open_attempt_of(self, move_id: str, lease_number: int) -> Attempt | None:
        """The attempt that this lease opened and nobody has decided, if there is one."""
        rows = self._rows(
            "SELECT number, direction FROM shardmove_catalog.attempt"
            " WHERE move_id = %s AND lease_number = %s AND outcome = 'open'",
            (move_id, lease_number),
        )
        return Attempt(move_id, rows[0][0], Direction(rows[0][1]), Outcome.OPEN) if rows else None

    def open_attempts(self) -> list[Attempt]:
        """Those of all moves that nobody has decided yet."""
        return [record.attempt for record in self._records(None, None, True)]

    def _records(self, move_id: str | None, number: int | None, open_only: bool) -> list[AttemptRecord]:
        rows = self._rows(_ATTEMPTS, {"move": move_id, "number": number, "open": open_only})
        return [AttemptRecord(Attempt(r[0], r[1], Direction(r[2]), Outcome(r[3])), *r[4:]) for r in rows]

    def record_stall(self, move_id: str, number: int, stall_ms: float) -> None:
        """How long the attempt held up writes, in milliseconds. Raises NotFound. Safe to repeat."""
        query: LiteralString = (
            "UPDATE shardmove_catalog.attempt SET stall_ms = %s WHERE move_id = %s AND number = %s RETURNING number"
        )
        if self._changed(Effect.RECORD_STALL, query, (stall_ms, move_id, number)) is None:
            raise NotFound(f"move {move_id} has no attempt {number}")
