"""Every commit and every other effect of the engine has its two control points, and that is not a matter of care."""

from __future__ import annotations

import ast
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
import pytest

import shardmove
import workers
from shardmove.catalog.store import Catalog
from shardmove.domain import points
from shardmove.domain.errors import Unreachable
from shardmove.domain.points import PLACES, Effect
from shardmove.faults import REACHED, VARIABLE
from shardmove.postgres import connect as connecting
from shardmove.postgres import effects
from tests.support.engine import until
from tests.support.servers import Databases
from tests.support.world import BOUND_S, World

ROOTS: Final = tuple(Path(str(package.__file__)).parent for package in (shardmove, workers))
COMMITS: Final = Path("shardmove/postgres/effects.py")
OUR_CLIENTS: Final = ("shardmove/demo/",)
"""Programs beside the engine: a shop and its writers."""
WRITES: Final = re.compile(
    r"\s*(BEGIN|START|COMMIT|END|PREPARE TRANSACTION)\b(?!.*READ ONLY)|.*TRANSACTION.*READ WRITE"
)
NAME_THE_SETTING: Final = {"shardmove/postgres/connect.py", "shardmove/coordinator/checks/servers.py"}
UNDONE_BY_NOTHING: Final = ("setval(", "pg_terminate_backend(", "pg_cancel_backend(", "pg_logical_emit_message(")
"""What the server does for good, or outside a transaction, also where it is read-only or rolled back."""
NAMED_ONLY: Final = {"shardmove/coordinator/checks/privileges.py", "shardmove/coordinator/checks/surroundings.py"}
"""Texts for people: which rights we need, and what an operator may run."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            name = str(path.relative_to(root.parent))
            if not name.startswith(OUR_CLIENTS):
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def texts(module: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string, but for docstrings."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


# --- commits


def test_a_write_that_does_not_come_through_effects_is_refused_by_the_server(databases: Databases) -> None:
    dsn = databases("s1")["s1"]
    with connecting.connect(dsn, application_name="test") as connection:
        with effects.writing(connection, Effect.INSTALL):
            connection.execute("CREATE TABLE public.t (id int)")
        for statement in ("INSERT INTO public.t VALUES (1)", "DROP TABLE public.t", "SELECT FROM public.t FOR SHARE"):
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                connection.execute(statement.encode())
        effects.once(connection, Effect.INSTALL, "INSERT INTO public.t VALUES (%s)", (2,))
        assert connection.execute("SELECT id FROM public.t").fetchall() == [(2,)]


def test_no_transaction_begins_to_write_or_commits_elsewhere() -> None:
    found = []
    for name, module in sources():
        if name == str(COMMITS):
            continue
        for node in ast.walk(module):
            is_commit = isinstance(node, ast.Attribute) and node.attr in ("transaction", "commit")
            if is_commit and not ast.unparse(node).startswith("effects."):
                found.append(f"{name}:{ast.unparse(node)}")
        for line, text in texts(module):
            if WRITES.match(text) or ("read_only" in text and name not in NAME_THE_SETTING):
                found.append(f"{name}:{line} {text[:60]!r}")
    assert found == []


def test_every_session_of_ours_is_opened_in_one_place() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, module in sources()
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("psycopg", "connect"), ("Connection", "connect")}
        and name not in ("shardmove/postgres/connect.py", "shardmove/postgres/embedded.py")
    ]
    assert found == []


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_step_that_dies_at_either_point_did_nothing_or_all(databases: Databases, is_ours: bool) -> None:
    dsn = databases("s1")["s1"]

    class Died(Exception):
        pass

    def die(name: str) -> None:
        raise Died(name)

    def write(connection: connecting.Connection) -> None:
        if is_ours:
            with effects.writing(connection, Effect.BATCH):
                connection.execute("INSERT INTO public.t VALUES (1)")
        else:
            effects.once(connection, Effect.BATCH, "INSERT INTO public.t VALUES (%s)", (1,))

    with connecting.connect(dsn, application_name="test") as connection:
        effects.once(connection, Effect.INSTALL, "CREATE TABLE public.t (id int)", ())
        for point, rows in ((Effect.BATCH.before, 0), (Effect.BATCH.after, 1)):
            with points.armed(point, die), pytest.raises(Died, match=point):
                write(connection)
            assert connection.execute("SELECT count(*) FROM public.t").fetchall() == [(rows,)]


def test_an_effect_of_one_statement_is_one_message(databases: Databases, tmp_path: Path) -> None:
    """Between two of them a process may stop, with all that it has locked."""
    with connecting.connect(databases("s1")["s1"], application_name="test") as connection:
        effects.once(connection, Effect.INSTALL, "CREATE TABLE public.t (id int, note text)", ())
        with (tmp_path / "trace").open("w") as trace:
            connection.pgconn.trace(trace.fileno())
            query: LiteralString = "INSERT INTO public.t VALUES (%s, %s) RETURNING id"
            cursor = effects.once(connection, Effect.BATCH, query, (7, "it's 100 %"))
            connection.pgconn.untrace()
        assert cursor.fetchone() == (7,)
        sent = [line.split("\t")[3] for line in (tmp_path / "trace").read_text().splitlines() if "\tF\t" in line]
        assert sent == ["Query"]
        assert connection.execute("SELECT note FROM public.t").fetchone() == ("it's 100 %",)


def test_an_interrupt_leaves_no_transaction_open(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next effect would be taken for a part of it, and never be committed."""
    with connecting.connect(databases("s1")["s1"], application_name="test") as connection:
        execute = psycopg.ClientCursor.execute

        def interrupted(*arguments: Any) -> None:
            execute(arguments[0], "BEGIN READ WRITE")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(psycopg.ClientCursor, "execute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                effects.once(connection, Effect.BATCH, "SELECT %s", (1,))
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_one_message_that_fails_leaves_no_transaction_open(databases: Databases) -> None:
    with connecting.connect(databases("s1")["s1"], application_name="test") as connection:
        with pytest.raises(psycopg.errors.UndefinedTable):
            effects.once(connection, Effect.BATCH, "INSERT INTO public.missing VALUES (%s)", (1,))
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_a_session_that_was_ended_for_standing_still_is_a_lost_connection(databases: Databases) -> None:
    """Whoever meets it opens another one, and tries again."""
    with connecting.connect(databases("s1")["s1"], application_name="test") as connection:
        connection.execute("SET idle_in_transaction_session_timeout = '10ms'")
        effects.begin(connection)
        select.select([connection.fileno()], [], [], 60)  # the server says so by itself
        with pytest.raises(Unreachable), connecting.translated("a step"):
            connection.execute("SELECT 1")


# --- what no transaction undoes


def test_what_no_transaction_undoes_is_between_its_points() -> None:
    """Each such call stands in a `with points.around(…)`, or is the one statement of `effects.once`."""
    found = []
    for name, module in sources():
        if name in NAMED_ONLY:
            continue
        inside = {
            id(child)
            for node in ast.walk(module)
            if (isinstance(node, (ast.With, ast.FunctionDef)) and "around(" in ast.unparse(node))
            or (isinstance(node, ast.FunctionDef) and "effects.once(" in ast.unparse(node))
            for child in ast.walk(node)
        }
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and id(node) not in inside:
                found += [f"{name}:{node.lineno}" for call in UNDONE_BY_NOTHING if call in str(node.value)]
    assert found == []


# --- the names


def test_every_effect_is_had_somewhere_and_every_place_is_reached() -> None:
    used, reached = set(), set()
    for _, module in sources():
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Effect":
                used.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("points.reach", "reach"):
                reached |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    assert used == {effect.name for effect in Effect}
    assert reached == set(PLACES)


def test_what_tests_arm_is_a_point() -> None:
    """A name that nobody reaches any more would make a test pass that tests nothing."""
    known = {*PLACES, *(point for effect in Effect for point in (effect.before, effect.after))}
    steps = {point.rpartition(".")[0] for point in known}
    found = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for line, text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            step, _, place = text.rpartition(".")
            if step in steps and place.startswith(("before", "after", "between")) and text not in known:
                found.append(f"{path.name}:{line} {text}")
    assert found == []


# --- whole processes, armed from outside


class Orders:
    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.directory = directory
        (directory / REACHED).touch()

    def give(self, point: str, order: str) -> None:
        draft = self.directory / "draft"
        draft.write_text(order)
        draft.rename(self.directory / point)

    def taken(self) -> list[str]:
        return sorted(path.name.rpartition(".taken.")[0] for path in self.directory.glob("*.taken.*"))

    def reached(self, role: str) -> set[str]:
        lines = (self.directory / REACHED).read_text().splitlines()
        return {name for _, who, name in map(str.split, lines) if who == role}

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "shardmove", *command, "-c", str(self.world.write_config())],
            env={**os.environ, VARIABLE: str(self.directory)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )


