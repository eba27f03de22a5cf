"""A router as processes: it starts, shares its port, survives a child's death, and ends without cutting anybody off."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
from typer.testing import CliRunner

from router.cancel import process_of
from router.listening import bound
from router.peers import PREFIX, private_directory
from shardmove.cli.verbs import app
from shardmove.config import Address
from shardmove.domain.errors import ConfigurationError
from shardmove.postgres.watcher import wait_gone
from shardmove.wire.scram import Verifier
from tests.support import engine
from tests.support.router import ROOT, STOP_BOUND_S, Router, Routers, cancelled, free_port
from tests.support.shell import Shell, invoked
from tests.support.world import World

SELECT = "SELECT count(*) FROM customers WHERE tenant_id = 1"
BOUND_S = 120.0
eventually = partial(engine.until, timeout_s=BOUND_S)


def children(router: Router) -> list[psutil.Process]:
    return router.processes()[1:]


def connect(router: Router, **more: object) -> psycopg.Connection:
    return psycopg.connect(router.dsn(**more), autocommit=True)


def connect_to(router: Router, process: int) -> psycopg.Connection:
    """A connection to that one of the processes; the kernel deals them out."""
    for _ in range(200):
        connection = connect(router)
        if process_of(connection.info.backend_pid) == process:
            return connection
        connection.close()
    raise AssertionError(f"process {process} gets no clients")


def server_of(router: Router, connection: psycopg.Connection) -> psutil.Process:
    """The child at the other end of it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as ours:
        place = ours.getsockname()
    return next(each for each in children(router) if place in [tuple(c.raddr) for c in each.net_connections()])


@pytest.mark.parametrize("processes", [1, 3])
def test_clients_are_served_by_every_process(world: World, routers: Routers, processes: int) -> None:
    router = routers.start(world.write_config(), processes=processes)
    for process in range(processes):
        with connect_to(router, process) as connection:
            assert connection.execute(SELECT.encode()).fetchone() is not None
    assert len(children(router)) == (processes if processes > 1 else 0)
    assert router.stop() == 0


def test_a_cancel_request_finds_its_way_to_the_right_process(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=3)
    connections = [connect_to(router, process) for process in range(3)]
    for connection in connections:
        cancel = partial(connection.cancel_safe, timeout=BOUND_S)
        assert isinstance(cancelled(connection, cancel), psycopg.errors.QueryCanceled)
        connection.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_transaction_may_end_before_the_router_does(world: World, routers: Routers, processes: int) -> None:
    router = routers.start(world.write_config(), processes=processes)
    idle, busy = connect(router), connect(router)
    busy.execute("BEGIN")
    busy.execute("UPDATE customers SET name = 'changed' WHERE tenant_id = 1")
    router.signal(signal.SIGTERM)
    with pytest.raises(psycopg.OperationalError):  # 57P01, unless a question crosses it
        eventually(lambda: idle.execute("SELECT 1") is None)
    with pytest.raises(psycopg.OperationalError):
        eventually(lambda: connect(router).close() is not None)
    busy.execute("UPDATE customers SET name = 'changed again' WHERE tenant_id = 1")
    busy.execute("COMMIT")
    eventually(lambda: not router.is_running)
    assert router.stop() == 0
    with world.connect("s1") as connection:
        assert connection.execute("SELECT DISTINCT name FROM customers WHERE tenant_id = 1").fetchall() == [
            ("changed again",)
        ]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_transaction_that_does_not_end_is_ended(world: World, routers: Routers, processes: int) -> None:
    router = routers.start(world.write_config(), processes=processes, shutdown_timeout_s=0.3)
    busy = connect(router)
    busy.execute("BEGIN")
    busy.execute("UPDATE customers SET name = 'lost' WHERE tenant_id = 1")
    assert router.stop() == 0
    with pytest.raises(psycopg.errors.AdminShutdown):
        busy.execute("COMMIT")
    with world.connect("s1") as connection:
        assert connection.execute("SELECT count(*) FROM customers WHERE name = 'lost'").fetchone() == (0,)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_ends_it_at_once(world: World, routers: Routers, processes: int) -> None:
    router = routers.start(world.write_config(), processes=processes, shutdown_timeout_s=3600)
    busy = connect(router)
    busy.execute("BEGIN")
    busy.execute("UPDATE customers SET name = 'lost' WHERE tenant_id = 1")
    router.signal(signal.SIGTERM)
    eventually(lambda: router.said.count("stopping") == processes)
    assert router.stop() == 0


