"""Reference tables: every shard has them whole. A move fills those that are empty on its target, and compares all.

The application itself writes them to every shard; nothing here is mirrored. So a difference counts only where it stays:
what is different at every one of several looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from psycopg import sql

from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import DifferencesFound, Failed
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, stored_columns
from shardmove.postgres.sql import names
from shardmove.protocol import sequences
from shardmove.protocol.catch_up import copy_in, digest_of, relay
from shardmove.protocol.replica import become_replica
from shardmove.verify.comparison import TableComparison

LOOKS = 5
PAUSE_S = 0.5


def copy_missing(hold: Hold) -> None:
    """Fills each reference table of which the target holds no row, from the source; one transaction a table.

    Safe to repeat: a table with rows is left alone.

    Raises:
        Failed: the target stores other rows than it was sent. Nothing was written.
    """
    for table in _tables(hold):
        if _is_empty(hold.target, table) and not _is_empty(hold.source, table):
            _copy(hold, table)
            sequences.advance(hold.target, hold.source, [table], margin=hold.config.limits.sequence_margin)
            hold.record("reference_copied", table=str(table.name), shard=hold.move.target)


def require_equal(hold: Hold) -> None:
    """Raises DifferencesFound where a reference table is not the same on both shards, before anything is copied."""
    require(hold, compare(hold))


def require(hold: Hold, found: Sequence[TableComparison]) -> None:
    """Raises DifferencesFound that counts what differs, per reference table."""
    worst = "; ".join(
        f"{each.table.name}: {each.counts['missing']} only on {hold.move.source}, {each.counts['extra']} only on"
        f" {hold.move.target}"
        for each in found
        if not each.equal
    )
    if worst:
        raise DifferencesFound(
            f"move {hold.move.id}: reference tables hold other rows on the two shards: {worst}",
            hint="make their rows equal, then run the same command again; one that has no row on the target is filled",
        )


def _tables(hold: Hold) -> list[Table]:
    return [_described(hold.source, name) for name in hold.move.keyspace.reference_tables]


def _described(connection: Connection, name: TableName) -> Table:
    columns, is_partitioned = stored_columns(connection, name)
    return Table(name, "", columns, (), binary=False, is_partitioned=is_partitioned)


def _is_empty(connection: Connection, table: Table) -> bool:
    query = sql.SQL("SELECT NOT EXISTS (SELECT FROM {})").format(table.rows)
    return connection.execute(query).fetchone() == (True,)


def _copy(hold: Hold, table: Table) -> None:
    rows = _rows(table)
    with effects.writing(hold.target, Effect.FILL_REFERENCE):
        timeout = f"{hold.config.limits.ddl_lock_timeout_ms}ms"
        hold.target.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (timeout,))
        hold.target.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table.rows))
        if not _is_empty(hold.target, table):
            return  # somebody was faster
        become_replica(hold.target, hold.move.id, [table])
        sent = relay(hold.source, rows, hold.target, copy_in(table))
        if digest_of(hold.target, rows) != sent:
            raise Failed(f"move {hold.move.id}: {hold.move.target} stores other rows of {table.name} than it was sent")


def _rows(table: Table) -> sql.Composed:
    """Every row, in the order of its text: a reference table need not have a key."""
    columns = names(table.columns)
    return sql.SQL('COPY (SELECT {} FROM {} ORDER BY ROW({})::text COLLATE "C") TO STDOUT {}').format(
        columns, table.rows, columns, table.copy_options
    )


def compare(hold: Hold) -> list[TableComparison]:
    """Compares every reference table of the keyspace as a whole. Changes nothing.

    Rows are told apart by what they hold: one that differs is missing with one content, and extra with another.
    """
    return [_compared(hold, table) for table in _tables(hold)]


def _compared(hold: Hold, table: Table) -> TableComparison:
    missing, extra = _differences(hold, table)
    for _ in range(LOOKS - 1):
        if not missing and not extra:
            break
        hold.stop.wait(PAUSE_S)
        hold.check()
        still_missing, still_extra = _differences(hold, table)
        missing, extra = missing & still_missing, extra & still_extra
    found = TableComparison(table)
    owner = digest_of(hold.source, _rows(table))
    found.add(owner, digest_of(hold.target, _rows(table)) if missing or extra else owner)
    found.counts.update(missing=missing.total(), extra=extra.total())
    return found


def _differences(hold: Hold, table: Table) -> tuple[Counter[str], Counter[str]]:
    """How often the source has what the target lacks, and the other way round."""
    ours, theirs = _contents(hold.source, table), _contents(hold.target, table)
    return ours - theirs, theirs - ours


def _contents(connection: Connection, table: Table) -> Counter[str]:
    query = sql.SQL("SELECT pg_catalog.md5(ROW({})::text), count(*) FROM {} GROUP BY 1").format(
        names(table.columns), table.rows
    )
    return Counter(dict(connection.execute(query).fetchall()))
