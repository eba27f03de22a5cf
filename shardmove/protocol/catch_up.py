"""Catch-up: one pass of the mirror. Anyone may run it, any number of them, at any time.

    receiver   BEGIN; exclusive catch-up lock; fence row FOR SHARE: closed, mirrored from the giver; batch records
    giver      BEGIN REPEATABLE READ; DELETE the visible journal entries that the gate lets through; read those rows
    receiver   delete those keys, children first; COPY the rows in, parents first; read back and compare
    giver      make the log durable up to the snapshot
    receiver   COMMIT
    giver      COMMIT

The order of the two beginnings is I3: a catch-up that read before it held the lock could apply an old row after another
had applied a newer one and emptied the journal. The order of the two commits is safety: die between them, and the
entries come back, and the rows are applied once more, as they are then.

When a pass leaves the journal empty and everything is copied, the receiver is the giver as of that snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString, TypeAlias

import psycopg
from psycopg import errors, sql

from shardmove.domain import points
from shardmove.domain.digests import Digest, Hasher
from shardmove.domain.errors import BatchMismatch, Failed
from shardmove.domain.moves import Direction, Move
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, connect
from shardmove.postgres.introspect import Table, table_sql
from shardmove.postgres.sql import Position, in_ranges, names
from shardmove.postgres.stream import copy_out
from shardmove.protocol import drift, fence
from shardmove.protocol.gate import gate
from shardmove.protocol.objects import check_layout, load_tables
from shardmove.protocol.parts import XID, journal
from shardmove.protocol.replica import become_replica

RETRIES = 20
COLLISIONS_MAX = 5
"""More than that, and it is not a batch that commits meanwhile: a row outside the move holds the value."""

Rows: TypeAlias = psycopg.Cursor[tuple[Any, ...]]
Keys: TypeAlias = Mapping[int, Sequence[Position]]
"""Per ordinal of a table, the keyset positions that changed."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one catch-up did.

    Attributes:
        keys: distinct keys that were carried, all tables together.
        is_empty: the journal held nothing more at the pass's snapshot: with everything copied, both sides are equal as
            of that snapshot.
        xmin: every transaction before this one had ended at the pass's snapshot.
    """

    keys: int
    is_empty: bool
    elapsed_s: float
    xmin: int


@dataclass(slots=True)
class Mirror:
    """Two connections for one direction of one move, and where the journal was read up to. Not thread-safe.

    Attributes:
        scan_from: per table, entries of transactions before this one are known to be gone: dead entries behind a long
            report are not looked at again. 0 is a full look.
        fingerprint_seen: the recorded one when the tables were read: where another is recorded since, somebody has
            taken changed tables for the move's, and this mirror's are old.
        gate: per table, what may be carried now; read anew in each pass.
        is_guarded: the caller holds table locks on both sides and has checked schema and servers under them, so that a
            pass need not look again.
    """

    move: Move
    direction: Direction
    tables: Sequence[Table]
    giver: Connection
    receiver: Connection
    giver_dsn: str
    fingerprint_seen: str | None = None
    scan_from: dict[int, int] = field(default_factory=dict)
    gate: Mapping[int, sql.Composable] = field(default_factory=dict)
    is_guarded: bool = False
    flusher: Connection | None = None

    @classmethod
    def open(cls, move: Move, direction: Direction, tables: Sequence[Table] | None, dsn: Mapping[str, str]) -> Mirror:
        """Connects to both shards. `dsn` is by shard name; tables that are not given are loaded from the giver.

        Raises Refused where a newer release touched the giver, and all that `connect` raises.
        """
        name = fence.application_name(move.id)
        giver = connect(dsn[move.giver(direction)], application_name=name)
        try:
            check_layout(giver)
            seen = drift.recorded_fingerprint(giver, move.id)  # before the tables: what comes later is noticed
            loaded = load_tables(giver, move.id) if tables is None else tables
            receiver = connect(dsn[move.receiver(direction)], application_name=name)
        except BaseException:
            giver.close()
            raise
        return cls(move, direction, loaded, giver, receiver, dsn[move.giver(direction)], seen)

    def close(self) -> None:
        for connection in (self.giver, self.receiver, self.flusher):
            if connection is not None:
                connection.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- a pass

    def catch_up(
        self,
        *,
        rows_max: int | None = None,
        full_look: bool = False,
        at_snapshot: Callable[[], None] = lambda: None,
    ) -> Pass:
        """One pass. `rows_max` bounds the entries of a table that are taken; `full_look` reads the whole journal;
        `at_snapshot` is called while the giver's transaction is open at the pass's snapshot.

        Raises:
            MirrorRefused: the receiver's record does not allow it (any more).
            SchemaDrift, ServerChanged: see there.
            BatchMismatch: what was read back is not what was sent.
            Failed: another catch-up, or a batch, was in the way every time.
            psycopg.errors.UniqueViolation: a row that is not of the move holds the same value.
            psycopg.Error: anything else; as with all of these, nothing was changed and no entry was lost.
        """
        if full_look:
            self.scan_from.clear()
        collisions = 0
        for _ in range(RETRIES):
            try:
                return self._pass(rows_max, at_snapshot)
            except (errors.SerializationFailure, errors.DeadlockDetected):
                continue  # directly behind another catch-up that had yet to commit on the giver, or across a batch
            except (errors.UniqueViolation, errors.ExclusionViolation):
                # A unique value passed between keys of which only some were taken; or a batch that was under way has
                # just committed its old holder, whom the next look at the gate lets through.
                collisions += 1
                if collisions > COLLISIONS_MAX:
                    raise
                rows_max = None
        raise Failed(f"move {self.move.id}: {RETRIES} catch-ups in a row met another one, or a batch, on the same rows")

    def until_empty(self, *, passes_max: int = 100) -> Pass:
        """Catches up until a full look finds nothing more. With the giver's fence closed one pass is enough.

        Raises Failed where writers are faster.
        """
        for _ in range(passes_max):
            done = self.catch_up(full_look=True)
            if done.is_empty:
                return done
        raise Failed(f"move {self.move.id}: the journal was not empty after {passes_max} catch-ups")

    def work_off(self, rows_max: int, *, check: Callable[[], None] = lambda: None) -> None:
        """Bounded passes until one takes less than its bound: what a long absence left behind, in little memory."""
        while self.catch_up(rows_max=rows_max).keys >= rows_max:
            check()

    def bound_waits(self, timeout_ms: int, *, locks_only: bool = False) -> None:
        """From now on no lock is waited for, and no statement runs, for longer than that on either side.

        `locks_only`: statements may take their time.
        """
        for connection in (self.giver, self.receiver):
            for setting in ("lock_timeout", "statement_timeout")[: 1 if locks_only else 2]:
                connection.execute("SELECT pg_catalog.set_config(%s, %s, false)", (setting, f"{timeout_ms}ms"))

    def _pass(self, rows_max: int | None, at_snapshot: Callable[[], None]) -> Pass:
        started = time.monotonic()
        with both_transactions(self):
            keys, xmin, left = self._take(rows_max)
            carried = sum(len(positions) for positions in keys.values())
            if carried:
                self._apply(keys)
                self._flush_giver()
            at_snapshot()
            if carried:
                effects.commit(self.receiver, Effect.CATCH_UP_RECEIVER)
                effects.commit(self.giver, Effect.CATCH_UP_GIVER)
            else:  # nothing to make durable: no flush
                effects.roll_back(self.receiver)
                effects.roll_back(self.giver)
        points.reach("catch_up.after_pass")
        for ordinal, oldest in left.items():
            self.scan_from[ordinal] = xmin if oldest is None else min(xmin, oldest)
        return Pass(carried, all(oldest is None for oldest in left.values()), time.monotonic() - started, xmin)

    def _take(self, rows_max: int | None) -> tuple[Keys, int, dict[int, int | None]]:
        """Deletes what the gate lets through: keys per table, the snapshot's xmin, the oldest entry left per table."""
        keys: dict[int, list[Position]] = {}
        left: dict[int, int | None] = {}
        with self.giver.pipeline():  # two statements a table, one round trip for all of them
            xmin = _snapshot_xmin(self.giver)
            entries, oldest = {}, {}
            for ordinal, table in enumerate(self.tables, 1):
                start = self.scan_from.get(ordinal, 0)
                entries[ordinal] = take_entries(
                    self.giver, self.move.id, ordinal, table, self.gate[ordinal], start, rows_max
                )
                oldest[ordinal] = oldest_left(self.giver, self.move.id, ordinal, start)
            for ordinal in entries:
                keys[ordinal] = list(dict.fromkeys(tuple(row) for row in entries[ordinal].fetchall()))
                row = oldest[ordinal].fetchone()
                left[ordinal] = None if row is None else int(row[0])
        return keys, _xmin(xmin), left

    def _apply(self, keys: Keys) -> None:
        become_replica(self.receiver, self.move.id, self.tables)
        by_ordinal = dict(enumerate(self.tables, 1))
        changed = {ordinal: positions for ordinal, positions in keys.items() if positions}
        for ordinal in sorted(changed, reverse=True):
            delete_rows(self.receiver, self.move, by_ordinal[ordinal], changed[ordinal])
        for ordinal in sorted(changed):
            table, positions = by_ordinal[ordinal], changed[ordinal]
            rows = read_rows(self.move, table, positions)
            sent = relay(self.giver, rows, self.receiver, copy_in(table))
            points.reach("catch_up.before_compare")
            compare(sent, digest_of(self.receiver, rows), self.move, table)

    def _flush_giver(self) -> None:
        """An application's asynchronous commit that we carried over must not outlive its own shard."""
        flush_log(self)


