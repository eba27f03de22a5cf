"""The objects of a move on its two shards, and the SQL of the triggers.

Each moving table gets three row triggers and a TRUNCATE trigger, on both shards. A row trigger does two things, in this
order: it passes the fence, and it journals the row's keyset. Whether it may pass is read in a statement of its own,
after the statement that took the fence's shared lock (in one statement, or in a STABLE function, a closed fence is
passed), from a sequence, because a sequence's value is the newest one whatever the transaction's snapshot.

    state 1  closed         every write to the range is refused with 40001
    state 2  open           writes pass, and are journalled
    no row   (not visible)  refused: passing needs "found and open"

Names: everything is in the schema `shardmove`, but for the triggers, which are called `shardmove_<move>_…`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import LiteralString

from psycopg import sql

from shardmove.domain import points
from shardmove.domain.errors import LeaseLost, Refused
from shardmove.domain.keys import KeyRange, KeyType, merged, subtract
from shardmove.domain.moves import Keyspace, Move, Standing, TableName
from shardmove.postgres import locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import KeysetColumn, Table, table_sql
from shardmove.postgres.sql import in_ranges, names, type_name

LAYOUT = 1
CLOSED, OPEN = 1, 2
MARKER = "shardmove.mirror"
_ROWS_OF: Mapping[str, Sequence[LiteralString]] = {
    "INSERT": ("NEW.",),
    "DELETE": ("OLD.",),
    "UPDATE": ("OLD.", "NEW."),
}
EVENTS: tuple[LiteralString, ...] = ("INSERT", "UPDATE", "DELETE")
XID = "shardmove_xid"
"""The journal's own column; the others are named as the keyset columns are, so that they share predicates."""


# --- names


def state_sequence(move_id: str) -> sql.Identifier:
    return sql.Identifier("shardmove", f"state_{move_id}")


def journal(move_id: str, ordinal: int) -> sql.Identifier:
    return sql.Identifier("shardmove", f"journal_{move_id}_{ordinal}")


def capture_function(move_id: str, ordinal: int) -> sql.Identifier:
    return sql.Identifier("shardmove", f"capture_{move_id}_{ordinal}")


def trigger_prefix(move_id: str) -> str:
    return f"shardmove_{move_id}_"


def trigger(move_id: str, event: str) -> sql.Identifier:
    return sql.Identifier(trigger_prefix(move_id) + event.lower())


# --- the schema itself


def install_schema(connection: Connection, cluster_id: str) -> None:
    """Makes the schema `shardmove` on a shard, or checks that the one that is there is ours. Safe to repeat.

    Raises:
        Refused: the shard belongs to another catalog, or was touched by a newer release. Nothing was changed.
    """
    with connection.transaction():
        connection.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('shardmove schema', 0))"
        )
        if not has_schema(connection):
            connection.execute(files("shardmove.protocol").joinpath("shard.sql").read_bytes())
            connection.execute("INSERT INTO shardmove.about VALUES (%s, %s)", (cluster_id, LAYOUT))
        check_schema(connection, cluster_id)


def check_schema(connection: Connection, cluster_id: str) -> None:
    """Raises Refused unless the shard's schema was made by this catalog and by no newer release."""
    row = connection.execute("SELECT cluster_id, layout FROM shardmove.about").fetchone()
    if row is None or row[0] != cluster_id:
        raise Refused(
            "this shard belongs to another shardmove catalog",
            hint="if that catalog is gone: `shardmove uninstall` with it, or DROP SCHEMA shardmove CASCADE by hand",
        )
    if row[1] > LAYOUT:
        raise Refused("this shard was touched by a newer release of shardmove", hint="use that release")


def has_schema(connection: Connection) -> bool:
    """The schema is there. Asked of the catalog's rows: to_regclass() may answer from what the session saw before."""
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = 'shardmove' AND c.relname = 'about')"
    ).fetchone()
    return row == (True,)


# --- whose objects they are (I8)


