"""Executors: back-pressure, errors that arrive, workers that die, and nothing that is left over."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from multiprocess.context import SpawnContext

from shardmove.domain.errors import ConfigurationError, Failed, Interrupted, NotFound, WorkerDied
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import Interval
from tests.support.engine import LEASE, Engine, until
from workers.connections import Connections
from workers.copy import BatchBlocked, BatchDone, CopyBatch
from workers.executors import WAITING_PER_WORKER, Executor, InlineExecutor
from workers.pool import DEATHS_MAX, ProcessExecutor
from workers.process import serve

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Say:
    word: str

    def run(self, _: Connections) -> tuple[str, int]:
        return self.word, os.getpid()


@dataclass(frozen=True)
class Raise:
    error: Exception

    def run(self, _: Connections) -> None:
        raise self.error


@dataclass(frozen=True)
class Ask:
    """Runs a statement that may wait for a lock of the test's."""

    dsn: str
    statement: str

    def run(self, connections: Connections) -> int:
        row = connections.get(self.dsn, "ask").execute(self.statement.encode()).fetchone()
        assert row is not None
        return int(row[0])


class Die:
    def run(self, _: Connections) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Silent:
    """Does not say what is wrong with it."""

    def run(self, _: Connections) -> None:
        raise Strange(1, 2)


class Strange(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.fixture(scope="module", params=[InlineExecutor, ProcessExecutor])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with request.param(2) as made:
        yield made


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessExecutor]:
    with ProcessExecutor(2) as made:
        yield made


@contextmanager
def held(dsn: str, key: int = 42) -> Iterator[Connection]:
    """An advisory lock that others may wait for until the block ends."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (key,))
        yield connection


def waiters(connection: Connection) -> int:
    row = connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone()
    assert row is not None
    return int(row[0])


WAIT = "SELECT 1 FROM pg_advisory_xact_lock_shared(42)"


# --- what every executor does


def test_every_task_has_its_own_result(executor: Executor) -> None:
    futures = [executor.submit(Say(str(number))) for number in range(50)]
    assert [future.result()[0] for future in futures] == [str(number) for number in range(50)]


@pytest.mark.parametrize(
    "error", [NotFound("no such shard", hint="look"), BatchBlocked("a batch is blocked", hint="catch up")]
)
def test_errors_of_ours_arrive_as_they_are(executor: Executor, error: Failed) -> None:
    raised = executor.submit(Raise(error)).exception()
    assert isinstance(raised, type(error))
    assert (raised.message, raised.hint) == (error.message, error.hint)


def test_errors_of_a_server_arrive_as_ours_without_row_values(
    executor: Executor, databases: Callable[..., dict[str, str]]
) -> None:
    dsn = databases("s1")["s1"]
    schema = "BEGIN READ WRITE; CREATE TEMP TABLE t (secret int UNIQUE); INSERT INTO t VALUES (123456), (123456)"
    raised = executor.submit(Ask(dsn, schema)).exception()
    assert type(raised) is Failed
    assert "23505" in raised.message
    assert "123456" not in raised.message


def test_submit_blocks_when_enough_is_waiting_and_wakes_on_stop(databases: Callable[..., dict[str, str]]) -> None:
    dsn = databases("s1")["s1"]
    for kind in (InlineExecutor, ProcessExecutor):
        with held(dsn) as lock, kind(2) as executor:
            running = [executor.submit(Ask(dsn, WAIT)) for _ in range(2)]
            until(lambda lock=lock: waiters(lock) == 2)
            waiting = [executor.submit(Say("x")) for _ in range(2 * WAITING_PER_WORKER)]
            outcome: Future[str] = Future()

            def one_more(executor: Executor = executor, outcome: Future[str] = outcome) -> None:
                try:
                    executor.submit(Say("too much"))
                except Interrupted as interrupted:
                    outcome.set_exception(interrupted)

            thread = threading.Thread(target=one_more)
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
            executor.stop()
            with pytest.raises(Interrupted):
                outcome.result(60)
            assert all(future.cancelled() for future in waiting)
            assert not any(future.done() for future in running)
            lock.execute("SELECT pg_advisory_unlock(42)")
            assert [future.result(60) for future in running] == [1, 1]
        with pytest.raises(Interrupted):
            executor.submit(Say("after the end"))


def test_a_task_that_is_cancelled_in_time_is_not_run(databases: Callable[..., dict[str, str]]) -> None:
    dsn = databases("s1")["s1"]
    with held(dsn) as lock, InlineExecutor(1) as executor:
        first = executor.submit(Ask(dsn, WAIT))
        until(lambda: waiters(lock) == 1)
        second = executor.submit(Raise(ConfigurationError("it was run")))
        assert second.cancel()
        lock.execute("SELECT pg_advisory_unlock(42)")
        assert first.result() == 1
        assert executor.submit(Say("next")).result()[0] == "next"


# --- processes


def test_unknown_errors_arrive_by_the_name_of_their_type(pool: ProcessExecutor) -> None:
    raised = pool.submit(Silent()).exception()
    assert type(raised) is Failed
    assert "Strange: 1 and 2" in raised.message


def test_a_task_that_cannot_be_sent_fails_and_the_pool_goes_on(pool: ProcessExecutor) -> None:
    raised = pool.submit(Raise(Exception(threading.Lock()))).exception()
    assert type(raised) is Failed
    assert pool.submit(Say("x")).result()[0] == "x"


def test_both_workers_work_and_tell_their_memory(
    pool: ProcessExecutor, databases: Callable[..., dict[str, str]]
) -> None:
    dsn = databases("s1")["s1"]
    with held(dsn) as lock:
        futures = [pool.submit(Ask(dsn, WAIT)) for _ in range(2)]
        until(lambda: waiters(lock) == 2)
    wait(futures)
    assert 10_000_000 < pool.memory_bytes_max < 128_000_000


def test_workers_ignore_ctrl_c(pool: ProcessExecutor) -> None:
    pool.submit(Say("started")).result()
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert all(pool.submit(Say("x")).result()[1] in before for _ in range(10))
    assert pool.pids == before


@pytest.mark.fault
def test_a_task_that_kills_its_workers_is_given_up_and_the_pool_goes_on(pool: ProcessExecutor) -> None:
    with pytest.raises(WorkerDied, match=rf"signal 9.*Die.*{DEATHS_MAX}"):
        pool.submit(Die()).result()
    assert {pool.submit(Say(word)).result()[0] for word in "abc"} == set("abc")


@pytest.mark.fault
def test_an_idle_worker_that_died_is_replaced_when_there_is_work() -> None:
    with ProcessExecutor(1) as pool:
        _, pid = pool.submit(Say("first")).result()
        os.kill(pid, signal.SIGKILL)
        word, other = pool.submit(Say("second")).result()
        assert (word, other != pid) == ("second", True)


def test_close_leaves_no_process_behind() -> None:
    with ProcessExecutor(2) as pool:
        pool.submit(Say("x")).result()
        pids = pool.pids
        assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    pool.close()


@pytest.mark.fault
def test_close_does_not_wait_for_ever(databases: Callable[..., dict[str, str]]) -> None:
    dsn = databases("s1")["s1"]
    with held(dsn) as lock:
        pool = ProcessExecutor(1, close_patience_s=0.1)
        future = pool.submit(Ask(dsn, WAIT))
        until(lambda: waiters(lock) == 1)
        pids = pool.pids
        pool.close()
        assert isinstance(future.exception(), WorkerDied)
        assert not any(psutil.pid_exists(pid) for pid in pids)


# --- a batch in the middle

HOLD = """
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock_shared(42); RETURN NEW;
    END $$;
    CREATE TRIGGER hold BEFORE INSERT ON orders FOR EACH ROW WHEN (NEW.id = 5000) EXECUTE FUNCTION hold();
    ALTER TABLE orders ENABLE ALWAYS TRIGGER hold