def test_a_third_signal_kills_children_that_hang(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=2)
    for child in children(router):
        child.suspend()
    router.signal(signal.SIGTERM)
    router.signal(signal.SIGINT)
    hung = router.processes()[1:]
    assert len(hung) == 2
    eventually(lambda: not router.is_running or router.signal(signal.SIGTERM))
    assert wait_gone(hung, BOUND_S)


def test_a_process_that_dies_is_started_again_and_the_others_go_on(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=2)
    first, second = connect_to(router, 0), connect_to(router, 1)
    victim = server_of(router, second)
    victim.kill()
    with pytest.raises(psycopg.OperationalError):
        eventually(lambda: second.execute("SELECT 1") is None)
    assert first.execute("SELECT 1").fetchone() == (1,)
    eventually(lambda: len([each for each in children(router) if each.pid != victim.pid]) == 2)
    eventually(lambda: router.said.count("serving") == 3)
    connect_to(router, 1).close()
    assert "a process died" in router.said
    assert router.stop() == 0


def test_children_die_with_their_parent(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=2)
    parent, *others = router.processes()
    connection = connect(router)
    parent.kill()
    assert wait_gone(others, BOUND_S)
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


def test_a_router_that_cannot_start_says_why_and_leaves_nothing(world: World) -> None:
    config = world.directory / "broken.toml"
    text = world.write_config().read_text().replace(world.dsns["cat"], "host=127.0.0.1 port=1 connect_timeout=2", 1)
    for processes in (1, 2):
        config.write_text(
            f'{text}[router]\nauthentication = "trust"\nlisten = "127.0.0.1:0"\nprocesses = {processes}\n'
        )
        ended = subprocess.run(
            [sys.executable, "-m", "shardmove", "router", "serve", "-c", str(config)],
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            cwd=ROOT,
        )
        assert ended.returncode == 1
        assert "cannot connect to host=127.0.0.1 port=1" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_named(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=2)
    for processes in ("1", "2"):
        said = invoked(
            router._config, "router", "serve", "--processes", processes, "--listen", f"127.0.0.1:{router.port}"
        )
        assert said.code == 2
        assert f"127.0.0.1:{router.port} cannot be used" in said.stderr


def test_nobody_to_let_in_is_a_mistake(shell: Shell) -> None:
    said = shell("router", "serve")
    assert said.code == 2
    assert "[router.users] names nobody" in said.stderr
    assert "router verifier" in said.stderr


def test_metrics_are_on_a_page_of_each_process(world: World, routers: Routers) -> None:
    port = free_port(2)
    router = routers.start(world.write_config(), processes=2, metrics=f"127.0.0.1:{port}")
    for process in range(2):
        with connect_to(router, process) as connection:
            connection.execute(SELECT.encode())
            with urllib.request.urlopen(f"http://127.0.0.1:{port + process}/metrics", timeout=BOUND_S) as page:
                text = page.read().decode()
        found = dict(re.findall(r"^(shardmove_router_\S+) (\S+)$", text, re.MULTILINE))
        assert float(found["shardmove_router_clients_total"]) >= 1
        assert float(found["shardmove_router_epoch"]) >= 1
        assert float(found['shardmove_router_servers{shard="s1",state="busy"}']) >= 1
        assert 'shardmove_router_query_seconds_bucket{le="+Inf"}' in found


def test_a_new_setting_is_adopted_on_sighup(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), processes=2, database="shop")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        connect(router, dbname="other")
    config = router._config
    config.write_text(config.read_text().replace('database = "shop"', 'database = "other"'))
    router.signal(signal.SIGHUP)
    eventually(lambda: len(re.findall("reloaded", router.said)) == 2)
    connect(router, dbname="other").close()
    config.write_text("rubbish")
    router.signal(signal.SIGHUP)
    eventually(lambda: len(re.findall("reload refused", router.said)) == 2)
    connect(router, dbname="other").close()


# --- sockets


@pytest.fixture
def socket_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def test_a_unix_socket_is_shared_by_the_processes_and_removed_at_the_end(
    world: World, routers: Routers, socket_directory: Path
) -> None:
    port = free_port()
    stale = socket_directory / f".s.PGSQL.{port}"
    leave_stale(stale)
    router = routers.start(world.write_config(), processes=2, listen=f"{socket_directory}:{port}")
    for _ in range(4):
        with psycopg.connect(router.dsn(host=str(socket_directory), port=port)) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert router.stop() == 0
    assert not stale.exists()


def leave_stale(path: Path) -> None:
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.exists()