@contextmanager
def both_transactions(mirror: Mirror) -> Iterator[None]:
    """Begins both transactions of a pass; rolls both back on any error. Who commits is the caller.

    A connection that does not even take the rollback is closed, for the owner of the mirror to replace.
    """
    try:
        for begin in beginnings():
            begin(mirror)
        yield
    except BaseException:
        for connection in (mirror.receiver, mirror.giver):
            _roll_back(connection)
        raise


def _roll_back(connection: Connection) -> None:
    try:
        connection.rollback()
    except psycopg.Error:
        connection.close()


def beginnings() -> Sequence[Callable[[Mirror], None]]:
    """The receiver's lock, row and records first, then the giver's snapshot (I3)."""
    return begin_receiver, begin_giver


def begin_receiver(mirror: Mirror) -> None:
    """The receiver's lock, its own record, and the gate, in this order."""
    move, receiver = mirror.move, mirror.receiver
    with receiver.pipeline():  # the statements go one by one; their answers are waited for together
        effects.begin(receiver)
        receiver.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock(mirror_key) FROM shardmove.fence WHERE move_id = %s", (move.id,)
        )
        row = fence.check_receiving(receiver, move.id, move.giver(mirror.direction))
    if not mirror.is_guarded:
        drift.check_identity(receiver, move.receiver(mirror.direction), move.identities)
    points.reach("catch_up.after_receiver_lock")
    mirror.gate = gate(receiver, row, mirror.tables)


