"""The router's own console, as psql and the drivers see it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import psycopg
import pytest

from router.cancel import process_of
from router.commands import COMMANDS, Answer, Command, understood
from router.console import FIXED, Console
from router.greeting import Refusal
from router.metrics import BOUNDS_S, Histogram, Stats
from router.peers import Peers
from shardmove.config import RouterSettings
from shardmove.postgres.embedded import Cluster
from tests.support.door import DEADLINE_S, eventually
from tests.support.router import ADMIN_DATABASE, USER, Router, Routers, cancelled
from tests.support.servers import Databases
from tests.support.world import World


@pytest.fixture(scope="module")
def router(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One for all tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("router")
    databases = Databases(servers)
    world = World(databases, directory)
    with Routers(directory) as routers:
        yield routers.start(world.write_config(), processes=2, hold_timeout_s=DEADLINE_S)
    world.catalog.close()
    databases.drop()


@pytest.fixture
def own_router(world: World, routers: Routers) -> Router:
    return routers.start(world.write_config(), processes=2)


@pytest.fixture
def console(router: Router) -> Iterator[psycopg.Connection]:
    with psycopg.connect(router.dsn(ADMIN_DATABASE), autocommit=True) as connection:
        yield connection


def rows(console: psycopg.Connection, text: str) -> list[dict[str, Any]]:
    cursor = console.execute(text.encode())
    columns = [column.name for column in cursor.description or ()]
    return [dict(zip(columns, row, strict=True)) for row in cursor]


def pair_of(router: Router) -> tuple[psycopg.Connection, psycopg.Connection]:
    """A client of each process."""
    found: dict[int, psycopg.Connection] = {}
    while len(found) < 2:
        connection = psycopg.connect(router.dsn(), autocommit=True)
        process = process_of(connection.info.backend_pid)
        if found.setdefault(process, connection) is not connection:
            connection.close()
    return found[0], found[1]


def test_every_table_can_be_shown_by_simple_and_by_extended_protocol(console: psycopg.Connection) -> None:
    for command in COMMANDS.values():
        if command.columns:
            for binary in (False, True):
                cursor = console.execute(command.words.lower().encode() + b";", binary=binary)
                assert tuple(column.name for column in cursor.description or ()) == command.columns
                assert all(len(row) == len(command.columns) for row in cursor)


def test_a_drivers_own_words_are_understood(router: Router) -> None:
    with psycopg.connect(router.dsn(ADMIN_DATABASE)) as connection:  # it wraps what it sends in a transaction
        for _ in range(7):  # and prepares what it sends often
            assert connection.execute("SHOW VERSION", prepare=True).fetchone()
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        connection.rollback()
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_asyncpg_understands_it(router: Router) -> None:
    async def ask() -> list[Any]:
        connection = await asyncpg.connect(
            host="127.0.0.1", port=router.port, user=USER, database=ADMIN_DATABASE, ssl=False
        )
        try:
            with pytest.raises(asyncpg.PostgresSyntaxError):
                await connection.fetch("SHOW NONSENSE")
            async with connection.transaction():
                return list(await connection.fetch("SHOW VERSION"))
        finally:
            await connection.close()

    ((version,),) = asyncio.run(ask())
    assert version.startswith("shardmove ")


def test_routes_are_shown(console: psycopg.Connection) -> None:
    assert rows(console, "SHOW ROUTES") == [
        {"keyspace": "shop", "range": ":", "shard": "s1", "held": "no", "move": None}
    ]
    assert rows(console, "SHOW MOVES") == []


def test_a_move_is_shown(own_router: Router, world: World) -> None:
    move = world.split(at=20)
    with psycopg.connect(own_router.dsn(ADMIN_DATABASE), autocommit=True) as console:
        eventually(lambda: [each["move"] for each in rows(console, "SHOW MOVES")] == [move])
        (shown,) = rows(console, "SHOW MOVES")
        assert (shown["source"], shown["target"], shown["ranges"], shown["phase"]) == ("s1", "s2", "20:", "1")
        assert rows(console, "SHOW DIFFERENCES") == []


def test_clients_and_servers_of_all_processes_are_shown(router: Router, console: psycopg.Connection) -> None:
    one, other = pair_of(router)
    with one, other:
        one.execute("SELECT count(*) FROM customers WHERE tenant_id = 1")
        clients = {int(each["pid"]): each for each in rows(console, "SHOW CLIENTS")}
        assert {each["process"] for each in clients.values()} == {"0", "1"}
        mine = clients[one.info.backend_pid]
        assert (mine["user"], mine["database"], mine["state"]) == (USER, "shop", "idle")
        assert other.info.backend_pid in clients
        servers = rows(console, "SHOW SERVERS")
        assert ("s1", "0") in {(each["shard"], each["process"]) for each in servers}
        pools = rows(console, "SHOW POOLS")
        assert {each["trouble"] for each in pools} == {None}


def test_statistics_add_up(router: Router, console: psycopg.Connection) -> None:
    with psycopg.connect(router.dsn(), autocommit=True) as connection:
        connection.execute("SELECT count(*) FROM customers WHERE tenant_id = 1")
        process = str(process_of(connection.info.backend_pid))
    found = {each["name"]: each["value"] for each in rows(console, "SHOW STATS") if each["process"] == process}
    assert int(found["clients"]) >= 1
    assert int(found["statements"]) >= 1
    assert int(found["query_seconds_count"]) >= 1
    assert set(Stats.COUNTERS) <= set(found)


def test_the_pages_table_of_settings_is_true() -> None:
    page = (Path(__file__).parents[1] / "docs" / "router.md").read_text()
    for each in fields(RouterSettings):
        if each.name in ("users", "home"):
            continue
        cells = re.search(rf"^\| `{each.name}` \|(.*?)\|(.*?)\|.*\|(.*?)\|$", page, re.MULTILINE)
        assert cells is not None, each.name
        _, default, changed_by = (cell.strip() for cell in cells.groups())
        assert default == {"": "empty", "()": "none", "None": "none", "False": "false"}.get(
            str(each.default), str(each.default)
        ) or (each.name, default) == ("metrics", "none")
        assert changed_by == ("restart" if each.name in FIXED else "reload")


def test_the_configuration_is_shown_without_secrets(console: psycopg.Connection, router: Router) -> None:
    found = {each["setting"]: each for each in rows(console, "SHOW CONFIG")}
    assert set(found) == {each.name for each in fields(RouterSettings)}
    assert found["listen"] == {"setting": "listen", "value": f"127.0.0.1:{router.port}", "changed_by": "restart"}
    assert found["clients_max"]["changed_by"] == "RELOAD"
    assert {name for name, each in found.items() if each["changed_by"] == "restart"} == FIXED


def test_a_client_is_killed_wherever_it_is(router: Router, console: psycopg.Connection) -> None:
    for connection in pair_of(router):
        console.execute(f"KILL {connection.info.backend_pid}".encode())
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="there is no client"):
        console.execute("KILL 4000000")  # of the first process, and far from what it has given out


def test_what_a_client_runs_is_cancelled_wherever_it_is(router: Router, console: psycopg.Connection) -> None:
    for connection in pair_of(router):
        cancel = partial(console.execute, f"KILL CANCEL {connection.info.backend_pid}".encode())
        assert isinstance(cancelled(connection, cancel), psycopg.errors.QueryCanceled)
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_pause_lets_transactions_end_and_holds_new_ones_back(router: Router, console: psycopg.Connection) -> None:
    busy, waiting = pair_of(router)
    count = b"SELECT count(*) FROM customers WHERE tenant_id = 1"
    busy.execute("BEGIN")
    busy.execute(count)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(waiting.execute(count).fetchone()))
    console.execute("PAUSE")
    try:
        busy.execute(count)
        busy.execute("COMMIT")
        thread.start()
        pid = str(waiting.info.backend_pid)
        eventually(lambda: any((each["pid"], each["state"]) == (pid, "held") for each in rows(console, "SHOW CLIENTS")))
        assert not answers
    finally:
        console.execute("RESUME")
    thread.join(DEADLINE_S)
    assert answers


def test_a_reload_reaches_every_process_and_refuses_a_wrong_file(own_router: Router) -> None:
    with psycopg.connect(own_router.dsn(ADMIN_DATABASE), autocommit=True) as console:
        reload_twice(own_router, console)


def reload_twice(router: Router, console: psycopg.Connection) -> None:
    config = router._config
    text = config.read_text()
    config.write_text(text.replace("[router]", "[router]\nclients_max = 1", 1))
    console.execute("RELOAD")
    assert {each["value"] for each in rows(console, "SHOW CONFIG") if each["setting"] == "clients_max"} == {"1"}
    kept = [psycopg.connect(router.dsn())]
    with pytest.raises(psycopg.OperationalError, match="too many clients"):
        kept += [psycopg.connect(router.dsn()) for _ in range(2)]  # two processes: here or there, one is too many
    kept[0].close()
    config.write_text(text.replace("[router]", "[router]\nclients_maxx = 1", 1))
    with pytest.raises(psycopg.Error, match="nothing was changed") as refused:
        console.execute("RELOAD")
    assert "clients_max" in (refused.value.diag.message_hint or "")
    assert {each["value"] for each in rows(console, "SHOW CONFIG") if each["setting"] == "clients_max"} == {"1"}


def test_the_console_is_for_admins(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config(), admins=["ann"])
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(router.dsn(ADMIN_DATABASE))
    psycopg.connect(router.dsn(ADMIN_DATABASE, user="ann")).close()


def test_consoles_are_closed_when_the_router_stops(own_router: Router) -> None:
    console = psycopg.connect(own_router.dsn(ADMIN_DATABASE), autocommit=True)
    assert own_router.stop() == 0
    with pytest.raises(psycopg.OperationalError):
        console.execute("SHOW VERSION")


def test_an_error_in_a_pipeline_skips_to_its_sync(console: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.SyntaxError), console.pipeline():  # noqa: PT012
        console.execute("SHOW VERSION")
        console.execute("SHOW NONSENSE")
        console.execute("SHOW HELP")
    assert console.execute("SHOW HELP").fetchall()


def test_commands_take_no_parameters(console: psycopg.Connection) -> None:
    with pytest.raises(psycopg.Error):
        console.execute("KILL %s", (1,))


def test_a_process_that_does_not_answer_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is shown may lack its rows; what is to be done may not go undone without a word."""

    class Here:
        is_paused = False
        sessions: ClassVar[dict[int, Any]] = {}

        def pause(self) -> None:
            self.is_paused = True

    async def nothing() -> None:
        pass

    async def ask() -> None:
        router: Any = Here()
        console = Console(router, Peers(tmp_path_factory.mktemp("p"), 0, 2), nothing)
        assert (await console.run("SHOW HOLDS")).rows == []
        for text in ("PAUSE", "RELOAD", f"KILL {1 << 22 | 1}"):
            with pytest.raises(Refusal, match="process 1 of the router did not answer"):
                await console.run(text)
        assert router.is_paused

    asyncio.run(ask())


