"""Checks: what must hold before a move begins, and before a cutover. Each says what it found, and what to do about it.

A check returns None where it passes, else a Problem. The list is what `shardmove preflight` prints; the same functions
guard the steps themselves, so that nobody needs to have run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from shardmove.config import Limits
from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import Refused, ShardmoveError
from shardmove.domain.keys import subtract
from shardmove.domain.moves import Direction, Move, Standing, State
from shardmove.postgres.connect import Connection, explain, is_unreachable
from shardmove.postgres.introspect import (
    Table,
    describe_all,
    foreign_key_columns,
    foreign_keys,
    signature,
    table_sql,
)
from shardmove.protocol import drift, fence, objects, ownership, sequences
from shardmove.protocol.catch_up import become_replica, in_move

SERVER_VERSION_MIN = 140000


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way, and what to do."""

    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the checklist."""

    check: str
    problem: Problem | None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True)
class Site:
    """What the checks look at: the move and a connection to either side."""

    move: Move
    source: Connection
    target: Connection
    sequence_margin: int = Limits().sequence_margin

    @property
    def sides(self) -> tuple[tuple[str, Connection], tuple[str, Connection]]:
        return (self.move.source, self.source), (self.move.target, self.target)


Check = Callable[[Site], Problem | None]


def checklist(site: Site) -> list[Line]:
    """Every check of a move that has not begun, in order; none hides another. Changes nothing."""
    return [Line(text, _guarded(check, site)) for text, check in CHECKS]


def _guarded(check: Check, site: Site) -> Problem | None:
    try:
        return check(site)
    except ShardmoveError as error:
        return Problem(error.message, error.hint)
    except psycopg.Error as error:
        if is_unreachable(error):
            raise
        return Problem(f"it could not be checked: {explain(error)}")


def require(site: Site) -> None:
    """Raises Refused with the first problem, and the number of the others."""
    problems = [line.problem for line in checklist(site) if line.problem is not None]
    if problems:
        more = f" (and {len(problems) - 1} more: `shardmove preflight {site.move.id}`)" if len(problems) > 1 else ""
        raise Refused(f"move {site.move.id}: {problems[0].message}{more}", hint=problems[0].hint)


# --- before a move begins


def _versions(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        if connection.info.server_version < SERVER_VERSION_MIN:
            return Problem(
                f"{shard} runs PostgreSQL {connection.info.server_version // 10000}; 14 is the oldest we know"
            )
    return None


def _no_pooler(site: Site) -> Problem | None:
    """Session settings and advisory locks must hold from one transaction to the next."""
    for shard, connection in site.sides:
        first = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        second = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        if first != second or connection.info.backend_pid != (first or (0,))[0]:
            return Problem(
                f"{shard} is reached through a transaction pooler", "name the server itself in [shards], not the pooler"
            )
    return None


def _writable(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        if connection.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,):
            return Problem(f"{shard} is a standby", "name the primary in [shards]")
    return None


def _replica_right(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        if not may_be_replica(connection):
            role = connection.info.user
            return Problem(
                f"the role {role} may not set session_replication_role on {shard}: user triggers and foreign keys would"
                " fire once more on mirrored rows",
                f"on {shard}, as a superuser: GRANT SET ON PARAMETER session_replication_role TO {role}",
            )
    return None


def may_be_replica(connection: Connection) -> bool:
    """The role may apply rows as a replica (superuser; from PostgreSQL 15 on also by GRANT SET ON PARAMETER)."""
    if connection.info.server_version >= 150000:
        query = "SELECT pg_catalog.has_parameter_privilege('session_replication_role', 'SET')"
    else:
        query = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"
    return connection.execute(query).fetchone() == (True,)


def _owner(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        for name in site.move.keyspace.tables:
            row = connection.execute(
                "SELECT pg_catalog.pg_has_role(c.relowner, 'USAGE') FROM pg_catalog.pg_class c"
                " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
                (name.schema, name.name),
            ).fetchone()
            if row == (False,):
                return Problem(
                    f"the role {connection.info.user} does not own {name} on {shard}: it cannot make triggers there",
                    f"GRANT the owner of {name} TO {connection.info.user}",
                )
    return None


def _create_right(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        row = connection.execute(
            "SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')"
            " OR pg_catalog.to_regnamespace('shardmove') IS NOT NULL"
        ).fetchone()
        if row != (True,):
            return Problem(
                f"the role {connection.info.user} may not create the schema shardmove on {shard}",
                f"GRANT CREATE ON DATABASE … TO {connection.info.user}",
            )
    return None


def _tables(site: Site) -> Problem | None:
    for shard, connection in site.sides:
        try:
            describe_all(connection, site.move.keyspace.tables)
        except Refused as refusal:
            return Problem(f"on {shard}: {refusal.message}", refusal.hint)
    return None


def _same_schema(site: Site) -> Problem | None:
    return schema_difference(site)


def schema_difference(site: Site) -> Problem | None:
    """Compares columns, constraints and unique indexes of the keyspace's tables on both sides."""
    for name in site.move.keyspace.tables:
        ours, theirs = signature(site.source, name), signature(site.target, name)
        only_source, only_target = sorted(ours - theirs), sorted(theirs - ours)
        if only_source or only_target:
            parts = [f"only on {site.move.source}: {text}" for text in only_source[:3]]
            parts += [f"only on {site.move.target}: {text}" for text in only_target[:3]]
            return Problem(f"the table {name} is not the same on both shards; {'; '.join(parts)}", "make them equal")
    return None


