"""The gate (I2): a journalled key may be mirrored only if its batch is recorded as committed on the target.

The records are read in the catch-up's own target transaction. They merge into few islands per table: the part below
the watermark, and what the workers committed beyond it. A single watermark is not enough: a unique value that passes
from a row of a committed batch to a row of a pending one would block both for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psycopg import sql

from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import TRUE, Interval, Position, type_name
from shardmove.protocol.fence import FenceRow


@dataclass(frozen=True, slots=True)
class Islands:
    """The recorded intervals of one table, merged, ascending."""

    intervals: tuple[Interval, ...]

    @property
    def is_whole(self) -> bool:
        return self.intervals == ((None, None),)

    def gaps(self) -> tuple[Interval, ...]:
        """What is not recorded: the complement, ascending."""
        gaps: list[Interval] = []
        edge: Position | None = None
        open_start = True
        for after, upto in self.intervals:
            if open_start and after is not None:
                gaps.append((None, after))
            elif not open_start and after != edge:
                gaps.append((edge, after))
            open_start, edge = False, upto
        if open_start:
            return ((None, None),)
        return (*gaps, (edge, None)) if edge is not None else tuple(gaps)


def islands(connection: Connection, move_id: str, ordinal: int, table: Table) -> Islands:
    """Merges the records of one table. Neighbours touch exactly: a batch begins where the one before it ended."""
    order = sql.SQL(", ").join(
        _element("after", number, column.type, column.collated) for number, column in enumerate(table.keyset, 1)
    )
    rows = connection.execute(
        sql.SQL(
            "SELECT after, upto FROM shardmove.batch WHERE move_id = {} AND ordinal = {}"
            " ORDER BY after IS NOT NULL, {}, number"
        ).format(sql.Literal(move_id), sql.Literal(ordinal), order)
    ).fetchall()
    merged: list[Interval] = []
    for after_list, upto_list in rows:
        after = None if after_list is None else tuple(after_list)
        upto = None if upto_list is None else tuple(upto_list)
        if merged and merged[-1][1] == after is not None:
            merged[-1] = (merged[-1][0], upto)
        else:
            merged.append((after, upto))
    return Islands(tuple(merged))


def _element(array: str, number: int, type_: str, collated: bool) -> sql.Composed:
    """NULL where the interval is open, and not cast then: a domain may forbid it."""
    collate = sql.SQL(' COLLATE "C"') if collated else sql.SQL("")
    return sql.SQL("(CASE WHEN {0} IS NOT NULL THEN {0}[{1}]::{2} END){3}").format(
        sql.Identifier(array), sql.Literal(number), type_name(type_), collate
    )


def gate(connection: Connection, row: FenceRow, tables: Sequence[Table]) -> Mapping[int, sql.Composable]:
    """Per ordinal, the predicate over keyset columns that lets an entry through. To be called on the receiver."""
    if row.is_whole:
        return {ordinal: TRUE for ordinal, _ in enumerate(tables, 1)}
    return {
        ordinal: _passes(table, islands(connection, row.move_id, ordinal, table))
        for ordinal, table in enumerate(tables, 1)
    }


def _passes(table: Table, recorded: Islands) -> sql.Composable:
    parts = [table.within(interval) for interval in recorded.intervals]
    return sql.SQL("({})").format(sql.SQL(" OR ").join(parts)) if parts else sql.SQL("false")
