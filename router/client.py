"""The small client for programs without a router.

    client = ShardClient(catalog_dsn, {"s1": "host=db1 dbname=shop", "s2": "host=db2 dbname=shop"}, keyspace="shop")
    client.transaction(42, lambda conn: conn.execute("UPDATE orders SET … WHERE tenant_id = 42 AND …"))

Routes are a cache here: the fence in the shard decides. A transaction goes to the shard that the cached route names; a
shard that does not own the key (any more, or yet) refuses the write with SQLSTATE 40001, nothing of it stays, and it is
run again where the route table points by then. Around a cutover that looks as follows:

    route, as read after the refusal            what the client does
    ------------------------------------------  -----------------------------------------------------------------
    held                                        waits for the next epoch's announcement, a second at most
    another shard                               runs the transaction there at once
    the shard that refused, not held            its fence opens within milliseconds (the new owner's after the flip,
                                                or the old one's after an abandoned attempt): backs off, 1 to 16 ms

Two things end a transaction without a result: `DeadlineExceeded` (nothing was written) and `OutcomeUnknown` (the
connection was lost while COMMIT was in flight: only the program can tell whether running it again is harmless).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, LiteralString, NoReturn, TypeAlias, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

from shardmove.domain.errors import ConfigurationError, Failed, ShardmoveError, Unreachable
from shardmove.domain.keys import Key, KeyType
from shardmove.domain.moves import Keyspace, Scheme
from shardmove.domain.routes import Route, Routes

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[Any]

CONNECT_TIMEOUT_S = 2  # libpq knows whole seconds, and takes anything below two for two
CONFIRM_S = 1.0  # an announcement can be missed (a failover of the catalog): the table is read anew this often
HELD_CONFIRM_S = 0.05  # the same, while somebody waits for it
HOLD_WAIT_S = 1.0  # a hold older than this is its coordinator's trouble: try, the fence decides
BACKOFF_MIN_S = 0.001
BACKOFF_MAX_S = 0.016
RECONNECT_SHARE = 10  # stay away for ten times as long as a failed connect took: a tenth of the time goes to it
RECONNECT_MIN_S = 0.1

_FENCE_PREFIX = "shardmove:"
_SERIALIZATION_FAILURE = "40001"
_RETRYABLE = frozenset({_SERIALIZATION_FAILURE, "40P01"})
_BEGIN: Final[Mapping[IsolationLevel | None, LiteralString]] = {
    None: "BEGIN",
    IsolationLevel.READ_UNCOMMITTED: "BEGIN ISOLATION LEVEL READ UNCOMMITTED",
    IsolationLevel.READ_COMMITTED: "BEGIN ISOLATION LEVEL READ COMMITTED",
    IsolationLevel.REPEATABLE_READ: "BEGIN ISOLATION LEVEL REPEATABLE READ",
    IsolationLevel.SERIALIZABLE: "BEGIN ISOLATION LEVEL SERIALIZABLE",
}
# The last two are not there before release 0.2, which brought keys that are no integers.
_READ_ROUTES = """
    SELECT epoch, lower, upper, shard, move_id, held,
           coalesce(to_jsonb(r) ->> 'key_type', 'bigint'), coalesce(to_jsonb(r) ->> 'scheme', 'range')
    FROM shardmove_catalog.current_routes AS r
    WHERE keyspace = %s
