"""What has to wait, and what ends the wait: a cancel, a connection that dies, a catalog that is away, a full buffer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.catalog.routers import LISTED_FOR_S
from shardmove.config import STALE_AFTER_MAX_S, RouterSettings
from shardmove.coordinator.phases import change_phase
from shardmove.domain.errors import ConfigurationError
from shardmove.domain.moves import State
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.rawclient import RawClient, codes, told, values
from tests.support.replacing import replaced
from tests.support.routed import Routed
from tests.support.router import Router, Routers
from tests.support.servers import connect
from tests.support.world import World

BOUND_S = 60.0
until = partial(engine.until, timeout_s=BOUND_S)
TENANT = 30
UPDATE = f"UPDATE tenants SET version = version + 1 WHERE tenant_id = {TENANT}"
READ = f"SELECT version FROM tenants WHERE tenant_id = {TENANT}"
COPY = "COPY items (tenant_id, id) FROM STDIN"


class Line:
    """A server's address that can be cut, or held up on the way to the server."""

    def __init__(self, dsn: str) -> None:
        known = conninfo_to_dict(dsn)
        self.flows = threading.Event()
        self.flows.set()
        self._path = f"{known['host']}/.s.PGSQL.{known['port']}"
        self._is_cut = False
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo("", **{**known, "host": "127.0.0.1", "port": self._listener.getsockname()[1]})
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                self._ends += [near, far]
                if self._is_cut:
                    near.close()
                    continue
                far.connect(self._path)
                for args in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=args, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_gated: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_gated:
                    self.flows.wait()
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._is_cut = True
        for each in self._ends:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.flows.set()

    def close(self) -> None:
        self.cut()
        self._listener.close()


@contextmanager
def line_in(config: Path, dsn: str) -> Iterator[Line]:
    """The configuration names it instead of the server."""
    line = Line(dsn)
    text = config.read_text(encoding="utf-8")
    assert text.count(f'dsn = "{dsn}"') == 1
    config.write_text(text.replace(f'dsn = "{dsn}"', f'dsn = "{line.dsn}"'), encoding="utf-8")
    try:
        yield line
    finally:
        line.close()


def client(router: Router, dsn: str) -> RawClient:
    return RawClient(router.port, dbname=str(conninfo_to_dict(dsn)["dbname"]), bound_s=BOUND_S)


def await_state(router: Router, asked: RawClient, state: str) -> None:
    until(
        lambda: any(row["pid"] == str(asked.pid) and row["state"] == state for row in router.show("CLIENTS")),
        f"the client is never {state}",
    )


def cancel(router: Router, asked: RawClient) -> None:
    with socket.create_connection(("127.0.0.1", router.port)) as connection:
        connection.sendall(wire.cancel_request(asked.pid, asked.secret))
        assert connection.recv(1) == b""  # the router has taken it in


def executed(statement: str) -> tuple[bytes, ...]:
    return wire.parse(b"", statement.encode(), ()), wire.bind(b"", b"", ()), wire.execute(b"")


def enter_phase_4(world: World, router: Router) -> str:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.hold(move_id) as held:
        change_phase(held, 4, share=1.0, force=True)
    until(lambda: [row["phase"] for row in router.show("MOVES")] == ["4"], "the router never hears of phase 4")
    return move_id


@contextmanager
def blocked_mirror(world: World) -> Iterator[psycopg.Connection]:
    """Nothing can be written to the target's table, nor read."""
    with world.connect("s2") as blocker:
        blocker.execute("BEGIN")
        blocker.execute("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE")
        yield blocker
        with suppress(psycopg.Error):
            blocker.execute("ROLLBACK")


# --- phase 4: a commit that the other side does not have yet


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[None]:
    """Routers whose mirror waits for as long as the test blocks it, also where that takes some seconds."""
    with replaced(tmp_path, f"from router import mirroring\nmirroring.WAIT_MS = {int(BOUND_S * 1000)}"):
        yield


@pytest.mark.usefixtures("patient")
def test_a_cancel_while_a_commit_is_acknowledged_late_changes_nothing(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), target_patience_s=BOUND_S)
    enter_phase_4(world, router)
    with client(router, world.dsns["s1"]) as a:
        with blocked_mirror(world) as blocker:
            a.query(UPDATE)
            await_state(router, a, "waiting")
            cancel(router, a)
            blocker.execute("ROLLBACK")
            said = told(a.until_ready())
        assert codes(said) == []
        assert values(a.ask(wire.query("SELECT 'mine'"))) == ["mine"], "replies are out of step"
        assert values(a.ask(wire.query(READ))) == ["1"]


