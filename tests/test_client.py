"""The small client against real servers, a hand-made catalog view and a hand-made fence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel

from router.client import DeadlineExceeded, OutcomeUnknown, ShardClient
from shardmove.domain.errors import ConfigurationError, ShardmoveError
from shardmove.postgres.embedded import Cluster
from tests.support.servers import Databases

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Connection = psycopg.Connection[Any]
BOUND_S = 120.0

CATALOG = """
    CREATE SCHEMA shardmove_catalog;
    CREATE TABLE shardmove_catalog.routes
        (epoch bigint, keyspace text, lower text, upper text, shard text, move_id text, held boolean);
    CREATE VIEW shardmove_catalog.current_routes AS SELECT * FROM shardmove_catalog.routes;
"""
SHARD = """
    CREATE TABLE kv (k bigint PRIMARY KEY, v bigint NOT NULL);
    CREATE TABLE fence (is_closed boolean NOT NULL);
    INSERT INTO fence VALUES (false);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT is_closed FROM fence) THEN
            RAISE EXCEPTION 'shardmove: the range is not here' USING ERRCODE = '40001';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER fence AFTER INSERT OR UPDATE OR DELETE ON kv FOR EACH ROW EXECUTE FUNCTION refuse();
"""


class World:
    """Two shards and a catalog, whose routes and fences the test moves by hand."""

    def __init__(self, dsns: dict[str, str]) -> None:
        self.dsns = dsns
        self.epoch = 0
        self._catalog = _connect(dsns["cat"])
        self._catalog.execute(CATALOG)
        for shard in ("s1", "s2"):
            with _connect(dsns[shard]) as conn:
                conn.execute(SHARD)

    def close(self) -> None:
        self._catalog.close()

    def reconnect(self) -> None:
        self.close()
        self._catalog = _connect(self.dsns["cat"])

    def publish(self, shard: str, *, held: bool = False, announce: bool = True) -> None:
        """All keys from 0 on belong to the shard; the negative ones to s1, always."""
        self.epoch += 1
        with self._catalog.transaction():
            self._catalog.execute("DELETE FROM shardmove_catalog.routes")
            for lower, upper, owner, is_held in ((None, "0", "s1", False), ("0", None, shard, held)):
                self._catalog.execute(
                    "INSERT INTO shardmove_catalog.routes VALUES (%s, 'shop', %s, %s, %s, NULL, %s)",
                    (self.epoch, lower, upper, owner, is_held),
                )
            if announce:
                self._catalog.execute("SELECT pg_notify('shardmove_routes', %s)", (str(self.epoch),))

    def fence(self, shard: str, *, closed: bool) -> None:
        with _connect(self.dsns[shard]) as conn:
            conn.execute("UPDATE fence SET is_closed = %s", (closed,))

    def client(self, **options: Any) -> ShardClient:
        shards = {shard: self.dsns[shard] for shard in ("s1", "s2")}
        return ShardClient(self.dsns["cat"], shards, keyspace="shop", **{"deadline_s": BOUND_S, **options})

    def value(self, shard: str, key: int) -> int | None:
        with _connect(self.dsns[shard]) as conn:
            row = conn.execute("SELECT v FROM kv WHERE k = %s", (key,)).fetchone()
            return None if row is None else int(row[0])


@pytest.fixture
def world(databases: Databases) -> Iterator[World]:
    world = World(databases("s1", "s2", "cat"))
    world.publish("s1")
    world.fence("s2", closed=True)
    yield world
    world.close()


@pytest.fixture
def client(world: World) -> Iterator[ShardClient]:
    client = world.client()
    yield client
    client.close()


def _connect(dsn: str) -> Connection:
    return psycopg.connect(dsn, autocommit=True)


def put(key: int, value: int) -> Callable[[Connection], None]:
    def work(conn: Connection) -> None:
        conn.execute("INSERT INTO kv VALUES (%s, %s) ON CONFLICT (k) DO UPDATE SET v = excluded.v", (key, value))

    return work


def later(delay_s: float, *steps: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        time.sleep(delay_s)
        for step in steps:
            step()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_write_goes_to_the_owner_and_returns_what_the_work_returned(world: World, client: ShardClient) -> None:
    assert client.transaction(7, lambda conn: (put(7, 1)(conn), "done")[1]) == "done"
    assert world.value("s1", 7) == 1
    assert client.shard_of(7) == client.shard_of(-1) == "s1"
    assert client.last.attempts == 1
    assert client.last.disturbed_at is None


@pytest.mark.parametrize("isolation", list(IsolationLevel))
def test_the_transaction_runs_at_the_level_that_was_asked_for(client: ShardClient, isolation: IsolationLevel) -> None:
    def level(conn: Connection) -> str:
        row = conn.execute("SHOW transaction_isolation").fetchone()
        assert row is not None
        return str(row[0])

    assert client.transaction(1, level, isolation=isolation) == isolation.name.lower().replace("_", " ")


@pytest.mark.parametrize("announce", [True, False], ids=["announced", "announcement missed"])
def test_a_refused_write_follows_the_flip(world: World, client: ShardClient, announce: bool) -> None:
    client.transaction(7, put(7, 1))
    world.fence("s1", closed=True)
    world.fence("s2", closed=False)
    with after_the_first(client, put(7, 2), 0.1, lambda: world.publish("s2", announce=announce)) as work:
        client.transaction(7, work)
    assert client.last.shard == "s2"
    assert client.last.disturbed_at is not None
    assert (world.value("s1", 7), world.value("s2", 7)) == (1, 2)


@contextmanager
def after_the_first(
    client: ShardClient, work: Callable[[Connection], None], delay_s: float, *steps: Callable[[], object]
) -> Iterator[Callable[[Connection], None]]:
    """The work, whose first attempt is refused: the steps begin behind it."""
    begun: list[threading.Thread] = []

    def refused_first(conn: Connection) -> None:
        try:
            work(conn)
        finally:
            if client.last.attempts == 1:
                begun.append(later(delay_s, *steps))

    yield refused_first
    for thread in begun:
        thread.join()


@pytest.fixture
def long_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but an announcement ends the waiting for a held key."""
    monkeypatch.setattr("router.client.HOLD_WAIT_S", BOUND_S)
    monkeypatch.setattr("router.client.HELD_CONFIRM_S", BOUND_S)