"""


class OutcomeUnknown(ShardmoveError):
    """The connection was lost while COMMIT was in flight: the transaction happened whole, or not at all."""


class DeadlineExceeded(Failed):
    """No attempt was committed before the deadline. Nothing was written."""


@dataclass(slots=True)
class Trace:
    """How the latest transaction of a client went. Times are `time.monotonic()`.

    Attributes:
        shard: the shard of the latest attempt, or None when there was none yet.
        attempts: how often `work` was started.
        disturbed_at: when the transaction first met a hold or a refusing fence, or None.
    """

    started: float
    shard: str | None = None
    epoch: int | None = None
    attempts: int = 0
    disturbed_at: float | None = None

    def disturbed(self) -> None:
        if self.disturbed_at is None:
            self.disturbed_at = time.monotonic()


class _Backoff:
    """1, 2, 4, … 16 ms, each cut at random by up to a half, so that writers which were refused together part."""

    def __init__(self) -> None:
        self._next_s = BACKOFF_MIN_S

    def next(self) -> float:
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, BACKOFF_MAX_S)
        return pause_s


class RouteCache:
    """One keyspace's routes as last read from the catalog, kept fresh by its announcements.

    A catalog that is away changes nothing here: the cached routes stay, and it is asked again now and then.
    """

    def __init__(self, dsn: str, keyspace: str, *, application_name: str) -> None:
        self._dsn = dsn
        self._keyspace = keyspace
        self._application_name = application_name
        self._conn: Connection | None = None
        self._routes: Routes | None = None
        self._shape: Keyspace | None = None
        self._read_at = float("-inf")
        self._connect_not_before = float("-inf")
        self._trouble: psycopg.Error | None = None
        self.epoch = 0

    def at(self, key: Key, *, max_age_s: float = CONFIRM_S) -> Route:
        """The route of the key, no older than that unless the catalog is away.

        Raises Unreachable where no routes were ever read, and the catalog does not answer.
        """
        if self._is_announced() or time.monotonic() - self._read_at > max_age_s:
            self._read()
        if self._routes is None or self._shape is None:
            raise Unreachable(f"the catalog does not answer, and no routes of {self._keyspace} are known") from (
                self._trouble
            )
        return self._routes.at(self._shape.place(key))

    def wait(self, timeout_s: float) -> None:
        """Returns as soon as new routes are announced, at the latest after the timeout."""
        if self._conn is None:
            time.sleep(timeout_s)
            return
        started = time.monotonic()
        try:
            for _ in self._conn.notifies(timeout=timeout_s, stop_after=1):
                self._read_at = float("-inf")
        except psycopg.Error as error:
            self._lose_catalog(error, started)

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None

    def _is_announced(self) -> bool:
        """Whether an announcement came in since the last look. Never waits; takes all of them."""
        if self._conn is None:
            return False
        started = time.monotonic()
        try:
            return bool(list(self._conn.notifies(timeout=0)))
        except psycopg.Error as error:
            self._lose_catalog(error, started)
            return False

    def _read(self) -> None:
        """Reads the table. Whatever is announced after LISTEN and before this read is at worst read twice."""
        started = time.monotonic()
        if self._conn is None and started < self._connect_not_before:
            return
        try:
            if self._conn is None:
                self._conn = self._listen()
            rows = self._conn.execute(_READ_ROUTES, (self._keyspace,)).fetchall()
        except psycopg.Error as error:
            self._lose_catalog(error, started)
            return
        self._read_at = started
        if not rows:
            raise ConfigurationError(f"the catalog has no routes for the keyspace {self._keyspace}")
        epoch = int(rows[0][0])
        if epoch >= self.epoch:  # a catalog that lost its tail must not lead back: the fences would send us here again
            self.epoch = epoch
            self._shape = Keyspace(self._keyspace, KeyType(rows[0][6]), Scheme(rows[0][7]), {})
            self._routes = _routes_of(self._shape, rows)

    def _listen(self) -> Connection:
        conn: Connection = psycopg.connect(
            self._dsn,
            autocommit=True,
            application_name=self._application_name,
            connect_timeout=CONNECT_TIMEOUT_S,
        )
        conn.execute("LISTEN shardmove_routes")
        return conn

    def _lose_catalog(self, error: psycopg.Error, started: float) -> None:
        self.close()
        self._trouble = error
        self._read_at = float("-inf")  # whatever was announced meanwhile was missed
        now = time.monotonic()
        self._connect_not_before = now + max(RECONNECT_MIN_S, RECONNECT_SHARE * (now - started))


class ShardClient:
    """One database client for one keyspace; not thread-safe: one per process or thread.

    It connects on first use. The servers of `shard_dsns` that it never needs are never asked.
    """

    def __init__(
        self,
        catalog_dsn: str,
        shard_dsns: Mapping[str, str],
        *,
        keyspace: str,
        application_name: str = "shardmove client",
        deadline_s: float = 30.0,
    ) -> None:
        self._shard_dsns = dict(shard_dsns)
        self._application_name = application_name
        self._deadline_s = deadline_s
        self._routes = RouteCache(catalog_dsn, keyspace, application_name=application_name)
        self._conns: dict[str, Connection] = {}
        self.last = Trace(time.monotonic())

    def shard_of(self, key: Key) -> str:
        """The shard that owns the key, as far as this client knows: a second old at most while the catalog answers."""
        return self._routes.at(key).shard

    def connect_all(self) -> None:
        """Connects to every shard now, so that the first transaction after a cutover does not pay for it.

        A shard that does not answer is left for later.
        """
        for shard in self._shard_dsns:
            with suppress(Unreachable):
                self._connection(shard, time.monotonic() + CONNECT_TIMEOUT_S)

    def transaction(self, key: Key, work: Callable[[Connection], T], *, isolation: IsolationLevel | None = None) -> T:
        """Runs `work` in one transaction on the shard that owns the key, and commits it.

        `work` may be run several times, each time in a new transaction, after nothing remained of the one before: it
        must have no effects elsewhere. It must not end the transaction itself; `conn.transaction()` inside makes
        savepoints. An exception of its own rolls back and is passed on. All its keys must be on the key's shard.

        Run again are: serialization failures and deadlocks (40001, 40P01; a refusing fence is one), and connections
        that failed before COMMIT was sent. **A connection that is lost while COMMIT is in flight is never retried
        silently**: the caller gets OutcomeUnknown and must find out. The deadline limits the waiting and the
        attempts; it does not interrupt a statement that is running.

        Raises:
            OutcomeUnknown: committed whole or not at all; nobody here knows which.
            DeadlineExceeded: no attempt was committed in time; nothing was written.
            psycopg.Error: any other error of the database; nothing was written.
        """
        self.last = trace = Trace(time.monotonic())
        deadline = trace.started + self._deadline_s
        backoff = _Backoff()
        while True:
            try:
                route = self._settled_route(key, trace, deadline)
                trace.shard, trace.epoch, trace.attempts = route.shard, self._routes.epoch, trace.attempts + 1
                return self._attempt(route.shard, work, isolation, deadline)
            except (psycopg.Error, Unreachable) as error:
                if isinstance(error, psycopg.Error) and error.sqlstate not in _RETRYABLE:
                    raise
                last_error = error
            if time.monotonic() >= deadline:
                self._give_up(key, trace, last_error)
            if is_fenced(last_error):
                trace.disturbed()
                if not self._is_owner_still(key, trace.shard):
                    continue
            self._routes.wait(backoff.next())

    def close(self) -> None:
        """Closes every connection. What is open on them is rolled back by the servers."""
        self._routes.close()
        for shard in list(self._conns):
            self._discard(shard)

    def _settled_route(self, key: Key, trace: Trace, deadline: float) -> Route:
        """The key's route, once it is not held; after HOLD_WAIT_S as it is."""
        route = self._routes.at(key)
        waits_until = min(time.monotonic() + HOLD_WAIT_S, deadline)
        while route.held and (left_s := waits_until - time.monotonic()) > 0:
            trace.disturbed()
            self._routes.wait(min(HELD_CONFIRM_S, left_s))
            route = self._routes.at(key, max_age_s=HELD_CONFIRM_S)
        return route

    def _is_owner_still(self, key: Key, shard: str | None) -> bool:
        """Whether the newest route table sends the key to the shard that just refused it, and does not hold it."""
        route = self._routes.at(key, max_age_s=0.0)
        return route.shard == shard and not route.held

    def _attempt(
        self, shard: str, work: Callable[[Connection], T], isolation: IsolationLevel | None, deadline: float
    ) -> T:
        conn = self._connection(shard, deadline)
        try:
            conn.execute(_BEGIN[isolation], prepare=False)
            result = work(conn)
            _require_healthy(conn)
        except BaseException as error:
            self._roll_back(shard, conn)
            # Whatever the work made of it: psycopg itself lets a Rollback escape when ROLLBACK TO fails.
            if conn.closed and isinstance(error, Exception):
                raise Unreachable(f"the connection to shard {shard} was lost: {_one_line(error)}") from error
            raise
        self._commit(shard, conn)
        return result

    def _commit(self, shard: str, conn: Connection) -> None:
        """Commits. An answer of the server that leaves the connection usable is a clear no; all else is unknown."""
        try:
            conn.execute("COMMIT", prepare=False)
        except psycopg.Error as error:
            if not conn.closed and conn.info.transaction_status is TransactionStatus.IDLE:
                raise
            self._discard(shard)
            raise OutcomeUnknown(
                f"the connection to shard {shard} was lost while COMMIT was in flight: {_one_line(error)}",
                hint="read what the transaction would have written before you run it again",
            ) from error
        except BaseException:
            self._discard(shard)
            raise

    def _roll_back(self, shard: str, conn: Connection) -> None:
        try:
            conn.execute("ROLLBACK", prepare=False)
        except psycopg.Error:
            self._discard(shard)  # the server rolls back what its client left

    def _connection(self, shard: str, deadline: float) -> Connection:
        """An idle connection to the shard. It commits by itself unless told: BEGIN and COMMIT are ours to send."""
        conn = self._conns.get(shard)
        if conn is not None and not conn.closed:
            return conn
        if shard not in self._shard_dsns:
            raise ConfigurationError(
                f"the route table names the shard {shard}, and this client has no connection string for it",
                hint=f"it knows {', '.join(sorted(self._shard_dsns))}",
            )
        timeout_s = max(CONNECT_TIMEOUT_S, int(min(10.0, deadline - time.monotonic())))
        try:
            conn = psycopg.connect(
                self._shard_dsns[shard],
                autocommit=True,
                application_name=self._application_name,
                connect_timeout=timeout_s,
            )
        except psycopg.OperationalError as error:
            raise Unreachable(
                f"shard {shard} refuses the connection, or does not answer: {_one_line(error)}"
            ) from error
        self._conns[shard] = conn
        return conn

    def _discard(self, shard: str) -> None:
        conn = self._conns.pop(shard, None)
        if conn is not None:
            conn.close()

    def _give_up(self, key: Key, trace: Trace, error: Exception) -> NoReturn:
        raise DeadlineExceeded(
            f"key {key}: no transaction was committed within {self._deadline_s:g} s; "
            f"last tried on shard {trace.shard or '(none)'} at epoch {trace.epoch or '(none)'}, "
            f"attempt {trace.attempts}: {_one_line(error)}",
            hint="`shardmove routes --at KEY` tells who owns it, `shardmove diagnose` what is stuck",
        ) from error


