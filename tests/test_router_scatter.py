"""Reads of several shards: union, order, limit; both protocols; what they refuse; and moves beside them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import asyncpg
import psycopg
import pytest

from shardmove.coordinator import planner
from shardmove.domain import points
from shardmove.domain.moves import Direction, State
from shardmove.wire import messages
from tests.support.orders import await_taken, order
from tests.support.rawclient import RawClient, sqlstates
from tests.support.replacing import replaced
from tests.support.routed import SPLIT_AT, Routed
from tests.support.router import Router, Routers
from tests.support.world import BOUND_S, TENANTS, World, in_background
from tests.test_router_load import await_true, sampled

ROWS: Final = 60


@pytest.fixture
def filled(routed: Routed) -> Routed:
    """Items of tenants on both sides of the split, the same notes on both."""
    for shard, first in (("s1", 0), ("s2", SPLIT_AT)):
        routed.execute(
            shard,
            f"INSERT INTO items SELECT {first} + n % 7, n, CASE WHEN n % 5 > 0 THEN 'note ' || n % 9 END, n * 37 % 101"
            f" FROM generate_series(1, {ROWS}) n",
        )
    return routed


@pytest.fixture
def router(filled: Routed) -> Router:
    return filled.router()


def everything(routed: Routed, columns: str = "*") -> list[tuple[Any, ...]]:
    return [row for shard in ("s1", "s2") for row in routed.execute(shard, f"SELECT {columns} FROM items")]


def test_a_read_without_a_key_gives_the_rows_of_all_shards(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        simple = psycopg.ClientCursor(client).execute("SELECT * FROM items").fetchall()
        cursor = client.execute("SELECT * FROM items WHERE amount >= %s", (0,))
        extended = cursor.fetchall()
        assert cursor.statusmessage == f"SELECT {2 * ROWS}"
        binary = client.execute("SELECT * FROM items", binary=True).fetchall()
        assert client.execute("SELECT * FROM items WHERE amount < %s", (-1,)).fetchall() == []
        assert client.execute("SELECT id FROM items WHERE tenant_id = 3 AND id = 3").fetchall() == [(3,)]
    expected = Counter(everything(filled))
    assert Counter(simple) == Counter(extended) == Counter(binary) == expected


ORDERS: Final = (
    "amount, tenant_id, id",
    "amount DESC, id, tenant_id DESC",
    'note COLLATE "C", tenant_id, id',
    'note COLLATE "C" DESC NULLS LAST, tenant_id, id',
    'note COLLATE "C" NULLS FIRST, tenant_id DESC, id DESC',
)


def test_rows_come_in_the_order_that_one_server_would_give(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        cursors = (psycopg.ClientCursor(client), client.cursor(), client.cursor(binary=True))
        for order, limit in itertools.product(ORDERS, ("", " LIMIT 0", " LIMIT 1", " LIMIT 17", " LIMIT 1000")):
            statement = f"SELECT * FROM items ORDER BY {order}{limit}"
            expected = on_one_server(filled, statement)
            for cursor in cursors:
                assert cursor.execute(statement.encode()).fetchall() == expected, statement
                assert cursor.statusmessage == f"SELECT {len(expected)}"


def on_one_server(routed: Routed, statement: str) -> list[tuple[Any, ...]]:
    """The oracle: PostgreSQL itself, with all rows in one table."""
    rows = ", ".join(f"({t}, {i}, {'NULL' if n is None else repr(n)}, {a})" for t, i, n, a in everything(routed))
    table = f"(SELECT * FROM (VALUES {rows}) AS v (tenant_id, id, note, amount)) AS items"
    return routed.execute("s1", statement.replace("FROM items", f"FROM {table}"))


def test_a_limit_may_be_a_parameter(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        for count in (5, 0, 500):
            found = client.execute("SELECT id FROM items ORDER BY id LIMIT %s", (count,)).fetchall()
            assert found == sorted(everything(filled, "id"))[:count]
        assert len(client.execute("SELECT id FROM items LIMIT %s", (7,)).fetchall()) == 7


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_prepared_statements_and_parameters(filled: Routed, pooling: str) -> None:
    router = filled.router(pooling=pooling)
    wanted = sorted(row for row in everything(filled) if row[3] > 50)
    with psycopg.connect(router.dsn(), autocommit=True, prepare_threshold=0) as client:
        for _ in range(3):
            statement = "SELECT * FROM items WHERE amount > %s ORDER BY tenant_id, id"
            assert client.execute(statement, (50,)).fetchall() == wanted
            assert client.execute("SELECT amount FROM items WHERE tenant_id = %s AND id = 3", (3,)).fetchone() == (10,)


def test_asyncpg_which_asks_for_the_columns_first(filled: Routed, router: Router) -> None:
    asyncio.run(by_asyncpg(filled, router))


async def by_asyncpg(filled: Routed, router: Router) -> None:
    client = await asyncpg.connect(host="127.0.0.1", port=router.port, user="postgres", database="shop", ssl=False)
    try:
        for least in (50, 60):
            rows = await client.fetch("SELECT * FROM items WHERE amount > $1 ORDER BY tenant_id, id", least)
            assert [tuple(row) for row in rows] == sorted(row for row in everything(filled) if row[3] > least)
        prepared = await client.prepare("SELECT id FROM items WHERE amount = $1")
        assert [a.name for a in prepared.get_attributes()] == ["id"]
        assert Counter(r["id"] for r in await prepared.fetch(10)) == Counter(
            row[1] for row in everything(filled) if row[3] == 10
        )
        with pytest.raises(asyncpg.DivisionByZeroError):
            await client.fetch("SELECT 1 / (amount - $1::int) FROM items", 37)
        assert await client.fetchval("SELECT count(*) FROM items WHERE tenant_id = 1") > 0
    finally:
        await client.close()


def test_keys_of_several_shards(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        found = client.execute("SELECT * FROM items WHERE tenant_id IN (%s, %s)", (1, SPLIT_AT + 2)).fetchall()
    assert Counter(found) == Counter(row for row in everything(filled) if row[0] in (1, SPLIT_AT + 2))


def test_settings_of_the_session_are_those_of_every_part(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        client.execute("SET DateStyle TO German")
        rows = client.execute("SELECT to_char(1, '0'), ('2024-02-03'::date)::text FROM items").fetchall()
        assert {row[1] for row in rows} == {"03.02.2024"}
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="ISO"):
            psycopg.ClientCursor(client).execute("SELECT '2024-02-03'::date + id AS d FROM items ORDER BY d")
        client.execute("SET DateStyle TO ISO")
        found = psycopg.ClientCursor(client).execute("SELECT '2024-02-03'::date + id AS d FROM items ORDER BY d")
        days = [row[0] for row in found]
        assert days == sorted(days)
        assert len(days) == 2 * ROWS


# --- what goes wrong


@pytest.mark.parametrize("pooling", ["session", "transaction"])
@pytest.mark.parametrize("tenant", [3, SPLIT_AT + 3])
def test_an_error_of_any_shard_is_the_answer_and_the_session_goes_on(filled: Routed, tenant: int, pooling: str) -> None:
    router = filled.router(pooling=pooling)
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        for cursor in (client.cursor(), psycopg.ClientCursor(client)):
            for statement in (
                f"SELECT 1 / (tenant_id - {tenant}) FROM items",
                f"SELECT 1 / (tenant_id - {tenant}) AS x FROM items ORDER BY x",
            ):
                with pytest.raises(psycopg.errors.DivisionByZero):
                    cursor.execute(statement.encode())
            with pytest.raises(psycopg.errors.UndefinedColumn):
                cursor.execute("SELECT nothing FROM items")
            assert len(cursor.execute("SELECT * FROM items").fetchall()) == 2 * ROWS
        await_true(lambda: is_quiet(filled), "something goes on")


def is_quiet(routed: Routed) -> bool:
    """No session of the router's is within a statement or a transaction."""
    return all(
        routed.execute(
            shard,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' AND application_name <> 'test' AND state <> 'idle'",
        )
        == [(0,)]
        for shard in ("s1", "s2")
    )


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("SELECT note FROM items ORDER BY note", "code points"),
        ("SELECT ARRAY[id] AS a FROM items ORDER BY a", "type with OID"),
    ],
)
def test_orders_that_cannot_be_merged_are_refused(router: Router, statement: str, match: str) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        for cursor in (client.cursor(), psycopg.ClientCursor(client)):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match=match):
                cursor.execute(statement.encode())
            assert client.execute("SELECT 1").fetchone() == (1,)


