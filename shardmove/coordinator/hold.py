"""A coordinator's hold on one move: its lease, its connections, and the move as it is now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg

from shardmove.catalog.leases import Lease
from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator.progress import Progress
from shardmove.domain.errors import EpochConflict, Interrupted, LeaseLost, Refused, ServerChanged, Unreachable
from shardmove.domain.moves import Direction, Move, State
from shardmove.domain.routes import Routes
from shardmove.postgres.connect import Connection, connect, is_unreachable, translated
from shardmove.postgres.introspect import Table
from shardmove.postgres.locks import Patience
from shardmove.protocol import fence, objects, ownership
from shardmove.protocol.catch_up import Mirror
from workers.executors import Executor

RETRIES_OF_A_TRANSITION = 20
PAUSE_LOOK_S = 1.0
"""How soon a running step sees that the move was paused."""

ROUTERS_PATIENCE_S = 15.0
"""How long routers are waited for before their reads' side is changed or erased; one that dies is let go sooner."""
SILENT_LOOK_S = 0.2


@dataclass(slots=True)
class Hold:
    """Everything that the steps of a move need. Not thread-safe, but for `stop` and `progress`.

    Attributes:
        stop: set it from anywhere, and the step under way ends at its next safe place with Interrupted.
        heeds_pause: so it does when somebody pauses the move; off where the move was paused when the hold began.
        unsettled: why the newest attempt could not be carried out at the takeover: a server has changed. Only `run` may
            go on then: it compares both sides first.
        creates_schema: tables that the target lacks are made there when the move begins.
        make_executor: who runs the workers' tasks; the process pool unless said otherwise.
    """

    config: Config
    catalog: Catalog
    lease: Lease
    move: Move
    stop: threading.Event
    progress: Progress
    make_executor: Callable[[], Executor]
    tables: tuple[Table, ...] = ()
    _connections: dict[str, Connection] = field(default_factory=dict)
    _executor: Executor | None = None
    heeds_pause: bool = True
    unsettled: ServerChanged | None = None
    creates_schema: bool = False
    _looked: float = 0.0

    @property
    def executor(self) -> Executor:
        """The workers of this run: started when first needed, shared by its steps, ended with the hold."""
        if self._executor is None:
            self._executor = self.make_executor()
        return self._executor

    # --- the two shards

    @property
    def dsn(self) -> Mapping[str, str]:
        return {name: self.config.shard_dsn(name) for name in (self.move.source, self.move.target)}

    def connection(self, shard: str) -> Connection:
        """The coordinator's own session on a shard, in autocommit; opened anew where it was lost."""
        known = self._connections.get(shard)
        if known is None or known.closed or known.broken:
            known = connect(self.config.shard_dsn(shard), application_name=fence.application_name(self.move.id))
            self._connections[shard] = known
        return known

    @property
    def source(self) -> Connection:
        return self.connection(self.move.source)

    @property
    def target(self) -> Connection:
        return self.connection(self.move.target)

    def mirror(self, direction: Direction) -> Mirror:
        """A mirror of its own connections, for the caller to close."""
        return Mirror.open(self.move, direction, self.tables, self.dsn)

    @property
    def patience(self) -> Patience:
        return Patience(self.config.limits.ddl_lock_timeout_ms, self.config.limits.ddl_patience_s)

    # --- the catalog

    def refresh(self) -> None:
        """Reads the move again, and the tables that were recorded when it began."""
        self.move = self.catalog.move(self.move.id)
        for shard in (self.move.source, self.move.target):
            if not self.tables and objects.has_schema(self.connection(shard)):
                self.tables = objects.load_tables(self.connection(shard), self.move.id)

    def record(self, kind: str, **detail: object) -> None:
        """Adds an event of the move to the catalog. Raises LeaseLost; nothing was changed then."""
        self.catalog.record_step(kind, self.move.id, self.lease.number, **detail)

    def transition(self, after: State, *, routes: Callable[[Routes], Routes] | None = None, **detail: object) -> None:
        """Moves on to the next state; with `routes`, publishes the changed routes in the same transaction.

        Raises:
            LeaseLost, IllegalTransition: nothing was changed.
        """
        before = self.move.state
        for last in range(RETRIES_OF_A_TRANSITION, -1, -1):
            table = self.catalog.routes() if routes else None
            change = None
            if table is not None and routes is not None:
                change = (routes(table[self.move.keyspace.name]), table.epoch)
            try:
                self.catalog.transition(
                    self.move.id, before, after, lease_number=self.lease.number, detail=detail, routes=change
                )
                break
            except EpochConflict:
                if last == 0:
                    raise
        self.refresh()
        self.progress.state(after)

    def await_routers(self, what: str) -> int:
        """Waits until every router that is alive goes by the newest epoch, as published before this call; returns it.

        Raises Refused where one does not, naming it, with `what` waits for it. Without routers there is no waiting.
        """
        epoch = self.catalog.epoch()
        self.catalog.listen_for_acknowledgements()
        late = self.catalog.await_acknowledgements(epoch, ROUTERS_PATIENCE_S, check=self.check)
        if late:
            raise Refused(
                f"move {self.move.id}: {what} waits for routers that have not acknowledged epoch {epoch}:"
                f" {', '.join(map(str, late))}",
                hint="look at their logs, or stop them: one that is silent is not waited for",
            )
        return epoch

    def await_silent_routers(self, epoch: int) -> None:
        """Waits until nobody goes by an older epoch, by no route table that it kept. Those that are alive do not.

        A router without the catalog goes on for `[router] stale_after_s` where it knows of no move: longer than it
        counts among the living. So does one that died, for all that anybody knows.
        """
        bound_s = 1.25 * self.config.router.stale_s
        while any(r.acknowledged < epoch and r.silent_s < bound_s for r in self.catalog.routers()):
            self.check()
            self.stop.wait(SILENT_LOOK_S)

    def tell_stats(self) -> None:
        """Writes the progress counters to the catalog, for `status`."""
        self.catalog.set_stats(self.move.id, self.progress.totals(), self.lease.number)

    def check(self) -> None:
        """Between two pieces of work: raises Interrupted where somebody asked to stop, LeaseLost where we were taken
        for dead."""
        if self.lease.lost.is_set():
            raise LeaseLost(f"move {self.move.id}: the lease was lost while the move ran")
        if self.stop.is_set():
            raise Interrupted(
                f"move {self.move.id} was interrupted while {self.move.state}; nothing is lost",
                hint=f"`shardmove run {self.move.id}` goes on from there",
            )
        if self.heeds_pause and time.monotonic() - self._looked > PAUSE_LOOK_S:
            self._looked = time.monotonic()
            self._check_pause()

    def _check_pause(self) -> None:
        if self.catalog.move(self.move.id).paused:
            raise Interrupted(
                f"move {self.move.id} was paused while {self.move.state}; nothing is lost",
                hint=f"`shardmove resume {self.move.id}`, then the same command, goes on from there",
            )

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close()
        for connection in self._connections.values():
            connection.close()


