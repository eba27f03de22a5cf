"""Follows the catalog: what the router goes by, and who hears of it.

One thread with one connection. It beats, then reads, every quarter of D (`[router] confirm_s`), and reads at once when
something is announced. What it reads becomes a `View`, a value; each view that says something new is handed over.

    beat      the router lives: whoever changes who is read has to wait for it for D and a quarter from here
    read      routes, moves and phases as of one instant
    confirm   the view is good until D after that beat began, by this process's clock (I9)

A read between two beats makes a newer view and confirms nothing: a router that cannot beat is soon not waited for, so
it must not go on for longer than the others think. A catalog that is away changes nothing but that: the last view
stays, and it is asked again. An older epoch than the one that is known is never taken: a catalog that lost its tail
would lead back to a shard that gave the range away.

Statements that began under an older view may still be under way when a new one is handed over. Only the owner of the
sessions knows when none of them is left: it calls `acknowledge`, and this thread tells the catalog.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from shardmove.catalog.routers import Reading
from shardmove.catalog.shape import as_keyspace
from shardmove.catalog.store import Catalog
from shardmove.catalog.upgrade import HOOKS
from shardmove.config import Config
from shardmove.domain.errors import Failed, Refused, ServerChanged, ShardmoveError
from shardmove.domain.keys import KeyRange, KeyType, ascending
from shardmove.domain.moves import Direction, Keyspace, Outcome, State
from shardmove.domain.routes import Route, Routes, RouteTable

log = logging.getLogger("shardmove.router.epochs")

FOREVER: Final = float("inf")
RECONNECT_MIN_S = 0.1
RECONNECT_MAX_S = 2.0
STOP_PATIENCE_S = 5.0
DIFFERENCES_MAX = 1_000
"""Differences that wait to be recorded; beyond that they are counted only."""


@dataclass(frozen=True, slots=True)
class MoveFact:
    """A move that is not finished, as of a view.

    Attributes:
        phase: 1–5, who gets the reads and writes of the ranges.
        phase_number: rises with each change of the phase; what `fall_back` and the counters refer to.
        read_share: the part of the sessions whose reads go to the target, in phase 4.
        sample_rate: the part of the reads that are made on both sides and compared, in phase 3.
        outcome: how the newest attempt stands, None where there is none; it went in `direction`.
        mirrored_until: until then, on `time.monotonic()`, a commit in the ranges is mirrored before it is acknowledged:
            for ever in phase 4, and for a while after it, in which another router may not have heard that it ended.
    """

    id: str
    keyspace: str
    source: str
    target: str
    state: State
    phase: int
    phase_number: int
    read_share: float
    sample_rate: float
    ranges: tuple[KeyRange, ...]
    last_attempt: int
    outcome: Outcome | None
    direction: Direction | None
    mirrored_until: float


@dataclass(frozen=True, slots=True)
class View:
    """What the router goes by. `confirmed_at`: `time.monotonic()` before the beat that came before the read."""

    epoch: int
    routes: RouteTable
    keyspaces: Mapping[str, Keyspace]
    moves: Mapping[str, MoveFact]
    confirmed_at: float


def as_view(reading: Reading, confirmed_at: float, read_at: float) -> View:
    """The reading as a value. `read_at`: `time.monotonic()` when it had been read."""
    keyspaces = {row[0]: as_keyspace(*row) for row in reading.keyspaces}
    bounds = {name: keyspace.bound_type for name, keyspace in keyspaces.items()}
    found: dict[str, list[Route]] = {}
    for name, lower, upper, shard, move_id, held in reading.routes:
        found.setdefault(name, []).append(Route(bounds[name].range_of(lower, upper), shard, move_id, held))
    table = RouteTable(reading.epoch, {name: Routes.of(name, found[name]) for name in sorted(found)})
    until = {move_id: read_at + left_s for move_id, left_s in reading.mirror_left_s.items()}
    facts = (_as_fact(row, bounds[row[1]], until) for row in reading.moves)
    return View(reading.epoch, table, keyspaces, {fact.id: fact for fact in facts}, confirmed_at)


def _as_fact(row: list[Any], bound_type: KeyType, until: Mapping[str, float]) -> MoveFact:
    id_, keyspace, source, target, state, last_attempt, attempt, phase, number, share, sample, _, ranges = row
    return MoveFact(
        id=id_,
        keyspace=keyspace,
        source=source,
        target=target,
        state=State(state),
        phase=phase,
        phase_number=number,
        read_share=share,
        sample_rate=sample,
        ranges=ascending(bound_type.range_of(lower, upper) for lower, upper in ranges),
        last_attempt=last_attempt,
        outcome=Outcome(attempt[1]) if attempt else None,
        direction=Direction(attempt[0]) if attempt else None,
        mirrored_until=FOREVER if phase == 4 else until.get(id_, -FOREVER),
    )


class Epochs:
    """The follower's thread. Every method may be called from any thread, and none of them waits for the catalog.

    Args:
        name: what `status` calls this router.
        on_view: is handed each new view, in this class's thread; it should return soon.
    """

    def __init__(self, config: Config, *, name: str, on_view: Callable[[View], None]) -> None:
        self.id = uuid.uuid4().hex
        self.name = name
        self.view: View | None = None
        self.trouble: ShardmoveError | None = None
        """Why the catalog was not read when it was last tried."""
        self._config = config
        self._on_view = on_view
        self._confirm_s = config.router.confirm_s
        self._confirmed_at = -FOREVER
        self._acknowledged = 0
        self._wanted = 0
        self._jobs: deque[Callable[[Catalog], None]] = deque()
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._guard = threading.Lock()
        self._falling: dict[tuple[str, int], list[Future[bool]]] = {}
        self._differences = 0
        self._reading: Reading | None = None
        self._beaten_at = -FOREVER
        self._began: Future[None] = Future()
        self._stopping = threading.Event()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="epochs", daemon=True)

    # --- for everybody

    def start(self) -> None:
        """Returns when the first view was handed over.

        Raises Unreachable, Refused (a newer release made the catalog), ConfigurationError (missing, or an older one);
        the thread has ended then.
        """
        self._thread.start()
        self._began.result()

    def stop(self) -> None:
        """Takes the router out of the catalog, where that answers, and ends the thread. Safe to repeat."""
        self._stopping.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(STOP_PATIENCE_S)
        self._fail_falling(Failed("the router is ending"))

    def is_fresh(self, now: float) -> bool:
        """Whether the view may be used for a moving range at that time, on `time.monotonic()` (I9)."""
        return self.unconfirmed_s(now) < self._confirm_s

    def unconfirmed_s(self, now: float) -> float:
        """For how long the catalog has not confirmed the view."""
        return now - self._confirmed_at

    def acknowledge(self, epoch: int) -> None:
        """Nothing here is decided by an older epoch any more. Safe to repeat; only upwards."""
        with self._guard:
            if epoch <= self._wanted:
                return
            self._wanted = epoch
        self._wake()

    def fall_back(self, move_id: str, number: int, reason: str) -> Future[bool]:
        """Asks the catalog to put the move from phase 4 back to 3; done when it has answered.

        False where the phase is not that `number` any more. Fails with Unreachable and the like, also where the catalog
        is away already. Calls that come together are one.
        """
        asked: Future[bool] = Future()
        with self._guard:
            waiting = self._falling.setdefault((move_id, number), [])
            waiting.append(asked)
            is_first = len(waiting) == 1

        def ask(catalog: Catalog) -> None:
            answer = catalog.fall_back(move_id, number, self.name, reason)
            with self._guard:
                answered = self._falling.pop((move_id, number), [])
            for future in answered:
                if future.set_running_or_notify_cancel():
                    future.set_result(answer)

        if is_first:
            self._do(ask)
        return asked

    def _fail_falling(self, error: Exception) -> None:
        """Nobody waits for a catalog that is away: what follows from that is not for this thread to say."""
        with self._guard:
            falling, self._falling = self._falling, {}
        for future in (each for waiting in falling.values() for each in waiting):
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def count(
        self, fact: MoveFact, *, compared: int = 0, differing: int = 0, passes: int = 0, failures: int = 0
    ) -> None:
        """Adds to the counters of the move's phase, which gates look at; told to the catalog with the next beat."""
        given = {"compared": compared, "differing": differing, "passes": passes, "failures": failures}
        with self._guard:
            for what, number in given.items():
                self._counts[fact.id, fact.phase_number, what] += number

    def differs(self, fact: MoveFact, *, table: str, key: str, source_rows: str, target_rows: str) -> None:
        """Keeps both answers of a dual read in the catalog, and counts the difference; never in a log."""
        self.count(fact, differing=1)
        with self._guard:
            if self._differences >= DIFFERENCES_MAX:
                return
            self._differences += 1

        def record(catalog: Catalog) -> None:
            with self._guard:
                self._differences -= 1
            catalog.record_difference(
                fact.id, router=self.name, table=table, key=key, source_rows=source_rows, target_rows=target_rows
            )

        self._do(record)

    def _do(self, job: Callable[[Catalog], None]) -> None:
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):  # full: it is awake; closed: it has ended
            self._waker.send(b"x")

    # --- the thread

    def _run(self) -> None:
        pause_s = RECONNECT_MIN_S
        while not self._stopping.is_set():
            try:
                with Catalog.connect(
                    self._config.catalog_dsn, application_name="shardmove router", routes_file=self._config.routes_file
                ) as catalog:
                    self._follow(catalog)
                    return
            except ShardmoveError as error:
                self._note(error)
                self._fail_falling(error)
                if not self._began.done():
                    self._began.set_exception(error)
                    return
            except Exception as error:  # a follower that ends for good would let the router go stale for ever
                log.exception("unexpected trouble")
                if not self._began.done():
                    self._began.set_exception(error)
                    return
                self._fail_falling(error)
            pause_s = RECONNECT_MIN_S if self.is_fresh(time.monotonic()) else min(RECONNECT_MAX_S, pause_s * 2)
            self._stopping.wait(pause_s)

    def _note(self, error: ShardmoveError) -> None:
        if self.trouble is None or self.trouble.message != error.message:
            log.warning("the catalog cannot be followed: %s", error)
        self.trouble = error

    def _follow(self, catalog: Catalog) -> None:
        """Until it is to stop; then the router's row is gone. Raises where the catalog is lost."""
        catalog.listen_for_routes()
        self._beaten_at = -FOREVER
        with selectors.DefaultSelector() as selector:
            selector.register(catalog.fileno(), selectors.EVENT_READ)
            selector.register(self._wakened, selectors.EVENT_READ)
            while not self._stopping.is_set():
                if self._step(catalog):
                    continue
                selector.select(max(0.0, self._beaten_at + self._confirm_s / 4 - time.monotonic()))
                with suppress(BlockingIOError):
                    self._wakened.recv(4096)
        catalog.forget_router(self.id)

    def _step(self, catalog: Catalog) -> bool:
        """Whatever is due: acknowledgements first, because somebody waits for them. False where nothing was.

        What is announced while a statement runs is in memory, and makes no file readable: the last look, after which
        nothing is sent, has to come back empty.
        """
        is_acknowledged = self._acknowledge(catalog)
        is_due = time.monotonic() - self._beaten_at >= self._confirm_s / 4
        if is_due:
            self._beat(catalog)
        if catalog.take_announcements() or is_due:
            self._read(catalog, confirms=is_due)
        elif self._jobs:
            self._jobs.popleft()(catalog)
        else:
            return is_acknowledged
        return True

    def _acknowledge(self, catalog: Catalog) -> bool:
        wanted = self._wanted
        if wanted <= self._acknowledged:
            return False
        catalog.acknowledge(self.id, wanted)
        self._acknowledged = wanted
        return True

    def _beat(self, catalog: Catalog) -> None:
        began = time.monotonic()
        catalog.beat_router(self.id, self.name, socket.gethostname(), os.getpid(), self._confirm_s, self._acknowledged)
        self._beaten_at = began
        with self._guard:
            counts, self._counts = self._counts, Counter()
        moves = {(move_id, number) for (move_id, number, _), counted in counts.items() if counted}
        for move_id, number in moves:
            given = {what: counts[move_id, number, what] for what in ("compared", "differing", "passes", "failures")}
            catalog.report_traffic(move_id, number, **given)

    def _read(self, catalog: Catalog, *, confirms: bool) -> None:
        reading = catalog.reading()
        read_at = time.monotonic()
        if reading.hook != HOOKS[-1].number:
            raise Refused(
                "version skew: the catalog was upgraded by a newer release", hint="start the router of that release"
            )
        if self._reading is not None and reading.epoch < self._reading.epoch:
            raise ServerChanged(
                f"the catalog is at epoch {reading.epoch}, and was at {self._reading.epoch}: it lost its last commits",
                hint="bring the catalog's last state back; the router goes on by what it knows until then",
            )
        if not reading.says_the_same(self._reading):
            self.view = as_view(reading, self._beaten_at, read_at)
            self._on_view(self.view)
            self._reading = reading
        if confirms:  # behind the view: whoever sees it confirmed can see which one is
            self._confirmed_at = self._beaten_at
            self.trouble = None
        if not self._began.done():
            self._began.set_result(None)
