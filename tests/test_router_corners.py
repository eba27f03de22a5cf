"""Events that meet in the wrong instant: a cancel before a task begins, a message within a row, a lost hand-over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from psycopg.conninfo import conninfo_to_dict

from router import asking, scatter
from shardmove.coordinator.phases import change_phase
from shardmove.domain.moves import State
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.inside import Inside, inside
from tests.support.rawclient import RawClient, codes, status, told, values
from tests.support.routed import Routed
from tests.support.servers import connect
from tests.support.world import World
from tests.test_router_protocol import E0, HERE, THERE, B, P, Q, S, bound, c, d
from tests.test_router_waits import READ, blocked_mirror

BOUND_S = 60.0
until = partial(engine.until, timeout_s=BOUND_S)
FENCE = """
    CREATE FUNCTION fenced() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'shardmove: fenced by hand' USING ERRCODE = '40001'; END $$;
    CREATE TRIGGER fenced BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION fenced();
"""


def client_of(it: Inside, routed: Routed, *, receive_bytes: int | None = None) -> RawClient:
    return RawClient(it.port, dbname=routed.dbname, bound_s=BOUND_S, receive_bytes=receive_bytes)


def test_a_statement_of_comments_is_read_in_no_time() -> None:
    """It would take for ever, and the whole router with it."""
    for text in (b"create" + b"/**/" * 5_000, b"create" + b" --\n" * 5_000, b"into " * 5_000):
        assert asking._LIVES_IN_CONNECTION.search(text) is None


def test_a_cancel_before_a_tasks_first_step_is_heard(routed: Routed) -> None:
    with inside(routed.config_file) as it, client_of(it, routed) as client:
        assert codes(client.ask(Q("SELECT 1"))) == []
        session = it.session

        def both() -> None:
            session.data_received(Q("SELECT tenant_id FROM items"))
            session.cancel()

        it.call(both)
        assert codes(told(client.until_ready())) in ([], ["57014"])
        assert values(client.ask(Q("SELECT 'goes on'"))) == ["goes on"]
        assert not it.troubles


@pytest.mark.parametrize("pooling", ["session", "transaction"])
@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_rows_that_come_while_a_copy_goes_to_its_shard_are_not_lost(
    routed: Routed, protocol: str, pooling: str
) -> None:
    router, count = routed.router(pooling=pooling), 3_000
    with RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        copy = "COPY items (tenant_id, id) FROM STDIN"
        client.send(*([Q(copy)] if protocol == "simple" else [P(b"", copy), bound(b""), S]))
        client.until(b"G")
        for number in range(count):
            client.send(d(f"{THERE}\t{number}\n".encode()))
        client.send(c, *([] if protocol == "simple" else [S]))
        assert codes(told(client.until_ready())) == []
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(count,)]


@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_a_write_in_a_block_that_a_fence_keeps_out_ends_in_an_answer(routed: Routed, protocol: str) -> None:
    routed.execute("s1", FENCE)
    router = routed.router(hold_timeout_s=0.5)
    with RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        client.ask(Q("BEGIN"))
        insert = f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 5)"
        said = client.ask(*([Q(insert)] if protocol == "simple" else [P(b"", insert), bound(b""), S]))
        assert (codes(said), status(said)) == (["40001"], "E")
        assert status(client.ask(Q("ROLLBACK"))) == "I"


def test_a_notification_does_not_come_within_a_row(routed: Routed) -> None:
    with (
        inside(routed.config_file) as it,
        client_of(it, routed) as speaker,
        client_of(it, routed, receive_bytes=65_536) as client,
    ):
        session = it.session
        client.ask(Q("LISTEN news"))
        nothing = f"WHERE NOT EXISTS (SELECT FROM items WHERE tenant_id = {THERE})"
        client.query(f"SELECT repeat('x', 30000000) FROM (SELECT 1) x {nothing}")
        until(lambda: not session.writable.is_set(), "the router goes on to take the row")
        assert session.shard == "s2"
        speaker.ask(Q("NOTIFY news, 'hello'"))
        found = list(client.until(b"Z", keep_max=1 << 30))
        [row] = [body for kind, _, body in found if kind == b"D"]
        assert set(row[6:]) == {ord("x")}
        notified = [kind for kind, *_ in found].count(b"A")
        if not notified:
            found = list(client.until(b"A"))
        assert codes(client.ask(Q("SELECT 1"))) == []


def test_a_listener_that_does_not_read_costs_no_memory(routed: Routed) -> None:
    with inside(routed.config_file) as it, client_of(it, routed, receive_bytes=4_096) as client:
        client.ask(Q("LISTEN news"))
        session = it.session
        with connect(routed.dsns["s1"], application_name="test") as speaker:
            for _ in range(20):
                speaker.execute("SELECT pg_notify('news', i || repeat('x', 7900)) FROM generate_series(1, 100) i")
        [server] = session.servers.values()
        until(lambda: not server._is_reading, "the router goes on to hear what nobody reads")
        assert it.call(session.transport.get_write_buffer_size) < 4_000_000
        for _ in range(2_000):
            client.until(b"A")
        assert values(client.ask(Q("SELECT 'goes on'"))) == ["goes on"]


def test_a_scattered_read_that_is_cancelled_at_its_end_keeps_no_connection(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = scatter._Read.end

    async def cancelled(read: scatter._Read) -> None:
        asyncio.get_running_loop().call_soon(read._session.cancel)  # a cancel request that was queued before this step
        await end(read)

    with inside(routed.config_file, pooling="transaction") as it:
        with client_of(it, routed) as client:
            assert codes(client.ask(Q("SELECT tenant_id FROM items"))) == []
            with monkeypatch.context() as patched, suppress(ConnectionError):
                patched.setattr(scatter._Read, "end", cancelled)
                client.ask(Q("SELECT tenant_id FROM items"))
        until(lambda: all(all_ == idle for all_, idle in it.pools().values()), "connections are kept for nobody")


def test_a_connection_that_is_lost_while_it_is_handed_over_is_replaced(routed: Routed) -> None:
    settings = {"pooling": "transaction", "servers_max": 1}
    with (
        inside(routed.config_file, is_uvloop=False, **settings) as it,
        client_of(it, routed) as first,
        client_of(it, routed) as second,
    ):
        first.ask(Q("BEGIN"))
        first.ask(Q(f"SELECT 1 FROM items WHERE tenant_id = {HERE}"))
        [pool] = [each for each in it.router.pools.values() if each.shard == "s1"]
        [server] = pool.servers
        holder = next(each for each in it.router.sessions.values() if each.server is server)
        second.send(Q(f"SELECT count(*) FROM items WHERE tenant_id = {HERE}"))
        until(lambda: pool.waiting == 1, "nobody waits")

        async def lose() -> None:
            await server.run(b"ROLLBACK")
            server.transport.close()  # its end was read: what is to hear of it is queued
            holder.server = None
            pool.give_back(server)

        it.run(lose())
        assert codes(told(second.until_ready())) == []


def test_a_cancel_while_a_transaction_moves_on_fails_it(routed: Routed) -> None:
    with inside(routed.config_file) as it, client_of(it, routed) as client:
        for tenant in (THERE, HERE):
            client.ask(Q(f"SELECT 1 FROM items WHERE tenant_id = {tenant}"))
        client.ask(Q("BEGIN"))
        client.ask(Q("SELECT 1"))
        session = it.session

        async def cancelled() -> None:
            session.data_received(Q(f"UPDATE items SET amount = 1 WHERE tenant_id = {THERE}"))
            await asyncio.sleep(0)  # it waits for its ROLLBACK now
            session.cancel()

        it.run(cancelled())
        said = told(client.until_ready())
        assert status(said) == ("E" if codes(said) else "T")
        client.ask(Q("ROLLBACK"))
        assert values(client.ask(Q("SELECT 'goes on'"))) == ["goes on"]


def in_phase_4(world: World, it: Inside) -> RawClient:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        change_phase(held, 4, share=1.0, force=True)
    until(lambda: [move.phase for move in it.router.known.moves.values()] == [4], "the phase is not heard of")
    dbname = str(conninfo_to_dict(world.dsns["s1"])["dbname"])
    return RawClient(it.port, dbname=dbname, bound_s=BOUND_S)


def test_a_client_that_leaves_during_a_read_at_the_target_leaves_the_phase(world: World) -> None:
    with inside(world.write_config(), target_patience_s=2 * BOUND_S) as it:  # no end of it but the client's
        client = in_phase_4(world, it)
        client.query("SELECT version, pg_sleep(20) FROM tenants WHERE tenant_id = 30")
        until(lambda: it.session.watch is not None, "the read does not begin")
        watch = it.session.watch
        client.close()
        until(lambda: not it.router.sessions, "the client is not missed")
        assert watch is not None
        assert watch.cancelled()
        assert not it.troubles


def test_parameter_types_are_those_of_the_statement_after_a_second_try(world: World) -> None:
    with inside(world.write_config(), target_patience_s=2.0) as it, in_phase_4(world, it) as client:
        describe: Callable[[bytes], bytes] = partial(wire.describe, b"S")
        with blocked_mirror(world):
            client.ask(P(b"one", READ.replace("30", "$1")), describe(b"one"), B(b"", b"one", [b"30"]), E0, S)
        assert not it.session.prepared.described
        client.ask(P(b"two", "SELECT $1::text, $2::integer"), describe(b"two"), S)
        assert it.session.prepared.statements[b"two"].types == (25, 23)


def test_a_lost_connection_is_no_reason_to_raise(routed: Routed) -> None:
    """What a server says behind the client's last words goes nowhere."""
    with inside(routed.config_file) as it, client_of(it, routed) as client:
        with connect(routed.dsns["s1"], application_name="test") as locker:
            locker.execute("SELECT pg_advisory_lock(99)")
            client.send(P(b"", "SELECT pg_advisory_lock(99)"), B(b"", b"", []), wire.FLUSH)
            client.until(b"2")
            client.send(E0, wire.FLUSH, b"!\0\0\0\4")
            assert [kind for kind, *_ in client.messages()] == [b"E"]
        until(lambda: not it.router.sessions, "the client is not missed")
        assert not it.troubles
