"""The states `pending` and `initializing`: everything that must stand before the first batch's snapshot."""

from __future__ import annotations

from psycopg import sql

from shardmove.coordinator import references
from shardmove.coordinator.hold import Hold, raise_number
from shardmove.domain import points
from shardmove.domain.errors import Refused
from shardmove.domain.moves import CATALOG, State
from shardmove.domain.points import Effect
from shardmove.domain.routes import Routes
from shardmove.postgres import effects
from shardmove.postgres.identity import identity
from shardmove.postgres.introspect import describe_both
from shardmove.protocol import drift, objects, parts, sequences, triggers
from shardmove.protocol.catch_up import in_move


def begin(hold: Hold) -> None:
    """`pending` → `initializing`."""
    hold.transition(State.INITIALIZING)


def initialize(hold: Hold) -> None:
    """Arms both shards, the target first, then goes on to `copying`. Safe to repeat.

    When it returns, every write to the range on the source is journalled and passes the fence (I1), the target refuses
    all of them (I4), and the target held no row of the range after it began to refuse.

    Raises:
        Refused: the target holds rows of the range, or a table cannot be moved. The objects stay until `rollback`.
    """
    _record_identities(hold)
    for shard in (hold.move.source, hold.move.target):
        raise_number(hold, shard)
    described = objects.load_tables(hold.source, hold.move.id) or describe_both(
        hold.source, hold.target, hold.move.keyspace.tables
    )
    for shard in (hold.move.target, hold.move.source):
        part = parts.Part(hold.move, described, is_source=shard == hold.move.source)
        connection = hold.connection(shard)
        points.reach("initializing.before_objects")
        objects.install_move(connection, part, lease_number=hold.lease.number)
        triggers.install_triggers(connection, part, hold.patience, lease_number=hold.lease.number)
        with effects.writing(connection, Effect.RECORD_FINGERPRINT):
            drift.record_fingerprint(connection, hold.move.id, described, lease_number=hold.lease.number)
        hold.check()
    hold.tables = described
    require_empty_target(hold)
    references.copy_missing(hold)
    references.require_equal(hold)
    sequences.advance(hold.target, hold.source, hold.tables, margin=hold.config.limits.sequence_margin)
    hold.transition(State.COPYING, routes=lambda routes: marked(hold, routes))


def _record_identities(hold: Hold) -> None:
    if not hold.move.identities:
        identities = {shard: identity(hold.connection(shard)) for shard in (hold.move.source, hold.move.target)}
        if identities[hold.move.source] == identities[hold.move.target] and _same_database(hold):
            raise Refused(
                f"{hold.move.source} and {hold.move.target} are the same database: a shard is named twice",
                hint="mend [shards] in the configuration",
            )
        recorded = {**identities, CATALOG: hold.catalog.identity()}
        hold.catalog.set_identities(hold.move.id, recorded, hold.lease.number)
        hold.refresh()


def _same_database(hold: Hold) -> bool:
    names = {
        hold.connection(shard).execute("SELECT pg_catalog.current_database()").fetchone()
        for shard in (hold.move.source, hold.move.target)
    }
    return len(names) == 1


def require_empty_target(hold: Hold) -> None:
    """Raises Refused where the target holds a row of the range. With its fence closed, none can come."""
    for table in hold.tables:
        found = hold.target.execute(
            sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE {})").format(table.rows, in_move(hold.move, table))
        ).fetchone()
        if found == (True,):
            raise Refused(
                f"move {hold.move.id}: the target {hold.move.target} holds rows of the range {hold.move.ranges_text}"
                f" in {table.name} already",
                hint=f"look whose they are; remove them, or `shardmove rollback {hold.move.id}` and plan another range",
            )


def marked(hold: Hold, routes: Routes) -> Routes:
    """The same owners, with the ranges marked as moving: routers want to know early."""
    return routes.assign(hold.move.ranges, shard=hold.move.source, move_id=hold.move.id)