"""
ROWS = "INSERT INTO orders SELECT 150, i, repeat('x', 100) FROM generate_series(1, 10000) i"
WHOLE: Interval = (None, None)


@pytest.fixture
def holding(engine: Callable[..., Engine]) -> Engine:
    """A move whose first batch waits on the target, in the middle of its COPY, while the lock 42 is held there."""
    made = engine(rows=ROWS)
    made.fetch("s2", HOLD)
    return made


def batch(engine: Engine) -> CopyBatch:
    return CopyBatch(engine.move, 1, engine.table, WHOLE, LEASE, engine.dsn["s1"], engine.dsn["s2"])


@pytest.mark.fault
def test_a_worker_killed_in_the_middle_of_a_batch_costs_nothing(holding: Engine) -> None:
    with ProcessExecutor(1) as pool:
        with held(holding.dsn["s2"]) as lock:
            future: Future[BatchDone] = pool.submit(batch(holding))
            until(lambda: waiters(lock) == 1)
            (victim,) = pool.pids
            os.kill(victim, signal.SIGKILL)
            until(lambda: pool.pids not in ((), (victim,)))
        assert future.result().digest.rows == 10_000
    assert holding.fetch("s2", "SELECT count(*), count(DISTINCT id) FROM orders") == [(10_000, 10_000)]
    assert holding.fetch("s2", "SELECT count(*) FROM shardmove.batch") == [(1,)]


COORDINATOR = """
import pickle, sys
from workers.pool import ProcessExecutor
task = pickle.load(open(sys.argv[1], "rb"))
with ProcessExecutor(1) as pool:
    future = pool.submit(task)
    sys.stdin.readline()
    print(*pool.pids, flush=True)
    future.result()
"""


@pytest.mark.fault
def test_workers_end_with_a_killed_coordinator_also_in_the_middle_of_a_copy(holding: Engine, tmp_path: Path) -> None:
    (tmp_path / "task").write_bytes(pickle.dumps(batch(holding)))
    with held(holding.dsn["s2"]) as lock:
        coordinator = subprocess.Popen(
            [sys.executable, "-c", COORDINATOR, tmp_path / "task"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        until(lambda: waiters(lock) == 1)
        out, _ = coordinator.stdin, coordinator.stdout
        assert out is not None
        assert coordinator.stdout is not None
        out.write("\n")
        out.flush()
        workers = [psutil.Process(int(pid)) for pid in coordinator.stdout.readline().split()]
        assert len(workers) == 1
        coordinator.kill()
        coordinator.communicate()
        until(lambda: all(has_ended(worker) for worker in workers))
        # The server notices the dead client while its backend still waits for the lock.
        until(lambda: waiters(lock) == 0)
    assert holding.fetch("s2", "SELECT count(*) FROM orders") == [(0,)]
    assert holding.fetch("s2", "SELECT count(*) FROM shardmove.batch") == [(0,)]


@pytest.mark.parametrize("has_answered", [True, False])
def test_a_worker_whose_pipe_ends_with_an_answer_in_it_or_before_it_ends_quietly(has_answered: bool) -> None:
    """What a killed coordinator leaves: a reset where the answer lies there unread, else a pipe that takes none."""
    context = SpawnContext()
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    ours.send(Say("x"))
    assert not has_answered or ours.poll(60)
    ours.close()
    worker.join(60)
    assert worker.exitcode == 0


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