def _unique_constraints(site: Site) -> Problem | None:
    """A unique constraint without the key column would bind rows of the move to rows that do not move."""
    for name, key_column in site.move.keyspace.tables.items():
        for shard, connection in site.sides:
            rows = connection.execute(_UNIQUE_WITHOUT_KEY, (name.schema, name.name, key_column)).fetchall()
            if rows:
                return Problem(
                    f"the unique index {rows[0][0]} of {name} on {shard} does not contain the key column {key_column}:"
                    " a moved row could collide with a row that does not move, now or after the cutover",
                    f"make the constraint contain {key_column}",
                )
    return None


_UNIQUE_WITHOUT_KEY = """
    SELECT i.indexrelid::regclass::text
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relname = %s AND (i.indisunique OR i.indisexclusion) AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute a
        WHERE a.attrelid = c.oid AND a.attname = %s
          AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
"""


def _key_types(site: Site) -> Problem | None:
    wanted = site.move.keyspace.key_type
    for shard, connection in site.sides:
        for name, key_column in site.move.keyspace.tables.items():
            row = connection.execute(
                "SELECT pg_catalog.format_type(a.atttypid, NULL) FROM pg_catalog.pg_attribute a"
                " JOIN pg_catalog.pg_class c ON c.oid = a.attrelid"
                " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
                " WHERE n.nspname = %s AND c.relname = %s AND a.attname = %s AND NOT a.attisdropped",
                (name.schema, name.name, key_column),
            ).fetchone()
            if row is not None and row[0] != wanted:
                return Problem(
                    f"the key column {name}.{key_column} on {shard} is {row[0]}, the keyspace's keys are {wanted}",
                    f"[keyspaces.{site.move.keyspace.name}] key_type, or the column's type",
                )
    return None


def _room_in_sequences(site: Site) -> Problem | None:
    tables = describe_all(site.source, site.move.keyspace.tables)
    for shard, connection in site.sides:
        for place, counter in sequences.counters(connection, tables).items():
            if counter.reach + 2 * site.sequence_margin > counter.limit:
                return Problem(
                    f"the sequence of {'.'.join(place)} on {shard} ends at {counter.limit}: there is no room for the"
                    f" margin of {site.sequence_margin} that keeps two shards from handing out the same number",
                    "[limits] sequence_margin, or a wider type of the column",
                )
    return None


def _foreign_keys_inside(site: Site) -> Problem | None:
    """Rows are applied and erased without a check of foreign keys: both ends must have one key, and move together."""
    moving = site.move.keyspace.tables
    for child, parent in foreign_keys(site.source):
        if child in moving and parent not in moving and parent not in site.move.keyspace.reference_tables:
            outside = parent
        elif parent in moving and child not in moving:
            outside = child
        else:
            continue
        return Problem(
            f"a foreign key ties {child} to {parent}, and {outside} does not move",
            f"add {outside} to the keyspace's tables or reference_tables, or drop the constraint",
        )
    return _foreign_keys_by_key(site)


def _foreign_keys_by_key(site: Site) -> Problem | None:
    for foreign_key in foreign_key_columns(site.source):
        child_key = site.move.keyspace.tables.get(foreign_key.child)
        parent_key = site.move.keyspace.tables.get(foreign_key.parent)
        if child_key is None or parent_key is None:
            continue
        if (child_key, parent_key) not in zip(foreign_key.child_columns, foreign_key.parent_columns, strict=True):
            return Problem(
                f"the foreign key {foreign_key.name} of {foreign_key.child} does not tie {child_key} to"
                f" {foreign_key.parent}.{parent_key}: a row that stays could reference one that moves",
                f"make the constraint contain {child_key}",
            )
    return None


