"""Nothing of a client's session reaches the next client of its connection, and nothing of it is lost without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from router import pool as pools
from router.opening import NoServer
from router.pool import Pool
from router.server import Server
from router.statements import Plans, Tables
from router.units import Change, surviving
from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support.engine import until
from tests.support.rawclient import RawClient, codes, values
from tests.support.routed import Routed, standing
from tests.support.router import Router
from tests.test_router_protocol import HERE, P, Q, S, bound, connect

READ_ITEMS = f"SELECT count(*) FROM items WHERE tenant_id = {HERE}"


@pytest.fixture(scope="module")
def shared(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Routed, Router, Router]]:
    """A router with one connection for all clients, and one that keeps a connection for each."""
    with standing(servers, tmp_path_factory.mktemp("leaks")) as routed:
        routed.execute("s1", "DROP ROLE IF EXISTS leaks_limited")
        routed.execute("s1", "CREATE ROLE leaks_limited LOGIN")
        routed.execute(
            "s1",
            "CREATE FUNCTION leave() RETURNS int LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM set_config('search_path', 'leak', false); RETURN 1; END $$",
        )
        routed.execute("s1", f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 1)")
        one = routed.router(pooling="transaction", servers_max=1)
        kept = routed.router(pooling="session")
        yield routed, one, kept
        routed.execute("s1", "DROP ROLE leaks_limited")


@pytest.fixture
def two(shared: tuple[Routed, Router, Router]) -> Iterator[tuple[RawClient, RawClient]]:
    """Clients that share one connection."""
    routed, router, _ = shared
    with connect(routed, router) as one, connect(routed, router) as other:
        yield one, other


@pytest.mark.parametrize(
    "script",
    [
        ["BEGIN; SET search_path = leak; COMMIT; SELECT 1/0"],
        ["BEGIN; SET search_path = leak; COMMIT; BEGIN; SELECT 1; ROLLBACK"],
        ["SET search_path = leak; COMMIT; SELECT 1/0"],
        ["SELECT set_config('search_path', 'lea' || 'k', false)"],
        ["SELECT set_config('search_path', NULL, false)", "SELECT 1, set_config('search_path', 'leak', false)"],
        ["WITH x AS (SELECT set_config('search_path', 'leak', false)) SELECT * FROM x"],
        ["DO $$ BEGIN PERFORM set_config('search_path', 'leak', false); END $$"],
        ["SELECT leave()"],
        [f"SELECT leave() FROM items WHERE tenant_id = {HERE}"],
        ["EXPLAIN ANALYZE SELECT leave()"],
        ["BEGIN", READ_ITEMS, "SET search_path = leak", "COMMIT AND CHAIN", "ROLLBACK"],
        ["BEGIN", READ_ITEMS, "SELECT 1/0", "ROLLBACK; SET search_path = leak"],
    ],
    ids=lambda script: script[-1][:30],
)
def test_settings_that_no_book_was_kept_of(two: tuple[RawClient, RawClient], script: list[str]) -> None:
    one, other = two
    for text in script:
        one.ask(Q(text))
    assert values(other.ask(Q("SHOW search_path"))) == ['"$user", public']


def test_a_pipeline_that_fails_behind_its_commit(two: tuple[RawClient, RawClient]) -> None:
    one, other = two
    texts = ("BEGIN", "SET search_path = leak", "COMMIT", "SELECT 1/0")
    assert codes(one.ask(*(P(b"", text) + bound(b"") for text in texts), S)) == ["22012"]
    assert values(other.ask(Q("SHOW search_path"))) == ['"$user", public']
    assert values(one.ask(Q("SHOW search_path"))) == ["leak"]


def test_what_a_script_rolled_back_is_not_set_again(two: tuple[RawClient, RawClient]) -> None:
    one, other = two
    one.ask(Q("BEGIN; SET search_path = believed; ROLLBACK; SELECT 1"))
    other.ask(Q("SELECT 1"))
    assert values(one.ask(Q("SHOW search_path"))) == ['"$user", public']


def test_reset_all_leaves_the_role_to_its_client_alone(two: tuple[RawClient, RawClient]) -> None:
    one, other = two
    one.ask(Q("SET ROLE leaks_limited"))
    one.ask(Q("RESET ALL"))
    assert values(other.ask(Q("SELECT current_user"))) == ["postgres"]
    assert values(one.ask(Q("SELECT current_user"))) == ["leaks_limited"]
    one.ask(Q("DISCARD ALL"))
    assert values(one.ask(Q("SELECT current_user"))) == ["postgres"]


@pytest.mark.parametrize(
    ("settings", "look", "told"),
    [
        (["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"], "SHOW default_transaction_read_only", "off"),
        (["SET log_min_duration_statement = 12345", "SET ROLE leaks_limited"], "SHOW log_min_duration_statement", "-1"),
        (["SET ROLE leaks_limited", "SET SESSION AUTHORIZATION leaks_limited"], "SELECT session_user", "postgres"),
    ],
    ids=["characteristics", "role", "authorization"],
)
def test_nobody_spoils_a_connection_for_others(
    two: tuple[RawClient, RawClient], settings: list[str], look: str, told: str
) -> None:
    one, other = two
    for text in settings:
        assert codes(one.ask(Q(text))) == []
    for _ in range(2):
        assert values(other.ask(Q(look))) == [told]
        assert values(one.ask(Q(look))) != [told]


def test_a_connection_that_cannot_be_brought_back_is_replaced(shared: tuple[Routed, Router, Router]) -> None:
    routed, router, _ = shared
    routed.execute("s1", "GRANT SET ON PARAMETER log_min_duration_statement TO leaks_limited")
    with (
        connect(routed, router, user="leaks_limited") as one,
        connect(routed, router, user="leaks_limited") as other,
    ):
        assert codes(one.ask(Q("SET log_min_duration_statement = 12345"))) == []
        [before] = values(one.ask(Q("SELECT pg_backend_pid()::text")))
        routed.execute("s1", "REVOKE SET ON PARAMETER log_min_duration_statement FROM leaks_limited")
        assert values(other.ask(Q("SHOW log_min_duration_statement"))) == ["-1"]
        assert values(other.ask(Q("SELECT pg_backend_pid()::text"))) != [before]
        for _ in range(2):  # that is its own affair
            assert codes(one.ask(Q("SELECT 1"))) == ["42501"]
            assert codes(other.ask(Q("SELECT 1"))) == []


def test_a_temporary_table_by_its_schema_goes_home_and_stays_with_its_client(
    shared: tuple[Routed, Router, Router],
) -> None:
    routed, router, _ = shared
    with connect(routed, router) as one:
        assert codes(one.ask(Q("CREATE TABLE pg_temp.mine (a int)"))) == []
        assert values(one.ask(Q("SELECT count(*)::text FROM mine"))) == ["0"]
    with connect(routed, router) as other:
        assert codes(other.ask(Q("SELECT count(*)::text FROM mine"))) == ["42P01"]


def test_a_temporary_table_of_unseen_code_is_gone(two: tuple[RawClient, RawClient]) -> None:
    one, other = two
    one.ask(Q("DO $$ BEGIN EXECUTE 'CREATE TE' || 'MP TABLE unseen (a int)'; END $$"))
    assert codes(other.ask(Q("SELECT count(*) FROM unseen"))) == ["42P01"]


def test_statements_on_a_shared_connection_are_closed_when_they_are_too_many(two: tuple[RawClient, RawClient]) -> None:
    one, other = two
    for first in range(0, 1200, 50):
        one.ask(
            *(
                P(b"n", f"SELECT 'many {number}'") + bound(b"n") + wire.close(b"S", b"n")
                for number in range(first, first + 50)
            ),
            S,
        )
    [count] = values(one.ask(Q("SELECT count(*)::text FROM pg_prepared_statements")))
    assert 300 < int(count) <= 500
    other.ask(P(b"again", "SELECT 'many 3'"), S)
    assert values(other.ask(bound(b"again"), S)) == ["many 3"]


@pytest.mark.parametrize(
    "keep", ["SELECT pg_advisory_lock(471100)", "LISTEN leaks", "CREATE TEMP TABLE mine (a int)", "DO $$ BEGIN END $$"]
)
def test_a_lost_connection_that_held_something_ends_its_client(
    shared: tuple[Routed, Router, Router], keep: str
) -> None:
    routed, _, router = shared
    with connect(routed, router) as one, connect(routed, router) as other:
        assert codes(one.ask(Q(keep))) == []
        for client in (one, other):
            [pid] = values(client.ask(Q("SELECT pg_backend_pid()::text")))
            routed.execute("s1", f"SELECT pg_terminate_backend({pid}, 5000)")
            until(lambda pid=pid: pid not in [row["pid"] for row in router.show("SERVERS")], "it is not missed")
        told = one.until(b"")
        assert [kind for kind, *_ in told] == [b"E"]
        assert b"57P01" in told[0][2]
        assert values(other.ask(Q("SELECT 'goes on'"))) == ["goes on"]


@pytest.mark.parametrize(
    "create",
    [
        "CREATE TEMP TABLE mine (a int)",
        "CREATE /* the */ LOCAL -- one\n TEMPORARY TABLE mine (a int)",
        "SELECT 1 AS a INTO TEMP mine",
        "CREATE TABLE pg_temp.mine (a int)",
        "CREATE OR REPLACE TEMP VIEW mine AS SELECT 1 AS a",
    ],
)
def test_a_temporary_table_is_there_in_the_next_transaction(two: tuple[RawClient, RawClient], create: str) -> None:
    one, other = two
    assert codes(other.ask(Q("SELECT 1 AS temp"))) == []  # a name: the only connection is free for the next client
    assert codes(one.ask(Q(create))) == []
    assert codes(one.ask(Q("SELECT count(*) FROM mine"))) == []


def test_functions_that_leave_nothing_cost_nothing() -> None:
    plans = Plans(Tables({}))
    free = "SELECT now(), nextval('s'), pg_sleep(0), format_type(1, 2), lower('a')"
    assert not plans.of(free.encode()).plan.is_opaque
    for text in ("SELECT mine()", "DO $$ $$", "CALL mine()", "SELECT set_config(a, b, false) FROM t", "LOAD 'x'"):
        assert plans.of(text.encode()).plan.is_opaque, text


def test_what_is_left_of_several_transactions() -> None:
    one, two, pin = Change("set", "one"), Change("set", "two"), Change("pin")
    assert surviving([one, Change("rollback"), two, Change("commit")]) == [two]
    assert surviving([one, Change("commit"), two, Change("rollback")]) == [one]
    assert surviving([one, pin, Change("rollback")]) == [pin]
    assert surviving([Change("savepoint", "s"), one, pin, Change("rollback to", "s"), two])[1:] == [pin, two]


@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_those_in_line_hear_of_an_opening_that_comes_to_nothing(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def work() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        openings = 0

        async def open_server(*_args: object, **_more: object) -> Server:
            nonlocal openings
            openings += 1
            if openings > 1:
                return Server("s1", "u")
            begun.set()
            await go_on.wait()
            raise NoServer("no")

        monkeypatch.setattr(pools, "open_server", open_server)
        pool = Pool("s1", "u", lambda: None, servers_max=1, queue_timeout_s=20, connect_timeout_s=20)  # type: ignore[arg-type, return-value]
        first = asyncio.create_task(pool.acquire())
        await begun.wait()
        line = [asyncio.create_task(pool.acquire()) for _ in range(2)]
        while pool.waiting < len(line):
            await asyncio.sleep(0)
        if how == "fails":
            go_on.set()
            for each in (first, *line):
                with pytest.raises(NoServer, match="no"):
                    await each
            return
        first.cancel()
        async with asyncio.timeout(60):
            pool.give_back(await line[0])
            assert await line[1]
        assert openings == 2

    asyncio.run(work())


@pytest.mark.parametrize("pooling", ["transaction", "session"])
def test_a_connection_that_the_client_keeps_stays_its_own_when_a_fence_refuses(routed: Routed, pooling: str) -> None:
    """It is tried again on the same connection, and nobody else is given that meanwhile, nor cleans it."""
    routed.execute(
        "s1",
        "CREATE SEQUENCE tries; CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('tries') < 4 THEN RAISE 'shardmove: the range is closed' USING ERRCODE = '40001'; END IF;"
        " RETURN new; END $$; CREATE TRIGGER refuse BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    router = routed.router(pooling=pooling, hold_timeout_s=60.0)
    with connect(routed, router) as client, connect(routed, router) as other:
        assert codes(client.ask(Q("SELECT pg_advisory_lock(7)"))) == []
        pid = values(client.ask(Q("SELECT pg_backend_pid()")))
        assert codes(client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 1)"))) == []
        assert routed.execute("s1", "SELECT last_value FROM tries") == [(4,)]
        assert values(other.ask(Q("SELECT pg_backend_pid()"))) != pid
        assert values(client.ask(Q("SELECT pg_backend_pid()"))) == pid
        assert values(client.ask(Q("SELECT pg_advisory_unlock(7)"))) == ["t"]