# --- words


@pytest.mark.parametrize(
    ("text", "words", "number"),
    [("show clients", "SHOW CLIENTS", 0), (" Help ;", "SHOW HELP", 0), ("kill  cancel 7;", "KILL CANCEL", 7)],
)
def test_commands_are_recognised(text: str, words: str, number: int) -> None:
    asked = understood(text)
    assert not isinstance(asked, Answer)
    assert (asked[0].words, asked[1]) == (words, number)


@pytest.mark.parametrize(
    "text", ["SHOW CLIENT", "SHOWCLIENTS", "KILL", "KILL 1 2", "KILL 1 CANCEL", "RELOAD 1", "DROP x"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        understood(text)
    assert refused.value.sqlstate == "42601"


def test_what_was_probably_meant_is_said() -> None:
    with pytest.raises(Refusal) as refused:
        understood("SHOW CLIENTZ")
    assert refused.value.hint is not None
    assert "Did you mean SHOW CLIENTS?" in refused.value.hint


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.words)
def test_every_command_is_in_the_documentation(command: Command) -> None:
    page = Path(__file__).parents[1] / "docs" / "router.md"
    assert f"`{command.words}" in page.read_text()


@pytest.mark.parametrize("name", [each.name for each in fields(RouterSettings)])
def test_every_setting_is_in_the_documentation(name: str) -> None:
    page = Path(__file__).parents[1] / "docs" / "router.md"
    assert f"`{name}`" in page.read_text() or f"`[router.{name}]`" in page.read_text()


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1] + 1):
        histogram.observe(seconds)
    found = dict(histogram.cumulative())
    assert (found[str(BOUNDS_S[0])], found[str(BOUNDS_S[1])], found[str(BOUNDS_S[-1])], found["+Inf"]) == (2, 3, 3, 4)
    assert histogram.count == 4


def test_short_commands_do_not_import_the_router() -> None:
    code = (
        "import shardmove.cli.verbs, sys; print({'prometheus_client', 'uvloop', 'router.session'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
