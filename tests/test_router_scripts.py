"""Several statements in one message or unit, ends of transactions among them, and hints: each row on its own shard.

And what a client may rely on while ranges move: nothing is written twice, and a write that the router does not see in
a statement's text is one, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from shardmove.coordinator.phases import change_phase
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.moves import State
from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.rawclient import RawClient, codes, status, told
from tests.support.routed import SPLIT_AT, Routed, standing
from tests.support.router import Router, Routers
from tests.support.servers import Databases
from tests.support.world import World

BOUND_S = 60.0
until = partial(engine.until, timeout_s=BOUND_S)
HERE, THERE = 5, SPLIT_AT + 100
"""Tenants of s1, which is home, and of s2."""
TENANT = 30
"""Of the moving range."""
UPDATE = f"UPDATE tenants SET version = version + 1 WHERE tenant_id = {TENANT}"
READ = f"SELECT version FROM tenants WHERE tenant_id = {TENANT}"


def one(text: str | bytes) -> bytes:
    """A statement of the extended protocol, without its Sync."""
    return wire.parse(b"", text) + wire.bind(b"", b"", ()) + wire.execute(b"")


def insert(tenant: int) -> str:
    return f"INSERT INTO items (tenant_id, id) VALUES ({tenant}, 1)"


@pytest.fixture(scope="module")
def both(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Routed, dict[str, Router]]]:
    with standing(servers, tmp_path_factory.mktemp("scripts")) as routed:
        for shard in ("s1", "s2"):
            routed.execute(
                shard,
                "CREATE PROCEDURE ins(k int) LANGUAGE sql AS $$ INSERT INTO items (tenant_id, id) VALUES (k, 1) $$",
            )
        yield routed, {pooling: routed.router(pooling=pooling) for pooling in ("session", "transaction")}


@pytest.fixture
def routed(both: tuple[Routed, dict[str, Router]]) -> Routed:
    for shard in ("s1", "s2"):
        both[0].execute(shard, "TRUNCATE items")
    return both[0]


@pytest.fixture(params=["session", "transaction"])
def client(
    routed: Routed, both: tuple[Routed, dict[str, Router]], request: pytest.FixtureRequest
) -> Iterator[RawClient]:
    with RawClient(both[1][request.param].port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        yield client


def rows(routed: Routed) -> dict[str, list[int]]:
    return {
        shard: [tenant for (tenant,) in routed.execute(shard, "SELECT tenant_id FROM items ORDER BY 1")]
        for shard in ("s1", "s2")
    }


# --- scripts


def test_what_says_later_where_it_goes_stands_alone(client: RawClient, routed: Routed) -> None:
    """COPY by its rows, PREPARE by its arguments, a hint by what comes behind it."""
    for script in (
        "SELECT 1; COPY items (tenant_id, id) FROM STDIN",
        "SET work_mem = '8MB'; COPY items (tenant_id, id) FROM STDIN",
        "BEGIN; COPY items (tenant_id, id) FROM STDIN",
        f"PREPARE q(bigint) AS INSERT INTO items (tenant_id, id) VALUES ($1, 1); EXECUTE q({THERE})",
        f"SET shardmove.key = '{THERE}'; CALL ins({THERE})",
    ):
        said = client.ask(wire.query(script))
        assert codes(said) == ["0A000"], script
        assert status(said) == "I", script
    assert rows(routed) == {"s1": [], "s2": []}


@pytest.mark.parametrize("how", ["script", "pipeline", "pipeline with a block", "copy"])
def test_behind_the_end_of_a_failed_transaction_rows_go_where_they_belong(
    client: RawClient, routed: Routed, how: str
) -> None:
    client.ask(wire.query("BEGIN"))
    client.ask(wire.query(insert(HERE)))
    assert status(client.ask(wire.query("SELECT 1/0"))) == "E"
    match how:
        case "script":
            said = client.ask(wire.query(f"ROLLBACK; {insert(THERE)}"))
        case "copy":
            said = client.ask(wire.query("ROLLBACK; COPY items (tenant_id, id) FROM STDIN"))
        case "pipeline":
            said = client.ask(one("ROLLBACK"), one(insert(THERE)), wire.SYNC)
        case _:
            said = client.ask(one("ROLLBACK"), one("BEGIN"), one(insert(THERE)), one("COMMIT"), wire.SYNC)
    assert codes(said) == ["0A000"]
    client.ask(wire.query("ROLLBACK"))
    assert rows(routed) == {"s1": [], "s2": []}
    assert codes(client.ask(wire.query(insert(THERE)))) == []
    assert rows(routed) == {"s1": [], "s2": [THERE]}


def test_behind_the_end_of_a_failed_transaction_the_same_shard_goes_on(client: RawClient, routed: Routed) -> None:
    for tenant, unit in (
        (HERE, (wire.query(f"ROLLBACK; {insert(HERE)}"),)),
        (HERE + 1, (one("ROLLBACK"), one(insert(HERE + 1)), wire.SYNC)),
    ):
        client.ask(wire.query("BEGIN"))
        client.ask(wire.query(insert(HERE + 50)))
        assert status(client.ask(wire.query("SELECT 1/0"))) == "E"
        said = client.ask(*unit)
        assert codes(said) == []
        assert status(said) == "I"
        assert tenant in rows(routed)["s1"]
    assert rows(routed) == {"s1": [HERE, HERE + 1], "s2": []}


def test_a_failed_transaction_takes_nothing_but_its_end(client: RawClient, routed: Routed) -> None:
    client.ask(wire.query("BEGIN"))
    client.ask(wire.query(insert(HERE)))
    client.ask(wire.query("SELECT 1/0"))
    for text in (insert(THERE), insert(HERE + 1), f"{insert(THERE)}; ROLLBACK"):
        said = client.ask(wire.query(text))
        assert codes(said) == ["25P02"], text
        assert status(said) == "E", text
    assert codes(client.ask(one(insert(THERE)), wire.SYNC)) == ["25P02"]
    client.ask(wire.query("ROLLBACK"))
    assert rows(routed) == {"s1": [], "s2": []}


# --- settings that say how a key is read


class Timed(Routed):
    """Beside the others a table that is split by times, and one that is split by names."""

    def __init__(self, databases: Databases, directory: Path, routers: Routers) -> None:
        super().__init__(databases, directory, routers)
        for shard in ("s1", "s2"):
            self.execute(shard, "CREATE TABLE times (at timestamptz PRIMARY KEY); CREATE TABLE names (name text)")

    def _document(self) -> str:
        document = super()._document()
        for name, type_, column, bound in (
            ("times", "timestamptz", "at", "2026-01-01 00:00:00+00:00"),
            ("names", "text", "name", "n"),
        ):
            document += f"""