@pytest.fixture
def orders(world: World, tmp_path: Path) -> Orders:
    (tmp_path / "orders").mkdir()
    return Orders(world, tmp_path / "orders")


def is_free(world: World, move_id: str) -> bool:
    holder = world.catalog.holder(move_id)
    return holder is None or not holder.is_connected


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_a_command_and_its_workers_carry_out_each_order_once(world: World, orders: Orders) -> None:
    move = world.split()
    orders.give(Effect.ARM.before, "error")
    failing = orders.start("run", move)
    _, errors = failing.communicate(timeout=BOUND_S)
    assert failing.returncode == 1
    assert b"a fault was ordered at arm.before" in errors

    orders.give(Effect.BATCH.after, "kill")  # a worker: another one takes its task, and the command does not notice
    orders.give(Effect.MARK_WHOLE.before, "pause")
    paused = orders.start("run", move)
    _, status = os.waitpid(paused.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    orders.give(Effect.MARK_WHOLE.after, "kill")
    paused.send_signal(signal.SIGCONT)
    paused.communicate(timeout=BOUND_S)
    assert paused.returncode == -signal.SIGKILL
    until(lambda: is_free(world, move))  # the server has noticed; before, the next one is told that the move is held

    again = orders.start("run", move)
    assert again.communicate(timeout=BOUND_S)[1].count(b"fault") == 0
    assert again.returncode == 0
    assert orders.taken() == ["arm.before", "batch.after", "mark_whole.after", "mark_whole.before"]
    assert {"take_lease.before", "arm.after", "transition.after"} <= orders.reached("command")
    assert {"batch.before", "batch.before_compare", "make_durable.after"} <= orders.reached("worker")
    assert "batch.before" not in orders.reached("command")


def test_without_the_variable_nothing_is_armed(world: World, orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    orders.give(Effect.PLAN.before, "error")
    world.split()
    assert orders.taken() == []
    assert Catalog.connect(world.config.catalog_dsn).moves() != []
