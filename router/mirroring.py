"""What a router does for moves beside routing: it mirrors what it has just committed, and finishes what is decided.

Neither needs a lease: anyone may run a catch-up, or carry out a decided attempt, at any time. Both go over connections
of their own, in a thread for each move and kind of work, which starts when it is asked for and ends after a while
without work. Whoever asks gets a Future, and bounds its waiting by itself: a server that hangs makes a thread hang,
never the router. Requests that come while one is under way are answered together by the next.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import psycopg

from router.epochs import Epochs
from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.domain.errors import Failed, MirrorRefused, ShardmoveError, Unreachable
from shardmove.domain.moves import MIRRORED, Direction, Move, Outcome, State
from shardmove.postgres.connect import Connection, connect, explain, is_unreachable
from shardmove.protocol import fence, ownership
from shardmove.protocol.catch_up import Mirror

log = logging.getLogger("shardmove.router.mirroring")
Result = TypeVar("Result")

APPLICATION_NAME: Final = "shardmove router"
IDLE_S = 60.0
"""A thread that had nothing to do for so long ends, and closes its connections."""
COALESCE_S = 0.003
"""Commits within this time are carried by one pass, unless somebody waits for it."""
RETRY_S = 1.0
RETRIES_MAX = 10
"""A pass that failed is tried again so often; after that the next commit, or an attendant, begins anew."""
PAUSE_TROUBLE_S = 0.05
WAIT_MS = 5_000
"""No statement of a pass runs, and no lock is waited for, for longer than this."""
PASSES_MAX = 50
MOVES_MAX = 64
"""Moves that one router has threads for."""
STOP_PATIENCE_S = 5.0


class Mirroring:
    """Catch-ups and openings for every move. All methods may be called from any thread; none of them waits.

    Attributes:
        troubles: the last thing that went wrong, per move; gone once it goes well.
    """

    def __init__(self, config: Config, epochs: Epochs) -> None:
        self.troubles: dict[str, str] = {}
        self._config = config
        self._epochs = epochs
        self._carriers: dict[str, _Carrier] = {}
        self._openers: dict[str, _Opener] = {}
        self._guard = threading.Lock()
        self._is_stopping = False

    def wake(self, move_id: str) -> None:
        """Something was committed in a moving range: it is carried to the other side soon."""
        with suppress(Failed):
            self._carrier(move_id).ask(None)

    def pass_after(self, move_id: str) -> Future[None]:
        """Done when what was committed before this call is on the other side: by catch-ups that began after it, up to
        one that left nothing behind. Fails where such a pass does; one that is not mirrored any more is done."""
        asked: Future[None] = Future()
        try:
            self._carrier(move_id).ask(asked)
        except Failed as error:
            asked.set_exception(error)
        return asked

    def ensure_open(self, move_id: str) -> Future[bool]:
        """Looks at the move's newest attempt in the catalog, as it is after this call, and carries it out.

        True once the fence of who owns the range by it is open; False while the attempt is not decided (an attendant
        settles it where its coordinator is dead). Ask again until then.
        """
        asked: Future[bool] = Future()
        try:
            self._helper(self._openers, _Opener, move_id).ask(asked)
        except Failed as error:
            asked.set_exception(error)
        return asked

    def stop(self) -> None:
        """Ends the threads; what is asked for still fails. Safe to repeat."""
        with self._guard:
            self._is_stopping = True
            helpers: list[_Carrier | _Opener] = [*self._carriers.values(), *self._openers.values()]
        for helper in helpers:
            helper.stop()
        for helper in helpers:
            helper.join(STOP_PATIENCE_S)

    def _carrier(self, move_id: str) -> _Carrier:
        return self._helper(self._carriers, _Carrier, move_id)

    def _helper(self, helpers: dict[str, HelperT], kind: type[HelperT], move_id: str) -> HelperT:
        """The one that there is, or a new one. Raises Failed where there are too many."""
        with self._guard:
            if self._is_stopping:
                raise Failed("the router is ending")
            if move_id not in helpers:
                self._make_room(helpers, move_id)
                helpers[move_id] = kind(self._config, self._epochs, move_id, self.troubles)
            return helpers[move_id]

    def _make_room(self, helpers: dict[str, HelperT], move_id: str) -> None:
        if len(helpers) < MOVES_MAX:
            return
        for known in [known for known, helper in helpers.items() if helper.is_idle]:
            del helpers[known]
        if len(helpers) >= MOVES_MAX:
            raise Failed(f"{MOVES_MAX} moves are under way here already: nobody looks after move {move_id}")


class _Helper(ABC, Generic[Result]):
    """A thread that answers requests for one move, while there are any."""

    def __init__(self, config: Config, epochs: Epochs, move_id: str, troubles: dict[str, str]) -> None:
        self.config = config
        self.epochs = epochs
        self.move_id = move_id
        self._troubles = troubles
        self._changed = threading.Condition()
        self._waiting: list[Future[Result]] = []
        self._is_wanted = False
        self._is_stopping = False
        self._failures = 0
        self._thread: threading.Thread | None = None

    def ask(self, future: Future[Result] | None) -> None:
        with self._changed:
            if self._is_stopping:
                raise Failed("the router is ending")
            if future is not None:
                self._waiting.append(future)
            self._is_wanted = True
            if self._thread is None:
                name = f"{type(self).__name__.strip('_').lower()} of {self.move_id}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            else:
                self._changed.notify_all()

    @property
    def is_idle(self) -> bool:
        return self._thread is None

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for future in waiting:
            _fail(future, Failed("the router is ending"))

    def join(self, timeout_s: float) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            while self._awaits_work():
                self._work()
            self.close()
            with self._changed:
                if self._is_stopping or not self._is_wanted:
                    self._thread = None
                    return

    def _awaits_work(self) -> bool:
        """True once there is something to do. False where there was nothing for long."""
        with self._changed:
            if self._failures:
                self._changed.wait_for(lambda: self._is_stopping, PAUSE_TROUBLE_S)
                self._changed.wait_for(lambda: self._waiting or self._is_stopping, RETRY_S)
            self._changed.wait_for(lambda: self._is_wanted or self._is_stopping, IDLE_S)
            if self._is_wanted and not self._failures:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping, COALESCE_S)
            return self._is_wanted and not self._is_stopping

    def _work(self) -> None:
        with self._changed:
            self._is_wanted = False
            asked, self._waiting = self._waiting, []
        asked = [future for future in asked if future.set_running_or_notify_cancel()]
        try:
            self.serve(asked)
        except Exception as error:
            self._failed(asked, error)
        else:
            self._failures = 0
            self._troubles.pop(self.move_id, None)

    def _failed(self, asked: list[Future[Result]], error: Exception) -> None:
        """Remembers it, tells those who wait, and tries again later what was woken for."""
        ours = _as_ours(error, self.move_id)
        if self._troubles.get(self.move_id) != ours.message:
            log.warning("move %s: %s", self.move_id, ours)
        self._troubles[self.move_id] = ours.message
        self.close()
        with self._changed:
            self._failures += 1
            self._is_wanted = self._is_wanted or self._failures < RETRIES_MAX
        for future in asked:
            _fail(future, ours)

    @abstractmethod
    def serve(self, asked: list[Future[Result]]) -> None:
        """Answers all of them; raises what went wrong, for those that it has not answered."""

    @abstractmethod
    def close(self) -> None:
        """Closes the connections; the next request opens others."""

    def open_catalog(self) -> Catalog:
        return Catalog.connect(
            self.config.catalog_dsn, application_name=APPLICATION_NAME, routes_file=self.config.routes_file
        )


HelperT = TypeVar("HelperT", bound=_Helper[Any])


class _Carrier(_Helper[None]):
    """Catch-ups of one move, in the direction that its state says."""

    def __init__(self, config: Config, epochs: Epochs, move_id: str, troubles: dict[str, str]) -> None:
        super().__init__(config, epochs, move_id, troubles)
        self._mirror: Mirror | None = None

    def serve(self, asked: list[Future[None]]) -> None:
        if self._direction is not None:
            try:
                self._catch_up(must_be_empty=bool(asked))
            except MirrorRefused:
                self.close()
                if not self._has_turned():
                    raise
            except Exception:
                self._count(failures=1)
                raise
        for future in asked:
            future.set_result(None)

    @property
    def _direction(self) -> Direction | None:
        """The way that changes flow; None where nothing is mirrored, by all that is known."""
        view = self.epochs.view
        fact = view.moves.get(self.move_id) if view is not None else None
        if fact is None or fact.state not in MIRRORED:
            return None
        return Direction.BACK if fact.state is State.SWITCHED else Direction.FORWARD

    def _has_turned(self) -> bool:
        """Whether the range has changed its owner since the view: then all that was committed here went along."""
        with self.open_catalog() as catalog:
            move = catalog.move(self.move_id)
        return move.state not in MIRRORED or move.flow is not self._direction

    def _catch_up(self, *, must_be_empty: bool) -> None:
        """Passes until one leaves nothing behind at its snapshot; while rows are being copied, until one carries
        nothing more."""
        mirror = self._opened()
        for _ in range(PASSES_MAX):
            done = mirror.catch_up(rows_max=self.config.limits.mirror_rows)
            self._count(passes=1)
            if done.is_empty or not (must_be_empty or done.keys):
                return
        raise Failed(f"move {self.move_id}: the journal was not empty after {PASSES_MAX} catch-ups")

    def _opened(self) -> Mirror:
        if self._mirror is not None and self._mirror.direction is not self._direction:
            self.close()
        if self._mirror is None:
            with self.open_catalog() as catalog:
                move = catalog.move(self.move_id)
            self._mirror = Mirror.open(move, move.flow, None, _dsn(self.config, move))
            self._mirror.bound_waits(WAIT_MS)
        return self._mirror

    def close(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    def _count(self, **counted: int) -> None:
        view = self.epochs.view
        fact = view.moves.get(self.move_id) if view is not None else None
        if fact is not None:
            self.epochs.count(fact, **counted)


class _Opener(_Helper[bool]):
    """Carries out decided attempts of one move."""

    def __init__(self, config: Config, epochs: Epochs, move_id: str, troubles: dict[str, str]) -> None:
        super().__init__(config, epochs, move_id, troubles)
        self._catalog: Catalog | None = None
        self._shards: dict[str, Connection] = {}

    def serve(self, asked: list[Future[bool]]) -> None:
        self._catalog = self._catalog or self.open_catalog()
        move = self._catalog.move(self.move_id)
        if move.state not in MIRRORED or move.last_attempt == 0:
            _answer(asked, True)
            return
        attempt = self._catalog.attempt(move.id, move.last_attempt)
        if attempt.outcome is Outcome.FLIPPED:  # what statements wait for comes first
            receiver = move.receiver(attempt.direction)
            ownership.open_for(attempt, move, receiver, self._connect(receiver))
            _answer(asked, True)
        ownership.carry_out(attempt, move, self._connect)
        _answer(asked, attempt.outcome is not Outcome.OPEN)

    def _connect(self, shard: str) -> Connection:
        known = self._shards.get(shard)
        if known is None or known.closed or known.broken:
            name = fence.application_name(self.move_id)
            known = self._shards[shard] = connect(self.config.shard_dsn(shard), application_name=name)
        return known

    def close(self) -> None:
        for connection in self._shards.values():
            connection.close()
        self._shards.clear()
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None


def _dsn(config: Config, move: Move) -> Mapping[str, str]:
    return {shard: config.shard_dsn(shard) for shard in (move.source, move.target)}


def _answer(asked: list[Future[bool]], answer: bool) -> None:
    for future in asked:
        if not future.done():
            future.set_result(answer)


def _fail(future: Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _as_ours(error: Exception, move_id: str) -> ShardmoveError:
    """Never with values of rows in it: what a server says may quote them."""
    match error:
        case ShardmoveError():
            return error
        case psycopg.Error():
            kind = Unreachable if is_unreachable(error) else Failed
            return kind(f"move {move_id}: a server said: {explain(error)}")
        case _:
            return Failed(f"move {move_id}: unexpected {type(error).__name__}")
