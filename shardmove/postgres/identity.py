"""Which history of which server a connection leads to: a restored or promoted server may lack the last commits."""

from __future__ import annotations

from shardmove.domain.moves import ServerIdentity
from shardmove.postgres.connect import Connection

_IDENTITY = """
    SELECT c.system_identifier::text, ('x' || pg_catalog.substr(w.name, 1, 8))::bit(32)::int
    FROM pg_catalog.pg_control_system() AS c,
         pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()) AS w(name)
"""


def identity(connection: Connection) -> ServerIdentity:
    """System identifier and timeline, as they are now."""
    row = connection.execute(_IDENTITY).fetchone()
    assert row is not None
    return ServerIdentity(row[0], row[1])