def begin_giver(mirror: Mirror) -> None:
    """The snapshot that entries and rows are read at. REPEATABLE READ: the set of entries is the snapshot's."""
    giver_name = mirror.move.giver(mirror.direction)
    effects.begin(mirror.giver, giver_isolation())
    if not mirror.is_guarded:
        drift.check_identity(mirror.giver, giver_name, mirror.move.identities)
        drift.check_fingerprint(mirror.giver, mirror.move.id, mirror.tables, giver_name, seen=mirror.fingerprint_seen)
    points.reach("catch_up.after_giver_snapshot")


def giver_isolation() -> LiteralString:
    return "REPEATABLE READ"


def _snapshot_xmin(connection: Connection) -> Rows:
    return connection.execute("SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text")


def _xmin(rows: Rows) -> int:
    row = rows.fetchone()
    assert row is not None
    return int(row[0])


def take_entries(
    giver: Connection,
    move_id: str,
    ordinal: int,
    table: Table,
    passes: sql.Composable,
    start: int,
    rows_max: int | None,
) -> Rows:
    """Deletes the entries that are visible and let through; their keys, not yet fetched, one for each entry."""
    name = journal(move_id, ordinal)
    wanted = sql.SQL("{} >= {}::xid8 AND {}").format(sql.Identifier(XID), sql.Literal(str(start)), passes)
    if rows_max is not None:
        # The oldest first, which the index answers: without an order the server reads past all dead entries.
        wanted = sql.SQL("ctid = ANY (ARRAY(SELECT ctid FROM {} WHERE {} ORDER BY {} LIMIT {}))").format(
            name, wanted, sql.Identifier(XID), sql.Literal(rows_max)
        )
    return giver.execute(sql.SQL("DELETE FROM {} WHERE {} RETURNING {}").format(name, wanted, table.keyset_as_text()))


