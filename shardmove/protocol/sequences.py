"""Sequences of the moving tables: the receiver must never hand out a number that the giver has handed out.

They are set beforehand, with a margin, and only upwards. `setval` races with `nextval` of the receiver's own tenants:
a value computed from an old reading could put the sequence back. So a new value always lies a whole margin above both
sides, and is set only where it is above the sequence still: a process that is stopped after its reading may come back
when all of the margin has been used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from shardmove.domain.errors import Failed, Refused
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, oids, table_sql

_SEQUENCES: LiteralString = """
    FROM unnest(%s::regclass[]) AS t(oid)
    JOIN (
        SELECT d.refobjid AS relation, d.refobjsubid AS attnum, d.objid AS sequence
        FROM pg_catalog.pg_depend d
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
          AND d.refobjsubid > 0
        UNION
        SELECT ad.adrelid, ad.adnum, d.refobjid
        FROM pg_catalog.pg_attrdef ad JOIN pg_catalog.pg_depend d
          ON d.classid = 'pg_attrdef'::regclass AND d.objid = ad.oid AND d.refclassid = 'pg_class'::regclass
    ) AS used ON used.relation = t.oid
    JOIN pg_catalog.pg_class s ON s.oid = used.sequence AND s.relkind = 'S'
    JOIN pg_catalog.pg_sequence q ON q.seqrelid = s.oid
    JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = used.attnum
"""

_COUNTERS: LiteralString = """
    SELECT t.oid::regclass::text, a.attname, s.oid::regclass::text, q.seqincrement, q.seqmax, q.seqmin,
           coalesce(pg_catalog.pg_sequence_last_value(s.oid), q.seqstart - q.seqincrement)
"""


@dataclass(frozen=True, slots=True)
class Counter:
    """One sequence on one shard, as it stands now. `reach` counts in the sequence's own direction."""

    name: str
    increment: int
    limit: int
    last_value: int

    @property
    def reach(self) -> int:
        return self.last_value if self.increment > 0 else -self.last_value


Counters = Mapping[tuple[str, str], Counter]
"""By (table, column): the names of the sequences may differ from shard to shard."""


def counters(connection: Connection, tables: Sequence[Table]) -> Counters:
    """Every sequence that feeds a column of the moving tables: identity, serial, or a default with nextval."""
    listed = [table_sql(table).as_string(connection) for table in tables]
    rows = connection.execute(_COUNTERS + _SEQUENCES, (listed,)).fetchall()
    return {
        (table, column): Counter(name, increment, maximum if increment > 0 else -minimum, last_value)
        for table, column, name, increment, maximum, minimum, last_value in rows
    }


def names(connection: Connection, tables: Sequence[Table]) -> dict[int, str]:
    """The sequences themselves by oid, under names that can be used in statements. Takes no privilege."""
    listed = oids(connection, (table.name for table in tables))
    rows = connection.execute("SELECT DISTINCT s.oid, s.oid::regclass::text" + _SEQUENCES, (listed,)).fetchall()
    return dict(sorted(rows))


def advance(receiver: Connection, giver: Connection, tables: Sequence[Table], *, margin: int) -> list[str]:
    """Puts the receiver's sequences a margin above the giver's, where they are not at least half of it above already.

    Returns the names of the sequences that were set. Safe to repeat, and under writes on both sides.

    Raises:
        Refused: a sequence of the giver has none at the receiver, or its type has no room for the margin.
    """
    theirs, ours, moved = counters(receiver, tables), counters(giver, tables), []
    for place, given in ours.items():
        if place not in theirs:
            raise Refused(f"the column {'.'.join(place)} has a sequence on one shard and none on the other")
        received = theirs[place]
        if received.reach >= given.reach + margin // 2:
            continue
        reach = max(received.reach, given.reach) + margin
        if reach > received.limit:
            raise Refused(
                f"the sequence {received.name} ends at {received.limit}, too near to set it {margin} above the other"
                " shard's",
                hint="[limits] sequence_margin, or a wider type of the column",
            )
        value = reach if received.increment > 0 else -reach
        set_ahead(receiver, received.name, value)
        moved.append(received.name)
    return moved


def set_ahead(receiver: Connection, name: str, value: int) -> None:
    """Sets a sequence, unless it has come as far by itself: it never goes back."""
    query: LiteralString = """
        SELECT pg_catalog.setval(q.seqrelid::regclass, %(value)s) FROM pg_catalog.pg_sequence q
        WHERE q.seqrelid = %(name)s::regclass
          AND CASE WHEN q.seqincrement > 0 THEN pg_catalog.pg_sequence_last_value(q.seqrelid) < %(value)s
                   ELSE pg_catalog.pg_sequence_last_value(q.seqrelid) > %(value)s END IS NOT FALSE
    """
    effects.once(receiver, Effect.SET_SEQUENCE, query, {"name": name, "value": value})


def check(receiver: Connection, giver: Connection, tables: Sequence[Table]) -> None:
    """Raises Failed where a sequence of the receiver is behind the giver's. To be called with the giver closed."""
    theirs = counters(receiver, tables)
    for place, given in counters(giver, tables).items():
        if place not in theirs or theirs[place].reach < given.reach:
            raise Failed(
                f"the sequence of {'.'.join(place)} is behind the other shard's: it would hand out used numbers",
                hint="[limits] sequence_margin is too small for this write rate",
            )
