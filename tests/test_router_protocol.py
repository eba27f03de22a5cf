"""What a client with two shards behind it may rely on, message for message; and that no client, whatever it sends and
wherever it stops, keeps a connection, leaves something on one, or disturbs another client.

Mutated streams: SHARDMOVE_PROTOCOL is their number; the seed is the run's.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

import psycopg
import pytest

from router.server import Server
from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.inside import inside
from tests.support.rawclient import RawClient, codes, sqlstates, status, told, values
from tests.support.routed import SPLIT_AT, Routed, standing
from tests.support.router import Router

MUTATED: Final = int(os.environ.get("SHARDMOVE_PROTOCOL", "40"))
BOUND_S: Final = float(os.environ.get("SHARDMOVE_PROTOCOL_BOUND_S", "60"))
HERE, THERE = 7, SPLIT_AT + 7
"""Tenants of s1 and of s2."""
Q, P, B, E, d = wire.query, wire.parse, wire.bind, wire.execute, wire.copy_data
S, H, X, c = wire.SYNC, wire.FLUSH, wire.TERMINATE, wire.COPY_DONE
E0 = E(b"")
READ: Final = "SELECT note FROM items WHERE tenant_id = $1"
WRITE: Final = "INSERT INTO items (tenant_id, id) VALUES ($1, $2)"
until = partial(engine.until, timeout_s=BOUND_S)


@pytest.fixture(scope="module")
def both(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Routed, dict[str, Router]]]:
    with standing(servers, tmp_path_factory.mktemp("protocol")) as routed:
        for shard in ("s1", "s2"):
            routed.execute(shard, "CREATE TABLE note (a integer, b text)")
        yield (
            routed,
            {
                "session": routed.router(),
                "transaction": routed.router(pooling="transaction", servers_max=2, queue_timeout_s=BOUND_S),
            },
        )


@pytest.fixture
def routed(both: tuple[Routed, dict[str, Router]]) -> Routed:
    for shard, tenant in (("s1", HERE), ("s2", THERE)):
        both[0].execute(
            shard, f"TRUNCATE items; INSERT INTO items (tenant_id, id, note) VALUES ({tenant}, 1, '{shard}')"
        )
    return both[0]


@pytest.fixture(params=["session", "transaction"])
def router(request: pytest.FixtureRequest, both: tuple[Routed, dict[str, Router]]) -> Router:
    return both[1][request.param]


@pytest.fixture
def client(routed: Routed, router: Router) -> Iterator[RawClient]:
    with RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        yield client


def connect(routed: Routed, router: Router, **more: object) -> RawClient:
    return RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S, **more)  # type: ignore[arg-type]


def bound(name: bytes, *values: object) -> bytes:
    return B(b"", name, [str(value).encode() for value in values]) + E0


# --- prepared statements


@pytest.mark.parametrize("name", [b"", b"read"])
def test_a_statement_prepared_once_is_bound_to_keys_of_both_shards(client: RawClient, name: bytes) -> None:
    assert client.ask(P(name, READ), S)[0] == "1 "
    for _ in range(3):
        assert values(client.ask(bound(name, HERE), S)) == ["s1"]
        assert values(client.ask(bound(name, THERE), S)) == ["s2"]


def test_pipelined_units_reach_both_shards(client: RawClient) -> None:
    client.send(P(b"read", READ), *(part for tenant in (HERE, THERE) * 5 for part in (bound(b"read", tenant), S)))
    said = [told(client.until_ready()) for _ in range(10)]
    assert [values(each) for each in said] == [["s1"], ["s2"]] * 5


def test_a_unit_that_needs_two_shards_is_refused_and_the_client_goes_on(client: RawClient, routed: Routed) -> None:
    said = client.ask(P(b"w", WRITE), bound(b"w", HERE, 2), bound(b"w", THERE, 2), bound(b"w", HERE, 3), S)
    assert codes(said) == ["0A000"]
    assert status(said) == "I"
    for shard in ("s1", "s2"):
        assert routed.execute(shard, "SELECT count(*) FROM items") == [(1,)], "a refused unit has an effect"
    assert codes(client.ask(bound(b"w", THERE, 2), S)) == []
    assert codes(client.ask(bound(b"w", HERE, 2), S)) == []


def test_a_name_closed_and_given_again_means_the_new_text_on_both_shards(client: RawClient) -> None:
    client.ask(P(b"s", READ), S)
    for tenant in (HERE, THERE):
        client.ask(bound(b"s", tenant), S)
    client.ask(wire.close(b"S", b"s"), S)
    client.ask(P(b"s", "SELECT note || '!' FROM items WHERE tenant_id = $1"), S)
    assert values(client.ask(bound(b"s", THERE), S)) == ["s2!"]
    assert values(client.ask(bound(b"s", HERE), S)) == ["s1!"]


@pytest.mark.parametrize("name", [b"", b"s"], ids=["unnamed", "named"])
def test_a_name_closed_on_one_shard_is_gone_on_the_other_too(client: RawClient, name: bytes) -> None:
    for tenant in (THERE, HERE):
        assert codes(client.ask(P(name, READ), bound(name, tenant), wire.close(b"S", name), S)) == []
    assert codes(client.ask(P(name, READ), bound(name, THERE), S)) == []
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {HERE}"))) == ["s1"]
    assert codes(client.ask(wire.close(b"S", name), S)) == []
    client.ask(Q("BEGIN"))
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))) == ["s2"]
    assert codes(client.ask(wire.describe(b"S", name), S)) == ["26000"]
    client.ask(Q("ROLLBACK"))


@pytest.mark.parametrize("in_transaction", [False, True])
def test_deallocate_forgets_the_name_on_both_shards(client: RawClient, in_transaction: bool) -> None:
    client.ask(P(b"s", READ), S)
    for tenant in (HERE, THERE):
        client.ask(bound(b"s", tenant), S)
    if in_transaction:
        client.ask(Q("BEGIN"))
        client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {HERE}"))
    said = client.ask(Q("DEALLOCATE s"))
    assert told_tag(said) == "DEALLOCATE"
    if in_transaction:
        assert status(said) == "T"
        client.ask(Q("COMMIT"))
    assert codes(client.ask(bound(b"s", THERE), S)) == ["26000"]
    assert codes(client.ask(P(b"s", "SELECT note || '?' FROM items WHERE tenant_id = $1"), S)) == []
    for tenant, note in ((THERE, "s2?"), (HERE, "s1?")):
        assert values(client.ask(bound(b"s", tenant), S)) == [note]


def told_tag(said: Sequence[str]) -> str:
    return next(each[3:].rstrip("'").removesuffix("\\x00") for each in said if each[0] == "C")


def test_the_same_name_of_two_clients_means_two_texts(routed: Routed, router: Router) -> None:
    with connect(routed, router) as one, connect(routed, router) as other:
        one.ask(P(b"s", "SELECT 'one'"), S)
        other.ask(P(b"s", "SELECT 'other'"), S)
        for _ in range(3):
            assert values(one.ask(bound(b"s"), S)) == ["one"]
            assert values(other.ask(bound(b"s"), S)) == ["other"]


def test_parameter_types_belong_to_the_statement(client: RawClient) -> None:
    client.ask(P(b"a", "SELECT pg_typeof($1)::text", [23]), P(b"b", "SELECT pg_typeof($1)::text", [25]), S)
    assert values(client.ask(bound(b"a", 1), S)) == ["integer"]
    assert values(client.ask(bound(b"b", 1), S)) == ["text"]


def test_a_failed_parse_on_the_other_shard_leaves_the_statement(client: RawClient, routed: Routed) -> None:
    client.ask(P(b"s", "SELECT b FROM note, items WHERE tenant_id = $1"), S)
    routed.execute("s2", "ALTER TABLE note RENAME b TO other")
    try:
        assert codes(client.ask(bound(b"s", THERE), S)) != []
        assert codes(client.ask(bound(b"s", HERE), S)) == codes(client.ask(bound(b"s", HERE), S))
    finally:
        routed.execute("s2", "ALTER TABLE note RENAME other TO b")


# --- transactions


def test_a_transaction_floats_until_its_first_key(client: RawClient) -> None:
    for text in ("BEGIN", "SAVEPOINT a", "SET LOCAL work_mem = '9MB'", "SELECT 1"):
        assert status(client.ask(Q(text))) == "T"
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))) == ["s2"]
    assert values(client.ask(Q("SHOW work_mem"))) == ["9MB"]
    client.ask(Q(f"UPDATE items SET note = 'x' WHERE tenant_id = {THERE}"))
    assert told_tag(client.ask(Q("ROLLBACK TO a"))) == "ROLLBACK"
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))) == ["s2"]
    assert status(client.ask(Q("COMMIT"))) == "I"
    assert values(client.ask(Q("SHOW work_mem"))) != ["9MB"]


def test_a_floating_transaction_keeps_its_isolation(client: RawClient) -> None:
    client.ask(Q("BEGIN ISOLATION LEVEL SERIALIZABLE"))
    client.ask(Q("SELECT 1"))
    client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))
    assert values(client.ask(Q("SHOW transaction_isolation"))) == ["serializable"]
    client.ask(Q("COMMIT"))


def test_a_settings_rollback_to_a_savepoint_is_one_on_the_other_shard_too(client: RawClient) -> None:
    for text in ("BEGIN", "SAVEPOINT a", "SET work_mem = '9MB'", "ROLLBACK TO a", "SET work_mem = '7MB'", "COMMIT"):
        client.ask(Q(text))
    for text in ("BEGIN", "SAVEPOINT a", "SET work_mem = '9MB'", "ROLLBACK TO SAVEPOINT a", "COMMIT"):
        client.ask(Q(text))
    for tenant in (HERE, THERE):
        said = client.ask(Q(f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant}"))
        assert values(said) == ["7MB"]


def test_a_block_begun_in_a_script_does_not_get_lost_on_the_way_to_another_shard(
    client: RawClient, routed: Routed
) -> None:
    assert status(client.ask(Q("BEGIN; SELECT 1"))) == "T"
    said = client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({THERE}, 2)"))
    assert status(said) in "TE"
    assert status(client.ask(Q("ROLLBACK"))) == "I"
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(1,)], "the block was not one"


@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_a_statement_of_another_shard_fails_the_transaction_as_a_server_would(
    client: RawClient, routed: Routed, protocol: str
) -> None:
    client.ask(Q("BEGIN"))
    client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))
    if protocol == "simple":
        said = client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({THERE}, 2)"))
    else:
        said = client.ask(P(b"", WRITE), bound(b"", THERE, 2), S)
    assert codes(said) == ["0A000"]
    assert status(said) == "E"
    assert codes(client.ask(Q("SELECT 1"))) == ["25P02"]
    assert told_tag(client.ask(Q("COMMIT"))) == "ROLLBACK"
    for shard in ("s1", "s2"):
        assert routed.execute(shard, "SELECT count(*) FROM items") == [(1,)]


def test_a_refusal_before_any_shard_is_known_fails_the_transaction_too(client: RawClient) -> None:
    client.ask(Q("BEGIN"))
    said = client.ask(Q("UPDATE items SET amount = 1"))
    assert (codes(said), status(said)) == (["0A000"], "E")
    assert codes(client.ask(Q("SELECT 1"))) == ["25P02"]
    assert status(client.ask(Q("ROLLBACK"))) == "I"


def test_the_savepoint_before_a_refusal_saves_the_transaction(client: RawClient, routed: Routed) -> None:
    client.ask(Q("BEGIN"))
    client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))
    client.ask(Q("SAVEPOINT a"))
    assert status(client.ask(Q(f"DELETE FROM items WHERE tenant_id = {THERE}"))) == "E"
    assert status(client.ask(Q("ROLLBACK TO a"))) == "T"
    assert status(client.ask(Q("COMMIT"))) == "I"
    assert routed.execute("s1", "SELECT count(*) FROM items") == [(2,)]


@pytest.mark.parametrize("flushes", [False, True], ids=["at once", "after an answer"])
def test_a_unit_that_has_failed_goes_to_no_other_shard(client: RawClient, routed: Routed, flushes: bool) -> None:
    """Its first message fails at home, and the first key behind that is the other shard's."""
    for _ in range(10):
        before = [wire.describe(b"S", b"nobody's"), P(b"w", WRITE), P(b"w", WRITE)]
        if flushes:
            client.send(*before, wire.FLUSH)
            assert codes(told(client.until(b"E"))) == ["26000"]
            before = []
        again = [wire.close(b"S", b"w"), P(b"w", WRITE), bound(b"w", THERE, 2), wire.FLUSH]
        client.send(*before, *again, P(b"", READ), bound(b"", HERE), S)
        said = told(client.until(b"Z"))
        assert [each[0] for each in said] == (["Z"] if flushes else ["E", "Z"])
        assert codes(said) == ([] if flushes else ["26000"])
        assert codes(client.ask(bound(b"w", THERE, 2), S)) == ["26000"]
        assert values(client.ask(P(b"", READ), bound(b"", THERE), S)) == ["s2"]
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(1,)]


