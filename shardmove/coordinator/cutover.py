"""The cutover: changing the owner of the range, in either direction (DESIGN §4.7).

    look        preconditions; transactions that would be waited for; catch up until the lag is small
    guard       both shards: table locks that keep DDL out, then fingerprint and identity; held to the end
    hold        catalog: attempt N is open, the range is held in a new epoch    ← who heard of it waits from here
                routers acknowledge; a late one is not waited for for long
    close       giver: exclusive lock, fence closed for N                       ← and everybody from here
    empty       catch up until a full look finds nothing; sequences checked
    flip        catalog: one transaction makes the receiver the owner           ← this commit is the cutover
    open        receiver: fence opened for N                                    ← to here
    give away   giver: records that it is mirrored from the receiver now

Whatever fails between hold and flip: the attempt is settled in the catalog (that settles a COMMIT in doubt too), and
carried out as it was decided: opened again on the giver, or finished on the receiver. A process that dies in between
leaves this to whoever comes next; an attempt is never continued, only finished forward or abandoned.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import psycopg
from psycopg import errors, sql

from shardmove.catalog.routes import retried
from shardmove.catalog.store import Catalog
from shardmove.coordinator import preflight
from shardmove.coordinator.hold import Hold
from shardmove.coordinator.steps import Step, StepRunner, perform, pretend
from shardmove.domain import points
from shardmove.domain.errors import (
    AttemptDecided,
    BatchMismatch,
    CutoverGaveUp,
    Failed,
    LeaseLost,
    MirrorRefused,
    SchemaDrift,
    ServerChanged,
    ShardmoveError,
    Unreachable,
)
from shardmove.domain.moves import Attempt, Direction, Outcome, State
from shardmove.domain.routes import Routes, RouteTable
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, connect, explain
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import table as relation
from shardmove.protocol import drift, fence, ownership, sequences
from shardmove.protocol.catch_up import Mirror
from shardmove.protocol.families import members

EDGES = {Direction.FORWARD: (State.READY, State.SWITCHED), Direction.BACK: (State.SWITCHED, State.READY)}
LAG_PASSES_MAX = 10_000
FINISH_PATIENCE_S = 60.0
WATCHDOG_FACTOR = 2
"""An attempt that holds up writes for so many times max_stall is given up from outside."""


T = TypeVar("T")


class NotNow(Failed):
    """This attempt was given up cleanly; a later one may succeed."""


@dataclass(slots=True)
class Report:
    """How a cutover went. `stall_ms`: from asking to close the giver's fence until the receiver's was open."""

    direction: Direction
    attempts: int = 0
    stall_ms: float | None = None
    gave_up: list[str] = field(default_factory=list)


def cut_over(hold: Hold, direction: Direction, *, dry_run: bool = False) -> Report:
    """Makes the other side the owner of the range: forward from `ready`, back from `switched`.

    When it returns, the receiver owns the range, is open, and holds every acknowledged write; the giver refuses writes
    and is mirrored into from then on. A repeat in the state after it does nothing.

    Raises:
        Refused: a precondition does not hold. Nothing was changed.
        CutoverGaveUp: every attempt was given up cleanly; the giver owns the range and is open.
        SchemaDrift, ServerChanged: compare anew first; the giver owns the range and is open.
        LeaseLost: another coordinator has taken over and decides.
        Failed: the decision is made, but a shard does not take it yet; run it again, or let an attendant do it.
    """
    report = Report(direction)
    before, after = EDGES[direction]
    if hold.move.state is after and not dry_run:
        return report
    if dry_run:
        _Crossing(hold, direction, report, pretend(hold.progress.step)).attempt()
        return report
    preflight.require_state(hold.move, before, f"cut over {direction}")
    while True:
        report.attempts += 1
        try:
            _Crossing(hold, direction, report, perform(hold.progress.step)).attempt()
            break
        except NotNow as error:
            report.gave_up.append(error.message)
            hold.progress.step(f"attempt given up: {error.message}")
            if report.attempts >= hold.config.limits.cutover_attempts:
                raise CutoverGaveUp(
                    f"move {hold.move.id}: {report.attempts} attempts were given up; the last: {error.message}",
                    hint="writes go on as before; try again, or raise [limits] cutover_grace_s or max_stall_ms",
                ) from error
            _back_off(hold, report.attempts)
            hold.check()
    hold.refresh()
    hold.progress.state(hold.move.state)
    return report


def _back_off(hold: Hold, attempts: int) -> None:
    hold.stop.wait(min(5.0, 0.1 * 2**attempts) * random.uniform(0.5, 1.0))


class _Crossing:
    """One attempt: its connections, its number once it has one, and its steps."""

    def __init__(self, hold: Hold, direction: Direction, report: Report, run: StepRunner) -> None:
        self.hold = hold
        self.direction = direction
        self.report = report
        self.run = run
        self.limits = hold.config.limits
        self.giver = hold.move.giver(direction)
        self.receiver = hold.move.receiver(direction)
        self.mirror: Mirror
        self.attempt_: Attempt | None = None
        self.is_asked_for = False
        self.known_routes: RouteTable | None = None
        self.guards: list[Connection] = []
        self.closing_began = 0.0
        self.over = threading.Event()

    def attempt(self) -> None:
        """Every step in order; whatever happens, the attempt is decided and carried out when this returns or raises."""
        try:
            with ExitStack() as stack:
                self.mirror = stack.enter_context(self.hold.mirror(self.direction))
                self.run(self._looking())
                self.run([Step(f"keep DDL out on {self.giver} and {self.receiver}, and look at the schema once more",
                               lambda: stack.enter_context(self._guards()))])  # fmt: skip
                self.run(self._crossing())
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # whatever it is: no fence is left closed
            self._settle(error)
        finally:
            self.over.set()

    def _looking(self) -> list[Step]:
        return [
            Step("the preconditions hold", self._look, looks=True),
            Step(
                f"sequences of {self.receiver} are ahead of those of {self.giver}",
                self._advance_sequences,
            ),
            Step(f"no long transaction has written to the range on {self.giver}", self._wait_for_writers, looks=True),
            Step(f"catch up until a pass takes less than {self.limits.cutover_lag_ms:g} ms", self._reduce_lag),
        ]

    def _crossing(self) -> list[Step]:
        giver, receiver, ranges = self.giver, self.receiver, self.hold.move.ranges_text
        return [
            Step("catch up", self._catch_up),
            Step(f"hold {ranges} in the route table, open an attempt", self._open_attempt),
            Step("wait until the routers have acknowledged that", self._await_routers),
            Step(f"close the fence of {giver}: writes wait from here", self._close),
            Step("catch up until the journal is empty", self._empty),
            Step(f"sequences of {receiver} are still ahead", self._check_sequences),
            Step(f"give {ranges} to {receiver} in the route table: the cutover", self._flip),
            Step(f"open the fence of {receiver}: writes go on", self._open_receiver),
            Step(f"mirror {giver} from {receiver} from now on", self._give_away),
        ]

    # --- before anything is held up

    def _look(self) -> None:
        try:
            preflight.require_cutover(self.hold, self.direction)
        except errors.LockNotAvailable:
            raise NotNow("somebody changes a moving table just now") from None

    def _advance_sequences(self) -> None:
        sequences.advance(
            self.hold.connection(self.receiver),
            self.hold.connection(self.giver),
            self.hold.tables,
            margin=self.limits.sequence_margin,
        )

    def _wait_for_writers(self) -> None:
        """Transactions that wrote to the range and stay open: a closing would hold up all writes behind them."""
        row = fence.read(self.hold.connection(self.giver), self.hold.move.id)
        if row is None:  # it was there when we looked; whoever was stopped since then may find the move at its end
            raise LeaseLost(
                f"move {self.hold.move.id}: another coordinator has taken over, and the move has ended on {self.giver}"
            )
        deadline = time.monotonic() + self.limits.cutover_grace_s
        while True:
            slow = fence.holders(
                self.hold.connection(self.giver), row.fence_key, longer_than_s=self.limits.max_stall_ms / 2000
            )
            if not slow:
                return
            if time.monotonic() > deadline:
                raise NotNow(f"transactions that wrote to the range are still open on {self.giver}: {'; '.join(slow)}")
            self.hold.check()
            self.hold.stop.wait(0.02)

    def _reduce_lag(self) -> None:
        for _ in range(LAG_PASSES_MAX):
            done = self.mirror.catch_up(rows_max=self.limits.mirror_rows)
            if done.elapsed_s * 1000 < self.limits.cutover_lag_ms and done.keys < self.limits.mirror_rows:
                return
            self.hold.check()
        raise NotNow("the mirror does not come near: rows are written faster than they are carried")

    @contextmanager
    def _guards(self) -> Iterator[None]:
        """Table locks on both shards until the attempt is over, and under them: nothing was changed by DDL."""
        with ExitStack() as stack:
            for shard in (self.giver, self.receiver):
                name = fence.application_name(self.hold.move.id)
                connection = connect(self.hold.config.shard_dsn(shard), application_name=name)
                stack.callback(connection.close)
                effects.begin(connection)
                try:
                    lock_tables(connection, self.hold.tables, lock_timeout_ms=self.limits.ddl_lock_timeout_ms)
                except errors.LockNotAvailable:
                    raise NotNow(f"somebody changes a moving table on {shard} just now") from None
                drift.check_fingerprint(connection, self.hold.move.id, self.hold.tables, shard)
                drift.check_identity(connection, shard, self.hold.move.identities)
                self.guards.append(connection)
            points.reach("cutover.after_guards")
            # A DDL statement that waits for these locks makes our own catch-up wait behind it: bounded, or writes would
            # wait for as long as it does.
            self.mirror.bound_waits(self.limits.max_stall_ms)
            self.mirror.is_guarded = True
            yield

    # --- the attempt

    def _open_attempt(self) -> None:
        def once() -> Attempt:
            table = self.hold.catalog.routes()
            self.is_asked_for = True
            return self.hold.catalog.open_attempt(
                self.hold.move.id,
                self.direction,
                lease_number=self.hold.lease.number,
                hold=self._routes(table[self.hold.move.keyspace.name], self.giver, held=True),
                base_epoch=table.epoch,
            )

        self.hold.catalog.listen_for_acknowledgements()
        self.attempt_ = retried(once)
        self.known_routes = self.hold.catalog.routes()
        points.reach("cutover.after_hold")

    def _await_routers(self) -> None:
        """Transactions that routers hold do not run into the closed fence. No more than that: the fence decides."""
        assert self.known_routes is not None
        late = self.hold.catalog.await_acknowledgements(
            self.known_routes.epoch, self.limits.router_grace_ms / 1000, check=self.hold.check
        )
        if late and self.limits.late_routers == "give_up":
            names = ", ".join(map(str, late))
            raise NotNow(f"routers have not acknowledged the hold in {self.limits.router_grace_ms:g} ms: {names}")
        if late:
            self.hold.progress.step(f"not waited for any longer: {', '.join(map(str, late))}")

    def _routes(self, routes: Routes, owner: str, *, held: bool) -> Routes:
        return routes.assign(self.hold.move.ranges, shard=owner, move_id=self.hold.move.id, held=held)

    def _catch_up(self) -> None:
        try:
            self.mirror.catch_up(full_look=True)
        except (errors.QueryCanceled, errors.LockNotAvailable) as error:
            raise NotNow(f"a catch-up takes longer than {self.limits.max_stall_ms} ms") from error

    def _close(self) -> None:
        self.closing_began = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            fence.close(
                self.hold.connection(self.giver),
                self.hold.move.id,
                attempt=self._number,
                lease_number=self.hold.lease.number,
                lock_timeout_ms=max(1, self.limits.max_stall_ms // 2),
            )
        except fence.WriterInTheWay as error:
            raise NotNow(error.message) from error

    def _empty(self) -> None:
        self.mirror.until_empty()
        self._require_guards()
        self._check_stall()
        points.reach("cutover.after_empty")

    def _require_guards(self) -> None:
        """The table locks were held until the journal was empty: without a guard DDL could have slipped past."""
        for connection in self.guards:
            connection.execute("")

    def _check_sequences(self) -> None:
        giver, receiver = self.hold.connection(self.giver), self.hold.connection(self.receiver)
        sequences.check(receiver, giver, self.hold.tables)
        self._check_stall()

    def _check_stall(self) -> None:
        stall_ms = (time.monotonic() - self.closing_began) * 1000
        if stall_ms > self.limits.max_stall_ms:
            raise NotNow(f"writes would have waited for longer than {self.limits.max_stall_ms} ms ({stall_ms:.0f} ms)")

    def _flip(self) -> None:
        before, after = EDGES[self.direction]
        assert self.known_routes is not None
        known: RouteTable | None = self.known_routes  # read before writes began to wait

        def once() -> int:
            nonlocal known
            table, known = known or self.hold.catalog.routes(), None
            assert self.attempt_ is not None
            self._check_stall()  # who stood still here may have lost its table locks
            return self.hold.catalog.flip(
                self.attempt_,
                lease_number=self.hold.lease.number,
                before=before,
                after=after,
                routes=self._routes(table[self.hold.move.keyspace.name], self.receiver, held=False),
                base_epoch=table.epoch,
                detail={"attempt": self._number, "direction": str(self.direction)},
            )

        retried(once)
        self.attempt_ = Attempt(self.hold.move.id, self._number, self.direction, Outcome.FLIPPED)

    def _open_receiver(self) -> None:
        connection = self.hold.connection(self.receiver)
        assert self.attempt_ is not None
        ownership.open_for(self.attempt_, self.hold.move, self.receiver, connection)
        self.report.stall_ms = (time.monotonic() - self.closing_began) * 1000

    def _give_away(self) -> None:
        fence.give_away(self.hold.connection(self.giver), self.hold.move.id, attempt=self._number)
        if self.report.stall_ms is not None:
            self.hold.catalog.record_stall(self.hold.move.id, self._number, self.report.stall_ms)

    @property
    def _number(self) -> int:
        assert self.attempt_ is not None
        return self.attempt_.number

    # --- when something went wrong

    def _watch(self) -> None:
        """The watchdog: when a server hangs and this process with it, gives the attempt up over new connections.

        Any party may; whoever decides first decides. The hanging step finds out when it wakes. Tries until it succeeds
        or the attempt is over: until then writes wait.
        """
        pause_s = self.limits.max_stall_ms / 1000 * WATCHDOG_FACTOR
        while not self.over.wait(pause_s):
            with ExitStack() as opened, suppress(ShardmoveError, psycopg.Error):
                self._settle_over_new_connections(opened)
                return
            pause_s = 1.0

    def _settle_over_new_connections(self, opened: ExitStack) -> None:
        config, move = self.hold.config, self.hold.move

        def fresh(shard: str) -> Connection:
            name = fence.application_name(move.id)
            return opened.enter_context(connect(config.shard_dsn(shard), application_name=name))

        catalog = opened.enter_context(Catalog.connect(config.catalog_dsn, routes_file=config.routes_file))
        reason = "the attempt hung: a server or the network does not answer"
        ownership.settle(catalog, move, self._number, fresh, reason=reason)

    def _settle(self, error: BaseException) -> None:
        """Decides the attempt if it is open, carries the decision out, and raises what the caller should know."""
        known = self.attempt_ or self._attempt_in_doubt()
        if known is None:
            raise _as_ours(error)
        decided = self._finish(known, error)
        if decided.outcome is Outcome.FLIPPED and isinstance(error, (ShardmoveError, psycopg.Error)):
            return
        if isinstance(error, AttemptDecided):
            raise NotNow(f"somebody else decided attempt {known.number}") from error
        if isinstance(error, _NO_USE_TO_TRY_AGAIN) or not isinstance(error, (ShardmoveError, psycopg.Error)):
            raise _as_ours(error)
        # Everything else that hits an open attempt was rolled back cleanly: worth another try.
        raise NotNow(f"attempt {known.number}: {_as_ours(error).args[0]}") from error

    def _attempt_in_doubt(self) -> Attempt | None:
        """An attempt of ours whose opening was not acknowledged, or not noted: whatever came in between."""
        if not self.is_asked_for:
            return None
        return _patiently(lambda: self.hold.catalog.open_attempt_of(self.hold.move.id, self.hold.lease.number))

    def _finish(self, attempt: Attempt, error: BaseException) -> Attempt:
        """Writes wait until this is done, so it is tried for long."""
        reason = error.message if isinstance(error, ShardmoveError) else type(error).__name__

        def decide() -> Attempt:
            outcome = self.hold.catalog.settle_attempt(self.hold.move, attempt.number, reason)
            return Attempt(attempt.move_id, attempt.number, attempt.direction, outcome)

        try:
            decided = _patiently(decide)
            _patiently(lambda: ownership.carry_out(decided, self.hold.move, self.hold.connection))
        except (Unreachable, psycopg.OperationalError) as trouble:
            raise Failed(
                f"attempt {attempt.number} of move {attempt.move_id} could not be finished: a server does not answer,"
                f" and the fence stays closed until it does ({_as_ours(trouble).args[0]})",
                hint="when it is back: the same command, or a running `shardmove serve`, opens the fence",
            ) from error
        return decided


_NO_USE_TO_TRY_AGAIN = (
    SchemaDrift,
    ServerChanged,
    LeaseLost,
    NotNow,
    BatchMismatch,
    MirrorRefused,
    errors.UniqueViolation,
    errors.ExclusionViolation,
)


def _patiently(step: Callable[[], T]) -> T:
    """Repeats a step while a server does not answer, for FINISH_PATIENCE_S. Not to be stopped: a fence is closed."""
    deadline = time.monotonic() + FINISH_PATIENCE_S
    while True:
        try:
            return step()
        except (Unreachable, psycopg.OperationalError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def lock_tables(connection: Connection, tables: Sequence[Table], *, lock_timeout_ms: int) -> None:
    """ROW EXCLUSIVE on every table that holds rows, for the rest of the transaction: writers pass, DDL and DISABLE
    TRIGGER wait. On partitioned tables SHARE UPDATE EXCLUSIVE: ATTACH and DETACH take no stronger one there.

    The whole takes no longer than the timeout. Raises LockNotAvailable.
    """
    deadline = time.monotonic() + lock_timeout_ms / 1000
    modes = {
        name: sql.SQL("SHARE UPDATE EXCLUSIVE") if is_partitioned else sql.SQL("ROW EXCLUSIVE")
        for table in tables
        for name, is_partitioned in members(connection, table)
    }
    for name, mode in modes.items():
        left_ms = max(1, int((deadline - time.monotonic()) * 1000))
        connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{left_ms}ms",))
        connection.execute(sql.SQL("LOCK TABLE ONLY {} IN {} MODE").format(relation(name), mode))


def _as_ours(error: BaseException) -> BaseException:
    """What a server said becomes an error of ours; all else stays what it is."""
    if isinstance(error, psycopg.Error):
        return Failed(f"a server said: {explain(error)}")
    return error
