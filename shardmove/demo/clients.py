"""How the shop's writers reach the database: through a router, as any program does, or with `ShardClient`.

`RouterClient` is what an application has anyway: one address, an unmodified driver, and the loop that everybody needs
who runs transactions above READ COMMITTED, because these may end with 40001 or 40P01. Single statements have no loop:
whatever error they get is the program's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import psycopg
from psycopg import IsolationLevel

from router.client import OutcomeUnknown, ShardClient, is_fenced
from shardmove.demo.shop import pinned
from shardmove.domain.errors import Unreachable

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[Any]
Work: TypeAlias = Callable[[Connection], T]

SERIALIZATION_FAILURE: Final = "40001"
DEADLOCK: Final = "40P01"
BACKOFF_MAX_S: Final = 0.016
CONNECT_TIMEOUT_S: Final = 10
RECONNECT_S: Final = 0.05


class NotTogether(Exception):
    """The router refused a statement because its rows are on several shards by now. Nothing was written."""


@dataclass(slots=True)
class Trace:
    """How the latest call of a client went. Times are `time.monotonic()`.

    Attributes:
        shard: the shard of the latest attempt; None where nobody outside of the router knows.
        fenced: how many attempts ended with the error of a fence.
        collided: how many ended with a serialization failure or deadlock of the application's own.
        disturbed_at: when it first met a hold or a refusing fence, as far as the client can tell.
    """

    started: float
    shard: str | None = None
    attempts: int = 0
    fenced: int = 0
    collided: int = 0
    disturbed_at: float | None = None


class Client(Protocol):
    """What a writer needs. Not thread-safe: one a writer."""

    @property
    def last(self) -> Trace: ...

    def connect(self) -> None:
        """Now, so that the first write does not pay for it."""

    def groups(self, keys: Sequence[int]) -> Iterable[Sequence[int]]:
        """The keys, so divided that `alone` can read each group."""
        ...

    def are_together(self, one: int, other: int) -> bool:
        """Whether one transaction may write to both keys, as far as is known."""
        ...

    def alone(self, key: int, work: Work[T]) -> T:
        """Runs single statements. Raises OutcomeUnknown where the connection is lost, psycopg.Error for all else."""
        ...

    def transaction(self, key: int, work: Work[T], *, isolation: IsolationLevel) -> T:
        """See `ShardClient.transaction`."""
        ...

    def close(self) -> None: ...


class RouterClient:
    """A program behind a router: nothing in it knows of shards."""

    def __init__(self, dsn: str, *, application_name: str, deadline_s: float) -> None:
        self._dsn = pinned(dsn)
        self._application_name = application_name
        self._deadline_s = deadline_s
        self._conn: Connection | None = None
        self.last = Trace(time.monotonic())

    def connect(self) -> None:
        self._connection()

    def groups(self, keys: Sequence[int]) -> Iterable[Sequence[int]]:
        return [keys] if keys else []

    def are_together(self, one: int, other: int) -> bool:
        return True

    def alone(self, key: int, work: Work[T]) -> T:
        self.last = Trace(time.monotonic(), attempts=1)
        conn = self._patiently_connected()
        try:
            return work(conn)
        except psycopg.Error as error:
            self._note(error)
            if conn.closed:
                raise OutcomeUnknown(f"the connection was lost during a statement: {error}") from error
            raise

    def transaction(self, key: int, work: Work[T], *, isolation: IsolationLevel) -> T:
        """Run again, each time in a new transaction, until the deadline: serialization failures, deadlocks, and
        connections that were lost before COMMIT. Raises NotTogether, too."""
        self.last = trace = Trace(time.monotonic())
        while True:
            trace.attempts += 1
            try:
                return self._attempt(work, isolation)
            except psycopg.errors.FeatureNotSupported as error:
                raise NotTogether(str(error)) from error
            except (psycopg.Error, Unreachable) as error:
                is_lost = isinstance(error, Unreachable)
                if not (self._note(error) or is_lost) or time.monotonic() - trace.started > self._deadline_s:
                    raise
            time.sleep(random.uniform(0.5, 1.0) * min(0.001 * 2**trace.attempts, BACKOFF_MAX_S))

    def _attempt(self, work: Work[T], isolation: IsolationLevel) -> T:
        conn = self._connection()
        conn.isolation_level = isolation
        is_committing = False
        try:
            with conn.transaction():
                result = work(conn)
                is_committing = True
            return result
        except Exception as error:  # psycopg lets a Rollback escape where ROLLBACK TO fails
            if not conn.closed:
                raise
            if is_committing:
                raise OutcomeUnknown(f"the connection was lost while COMMIT was in flight: {error}") from error
            raise Unreachable(f"the connection was lost: {error}") from error

    def _note(self, error: Exception) -> bool:
        """Whether the same again may come through."""
        sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
        if is_fenced(error):
            self.last.fenced += 1
            if self.last.disturbed_at is None:
                self.last.disturbed_at = time.monotonic()
        elif sqlstate in (SERIALIZATION_FAILURE, DEADLOCK):
            self.last.collided += 1
        return sqlstate in (SERIALIZATION_FAILURE, DEADLOCK)

    def _patiently_connected(self) -> Connection:
        """Nothing was said yet: whatever is wrong, another try does no harm."""
        while True:
            try:
                return self._connection()
            except Unreachable:
                if time.monotonic() - self.last.started > self._deadline_s:
                    raise
            time.sleep(RECONNECT_S)

    def _connection(self) -> Connection:
        if self._conn is None or self._conn.closed:
            try:
                self._conn = psycopg.connect(
                    self._dsn,
                    autocommit=True,
                    application_name=self._application_name,
                    connect_timeout=CONNECT_TIMEOUT_S,
                )
            except psycopg.OperationalError as error:
                raise Unreachable(f"the router does not answer: {error}") from error
        return self._conn

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()


class DirectClient:
    """A program without a router: `ShardClient` under the same names."""

    def __init__(
        self,
        catalog_dsn: str,
        shard_dsns: Mapping[str, str],
        *,
        keyspace: str,
        application_name: str,
        deadline_s: float,
    ) -> None:
        self._client = ShardClient(
            catalog_dsn,
            {shard: pinned(dsn) for shard, dsn in shard_dsns.items()},
            keyspace=keyspace,
            application_name=application_name,
            deadline_s=deadline_s,
        )

    @property
    def last(self) -> Trace:
        trace = self._client.last
        return Trace(trace.started, trace.shard, trace.attempts, disturbed_at=trace.disturbed_at)

    def connect(self) -> None:
        self._client.connect_all()

    def groups(self, keys: Sequence[int]) -> Iterable[Sequence[int]]:
        by_shard: dict[str, list[int]] = {}
        for key in keys:
            by_shard.setdefault(self._client.shard_of(key), []).append(key)
        return by_shard.values()

    def are_together(self, one: int, other: int) -> bool:
        return self._client.shard_of(one) == self._client.shard_of(other)

    def alone(self, key: int, work: Work[T]) -> T:
        """As a transaction: only the fence knows whether the cached route is right."""
        return self._client.transaction(key, work)

    def transaction(self, key: int, work: Work[T], *, isolation: IsolationLevel) -> T:
        return self._client.transaction(key, work, isolation=isolation)

    def close(self) -> None:
        self._client.close()
