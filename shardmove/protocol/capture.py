"""What a writer runs: the function behind the row triggers of a moving table.

It does two things, in this order: it passes the fence, and it journals the row's keyset. Whether it may pass is read in
a statement of its own, after the statement that took the fence's shared lock (in one statement, or in a STABLE
function, a closed fence is passed), from a sequence, because a sequence's value is the newest one whatever the
transaction's snapshot.

    state 1  closed         every write to the range is refused with 40001
    state 2  open           writes pass, and are journalled
    no row   (not visible)  refused: passing needs "found and open"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import LiteralString

from psycopg import sql

from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Keyspace, Move
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import in_ranges, names
from shardmove.protocol.parts import MARKER, Part, capture_function, journal, state_sequence

CLOSED, OPEN = 1, 2
_ROWS_OF: Mapping[str, Sequence[LiteralString]] = {
    "INSERT": ("NEW.",),
    "DELETE": ("OLD.",),
    "UPDATE": ("OLD.", "NEW."),
}


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
    return in_ranges(names([table.key_column], prefix=row), move.ranges, move.keyspace)


def when(event: str, key_column: str, ranges: Iterable[KeyRange], keyspace: Keyspace) -> sql.Composed:
    """The WHEN of a row trigger: rows outside the ranges pay next to nothing."""
    rows = _ROWS_OF[event]
    parts = [
        in_ranges(sql.SQL("{}{}").format(sql.SQL(row), sql.Identifier(key_column)), ranges, keyspace) for row in rows
    ]
    return sql.SQL(" OR ").join(parts)
