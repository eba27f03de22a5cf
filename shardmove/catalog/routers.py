"""Routers, and what they go by: who is alive and has heard of which epoch, and the traffic phase of each move.

A router beats first and reads then, and serves a moving range for no longer than its own `confirm_s` after that beat
began. So whose last beat is older than this, by the catalog's clock, serves none: it is not waited for, and before it
comes back it has read what is published now. Whoever changes who is read waits for all the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from shardmove.catalog.leases import Leases
from shardmove.catalog.session import translated
from shardmove.domain.errors import NotFound, Unreachable
from shardmove.domain.points import Effect

LOOK_EVERY_S = 0.02
"""Who waits for acknowledgements looks this often: an announcement may be missed, and a router may die."""
LISTED_FOR_S = 600
"""A router that is silent for longer is as good as forgotten; the next beat of any other one forgets it."""


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """A router as the catalog knows it. `silent_s`: since its last beat; `is_live`: it may be serving."""

    id: str
    name: str
    host: str
    process_id: int
    acknowledged: int
    silent_s: float
    is_live: bool

    def __str__(self) -> str:
        return f"{self.name} (process {self.process_id} on {self.host})"


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic phase of a move, 1–5, as of now.

    Attributes:
        number: rises with each change of the phase; what is counted below belongs to it.
        read_share: the part of the sessions whose reads go to the target (phase 4).
        sample_rate: the part of the reads that are made twice and compared (phase 3).
        age_s: since the phase was entered.
        compared: reads that were made on both sides; `differing`: how many of them differed.
        passes: catch-ups of routers that came through; `failures`: those that did not.
    """

    phase: int
    number: int
    read_share: float
    sample_rate: float
    age_s: float
    compared: int
    differing: int
    passes: int
    failures: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A read whose two answers differed. The rows are as the servers sent them."""

    move_id: str
    at: datetime
    router: str
    table: str
    key: str
    source_rows: str
    target_rows: str


_ROUTERS: LiteralString = """
    SELECT r.id, r.name, r.host, r.process_id, r.acknowledged,
           greatest(0, extract(epoch FROM clock_timestamp() - r.beat_at))::double precision,
           r.beat_at > clock_timestamp() - make_interval(secs => r.confirm_s * 1.25)