@pytest.mark.usefixtures("long_holds")
def test_a_held_key_waits_for_the_release_and_is_not_tried_before(world: World, client: ShardClient) -> None:
    client.transaction(7, put(7, 1))
    world.fence("s1", closed=True)
    world.fence("s2", closed=False)
    world.publish("s1", held=True)
    while not client._routes.at(7).held:  # an announcement takes its time: commit does not wait for its delivery
        time.sleep(0.001)
    release = later(0.2, lambda: world.publish("s2"))
    client.transaction(7, put(7, 2))
    waited_s = time.monotonic() - client.last.started
    release.join()
    assert (client.last.attempts, client.last.shard) == (1, "s2")
    assert waited_s < BOUND_S, "woken by the announcement, not by the end of its patience"


def test_a_held_key_holds_up_no_other_key(world: World, client: ShardClient) -> None:
    world.publish("s1", held=True)
    client.transaction(-7, put(-7, 1))
    assert client.last.disturbed_at is None


def test_a_forgotten_hold_is_tried_anyway(world: World, client: ShardClient) -> None:
    world.publish("s1", held=True)
    client.transaction(7, put(7, 1))
    assert time.monotonic() - client.last.started >= 1.0
    assert world.value("s1", 7) == 1


@pytest.mark.usefixtures("long_holds")
def test_the_new_owner_may_open_its_fence_a_little_after_the_flip(world: World, client: ShardClient) -> None:
    world.publish("s2")
    with after_the_first(client, put(7, 1), 0.05, lambda: world.fence("s2", closed=False)) as work:
        client.transaction(7, work)
    assert client.last.attempts > 1
    assert time.monotonic() - client.last.started < BOUND_S, "it does not wait as for a held key"
    assert world.value("s2", 7) == 1


def test_an_abandoned_attempt_leaves_the_write_with_the_old_owner(world: World, client: ShardClient) -> None:
    client.transaction(7, put(7, 1))
    world.fence("s1", closed=True)
    world.publish("s1", held=True)
    abandon = later(0.1, lambda: world.publish("s1"), lambda: world.fence("s1", closed=False))
    client.transaction(7, put(7, 2))
    abandon.join()
    assert world.value("s1", 7) == 2


def test_the_deadline_error_names_key_shard_epoch_and_the_last_error(world: World) -> None:
    client = world.client(deadline_s=0.3)
    client.transaction(-7, lambda _: None)  # it is connected, so that nothing but the fence is in the way
    world.fence("s1", closed=True)
    with pytest.raises(DeadlineExceeded, match=r"key 7: .* s1 at epoch 1, .*shardmove: the range is not here"):
        client.transaction(7, put(7, 1))
    client.close()
    assert world.value("s1", 7) is None


