"""Connections that many clients share: bounded, waited for, and given on without anything of the client before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support.rawclient import RawClient, codes, values
from tests.support.routed import Routed, standing
from tests.support.router import Router
from tests.test_router_protocol import HERE, THERE, Q, S, bound, connect, until, until_settled

CLIENTS = 12


@pytest.fixture(scope="module")
def pooled(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Routed, Router, Router]]:
    """Two routers over the same shards: one with two connections for each, one that does not wait long for one."""
    with standing(servers, tmp_path_factory.mktemp("pool")) as routed:
        for shard, tenant in (("s1", HERE), ("s2", THERE)):
            routed.execute(shard, f"INSERT INTO items (tenant_id, id, note) VALUES ({tenant}, 1, '{shard}')")
        shared = routed.router(pooling="transaction", servers_max=2)
        hasty = routed.router(pooling="transaction", servers_max=2, queue_timeout_s=0.3)
        yield routed, shared, hasty


def read(tenant: int, what: str = "note") -> bytes:
    return Q(f"SELECT {what} FROM items WHERE tenant_id = {tenant}")


def test_settings_and_names_of_many_clients_never_meet(pooled: tuple[Routed, Router, Router]) -> None:
    routed, router, _ = pooled
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            with connect(routed, router) as client:
                client.ask(Q(f"SET work_mem = '{number + 1}MB'"))
                text = f"SELECT {number} || current_setting('work_mem') FROM items WHERE tenant_id = $1"
                client.ask(wire.parse(b"s", text), S)
                for _ in range(8):
                    for tenant in (HERE, THERE):
                        said = client.ask(bound(b"s", tenant), S)
                        if values(said) != [f"{number}{number + 1}MB"]:
                            wrong.append((number, said))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[0]
    pools = router.show("POOLS")
    assert all(int(row["idle"]) + int(row["busy"]) <= 2 for row in pools), pools


def test_who_waits_too_long_is_told_and_nobody_is_lost(pooled: tuple[Routed, Router, Router]) -> None:
    routed, _, router = pooled
    with connect(routed, router) as one, connect(routed, router) as two, connect(routed, router) as third:
        for holder in (one, two):
            holder.ask(Q("BEGIN"))
            holder.ask(read(HERE))
        for _ in range(3):
            assert codes(third.ask(read(HERE))) == ["53300"]
        assert values(third.ask(read(THERE))) == ["s2"]
        one.ask(Q("COMMIT"))
        assert values(third.ask(read(HERE))) == ["s1"]
        two.ask(Q("ROLLBACK"))
    until_settled(routed, router)


def test_a_client_that_leaves_while_it_waits_takes_no_connection_with_it(pooled: tuple[Routed, Router, Router]) -> None:
    routed, router, _ = pooled
    with connect(routed, router) as one, connect(routed, router) as two:
        for holder in (one, two):
            holder.ask(Q("BEGIN"))
            holder.ask(read(HERE))
        for _ in range(3):
            with connect(routed, router) as waiting:
                waiting.send(read(HERE))
                until(lambda: any(int(row["waiting"]) for row in router.show("POOLS")), "nobody waits")
            until(lambda: not any(int(row["waiting"]) for row in router.show("POOLS")), "a client that left waits on")
    until_settled(routed, router)
    with connect(routed, router) as client:
        assert values(client.ask(read(HERE))) == ["s1"]


def pids(clients: list[RawClient]) -> set[str]:
    return {pid for client in clients for pid in values(client.ask(read(HERE, "pg_backend_pid()::text")))}


@pytest.mark.parametrize(
    ("leave", "look", "nothing"),
    [
        (
            "CREATE TEMP TABLE mine AS SELECT 1",
            "SELECT count(*)::text FROM pg_class WHERE relname = 'mine' AND relnamespace = pg_my_temp_schema()",
            "0",
        ),
        (
            "SELECT pg_advisory_lock(4711)",
            "SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711",
            "0",
        ),
        ("LISTEN news", "SELECT count(*)::text FROM pg_listening_channels()", "0"),
        ("PREPARE mine AS SELECT 1", "SELECT count(*)::text FROM pg_prepared_statements WHERE name = 'mine'", "0"),
        ("SET work_mem = '3MB'", "SELECT (current_setting('work_mem') = '3MB')::text", "false"),
        ("SET work_mem = '3MB'; SELECT 1", "SELECT (current_setting('work_mem') = '3MB')::text", "false"),
        ("SELECT set_config('work_mem', '3MB', false)", "SELECT (current_setting('work_mem') = '3MB')::text", "false"),
        (
            "BEGIN; DECLARE mine CURSOR WITH HOLD FOR SELECT 1; COMMIT",
            "SELECT count(*)::text FROM pg_cursors WHERE name = 'mine'",
            "0",
        ),
    ],
    ids=lambda text: text[:24],
)
def test_what_lives_in_a_connection_stays_with_its_client_and_goes_with_it(
    pooled: tuple[Routed, Router, Router], leave: str, look: str, nothing: str
) -> None:
    routed, router, _ = pooled
    with connect(routed, router) as other:
        with connect(routed, router) as client:
            assert codes(client.ask(Q(leave))) == []
            if "pg_locks" not in look:  # a lock is seen by everybody
                for _ in range(3):
                    assert values(other.ask(Q(look))) == [nothing], "it leaks to another client"
            assert values(client.ask(Q(look))) != [nothing], "the client lost it"
        until(lambda: values(other.ask(Q(look))) == [nothing], "it outlives its client")
        assert pids([other]), "no connection is left"