"""

# One statement: routes, moves and phases as of one instant.
_READING: LiteralString = """
    SELECT c.epoch,
           (SELECT max(number) FROM shardmove_catalog.upgrade_hook),
           (SELECT coalesce(jsonb_agg(jsonb_build_array(r.keyspace, r.lower, r.upper, r.shard, r.move_id, r.held)
                                      ORDER BY r.keyspace, r.lower NULLS FIRST), '[]')
            FROM shardmove_catalog.current_routes r),
           (SELECT coalesce(jsonb_agg(jsonb_build_array(
                       k.name, k.key_type, k.scheme, k.reference_tables,
                       coalesce((SELECT jsonb_object_agg(t.table_name, t.key_column)
                                 FROM shardmove_catalog.keyspace_table t WHERE t.keyspace = k.name), '{}'))
                       ORDER BY k.name), '[]')
            FROM shardmove_catalog.keyspace k),
           (SELECT coalesce(jsonb_agg(jsonb_build_array(
                       m.id, m.keyspace, m.source, m.target, m.state, m.last_attempt,
                       (SELECT jsonb_build_array(a.direction, a.outcome) FROM shardmove_catalog.attempt a
                        WHERE a.move_id = m.id AND a.number = m.last_attempt),
                       p.phase, p.number, p.read_share, p.sample_rate, p.reads_ended_epoch,
                       (SELECT jsonb_agg(jsonb_build_array(r.lower, r.upper) ORDER BY r.lower NULLS FIRST)
                        FROM shardmove_catalog.move_range r
                        WHERE r.move_id = m.id)) ORDER BY m.created_at, m.ordinal), '[]')
            FROM shardmove_catalog.move m JOIN shardmove_catalog.current_phases p ON p.move_id = m.id
            WHERE NOT m.is_finished),
           (SELECT coalesce(jsonb_object_agg(t.move_id, extract(epoch FROM t.reads_ended_at - clock_timestamp())
                       + 1.25 * (SELECT coalesce(max(confirm_s), 0) FROM shardmove_catalog.router)), '{}')
            FROM shardmove_catalog.traffic t WHERE t.reads_ended_at IS NOT NULL)
    FROM shardmove_catalog.cluster c
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a router goes by, as the catalog's own documents, of one instant.

    Two readings are equal where nothing changed. `mirror_left_s` (per move: for how long commits are to be mirrored
    before they are acknowledged, although nobody is to read the target any more) runs by itself, and is left out.
    """

    epoch: int
    hook: int
    routes: Sequence[Any]
    keyspaces: Sequence[Any]
    moves: Sequence[Any]
    mirror_left_s: dict[str, float]

    def says_the_same(self, other: Reading | None) -> bool:
        return other is not None and (self.epoch, self.routes, self.keyspaces, self.moves) == (
            other.epoch, other.routes, other.keyspaces, other.moves,
        )  # fmt: skip


class Routers(Leases):
    # --- what a router does

    def reading(self) -> Reading:
        """Routes, keyspaces, unfinished moves and their phases, as of one instant; one message."""
        row = self._rows(_READING)[0]
        return Reading(int(row[0]), int(row[1]), *row[2:])

    def beat_router(self, router_id: str, name: str, host: str, process_id: int, confirm_s: float, epoch: int) -> None:
        """The router lives, and has acknowledged that epoch. Makes its row where it is missing. Safe to repeat."""
        query = "SELECT shardmove_catalog.beat_router(%s, %s, %s, %s, %s, %s)"
        self._changed(Effect.BEAT_ROUTER, query, (router_id, name, host, process_id, confirm_s, epoch))

    def acknowledge(self, router_id: str, epoch: int) -> None:
        """Nothing at this router is decided by an older epoch any more. Safe to repeat; only upwards."""
        self._changed(Effect.ACKNOWLEDGE, "SELECT shardmove_catalog.acknowledge(%s, %s)", (router_id, epoch))

    def forget_router(self, router_id: str) -> None:
        """The router ends: nobody waits for it any more. Safe to repeat."""
        self._changed(Effect.FORGET_ROUTER, "DELETE FROM shardmove_catalog.router WHERE id = %s", (router_id,))

    def fall_back(self, move_id: str, number: int, router: str, reason: str) -> bool:
        """Puts a move from phase 4 back to 3, as a new epoch with an event; anyone may. Safe to repeat.

        `number` is that of the phase in which the trouble was met: where the phase was changed since, nothing happens,
        and False is returned.
        """
        query = "SELECT * FROM shardmove_catalog.fall_back(%s, %s, %s, %s)"
        published = self._changed(Effect.FALL_BACK, query, (move_id, number, router, reason))
        if published is not None:
            self._published()
        return published is not None

    def report_traffic(
        self, move_id: str, number: int, *, compared: int = 0, differing: int = 0, passes: int = 0, failures: int = 0
    ) -> None:
        """Adds to the counters of that number's phase; of another one it is dropped. Not safe to repeat."""
        query = "SELECT shardmove_catalog.report_traffic(%s, %s, %s, %s, %s, %s)"
        self._changed(Effect.REPORT_TRAFFIC, query, (move_id, number, compared, differing, passes, failures))

    def record_difference(
        self, move_id: str, *, router: str, table: str, key: str, source_rows: str, target_rows: str
    ) -> None:
        """Keeps both answers of a read that differed; of a move the newest 1,000. Not safe to repeat."""
        query = "SELECT shardmove_catalog.record_difference(%s, %s, %s, %s, %s, %s)"
        self._changed(Effect.RECORD_DIFFERENCE, query, (move_id, router, table, key, source_rows, target_rows))

    # --- what others see of them

    def routers(self) -> list[RouterRecord]:
        """Those that are alive, or were within the last ten minutes, by their names."""
        rows = self._rows(
            _ROUTERS + " FROM shardmove_catalog.router r"
            " WHERE r.beat_at > clock_timestamp() - make_interval(secs => %s) ORDER BY r.name, r.started_at",
            (LISTED_FOR_S,),
        )
        return [RouterRecord(*row) for row in rows]

    def late_routers(self, epoch: int) -> list[RouterRecord]:
        """Those that may act by an epoch before this one: alive, and they have not acknowledged it."""
        query = _ROUTERS + " FROM shardmove_catalog.late_routers(%s) r ORDER BY r.name, r.started_at"
        return [RouterRecord(*row) for row in self._rows(query, (epoch,))]

    def lagging_routers(self) -> list[RouterRecord]:
        """Those that are alive and act by an epoch that was followed by another one long ago, by their own measure."""
        query = (
            _ROUTERS + " FROM shardmove_catalog.late_routers((SELECT epoch FROM shardmove_catalog.cluster)) r"
            " LEFT JOIN shardmove_catalog.route_epoch e ON e.epoch = r.acknowledged + 1"
            " WHERE coalesce(e.published_at, '-infinity') < clock_timestamp() - make_interval(secs => r.confirm_s)"
            " ORDER BY r.name, r.started_at"
        )
        return [RouterRecord(*row) for row in self._rows(query)]

    def listen_for_acknowledgements(self) -> None:
        """From now on `await_acknowledgements` is woken by them. Safe to repeat."""
        self._rows("LISTEN shardmove_acknowledged")

    def await_acknowledgements(
        self, epoch: int, timeout_s: float, *, check: Callable[[], None] = lambda: None
    ) -> list[RouterRecord]:
        """Waits until no router may act by an older epoch, for so long at most; the ones that still may.

        A router that dies meanwhile is waited for until it has been silent for too long to be serving. Without any
        router it returns after one look.
        """
        deadline = time.monotonic() + timeout_s
        late = self.late_routers(epoch)
        while late and (left_s := deadline - time.monotonic()) > 0:
            check()
            self._wait_for_acknowledgement(min(left_s, LOOK_EVERY_S))
            late = self.late_routers(epoch)
        return late

    def _wait_for_acknowledgement(self, timeout_s: float) -> None:
        connection = self._connected()
        with translated(connection):
            for _ in connection.notifies(timeout=timeout_s, stop_after=1):
                pass

    # --- phases

    def traffic(self, move_id: str) -> Traffic:
        """Raises NotFound."""
        rows = self._rows(
            """SELECT phase, number, read_share, sample_rate,
                      greatest(0, extract(epoch FROM clock_timestamp() - since))::double precision,
                      compared, differing, passes, failures
               FROM shardmove_catalog.current_phases WHERE move_id = %s""",
            (move_id,),
        )
        if not rows:
            raise NotFound(f"there is no move {move_id}")
        return Traffic(*rows[0])

    def set_phase(
        self,
        move_id: str,
        before: int,
        after: int,
        *,
        lease_number: int,
        read_share: float = 0.0,
        sample_rate: float = 0.0,
        detail: Mapping[str, object] | None = None,
    ) -> int:
        """Another phase, share or sample, as a new epoch with an event; returns the epoch.

        Raises LeaseLost, IllegalTransition (not `ready`, or not in the phase `before` any more), Refused (a cutover
        attempt is open); nothing is changed then. After Unreachable it may have been done: look.
        """
        query = "SELECT shardmove_catalog.set_phase(%s, %s, %s, %s, %s, %s, %s)"
        parameters = (move_id, lease_number, before, after, read_share, sample_rate, Jsonb(dict(detail or {})))
        epoch = int(self._changed(Effect.SET_PHASE, query, parameters))
        self._published()
        return epoch

    def differences(self, move_id: str) -> list[Difference]:
        """What dual reads of a move found, the newest last. The rows hold values of the application."""
        rows = self._rows(
            """SELECT move_id, at, router, table_name, key, source_rows, target_rows
               FROM shardmove_catalog.difference WHERE move_id = %s ORDER BY id""",
            (move_id,),
        )
        return [Difference(*row) for row in rows]

    # --- following the catalog

    def listen_for_routes(self) -> None:
        """From now on announcements of new epochs make `file` readable."""
        self._rows("LISTEN shardmove_routes")

    def take_announcements(self) -> bool:
        """Whether anything was announced since the last call. Never waits. Raises Unreachable."""
        connection = self._connected()
        with translated(connection):
            return bool(list(connection.notifies(timeout=0)))

    def fileno(self) -> int:
        """The file to wait for until something is announced. Raises Unreachable where the connection is closed."""
        if self._connection.closed:
            raise Unreachable("the connection to the catalog is closed")
        return self._connection.fileno()
