"""After DDL on a moving table: taking the new schema for the move's own, where the move can carry it."""

from __future__ import annotations

from dataclasses import replace

from shardmove.coordinator.checks.schema import SCHEMA
from shardmove.coordinator.checks.site import Note, Site
from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import Refused
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.introspect import Table, describe_both
from shardmove.protocol import drift, objects, parts, triggers


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
        Refused: the sides differ, a table is not of a kind any more that can be moved, or a table's keyset changed:
            batches and journal are cut by it. Nothing was changed.
    """
    if not is_drifted(hold):
        return
    _require_movable(hold)
    tables = _described_anew(hold)
    hold.catalog.set_stats(hold.move.id, {"drifted": True}, hold.lease.number)
    for shard in (hold.move.source, hold.move.target):
        connection = hold.connection(shard)
        part = parts.Part(hold.move, tables, is_source=shard == hold.move.source)
        triggers.install_triggers(connection, part, hold.patience, lease_number=hold.lease.number)
        with effects.writing(connection, Effect.ACCEPT_DRIFT):
            parts.hold_lease(connection, hold.move.id, hold.lease.number)
            objects.update_tables(connection, hold.move.id, tables)
            drift.record_fingerprint(connection, hold.move.id, tables, lease_number=hold.lease.number)
    hold.tables = tables
    hold.record("schema_changed")


def _require_movable(hold: Hold) -> None:
    """What was asked of the tables when the move began is asked again."""
    site = Site(hold.move, hold.source, hold.target, hold.config.limits)
    for _, check in SCHEMA:
        problem = check(site)
        if problem is not None and not isinstance(problem, Note):
            raise Refused(f"move {hold.move.id}: {problem.message}", hint=problem.hint)


def _described_anew(hold: Hold) -> tuple[Table, ...]:
    """The tables with the columns that they have now, in the order and with the keysets that the move began with."""
    before = {table.name: table for table in hold.tables}
    described = describe_both(hold.source, hold.target, hold.move.keyspace.tables, keysets_of=before)
    now = {table.name: table for table in described}
    changed = [str(old.name) for old in hold.tables if _key(now[old.name]) != _key(old)]
    if changed:
        raise Refused(
            f"move {hold.move.id}: the key of {', '.join(changed)} that batches are cut by was changed",
            hint=f"restore it, or `shardmove rollback {hold.move.id}` and plan the move again",
        )
    return tuple(replace(now[old.name], keyset=old.keyset) for old in hold.tables)


def _key(table: Table) -> list[tuple[str, str]]:
    return [(column.name, column.type) for column in table.keyset]