def oldest_left(giver: Connection, move_id: str, ordinal: int, start: int) -> Rows:
    """The oldest entry that stays: gated, or beyond the bound. The next scan must not start after it."""
    return giver.execute(
        # Qualified: the bare name in ORDER BY would be the output column, and that is text.
        sql.SQL("SELECT j.{xid}::text FROM {} AS j WHERE j.{xid} >= {}::xid8 ORDER BY j.{xid} LIMIT 1").format(
            journal(move_id, ordinal), sql.Literal(str(start)), xid=sql.Identifier(XID)
        )
    )


# --- pieces that batches share


def in_move(move: Move, table: Table) -> sql.Composable:
    """The range's predicate: on a live target the same id may belong to another tenant."""
    return in_ranges(
        sql.Identifier(table.key_column), move.ranges, move.keyspace, sorts_as_bytes=not table.key_collated
    )


def delete_rows(receiver: Connection, move: Move, table: Table, positions: Sequence[Position]) -> None:
    receiver.execute(
        sql.SQL("DELETE FROM {} WHERE {} AND {}").format(table.rows, table.listed(positions), in_move(move, table))
    )


def read_rows(move: Move, table: Table, positions: Sequence[Position]) -> sql.Composed:
    """The rows at these positions as they are now, if they are in the range: a re-read, never an image (I3)."""
    return select_rows(table, sql.SQL("{} AND {}").format(table.listed(positions), in_move(move, table)))


def select_rows(table: Table, condition: sql.Composable) -> sql.Composed:
    """COPY of the named columns in keyset order: the same bytes on both sides for the same rows."""
    return sql.SQL("COPY (SELECT {} FROM {} WHERE {} ORDER BY {}) TO STDOUT {}").format(
        names(table.columns), table.rows, condition, table.order, table.copy_options
    )


def copy_in(table: Table) -> sql.Composed:
    return sql.SQL("COPY {} ({}) FROM STDIN {}").format(table_sql(table), names(table.columns), table.copy_options)


def relay(giver: Connection, rows: sql.Composed, receiver: Connection, into: sql.Composed) -> Digest:
    """Streams a COPY from one server into the other, hashing on the way. Memory: one block, or one row."""
    hasher = Hasher()
    with receiver.cursor() as writing:
        with writing.copy(into) as sink:

            def take(block: bytearray) -> None:
                hasher.update(block)
                sink.write(block)

            read = copy_out(giver, rows, take)
        if read != writing.rowcount:
            raise BatchMismatch(f"{read} rows were read, {writing.rowcount} were written")
    return hasher.digest(read)


def digest_of(connection: Connection, rows: sql.Composed) -> Digest:
    """The digest of what a COPY TO yields, without keeping it."""
    hasher = Hasher()
    return hasher.digest(copy_out(connection, rows, hasher.update))


def compare(sent: Digest, stored: Digest, move: Move, table: Table) -> None:
    """Raises BatchMismatch unless what the receiver stores is what the giver sent, exactly."""
    if sent != stored:
        raise BatchMismatch(
            f"move {move.id}: the target read back other rows of {table.name} than were sent:"
            f" {sent} sent, {stored} stored",
            hint="look for triggers, rules, types or collations on the target that change what is written",
        )


def flush_log(mirror: Mirror) -> None:
    """Makes the giver's log durable up to the snapshot, before the receiver commits what was read from it."""
    if mirror.giver.info.server_version >= 170000:
        with points.around(Effect.MAKE_DURABLE):
            mirror.giver.execute("SELECT pg_catalog.pg_logical_emit_message(false, 'shardmove', '', true)")
        return
    if mirror.flusher is None or mirror.flusher.closed:
        mirror.flusher = connect(mirror.giver_dsn, application_name=fence.application_name(mirror.move.id))
    make_durable(mirror.flusher)
    require_reader(mirror)


def require_reader(mirror: Mirror) -> None:
    """The session that read is there still, so its server has not been restarted since: what it read was made durable.

    The flusher may be a session of a server that has forgotten it.
    """
    mirror.giver.execute("SELECT 1")


def make_durable(giver: Connection) -> None:
    """Everything that was visible to this session is durable on the server when it returns. Outside a transaction.

    A transaction that wrote to the log and commits synchronously takes all that is before it along.
    """
    with points.around(Effect.MAKE_DURABLE):
        giver.execute("SELECT pg_catalog.pg_logical_emit_message(true, 'shardmove', '')")