def test_a_live_unix_socket_is_left_alone(socket_directory: Path) -> None:
    address = Address(str(socket_directory), 1)
    with bound([address], is_shared=False) as (place,):
        with pytest.raises(ConfigurationError, match="another process"), bound([address], is_shared=True):
            pass
        assert address.socket_path.exists()
        assert place.listener().getsockname() == str(address.socket_path)
    assert not address.socket_path.exists()


def test_a_name_gets_one_free_port_for_all_its_addresses() -> None:
    with bound([Address("localhost", 0)], is_shared=False) as places:
        assert len({place.address.port for place in places}) == 1
        assert places[0].address.port > 0


@pytest.mark.parametrize("text", ["localhost", "localhost:", ":5432", "h:70000", "h:-1", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not an address"):
        Address.parse(text)


def test_addresses_are_understood() -> None:
    assert Address.parse("[::1]:5432") == Address("::1", 5432)
    assert str(Address("::1", 5432)) == "[::1]:5432"
    assert Address.parse("/tmp") == Address("/tmp", 6432)
    assert Address.parse("/tmp:1").socket_path == Path("/tmp/.s.PGSQL.1")


def test_the_verifier_of_a_password_is_made() -> None:
    said = CliRunner().invoke(app, ["router", "verifier"], input="correct horse\n")
    made = Verifier.parse(said.stdout.strip())
    assert str(Verifier.make("correct horse", made.salt, made.iterations)) == str(made)
    assert CliRunner().invoke(app, ["router", "verifier"], input="\n").exit_code == 2


def test_a_process_in_the_background_is_not_ended_by_the_terminals_interrupt(world: World, routers: Routers) -> None:
    """Ctrl-C goes to the whole group: the children leave it to their parent, else it would be their second signal."""
    router = routers.start(world.write_config(), processes=2)
    busy = connect(router)
    busy.execute("BEGIN")
    busy.execute("UPDATE customers SET name = 'kept' WHERE tenant_id = 1")
    os.killpg(router.processes()[0].pid, signal.SIGINT)
    eventually(lambda: router.said.count("stopping") == 2)
    busy.execute("COMMIT")
    eventually(lambda: not router.is_running)
    assert router.stop() == 0


def test_a_killed_routers_directory_is_removed_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale, fresh = tmp_path / f"{PREFIX}stale", tmp_path / f"{PREFIX}fresh"
    for made in (stale, fresh):
        made.mkdir()
        (made / "0.peer").touch()
    with private_directory() as live:
        assert live.stat().st_mode & 0o777 == 0o700
        for path in (stale, live):
            os.utime(path, (0, 0))
        with private_directory():
            assert (stale.exists(), fresh.exists(), live.exists()) == (False, True, True)
    assert not live.exists()


# --- whoever starts a router in a test

OWNER = """
import json, sys
from pathlib import Path
from tests.support import router

config, directory, *guard = sys.argv[1:]
router._GUARD = guard[0] if guard else router._GUARD
started = router.Router(Path(config), Path(directory), processes=2).start()
print(json.dumps([started._guard.pid, *(each.pid for each in started.processes())]), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("guard", [[], ["read _"]], ids=["guarded", "twin without the kill"])
def test_a_router_ends_with_the_process_that_started_it(world: World, tmp_path: Path, guard: list[str]) -> None:
    command = [sys.executable, "-c", OWNER, str(world.write_config()), str(tmp_path), *guard]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        shell, *group = [psutil.Process(pid) for pid in json.loads(owner.stdout.readline())]
        owner.kill()
    try:
        assert len(group) == 3
        assert wait_gone([shell], STOP_BOUND_S)
        assert guard or wait_gone(group, STOP_BOUND_S)
        assert not guard or not wait_gone(group[:1], 0.0)
    finally:
        for each in group:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        wait_gone(group, STOP_BOUND_S)


# --- where a statement would go


def test_where_a_statement_would_go_is_said(shell: Shell) -> None:
    told = shell("router", "route", "UPDATE orders SET note = '' WHERE tenant_id = 7", "--json").document
    assert (told["action"], told["shards"], told["is_write"], told["refusal"]) == ("keyed", ["s1"], True, None)
    assert told["routes"] == [{"range": ":", "shard": "s1", "held": False, "move": None}]
    assert shell("router", "route", "SELECT 1").stdout == "free → any shard\n"
    said = shell("router", "route", "SELECT note FROM orders WHERE tenant_id = $1")
    assert said.code == 4
    assert said.stdout.startswith("refused (")