@pytest.mark.usefixtures("patient")
def test_rows_before_a_late_acknowledgement_are_not_kept_and_the_commit_is(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), target_patience_s=BOUND_S)
    enter_phase_4(world, router)
    with client(router, world.dsns["s1"]) as a:
        a.ask(wire.query("BEGIN"))
        a.ask(wire.query(UPDATE))
        before = router.memory_bytes()
        a.query(f"SELECT repeat('x', 1000000) FROM generate_series(1, 200) WHERE EXISTS ({READ})")
        a.until(b"D", keep_max=10)
        assert router.memory_bytes() - before < 80 << 20
        a.until_ready(keep_max=10)
        a.ask(wire.query("COMMIT"))
        with blocked_mirror(world) as blocker:
            a.query(f"{UPDATE} RETURNING repeat('x', 600000)")
            await_state(router, a, "waiting")
            there = a.socket.recv(1 << 20, socket.MSG_PEEK)
            assert there[:1] == b"T"
            assert b"UPDATE 1" not in there, "the client hears of a commit that is not mirrored"
            blocker.execute("ROLLBACK")
            assert told(a.until_ready())[-1] == "Z 'I'"


BEHIND: dict[str, tuple[bytes, ...]] = {
    "nothing": (wire.SYNC,),
    "an error": (*executed("SELECT 1 / 0"), wire.SYNC),
    "a transaction": (*executed("BEGIN"), *executed("SELECT 7"), wire.SYNC),
    "a commit": (*executed("BEGIN"), *executed(UPDATE), *executed("COMMIT"), wire.SYNC),
    "a write": (*executed(UPDATE), wire.SYNC),
    "a flush": (wire.FLUSH,),
    "a flush and a write": (wire.FLUSH, *executed(UPDATE), wire.SYNC),
    "many rows": (*executed("SELECT repeat('x', 1000000) FROM generate_series(1, 200)"), wire.SYNC),
}
"""Messages behind a COMMIT, before the client hears of it."""


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("behind", BEHIND)
def test_whatever_is_behind_a_commit_its_word_waits_until_the_other_side_has_it(
    world: World, routers: Routers, behind: str
) -> None:
    router = routers.start(world.write_config(), target_patience_s=BOUND_S)
    enter_phase_4(world, router)
    with client(router, world.dsns["s1"]) as a:
        a.ask(wire.query("BEGIN"))
        a.ask(wire.query(UPDATE))
        with blocked_mirror(world) as blocker:
            before = router.memory_bytes()
            a.send(*executed("COMMIT"), *BEHIND[behind])
            await_state(router, a, "waiting")
            a.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                a.socket.recv(1, socket.MSG_PEEK)
            assert router.memory_bytes() - before < 40 << 20
            blocker.execute("ROLLBACK")
        a.socket.settimeout(BOUND_S)
        if behind == "a flush":
            a.until(b"C")
            a.send(wire.SYNC)
        said = told([message for message in a.until_ready() if message[0] != b"D"])
        assert codes(said) == (["22012"] if behind == "an error" else [])
        assert said[-1] == ("Z 'T'" if behind == "a transaction" else "Z 'I'")
        a.ask(wire.query("ROLLBACK"))
        times = 1 + (behind in ("a commit", "a write", "a flush and a write"))
        assert values(a.ask(wire.query(READ))) == [str(times)]
        assert [row["phase"] for row in router.show("MOVES")] == ["4"]


def test_what_names_no_key_does_not_follow_a_read_to_the_target(world: World, routers: Routers) -> None:
    """Nobody would answer it in time where the target does not."""
    router = routers.start(world.write_config(), target_patience_s=BOUND_S)
    enter_phase_4(world, router)
    with client(router, world.dsns["s1"]) as a:
        assert values(a.ask(wire.query(READ))) == ["0"]
        with blocked_mirror(world):
            assert codes(a.ask(wire.parse(b"one", UPDATE.encode(), ()), wire.SYNC)) == []


def test_a_pause_is_not_the_targets_fault(world: World, routers: Routers) -> None:
    """A read that waits for longer than the target may take goes there all the same, and leaves phase 4 alone."""
    patience_s = 3.0
    router = routers.start(world.write_config(), target_patience_s=patience_s, pooling="transaction")
    enter_phase_4(world, router)
    with client(router, world.dsns["s1"]) as a, psycopg.connect(router.dsn("shardmove"), autocommit=True) as console:
        a.ask(wire.query(READ))  # there is a connection now
        console.execute("PAUSE")
        began = time.monotonic()
        a.query(READ)
        await_state(router, a, "held")
        until(lambda: time.monotonic() > began + patience_s + 0.5, "")
        console.execute("RESUME")
        assert values(told(a.until_ready())) == ["0"]
        assert [row["phase"] for row in router.show("MOVES")] == ["4"]


def test_with_catalog_and_target_away_a_commit_is_acknowledged(world: World, routers: Routers) -> None:
    config = world.write_config()
    with line_in(config, world.dsns["cat"]) as line:
        router = routers.start(config, confirm_s=1.0, target_patience_s=0.2)
        enter_phase_4(world, router)
        with client(router, world.dsns["s1"]) as a, blocked_mirror(world):
            a.ask(wire.query("BEGIN"))
            a.ask(wire.query(UPDATE))
            line.cut()
            assert codes(a.ask(wire.query("COMMIT"))) == []