def hold_lease(connection: Connection, move_id: str, lease_number: int) -> None:
    """In the transaction of every change of objects: our number is the newest here, and the move has not ended here.

    The row is locked until the transaction ends: a takeover waits for it, or ends the session.

    Raises:
        LeaseLost: neither is changed, nor anything else by this transaction.
    """
    row = connection.execute(
        "SELECT number FROM shardmove.lease WHERE move_id = %s AND NOT has_ended FOR SHARE", (move_id,)
    ).fetchone()
    if row != (lease_number,):
        raise LeaseLost(f"move {move_id}: another coordinator has taken over, or the move has ended on this shard")


def has_ended(connection: Connection, move_id: str) -> bool:
    """The move's objects were taken off this shard, for good."""
    row = connection.execute("SELECT has_ended FROM shardmove.lease WHERE move_id = %s", (move_id,)).fetchone()
    return row == (True,)


# --- the objects of one move


@dataclass(frozen=True, slots=True)
class Part:
    """One shard's part in a move when it begins: the source owns the range and is open, the target is neither."""

    move: Move
    tables: Sequence[Table]
    is_source: bool

    @property
    def peer(self) -> str:
        return self.move.target if self.is_source else self.move.source

    @property
    def standing(self) -> Standing:
        return Standing.OWNER if self.is_source else Standing.MIRROR


def install_move(connection: Connection, part: Part, *, lease_number: int) -> None:
    """Makes the fence row, the state sequence, the journals and the functions of a move on one shard.

    One transaction; where the fence row is there already it changes nothing, so that a repeat never opens or closes
    anything. Raises LeaseLost.
    """
    move_id = part.move.id
    with connection.transaction():
        hold_lease(connection, move_id, lease_number)
        made = connection.execute(
            "INSERT INTO shardmove.fence (move_id, keyspace, peer, standing, is_open, is_whole, lease_number,"
            " fence_key, mirror_key, kept_before) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (move_id) DO NOTHING",
            (
                move_id,
                part.move.keyspace.name,
                part.peer,
                part.standing,
                part.is_source,
                part.is_source,
                lease_number,
                secrets.randbelow(2**63),
                secrets.randbelow(2**63),
                [str(range_) for range_ in _common(kept_ranges(connection, part.move.keyspace), part.move.ranges)],
            ),
        ).rowcount
        if not made:
            return
        state = state_sequence(move_id)
        connection.execute(sql.SQL("CREATE SEQUENCE {} MINVALUE 0").format(state))
        set_state(connection, move_id, OPEN if part.is_source else CLOSED)
        for ordinal, table in enumerate(part.tables, 1):
            _record_table(connection, move_id, ordinal, table)
            _create_journal(connection, move_id, ordinal, table)
            connection.execute(capture_sql(connection, part, ordinal, table))
    points.reach("install.after_objects")


def set_state(connection: Connection, move_id: str, state: int) -> None:
    """Sets what writers see. It is not rolled back: set it after the fence row, in the same transaction."""
    connection.execute(
        sql.SQL("SELECT pg_catalog.setval({}::regclass, {})").format(
            sql.Literal(f'shardmove."state_{move_id}"'), sql.Literal(state)
        )
    )


def _record_table(connection: Connection, move_id: str, ordinal: int, table: Table) -> None:
    connection.execute(
        "INSERT INTO shardmove.moving_table VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            move_id,
            ordinal,
            table.name.schema,
            table.name.name,
            table.key_column,
            list(table.columns),
            list(table.keyset_names),
            [column.type for column in table.keyset],
            [column.collated for column in table.keyset],
            table.binary,
        ),
    )


def update_tables(connection: Connection, move_id: str, tables: Sequence[Table]) -> None:
    """Records other columns for the tables of a move; their keysets are what they were. In the caller's transaction."""
    for ordinal, table in enumerate(tables, 1):
        connection.execute(
            "UPDATE shardmove.moving_table SET columns = %s, is_binary = %s WHERE move_id = %s AND ordinal = %s",
            (list(table.columns), table.binary, move_id, ordinal),
        )


