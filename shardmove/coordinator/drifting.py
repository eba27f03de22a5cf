"""After DDL on a moving table: taking the new schema for the move's own, where the move can carry it."""

from __future__ import annotations

from dataclasses import replace

from shardmove.coordinator.hold import Hold
from shardmove.coordinator.preflight import Site, schema_difference
from shardmove.domain.errors import Refused
from shardmove.postgres.introspect import Table, describe_all
from shardmove.protocol import drift, objects


def is_drifted(hold: Hold) -> bool:
    """A moving table was changed on either side since the move looked last."""
    return any(
        drift.is_drifted(hold.connection(shard), hold.move.id, hold.tables)
        for shard in (hold.move.source, hold.move.target)
    )


def accept_drift(hold: Hold) -> None:
    """Takes the schema as it is now for the move's: new columns are carried from now on, dropped ones are not.

    To be called only where a full comparison follows before the next cutover. The catalog remembers that it must.
    Does nothing where nothing changed.

    Raises:
        Refused: the sides differ, or a table's keyset changed: batches and journal are cut by it. Nothing was changed.
    """
    if not is_drifted(hold):
        return
    problem = schema_difference(Site(hold.move, hold.source, hold.target))
    if problem is not None:
        raise Refused(f"move {hold.move.id}: {problem.message}", hint=problem.hint)
    tables = _described_anew(hold)
    hold.catalog.set_stats(hold.move.id, {"drifted": True}, hold.lease.number)
    for shard in (hold.move.source, hold.move.target):
        connection = hold.connection(shard)
        part = objects.Part(hold.move, tables, is_source=shard == hold.move.source)
        objects.install_triggers(connection, part, hold.patience, lease_number=hold.lease.number)
        with connection.transaction():
            objects.hold_lease(connection, hold.move.id, hold.lease.number)
            objects.update_tables(connection, hold.move.id, tables)
            drift.record_fingerprint(connection, hold.move.id, tables, lease_number=hold.lease.number)
    hold.tables = tables
    hold.catalog.record("schema_changed", hold.move.id)


def _described_anew(hold: Hold) -> tuple[Table, ...]:
    """The tables with the columns that they have now, in the order and with the keysets that the move began with."""
    now = {table.name: table for table in describe_all(hold.source, hold.move.keyspace.tables)}
    changed = [str(old.name) for old in hold.tables if now[old.name].keyset != old.keyset]
    if changed:
        raise Refused(
            f"move {hold.move.id}: the key of {', '.join(changed)} that batches are cut by was changed",
            hint=f"restore it, or `shardmove rollback {hold.move.id}` and plan the move again",
        )
    return tuple(replace(now[old.name], keyset=old.keyset) for old in hold.tables)
