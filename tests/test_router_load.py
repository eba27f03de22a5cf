"""Many clients, clients that do not read, and very large values: memory stays bounded, refusals are clear, and what was
refused or given up leaves nothing behind.

    SHARDMOVE_LOAD_CLIENTS    500    SHARDMOVE_LOAD_ROW_MB    256    SHARDMOVE_LOAD_SLOW    12
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Final

import psycopg
import pytest

from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.rawclient import RawClient, sqlstates
from tests.support.routed import SPLIT_AT, Routed
from tests.support.router import Router

CLIENTS: Final = int(os.environ.get("SHARDMOVE_LOAD_CLIENTS", "500"))
ROW_MB: Final = int(os.environ.get("SHARDMOVE_LOAD_ROW_MB", "256"))
SLOW: Final = int(os.environ.get("SHARDMOVE_LOAD_SLOW", "12"))
BOUND_S: Final = 120.0
await_true = partial(engine.until, timeout_s=BOUND_S)
MB: Final = 2**20
GROWTH_MB: Final = 48
"""What the router's memory may grow by, whatever passes through it: far less than any of the results."""
PER_CLIENT_MB: Final = 1


def long_result(megabytes: int) -> str:
    """A statement whose result is that long, in rows of 1 kB."""
    return f"SELECT repeat('x', 1000) FROM generate_series(1, {megabytes * 1000})"


# --- many clients


def test_many_clients_share_few_server_connections(routed: Routed) -> None:
    bounds = {"queue_timeout_s": BOUND_S, "login_timeout_s": BOUND_S, "connect_timeout_s": BOUND_S}
    router = routed.router(pooling="transaction", servers_max=10, clients_max=CLIENTS + 10, **bounds)
    routed.execute("s1", f"INSERT INTO items (tenant_id, id) SELECT i, 1 FROM generate_series(0, {SPLIT_AT - 1}) i")
    routed.execute("s2", f"INSERT INTO items (tenant_id, id) SELECT {SPLIT_AT} + i, 1 FROM generate_series(0, 99) i")
    before = router.memory_bytes()

    async def one(connection: psycopg.AsyncConnection[Any], tenant: int) -> None:
        for _ in range(3):
            await connection.execute("UPDATE items SET amount = amount + 1 WHERE tenant_id = %s AND id = 1", (tenant,))
            cursor = await connection.execute("SELECT amount FROM items WHERE tenant_id = %s", (tenant,))
            assert len(await cursor.fetchall()) == 1

    async def all_of_them() -> int:
        connections = await crowd(router, routed, CLIENTS)
        try:
            await asyncio.gather(*(one(each, number % 200) for number, each in enumerate(connections)))
            return router.memory_bytes()
        finally:
            await asyncio.gather(*(each.close() for each in connections))

    grown = asyncio.run(all_of_them()) - before
    written = sum(routed.execute(shard, "SELECT sum(amount) FROM items")[0][0] for shard in ("s1", "s2"))
    assert written == CLIENTS * 3
    assert grown < (GROWTH_MB + CLIENTS * PER_CLIENT_MB) * MB
    await_true(lambda: clients_of(router) == 0, "the router still counts clients that have left")
    for shard in ("s1", "s2"):
        assert len(servers_of(routed, shard)) <= 10


async def crowd(router: Router, routed: Routed, count: int) -> list[psycopg.AsyncConnection[Any]]:
    """So many clients, 50 of them knocking at a time."""
    knocking = asyncio.Semaphore(50)

    async def connected() -> psycopg.AsyncConnection[Any]:
        async with knocking:
            return await psycopg.AsyncConnection.connect(
                router.dsn(routed.dbname, connect_timeout=int(BOUND_S)), autocommit=True
            )

    return list(await asyncio.gather(*(connected() for _ in range(count))))


def test_one_client_too_many_is_told_so_and_gets_in_once_another_left(routed: Routed) -> None:
    router = routed.router(clients_max=5)
    with ExitStack() as stack:
        inside = [stack.enter_context(connected(router, routed)) for _ in range(5)]
        with pytest.raises(psycopg.OperationalError, match=r"FATAL.*client"):
            psycopg.connect(router.dsn(routed.dbname))
        for each in inside:
            assert each.execute("SELECT 1").fetchone() == (1,)
        inside[0].close()
        await_true(lambda: lets_in(router, routed), "nobody gets in although a client left")


def lets_in(router: Router, routed: Routed) -> bool:
    with suppress(psycopg.OperationalError), connected(router, routed) as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)
    return False


