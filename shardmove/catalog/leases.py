"""Leases: one coordinator at a time holds a move.

Two things say that a holder lives: a session advisory lock, which the server lets go when the connection dies, and a
heartbeat, for the holder that hangs with its connection up. Neither is what safety rests on: that is the lease's
number. It only rises, and every effect is conditional on it, so a holder that was taken for dead and wakes up changes
nothing (I8).
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import LiteralString, Self

from shardmove.catalog.attempts import Attempts
from shardmove.catalog.session import Session
from shardmove.domain import points
from shardmove.domain.errors import Failed, LeaseHeld, LeaseLost, ShardmoveError
from shardmove.domain.points import Effect

TAKEOVERS_MAX = 5
"""How many silent holders one acquisition ends before it gives up: the others are competing for the same lease."""
TERMINATION_WAIT_MS = 5_000


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a move. `silent_s`: seconds since the last beat, by the catalog's clock."""

    name: str
    host: str
    process_id: int
    since: datetime
    silent_s: float
    is_connected: bool
    backend_pid: int
    backend_start: datetime

    def __str__(self) -> str:
        return f"{self.name} (process {self.process_id} on {self.host}) since {self.since:%Y-%m-%d %H:%M:%S} UTC"


_HOLDER: LiteralString = """
    SELECT l.holder, l.host, l.process_id, l.acquired_at,
           extract(epoch FROM clock_timestamp() - l.beat_at)::double precision,
           EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = l.backend_pid AND a.backend_start = l.backend_start),
           l.backend_pid, l.backend_start
    FROM shardmove_catalog.lease l WHERE l.move_id = %s AND l.holder IS NOT NULL
"""


class LeaseSession(Session):
    """The lease's own connection. It does not reconnect: its death is the lease's end."""

    def take(self, move_id: str, name: str) -> int | None:
        """The new number; None where another session has the lock. Raises NotFound."""
        query = "SELECT * FROM shardmove_catalog.take_lease(%s, %s, %s, %s)"
        number = self._changed(Effect.TAKE_LEASE, query, (move_id, name, socket.gethostname(), os.getpid()))
        return None if number is None else int(number)

    def holder(self, move_id: str) -> Holder | None:
        rows = self._rows(_HOLDER, (move_id,))
        return Holder(*rows[0]) if rows else None

    def terminate(self, holder: Holder) -> None:
        """Ends the holder's backend, if it is that backend still, and waits until it is gone."""
        with points.around(Effect.END_HOLDER):
            self._rows(
                "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s",
                (TERMINATION_WAIT_MS, holder.backend_pid, holder.backend_start),
            )

    def beat(self, move_id: str, number: int) -> None:
        self._changed(Effect.BEAT, "SELECT shardmove_catalog.beat(%s, %s)", (move_id, number))

    def give_back(self, move_id: str, number: int) -> None:
        """The lock goes with it: who stood still behind this would be in everybody's way, and be named nowhere."""
        query = """
            WITH given AS (UPDATE shardmove_catalog.lease SET holder = NULL WHERE move_id = %s AND number = %s)
            SELECT pg_catalog.pg_advisory_unlock_all()"""
        self._changed(Effect.GIVE_BACK, query, (move_id, number))


class Lease:
    """A move, held. A thread of its own beats every `ttl_s / 4` until it is released or lost.

    Attributes:
        number: what every effect on the move is conditional on.
        lost: set once a beat found the lease taken over or its connection dead. It is never cleared.
    """

    def __init__(self, session: LeaseSession, move_id: str, number: int, ttl_s: float) -> None:
        self.move_id = move_id
        self.number = number
        self.lost = threading.Event()
        self._session = session
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_beating, args=(ttl_s / 4,), name=f"lease of {move_id}", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def beat(self) -> None:
        """Says that the holder lives. Raises LeaseLost, for good, where the lease is not ours any more."""
        with self._guard:
            try:
                self._session.beat(self.move_id, self.number)
            except Failed as error:
                self.lost.set()
                raise LeaseLost(
                    f"move {self.move_id}: lease {self.number} is lost: {error}", hint=error.hint
                ) from error

    def release(self) -> None:
        """Lets the next one take the move at once. Safe to repeat, and on a lease that is lost."""
        self._stop.set()
        self._thread.join()
        with self._guard:
            try:
                self._session.give_back(self.move_id, self.number)
            except Failed:
                self.lost.set()  # a dead connection has let go already
            self._session.close()

    def _keep_beating(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            try:
                self.beat()
            except ShardmoveError:
                self.lost.set()
                return


class Leases(Attempts):
    def acquire(self, move_id: str, *, holder: str, ttl_s: float) -> Lease:
        """Takes the move's lease, with a number above every earlier one.

        A holder whose connection is gone is succeeded at once; one that was silent for longer than `ttl_s` has its
        backend ended first. After a takeover: raise the number on the shards, then read the move's state.

        Raises LeaseHeld, naming who holds it, and NotFound; nothing is changed then.
        """
        session = LeaseSession(
            self._dsn, application_name=f"{self._application_name} lease {move_id}", reconnects=False
        )
        try:
            return Lease(session, move_id, _take(session, move_id, holder, ttl_s), ttl_s)
        except BaseException:
            session.close()
            raise

    def holder(self, move_id: str) -> Holder | None:
        """Who took the move's lease last and has not released it; None where nobody."""
        rows = self._rows(_HOLDER, (move_id,))
        return Holder(*rows[0]) if rows else None


def _take(session: LeaseSession, move_id: str, name: str, ttl_s: float) -> int:
    for _ in range(TAKEOVERS_MAX):
        number = session.take(move_id, name)
        if number is not None:
            return number
        present = session.holder(move_id)
        if present is None:
            continue  # released, or being taken by another, this very moment
        if present.silent_s <= ttl_s:
            raise LeaseHeld(
                f"move {move_id} is held by {present}",
                hint=f"stop that process, or wait until it was silent for {ttl_s:g} s",
            )
        session.terminate(present)
    raise LeaseHeld(f"move {move_id} is being taken by somebody else at this moment", hint="try again")
