"""Attending: what keeps moves healthy while no coordinator runs. Needs no lease; any number of attendants may run.

For each unfinished move: the mirror in the direction that its state says; attempts whose coordinator died are settled
and carried out; decided attempts that a shard has not taken yet are carried out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

import psycopg

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.domain.errors import MirrorRefused, ShardmoveError
from shardmove.domain.moves import MIRRORED, Move, Outcome
from shardmove.postgres.connect import Connection, connect
from shardmove.protocol import fence, ownership
from shardmove.protocol.catch_up import Mirror

log = logging.getLogger("shardmove.attend")

LOOK_EVERY_S = 0.5
PAUSE_BUSY_S = 0.01
PAUSE_HELD_S = 0.25
"""While a coordinator holds the move it mirrors by itself: the attendant only fills its gaps."""
PAUSE_IDLE_S = 0.1
PAUSE_TROUBLE_S = 1.0
MARK_EVERY_S = 3.0
END_PATIENCE_S = 5.0


def attend(config: Config, open_catalog: Callable[[], Catalog], stop: threading.Event) -> None:
    """Attends every unfinished move until `stop` is set; one thread a move. Trouble is logged and tried again."""
    attendants: dict[str, Attendant] = {}
    catalog: Catalog | None = None
    while not stop.is_set():
        try:
            catalog = catalog or open_catalog()
            unfinished = {move.id for move in catalog.moves(unfinished_only=True)}
            for move_id in unfinished - attendants.keys():
                attendants[move_id] = Attendant(config, open_catalog, move_id)
                attendants[move_id].start()
            for move_id in attendants.keys() - unfinished:
                attendants.pop(move_id).end()
        except ShardmoveError as error:
            log.warning("catalog trouble: %s", error)
        stop.wait(LOOK_EVERY_S)
    for attendant in attendants.values():
        attendant.end()
    if catalog is not None:
        catalog.close()


class Attendant(threading.Thread):
    """Attends one move until it is told to end."""

    def __init__(self, config: Config, open_catalog: Callable[[], Catalog], move_id: str) -> None:
        super().__init__(name=f"attendant of {move_id}", daemon=True)
        self.config = config
        self.open_catalog = open_catalog
        self.move_id = move_id
        self._stop_asked = threading.Event()
        self._connections: dict[str, Connection] = {}
        self._marked = 0.0
        self._is_held = False

    def end(self) -> None:
        self._stop_asked.set()
        self.join(END_PATIENCE_S)  # one that hangs with its server must not keep the others waiting

    def run(self) -> None:
        while not self._stop_asked.is_set():
            try:
                with self.open_catalog() as catalog:
                    self._attend(catalog)
            except (ShardmoveError, psycopg.Error) as error:
                log.warning("move %s: %s", self.move_id, error)
            except Exception:  # an attendant that ends for good would be missed by nobody
                log.exception("move %s: unexpected trouble", self.move_id)
            self._stop_asked.wait(PAUSE_TROUBLE_S)
        self._close()

    def _attend(self, catalog: Catalog) -> None:
        mirror: Mirror | None = None
        looked = 0.0
        try:
            while not self._stop_asked.is_set():
                if time.monotonic() - looked > LOOK_EVERY_S or mirror is None:
                    looked = time.monotonic()
                    move = catalog.move(self.move_id)
                    self._is_held = not holder_is_dead(catalog, move, self.config.limits.lease_ttl_s)
                    self._settle(catalog, move)
                    mirror = self._mirror_for(move, mirror)
                self._stop_asked.wait(self._pass(mirror, catalog))
        finally:
            if mirror is not None:
                mirror.close()

    def _pass(self, mirror: Mirror | None, catalog: Catalog) -> float:
        if mirror is None:
            return LOOK_EVERY_S
        try:
            done = mirror.catch_up(rows_max=self.config.limits.mirror_rows)
        except MirrorRefused:
            return PAUSE_IDLE_S  # between two states: the catalog is looked at again soon
        except psycopg.errors.LockNotAvailable:
            return 0.0  # another catch-up is at it, perhaps of a coordinator that stands still in it: is that one dead?
        if time.monotonic() - self._marked > MARK_EVERY_S:
            self._marked = time.monotonic()
            with suppress(ShardmoveError):  # the mark is for `status` only
                catalog.mark_attended(self.move_id, datetime.now(UTC))
        if self._is_held:
            return PAUSE_HELD_S
        return PAUSE_BUSY_S if done.keys else PAUSE_IDLE_S

    def _mirror_for(self, move: Move, known: Mirror | None) -> Mirror | None:
        """A mirror for the direction that the state says, or None where there is nothing to mirror."""
        if known is not None and (move.state not in MIRRORED or known.direction is not move.flow):
            known.close()
            known = None
        if known is None and move.state in MIRRORED:
            dsn = {shard: self.config.shard_dsn(shard) for shard in (move.source, move.target)}
            known = Mirror.open(move, move.flow, None, dsn)
            try:
                known.bound_waits(int(LOOK_EVERY_S * 1000), locks_only=True)
            except BaseException:
                known.close()
                raise
        return known

    # --- attempts

    def _settle(self, catalog: Catalog, move: Move) -> None:
        """Abandons an attempt whose coordinator is dead; carries out what is decided and not yet done."""
        if move.last_attempt == 0:
            return
        attempt = catalog.attempt(move.id, move.last_attempt)
        if attempt.outcome is Outcome.OPEN:
            if not holder_is_dead(catalog, move, self.config.limits.lease_ttl_s):
                return
            log.info("move %s: attempt %s was left open by a dead coordinator", move.id, attempt.number)
        elif move.state not in MIRRORED or ownership.is_carried_out(attempt, move, self._connect):
            return
        ownership.settle(catalog, move, attempt.number, self._connect, reason="the coordinator died")

    def _connect(self, shard: str) -> Connection:
        known = self._connections.get(shard)
        if known is None or known.closed or known.broken:
            known = connect(self.config.shard_dsn(shard), application_name=fence.application_name(self.move_id))
            self._connections[shard] = known
        return known

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()


def holder_is_dead(catalog: Catalog, move: Move, ttl_s: float) -> bool:
    """Nobody holds the move, or who did is gone or silent. It says when to act; safety never depends on it."""
    holder = catalog.holder(move.id)
    return holder is None or not holder.is_connected or holder.silent_s > ttl_s