def test_within_a_transaction_block_it_is_refused_and_the_block_has_failed(router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="transaction block"), client.transaction():
            client.execute("SELECT * FROM items")
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_several_statements_before_one_sync_are_refused(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        for others in (["SELECT 1"], ["SELECT id FROM items WHERE tenant_id = 1"]):
            for statements in ([*others, "SELECT * FROM items"], ["SELECT * FROM items", *others]):
                with pytest.raises(psycopg.errors.FeatureNotSupported):
                    pipelined(client, statements)
                assert client.execute("SELECT 1").fetchone() == (1,)
        with client.pipeline() as pipeline:
            first = client.execute("SELECT * FROM items")
            pipeline.sync()
            second = client.execute("SELECT id FROM items WHERE tenant_id = 1")
        assert len(first.fetchall()) == 2 * ROWS
        assert len(second.fetchall()) == len(filled.execute("s1", "SELECT id FROM items WHERE tenant_id = 1"))


def pipelined(client: psycopg.Connection[Any], statements: list[str]) -> None:
    with client.pipeline():
        for statement in statements:
            client.execute(statement.encode())


def test_a_read_in_portions_is_refused(router: Router) -> None:
    with RawClient(router.port) as client:
        client.socket.sendall(
            messages.parse(b"", b"SELECT * FROM items")
            + messages.bind(b"", b"")
            + messages.execute(b"", 10)
            + messages.SYNC
        )
        assert sqlstates(client.until_ready()) == ["0A000"]


def test_a_flush_behind_the_execute_is_answered(router: Router) -> None:
    with RawClient(router.port) as client:
        client.socket.sendall(
            messages.parse(b"one", b"SELECT * FROM items ORDER BY id")
            + messages.describe(b"S", b"one")
            + messages.bind(b"", b"one")
            + messages.describe(b"P", b"")
            + messages.execute(b"")
            + messages.close(b"P", b"")
            + messages.FLUSH
        )
        kinds = b""
        for kind, _, _ in client.messages():
            kinds += kind
            if kind == b"3":
                break
        assert kinds == b"1tT2T" + b"D" * 2 * ROWS + b"C3"
        client.socket.sendall(messages.close(b"S", b"one") + messages.SYNC)
        assert [kind for kind, _, _ in client.until_ready()] == [b"3", b"Z"]


ENDLESS: Final = "SELECT id FROM items, generate_series(1, 30000) n, generate_series(1, 30000) m WHERE n + m < 0"


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_client_that_cancels_is_told_so_and_nothing_runs_on(filled: Routed, router: Router, is_locked: bool) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client, contextlib.ExitStack() as stack:
        if is_locked:  # before its snapshot is taken
            blocker = stack.enter_context(psycopg.connect(filled.dsns["s2"]))
            blocker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        with cancelling(client), pytest.raises(psycopg.errors.QueryCanceled):
            client.execute("SELECT * FROM items" if is_locked else ENDLESS)
        stack.close()
        assert len(client.execute("SELECT * FROM items").fetchall()) == 2 * ROWS
        await_true(lambda: is_quiet(filled), "something goes on")


@contextlib.contextmanager
def cancelling(client: psycopg.Connection[Any]) -> Iterator[None]:
    """What runs in the block is cancelled after a while; again and again, where it has not begun by then."""
    done = threading.Event()

    def cancel() -> None:
        while not done.wait(0.5):
            client.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_client_that_vanishes_leaves_nothing_running(filled: Routed, router: Router) -> None:
    with RawClient(router.port) as client:
        client.query(ENDLESS)
        await_true(lambda: not is_quiet(filled), "it does not begin")
    await_true(lambda: is_quiet(filled), "it goes on")


def test_a_shard_that_goes_away_is_an_error_and_the_session_goes_on(filled: Routed, router: Router) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        done = threading.Event()

        def strike() -> None:
            while not done.wait(0.05):
                filled.execute(
                    "s2",
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%generate_series%'"
                    " AND state = 'active' AND pid <> pg_backend_pid() AND datname = current_database()",
                )

        striker = threading.Thread(target=strike)
        striker.start()
        try:
            with pytest.raises(psycopg.Error):
                client.execute(ENDLESS.encode())
        finally:
            done.set()
            striker.join()
        assert len(client.execute("SELECT * FROM items").fetchall()) == 2 * ROWS


@pytest.mark.parametrize("order", ["", " ORDER BY id"])
def test_a_client_that_reads_slowly_costs_no_memory(filled: Routed, router: Router, order: str) -> None:
    """Each shard sends 60 rows of 4 MB, and the client takes none of them at first."""
    long = "SELECT id, repeat('x', 4000000) AS x FROM items" + order
    with sampled(router) as most, RawClient(router.port) as client:
        client.query("SELECT id FROM items")
        client.until_ready()
        before = most()
        client.query(long)
        client.socket.recv(1, socket.MSG_PEEK)
        await_true(lambda: waits_for_us(filled), "the shards do not wait for the client")
        kinds = Counter(kind for kind, _, _ in client.until_ready())
        assert kinds[b"D"] == 2 * ROWS
        assert most() - before < 100 * 2**20


def waits_for_us(routed: Routed) -> bool:
    statement = (
        "SELECT DISTINCT wait_event FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%repeat%'"
        " AND pid <> pg_backend_pid()"
    )
    return all(routed.execute(shard, statement) == [("ClientWrite",)] for shard in ("s1", "s2"))


# --- moves beside it

TABLES: Final = {
    "tenants": ("tenant_id",),
    "customers": ("tenant_id", "customer_id"),
    "orders": ("tenant_id", "order_id"),
    "order_items": ("tenant_id", "order_id", "line"),
}
UNRESTRICTED: Final = """
    from router import scatter
    scatter.restricted = lambda planned, ranges: planned.text
"""


def rows_by_owner(world: World, table: str) -> Counter[Any]:
    """The oracle: what each shard has of the ranges that it owns."""
    return Counter(
        row
        for shard in world.shards
        for row in world.fetch(shard, f"SELECT tenant_id, {table}::text FROM {table}")
        if world.owner(row[0]) == shard
    )


def twice_or_missing(client: psycopg.Connection[Any]) -> list[str]:
    """What no snapshot of all shards can have: one row twice, or a tenant that nobody ever removes, missing."""
    damage = []
    for table, key in TABLES.items():
        found = Counter(client.execute(f"SELECT {', '.join(key)} FROM {table}".encode()).fetchall())
        damage += [f"{table} {row}: {count} times" for row, count in found.items() if count > 1]
        if table == "tenants" and len(found) != len(TENANTS):
            damage.append(f"{len(found)} tenants")
    return damage


def spread(world: World) -> None:
    """Tenants from 30 on are on s2 before anything else is told."""
    move_id = world.split(at=30)
    world.run(move_id, State.READY)
    world.cut_over(move_id)
    world.complete(move_id)


@pytest.mark.parametrize("is_restricted", [True, False])
def test_rows_of_a_moving_range_come_once_from_their_owner(
    world: World, routers: Routers, tmp_path: Path, is_restricted: bool
) -> None:
    spread(world)
    with replaced(tmp_path, "" if is_restricted else UNRESTRICTED):
        router = routers.start(world.write_config(), hold_timeout_s=BOUND_S)
    move_id = planner.split(world.config, world.catalog, "shop", at=[20], to=["s2"]).move_ids[0]
    damage: list[str] = []
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        with world.writers():
            for reach in (
                lambda: None,
                lambda: copy_some(world, move_id),
                lambda: world.run(move_id, State.READY),
                lambda: world.cut_over(move_id),
                lambda: world.cut_over(move_id, Direction.BACK),
                lambda: world.cut_over(move_id),
            ):
                join = in_background(reach)
                damage += twice_or_missing(client)
                join()
                damage += twice_or_missing(client)
        for table in TABLES:
            found = Counter(client.execute(f"SELECT tenant_id, {table}::text FROM {table}".encode()).fetchall())
            if found != rows_by_owner(world, table):
                damage.append(f"{table} at rest")
    if is_restricted:
        assert damage == []
        world.assert_nothing_lost()
    else:
        assert damage, "the restriction was taken away, and nothing came twice"


def copy_some(world: World, move_id: str) -> None:
    """Dies in the middle of the copy."""

    class Died(Exception):
        pass

    copied = itertools.count(1)

    def die(_: str) -> None:
        if next(copied) == 5:
            raise Died

    with points.armed("copying.after_batch", die), pytest.raises(Died):
        world.run(move_id, State.READY)


BLIND: Final = """
    from router import scatter

    class Anything(dict):
        __hash__ = None
        def __eq__(self, other):
            return True

    scatter._plan_now = lambda session, unit: Anything()
"""


@pytest.mark.parametrize("looks", [True, False])
def test_a_read_is_begun_again_where_a_range_moved_while_it_was_opened(
    world: World, routers: Routers, faults: Path, tmp_path: Path, looks: bool
) -> None:
    """The router is stopped with all its snapshots taken; then the range moves, and is written to at its new owner.

    Until it is silent for so long that nobody waits for it any more, it may answer by what it knows (I9).
    """
    spread(world)
    move_id = planner.split(world.config, world.catalog, "shop", at=[20], to=["s2"]).move_ids[0]
    world.run(move_id, State.READY)
    with replaced(tmp_path, "" if looks else BLIND):
        router = routers.start(world.write_config(), confirm_s=1.0, hold_timeout_s=BOUND_S)
    order(faults, "scatter.after_snapshots", "pause")
    names: dict[int, str] = {}

    def read() -> None:
        with psycopg.connect(router.dsn(), autocommit=True) as client:
            rows = client.execute("SELECT tenant_id, name FROM tenants").fetchall()
            assert len(rows) == len(TENANTS)
            names.update(rows)

    join = in_background(read)
    stopped = await_taken(faults, "scatter.after_snapshots")
    try:
        world.cut_over(move_id)
        with world.connect("s2") as writer:
            writer.execute("UPDATE tenants SET name = 'the new owner''s' WHERE tenant_id = 25")
        await_true(lambda: not any(each.is_live for each in world.catalog.routers()), "the router beats")
    finally:
        os.kill(stopped, signal.SIGCONT)
    join()
    assert sorted(names) == list(TENANTS)
    assert (names[25] == "the new owner's") is looks