[keyspaces.{name}]
key_type = "{type_}"
[keyspaces.{name}.tables]
{name} = "{column}"
[[keyspaces.{name}.routes]]
range = ':"{bound}"'
shard = "s1"
[[keyspaces.{name}.routes]]
range = '"{bound}":'
shard = "s2"
"""
        return document


@pytest.fixture(scope="module")
def timed(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Timed, dict[str, Router]]]:
    with standing(servers, tmp_path_factory.mktemp("timed"), Timed) as timed:
        yield timed, {pooling: timed.router(pooling=pooling) for pooling in ("session", "transaction")}


@pytest.fixture(params=["session", "transaction"])
def in_time(timed: tuple[Timed, dict[str, Router]], request: pytest.FixtureRequest) -> Iterator[RawClient]:
    for shard in ("s1", "s2"):
        timed[0].execute(shard, "TRUNCATE times, names, items")
    with RawClient(timed[1][request.param].port, dbname=timed[0].dbname, bound_s=BOUND_S) as client:
        assert codes(client.ask(wire.query("SET TIME ZONE 'UTC'"))) == []
        yield client


def count(timed: tuple[Timed, dict[str, Router]], table: str) -> list[int]:
    return [timed[0].execute(shard, f"SELECT count(*) FROM {table}")[0][0] for shard in ("s1", "s2")]


TOKYO = "SET TIME ZONE 'Asia/Tokyo'"
LOCAL = "SET LOCAL TIME ZONE 'Asia/Tokyo'"
AT = "INSERT INTO times (at) VALUES ('2026-01-01 03:00:00')"
"""In UTC a time of s2, in Tokyo one of s1."""


@pytest.mark.parametrize(
    "unit",
    [
        [wire.query(f"{TOKYO}; {AT}")],
        [wire.query(f"BEGIN; {LOCAL}; {AT}; COMMIT")],
        [wire.query(f"SELECT set_config('TimeZone', 'Asia/Tokyo', false); {AT}")],
        [wire.query(f"SELECT 1, set_config('TimeZone', 'Asia/Tokyo', false); {AT}")],
        [one(TOKYO), one(AT), wire.SYNC],
        [one("RESET ALL"), one(AT), wire.SYNC],
        [one("SELECT set_config('TimeZone', 'Asia/Tokyo', true)"), one(AT), wire.SYNC],
        [one("BEGIN"), one(LOCAL), one(AT), one("COMMIT"), wire.SYNC],
    ],
)
def test_a_time_zone_set_in_the_same_unit_is_not_known_yet(
    in_time: RawClient, timed: tuple[Timed, dict[str, Router]], unit: list[bytes]
) -> None:
    assert codes(in_time.ask(*unit)) == ["0A000"]
    in_time.ask(wire.query("ROLLBACK"))
    assert count(timed, "times") == [0, 0]


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("is_script", [True, False])
def test_a_time_zone_that_ends_with_its_transaction_in_the_same_unit_is_not_known_yet(
    in_time: RawClient, timed: tuple[Timed, dict[str, Router]], end: str, is_script: bool
) -> None:
    in_time.ask(wire.query("BEGIN"))
    assert codes(in_time.ask(wire.query(LOCAL))) == []
    said = in_time.ask(wire.query(f"{end}; {AT}")) if is_script else in_time.ask(one(end), one(AT), wire.SYNC)
    assert codes(said) == ["0A000"]
    in_time.ask(wire.query("ROLLBACK"))
    assert count(timed, "times") == [0, 0]


def test_a_time_zone_set_before_is_known(in_time: RawClient, timed: tuple[Timed, dict[str, Router]]) -> None:
    assert codes(in_time.ask(one(TOKYO), wire.SYNC)) == []
    assert codes(in_time.ask(one("BEGIN"), one(AT), one("COMMIT"), wire.SYNC)) == []
    assert count(timed, "times") == [1, 0]
    in_time.ask(wire.query("BEGIN"))
    in_time.ask(wire.query("SET LOCAL TIME ZONE 'UTC'"))
    assert codes(in_time.ask(wire.query(AT))) == []
    in_time.ask(wire.query("COMMIT"))
    assert count(timed, "times") == [1, 1]


@pytest.mark.parametrize("setting", [TOKYO, "SET work_mem = '8MB'"])
def test_keys_that_no_setting_changes_are_routed_beside_any(
    in_time: RawClient, timed: tuple[Timed, dict[str, Router]], setting: str
) -> None:
    for text in (
        insert(THERE),
        "INSERT INTO times (at) VALUES ('2026-01-01 03:00:00+00')",
        "INSERT INTO names (name) VALUES ('x')",
    ):
        assert codes(in_time.ask(wire.query(f"{setting}; {text}"))) == [], text
        assert (
            codes(in_time.ask(one(setting), one(text.replace("03:00", "04:00").replace(", 1)", ", 2)")), wire.SYNC))
            == []
        )
    assert [count(timed, table) for table in ("items", "times", "names")] == [[0, 2]] * 3


def test_letters_go_by_the_encoding_that_is_known(in_time: RawClient, timed: tuple[Timed, dict[str, Router]]) -> None:
    text = "INSERT INTO names (name) VALUES ('ä')"
    assert codes(in_time.ask(one("SET work_mem = '8MB'"), one(text), wire.SYNC)) == []
    assert codes(in_time.ask(one("SET client_encoding = 'LATIN1'"), one(text), wire.SYNC)) == ["0A000"]
    assert count(timed, "names") == [0, 1]


@pytest.mark.parametrize(
    "setting", ["SET TIME ZONE 'Asia/Tokyo'", "SET client_encoding = 'LATIN1'"], ids=["zone", "encoding"]
)
def test_keys_of_copy_are_read_by_the_sessions_settings(
    in_time: RawClient, timed: tuple[Timed, dict[str, Router]], setting: str
) -> None:
    is_zone = "ZONE" in setting
    copy, row = (
        ("COPY times (at) FROM STDIN", b"2026-01-01 03:00:00\n")
        if is_zone
        else ("COPY names (name) FROM STDIN", "ä\n".encode())
    )
    assert codes(in_time.ask(wire.query(setting))) == []
    in_time.send(wire.query(copy))
    in_time.until(b"G")
    said = in_time.ask(wire.copy_data(row), wire.COPY_DONE)
    assert codes(said) == ([] if is_zone else ["0A000"])
    assert count(timed, "times" if is_zone else "names") == ([1, 0] if is_zone else [0, 0])
    in_time.send(one(setting), one(copy), wire.SYNC)
    in_time.until(b"GEZ")
    assert codes(in_time.ask(wire.copy_data(row), wire.COPY_DONE, wire.SYNC)) == ["0A000"]


# --- hints


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize(
    "setting", ["SET LOCAL shardmove.key = '{}'", "SELECT set_config('shardmove.key', '{}', true)"]
)
def test_a_local_hint_counts_at_once_and_ends_with_its_transaction(
    client: RawClient, routed: Routed, setting: str, end: str
) -> None:
    client.ask(wire.query("BEGIN"))
    client.ask(wire.query(setting.format(THERE)))
    assert codes(client.ask(wire.query(f"CALL ins({THERE})"))) == []
    client.ask(wire.query(end))
    assert codes(client.ask(wire.query(insert(HERE)))) == []
    assert rows(routed) == {"s1": [HERE], "s2": [THERE] if end == "COMMIT" else []}


def test_a_hint_is_rolled_back_with_its_transaction_and_its_savepoint(client: RawClient, routed: Routed) -> None:
    hint = f"SET shardmove.key = '{THERE}'"
    for text in ("BEGIN", hint, "ROLLBACK", f"CALL ins({HERE})"):
        assert codes(client.ask(wire.query(text))) == [], text
    for text in ("BEGIN", "SAVEPOINT a", hint, "ROLLBACK TO a", f"CALL ins({HERE + 1})", "COMMIT"):
        assert codes(client.ask(wire.query(text))) == [], text
    assert rows(routed) == {"s1": [HERE, HERE + 1], "s2": []}
    for text in ("BEGIN", hint, "COMMIT", f"CALL ins({THERE})"):
        assert codes(client.ask(wire.query(text))) == [], text
    assert rows(routed)["s2"] == [THERE]


def test_a_hint_counts_for_what_comes_behind_it_in_its_unit(client: RawClient, routed: Routed) -> None:
    hint = f"SET LOCAL shardmove.key = '{THERE}'"
    said = client.ask(one("BEGIN"), one(hint), one(f"CALL ins({THERE})"), one("COMMIT"), wire.SYNC)
    assert codes(said) == []
    assert rows(routed) == {"s1": [], "s2": [THERE]}


# --- moving ranges


@pytest.fixture
def router(world: World, routers: Routers) -> Router:
    for shard in ("s1", "s2"):
        with world.connect(shard) as connection:
            connection.execute(
                f"CREATE FUNCTION bump() RETURNS int LANGUAGE plpgsql AS $$ BEGIN {UPDATE}; RETURN 1; END $$".encode()
            )
            connection.execute(f"CREATE PROCEDURE bumped() LANGUAGE plpgsql AS $$ BEGIN {UPDATE}; END $$".encode())
            connection.execute(
                "CREATE PROCEDURE twice() LANGUAGE plpgsql AS "
                f"$$ BEGIN {UPDATE}; COMMIT; PERFORM pg_advisory_lock(7); {UPDATE}; END $$".encode()
            )
    return routers.start(world.write_config(), target_patience_s=BOUND_S)


def connected(world: World, router: Router) -> RawClient:
    return RawClient(router.port, dbname=str(conninfo_to_dict(world.dsns["s1"])["dbname"]), bound_s=BOUND_S)


def version(world: World, shard: str) -> int:
    return int(world.fetch(shard, READ)[0][0])


LOCK = "SELECT pg_advisory_lock(7)"


@pytest.mark.parametrize("how", ["script", "blocks", "pipeline", "procedure"])
def test_what_is_committed_is_not_said_again(world: World, router: Router, how: str) -> None:
    """Between its commit and its second write the range changes hands: the fence refuses that, and it stays refused."""
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    before = version(world, "s1")
    units = {
        "script": [wire.query(f"{UPDATE}; COMMIT; {LOCK}; {UPDATE}")],
        "blocks": [wire.query(f"BEGIN; {UPDATE}; COMMIT; {LOCK}; BEGIN; {UPDATE}; COMMIT")],
        "pipeline": [one("BEGIN"), one(UPDATE), one("COMMIT"), one(LOCK), one(UPDATE), wire.SYNC],
        "procedure": [wire.query(f"/* shardmove: key={TENANT} */ CALL twice()")],
    }
    with connected(world, router) as client, world.connect("s1") as blocker:
        blocker.execute("SELECT pg_advisory_lock(7)")
        client.send(*units[how])
        until(lambda: version(world, "s1") == before + 1, "the first write does not come through")
        world.cut_over(move_id)
        blocker.execute("SELECT pg_advisory_unlock(7)")
        said = told(client.until_ready())
        assert codes(said) == ["40001"]
        assert version(world, "s2") == before + 1


def fourth_phase(world: World, router: Router) -> str:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        change_phase(held, 4, share=1.0, force=True)
    until(lambda: any(str(row["phase"]).startswith("4") for row in router.show("MOVES")), "no phase 4")
    return move_id


def test_reads_that_begin_more_than_themselves_stay_at_the_owner(world: World, router: Router) -> None:
    """In phase 4; with a block, or a write behind it, the read's shard is the write's."""
    fourth_phase(world, router)
    with connected(world, router) as client:
        for unit in (
            (one("BEGIN"), one(READ), wire.SYNC),
            (wire.query(f"BEGIN; {READ}"),),
            (one(READ), one(UPDATE), wire.SYNC),
            (one(READ), wire.FLUSH, one(UPDATE), wire.SYNC),
        ):
            assert codes(client.ask(*unit)) == []
            assert codes(client.ask(wire.query(UPDATE))) == []
            if status(client.ask(wire.query("COMMIT"))) != "I":
                pytest.fail("the block does not end")


@pytest.mark.parametrize(
    "text",
    [
        f"/* shardmove: key={TENANT} */ SELECT bump()",
        f"/* shardmove: key={TENANT} */ CALL bumped()",
        f"SELECT bump() FROM tenants WHERE tenant_id = {TENANT}",
        "SELECT bump()",
        "CALL bumped()",
        f"DO $$ BEGIN {UPDATE}; END $$",
    ],
)
def test_a_client_reads_what_it_wrote_by_a_function(world: World, router: Router, text: str) -> None:
    """In phase 4, where it reads at the target: its write is acknowledged once the target has it."""
    fourth_phase(world, router)
    with connected(world, router) as client:
        for _ in range(3):
            before = version(world, "s1")
            assert codes(client.ask(wire.query(text))) == []
            assert version(world, "s2") == before + 1 == version(world, "s1")


def test_a_statement_with_a_writing_function_waits_for_a_cutover(world: World, router: Router) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    before, done, stop = version(world, "s1"), [0], threading.Event()
    errors: list[list[str]] = []

    def work() -> None:
        with connected(world, router) as client:
            while not stop.is_set():
                said = client.ask(wire.query(f"SELECT bump() FROM tenants WHERE tenant_id = {TENANT}"))
                done[0] += not codes(said)
                if codes(said):
                    errors.append(said)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        until(lambda: done[0] > 10, "nothing is written")
        world.cut_over(move_id)
        count = done[0]
        until(lambda: done[0] > count + 10, "nothing is written after the cutover")
    except ShardmoveError as error:
        pytest.fail(str(error))
    finally:
        stop.set()
        thread.join(BOUND_S)
    assert not errors
    assert version(world, "s2") == before + done[0]
