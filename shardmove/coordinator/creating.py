"""`run --create-schema`: the tables that the target lacks, made before the copy; their indexes and the like, after it.

What is left for after the copy is written down on the target, in the transaction that makes the tables; each statement
goes in the transaction that runs it. So any coordinator finishes what another one began.
"""

from __future__ import annotations

import time

import psycopg
from psycopg import errors

from shardmove.coordinator import schema_copy
from shardmove.coordinator.hold import Hold
from shardmove.coordinator.schema_copy import Script
from shardmove.domain.errors import Failed, Refused
from shardmove.domain.moves import Direction, State
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, explain
from shardmove.postgres.introspect import describe_all, plain_tables
from shardmove.protocol import drift, fence, objects, parts, replica

VIOLATIONS_MAX = 5


def create_missing(hold: Hold) -> None:
    """Makes what the target lacks of the keyspace's tables and reference tables; all of it, or nothing. Safe to repeat.

    Raises:
        Refused: a table cannot be moved, a role or an extension is missing on the target, or its server would not.
            Nothing was made.
    """
    describe_all(hold.source, hold.move.keyspace.tables)  # what cannot be moved is not made, either
    wanted = (*hold.move.keyspace.tables, *hold.move.keyspace.reference_tables)
    target = hold.target
    script = schema_copy.script(hold.dsn[hold.move.source], target, wanted)
    if not script.now:
        return
    _require_replica(hold, script)
    objects.install_schema(target, hold.catalog.cluster_id())
    fence.raise_number(target, hold.move.id, hold.lease.number)
    with effects.writing(target, Effect.CREATE_TABLES):
        parts.hold_lease(target, hold.move.id, hold.lease.number)
        schema_copy.create(target, script.now)
        first = _last_number(target, hold.move.id) + 1
        for number, statement in enumerate(script.later, first):
            target.execute("INSERT INTO shardmove.later VALUES (%s, %s, %s)", (hold.move.id, number, statement))
    hold.record("schema_created", shard=hold.move.target)


def _require_replica(hold: Hold, script: Script) -> None:
    """What comes after the copy would fire for mirrored rows: our role has to apply them as a replica there, too."""
    fires = replica.firing(hold.source, plain_tables(hold.source, hold.move.keyspace.tables))
    if script.later and fires and not replica.may_be_replica(hold.target):
        role = hold.target.info.user
        raise Refused(
            f"move {hold.move.id}: {fires[0][1]} of {fires[0][0]} is made on {hold.move.target} too, and there the role"
            f" {role} may not set session_replication_role: it would fire once more for each row that is carried",
            hint=f"on {hold.move.target}, as a superuser: GRANT SET ON PARAMETER session_replication_role TO {role};",
        )


def _last_number(target: Connection, move_id: str) -> int:
    row = target.execute(
        "SELECT coalesce(max(number), 0) FROM shardmove.later WHERE move_id = %s", (move_id,)
    ).fetchone()
    return 0 if row is None else int(row[0])


def finish(hold: Hold) -> None:
    """Makes the rest: indexes, foreign keys, triggers. Safe to repeat, and to be interrupted anywhere.

    To be called only where a full comparison follows before the next cutover, or where the move ends: the schema as it
    is afterwards is taken for the one that the move knows.

    Raises:
        Failed: the target's server would not, or somebody held a lock for too long; what was made stays.
    """
    target = hold.target
    if hold.move.id not in objects.makers(target):
        return
    rows = target.execute(
        "SELECT number, statement FROM shardmove.later WHERE move_id = %s ORDER BY number", (hold.move.id,)
    ).fetchall()
    if rows:
        fence.raise_number(target, hold.move.id, hold.lease.number)
        _catch_up(hold)
    for number, statement in rows:
        hold.check()
        _patiently(hold, number, statement)
    for table in hold.tables if rows else ():
        target.execute(b"ANALYZE " + table.rows.as_bytes(target).removeprefix(b"ONLY "))


def _patiently(hold: Hold, number: int, statement: str) -> None:
    deadline = time.monotonic() + hold.config.limits.ddl_patience_s
    violations = 0
    while True:
        try:
            return _run(hold, number, statement)
        except errors.ForeignKeyViolation as error:
            # An attendant may have carried a child, and not yet its parent.
            violations += 1
            if violations > VIOLATIONS_MAX:
                raise _refused(hold, statement, error) from error
            _catch_up(hold)
        except errors.LockNotAvailable:
            if time.monotonic() > deadline:
                raise Failed(
                    f"move {hold.move.id}: a lock on {hold.move.target} was held for too long to run"
                    f" `{statement.splitlines()[0]}`",
                    hint="end the transaction that is in the way, then run the same command again",
                ) from None
            hold.check()
        except (errors.OperationalError, errors.InterfaceError):
            raise
        except psycopg.Error as error:
            raise _refused(hold, statement, error) from error


def _refused(hold: Hold, statement: str, error: psycopg.Error) -> Failed:
    return Failed(
        f"move {hold.move.id}: {hold.move.target} refused `{statement.splitlines()[0]}`: {explain(error)}",
        hint="mend what it needs, then run the same command again",
    )


def _catch_up(hold: Hold) -> None:
    """Whole transactions of the source are on the target afterwards, where everything is copied."""
    hold.check()
    if hold.move.state is State.COPYING:
        with hold.mirror(Direction.FORWARD) as mirror:
            mirror.work_off(hold.config.limits.mirror_rows, check=hold.check)
            mirror.until_empty()


def _run(hold: Hold, number: int, statement: str) -> None:
    target, move_id = hold.target, hold.move.id
    with effects.writing(target, Effect.CREATE_LATER):
        timeout = f"{hold.config.limits.ddl_lock_timeout_ms}ms"
        target.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (timeout,))
        parts.hold_lease(target, move_id, hold.lease.number)
        target.execute(statement.encode(), prepare=False)
        target.execute("DELETE FROM shardmove.later WHERE move_id = %s AND number = %s", (move_id, number))
        drift.record_fingerprint(target, move_id, hold.tables, lease_number=hold.lease.number)