def test_a_client_that_waits_too_long_for_a_server_is_refused_and_goes_on_later(routed: Routed) -> None:
    router = routed.router(pooling="transaction", servers_max=2, queue_timeout_s=0.5)
    with connected(router, routed) as first, connected(router, routed) as second, connected(router, routed) as third:
        for holder in (first, second):
            holder.execute("BEGIN")
            holder.execute("SELECT count(*) FROM items WHERE tenant_id = 1")
        with pytest.raises(psycopg.errors.TooManyConnections):
            third.execute("SELECT count(*) FROM items WHERE tenant_id = 1")
        for holder in (first, second):
            holder.execute("ROLLBACK")
        assert third.execute("SELECT count(*) FROM items WHERE tenant_id = 1").fetchone() == (0,)


# --- clients that do not read


def test_clients_that_do_not_read_cost_no_memory_and_stop_nobody(routed: Routed) -> None:
    router = routed.router()
    with connected(router, routed) as reading:
        assert reading.execute("SELECT 1").fetchone() == (1,)
        before = router.memory_bytes()
        with ExitStack() as stack:
            slow = [stack.enter_context(RawClient(router.port, dbname=routed.dbname)) for _ in range(SLOW)]
            for each in slow:
                each.query(long_result(64))
            await_true(lambda: waiting_for_a_reader(routed) == SLOW, "servers do not wait for their readers")
            assert reading.execute("SELECT count(*) FROM items WHERE tenant_id = 1").fetchone() == (0,)
            assert router.memory_bytes() - before < (GROWTH_MB + SLOW * PER_CLIENT_MB) * MB
            found = slow[0].until_ready()
            assert sum(kind == b"D" for kind, _, _ in found) == 64_000
            slow[0].query("SELECT 1")
            assert [kind for kind, _, _ in slow[0].until_ready()] == [b"T", b"D", b"C", b"Z"]
        await_true(lambda: not active(routed), "servers still work for clients that are gone")
        assert reading.execute("SELECT 1").fetchone() == (1,)
    assert router.memory_bytes() - before < (GROWTH_MB + SLOW * PER_CLIENT_MB) * MB


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_a_connection_is_heard_again_after_a_client_that_was_slow(routed: Routed, pooling: str) -> None:
    """Results of every length, so that one ends just where the router has stopped to take more: the next one comes."""
    router = routed.router(pooling=pooling, servers_max=1)
    with RawClient(router.port, dbname=routed.dbname, receive_bytes=65_536) as slow:
        for kilobytes in range(64, 6_000, 64):
            slow.query(f"SELECT repeat('x', 1000) FROM generate_series(1, {kilobytes})")
            await_true(lambda: waiting_for_a_reader(routed) or not active(routed), "the server is at it still")
            assert len(slow.until_ready()) == kilobytes + 3
            slow.query("SELECT 1")
            assert len(slow.until_ready()) == 4


def waiting_for_a_reader(routed: Routed) -> int:
    return sum(event == "ClientWrite" for _, event in servers_of(routed, "s1"))


def active(routed: Routed) -> list[Any]:
    return [each for each in servers_of(routed, "s1") if each[0] == "active"]


def test_a_client_that_sends_without_reading_is_made_to_wait(routed: Routed) -> None:
    """Statements by the thousand, each with a result of 100 kB, before the first answer is read."""
    router, count = routed.router(), 2_000
    with RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # else that may be large enough for most
        before = router.memory_bytes()
        statements = wire.query(long_text(100)) * count
        sent = [0]
        sender = threading.Thread(target=send_counted, args=(client.socket, statements, sent), daemon=True)
        sender.start()
        await_rest(lambda: sent[0])
        assert sent[0] < len(statements), "the router took everything, whether or not its answers were read"
        assert router.memory_bytes() - before < GROWTH_MB * MB
        answered = 0
        for kind, length, body in client.messages():
            assert kind != b"E", body
            assert kind != b"D" or length > 100_000
            answered += kind == b"Z"
            if answered == count:
                break
        sender.join(BOUND_S)
        assert answered == count
    assert router.memory_bytes() - before < GROWTH_MB * MB


def send_counted(sending: socket.socket, data: bytes, sent: list[int]) -> None:
    rest = memoryview(data)
    while rest:
        count = sending.send(rest[:65_536])
        sent[0] += count
        rest = rest[count:]


def await_rest(number: Callable[[], int]) -> None:
    """Until the number has not changed for a second."""
    seen, since = number(), time.monotonic()
    deadline = since + BOUND_S
    while time.monotonic() - since < 1.0:
        if (now := number()) != seen:
            seen, since = now, time.monotonic()
        assert time.monotonic() < deadline, f"{seen} still grows"
        time.sleep(0.02)


def long_text(kilobytes: int) -> str:
    """A statement that is long itself, and so is its result: neither side of the client can swallow many of them."""
    return f"SELECT repeat('x', {kilobytes * 1024}) /* {'y' * 10_000} */"


# --- very large values


