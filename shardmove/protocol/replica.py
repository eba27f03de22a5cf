"""Applying rows as a replica: user triggers do not fire twice, foreign keys are not checked again.

That takes the right to set `session_replication_role`. A role that owns plain tables does without it: where nothing
would fire, rows are applied as by anybody. Who has the right uses it; who has not asks, in each transaction and under
the lock that its writes take anyway, so that no trigger or foreign key can come in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from shardmove.domain.errors import Refused
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import FAMILY, Table, oids
from shardmove.protocol.parts import MARKER

PARAMETER_GRANTS_SINCE = 150000

_MAY_SET = sql.SQL("pg_catalog.has_parameter_privilege('session_replication_role', 'SET')")
_IS_SUPERUSER = sql.SQL("(SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)")

# Foreign keys are triggers of the server's own, at either end. Those behind deferrable unique constraints only check.
_FIRING = """
    WITH RECURSIVE {family}
    SELECT f.oid::regclass::text, CASE WHEN t.tgisinternal THEN 'a foreign key' ELSE 'the trigger ' || t.tgname END
    FROM family f JOIN pg_catalog.pg_trigger t ON t.tgrelid = f.oid
    LEFT JOIN pg_catalog.pg_constraint k ON k.oid = t.tgconstraint
    WHERE t.tgenabled IN ('O', 'A') AND NOT pg_catalog.starts_with(t.tgname, 'shardmove_')
      AND coalesce(k.contype, 't') IN ('f', 't')
    UNION
    SELECT f.oid::regclass::text, 'the rule ' || r.rulename
    FROM family f JOIN pg_catalog.pg_rewrite r ON r.ev_class = f.oid
    WHERE r.ev_type <> '1' AND r.ev_enabled IN ('O', 'A')
    ORDER BY 1, 2
"""


def may_be_replica(connection: Connection) -> bool:
    """The role may apply rows as a replica (superuser; from PostgreSQL 15 on also by GRANT SET ON PARAMETER)."""
    return connection.execute(sql.SQL("SELECT {}").format(_right(connection))).fetchone() == (True,)


def become_replica(connection: Connection, move_id: str, tables: Sequence[Table]) -> None:
    """For this transaction: its writes to the tables fire nothing of the application's, and our own triggers know them
    as the mirror's.

    Raises Refused where something would fire, and the role may not apply rows as a replica.
    """
    row = connection.execute(
        sql.SQL(
            "SELECT pg_catalog.set_config({}, {}, true),"
            " CASE WHEN {} THEN pg_catalog.set_config('session_replication_role', 'replica', true) END"
        ).format(sql.Literal(MARKER), sql.Literal(move_id), _right(connection))
    ).fetchone()
    if row is None or row[1] is None:
        _require_silence(connection, move_id, tables)


def _right(connection: Connection) -> sql.SQL:
    return _MAY_SET if connection.info.server_version >= PARAMETER_GRANTS_SINCE else _IS_SUPERUSER


def _require_silence(connection: Connection, move_id: str, tables: Sequence[Table]) -> None:
    for table in tables:
        connection.execute(sql.SQL("LOCK TABLE {} IN ROW EXCLUSIVE MODE").format(table.rows))
    found = firing(connection, tables)
    if found:
        name, what = found[0]
        raise Refused(
            f"move {move_id}: {what} of {name} would fire once more for each row that is carried, and the role"
            f" {connection.info.user} may not set session_replication_role",
            hint="`shardmove preflight ID` has the statement that grants it",
        )


def firing(connection: Connection, tables: Sequence[Table]) -> list[tuple[str, str]]:
    """What would fire for rows that are not applied as a replica: (table or partition, what it is)."""
    listed = sql.Literal(oids(connection, (table.name for table in tables)))
    query = sql.SQL(_FIRING).format(family=sql.SQL(FAMILY).format(tables=listed))
    return [(name, what) for name, what in connection.execute(query).fetchall()]
