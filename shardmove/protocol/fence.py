"""The fence row: this shard's own record of its part in a move, and the only way to change it.

Two things change together: the row, which is for us, and the state sequence, which is what writers check. Closing takes
the fence's exclusive lock, so that it waits for every writer that passed and makes all others wait behind it. Opening
needs no such lock: it only permits, and the row's own lock puts it before or after a closing.

Orderings that other code relies on:

* Every change is conditional on the row as it is under its lock, and does nothing where the condition fails. A closing
  asks for `attempt < N`, an opening for `attempt <= N`, and stamps N also where the fence is open already: so a closer
  that wakes after its attempt was abandoned, and an opener that wakes after a later attempt closed, change nothing.
* The state is set after the row, in the row's transaction. A sequence is not rolled back: a closing that dies between
  the two leaves a fence that is closed and says open (an opening for the same attempt mends it), never the other
  way round, because an opening is only asked for when it is decided already.
* Whoever applies rows here (catch-ups, batches) holds the row FOR SHARE until its commit. So ending "mirrored from"
  waits for all of them, and none starts afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import LiteralString, TypeVar

from psycopg import errors, sql
from psycopg.rows import class_row

from shardmove.domain import points
from shardmove.domain.errors import AttemptDecided, Failed, LeaseLost, MirrorRefused, Refused
from shardmove.domain.moves import Standing
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.protocol.capture import CLOSED, OPEN
from shardmove.protocol.objects import set_state
from shardmove.protocol.parts import state_sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FenceRow:
    """The row as read. `is_open` is what the row says; writers look at the state sequence."""

    move_id: str
    peer: str
    standing: str
    is_open: bool
    is_whole: bool
    attempt: int
    lease_number: int
    fence_key: int
    mirror_key: int
    kept_before: list[str]
    fingerprint: str | None
    mirror_role: str
    is_mirror_role: bool


_ROW = sql.SQL(
    "SELECT move_id, peer, standing, is_open, is_whole, attempt, lease_number, fence_key, mirror_key, kept_before,"
    " fingerprint, mirror_role, mirror_role = session_user AS is_mirror_role FROM shardmove.fence WHERE move_id = {}"
)


def read(connection: Connection, move_id: str, *, share: bool = False) -> FenceRow | None:
    """The row, or None where the move has no objects here. `share`: locked until the transaction ends."""
    query = _ROW.format(sql.Literal(move_id)) + sql.SQL(" FOR SHARE" if share else "")
    with connection.cursor(row_factory=class_row(FenceRow)) as cursor:
        return cursor.execute(query).fetchone()


def state(connection: Connection, move_id: str) -> int:
    """What writers see now."""
    row = connection.execute(sql.SQL("SELECT last_value FROM {}").format(state_sequence(move_id))).fetchone()
    assert row is not None
    return int(row[0])


# --- numbers (I8)


def check_lease(connection: Connection, move_id: str, lease_number: int) -> FenceRow:
    """Locks the row FOR SHARE until the transaction ends, and requires our number in it.

    A plain read would let a zombie pass: it reads its own number, sleeps, and acts after the takeover.

    Raises:
        LeaseLost: another coordinator took over, or the objects are gone. Nothing was changed.
    """
    row = read(connection, move_id, share=True)
    if row is None or row.lease_number != lease_number:
        raise LeaseLost(f"move {move_id}: another coordinator has taken over (lease {lease_number} is not current)")
    return row


def raise_number(connection: Connection, move_id: str, lease_number: int, *, patience_s: float = 10.0) -> None:
    """Makes this shard refuse every lower number from now on, and know our role's writes as the mirror's.

    Only upwards; safe to repeat.

    A paused former holder that sits on the row is ended: its transaction is rolled back by the server.

    Raises:
        LeaseLost: the shard has seen a higher number already.
        Failed: somebody sits on the row and cannot be ended.
    """

    def raise_it() -> tuple[object, ...] | None:
        connection.execute(
            "INSERT INTO shardmove.lease AS known (move_id, number) VALUES (%s, %s) ON CONFLICT (move_id)"
            " DO UPDATE SET number = excluded.number WHERE known.number < excluded.number",
            (move_id, lease_number),
        )
        connection.execute(
            "UPDATE shardmove.fence SET lease_number = %s, mirror_role = session_user"
            " WHERE move_id = %s AND lease_number < %s",
            (lease_number, move_id, lease_number),
        )
        return connection.execute("SELECT number FROM shardmove.lease WHERE move_id = %s", (move_id,)).fetchone()

    newest = _past_holders(connection, move_id, Effect.RAISE_NUMBER, raise_it, patience_s=patience_s)
    if newest != (lease_number,):
        raise LeaseLost(f"move {move_id}: another coordinator has taken over (lease {lease_number} is not current)")


def _end_holders(connection: Connection, move_id: str) -> None:
    # Only sessions of ours that work for this move: they carry its id in their application_name.
    with points.around(Effect.END_SESSIONS):
        connection.execute(
            "SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_stat_activity a"
            " WHERE a.application_name = %s AND a.pid <> pg_catalog.pg_backend_pid() AND EXISTS"
            " (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.granted"
            "  AND l.relation IN ('shardmove.fence'::regclass, 'shardmove.lease'::regclass))",
            (application_name(move_id),),
        )


def end_former(connection: Connection, move_id: str) -> None:
    """Ends sessions of ours for the move that hold a lock here and wait for their own process: perhaps a stopped one's.

    To be called by who takes the move over. A former holder changes nothing any more, but what it locked would stay
    locked (a cutover's guards, a pass's entries, a table whose triggers were to change), and who comes next would wait
    for as long as that process is stopped. An attendant that is ended with them tries again. Sessions of
    another role are left alone.
    """
    with points.around(Effect.END_SESSIONS):
        connection.execute(
            "SELECT pg_catalog.pg_terminate_backend(a.pid, 1000) FROM pg_catalog.pg_stat_activity a"
            " WHERE a.datname = pg_catalog.current_database() AND a.application_name = %s AND a.usename = session_user"
            " AND a.pid <> pg_catalog.pg_backend_pid() AND a.wait_event_type = 'Client' AND EXISTS"
            " (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.granted"
            "  AND l.locktype IN ('advisory', 'relation', 'transactionid'))",
            (application_name(move_id),),
        )


def application_name(move_id: str) -> str:
    """What our sessions for a move are called, everywhere."""
    return f"shardmove {move_id}"


# --- closing and opening


class WriterInTheWay(Failed):
    """A transaction that wrote to the range did not end in time. The fence is as it was."""


def holders(connection: Connection, fence_key: int, *, longer_than_s: float) -> list[str]:
    """Transactions that wrote to the range and have been open for longer: a closing would wait for them."""
    rows = connection.execute(
        "SELECT a.pid, a.application_name, extract('epoch' FROM pg_catalog.clock_timestamp() - a.xact_start)::float8"
        " FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1"
        " AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())"
        " AND ((l.classid::int8 << 32) | l.objid::int8) = %s"
        " AND a.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => %s) ORDER BY 3 DESC",
        (fence_key, longer_than_s),
    ).fetchall()
    # A prepared transaction has no process; what its locks have in common is the virtual transaction that it was.
    prepared = connection.execute(
        "SELECT p.gid FROM pg_catalog.pg_prepared_xacts p"
        " JOIN pg_catalog.pg_locks x ON x.locktype = 'transactionid' AND x.transactionid = p.transaction"
        " JOIN pg_catalog.pg_locks l USING (virtualtransaction) WHERE x.pid IS NULL AND l.pid IS NULL"
        " AND p.database = pg_catalog.current_database() AND l.locktype = 'advisory' AND l.objsubid = 1"
        " AND ((l.classid::int8 << 32) | l.objid::int8) = %s",
        (fence_key,),
    ).fetchall()
    return [f"pid {pid} ({name}) for {age:.1f} s" for pid, name, age in rows] + [
        f"prepared transaction {gid!r}" for (gid,) in prepared
    ]


def close(connection: Connection, move_id: str, *, attempt: int, lease_number: int, lock_timeout_ms: int) -> None:
    """Closes the owner's fence for an attempt: when this returns, no further write to the range can commit here.

    Writers that passed before are waited for; all others queue behind us, then are refused with 40001.

    Raises:
        WriterInTheWay: a writer did not end within the timeout. The fence is as it was.
        LeaseLost, AttemptDecided: the conditions do not hold any more. The fence is as it was.
    """
    try:
        with effects.writing(connection, Effect.CLOSE):
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{lock_timeout_ms}ms",))
            # Writers wait for this transaction: where this process freezes in it, the server ends it.
            connection.execute(
                "SELECT pg_catalog.set_config('idle_in_transaction_session_timeout', %s, true)",
                (f"{lock_timeout_ms}ms",),
            )
            lock_exclusively(connection, move_id)
            points.reach("close.after_lock")
            closed = connection.execute(
                "UPDATE shardmove.fence SET attempt = %s, is_open = false"
                " WHERE move_id = %s AND attempt < %s AND lease_number = %s AND standing = 'owner'",
                (attempt, move_id, attempt, lease_number),
            ).rowcount
            if not closed:
                raise _why_not_closed(connection, move_id, attempt, lease_number)
            set_state(connection, move_id, CLOSED)
    except errors.LockNotAvailable:
        raise WriterInTheWay(
            f"move {move_id}: a transaction that wrote to the range did not end in {lock_timeout_ms} ms"
        ) from None


def lock_exclusively(connection: Connection, move_id: str) -> None:
    """Waits for every writer that passed the fence, and holds off all others until the transaction ends."""
    connection.execute(
        "SELECT pg_catalog.pg_advisory_xact_lock(fence_key) FROM shardmove.fence WHERE move_id = %s", (move_id,)
    )


def _why_not_closed(connection: Connection, move_id: str, attempt: int, lease_number: int) -> Exception:
    row = read(connection, move_id)
    if row is None or row.lease_number != lease_number:
        return LeaseLost(f"move {move_id}: another coordinator has taken over (lease {lease_number} is not current)")
    if row.standing != Standing.OWNER:
        return Refused(f"move {move_id}: this shard does not own the range; there is nothing to close")
    return AttemptDecided(f"move {move_id}: attempt {attempt} is decided already on this shard")


def open_(connection: Connection, move_id: str, *, attempt: int) -> bool:
    """Opens the fence here after the attempt was decided in this shard's favour, and makes it the owner.

    To be called only when the catalog says so: flipped, on the receiver; abandoned, on the giver. Any party may.
    Does nothing, and returns False, where a later attempt has closed or opened it since.
    """

    def open_it() -> bool:
        opened = connection.execute(
            "UPDATE shardmove.fence SET attempt = %s, is_open = true, is_whole = true, standing = 'owner'"
            " WHERE move_id = %s AND {condition}".replace("{condition}", opening_condition()),
            (attempt, move_id, attempt),
        ).rowcount
        if opened:
            set_state(connection, move_id, OPEN)
        return bool(opened)

    return _past_holders(connection, move_id, Effect.OPEN, open_it)


def _past_holders(
    connection: Connection, move_id: str, effect: Effect, change: Callable[[], T], *, patience_s: float = 10.0
) -> T:
    """Runs a change of the row in a transaction; ends sessions of ours that sit on it.

    Raises:
        Failed: somebody sits on the row and cannot be ended. Nothing was changed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with effects.writing(connection, effect):
                connection.execute("SELECT pg_catalog.set_config('lock_timeout', '500ms', true)")
                return change()
        except errors.LockNotAvailable:
            _end_holders(connection, move_id)
            if time.monotonic() > deadline:
                raise Failed(
                    f"move {move_id}: a former coordinator's session holds the fence row and cannot be ended",
                    hint=f"end the shard's sessions of application_name '{application_name(move_id)}', run it again",
                ) from None