def load_tables(connection: Connection, move_id: str) -> tuple[Table, ...]:
    """The tables of a move as recorded on the shard when it began, parents first; () before that."""
    rows = connection.execute(
        "SELECT schema_name, table_name, key_column, columns, keyset, keyset_types, keyset_collated, is_binary"
        " FROM shardmove.moving_table WHERE move_id = %s ORDER BY ordinal",
        (move_id,),
    ).fetchall()
    return tuple(
        Table(
            TableName(schema, name),
            key_column,
            tuple(columns),
            tuple(KeysetColumn(*column) for column in zip(keyset, types, collated, strict=True)),
            binary,
        )
        for schema, name, key_column, columns, keyset, types, collated, binary in rows
    )


def _create_journal(connection: Connection, move_id: str, ordinal: int, table: Table) -> None:
    # No unique constraint, ever: an entry that is dropped as a duplicate is a change that is lost. FULL, so that a
    # publication FOR ALL TABLES does not make our DELETE fail.
    name = journal(move_id, ordinal)
    columns = sql.SQL(", ").join(
        sql.SQL("{} {} NOT NULL").format(sql.Identifier(column.name), type_name(column.type)) for column in table.keyset
    )
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} ({}, {} xid8 NOT NULL DEFAULT pg_catalog.pg_current_xact_id())"
            " WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000)"
        ).format(name, columns, sql.Identifier(XID))
    )
    connection.execute(sql.SQL("CREATE INDEX ON {} ({})").format(name, sql.Identifier(XID)))
    connection.execute(sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(name))


# --- what a writer runs


def capture_sql(connection: Connection, part: Part, ordinal: int, table: Table) -> sql.Composed:
    """CREATE FUNCTION of the row triggers of one table: pass the fence, then journal."""
    body = sql.SQL("DECLARE state bigint; BEGIN {} {} {} {} RETURN NULL; END").format(
        skip_own_writes(part.move.id),
        take_shared_lock(connection, part.move.id),
        check_fence(part, table),
        journal_row(part.move, ordinal, table),
    )
    return sql.SQL(
        "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER"
        " SET search_path = pg_catalog, pg_temp AS {}"
    ).format(capture_function(part.move.id, ordinal), sql.Literal(body.as_string(connection)))


def skip_own_writes(move_id: str) -> sql.Composed:
    """Our own writes are known by a marker that names the move, and only for the role that the fence row names."""
    return sql.SQL(
        "IF pg_catalog.current_setting({marker}, true) = {move} AND EXISTS (SELECT FROM shardmove.fence f"
        " WHERE f.move_id = {move} AND f.mirror_role = session_user) THEN RETURN NULL; END IF;"
    ).format(marker=sql.Literal(MARKER), move=sql.Literal(move_id))


def not_our_own(connection: Connection, move_id: str) -> sql.Composed:
    """The same question in the trigger's WHEN, for the role that armed it: a mirrored row then costs no function call.

    Where the role has changed since, the function answers.
    """
    return sql.SQL("(pg_catalog.current_setting({}, true) = {} AND session_user = {}) IS NOT TRUE").format(
        sql.Literal(MARKER), sql.Literal(move_id), sql.Literal(connection.info.user)
    )


def take_shared_lock(connection: Connection, move_id: str) -> sql.Composed:
    row = connection.execute("SELECT fence_key FROM shardmove.fence WHERE move_id = %s", (move_id,)).fetchone()
    assert row is not None, "the fence row is made before the functions"
    return sql.SQL("PERFORM pg_catalog.pg_advisory_xact_lock_shared({});").format(sql.Literal(row[0]))


def check_fence(part: Part, table: Table) -> sql.Composed:
    """Passes only where the state is found and open. A statement of its own, after the lock."""
    refusal = sql.SQL("IF {} THEN RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = {}, HINT = {}; END IF;").format(
        refused_when(),
        sql.Literal(
            f"shardmove: keys {part.move.ranges_text} of {table.name} are fenced on this shard by move {part.move.id}"
        ),
        sql.Literal(f"retry the transaction on shard {part.peer}, or where the route table says"),
    )
    return sql.SQL("{} {}").format(read_state(part.move.id), refusal)