def test_an_earlier_error_in_a_pipeline_hides_a_refusal_and_later_refusals_say_their_own(client: RawClient) -> None:
    client.ask(P(b"w", WRITE), S)
    said = client.ask(P(b"", "SELECT 1/0 FROM items WHERE tenant_id = $1"), bound(b"", HERE), bound(b"w", THERE, 2), S)
    assert codes(said) in (["22012"], ["0A000"])
    client.ask(Q("BEGIN"))
    client.ask(bound(b"w", HERE, 5), S)
    said = client.ask(Q("SELECT count(*) FROM items"))
    assert "several" in "".join(said) or "one shard" in "".join(said)
    client.ask(Q("ROLLBACK"))


# --- COPY


@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_a_copy_goes_to_the_shard_of_its_rows(client: RawClient, routed: Routed, protocol: str) -> None:
    copy = "COPY items (tenant_id, id) FROM STDIN"
    client.send(*([Q(copy)] if protocol == "simple" else [P(b"", copy), bound(b""), S]))
    assert told(client.until(b"G"))[-1][0] == "G"
    said = client.ask(d(f"{THERE}\t2\n{THERE}".encode()), d(b"\t3\n"), c, *([] if protocol == "simple" else [S]))
    assert (told_tag(said), status(said)) == ("COPY 2", "I")
    assert routed.execute("s2", "SELECT id FROM items ORDER BY id") == [(1,), (2,), (3,)]
    assert routed.execute("s1", "SELECT count(*) FROM items") == [(1,)]


