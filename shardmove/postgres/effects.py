"""The one place where a transaction of ours begins to write, and where it commits.

Every session of ours is read-only (`connect.PINNED`): PostgreSQL itself refuses a write that does not come through here
(25006, read_only_sql_transaction). So there is a control point before and after every commit of the engine, and none
can be forgotten. What no transaction undoes (a sequence that is set, a session that is ended) goes through
`points.around`; a test holds the list of such calls against the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from shardmove.domain import points
from shardmove.domain.points import Effect
from shardmove.postgres.connect import Connection


@contextmanager
def writing(connection: Connection, effect: Effect) -> Iterator[None]:
    """A transaction that writes; committed at the end of the block, rolled back by any error.

    Raises whatever the block, or the commit, raises. Where the connection is lost in the commit it may have happened.
    """
    _require_idle(connection)
    with connection.transaction():
        yield
        points.reach(effect.before)
    points.reach(effect.after)


@contextmanager
def trying(connection: Connection) -> Iterator[None]:
    """A transaction that may write, and is rolled back whatever happens."""
    _require_idle(connection)
    with connection.transaction(force_rollback=True):
        yield


@contextmanager
def snapshot(connection: Connection, exported: str | None = None) -> Iterator[None]:
    """A REPEATABLE READ READ ONLY transaction, at an exported snapshot where one is given."""
    _require_idle(connection)
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        if exported is not None:
            connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(exported)))
        yield


def once(
    connection: Connection, effect: Effect, query: LiteralString, parameters: Sequence[object] | Mapping[str, object]
) -> psycopg.Cursor[tuple[Any, ...]]:
    """A transaction of one statement, begun and committed by one message: no process can stop in the middle of it.

    One message means the simple protocol, where the client puts values into the statement. A pipeline sends a packet a
    statement, and no timeout of the server's applies between them.

    Raises psycopg.Error; nothing was changed then, or, where the connection was lost, perhaps all of it.
    """
    _require_idle(connection)
    cursor = psycopg.ClientCursor(connection)
    points.reach(effect.before)
    try:
        cursor.execute("BEGIN READ WRITE; " + query + "; COMMIT", parameters)
    except BaseException:
        if not connection.closed:
            connection.rollback()
        raise
    cursor.nextset()  # that of BEGIN is empty
    points.reach(effect.after)
    return cursor


def begin(connection: Connection, isolation: LiteralString = "READ COMMITTED") -> None:
    """Begins a transaction that may write, for those that `commit` or `roll_back` by hand."""
    connection.execute(sql.SQL("BEGIN ISOLATION LEVEL {} READ WRITE").format(sql.SQL(isolation)))


def commit(connection: Connection, effect: Effect) -> None:
    """Commits what was begun by hand. Where the connection is lost it may have happened."""
    points.reach(effect.before)
    connection.execute("COMMIT")
    points.reach(effect.after)


def roll_back(connection: Connection) -> None:
    """Ends what was begun by hand, without any effect."""
    connection.execute("ROLLBACK")


def _require_idle(connection: Connection) -> None:
    # within another transaction it would be a savepoint, and its end no commit
    assert connection.info.transaction_status != TransactionStatus.INTRANS, "a transaction is open already"