def read_state(move_id: str) -> sql.Composed:
    """As it is now, whatever the transaction's snapshot: a sequence's row is changed in place."""
    return sql.SQL("SELECT s.last_value INTO state FROM {} AS s;").format(state_sequence(move_id))


def refused_when() -> sql.SQL:
    """Found and open, or refused: NULL is refused."""
    return sql.SQL("state IS DISTINCT FROM 2")


def journal_row(move: Move, ordinal: int, table: Table) -> sql.Composed:
    """Journals the old keyset where the old row is in the range, and the new one where it is another."""
    entry = sql.SQL("INSERT INTO {} VALUES ({}); ")
    old, new = sql.SQL("OLD."), sql.SQL("NEW.")
    target = journal(move.id, ordinal)
    return sql.SQL(
        "IF TG_OP <> 'INSERT' THEN IF {old_in} THEN {old_entry} END IF; END IF;"
        " IF TG_OP = 'INSERT' THEN {new_entry}"
        " ELSIF TG_OP = 'UPDATE' THEN IF {new_in} AND (NOT {old_in} OR ROW({news}) IS DISTINCT FROM ROW({olds}))"
        " THEN {new_entry} END IF; END IF;"
    ).format(
        old_in=_key_in(old, move, table),
        new_in=_key_in(new, move, table),
        old_entry=entry.format(target, names(table.keyset_names, prefix=old)),
        new_entry=entry.format(target, names(table.keyset_names, prefix=new)),
        news=names(table.keyset_names, prefix=new),
        olds=names(table.keyset_names, prefix=old),
    )


def _key_in(row: sql.Composable, move: Move, table: Table) -> sql.Composable:
    return in_ranges(names([table.key_column], prefix=row), move.ranges, move.keyspace.key_type)


def when(event: str, key_column: str, ranges: Iterable[KeyRange], key_type: KeyType) -> sql.Composed:
    """The WHEN of a row trigger: rows outside the ranges pay next to nothing."""
    rows = _ROWS_OF[event]
    parts = [
        in_ranges(sql.SQL("{}{}").format(sql.SQL(row), sql.Identifier(key_column)), ranges, key_type) for row in rows
    ]
    return sql.SQL(" OR ").join(parts)


# --- triggers on the tables


def install_triggers(connection: Connection, part: Part, patience: locks.Patience, *, lease_number: int) -> None:
    """Arms every table of the move, one transaction a table. Safe to repeat: an armed table is left alone.

    From the commit on, each write to the range passes the fence and is journalled: CREATE TRIGGER's lock has waited for
    the table's writers in flight, and who writes later sees the trigger, also from an older snapshot. On a shard
    whose kept fence overlaps the move's ranges, the same transaction replaces that fence by what remains of it.

    Raises:
        Failed: a table could not be locked; those before it stay armed, which harms nothing.
        LeaseLost: as above.
    """
    with _changing_kept(connection, part.move.keyspace):
        _arm(connection, part, patience, lease_number)


def _arm(connection: Connection, part: Part, patience: locks.Patience, lease_number: int) -> None:
    move = part.move
    remainder = subtract(kept_ranges(connection, move.keyspace), move.ranges)
    for ordinal, table in enumerate(part.tables, 1):
        kept_is_there = bool(_kept_triggers(connection, table))
        # Kept triggers are set anew also on an armed table: another move's ending may have widened them again since.
        if is_armed(connection, move.id, table) and not kept_is_there:
            continue

        def arm(ordinal: int = ordinal, table: Table = table, kept_is_there: bool = kept_is_there) -> None:
            hold_lease(connection, move.id, lease_number)
            if not is_armed(connection, move.id, table):
                create_triggers(connection, move, ordinal, table)
            if kept_is_there:
                _set_kept_triggers(connection, table, remainder, move.keyspace.key_type)

        drops = kept_is_there and not remainder
        locks.change_table(connection, table.name, arm, patience=patience, readers_block=drops)
        points.reach("install.after_triggers")
    _record_kept(connection, move.keyspace, remainder, move.id, lease_number)