def _plain_triggers(site: Site) -> Problem | None:
    """Triggers that fire even for a replica would run once more for each row that is mirrored or erased."""
    for name in site.move.keyspace.tables:
        for shard, connection in site.sides:
            rows = connection.execute(_TRIGGERS_FOR_REPLICAS, (name.schema, name.name)).fetchall()
            if rows:
                return Problem(
                    f"the trigger {rows[0][0]} of {name} on {shard} fires for replicas too (ENABLE ALWAYS or REPLICA):"
                    " it would run once more for each row that is mirrored or erased",
                    f"ALTER TABLE {name} ENABLE TRIGGER {rows[0][0]}",
                )
    return None


_TRIGGERS_FOR_REPLICAS = """
    SELECT t.tgname FROM pg_catalog.pg_trigger t
    JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relname = %s AND NOT t.tgisinternal AND t.tgenabled IN ('A', 'R')
      AND NOT pg_catalog.starts_with(t.tgname, 'shardmove_')
"""


def _kinds(site: Site) -> Problem | None:
    """Table kinds that this release does not carry."""
    for shard, connection in site.sides:
        for name in site.move.keyspace.tables:
            row = connection.execute(
                "SELECT c.relkind, c.relpersistence, c.relrowsecurity AND c.relforcerowsecurity,"
                " EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))"
                " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
                " WHERE n.nspname = %s AND c.relname = %s",
                (name.schema, name.name),
            ).fetchone()
            if row is None:
                continue
            kind, persistence, forced_policies, inherits = row
            if kind == "p" or inherits:
                return Problem(
                    f"the table {name} on {shard} is partitioned or inherited; this release moves plain tables"
                )
            if persistence != "p":
                return Problem(f"the table {name} on {shard} is unlogged: a crash would empty it", "SET LOGGED")
            if forced_policies and not _bypasses_policies(connection):
                return Problem(
                    f"row security is forced on {name} on {shard}: we would see a part of its rows only",
                    f"ALTER ROLE {connection.info.user} BYPASSRLS",
                )
    return None


def _bypasses_policies(connection: Connection) -> bool:
    query = "SELECT rolsuper OR rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user"
    return connection.execute(query).fetchone() == (True,)


def _target_empty(site: Site) -> Problem | None:
    if site.move.state not in (State.PENDING, State.INITIALIZING):
        return None
    for name, key_column in site.move.keyspace.tables.items():
        table = Table(name, key_column, (), (), False)
        query = sql.SQL("SELECT EXISTS (SELECT FROM {} WHERE {})").format(table_sql(table), in_move(site.move, table))
        if site.target.execute(query).fetchone() == (True,):
            return Problem(
                f"the target {site.move.target} holds rows of {site.move.ranges_text} in {name} already",
                "look whose they are, and remove them or plan another range",
            )
    return None


def _no_subscription(site: Site) -> Problem | None:
    """A subscription that feeds a moving table would loop on the fence."""
    rows = site.source.execute(
        "SELECT s.srrelid::regclass::text FROM pg_catalog.pg_subscription_rel s"
        " JOIN pg_catalog.pg_class c ON c.oid = s.srrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        " WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest(%s::text[], %s::text[]))",
        (
            [name.schema for name in site.move.keyspace.tables],
            [name.name for name in site.move.keyspace.tables],
        ),
    ).fetchall()
    if rows:
        return Problem(f"a subscription feeds {rows[0][0]} on {site.move.source}: it would stop at the fence")
    return None


def _prepared(site: Site) -> Problem | None:
    rows = site.source.execute(
        "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()"
    ).fetchall()
    if rows:
        return Problem(
            f"the prepared transaction {rows[0][0]!r} is open on {site.move.source}: triggers cannot be made behind it",
            "COMMIT PREPARED or ROLLBACK PREPARED it",
        )
    return None


CHECKS: Sequence[tuple[str, Check]] = (
    ("both servers run a version that we know", _versions),
    ("both are reached without a transaction pooler", _no_pooler),
    ("both are primaries", _writable),
    ("our role may create the schema shardmove", _create_right),
    ("our role owns the tables", _owner),
    ("our role may apply rows as a replica", _replica_right),
    ("every table has a key column and a key to cut batches by", _tables),
    ("the key columns are of the keyspace's type", _key_types),
    ("every table is of a kind that we can move", _kinds),
    ("the schema is the same on both shards", _same_schema),
    ("unique constraints cannot collide on the target", _unique_constraints),
    ("foreign keys stay inside the keyspace", _foreign_keys_inside),
    ("no trigger fires for replicas", _plain_triggers),
    ("sequences have room for the margin", _room_in_sequences),
    ("no subscription feeds the tables", _no_subscription),
    ("no prepared transaction is open on the source", _prepared),
    ("the target holds no row of the range", _target_empty),
)