@pytest.mark.parametrize("protocol", ["simple", "extended"])
def test_a_copy_for_two_shards_is_refused_whole(client: RawClient, routed: Routed, protocol: str) -> None:
    copy = "COPY items (tenant_id, id) FROM STDIN"
    client.send(*([Q(copy)] if protocol == "simple" else [P(b"", copy), bound(b""), S]))
    client.until(b"G")
    rows = [d(f"{HERE}\t2\n".encode()), d(f"{THERE}\t2\n".encode()), d(b"late\t9\n"), c]
    said = client.ask(*rows, *([] if protocol == "simple" else [S]))
    assert (codes(said), status(said)) == (["0A000"], "I")
    for shard in ("s1", "s2"):
        assert routed.execute(shard, "SELECT count(*) FROM items") == [(1,)]
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))) == ["s2"]


@pytest.mark.parametrize("protocol", ["simple", "extended"])
@pytest.mark.parametrize(
    ("options", "data", "code"),
    [
        ("", b"x\t2\n", "22P02"),
        ("", f"{HERE}\t2\nx\t2\n".encode(), "22P02"),
        ("(FORMAT csv)", f"{HERE},2\r{THERE},2\r".encode(), "0A000"),
        ("(FORMAT csv, HEADER)", f"tenant_id,id\r{HERE},2\r{THERE},2\r".encode(), "0A000"),
    ],
)
def test_a_copy_whose_key_cannot_be_read_is_refused_whole(
    client: RawClient, routed: Routed, protocol: str, options: str, data: bytes, code: str
) -> None:
    copy = f"COPY items (tenant_id, id) FROM STDIN {options}"
    client.send(*([Q(copy)] if protocol == "simple" else [P(b"", copy), bound(b""), S]))
    client.until(b"G")
    said = client.ask(d(data), c, *([] if protocol == "simple" else [S]))
    assert (codes(said), status(said)) == ([code], "I")
    for shard in ("s1", "s2"):
        assert routed.execute(shard, "SELECT count(*) FROM items") == [(1,)]
    assert values(client.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))) == ["s2"]