def test_nothing_of_a_refused_attempt_remains(world: World, client: ShardClient) -> None:
    """The fence refuses the second statement; the first must not have happened, on either shard."""
    world.fence("s2", closed=False)

    def work(conn: Connection) -> None:
        conn.execute("CREATE TABLE trail (a int)")
        if client.last.attempts == 1:
            world.fence("s1", closed=True)
            world.publish("s2")
        put(7, 1)(conn)

    client.transaction(7, work)
    with _connect(world.dsns["s1"]) as conn:
        assert conn.execute("SELECT to_regclass('trail')").fetchone() == (None,)
    assert world.value("s2", 7) == 1


def test_serialization_failures_are_run_again(world: World, client: ShardClient) -> None:
    client.transaction(7, put(7, 1))

    def add_one(conn: Connection) -> None:
        row = conn.execute("SELECT v FROM kv WHERE k = 7").fetchone()
        assert row is not None
        if client.last.attempts == 1:
            with _connect(world.dsns["s1"]) as rival:
                put(7, 10)(rival)
        conn.execute("UPDATE kv SET v = %s WHERE k = 7", (row[0] + 1,))

    client.transaction(7, add_one, isolation=IsolationLevel.REPEATABLE_READ)
    assert client.last.attempts == 2
    assert client.last.disturbed_at is None
    assert world.value("s1", 7) == 11