# --- before a step


def require_state(move: Move, wanted: State, what: str) -> None:
    """Raises Refused, with the command that leads to the state, unless the move is in it."""
    if move.state is wanted:
        return
    hints = {
        State.READY: f"`shardmove run {move.id}` brings it to ready",
        State.SWITCHED: f"`shardmove cutover {move.id}` switches it",
    }
    raise Refused(f"move {move.id} is {move.state}; to {what} it has to be {wanted}", hint=hints.get(wanted))


def require_unpaused(move: Move) -> None:
    """Raises Refused where somebody paused the move."""
    if move.paused:
        raise Refused(f"move {move.id} is paused", hint=f"`shardmove resume {move.id}`")


_RUN = "`shardmove run {}` mends and compares what can be"


def require_cutover(hold: Hold, direction: Direction) -> None:
    """All preconditions of a cutover (DESIGN §4.7, 1). Looks only.

    Raises:
        Refused: says which does not hold.
        SchemaDrift, ServerChanged: as the checks behind them.
        LockNotAvailable: DDL on a moving table is under way.
    """
    move = hold.move
    giver_name, receiver_name = move.giver(direction), move.receiver(direction)
    giver, receiver = hold.connection(giver_name), hold.connection(receiver_name)
    ours, theirs = fence.read(giver, move.id), fence.read(receiver, move.id)
    if ours is None or theirs is None:
        raise Refused(f"move {move.id}: its objects are missing on a shard", hint="`shardmove diagnose` lists them")
    if ours.standing != Standing.OWNER or not ours.is_open:
        raise Refused(f"move {move.id}: {giver_name} does not own the range by its own record")
    if theirs.standing != Standing.MIRROR or not theirs.is_whole:
        raise Refused(f"move {move.id}: {receiver_name} is not a whole mirror of {giver_name}")
    for name, connection in ((giver_name, giver), (receiver_name, receiver)):
        drift.check_identity(connection, name, move.identities)
        drift.check_fingerprint(connection, move.id, hold.tables, name)
        for table in hold.tables:
            if not objects.is_armed(connection, move.id, table):
                raise Refused(
                    f"move {move.id}: {table.name} on {name} has lost its triggers", hint=_RUN.format(move.id)
                )
    ownership.check_catalog(hold.catalog, move)
    kept = subtract(move.ranges, subtract(move.ranges, objects.kept_ranges(receiver, move.keyspace)))
    if kept:
        raise Refused(
            f"move {move.id}: {receiver_name} still refuses {', '.join(str(range_) for range_ in kept)} for good",
            hint="`shardmove diagnose`",
        )
    if hold.catalog.stats(move.id).get("drifted"):
        raise Refused(
            f"move {move.id}: the schema changed, and not everything was compared since",
            hint=_RUN.format(move.id),
        )
    site = Site(move, hold.source, hold.target)
    problem = schema_difference(site)
    if problem is not None:
        raise Refused(f"move {move.id}: {problem.message}", hint=problem.hint)
    try_way_back(
        move,
        hold.tables,
        giver=giver,
        receiver=receiver,
        lock_timeout_ms=hold.config.limits.ddl_lock_timeout_ms,
    )


def try_way_back(
    move: Move, tables: Sequence[Table], *, giver: Connection, receiver: Connection, lock_timeout_ms: int
) -> None:
    """The permissions of the mirror in the other direction suffice: tried, and rolled back.

    Raises psycopg.Error; LockNotAvailable where DDL is under way. Changes nothing.
    """
    with giver.transaction(force_rollback=True):
        giver.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{lock_timeout_ms}ms",))
        become_replica(giver, move.id)
        for table in tables:
            giver.execute(sql.SQL("DELETE FROM {} WHERE false").format(table_sql(table)))
            giver.execute(sql.SQL("SELECT FROM {} WHERE false").format(table_sql(table)))
    with receiver.transaction(force_rollback=True):
        for ordinal, _ in enumerate(tables, 1):
            receiver.execute(sql.SQL("DELETE FROM {} WHERE false").format(objects.journal(move.id, ordinal)))
