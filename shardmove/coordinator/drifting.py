"""After DDL on a moving table: taking the new schema for the move's own, where it is equal on both sides."""

from __future__ import annotations

from shardmove.coordinator.hold import Hold
from shardmove.coordinator.preflight import Site, schema_difference
from shardmove.domain.errors import Refused
from shardmove.protocol import drift, objects


def accept_drift(hold: Hold) -> bool:
    """Takes the schema as it is now for the move's, where it is equal on both sides and armed; True where it changed.

    To be called only where a full comparison follows before the next cutover. The catalog remembers that it must.

    Raises:
        Refused: the schema differs between the sides. Nothing was changed.
    """
    drifted = [
        shard
        for shard in (hold.move.source, hold.move.target)
        if drift.is_drifted(hold.connection(shard), hold.move.id, hold.tables)
    ]
    if not drifted:
        return False
    problem = schema_difference(Site(hold.move, hold.source, hold.target))
    if problem is not None:
        raise Refused(f"move {hold.move.id}: {problem.message}", hint=problem.hint)
    hold.catalog.set_stats(hold.move.id, {"drifted": True}, hold.lease.number)
    for shard in drifted:
        connection = hold.connection(shard)
        part = objects.Part(hold.move, hold.tables, is_source=shard == hold.move.source)
        objects.install_triggers(connection, part, hold.patience)
        drift.record_fingerprint(connection, hold.move.id, hold.tables, lease_number=hold.lease.number)
        hold.catalog.record("schema_changed", hold.move.id, shard=shard)
    return True
