"""Kept fences: a shard that gave a range away refuses it for ever, or until the range comes back (I4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from psycopg import sql

from shardmove.domain import points
from shardmove.domain.keys import KeyRange, merged, subtract
from shardmove.domain.moves import Keyspace, Move
from shardmove.domain.points import Effect
from shardmove.postgres import effects, locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, plain_tables, table_sql
from shardmove.protocol import parts
from shardmove.protocol.capture import when
from shardmove.protocol.families import enable_always
from shardmove.protocol.parts import EVENTS, KEPT_PREFIX

STOPPED_S = 30
"""So long may a process stand still with the lock of `changing`."""


def kept_ranges(connection: Connection, keyspace: Keyspace) -> tuple[KeyRange, ...]:
    """The ranges of the keyspace that this shard gave away for good, merged."""
    rows = connection.execute(
        "SELECT lower, upper FROM shardmove.kept WHERE keyspace = %s", (keyspace.name,)
    ).fetchall()
    return merged(keyspace.bound_type.range_of(lower, upper) for lower, upper in rows)


def remainder(connection: Connection, move: Move) -> tuple[KeyRange, ...]:
    """What stays kept here when the move brings its ranges back."""
    return subtract(kept_ranges(connection, move.keyspace), move.ranges)


def refused(connection: Connection, move: Move) -> tuple[KeyRange, ...]:
    """What this shard still refuses of the move's ranges, as given away for good."""
    return _common(kept_ranges(connection, move.keyspace), move.ranges)


def _common(some: Iterable[KeyRange], others: Sequence[KeyRange]) -> tuple[KeyRange, ...]:
    pairs = (one.intersection(other) for one in some for other in others)
    return tuple(common for common in pairs if common is not None)


def keep_fence(
    connection: Connection,
    move: Move,
    given: Sequence[KeyRange],
    tables: Sequence[Table],
    patience: locks.Patience,
    *,
    lease_number: int,
) -> None:
    """Refuses writes to the given ranges on this shard from now on, without any move's own objects (I4).

    The move's closed fence is still there while this is put in place: there is no gap. Safe to repeat.

    Raises:
        Failed: a table could not be locked; run it again.
        LeaseLost: another coordinator has taken over: the range may have come back since.
    """
    with changing(connection, move.keyspace):
        ranges = merged([*kept_ranges(connection, move.keyspace), *given])
        points.reach("keep_fence.before_tables")
        for table in tables:

            def keep(table: Table = table) -> None:
                set_triggers(connection, table, ranges, move.keyspace)

            locks.change_table(
                connection,
                table.name,
                Effect.KEEP_FENCE,
                keep,
                patience=patience,
                check=lambda: parts.hold_lease(connection, move.id, lease_number),
            )
        record(connection, move.keyspace, ranges, move.id, lease_number)


def bare_tables(connection: Connection, keyspace: Keyspace) -> list[Table]:
    """Tables of the keyspace on this shard that do not refuse what it gave away: added, or made anew, since then."""
    if not kept_ranges(connection, keyspace):
        return []
    return [table for table in plain_tables(connection, keyspace.tables) if not is_on(connection, table)]


def extend(connection: Connection, keyspace: Keyspace, patience: locks.Patience) -> list[Table]:
    """Puts the kept fence on tables that lack it; returns them. Safe to repeat.

    Raises Failed where a table could not be locked; run it again.
    """
    with changing(connection, keyspace):  # nobody changes what is kept meanwhile
        ranges = kept_ranges(connection, keyspace)
        bare = bare_tables(connection, keyspace)
        for table in bare:

            def keep(table: Table = table) -> None:
                set_triggers(connection, table, ranges, keyspace)

            locks.change_table(connection, table.name, Effect.KEEP_FENCE, keep, patience=patience)
    return bare


@contextmanager
def changing(connection: Connection, keyspace: Keyspace) -> Iterator[None]:
    """One at a time: the kept fences of two moves are merged into one condition per table."""
    key = "shardmove kept " + keyspace.name
    # Other moves wait for this lock: where this process is stopped, the server ends the session.
    connection.execute("SELECT pg_catalog.set_config('idle_session_timeout', %s, false)", (f"{STOPPED_S}s",))
    connection.execute("SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended(%s, 0))", (key,))
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_catalog.pg_advisory_unlock(pg_catalog.hashtextextended(%s, 0))", (key,))
            connection.execute("SELECT pg_catalog.set_config('idle_session_timeout', '0', false)")


def record(
    connection: Connection, keyspace: Keyspace, ranges: Iterable[KeyRange], move_id: str, lease_number: int
) -> None:
    """Writes down which ranges are kept; what the triggers say is set before."""
    with effects.writing(connection, Effect.RECORD_KEPT):
        parts.hold_lease(connection, move_id, lease_number)
        connection.execute("DELETE FROM shardmove.kept WHERE keyspace = %s", (keyspace.name,))
        for range_ in ranges:
            connection.execute(
                "INSERT INTO shardmove.kept (keyspace, lower, upper) VALUES (%s, %s, %s)",
                (keyspace.name, *range_.ends),
            )


def is_on(connection: Connection, table: Table) -> bool:
    """A kept fence is on the table."""
    return bool(_present(connection, table))


def _present(connection: Connection, table: Table) -> list[str]:
    rows = connection.execute(
        "SELECT t.tgname FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass(%s)"
        " AND NOT t.tgisinternal AND pg_catalog.starts_with(t.tgname, %s) ORDER BY 1",
        (table_sql(table).as_string(connection), KEPT_PREFIX),
    ).fetchall()
    return [row[0] for row in rows]


def set_triggers(connection: Connection, table: Table, ranges: Sequence[KeyRange], keyspace: Keyspace) -> None:
    """Makes the table refuse exactly these ranges; none where there are none: then without readers."""
    if not ranges:
        for name in _present(connection, table):
            connection.execute(sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(name), table_sql(table)))
        return
    for event in EVENTS:
        connection.execute(
            sql.SQL(
                "CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW WHEN ({})"
                " EXECUTE FUNCTION shardmove.refuse_kept()"
            ).format(
                sql.Identifier(KEPT_PREFIX + event.lower()),
                sql.SQL(event),
                table_sql(table),
                when(event, table.key_column, ranges, keyspace),
            )
        )
    enable_always(connection, table, KEPT_PREFIX)
