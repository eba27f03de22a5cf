"""The state `copying`: batches are cut while they are copied, and the mirror runs beside.

What is left to copy is the complement of the target's own records, so a move that was interrupted anywhere goes on by
the same code. Planning runs ahead of copying by what the executor lets wait; no list of all batches is ever made.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from shardmove.coordinator import creating
from shardmove.coordinator.drifting import accept_drift
from shardmove.coordinator.hold import Hold
from shardmove.coordinator.mirroring import MirrorThread
from shardmove.domain import points
from shardmove.domain.errors import Failed
from shardmove.domain.moves import Direction, State
from shardmove.postgres.introspect import Table, estimate_rows, size_bytes
from shardmove.protocol import drift, fence
from shardmove.protocol.catch_up import in_move
from shardmove.protocol.gate import islands
from workers.copy import BatchBlocked, BatchDone, CopyBatch
from workers.cuts import BatchSizer, walk

STATS_EVERY_S = 1.0
CATCH_UP_PATIENCE_S = 60.0


def copy(hold: Hold) -> None:
    """Copies what is not recorded yet, every row compared in its batch's own transaction; then `verifying`.

    Raises:
        Refused: a router that is alive has not heard of the move. No row was copied by this call.
        Interrupted, LeaseLost, Failed, …: committed batches stay; the same step goes on from them.
    """
    accept_drift(hold)  # everything is compared after the copy anyway
    hold.await_routers(f"copying rows to {hold.move.target}")  # who knows of the move reads no row of it there
    copy_missing(hold)
    hold.tell_stats()
    hold.transition(State.VERIFYING)


def copy_missing(hold: Hold) -> None:
    """Copies what the target has no record of, then marks it whole. Raises as `copy`."""
    _load_counters(hold)
    with mirror_beside(hold, Direction.FORWARD) as mirror:
        _Copying(hold, mirror).run()
    creating.finish(hold)
    # A target that was promoted since the last batch may lack some: not whole, whatever the workers were told.
    drift.check_identity(hold.target, hold.move.target, hold.move.identities)
    fence.set_whole(hold.target, hold.move.id, lease_number=hold.lease.number)


def mirror_beside(hold: Hold, direction: Direction) -> MirrorThread:
    """The mirror's thread for this move; its counters go to the progress."""

    def on_pass(rows: int, lag_s: float) -> None:
        hold.progress.mirrored_rows += rows
        hold.progress.mirror_lag_s = lag_s

    return MirrorThread(lambda: hold.mirror(direction), hold.config.limits, on_pass=on_pass)


def _load_counters(hold: Hold) -> None:
    """Starts the counters from the target's records, so that a move that was interrupted does not start from zero."""
    rows = hold.target.execute(
        "SELECT ordinal, sum(row_count)::int8, sum(size_bytes)::int8, count(*) FROM shardmove.batch"
        " WHERE move_id = %s GROUP BY ordinal",
        (hold.move.id,),
    ).fetchall()
    recorded = {ordinal: counted for ordinal, *counted in rows}
    for ordinal, table in enumerate(hold.tables, 1):
        entry = hold.progress.table(str(table.name))
        entry.rows_estimate = estimate_rows(hold.source, table, in_move(hold.move, table))
        entry.rows_copied, entry.bytes_copied, entry.batches_done = recorded.get(ordinal, (0, 0, 0))
        entry.rows_before = entry.rows_copied
    hold.progress.started = time.monotonic()


@dataclass(slots=True)
class _Try:
    task: CopyBatch
    number: int


class _Copying:
    """The loop of one run of the state: submit, collect, try again."""

    def __init__(self, hold: Hold, mirror: MirrorThread) -> None:
        self.hold = hold
        self.mirror = mirror
        self.executor = hold.executor
        self.sizer = BatchSizer(hold.config.limits)
        self.under_way: dict[Future[BatchDone], _Try] = {}
        self.told = time.monotonic()

    def run(self) -> None:
        for ordinal, table in self._largest_first():
            recorded = islands(self.hold.target, self.hold.move.id, ordinal, table)
            for gap in recorded.gaps():
                for interval in walk(self.hold.source, self.hold.move, table, gap, self.sizer.rows):
                    task = CopyBatch(
                        self.hold.move,
                        ordinal,
                        table,
                        interval,
                        self.hold.lease.number,
                        self.hold.dsn[self.hold.move.source],
                        self.hold.dsn[self.hold.move.target],
                    )
                    self._submit(_Try(task, 1))
        while self.under_way:
            self._collect(block=True)

    def _largest_first(self) -> list[tuple[int, Table]]:
        numbered = list(enumerate(self.hold.tables, 1))
        return sorted(numbered, key=lambda pair: -size_bytes(self.hold.source, pair[1].name))

    def _submit(self, attempt: _Try) -> None:
        # The workers' queue bounds how far planning runs ahead; what is under way is bounded with it.
        while len(self.under_way) >= 3 * self.executor.workers:
            self._collect(block=True)
        self._collect(block=False)
        self.under_way[self.executor.submit(attempt.task)] = attempt

    def _collect(self, *, block: bool) -> None:
        """Takes in what is done. Raises what a batch could not get over, and what ended the mirror."""
        self.hold.check()
        self.mirror.check()
        done, _ = wait(self.under_way, timeout=0.5 if block else 0, return_when=FIRST_COMPLETED)
        for future in done:
            attempt = self.under_way.pop(future)
            try:
                self._account(attempt, future.result())
            except BatchBlocked as error:
                self._try_again(attempt, error)
        if time.monotonic() - self.told > STATS_EVERY_S:
            self.told = time.monotonic()
            self.hold.tell_stats()

    def _account(self, attempt: _Try, done: BatchDone) -> None:
        self.sizer.learn(done.digest.rows, done.digest.size_bytes, done.elapsed_s)
        self.hold.progress.batch(str(attempt.task.table.name), rows=done.digest.rows, size_bytes=done.digest.size_bytes)
        points.reach("copying.after_batch")

    def _try_again(self, attempt: _Try, error: BatchBlocked) -> None:
        """A unique value is on its way from a committed batch to this one: let the mirror carry it first."""
        if attempt.number > self.hold.config.limits.batch_retries:
            raise Failed(
                f"{error.message}, {attempt.number} times in a row",
                hint="a row of the target that is not of this move holds the same unique value: remove one of them",
            ) from error
        self.mirror.wait_for_pass(CATCH_UP_PATIENCE_S)
        self.under_way[self.executor.submit(attempt.task)] = _Try(attempt.task, attempt.number + 1)