def test_other_errors_roll_back_and_are_passed_on(world: World, client: ShardClient) -> None:
    def duplicate(conn: Connection) -> None:
        put(7, 1)(conn)
        conn.execute("INSERT INTO kv VALUES (7, 2)")

    with pytest.raises(psycopg.errors.UniqueViolation):
        client.transaction(7, duplicate)
    with pytest.raises(ZeroDivisionError):
        client.transaction(7, lambda conn: (put(7, 1)(conn), 1 // 0))
    assert client.last.attempts == 1
    assert world.value("s1", 7) is None
    client.transaction(7, put(7, 3))


def test_work_that_swallowed_an_error_is_not_reported_as_committed(world: World, client: ShardClient) -> None:
    def careless(conn: Connection) -> None:
        put(7, 1)(conn)
        with suppress(psycopg.errors.DivisionByZero):
            conn.execute("SELECT 1 / 0")

    with pytest.raises(psycopg.errors.InFailedSqlTransaction):
        client.transaction(7, careless)
    assert world.value("s1", 7) is None


def test_work_that_ends_the_transaction_itself_is_an_error(client: ShardClient) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="must not end the transaction"):
        client.transaction(7, lambda conn: conn.commit())


def test_a_nested_transaction_is_a_savepoint(world: World, client: ShardClient) -> None:
    def work(conn: Connection) -> None:
        with conn.transaction() as savepoint:
            put(7, 1)(conn)
            raise psycopg.Rollback(savepoint)
        with conn.transaction():
            put(8, 1)(conn)

    client.transaction(7, work)
    assert (world.value("s1", 7), world.value("s1", 8)) == (None, 1)


def test_a_connection_lost_before_commit_is_replaced(world: World, client: ShardClient) -> None:
    def work(conn: Connection) -> None:
        put(7, client.last.attempts)(conn)
        if client.last.attempts == 1:
            _terminate(world.dsns["s1"], conn.info.backend_pid)
            conn.execute("SELECT 1")

    client.transaction(7, work)
    assert client.last.attempts == 2
    assert world.value("s1", 7) == 2


def test_a_connection_lost_inside_a_savepoint_is_replaced(world: World, client: ShardClient) -> None:
    """psycopg lets a Rollback escape when it cannot send ROLLBACK TO: not the application's own exception."""

    def work(conn: Connection) -> None:
        with conn.transaction() as savepoint:
            if client.last.attempts == 1:
                _terminate(world.dsns["s1"], conn.info.backend_pid)
            raise psycopg.Rollback(savepoint)
        put(7, client.last.attempts)(conn)

    client.transaction(7, work)
    assert world.value("s1", 7) == 2


def test_a_connection_lost_while_idle_is_replaced(world: World, client: ShardClient) -> None:
    pid = client.transaction(7, lambda conn: conn.info.backend_pid)
    _terminate(world.dsns["s1"], pid)
    client.transaction(7, put(7, 1))
    assert world.value("s1", 7) == 1


def test_a_connection_lost_during_commit_leaves_the_outcome_unknown(world: World, client: ShardClient) -> None:
    """The deferred trigger makes COMMIT wait for a lock that the test holds; then its backend is ended."""
    runs = []

    def work(conn: Connection) -> None:
        runs.append(conn.info.backend_pid)
        put(7, 1)(conn)

    with _connect(world.dsns["s1"]) as holder:
        holder.execute("SELECT pg_advisory_lock(1)")
        holder.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;"
            "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON kv DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        ending = later(0, lambda: _terminate_when_waiting(world.dsns["s1"], runs))
        with pytest.raises(OutcomeUnknown, match="shard s1"):
            client.transaction(7, work)
        ending.join()
    assert len(runs) == 1, "never run again silently"
    client.transaction(8, lambda conn: conn.execute("SELECT 1"))


def test_an_error_of_commit_itself_is_a_clear_no(world: World, client: ShardClient) -> None:
    with _connect(world.dsns["s1"]) as conn:
        conn.execute("CREATE TABLE child (k bigint REFERENCES kv DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        client.transaction(7, lambda conn: conn.execute("INSERT INTO child VALUES (99)"))


@pytest.mark.fault
def test_a_dead_shard_is_waited_for(world: World, client: ShardClient, servers: Cluster) -> None:
    client.transaction(7, put(7, 1))
    servers["s1"].stop("immediate")
    start = later(0.3, servers["s1"].start)
    client.transaction(7, put(7, 2))
    start.join()
    assert world.value("s1", 7) == 2


@pytest.mark.fault
def test_a_dead_shard_ends_with_the_deadline(world: World, servers: Cluster) -> None:
    client = world.client(deadline_s=0.5)
    client.transaction(7, put(7, 1))
    servers["s1"].stop("immediate")
    with pytest.raises(DeadlineExceeded, match="key 7"):
        client.transaction(7, put(7, 2))
    servers["s1"].start()
    client.close()


@pytest.mark.fault
def test_a_dead_catalog_does_not_matter_while_the_cached_route_is_right(
    world: World, client: ShardClient, servers: Cluster
) -> None:
    client.transaction(7, put(7, 1))
    servers["cat"].stop("immediate")
    started = time.monotonic()
    for value in range(50):
        client.transaction(7, put(7, value))
    assert time.monotonic() - started < 40.0, "each of them has waited for the catalog"
    servers["cat"].start()


@pytest.mark.fault
def test_routes_that_changed_while_the_catalog_was_away_are_found(world: World, servers: Cluster) -> None:
    client = world.client()
    client.transaction(7, put(7, 1))
    servers["cat"].restart("immediate")
    world.reconnect()
    world.fence("s1", closed=True)
    world.fence("s2", closed=False)
    world.publish("s2", announce=False)
    client.transaction(7, put(7, 2))
    client.close()
    assert world.value("s2", 7) == 2


def test_without_catalog_and_cache_there_is_only_the_deadline(world: World) -> None:
    client = ShardClient("host=/nonexistent", {}, keyspace="shop", deadline_s=0.2)
    with pytest.raises(DeadlineExceeded, match="the catalog does not answer"):
        client.transaction(7, put(7, 1))


def test_an_unknown_keyspace_and_an_unknown_shard_are_named(world: World) -> None:
    toys = ShardClient(world.dsns["cat"], {}, keyspace="toys")
    with closing(toys), pytest.raises(ConfigurationError, match="no routes for the keyspace toys"):
        toys.shard_of(7)
    half = ShardClient(world.dsns["cat"], {"s2": world.dsns["s2"]}, keyspace="shop")
    with closing(half), pytest.raises(ConfigurationError, match="names the shard s1"):
        half.transaction(7, put(7, 1))


def test_an_older_epoch_is_not_believed(world: World, client: ShardClient) -> None:
    """A catalog that was restored from a backup must not lead back to an old owner."""
    world.publish("s2")
    assert client.shard_of(7) == "s2"
    world.epoch = 0
    world.publish("s1")
    assert client.shard_of(7) == "s2"


@pytest.mark.parametrize("kind", [OutcomeUnknown, DeadlineExceeded])
def test_errors_survive_a_process_border(kind: type[ShardmoveError]) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(kind("what", hint="do")))
    assert (type(error), error.message, error.hint) == (kind, "what", "do")


def _terminate(dsn: str, pid: int) -> None:
    with _connect(dsn) as conn:
        conn.execute("SELECT pg_terminate_backend(%s, %s)", (pid, int(BOUND_S * 1000)))


def _terminate_when_waiting(dsn: str, pids: list[int]) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query = 'COMMIT' AND wait_event = 'advisory'"
    with _connect(dsn) as conn:
        while not pids or conn.execute(query, (pids[0],)).fetchone() != (1,):
            time.sleep(0.005)
    _terminate(dsn, pids[0])