def test_a_copy_with_another_delimiter_in_old_words_goes_where_its_rows_belong(
    client: RawClient, routed: Routed
) -> None:
    client.send(Q("COPY items (id, tenant_id) FROM STDIN USING DELIMITERS ';'"))
    client.until(b"G")
    said = client.ask(d(f"2;{THERE}\n".encode()), c)
    assert (told_tag(said), status(said)) == ("COPY 1", "I")
    assert routed.execute("s2", "SELECT id FROM items ORDER BY id") == [(1,), (2,)]


def test_a_copy_in_a_transaction_stays_on_its_shard(client: RawClient, routed: Routed) -> None:
    client.ask(Q("BEGIN"))
    client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))
    client.send(Q("COPY items (tenant_id, id) FROM STDIN"))
    client.until(b"GZ")
    said = client.ask(d(f"{THERE}\t2\n".encode()), c)
    assert (codes(said), status(said)) == (["0A000"], "E")
    client.ask(Q("ROLLBACK"))
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(1,)]


# --- settings


def test_settings_go_where_the_client_goes(client: RawClient) -> None:
    client.ask(Q("SET work_mem = '9MB'"))
    for tenant in (HERE, THERE, HERE):
        said = client.ask(Q(f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant}"))
        assert values(said) == ["9MB"]
    client.ask(Q("SET work_mem = '7MB'; SET search_path = public"))
    for tenant in (THERE, HERE):
        said = client.ask(Q(f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant}"))
        assert values(said) == ["7MB"]
    client.ask(Q("DISCARD ALL"))
    for tenant in (THERE, HERE):
        said = client.ask(Q(f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant}"))
        assert values(said) not in (["7MB"], ["9MB"])


def test_what_the_startup_packet_sets_is_set_everywhere_and_what_reset_goes_back_to(
    routed: Routed, router: Router
) -> None:
    parameters = [("options", "-c work_mem=9MB"), ("application_name", "it's\\ me")]
    with connect(routed, router, parameters=parameters) as client:
        for reset in ("SELECT 1", "RESET ALL", "DISCARD ALL"):
            client.ask(Q("SET work_mem = '7MB'"))
            client.ask(Q("RESET work_mem" if reset == "SELECT 1" else reset))
            for tenant in (HERE, THERE):
                text = "current_setting('work_mem') || current_setting('application_name')"
                said = client.ask(Q(f"SELECT {text} FROM items WHERE tenant_id = {tenant}"))
                assert values(said) == ["9MBit's\\ me"], reset


# --- cancelling


def test_a_running_statement_is_cancelled_and_an_idle_client_does_not_notice(
    client: RawClient, routed: Routed, router: Router
) -> None:
    cancel(router, client)
    assert values(client.ask(Q("SELECT 'idle'"))) == ["idle"]
    client.send(Q("SELECT pg_sleep(60)"))
    until(lambda: routed.execute("s1", ASLEEP) == [(1,)], "the statement did not begin")
    cancel(router, client)
    said = told(client.until_ready())
    assert (codes(said), status(said)) == (["57014"], "I")
    assert values(client.ask(Q("SELECT 'still here'"))) == ["still here"]


ASLEEP: Final = (
    "SELECT count(*)::integer FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
)


IN_LINE: Final = ASLEEP.replace("PgSleep", "advisory")


def cancel(router: Router, client: RawClient) -> None:
    """Returns when the router has closed the request's connection."""
    with socket.create_connection(("127.0.0.1", router.port), timeout=BOUND_S) as request:
        request.sendall(wire.cancel_request(client.pid, client.secret))
        assert request.recv(1) == b""


def test_a_wrong_secret_cancels_nothing(client: RawClient, routed: Routed, router: Router) -> None:
    with psycopg.connect(routed.dsns["s1"], autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(4712)")
        client.send(Q("SELECT pg_advisory_xact_lock(4712)"))
        until(lambda: routed.execute("s1", IN_LINE) == [(1,)], "the statement did not begin")
        client.secret = bytes(byte ^ 1 for byte in client.secret)
        cancel(router, client)
    assert codes(told(client.until_ready())) == []


def test_cancelling_one_of_many_that_share_a_server_hits_nobody_else(
    both: tuple[Routed, dict[str, Router]], routed: Routed
) -> None:
    """Cancels rain on a client that runs short statements; the one that shares its server never sees one."""
    router = both[1]["transaction"]
    with connect(routed, router) as struck, connect(routed, router) as other:
        stop = threading.Event()

        def rain() -> None:
            while not stop.is_set():
                cancel(router, struck)

        thread = threading.Thread(target=rain)
        thread.start()
        try:
            for _ in range(60):
                said = struck.ask(Q(f"SELECT note FROM items WHERE tenant_id = {HERE}"))
                assert codes(said) in ([], ["57014"])
                assert codes(other.ask(Q(f"SELECT note FROM items WHERE tenant_id = {HERE}"))) == []
        finally:
            stop.set()
            thread.join(BOUND_S)


# --- notifications


def test_notifications_reach_an_idle_client(routed: Routed, router: Router) -> None:
    with connect(routed, router) as listener, connect(routed, router) as speaker:
        listener.ask(Q("LISTEN news"))
        speaker.ask(Q("NOTIFY news, 'hello'"))
        assert told(listener.until(b"A"))[-1] == "A b'news\\x00hello\\x00'"
        listener.ask(Q(f"SELECT note FROM items WHERE tenant_id = {THERE}"))  # elsewhere: the listening one stays
        speaker.ask(Q("SELECT pg_notify('news', 'again')"))
        assert told(listener.until(b"A"))[-1] == "A b'news\\x00again\\x00'"


# --- ends


def test_a_terminate_in_a_transaction_rolls_it_back(routed: Routed, router: Router) -> None:
    with connect(routed, router) as client:
        client.ask(Q("BEGIN"))
        client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))
        client.send(X)
        assert client.until(b"") == []
    with connect(routed, router) as other:  # the row's key is free again
        assert codes(other.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))) == []