def test_a_huge_row_streams_through(routed: Routed) -> None:
    router = routed.router()
    with RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        client.query("SELECT 1")
        client.until_ready()
        before = router.memory_bytes()
        with sampled(router) as largest:
            client.query(f"SELECT repeat('x', {ROW_MB * MB})")
            lengths = {kind: length for kind, length, _ in client.until_ready()}
        assert lengths[b"D"] == ROW_MB * MB + 6
        assert largest() - before < GROWTH_MB * MB
        client.query("SELECT 1")
        assert [kind for kind, _, _ in client.until_ready()] == [b"T", b"D", b"C", b"Z"]


@pytest.mark.parametrize("binary", [False, True])
def test_a_large_value_goes_in_and_comes_back(routed: Routed, binary: bool) -> None:
    router, note = routed.router(message_bytes_max=64 * MB), "äß" * (4 * MB)
    with connected(router, routed) as connection:
        for tenant in (1, SPLIT_AT):
            connection.execute(
                "INSERT INTO items (tenant_id, id, note) VALUES (%b, 1, %b)" if binary else
                "INSERT INTO items (tenant_id, id, note) VALUES (%t, 1, %t)",
                (tenant, note),
            )  # fmt: skip
            cursor = connection.cursor(binary=binary)
            assert cursor.execute("SELECT note FROM items WHERE tenant_id = %s", (tenant,)).fetchone() == (note,)


@pytest.mark.parametrize("way", ["query", "parameter", "copy"])
def test_a_message_above_the_limit_is_refused_by_name(routed: Routed, way: str) -> None:
    """54000, and the client is either served on or sees its connection end; others notice nothing."""
    router, note = routed.router(message_bytes_max=MB), "x" * (2 * MB)
    with connected(router, routed) as other, connected(router, routed) as connection:
        with pytest.raises(psycopg.Error) as refused:
            send_large(connection, way, note)
        assert refused.value.sqlstate == "54000", refused.value
        if not connection.broken:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert other.execute("SELECT 1").fetchone() == (1,)
    assert routed.execute("s1", "SELECT count(*) FROM items") == [(0,)]
    await_true(lambda: not active(routed), "a server still waits for the rest of the message")


def send_large(connection: psycopg.Connection[Any], way: str, note: str) -> None:
    statement = "INSERT INTO items (tenant_id, id, note) VALUES (1, 1, {})"
    if way == "query":
        connection.execute(statement.format(f"'{note}'").encode())
    elif way == "parameter":
        connection.execute(statement.format("%s").encode(), (note,))
    else:
        with connection.cursor().copy("COPY items (tenant_id, id, note) FROM STDIN") as copy:
            connection.pgconn.put_copy_data(f"1\t1\t{note}\n".encode())  # in one message; `copy.write` would cut it
            copy.write(b"")


def test_a_length_that_cannot_be_is_refused(routed: Routed) -> None:
    router = routed.router()
    with RawClient(router.port, dbname=routed.dbname) as client:
        client.socket.sendall(b"Q\x7f\xff\xff\xff" + b"SELECT")
        assert sqlstates(list(client.messages())) in (["54000"], ["08P01"])
    with RawClient(router.port, dbname=routed.dbname) as client:
        client.socket.sendall(b"Q\0\0\0\3")
        assert sqlstates(list(client.messages())) == ["08P01"]
    with connected(router, routed) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


# --- clients that vanish


def test_clients_that_vanish_at_any_point_leave_no_server_behind(routed: Routed) -> None:
    router = routed.router()
    texts = ("SELECT pg_sleep(2)", "BEGIN; LOCK items", long_result(64))
    for sent in (b"", b"Q", *map(wire.query, texts)):
        for cut in {0, len(sent) // 2, len(sent)}:
            with RawClient(router.port, dbname=routed.dbname) as client:
                client.socket.sendall(sent[:cut])
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends by a reset
    await_true(lambda: not active(routed), "servers still work for clients that are gone")
    await_true(lambda: clients_of(router) == 0, "the router still counts clients that have left")
    await_true(
        lambda: routed.execute("s1", "SELECT count(*) FROM pg_locks WHERE relation = 'items'::regclass") == [(0,)],
        "a lock of a client that is gone is held",
    )


# --- what the tests look at


@contextmanager
def connected(router: Router, routed: Routed) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(router.dsn(routed.dbname), autocommit=True) as connection:
        yield connection


def clients_of(router: Router) -> int:
    """Those that are not looking at themselves."""
    return sum(row["database"] != "shardmove" for row in router.show("CLIENTS"))


def servers_of(routed: Routed, shard: str) -> list[tuple[Any, ...]]:
    """State and wait event of the sessions that the router has there: its clients', as nothing moves."""
    return routed.execute(
        shard,
        "SELECT state, wait_event FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend' AND application_name <> 'test'",
    )


@contextmanager
def sampled(router: Router) -> Iterator[Callable[[], int]]:
    """The largest memory of the router during the block."""
    found, ended = [router.memory_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            found.append(router.memory_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: max(found)
    finally:
        ended.set()
        thread.join()
