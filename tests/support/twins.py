"""Twins: each story of a safety mechanism is told twice, once with that one function of the product replaced.

    def test_…(mechanism: Mechanism, engine: MakeEngine) -> None:
        mechanism.replace(catch_up, "compare", lambda *_: None)     # in the twin only
        …the story, the same for both…
        mechanism.judge(differences(made))                          # no damage; in the twin: damage

The judges read both shards by plain SQL, as an application would, and use none of the engine's code.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.domain import points
from shardmove.domain.moves import Direction
from shardmove.postgres.connect import Connection
from shardmove.postgres.embedded import SUPERUSER
from shardmove.postgres.sql import Interval
from shardmove.protocol.catch_up import Mirror
from tests.support.engine import LEASE, Engine, until
from workers.connections import Connections
from workers.copy import BatchDone, CopyBatch
from workers.tasks import run

MakeEngine: TypeAlias = Callable[..., Engine]
Result = TypeVar("Result")

WHOLE: Final[Interval] = (None, None)
WAIT_S: Final = 60.0


class Mechanism:
    """Whether the mechanism of a test is there; in the twin, what replaces it."""

    def __init__(self, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = on
        self._monkeypatch = monkeypatch

    def replace(self, owner: object, name: str, replacement: object) -> None:
        """Replaces one function of the product, in the twin only."""
        if not self.on:
            self._monkeypatch.setattr(owner, name, replacement)

    def judge(self, damage: list[str]) -> None:
        """The verdict over what a judge outside the engine found."""
        if self.on:
            assert damage == []
        else:
            assert damage, "the mechanism was taken away, and the story ended as well as with it"


@pytest.fixture(params=[True, False], ids=["with", "twin_without"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mechanism:
    return Mechanism(request.param, monkeypatch)


# --- judges: plain SQL


def outside(dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
    """A session that no code of the engine has prepared, and that sees every row."""
    return psycopg.connect(make_conninfo(dsn, user=SUPERUSER), autocommit=True, application_name="judge")


def rows(dsn: str, query: str) -> Counter[str]:
    with outside(dsn) as connection:
        return Counter(str(row[0]) for row in connection.execute(query.encode()).fetchall())


def differences(engine: Engine, condition: str = "BETWEEN 100 AND 199") -> list[str]:
    """Every row of the range that only one of the two shards has."""
    found: list[str] = []
    for table, key in engine.move.keyspace.tables.items():
        query = f"SELECT t::text FROM {table} AS t WHERE {key} {condition}"
        source, target = rows(engine.dsn["s1"], query), rows(engine.dsn["s2"], query)
        found += [f"{table}: only the source has {row}" for row in (source - target).elements()]
        found += [f"{table}: only the target has {row}" for row in (target - source).elements()]
    return found


# --- the engine's verbs, in this process


def batch(engine: Engine, interval: Interval = WHOLE, ordinal: int = 1) -> CopyBatch:
    table = engine.tables[ordinal - 1]
    return CopyBatch(engine.move, ordinal, table, interval, LEASE, engine.dsn["s1"], engine.dsn["s2"])


def copy_batch(engine: Engine, interval: Interval = WHOLE, ordinal: int = 1) -> BatchDone:
    with Connections() as connections:
        return run(batch(engine, interval, ordinal), connections)


def copy_all(engine: Engine) -> None:
    """Every table in one batch."""
    for ordinal, _ in enumerate(engine.tables, 1):
        copy_batch(engine, ordinal=ordinal)


def mirror(engine: Engine) -> Mirror:
    """A mirror on connections of its own; close it."""
    return Mirror.open(engine.move, Direction.FORWARD, engine.tables, engine.dsn)


def carry_all(engine: Engine) -> None:
    """What every story ends with: another mirror carries what the journal still holds."""
    with mirror(engine) as last:
        assert last.until_empty().is_empty


def application(engine: Engine, shard: str = "s1", *, user: str = SUPERUSER) -> Connection:
    """A session of the application: in autocommit, with nothing of ours set."""
    dsn = make_conninfo(engine.dsn[shard], user=user)
    return psycopg.connect(dsn, autocommit=True, application_name="application")


def journalled(engine: Engine, ordinal: int = 1) -> int:
    ((entries,),) = engine.fetch("s1", f"SELECT count(*) FROM shardmove.journal_{engine.move.id}_{ordinal}")
    return int(entries)


# --- standing still in the middle


@contextmanager
def once(point: str, action: Callable[[], object]) -> Iterator[None]:
    """Runs the action where the point is reached for the first time, in the thread that reaches it."""
    first = threading.Lock()

    def hook(_: str) -> None:
        if first.acquire(blocking=False):
            action()

    with points.armed(point, hook):
        yield
        assert first.locked(), f"{point} was never reached"


def spawn(work: Callable[[], Result]) -> Future[Result]:
    """Runs the work in a thread of its own; what it returns or raises is in the future."""
    future: Future[Result] = Future()

    def thread() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=thread, daemon=True).start()
    return future


def waits_for_advisory_lock(engine: Engine, shard: str = "s2") -> bool:
    query = (
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    )
    return engine.fetch(shard, query) == [(True,)]


class Died(BaseException):
    """What stands for the end of the process at a control point."""


def die() -> None:
    raise Died


def end_session(connection: Connection) -> None:
    """Ends the session from outside, as a timeout or an operator does; returns when it has ended."""
    with outside(connection.info.dsn) as operator:
        operator.execute("SELECT pg_terminate_backend(%s, 30000)", (connection.info.backend_pid,))


def stop_the_log_writer(connection: Connection) -> None:
    """It would write asynchronous commits to the log within a blink, sometimes. Stopped until the server is killed."""
    query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'"
    until(lambda: connection.execute(query).rowcount == 1, "the server has no log writer")  # it may have just started
    for (pid,) in connection.execute(query).fetchall():
        os.kill(pid, signal.SIGSTOP)


# --- roles


def make_role(dsn: Mapping[str, str], kind: str, *, grants: str = "") -> str:
    """A plain role, new on every shard, whose name no other test uses. `grants` may name it as `{role}`."""
    role = f"{kind}_{conninfo_to_dict(dsn['s1'])['dbname']}"
    for shard in dsn.values():
        with outside(shard) as connection:
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
            connection.execute(grants.replace("{role}", role).encode())
    return role


def make_mover(dsn: Mapping[str, str], *, may_be_replica: bool = True) -> dict[str, str]:
    """A role that owns the databases and is no superuser; returns the connection strings of its sessions."""
    dbname = conninfo_to_dict(dsn["s1"])["dbname"]
    grants = f"ALTER DATABASE {dbname} OWNER TO {{role}};"
    if may_be_replica:
        grants += "GRANT SET ON PARAMETER session_replication_role TO {role};"
    role = make_role(dsn, "mover", grants=grants)
    return {shard: make_conninfo(each, user=role) for shard, each in dsn.items()}