def test_what_was_flushed_and_never_synced_is_never_committed(routed: Routed, router: Router) -> None:
    """The server owes nothing then, and says I: yet a transaction of its own is open."""
    for _ in range(3):
        with connect(routed, router) as client:
            client.send(P(b"", WRITE), bound(b"", HERE, 2), H)
            assert told(client.until(b"C"))[-1].startswith("C 'INSERT 0 1")
        with connect(routed, router) as other:
            for _ in range(3):
                other.ask(Q(f"SELECT note FROM items WHERE tenant_id = {HERE}"))
    until_settled(routed, router)
    assert routed.execute("s1", "SELECT count(*) FROM items") == [(1,)]


STREAM: Final = b"".join(
    [
        P(b"w", WRITE),
        bound(b"w", HERE, 2),
        S,
        Q("BEGIN"),
        Q(f"UPDATE items SET note = 'x' WHERE tenant_id = {HERE}"),
        Q("COPY items (tenant_id, id) FROM STDIN"),
        d(f"{HERE}\t5\n".encode()),
        c,
        Q("COMMIT"),
        X,
    ]
)


def test_a_client_may_vanish_at_any_byte(routed: Routed, router: Router) -> None:
    with witness(routed, router):
        for end in range(0, len(STREAM), 3):
            with connect(routed, router) as client:
                client.send(STREAM[:end])
                if end % 2:
                    client.socket.shutdown(socket.SHUT_WR)
    until_settled(routed, router)
    count, notes = routed.execute("s1", f"SELECT count(*), min(note) FROM items WHERE tenant_id = {HERE} AND id <> 2")[
        0
    ]
    assert (count, notes) in ((1, "s1"), (2, "x")), "half of a transaction is there"