def opening_condition() -> LiteralString:
    """A late opener, for an attempt that is older than the newest one seen here, does nothing."""
    return "attempt <= %s"


def give_away(connection: Connection, move_id: str, *, attempt: int) -> bool:
    """Records on the giver that the attempt flipped: from now on it is mirrored from the other side.

    Does nothing, and returns False, where a later attempt was seen here. Any party may, after the flip.
    """

    def give() -> bool:
        return bool(
            connection.execute(
                "UPDATE shardmove.fence SET standing = 'mirror', is_whole = true"
                " WHERE move_id = %s AND attempt = %s AND NOT is_open AND standing = 'owner'",
                (move_id, attempt),
            ).rowcount
        )

    return _past_holders(connection, move_id, Effect.GIVE_AWAY, give)


def retire(connection: Connection, move_id: str, *, lease_number: int) -> None:
    """Ends "mirrored from" for good on a side that does not own the range; waits for catch-ups and batches under way.

    Only then may rows be erased here: a catch-up that had read the batch records before would bring rows back.

    Raises:
        LeaseLost: the number is not ours. Nothing was changed.
        Refused: this side owns the range. Nothing was changed.
    """
    with effects.writing(connection, Effect.RETIRE):
        retired = connection.execute(
            "UPDATE shardmove.fence SET standing = 'retired'"
            " WHERE move_id = %s AND lease_number = %s AND NOT is_open AND standing <> 'owner'",
            (move_id, lease_number),
        ).rowcount
        if not retired:
            check_lease(connection, move_id, lease_number)
            raise Refused(f"move {move_id}: this shard owns the range; nothing may be erased on it")


