"""What a move looks like now: the catalog's record, and what the shards say themselves where they answer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

from shardmove.catalog.attempts import AttemptRecord
from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.moves import MIRRORED, Move, State
from shardmove.postgres.connect import Connection, connect
from shardmove.protocol import fence, objects, parts


def status(config: Config, catalog: Catalog, move: Move) -> dict[str, Any]:
    """The figures of one move, as `status --json` prints them. A figure that cannot be had is None.

    Rows are counted from the target's own batch records; `rows_estimate` is the servers' statistics, rough.
    """
    stats = catalog.stats(move.id)
    traffic = catalog.traffic(move.id)
    holder = catalog.holder(move.id)
    held = holder is not None and holder.is_connected
    with ExitStack() as stack:
        opened = _opener(config, move, stack)
        copied = _copied(move, stats, opened)
        backlog = _backlog(move, opened)
    rate = stats.get("rate_rows_s") if move.state is State.COPYING else None
    return {
        "id": move.id,
        "plan": move.plan_id,
        "keyspace": move.keyspace.name,
        "ranges": [str(range_) for range_ in move.ranges],
        "source": move.source,
        "target": move.target,
        "state": str(move.state),
        "state_since": move.state_since.isoformat(),
        "phase": traffic.phase,
        "read_share": traffic.read_share,
        "sample_rate": traffic.sample_rate,
        "reads_compared": traffic.compared,
        "reads_differing": traffic.differing,
        "paused": move.paused,
        "throttled": False,
        "rows_estimate": stats.get("rows_estimate"),
        "rows_copied": copied[0],
        "bytes_copied": copied[1],
        "batches_done": copied[2],
        "rows_verified": stats.get("rows_verified", 0),
        "rows_failed": 0,
        "journal_backlog": backlog,
        "mirror_lag_s": 0.0 if backlog == 0 else stats.get("mirror_lag_s"),
        "unattended": move.state in MIRRORED and not held and not _is_attended(stats),
        "rate_rows_s": rate,
        "eta_s": _eta(move, stats, copied, rate),
        "stall_ms": stalls(catalog.attempts(move.id)),
        "holder": str(holder) if holder and held else None,
        "error": move.error,
    }


def stalls(attempts: Sequence[AttemptRecord]) -> dict[str, Any]:
    """Percentiles over the cutovers of a move, in milliseconds; and how many attempts they took."""
    measured = sorted(each.stall_ms for each in attempts if each.stall_ms is not None)
    if not measured:
        return {"p50": None, "p99": None, "max": None, "attempts": len(attempts)}
    p99 = measured[min(len(measured) - 1, int(len(measured) * 0.99))]
    return {
        "p50": round(statistics.median(measured), 3),
        "p99": round(p99, 3),
        "max": round(measured[-1], 3),
        "attempts": len(attempts),
    }


def _opener(config: Config, move: Move, stack: ExitStack) -> Callable[[str], Connection | None]:
    """Connections to the move's shards, made when first asked for; None for one that does not answer."""
    known: dict[str, Connection | None] = {}

    def opened(shard: str) -> Connection | None:
        if shard not in known:
            try:
                connection = connect(config.shard_dsn(shard), application_name=fence.application_name(move.id))
                stack.callback(connection.close)
                known[shard] = connection if objects.has_schema(connection) else None
            except (ShardmoveError, psycopg.Error):
                known[shard] = None
        return known[shard]

    return opened


def _copied(
    move: Move, stats: dict[str, Any], opened: Callable[[str], Connection | None]
) -> tuple[int | None, int | None, int | None]:
    """Rows, bytes and batches: the target's own records, or, when they went with the move's end, what was counted."""
    if move.state.is_final:
        return stats.get("rows_copied"), stats.get("bytes_copied"), stats.get("batches_done")
    target = opened(move.target)
    if target is None:
        return None, None, None
    row = target.execute(
        "SELECT coalesce(sum(row_count), 0)::int8, coalesce(sum(size_bytes), 0)::int8, count(*)"
        " FROM shardmove.batch WHERE move_id = %s",
        (move.id,),
    ).fetchone()
    return (row[0], row[1], row[2]) if row else (None, None, None)


def _backlog(move: Move, opened: Callable[[str], Connection | None]) -> int | None:
    """Entries in the owner's journals."""
    owner = opened(move.giver(move.flow))
    if owner is None or move.state not in MIRRORED:
        return 0 if owner is not None else None
    total = 0
    for ordinal, _ in enumerate(objects.load_tables(owner, move.id), 1):
        row = owner.execute(sql.SQL("SELECT count(*) FROM {}").format(parts.journal(move.id, ordinal))).fetchone()
        total += row[0] if row else 0
    return total


def _is_attended(stats: dict[str, Any]) -> bool:
    at = stats.get("attended_at")
    return at is not None and (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() < ATTENDED_FOR_S


ATTENDED_FOR_S = 10.0
"""An attendant's mark is good for this long."""


def _eta(move: Move, stats: dict[str, Any], copied: tuple[int | None, ...], rate: float | None) -> float | None:
    if not rate or copied[0] is None or not stats.get("rows_estimate"):
        return None
    left = max(0, int(stats["rows_estimate"]) - copied[0])
    return round(left / rate, 1)