@contextmanager
def witness(routed: Routed, router: Router) -> Iterator[None]:
    """Another client works beside, on both shards, and sees nothing but its own."""
    stop, wrong = threading.Event(), list[object]()

    def work() -> None:
        with connect(routed, router) as client:
            client.ask(Q("SET work_mem = '13MB'"))
            while not stop.is_set():
                for shard, tenant in (("s1", HERE), ("s2", THERE)):
                    text = f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant} AND id = 1"
                    said = client.ask(Q(text))
                    if values(said) != ["13MB"]:
                        wrong.append((shard, said))

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(BOUND_S)
    assert not thread.is_alive(), "the other client hangs"
    assert not wrong, wrong[0]


def until_settled(routed: Routed, router: Router) -> None:
    """Nobody is connected, no connection is lent, and nothing is open on a shard."""
    until(lambda: all(row["database"] == "shardmove" for row in router.show("CLIENTS")), "the router still has clients")
    until(lambda: all(int(row["busy"]) == 0 for row in router.show("POOLS")), "a connection was not given back")
    for shard in ("s1", "s2"):
        until(lambda: routed.execute(shard, OPEN) == [(0,)], f"a transaction is open on {shard}")  # noqa: B023


OPEN: Final = (
    "SELECT count(*)::integer FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


# --- streams that make little sense


def sane(rng: random.Random) -> bytes:
    tenant = rng.choice([HERE, THERE])
    parts = [
        [Q(f"SELECT note FROM items WHERE tenant_id = {tenant}")],
        [Q("BEGIN"), Q(f"UPDATE items SET amount = 1 WHERE tenant_id = {tenant}"), Q("COMMIT")],
        [P(b"s", READ), bound(b"s", tenant), S, wire.close(b"S", b"s"), S],
        [P(b"", WRITE), bound(b"", tenant, rng.randrange(100, 10_000)), H, S],
        [Q("COPY items (tenant_id, id) FROM STDIN"), d(f"{tenant}\t{rng.randrange(100, 10_000)}\n".encode()), c],
        [Q("SET work_mem = '5MB'"), Q("SHOW work_mem")],
        [Q("SELECT count(*) FROM items"), Q("LISTEN x"), Q("SELECT 1; SELECT 2")],
    ]
    return b"".join(message for _ in range(4) for message in rng.choice(parts))


def mutated(rng: random.Random, stream: bytes) -> bytes:
    data = bytearray(stream)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case _:
                data[at] = rng.choice(b"QPBDECHSFdcfXpZ\0\xff")
        if not data:
            return stream
    return bytes(data)


def test_mutated_streams_disturb_nobody_and_leave_nothing(routed: Routed, router: Router) -> None:
    seed = os.environ["SHARDMOVE_SEED"]
    with witness(routed, router):
        for number in range(MUTATED):
            rng = random.Random(f"{seed} mutated {number}")
            stream = mutated(rng, sane(rng))
            print(f"stream {number} of seed {seed}: {stream!r}")
            with connect(routed, router) as client, suppress(ConnectionError):
                client.send(stream)
                if rng.random() < 0.7:
                    with suppress(OSError):  # it may be reset by now
                        client.socket.shutdown(socket.SHUT_WR)
                    drain(client)
            assert router.is_running, router.said
    until_settled(routed, router)


def drain(client: RawClient) -> None:
    """Reads to the end: a stream that ended is answered, or refused, in a bounded time."""
    while client.socket.recv(65_536):
        pass


@pytest.mark.parametrize(
    "stream",
    [
        b"Q\0\0\0\3",
        b"Q\0\0\0\0",
        b"Q\xff\xff\xff\xff",
        b"Q\x7f\xff\xff\xff",
        b"B\0\0\0\4",
        b"P\0\0\0\5x",
        wire.message(b"Q", b"SELECT 1"),
        wire.message(b"B", b"\0\0\xff\xff\xff\xff\xff\xff"),
        wire.message(b"E", b"x"),
        wire.message(b"p", b"again\0"),
        wire.message(b"!", b""),
    ],
    ids=repr,
)
def test_what_is_no_message_ends_the_connection_with_a_reason(routed: Routed, router: Router, stream: bytes) -> None:
    with connect(routed, router) as client:
        client.ask(Q("BEGIN"))
        client.ask(Q(f"UPDATE items SET amount = 1 WHERE tenant_id = {HERE}"))
        client.send(stream)
        found = list(client.messages())
    assert [state[:2] for state in sqlstates(found)] in (["08"], ["54"])
    until_settled(routed, router)


# --- servers that are lost


def kill_servers(routed: Routed, shard: str) -> None:
    routed.execute(
        shard,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
    )


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_a_connection_that_ended_while_nobody_looked_is_used_for_nothing(routed: Routed, pooling: str) -> None:
    """Its last words and the client's statement are found at once, and its end only behind both."""
    with (
        inside(routed.config_file, pooling=pooling) as it,
        RawClient(it.port, dbname=routed.dbname, bound_s=BOUND_S) as client,
    ):
        select = Q(f"SELECT note FROM items WHERE tenant_id = {HERE}")
        for _ in range(5):
            assert values(client.ask(select)) == ["s1"]
            [server] = [each for pool in it.router.pools.values() for each in pool.servers if each.shard == "s1"]
            last_words = wire.error_response("57P01", "terminating connection", severity="FATAL")

            def both(server: Server = server, last_words: bytes = last_words) -> None:
                server.data_received(last_words)
                it.session.data_received(select)
                server.transport.abort()

            it.call(both)
            assert values(told(client.until_ready())) == ["s1"]
        assert not it.troubles


def test_a_server_lost_while_idle_is_replaced_with_the_clients_settings(
    client: RawClient, routed: Routed, router: Router
) -> None:
    client.ask(Q("SET work_mem = '9MB'"))
    client.ask(P(b"s", READ), S)
    for tenant, shard in ((HERE, "s1"), (THERE, "s2")):
        assert values(client.ask(bound(b"s", tenant), S)) == [shard]
    for shard in ("s1", "s2"):
        kill_servers(routed, shard)
    until(lambda: router.show("SERVERS") == [], "the router does not notice")
    for tenant, shard in ((HERE, "s1"), (THERE, "s2")):
        assert values(client.ask(bound(b"s", tenant), S)) == [shard]
        said = client.ask(Q(f"SELECT current_setting('work_mem') FROM items WHERE tenant_id = {tenant}"))
        assert values(said) == ["9MB"]


def test_a_server_lost_in_a_transaction_ends_the_client(client: RawClient, routed: Routed, router: Router) -> None:
    client.ask(Q("BEGIN"))
    client.ask(Q(f"INSERT INTO items (tenant_id, id) VALUES ({HERE}, 2)"))
    kill_servers(routed, "s1")
    found = []
    with suppress(ConnectionError):
        client.send(Q("COMMIT"))
        found = list(client.messages())
    assert b"Z" not in {kind for kind, _, _ in found}
    until_settled(routed, router)
    assert routed.execute("s1", "SELECT count(*) FROM items") == [(1,)]


def test_a_server_lost_in_the_middle_of_a_reply_ends_the_client(
    client: RawClient, routed: Routed, router: Router
) -> None:
    client.send(Q("SELECT repeat('x', 1000), pg_sleep(CASE WHEN i = 100 THEN 60 END) FROM generate_series(1, 200) i"))
    until(lambda: routed.execute("s1", ASLEEP) == [(1,)], "the statement did not begin")
    kill_servers(routed, "s1")
    found = list(client.messages())
    assert "Z" not in {kind.decode() for kind, _, _ in found}
    assert set(sqlstates(found)) <= {"57P01", "08006"}
    assert sqlstates(found)
    until_settled(routed, router)


def test_psycopg_prepares_forgets_and_prepares_again(routed: Routed, router: Router) -> None:
    """More statements than it keeps: DEALLOCATE comes in the middle of transactions."""
    with psycopg.connect(router.dsn(routed.dbname), prepare_threshold=0) as connection:
        connection.prepared_max = 3
        for number in range(12):
            text = f"SELECT note, {number} FROM items WHERE tenant_id = %s"
            assert connection.execute(text.encode(), (HERE,)).fetchone() == ("s1", number)
            if number % 4 == 3:
                connection.commit()