@contextmanager
def hold(
    config: Config,
    catalog: Catalog,
    move_id: str,
    *,
    holder: str,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    make_executor: Callable[[], Executor] | None = None,
    accepts_changed_servers: bool = False,
    target_is_lost: bool = False,
    creates_schema: bool = False,
) -> Iterator[Hold]:
    """Takes the move's lease, makes both shards refuse every earlier holder, and settles what that one left undecided.

    Args:
        accepts_changed_servers: go on also where a server is not the one that the move began with; see `unsettled`.
        target_is_lost: go on also where the target does not answer.
        creates_schema: see `Hold`.

    Raises:
        LeaseHeld: another coordinator is alive and has it.
        ServerChanged: the newest attempt cannot be carried out: a server is not the one that the move began with.
        Unreachable: a shard does not answer; an attempt that the catalog and the source could settle is settled.
        NotFound: no such move.
    """
    catalog.move(move_id)
    with catalog.acquire(move_id, holder=holder, ttl_s=config.limits.lease_ttl_s) as lease:
        held = Hold(
            config,
            catalog,
            lease,
            catalog.move(move_id),
            stop or threading.Event(),
            progress or Progress(),
            make_executor or (lambda: _worker_processes(config.limits.workers)),
            creates_schema=creates_schema,
        )
        try:
            _take_over(held, target_is_lost=target_is_lost)
            if held.unsettled is not None and not accepts_changed_servers:
                raise held.unsettled
            yield held
        finally:
            held.close()


def _worker_processes(workers: int) -> Executor:
    from workers.pool import ProcessExecutor  # it takes as long to import as some verbs to run, which need no workers

    return ProcessExecutor(workers)


def _take_over(held: Hold, *, target_is_lost: bool) -> None:
    """The number on the shards first, then the state: whoever held the move before changes nothing from here on."""
    out_of_reach: Unreachable | None = None
    for shard in (held.move.source, held.move.target):
        try:
            raise_number(held, shard)
        except Unreachable as error:
            if shard == held.move.source or not target_is_lost:
                out_of_reach = error
    held.move = held.catalog.move(held.move.id)
    held.heeds_pause = not held.move.paused
    settle_newest(held)
    if out_of_reach is not None:
        raise out_of_reach
    with translated(f"move {held.move.id}"):
        held.refresh()


def settle_newest(held: Hold) -> None:
    """Decides the newest attempt, if a former holder left it open, and carries it out."""
    held.unsettled = None
    if held.move.last_attempt == 0:
        return
    try:
        with translated(f"move {held.move.id}"):
            ownership.settle(
                held.catalog, held.move, held.move.last_attempt, held.connection, reason="its coordinator ended"
            )
    except ServerChanged as error:
        held.unsettled = error


def raise_number(held: Hold, shard: str) -> None:
    """Makes one shard refuse every lower lease number."""
    try:
        connection = held.connection(shard)
        if held.move.state is not State.PENDING:
            fence.end_former(connection, held.move.id)
            # Also where the former holder has made nothing yet: it may be about to.
            objects.install_schema(connection, held.catalog.cluster_id())
            fence.raise_number(connection, held.move.id, held.lease.number)
    except Refused as error:
        raise Refused(f"shard {shard}: {error.message}", hint=error.hint) from error
    except psycopg.OperationalError as error:
        if not is_unreachable(error):
            raise
        raise Unreachable(f"shard {shard} does not answer: {str(error).strip()}") from error
