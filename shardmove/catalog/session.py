"""One connection to the catalog's database: its settings, and its errors in the house's words.

Every effect is one function call and one message, so a session carries no state between calls: a connection that
died is replaced at the next call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, LiteralString, Self, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from shardmove.catalog import upgrade
from shardmove.domain.errors import (
    AttemptDecided,
    ConfigurationError,
    EpochConflict,
    Failed,
    IllegalTransition,
    LeaseLost,
    NotFound,
    Refused,
    ShardmoveError,
    Unreachable,
)
from shardmove.domain.points import Effect
from shardmove.postgres import connect as postgres
from shardmove.postgres import effects

Connection: TypeAlias = psycopg.Connection[TupleRow]
Parameters: TypeAlias = Sequence[object] | Mapping[str, object]

SECRETS = ("password", "sslpassword", "oauth_client_secret")

_CLASSES: dict[str, type[ShardmoveError]] = {
    "SM001": LeaseLost,
    "SM002": EpochConflict,
    "SM003": AttemptDecided,
    "SM004": IllegalTransition,
    "SM005": NotFound,
    "SM006": Refused,
}
_MISSING = ("3F000", "42P01", "42883")  # no such schema, table, function
_LOCKED = ("55P03", "40P01")  # lock_timeout, deadlock
_NOT_ALLOWED = "42501"


def without_secrets(dsn: str, what: str) -> str:
    """The same connection string without any password. Raises ConfigurationError where it cannot be read."""
    return make_conninfo("", **{name: value for name, value in _parsed(dsn, what).items() if name not in SECRETS})


def _parsed(dsn: str, what: str) -> dict[str, Any]:
    try:
        return dict(conninfo_to_dict(dsn))
    except psycopg.ProgrammingError:
        # libpq's message quotes the words that it stumbles over, which may be the password.
        raise ConfigurationError(
            f"the dsn of {what} is not a PostgreSQL connection string", hint="e.g. host=db1 dbname=shop user=mover"
        ) from None


def connect(dsn: str, *, application_name: str) -> Connection:
    """A connection in autocommit mode with every setting pinned that could change what is promised.

    Raises Unreachable (its text never has the password in it), ConfigurationError where the dsn cannot be read.
    """
    _parsed(dsn, "the catalog")
    connection = postgres.connect(dsn, application_name=application_name)
    connection.prepare_threshold = None  # they are few, and far between
    with translated(connection):
        connection.execute(upgrade.PATIENCE)
    return connection


@contextmanager
def translated(connection: Connection) -> Iterator[None]:
    """Errors of psycopg come out as errors of the house."""
    try:
        yield
    except psycopg.Error as error:
        raise _translate(error, is_lost=connection.closed) from error


def _translate(error: psycopg.Error, *, is_lost: bool) -> ShardmoveError:
    code, hint = error.diag.sqlstate, error.diag.message_hint
    text = error.diag.message_primary or str(error).strip()
    if code in _CLASSES:
        return _CLASSES[code](text, hint=hint)
    if is_lost:
        return Unreachable(f"the connection to the catalog broke: {text}", hint="what was sent may have been committed")
    if code in _MISSING:
        return ConfigurationError(f"the catalog is not there: {text}", hint="run `shardmove apply`")
    if code == _NOT_ALLOWED:
        return ConfigurationError(f"the catalog's role may not do this: {text}", hint="see `shardmove grants`")
    if code in _LOCKED:
        return Failed(f"the catalog is busy: {text}", hint="nothing was changed; the same command tries again")
    return Failed(f"the catalog's server refused a statement: {text}", hint=hint)


class Session:
    """Runs statements on one connection. Not thread-safe.

    Args:
        dsn: may have a password in it; it is never shown.
        reconnects: whether a connection that died is replaced. Off where its death must be noticed.
    """

    def __init__(self, dsn: str, *, application_name: str, reconnects: bool = True) -> None:
        self._dsn = dsn
        self._application_name = application_name
        self._reconnects = reconnects
        self._connection = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Safe to repeat."""
        self._reconnects = False
        self._connection.close()

    def _open(self) -> Connection:
        connection = connect(self._dsn, application_name=self._application_name)
        try:
            upgrade.require_current(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected(self) -> Connection:
        if self._connection.closed:
            if not self._reconnects:
                raise Unreachable("the connection to the catalog is closed")
            self._connection = self._open()
        return self._connection

    def _rows(self, query: LiteralString, parameters: Parameters = ()) -> list[TupleRow]:
        """Runs one statement, which is one transaction where no other is open."""
        connection = self._connected()
        with translated(connection):
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def _value(self, query: LiteralString, parameters: Parameters = ()) -> Any:
        """The first column of the first row; None where there is no row."""
        rows = self._rows(query, parameters)
        return rows[0][0] if rows else None

    def _changed(self, effect: Effect, query: LiteralString, parameters: Parameters = ()) -> Any:
        """Runs one statement that writes: a transaction of its own, or a part of the one that is open.

        The first column of the first row that it returns; None where there is none.
        """
        connection = self._connected()
        if connection.info.transaction_status == TransactionStatus.INTRANS:
            return self._value(query, parameters)
        with translated(connection):
            cursor = effects.once(connection, effect, query, parameters)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]

    @contextmanager
    def _transaction(self, effect: Effect) -> Iterator[None]:
        connection = self._connected()
        with translated(connection), effects.writing(connection, effect):
            yield
