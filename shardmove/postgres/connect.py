"""Connections to shards: every one of ours is opened here, so that every one has the same pinned settings.

What a role or a database sets by default must not change what a COPY stream looks like, how long a statement may take,
which rows a policy shows, or whether a commit is durable (DESIGN §4.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import conninfo, errors

from shardmove.domain.errors import ConfigurationError, SchemaDrift, Unreachable

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

CONNECT_TIMEOUT_S = 10
UNACKNOWLEDGED_MS = 20_000
"""Data that the other side does not acknowledge for so long ends a connection: a black hole defeats keepalives."""
SHOWN = ("service", "user", "host", "hostaddr", "port", "dbname")
"""The parts of a connection string that messages may show."""

PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "array_nulls": "on",
    "client_encoding": "UTF8",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "xmlbinary": "base64",
    "xmloption": "content",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
    "search_path": "",
    "row_security": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "5min",  # what a stopped process has locked is let go at last
    "idle_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "on",  # whoever writes says so, in effects.py
    "default_transaction_deferrable": "off",
    "jit": "off",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "20s",
    "client_connection_check_interval": "1s",  # the session of a dead process lets go of its locks, also while it waits
}
"""Where a server is too old to know a setting, it is left out."""

_PIN = """
    SELECT pg_catalog.set_config(pinned.name, pinned.value, false)
    FROM unnest(%s::text[], %s::text[]) AS pinned(name, value)
    JOIN pg_catalog.pg_settings AS known ON pg_catalog.lower(known.name) = pg_catalog.lower(pinned.name)
"""

# remote_apply is stronger than on; everything else is raised to on: a commit of ours that the server may forget in a
# crash has opened a closed fence before.
_PIN_DURABILITY = """
    SELECT pg_catalog.set_config('synchronous_commit', 'on', false)
    WHERE pg_catalog.current_setting('synchronous_commit') <> 'remote_apply'
"""


def connect(dsn: str, *, application_name: str) -> Connection:
    """Opens a connection in autocommit mode with all settings pinned.

    Raises:
        Unreachable: the server does not answer or refuses; names the server, never the password.
    """
    try:
        connection = psycopg.connect(
            dsn,
            autocommit=True,
            application_name=application_name,
            connect_timeout=CONNECT_TIMEOUT_S,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=UNACKNOWLEDGED_MS,
            prepare_threshold=2,
        )
    except psycopg.ProgrammingError:
        # libpq's own text may quote the part that it cannot read, which may be the password
        raise ConfigurationError(
            f"a connection string cannot be read: {safe_dsn(dsn)}", hint="write key=value pairs, or a postgresql:// URI"
        ) from None
    except psycopg.OperationalError as error:
        raise Unreachable(f"cannot connect to {safe_dsn(dsn)}: {_first_line(error)}") from None
    try:
        connection.execute(_PIN, (list(PINNED), list(PINNED.values())))
        connection.execute(_PIN_DURABILITY)
        connection.read_only = False  # of the transactions that effects.py begins
    except psycopg.Error as error:
        connection.close()
        raise Unreachable(f"cannot prepare a session on {safe_dsn(dsn)}: {_first_line(error)}") from None
    return connection


def safe_dsn(dsn: str) -> str:
    """The connection string without its password, for messages and for the catalog."""
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "(unreadable dsn)"
    return conninfo.make_conninfo("", **{name: parts[name] for name in SHOWN if name in parts})


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def explain(error: psycopg.Error) -> str:
    """One line of what the server said: message and SQLSTATE; never the detail, which may carry row values.

    The messages of class 22 carry them themselves: of those the condition's name is all.
    """
    if error.sqlstate and error.sqlstate.startswith("22"):
        return f"{type(error).__name__} ({error.sqlstate})"
    message = error.diag.message_primary or _first_line(error)
    return f"{message} ({error.sqlstate})" if error.sqlstate else message


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turns a lost connection and a changed schema into errors of ours; all else goes through unchanged."""
    try:
        yield
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.UndefinedFunction, errors.DatatypeMismatch) as error:
        raise SchemaDrift(
            f"{where}: {explain(error)}: the schema is not what the move began with",
            hint="`shardmove diagnose` lists what is missing",
        ) from error
    except psycopg.Error as error:
        if is_unreachable(error):
            raise Unreachable(f"{where}: lost the connection: {_first_line(error)}") from error
        raise


def is_unreachable(error: BaseException) -> bool:
    """True where the connection is gone, and with it the session's transaction."""
    return isinstance(error, (Unreachable, errors.IdleInTransactionSessionTimeout)) or (
        isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
        and (error.sqlstate is None or error.sqlstate[:2] in ("08", "57"))
    )
