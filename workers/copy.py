"""Copying one batch: its rows, their comparison and its record are one commit on the target (DESIGN §4.3).

    target   BEGIN; wait for an earlier try of this batch; lease and "mirrored from the source" (fence row FOR SHARE);
             nothing recorded overlaps
    source   BEGIN REPEATABLE READ READ ONLY; COPY the interval out ──► target   COPY it in, as a replica
    source   COMMIT
    target   read the interval back and compare; insert the record; COMMIT

The target's checks come before the source's snapshot, and the fence row stays locked until the commit: who ends
"mirrored from", or takes the lease over, waits for this batch or ends it, and none begins afterwards.

Exactly once: a batch whose interval is recorded already returns the record and writes nothing. A batch that is tried
again while the session of a dead worker may still commit the first try waits for that session, by an advisory lock on
the interval. Batches with different intervals never overlap: within one lease the cuts tile the gaps, and a new lease
(fence.raise_number) has waited for every batch of the old one, or ended it, before anybody reads the records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import errors, sql

from shardmove.domain import points
from shardmove.domain.digests import Digest
from shardmove.domain.errors import Failed
from shardmove.domain.moves import Move
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.locks import GIVE_WAY
from shardmove.postgres.sql import Interval, type_name
from shardmove.protocol import fence
from shardmove.protocol.catch_up import (
    compare,
    copy_in,
    digest_of,
    in_move,
    make_durable,
    relay,
    select_rows,
)
from shardmove.protocol.replica import become_replica
from workers.connections import Connections


class BatchBlocked(Failed):
    """A unique value of the batch is still held on the target by a row that is about to change. Nothing was written.

    Catch up, then try the same batch again: it takes a new snapshot.
    """


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch that is committed and recorded on the target. `elapsed_s`: of this try."""

    ordinal: int
    interval: Interval
    digest: Digest
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Copies one interval of one table from the source to the target. `ordinal`: the table's number in the move."""

    move: Move
    ordinal: int
    table: Table
    interval: Interval
    lease_number: int
    source_dsn: str
    target_dsn: str

    def run(self, connections: Connections) -> BatchDone:
        """When it returns, the rows are on the target, equal to what the source sent, and recorded: one commit.

        Raises (nothing was written):
            LeaseLost, MirrorRefused: the target does not take rows from this process, or from this source, any more.
            BatchBlocked: catch up, then try again.
            BatchMismatch: the target stores other rows than it was sent.
            Failed: a record of another interval overlaps this one.
            Unreachable: as above, but the commit itself may have happened: a repeat finds out.
            psycopg.Error: anything else.
        """
        started = time.monotonic()
        source = connections.get(self.source_dsn, self.move.id)
        target = connections.get(self.target_dsn, self.move.id)
        try:
            with effects.writing(target, Effect.BATCH):
                digest = self._copy_once(source, target)
        except (errors.UniqueViolation, errors.ExclusionViolation) as error:
            raise self._blocked(f"the constraint {error.diag.constraint_name}") from error
        except errors.DeadlockDetected as error:
            raise self._blocked("another transaction (deadlock)") from error
        return BatchDone(self.ordinal, self.interval, digest, time.monotonic() - started)

    def _copy_once(self, source: Connection, target: Connection) -> Digest:
        target.execute(GIVE_WAY)
        await_earlier_try(target, self)
        fence.check_lease(target, self.move.id, self.lease_number)
        fence.check_receiving(target, self.move.id, self.move.source)
        recorded = find_record(target, self)
        if recorded is not None:
            return recorded
        digest = self._carry(source, target)
        record_batch(target, self, digest)
        return digest

    def _carry(self, source: Connection, target: Connection) -> Digest:
        become_replica(target, self.move.id, [self.table])
        rows = rows_of(self.move, self.table, self.interval)
        with effects.snapshot(source):
            sent = relay(source, rows, target, copy_in(self.table))
        make_durable(source)
        points.reach("batch.before_compare")
        compare(sent, digest_of(target, rows), self.move, self.table)
        return sent

    def _blocked(self, by: str) -> BatchBlocked:
        return BatchBlocked(
            f"move {self.move.id}: a batch of {self.table.name} is blocked on the target by {by}",
            hint="it is tried again after a catch-up; if it stays, rows outside the move hold the same unique value",
        )


def rows_of(move: Move, table: Table, interval: Interval) -> sql.Composed:
    """COPY TO of the move's rows in the interval: the same statement on both sides."""
    return select_rows(table, sql.SQL("{} AND {}").format(in_move(move, table), table.within(interval)))


def await_earlier_try(target: Connection, batch: CopyBatch) -> None:
    """Waits for the session of a dead worker that still has this interval in hand, and holds off any other."""
    target.execute(
        "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended(%s, 0))",
        (f"shardmove batch {batch.move.id} {batch.ordinal} {batch.interval}",),
    )


def find_record(target: Connection, batch: CopyBatch) -> Digest | None:
    """The batch's own record, or None where it was not copied yet.

    Raises:
        Failed: the record of another interval overlaps this one.
    """
    records = target.execute(_overlapping(batch)).fetchall()
    if not records:
        return None
    after, upto, *digest = records[0]
    if len(records) == 1 and (_position(after), _position(upto)) == batch.interval:
        return Digest(*digest)
    raise Failed(
        f"move {batch.move.id}: a batch of {batch.table.name} overlaps what is recorded as copied",
        hint=f"`shardmove run {batch.move.id}` cuts anew what is missing",
    )


def _overlapping(batch: CopyBatch) -> sql.Composed:
    """The records that share a keyset position with the interval; ends are compared as the keyset is."""
    after, upto = batch.interval
    begins_before: sql.Composable = sql.SQL("true")
    if upto is not None:
        begins_before = sql.SQL("b.after IS NULL OR b.after <> {}::text[] AND {}").format(
            sql.Literal(list(upto)), _end_is_within(batch.table, "after", (None, upto))
        )
    ends_behind = sql.SQL("b.upto IS NULL OR {}").format(_end_is_within(batch.table, "upto", (after, None)))
    return sql.SQL(
        "SELECT b.after, b.upto, b.row_count, b.size_bytes, b.digest FROM shardmove.batch AS b"
        " WHERE b.move_id = {} AND b.ordinal = {} AND ({}) AND ({})"
    ).format(sql.Literal(batch.move.id), sql.Literal(batch.ordinal), begins_before, ends_behind)


def _end_is_within(table: Table, end: str, interval: Interval) -> sql.Composed:
    columns = sql.SQL(", ").join(
        sql.SQL("(b.{}[{}])::{} AS {}").format(
            sql.Identifier(end), sql.Literal(number), type_name(column.type), sql.Identifier(column.name)
        )
        for number, column in enumerate(table.keyset, 1)
    )
    return sql.SQL("EXISTS (SELECT FROM (SELECT {}) AS position WHERE {})").format(columns, table.within(interval))


def _position(end: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if end is None else tuple(end)


def record_batch(target: Connection, batch: CopyBatch, digest: Digest) -> None:
    """The batch's record, in the transaction of its rows: neither is ever there without the other."""
    after, upto = batch.interval
    target.execute(
        "INSERT INTO shardmove.batch (move_id, ordinal, after, upto, row_count, size_bytes, digest)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s)",
        (
            batch.move.id,
            batch.ordinal,
            None if after is None else list(after),
            None if upto is None else list(upto),
            digest.rows,
            digest.size_bytes,
            digest.hash,
        ),
    )
