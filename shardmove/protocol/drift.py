"""Two things that no journal entry tells: DDL on a moving table, and a server that lost its tail.

The fingerprint covers what makes a change invisible to row triggers: the file that holds the rows (TRUNCATE of a
partition, ALTER TYPE … USING), partitions (ATTACH, DETACH), columns and constraints, and rules and triggers with the
transaction that last touched them (DISABLE and ENABLE again leaves another xmin): the move's own, and the
application's, of which one that fires for replicas writes a second time for each mirrored row. Other moves' triggers
and kept fences come and go without harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psycopg import sql

from shardmove.domain.errors import SchemaDrift, ServerChanged
from shardmove.domain.moves import ServerIdentity
from shardmove.postgres.connect import Connection
from shardmove.postgres.identity import identity
from shardmove.postgres.introspect import FAMILY, Table, table_sql
from shardmove.protocol.parts import trigger_prefix

_FINGERPRINT = """
    WITH RECURSIVE {family}, facts(fact) AS (
        SELECT ROW('class', c.oid, c.relfilenode, c.relkind, c.relrowsecurity, c.relforcerowsecurity)::text
        FROM pg_catalog.pg_class c JOIN family USING (oid)
        UNION ALL
        SELECT ROW('inherits', i.inhrelid, i.inhparent, i.inhdetachpending)::text
        FROM pg_catalog.pg_inherits i JOIN family f ON f.oid IN (i.inhparent, i.inhrelid)
        UNION ALL
        SELECT ROW('column', a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attisdropped,
                   a.attgenerated)::text
        FROM pg_catalog.pg_attribute a JOIN family f ON a.attrelid = f.oid WHERE a.attnum > 0
        UNION ALL
        SELECT ROW('constraint', k.oid, k.conrelid, k.contype, k.convalidated)::text
        FROM pg_catalog.pg_constraint k JOIN family f ON k.conrelid = f.oid
        UNION ALL
        SELECT ROW('trigger', t.oid, t.xmin, t.tgenabled)::text
        FROM pg_catalog.pg_trigger t JOIN family f ON t.tgrelid = f.oid
        WHERE NOT t.tgisinternal
          AND (pg_catalog.starts_with(t.tgname, {prefix}) OR NOT pg_catalog.starts_with(t.tgname, 'shardmove_'))
        UNION ALL
        SELECT ROW('rule', r.oid, r.xmin)::text FROM pg_catalog.pg_rewrite r JOIN family f ON r.ev_class = f.oid
    )
    SELECT pg_catalog.md5(pg_catalog.string_agg(fact, ' ' ORDER BY fact COLLATE "C")) FROM facts
"""


def fingerprint(connection: Connection, move_id: str, tables: Sequence[Table]) -> str:
    """A hash over everything that could change rows without a journal entry."""
    listed = [table_sql(table).as_string(connection) for table in tables]
    row = connection.execute(
        sql.SQL(_FINGERPRINT).format(
            family=sql.SQL(FAMILY).format(tables=sql.Literal(listed)), prefix=sql.Literal(trigger_prefix(move_id))
        )
    ).fetchone()
    assert row is not None
    return str(row[0])


def record_fingerprint(connection: Connection, move_id: str, tables: Sequence[Table], *, lease_number: int) -> None:
    """Takes the schema as it is now for the one that was looked at. Only before a full comparison."""
    connection.execute(
        "UPDATE shardmove.fence SET fingerprint = %s WHERE move_id = %s AND lease_number = %s",
        (fingerprint(connection, move_id, tables), move_id, lease_number),
    )


def recorded_fingerprint(connection: Connection, move_id: str) -> str | None:
    """The fingerprint that was recorded last on this shard; None where the move has no objects here."""
    row = connection.execute("SELECT fingerprint FROM shardmove.fence WHERE move_id = %s", (move_id,)).fetchone()
    return None if row is None else row[0]


def is_drifted(connection: Connection, move_id: str, tables: Sequence[Table]) -> bool:
    """A moving table was changed since the fingerprint was recorded."""
    return recorded_fingerprint(connection, move_id) != fingerprint(connection, move_id, tables)


def check_fingerprint(
    connection: Connection, move_id: str, tables: Sequence[Table], shard: str, *, seen: str | None = None
) -> None:
    """Raises SchemaDrift where a moving table was changed since the fingerprint was recorded.

    Args:
        seen: the fingerprint that the caller's tables go with; another one recorded since is a change, too.
    """
    recorded = recorded_fingerprint(connection, move_id)
    if recorded != fingerprint(connection, move_id, tables) or (seen is not None and recorded != seen):
        raise SchemaDrift(
            f"move {move_id}: a moving table on {shard} was changed by DDL (or its triggers were touched) since the"
            " move looked last; no journal tells what that did to its rows",
            hint=f"`shardmove run {move_id}` compares everything anew; `shardmove rollback {move_id}` gives up",
        )


def check_identity(connection: Connection, shard: str, recorded: Mapping[str, ServerIdentity]) -> None:
    """Raises ServerChanged where the shard is not the server, or not the timeline, that the move began with."""
    now, then = identity(connection), recorded.get(shard)
    if then is not None and now != then:
        raise ServerChanged(
            f"shard {shard} is another server than the move began with (was {then.system_identifier} timeline"
            f" {then.timeline}, is {now.system_identifier} timeline {now.timeline}): it may lack the last commits",
            hint="nothing opens or is erased by itself now; `shardmove run ID` compares both sides in full, and goes on"
            " where they are equal",
        )