def check_erasable(connection: Connection, move_id: str, lease_number: int) -> None:
    """I6, in the eraser's own transaction: given away or never taken over, closed, nobody mirrors into it.

    Raises:
        LeaseLost, Refused: one of these does not hold. Nothing was changed.
    """
    row = check_lease(connection, move_id, lease_number)
    if row.standing != Standing.RETIRED or row.is_open or state(connection, move_id) != CLOSED:
        raise Refused(f"move {move_id}: nothing may be erased here: this side is {row.standing}")


def check_receiving(connection: Connection, move_id: str, giver: str) -> FenceRow:
    """For everybody who applies rows: locks the row FOR SHARE, and requires "closed, mirrored from that side".

    Raises:
        MirrorRefused: this side is open, owns the range, was retired, or is no part of the move. Nothing was changed.
    """
    row = read(connection, move_id, share=True)
    if row is None or row.is_open or row.standing != Standing.MIRROR or row.peer != giver:
        said = "has no part in the move" if row is None else f"is {row.standing}, {'open' if row.is_open else 'closed'}"
        raise MirrorRefused(f"move {move_id}: the receiving side is not mirrored from {giver}: it {said}")
    if not row.is_mirror_role:
        raise MirrorRefused(
            f"move {move_id}: this session's role is not the one that the move runs as ({row.mirror_role})",
            hint="use the same role for every coordinator and attendant of a move",
        )
    return row


def set_whole(connection: Connection, move_id: str, *, lease_number: int) -> None:
    """Every batch is committed here: the gate lets everything through from now on."""
    with effects.writing(connection, Effect.MARK_WHOLE):
        check_lease(connection, move_id, lease_number)
        connection.execute("UPDATE shardmove.fence SET is_whole = true WHERE move_id = %s", (move_id,))
