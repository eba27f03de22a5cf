"""Statements for every shard: DDL, and writes to reference tables, which end alike everywhere whoever dies when."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import asyncpg
import psycopg
import pytest

from router import everywhere
from router.server import Server
from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.inside import inside
from tests.support.orders import await_taken, order
from tests.support.rawclient import RawClient, codes
from tests.support.replacing import replaced
from tests.support.routed import Routed
from tests.support.router import Router, Routers
from tests.support.servers import Databases, connect
from tests.support.world import in_background

BOUND_S: Final = 120.0
await_true = partial(engine.until, timeout_s=BOUND_S)
SHARDS: Final = ("s1", "s2")
COUNTRIES: Final = "CREATE TABLE countries (code text PRIMARY KEY, name text NOT NULL, people integer)"


class WithReference(Routed):
    """A table beside the split one that both shards hold whole."""

    def __init__(self, databases: Databases, directory: Path, routers: Routers) -> None:
        super().__init__(databases, directory, routers)
        for shard in SHARDS:
            self.execute(shard, COUNTRIES)

    def _document(self) -> str:
        return (
            super()
            ._document()
            .replace(
                "[keyspaces.shop.tables]", '[keyspaces.shop]\nreference_tables = ["countries"]\n[keyspaces.shop.tables]'
            )
        )

    def countries(self) -> dict[str, list[tuple[Any, ...]]]:
        return {shard: self.execute(shard, "SELECT * FROM countries ORDER BY code") for shard in SHARDS}

    def prepared(self) -> list[str]:
        return [
            f"{shard}: {row[0]}"
            for shard in SHARDS
            for row in self.execute(
                shard, "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY 1"
            )
        ]

    def await_nothing_prepared(self) -> None:
        await_true(lambda: not self.prepared(), lambda: f"left prepared: {self.prepared()}")


@pytest.fixture
def both(databases: Databases, tmp_path: Path, routers: Routers) -> WithReference:
    return WithReference(databases, tmp_path, routers)


def columns(routed: Routed, table: str) -> list[list[tuple[Any, ...]]]:
    statement = f"SELECT attname FROM pg_attribute WHERE attrelid = to_regclass('{table}') AND attnum > 0 ORDER BY 1"
    return [routed.execute(shard, statement) for shard in SHARDS]


def test_a_cancel_between_two_shards_is_heard_at_the_next(both: WithReference, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = everywhere.Work.ask

    async def cancelled_before(work: everywhere.Work, server: Server) -> everywhere.Answer:
        if server.shard == "s2":
            work.session.cancel()
            await asyncio.sleep(0.1)  # the task has been told
        return await ask(work, server)

    monkeypatch.setattr(everywhere.Work, "ask", cancelled_before)
    with (
        connect(both.dsns["s2"], application_name="test") as locker,
        inside(both.config_file) as it,
        RawClient(it.port, dbname=both.dbname, bound_s=BOUND_S) as client,
    ):
        locker.execute("BEGIN")
        locker.execute("LOCK TABLE public.countries")
        assert codes(client.ask(wire.query("INSERT INTO countries VALUES ('de', 'Germany', 80)"))) == ["57014"]
        locker.execute("ROLLBACK")
    assert both.countries() == {"s1": [], "s2": []}
    both.await_nothing_prepared()


# --- DDL


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_ddl_runs_on_every_shard(both: WithReference, pooling: str) -> None:
    with psycopg.connect(both.router(pooling=pooling).dsn(), autocommit=True) as client:
        simple = psycopg.ClientCursor(client)
        simple.execute("CREATE TABLE more (a int, b int)")
        assert simple.statusmessage == "CREATE TABLE"
        assert columns(both, "more") == [[("a",), ("b",)]] * 2
        cursor = client.execute("ALTER TABLE more ADD COLUMN c int")
        assert cursor.statusmessage == "ALTER TABLE"
        assert columns(both, "more") == [[("a",), ("b",), ("c",)]] * 2
        simple.execute("CREATE TABLE one (a int); CREATE INDEX ON one (a)")
        assert columns(both, "one_a_idx") == [[("a",)]] * 2
        client.execute("CREATE INDEX CONCURRENTLY by_amount ON items (amount)")
        assert columns(both, "by_amount") == [[("amount",)]] * 2
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_ddl_that_fails_on_a_later_shard_says_where_it_is_done(both: WithReference) -> None:
    both.execute("s2", "CREATE TABLE more (z int)")
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        for cursor, table in ((psycopg.ClientCursor(client), "more"), (client.cursor(), "more")):
            both.execute("s1", f"DROP TABLE IF EXISTS {table}")
            with pytest.raises(psycopg.errors.DuplicateTable, match="done on s1, not on s2") as caught:
                cursor.execute("CREATE TABLE more (a int)")
            assert "make the shards equal" in str(caught.value.diag.message_hint)
        with pytest.raises(psycopg.errors.DuplicateTable, match=r"^relation"):  # on the first one: nothing is done
            client.execute("CREATE TABLE items (a int)")
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_in_a_transaction_block_both_are_refused(both: WithReference) -> None:
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        for statement in ("CREATE TABLE more (a int)", "INSERT INTO countries VALUES ('a', 'A', 1)"):
            with pytest.raises(psycopg.errors.FeatureNotSupported), client.transaction():
                client.execute(statement.encode())
            assert client.execute("SELECT 1").fetchone() == (1,)
    assert both.countries() == {"s1": [], "s2": []}


# --- writes to reference tables


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_a_write_of_a_reference_table_is_one_transaction_on_every_shard(both: WithReference, pooling: str) -> None:
    with psycopg.connect(both.router(pooling=pooling).dsn(), autocommit=True) as client:
        simple = psycopg.ClientCursor(client)
        insert = "INSERT INTO countries VALUES (%s, %s, %s), ('ch', 'Switzerland', 8) RETURNING code, people"
        assert client.execute(insert, ("at", "Austria", 9)).fetchall() == [("at", 9), ("ch", 8)]
        simple.execute(
            "INSERT INTO countries VALUES ('li', 'Liechtenstein', 0); DELETE FROM countries WHERE code = 'x'"
        )
        found = simple.execute("UPDATE countries SET people = people + 1 RETURNING code").fetchall()
        assert simple.statusmessage == "UPDATE 3"
        assert sorted(found) == [("at",), ("ch",), ("li",)]
        cursor = client.execute("DELETE FROM countries WHERE code = %s", ("ch",))
        assert cursor.statusmessage == "DELETE 1"
        assert client.execute("SELECT people FROM countries WHERE code = 'at'").fetchone() == (10,)
    assert both.countries() == {shard: [("at", "Austria", 10), ("li", "Liechtenstein", 1)] for shard in SHARDS}
    assert both.prepared() == []
    await_no_lock(both)


def test_asyncpg_which_asks_for_the_columns_first(both: WithReference) -> None:
    asyncio.run(by_asyncpg(both, both.router()))


async def by_asyncpg(both: WithReference, router: Router) -> None:
    client = await asyncpg.connect(host="127.0.0.1", port=router.port, user="postgres", database="shop", ssl=False)
    try:
        for code in ("at", "ch"):
            rows = await client.fetch("INSERT INTO countries VALUES ($1, 'X', $2) RETURNING people", code, 7)
            assert [tuple(row) for row in rows] == [(7,)]
        with pytest.raises(asyncpg.UniqueViolationError):
            await client.execute("INSERT INTO countries VALUES ($1, 'X', $2)", "at", 7)
        assert await client.execute("ALTER TABLE countries ADD COLUMN more int") == "ALTER TABLE"
        assert await client.fetchval("SELECT count(*) FROM countries WHERE more IS NULL") == 2
    finally:
        await client.close()
    assert both.countries() == {shard: [("at", "X", 7, None), ("ch", "X", 7, None)] for shard in SHARDS}


def locks(routed: Routed) -> int:
    statement = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return sum(routed.execute(shard, statement)[0][0] for shard in SHARDS)


def await_no_lock(routed: Routed) -> None:
    """Whoever looks for leftovers tries the locks, and has them for a moment."""
    await_true(lambda: locks(routed) == 0, "locks are left")


def test_what_one_shard_refuses_is_written_nowhere(both: WithReference) -> None:
    both.execute("s2", "INSERT INTO countries VALUES ('at', 'Austria', 9)")
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        for cursor in (client.cursor(), psycopg.ClientCursor(client)):
            with pytest.raises(psycopg.errors.UniqueViolation):
                cursor.execute("INSERT INTO countries VALUES ('at', 'Austria', 9)")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="different answers"):
                cursor.execute("UPDATE countries SET people = 10")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="different answers"):
                cursor.execute("DELETE FROM countries RETURNING name")
        assert client.execute("SELECT 1").fetchone() == (1,)
    assert both.countries() == {"s1": [], "s2": [("at", "Austria", 9)]}
    assert both.prepared() == []
    await_no_lock(both)


@pytest.mark.parametrize(
    "value", ["random()::text", "clock_timestamp()::text", "gen_random_uuid()::text", "('now'::date)::text",
              "current_date::text", "current_timestamp::text", "nextval('s')::text"],
)  # fmt: skip
def test_values_that_differ_from_shard_to_shard_are_refused(both: WithReference, value: str) -> None:
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            client.execute(f"INSERT INTO countries VALUES ('x', {value}, 1)".encode())
        assert client.execute("SELECT 1").fetchone() == (1,)
    assert both.countries() == {"s1": [], "s2": []}


@pytest.mark.parametrize("value", ["now", " now", "Today 10:00", "10:00 tomorrow", "yesterday"])
def test_parameters_that_differ_from_shard_to_shard_are_refused(both: WithReference, value: str) -> None:
    insert = "INSERT INTO countries VALUES ('x', (%s::text)::timestamptz::text, 1)"
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        for cursor in (client.cursor(), client.cursor(binary=True), psycopg.ClientCursor(client)):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="may differ"):
                cursor.execute(insert, (value,))
        assert both.countries() == {"s1": [], "s2": []}
        client.execute(insert, ("2026-01-01 00:00+00",))
        client.execute("INSERT INTO countries VALUES ('y', %s, 1)", ("it is now",))
    assert [len(found) for found in both.countries().values()] == [2, 2]


@pytest.mark.parametrize(
    "script",
    [
        "BEGIN; INSERT INTO countries VALUES ('x', 'X', 1)",
        "BEGIN; INSERT INTO countries VALUES ('x', 'X', 1); COMMIT",
        "BEGIN; CREATE TABLE more (a int)",
        "SELECT 1; INSERT INTO countries VALUES ('x', 'now'::timestamptz::text, 1)",
        "CREATE TABLE more (a int); INSERT INTO countries VALUES ('x', 'now'::timestamptz::text, 1)",
        "EXPLAIN ANALYZE INSERT INTO countries VALUES ('x', 'X', 1)",
        "PREPARE p AS INSERT INTO countries VALUES ('x', 'X', 1)",
    ],
)
def test_a_write_for_every_shard_within_something_else_is_refused_rather_than_lost(
    both: WithReference, script: str
) -> None:
    with psycopg.connect(both.router().dsn(), autocommit=True) as client:
        simple = psycopg.ClientCursor(client)
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            simple.execute(script.encode())
        assert client.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        simple.execute("SET shardmove.key = '150'")
        if script.startswith("EXPLAIN"):
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                simple.execute(script.encode())
    assert both.countries() == {"s1": [], "s2": []}
    assert columns(both, "more") == [[], []]


def test_servers_that_prepare_nothing_are_named(tmp_path: Path, routers: Routers) -> None:
    settings = {"fsync": "off", "max_prepared_transactions": "0"}
    with Cluster(("s1", "s2", "cat"), settings=settings) as cluster:
        both = WithReference(Databases(cluster), tmp_path, routers)
        router = both.router()
        with psycopg.connect(router.dsn(), autocommit=True) as client:
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="shard s1 allows none") as caught:
                client.execute("INSERT INTO countries VALUES ('x', 'X', 1)")
            assert "max_prepared_transactions" in str(caught.value.diag.message_hint)
            assert client.execute("SELECT 1").fetchone() == (1,)
        router.stop()  # before its servers


def test_writers_of_the_same_rows_wait_for_each_other_and_never_in_a_circle(both: WithReference) -> None:
    router = both.router()
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        client.execute("INSERT INTO countries SELECT 'c' || n, 'C', 0 FROM generate_series(1, 3) n")

    def write() -> None:
        with psycopg.connect(router.dsn(), autocommit=True) as client:
            for _ in range(20):
                client.execute("UPDATE countries SET people = people + 1")

    for join in [in_background(write) for _ in range(4)]:
        join()
    assert both.countries() == {shard: [(f"c{n}", "C", 80) for n in (1, 2, 3)] for shard in SHARDS}


def test_a_client_that_cancels_writes_nothing(both: WithReference) -> None:
    with (
        psycopg.connect(both.router().dsn(), autocommit=True) as client,
        psycopg.connect(both.dsns["s2"]) as blocker,
    ):
        blocker.execute("LOCK TABLE countries")
        join = in_background(lambda: client.execute("INSERT INTO countries VALUES ('x', 'X', 1)"))
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'countries'::regclass AND NOT granted"
        await_true(lambda: both.execute("s2", waiting) == [(1,)], "it does not begin")
        assert len(both.prepared()) == 1
        client.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            join()
        blocker.rollback()
        assert client.execute("SELECT 1").fetchone() == (1,)
    assert both.countries() == {"s1": [], "s2": []}
    assert both.prepared() == []


# --- deaths


POINTS: Final = {
    "two_phase.after_prepare": False,
    "two_phase.before_decision": False,
    "two_phase.after_decision": True,
    "two_phase.after_commit": True,
}
"""Whether the write is there after a death at the point."""


@pytest.mark.parametrize("by_another", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_all_shards_agree_after_a_router_died(both: WithReference, faults: Path, point: str, by_another: bool) -> None:
    router = both.router()
    if by_another:
        both.router()
    order(faults, point, "kill")
    with suppress(psycopg.OperationalError), psycopg.connect(router.dsn(), autocommit=True) as client:
        client.execute("INSERT INTO countries VALUES ('x', 'X', 1)")
    await_taken(faults, point)
    router.kill()
    if not by_another:
        router.start()
    both.await_nothing_prepared()
    assert both.countries() == {shard: [("x", "X", 1)] * POINTS[point] for shard in SHARDS}


def test_a_router_that_was_stopped_still_decides_what_it_prepared(both: WithReference, faults: Path) -> None:
    router = both.router()
    order(faults, "two_phase.before_decision", "pause")
    join = in_background(lambda: write_once(router))
    stopped = await_taken(faults, "two_phase.before_decision")
    try:
        other = both.router()  # which looks for leftovers as it starts, and finds the locks taken
        await_true(lambda: attempts(both) > 0, "nobody looks for leftovers")
        write_once(other, "y")
        assert len(both.prepared()) == len(SHARDS)
    finally:
        os.kill(stopped, signal.SIGCONT)
    join()
    both.await_nothing_prepared()
    assert both.countries() == {shard: [("x", "X", 1), ("y", "X", 1)] for shard in SHARDS}


def write_once(router: Router, code: str = "x") -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        client.execute("INSERT INTO countries VALUES (%s, 'X', 1)", (code,))


def attempts(routed: Routed) -> int:
    """Sessions of routers that found a leftover, and tried its lock last."""
    statement = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND query LIKE '%pg_try_advisory_lock%' AND pid <> pg_backend_pid()"
    )
    return int(routed.execute("s1", statement)[0][0])


@pytest.mark.parametrize("victims", [("s1",), ("s1", "s2")])
def test_a_stopped_router_that_lost_its_sessions_decides_nothing(
    both: WithReference, faults: Path, victims: tuple[str, ...]
) -> None:
    router = both.router()
    order(faults, "two_phase.before_decision", "pause")
    join = in_background(lambda: write_once(router))
    stopped = await_taken(faults, "two_phase.before_decision")
    try:
        for shard in victims:
            both.execute(
                shard,
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            )
        if len(victims) == len(SHARDS):  # nobody holds its locks any more
            both.router()
            both.await_nothing_prepared()
    finally:
        os.kill(stopped, signal.SIGCONT)
    with pytest.raises(psycopg.Error) as caught:
        join()
    assert caught.value.sqlstate in ("40001", "08007")
    both.await_nothing_prepared()
    assert both.countries() == {"s1": [], "s2": []}


WITHOUT_LOCKS: Final = """
    import contextlib
    from router import recovering
    recovering.Recovery._locked = lambda self, gid: contextlib.nullcontext(True)
"""


@pytest.mark.parametrize("has_locks", [True, False])
def test_without_the_locks_a_decision_and_a_rollback_cross(
    both: WithReference, faults: Path, tmp_path: Path, has_locks: bool
) -> None:
    router = both.router()
    order(faults, "two_phase.before_decision", "pause")
    join = in_background(lambda: write_once(router))
    writer = await_taken(faults, "two_phase.before_decision")
    order(faults, "recovering.after_one", "pause")
    with replaced(tmp_path, "" if has_locks else WITHOUT_LOCKS):
        both.router()
    recoverer = 0 if has_locks else await_taken(faults, "recovering.after_one")
    os.kill(writer, signal.SIGCONT)
    in_doubt: list[psycopg.Error] = []
    try:
        join()
    except psycopg.Error as error:
        in_doubt.append(error)
    if recoverer:
        os.kill(recoverer, signal.SIGCONT)
    both.await_nothing_prepared()
    found = both.countries()
    if has_locks:
        assert not in_doubt
        assert found == {shard: [("x", "X", 1)] for shard in SHARDS}
    else:
        is_damaged = bool(in_doubt) or found["s1"] != found["s2"]
        assert is_damaged, "the locks were taken away, and the story ended as well as with them"