def create_triggers(connection: Connection, move: Move, ordinal: int, table: Table) -> None:
    """ENABLE ALWAYS: what a subscription applies is a change too, and our own writes as a replica must be seen."""
    for event in EVENTS:
        rows_in_range = when(event, table.key_column, move.ranges, move.keyspace.key_type)
        connection.execute(
            sql.SQL(
                "CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW WHEN (({}) AND {}) EXECUTE FUNCTION {}()"
            ).format(
                trigger(move.id, event),
                sql.SQL(event),
                table_sql(table),
                rows_in_range,
                not_our_own(connection, move.id),
                capture_function(move.id, ordinal),
            )
        )
    connection.execute(
        sql.SQL(
            "CREATE OR REPLACE TRIGGER {} BEFORE TRUNCATE ON {} EXECUTE FUNCTION shardmove.refuse_truncate()"
        ).format(trigger(move.id, "TRUNCATE"), table_sql(table))
    )
    for event in (*EVENTS, "TRUNCATE"):
        connection.execute(
            sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table_sql(table), trigger(move.id, event))
        )


def is_armed(connection: Connection, move_id: str, table: Table) -> bool:
    """All four triggers of the move are on the table, and fire always."""
    row = connection.execute(
        "SELECT count(*) FROM pg_catalog.pg_trigger t WHERE t.tgrelid = %s::regclass AND t.tgenabled = 'A'"
        " AND pg_catalog.starts_with(t.tgname, %s)",
        (table_sql(table).as_string(connection), trigger_prefix(move_id)),
    ).fetchone()
    return row == (4,)


def remove_move(connection: Connection, move_id: str, patience: locks.Patience, *, lease_number: int) -> None:
    """Takes every object of a move off one shard: triggers off first, then all else. Safe to repeat.

    What stays is the row that says that the move has ended here.

    Raises:
        Failed: a table could not be locked; run it again.
        LeaseLost: another coordinator has taken over.
    """
    if has_ended(connection, move_id):
        return
    for table in load_tables(connection, move_id):
        _remove_triggers(connection, move_id, table, patience, lease_number)
    with connection.transaction():
        hold_lease(connection, move_id, lease_number)
        connection.execute("UPDATE shardmove.lease SET has_ended = true WHERE move_id = %s", (move_id,))
        for ordinal, _ in enumerate(load_tables(connection, move_id), 1):
            connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}()").format(capture_function(move_id, ordinal)))
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(journal(move_id, ordinal)))
        connection.execute(sql.SQL("DROP SEQUENCE IF EXISTS {}").format(state_sequence(move_id)))
        for owned in ("batch", "moving_table", "fence"):
            connection.execute(
                sql.SQL("DELETE FROM {} WHERE move_id = {}").format(
                    sql.Identifier("shardmove", owned), sql.Literal(move_id)
                )
            )
    points.reach("remove.after_objects")


def _remove_triggers(
    connection: Connection, move_id: str, table: Table, patience: locks.Patience, lease_number: int
) -> None:
    present = _trigger_names(connection, table, trigger_prefix(move_id))
    if not present:
        return

    # DISABLE is not blocked by readers, DROP is: disarm at once, drop when nobody reads.
    def disarm() -> None:
        hold_lease(connection, move_id, lease_number)
        for name in present:
            connection.execute(
                sql.SQL("ALTER TABLE {} DISABLE TRIGGER {}").format(table_sql(table), sql.Identifier(name))
            )

    def drop() -> None:
        hold_lease(connection, move_id, lease_number)
        for name in present:
            connection.execute(
                sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(name), table_sql(table))
            )

    locks.change_table(connection, table.name, disarm, patience=patience)
    locks.change_table(connection, table.name, drop, patience=patience, readers_block=True)
    points.reach("remove.after_triggers")