# --- routes that the catalog does not confirm


def test_who_waited_for_a_connection_goes_by_routes_that_are_fresh_then(world: World, routers: Routers) -> None:
    config = world.write_config()
    with line_in(config, world.dsns["cat"]) as line:
        settings = {"servers_max": 1, "confirm_s": 1.0, "hold_timeout_s": 6.0, "queue_timeout_s": BOUND_S}
        router = routers.start(config, pooling="transaction", **settings)
        move_id = world.split(at=20)
        world.run(move_id, State.READY)
        until(lambda: router.show("MOVES"), "the router never hears of the move")
        with client(router, world.dsns["s1"]) as a, client(router, world.dsns["s1"]) as b:
            a.ask(wire.query("BEGIN"))
            a.ask(wire.query("SELECT count(*) FROM orders WHERE tenant_id = 3"))
            b.query(READ)
            await_state(router, b, "waiting")
            line.cut()
            world.cut_over(move_id)
            began = time.monotonic()
            until(lambda: time.monotonic() > began + 2, "")  # twice as long as the routes may be used
            a.ask(wire.query("COMMIT"))
            assert codes(told(b.until_ready())) == ["40001"], "the old owner was read, by routes of before"


def test_a_router_serves_nothing_any_more_when_the_catalog_forgets_it() -> None:
    assert 1.25 * RouterSettings(stale_after_s=STALE_AFTER_MAX_S).stale_s < LISTED_FOR_S
    with pytest.raises(ConfigurationError, match="at most"):
        RouterSettings(stale_after_s=STALE_AFTER_MAX_S + 1)


@pytest.mark.parametrize("stale_after_s", [1.0, STALE_AFTER_MAX_S], ids=["bounded", "twin without a bound"])
def test_a_router_that_never_heard_of_a_move_reads_nothing_erased(
    world: World, routers: Routers, stale_after_s: float
) -> None:
    """The coordinator counts on the bound that its own configuration says: 2 s."""
    config = world.write_config()
    with line_in(config, world.dsns["cat"]) as line:
        router = routers.start(config, confirm_s=1.0, stale_after_s=stale_after_s, hold_timeout_s=1.0)
        with client(router, world.dsns["s1"]) as a:
            until(lambda: values(a.ask(wire.query(READ))) == ["0"], "the routes are never fresh")
            line.cut()
            move_id = world.split(at=20)
            world.run(move_id, State.READY)
            world.cut_over(move_id)
            world.complete(move_id)
            for statement in (READ, UPDATE):
                said = a.ask(wire.query(statement))
                if stale_after_s == 1.0:
                    assert codes(said) == ["40001"]
                    assert "the catalog is away" in said[0]
                else:
                    assert codes(said) == []
                    assert values(said) == []
                    assert "1" not in said[-2], "the twin saw no damage"


# --- a pipeline, and a COPY


def test_a_pipeline_without_keys_and_without_a_sync_is_sent_when_it_is_long(routed: Routed) -> None:
    router = routed.router()
    with client(router, routed.dsns["s1"]) as a:
        text = wire.parse(b"", b"SELECT $1::text", ()) + wire.bind(b"", b"", (b"x" * 100_000,)) + wire.execute(b"")
        a.send(text * 10)
        a.until(b"C", keep_max=10)
        a.send(wire.SYNC)
        assert told(a.until_ready(keep_max=10))[-1] == "Z 'I'"


def test_a_copy_whose_first_connection_is_lost_on_the_way_to_its_shard_fails(routed: Routed) -> None:
    with line_in(routed.config_file, routed.dsns["s1"]) as line:
        router = routed.router()
        with client(router, routed.dsns["s1"]) as a:
            a.query(COPY)
            a.until(b"G")
            line.flows.clear()
            a.send(wire.copy_data(b"200\t1\n"), wire.COPY_DONE)
            await_state(router, a, "waiting")
            line.cut()
            assert codes(told(a.until_ready())) == ["08006"]
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(0,)]


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_a_copy_that_waits_at_its_second_shard_is_cancelled(routed: Routed, pooling: str) -> None:
    router = routed.router(pooling=pooling)
    with (
        client(router, routed.dsns["s1"]) as a,
        connect(routed.dsns["s2"], application_name="test") as lock,
    ):
        lock.execute("BEGIN")
        lock.execute("LOCK TABLE public.items IN ACCESS EXCLUSIVE MODE")
        a.query(COPY)
        a.until(b"G")
        a.send(wire.copy_data(b"200\t1\n"), wire.COPY_DONE)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        until(lambda: routed.execute("s2", waiting) == [(1,)], "the COPY never waits")
        cancel(router, a)
        assert codes(told(a.until_ready())) == ["57014"]
        until(lambda: routed.execute("s2", waiting) == [(0,)], "the COPY waits on at the shard")
        lock.execute("ROLLBACK")
        assert values(a.ask(wire.query("SELECT 'mine'"))) == ["mine"]
    assert routed.execute("s2", "SELECT count(*) FROM items") == [(0,)]
