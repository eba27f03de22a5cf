"""One connection of a client to a router, spoken in one of three ways; all of them take `$1` for a parameter.

prepared   psycopg: extended protocol, a named statement from its second use on
simple     psycopg: one Query message, the values written into the text
asyncpg    named statements, binary parameters and results, from a loop of the client's own thread
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

import asyncpg
import psycopg
from psycopg import pq

STATEMENT_BOUND_S: Final = 120.0
"""No answer for so long is a lost connection: a router that hangs must not hang the run."""

T = TypeVar("T")
Row = tuple[Any, ...]


class Refusal(Exception):
    """The server, or the router in its place, said no."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(f"{sqlstate} {message}")
        self.sqlstate = sqlstate


class Lost(Exception):
    """The connection is gone, or never came to be."""


class Session(Protocol):
    def execute(self, text: str, *values: int | str) -> list[Row]: ...
    def close(self) -> None: ...


class PreparedSession:
    def __init__(self, dsn: str) -> None:
        self._connection = _opened(dsn, prepare_threshold=1)
        self._cursor = psycopg.RawCursor(self._connection)

    def execute(self, text: str, *values: int | str) -> list[Row]:
        return _answered(self._connection, self._cursor, text, values or None)

    def close(self) -> None:
        self._connection.close()


class SimpleSession:
    def __init__(self, dsn: str) -> None:
        self._connection = _opened(dsn, prepare_threshold=None)
        self._cursor = psycopg.RawCursor(self._connection)

    def execute(self, text: str, *values: int | str) -> list[Row]:
        return _answered(self._connection, self._cursor, inlined(text, values), None)

    def close(self) -> None:
        self._connection.close()


class AsyncpgSession:
    def __init__(self, dsn: str) -> None:
        words = psycopg.conninfo.conninfo_to_dict(dsn)
        self._runner = asyncio.Runner()
        try:
            self._connection: asyncpg.Connection[Any] = self._wait(
                lambda: asyncpg.connect(
                    host=words["host"],
                    port=int(str(words["port"])),
                    user=str(words["user"]),
                    database=str(words["dbname"]),
                    timeout=STATEMENT_BOUND_S,
                )
            )
        except BaseException:
            self._runner.close()
            raise

    def execute(self, text: str, *values: int | str) -> list[Row]:
        rows = self._wait(
            lambda: (
                self._connection.fetch(text, *values, timeout=STATEMENT_BOUND_S)
                if values or text.startswith("SHOW")
                else self._connection.execute(text, timeout=STATEMENT_BOUND_S)
            )
        )
        return [] if isinstance(rows, str) else [tuple(row) for row in rows]

    def close(self) -> None:
        self._connection.terminate()
        self._runner.close()

    def _wait(self, begin: Callable[[], Awaitable[T]]) -> T:
        async def begun() -> T:
            return await begin()

        try:
            return self._runner.run(begun())
        except asyncpg.PostgresConnectionError as error:
            if getattr(error, "severity", None) is None:  # the driver's own words, no server's
                raise Lost(str(error)) from error
            raise Refusal(error.sqlstate or "", str(error)) from error
        except asyncpg.PostgresError as error:
            raise Refusal(error.sqlstate or "", str(error)) from error
        except (OSError, asyncpg.InterfaceError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error


WAYS: Final[tuple[Callable[[str], Session], ...]] = (PreparedSession, AsyncpgSession, SimpleSession, AsyncpgSession)


def inlined(text: str, values: tuple[int | str, ...]) -> str:
    """The values as literals in the places of `$1`, `$2`, …; numbers and plain words only."""

    def literal(found: re.Match[str]) -> str:
        value = values[int(found[1]) - 1]
        return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"

    return re.sub(r"\$(\d+)", literal, text)


def _opened(dsn: str, *, prepare_threshold: int | None) -> psycopg.Connection[Row]:
    try:
        return psycopg.connect(dsn, autocommit=True, prepare_threshold=prepare_threshold)
    except psycopg.OperationalError as error:
        raise _ours(error) from error


def _answered(
    connection: psycopg.Connection[Row], cursor: psycopg.RawCursor[Row], text: str, values: tuple[int | str, ...] | None
) -> list[Row]:
    try:
        cursor.execute(text.encode(), values)
        return cursor.fetchall() if cursor.description else []
    except psycopg.Error as error:
        if connection.pgconn.status == pq.ConnStatus.BAD and error.sqlstate is None:
            raise Lost(str(error)) from error
        raise _ours(error) from error


def _ours(error: psycopg.Error) -> Refusal | Lost:
    """A refusal at connecting has no SQLSTATE in psycopg, but it says FATAL as no lost connection does."""
    said = str(error).strip()
    if error.sqlstate is None and "FATAL" not in said:
        return Lost(said)
    return Refusal(error.sqlstate or "", said)