def _trigger_names(connection: Connection, table: Table, prefix: str) -> list[str]:
    rows = connection.execute(
        "SELECT t.tgname FROM pg_catalog.pg_trigger t WHERE t.tgrelid = pg_catalog.to_regclass(%s)"
        " AND NOT t.tgisinternal AND pg_catalog.starts_with(t.tgname, %s) ORDER BY 1",
        (table_sql(table).as_string(connection), prefix),
    ).fetchall()
    return [row[0] for row in rows]


# --- kept fences: a shard that gave a range away refuses it for ever, or until it comes back

KEPT_PREFIX = "shardmove_kept_"


def kept_ranges(connection: Connection, keyspace: Keyspace) -> tuple[KeyRange, ...]:
    """The ranges of the keyspace that this shard gave away for good, merged."""
    rows = connection.execute(
        "SELECT lower, upper FROM shardmove.kept WHERE keyspace = %s", (keyspace.name,)
    ).fetchall()
    parse = keyspace.key_type.parse
    return merged(
        KeyRange(None if low is None else parse(low), None if high is None else parse(high)) for low, high in rows
    )


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
    with _changing_kept(connection, move.keyspace):
        ranges = merged([*kept_ranges(connection, move.keyspace), *given])
        points.reach("keep.before_fence")
        for table in tables:

            def keep(table: Table = table) -> None:
                hold_lease(connection, move.id, lease_number)
                _set_kept_triggers(connection, table, ranges, move.keyspace.key_type)

            locks.change_table(connection, table.name, keep, patience=patience)
        _record_kept(connection, move.keyspace, ranges, move.id, lease_number)
    points.reach("keep.after_fence")


@contextmanager
def _changing_kept(connection: Connection, keyspace: Keyspace) -> Iterator[None]:
    """One at a time: the kept fences of two moves are merged into one condition per table."""
    key = "shardmove kept " + keyspace.name
    connection.execute("SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended(%s, 0))", (key,))
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_catalog.pg_advisory_unlock(pg_catalog.hashtextextended(%s, 0))", (key,))


def _record_kept(
    connection: Connection, keyspace: Keyspace, ranges: Iterable[KeyRange], move_id: str, lease_number: int
) -> None:
    with connection.transaction():
        hold_lease(connection, move_id, lease_number)
        connection.execute("DELETE FROM shardmove.kept WHERE keyspace = %s", (keyspace.name,))
        for range_ in ranges:
            connection.execute(
                "INSERT INTO shardmove.kept (keyspace, lower, upper) VALUES (%s, %s, %s)",
                (
                    keyspace.name,
                    None if range_.lower is None else str(range_.lower),
                    None if range_.upper is None else str(range_.upper),
                ),
            )


def _kept_triggers(connection: Connection, table: Table) -> list[str]:
    return _trigger_names(connection, table, KEPT_PREFIX)


def _set_kept_triggers(connection: Connection, table: Table, ranges: Sequence[KeyRange], key_type: KeyType) -> None:
    if not ranges:
        for name in _kept_triggers(connection, table):
            connection.execute(sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(name), table_sql(table)))
        return
    for event in EVENTS:
        kept = sql.Identifier(KEPT_PREFIX + event.lower())
        connection.execute(
            sql.SQL(
                "CREATE OR REPLACE TRIGGER {} AFTER {} ON {} FOR EACH ROW WHEN ({})"
                " EXECUTE FUNCTION shardmove.refuse_kept()"
            ).format(
                kept,
                sql.SQL(event),
                table_sql(table),
                when(event, table.key_column, ranges, key_type),
            )
        )
        connection.execute(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table_sql(table), kept))


def _common(some: Iterable[KeyRange], others: Sequence[KeyRange]) -> list[KeyRange]:
    pairs = (one.intersection(other) for one in some for other in others)
    return [common for common in pairs if common is not None]