def _require_healthy(conn: Connection) -> None:
    """Refuses to send a COMMIT that would not commit what `work` did.

    PostgreSQL answers COMMIT in a failed transaction with success and the command tag ROLLBACK.
    """
    match conn.info.transaction_status:
        case TransactionStatus.INTRANS:
            return
        case TransactionStatus.INERROR:
            raise psycopg.errors.InFailedSqlTransaction("a statement of the transaction failed, and its error was lost")
        case TransactionStatus.IDLE:
            raise psycopg.ProgrammingError("the work given to ShardClient.transaction must not end the transaction")
        case _:
            raise psycopg.OperationalError("the connection was lost before COMMIT was sent")


def is_fenced(error: Exception) -> bool:
    """Whether a fence raised it, or a router that held a statement for too long."""
    return (
        isinstance(error, psycopg.Error)
        and error.sqlstate == _SERIALIZATION_FAILURE
        and (error.diag.message_primary or "").startswith(_FENCE_PREFIX)
    )


def _routes_of(keyspace: Keyspace, rows: list[tuple[Any, ...]]) -> Routes:
    return Routes.of(
        keyspace.name,
        [
            Route(keyspace.bound_type.range_of(lower, upper), shard, move_id=move_id, held=held)
            for _epoch, lower, upper, shard, move_id, held, *_ in rows
        ],
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
