"""What the benchmarks do to a pair of shards, and the peers that they stand beside. No pytest in here.

The rows of a move lie on `s1`. `s2` holds two templates: the move's armed and empty target, and the same table without
anything of ours, for the peers. Each round gets a new copy of a template, so that no round finds another's pages.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from shardmove.config import Limits
from shardmove.domain.moves import Direction
from shardmove.postgres.connect import Connection, connect
from shardmove.postgres.embedded import Server
from shardmove.protocol import fence
from shardmove.protocol.catch_up import Mirror, Pass
from shardmove.verify.comparison import Sides, TableComparison, compare
from tests.support.engine import LEASE, Engine, make_engine
from workers.copy import BatchDone, CopyBatch
from workers.cuts import walk
from workers.digest import DigestInterval
from workers.executors import Executor

ROWS_DEFAULT: Final = 200_000
ROUNDS_DEFAULT: Final = 3
TENANTS: Final = 100

SCHEMA: Final = """
    CREATE TABLE orders (
        tenant_id bigint NOT NULL,
        id bigint NOT NULL,
        customer_id bigint NOT NULL,
        status text NOT NULL,
        amount numeric(12, 2) NOT NULL,
        placed timestamptz NOT NULL,
        note text,
        PRIMARY KEY (tenant_id, id)
    )
"""
ROWS: Final = """
    INSERT INTO orders
    SELECT 100 + i % {tenants}, i, i % 9973, (ARRAY['open', 'paid', 'sent'])[1 + i % 3], i % 100000 / 100.0,
           '2025-01-01'::timestamptz + i * interval '1 second', repeat(md5(i::text), 2)
    FROM generate_series(1, {rows}) AS i;
    ANALYZE orders
"""
ROWS_OF_THE_MOVE: Final = "SELECT * FROM public.orders WHERE tenant_id >= 100 AND tenant_id < 200"

SOURCE, TARGET, PLAIN = "bench", "bench_target", "bench_plain"

_numbers = itertools.count(1)


def rows_wanted() -> int:
    return int(os.environ.get("SHARDMOVE_BENCH_ROWS", ROWS_DEFAULT))


def rounds_wanted() -> int:
    return int(os.environ.get("SHARDMOVE_BENCH_ROUNDS", ROUNDS_DEFAULT))


# --- the shards


@dataclass(frozen=True, slots=True)
class Site:
    """Both servers, and the move between them as it was before its first batch."""

    source: Server
    target: Server
    engine: Engine
    rows: int

    @contextmanager
    def fresh_target(self) -> Iterator[Engine]:
        """The move with a target of its own, armed and empty."""
        with self._copy_of(TARGET) as dsn:
            yield replace(self.engine, dsn={**self.engine.dsn, "s2": dsn})

    @contextmanager
    def plain_target(self) -> Iterator[str]:
        """A database of its own with the empty table, and nothing of ours."""
        with self._copy_of(PLAIN) as dsn:
            yield dsn

    @contextmanager
    def _copy_of(self, template: str) -> Iterator[str]:
        name = f"bench_{next(_numbers)}"
        _execute(self.target, "CREATE DATABASE {} TEMPLATE {}", name, template)
        _execute(self.target, "CHECKPOINT")  # a round does not pay for what was written before it
        try:
            yield self.target.dsn_for(name)
        finally:
            _execute(self.target, "DROP DATABASE {} WITH (FORCE)", name)


def prepare(source: Server, target: Server, rows: int) -> Site:
    """Makes the databases, the rows, and the move's objects."""
    _execute(source, "CREATE DATABASE {}", SOURCE)
    for template in (TARGET, PLAIN):
        _execute(target, "CREATE DATABASE {}", template)
    with psycopg.connect(target.dsn_for(PLAIN), autocommit=True) as connection:
        connection.execute(SCHEMA)
    engine = make_engine(
        {"s1": source.dsn_for(SOURCE), "s2": target.dsn_for(TARGET)},
        schema=SCHEMA,
        rows=ROWS.format(tenants=TENANTS, rows=rows),
    )
    with psycopg.connect(source.dsn_for(SOURCE), autocommit=True) as connection:
        connection.execute("DELETE FROM shardmove.journal_m1_1")  # the loading itself was journalled
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
    return Site(source, target, engine, rows)


def _execute(server: Server, statement: str, *names: str) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))  # type: ignore[arg-type]


# --- ours


def copy_verified(engine: Engine, executor: Executor, batch_rows: int) -> int:
    """Copies the move in batches of so many rows, each compared in its own transaction; returns the rows."""
    under_way: list[Future[BatchDone]] = []
    with connect(engine.dsn["s1"], application_name="bench") as cutter:
        for interval in walk(cutter, engine.move, engine.table, (None, None), lambda: batch_rows):
            task = CopyBatch(engine.move, 1, engine.table, interval, LEASE, engine.dsn["s1"], engine.dsn["s2"])
            under_way.append(executor.submit(task))
    return sum(future.result().digest.rows for future in under_way)


def warm(executor: Executor, engine: Engine) -> None:
    """Has every worker started and its modules imported before anything is measured."""
    nothing = (("0", "0"), ("0", "1"))
    tasks = [DigestInterval(engine.move, 1, engine.table, nothing, engine.dsn["s1"]) for _ in range(executor.workers)]
    for future in [executor.submit(task) for task in tasks]:
        future.result()


def finish_copy(engine: Engine) -> None:
    """Says on the target that every batch is there: the gate lets everything through from now on."""
    with connect(engine.dsn["s2"], application_name="bench") as connection:
        fence.set_whole(connection, engine.move.id, lease_number=LEASE)


def open_mirror(engine: Engine) -> Mirror:
    return Mirror.open(engine.move, Direction.FORWARD, engine.tables, engine.dsn)


def change(application: Connection, rows: int) -> None:
    """An application's update of so many rows of the move, in one transaction."""
    application.execute(
        "UPDATE public.orders SET amount = amount + 1 WHERE (tenant_id, id) IN"
        " (SELECT tenant_id, id FROM public.orders WHERE tenant_id >= 100 ORDER BY tenant_id, id LIMIT %s)",
        (rows,),
    )


def carry(mirror: Mirror, rows: int) -> Pass:
    """One catch-up, which must carry exactly what was changed."""
    done = mirror.catch_up()
    assert done.keys == rows, f"{done.keys} of {rows} changed rows were carried"
    return done


def compare_all(engine: Engine, executor: Executor) -> list[TableComparison]:
    """The full comparison of the move; both sides must be equal."""
    sides = Sides(engine.move, Direction.FORWARD, engine.tables, engine.dsn, lambda: open_mirror(engine))
    found = compare(sides, executor, Limits())
    assert all(table.equal for table in found)
    return found


# --- the peers


def find_psql(binaries: Path) -> Path | None:
    """psql from the servers' own programs, else the machine's, else None."""
    own = binaries / "psql"
    if own.exists():
        return own
    found = shutil.which("psql")
    return Path(found) if found else None


def pipe(psql: Path, source_dsn: str, target_dsn: str) -> int:
    """`psql COPY … TO STDOUT | psql COPY … FROM STDIN`, binary, one stream, no verification; returns the rows."""
    read = _psql(psql, source_dsn, f"COPY ({ROWS_OF_THE_MOVE}) TO STDOUT (FORMAT binary)")
    write = _psql(psql, target_dsn, "COPY public.orders FROM STDIN (FORMAT binary)")
    with subprocess.Popen(read, stdout=subprocess.PIPE) as reader:
        done = subprocess.run(write, stdin=reader.stdout, stdout=subprocess.PIPE, check=True, text=True)
    assert reader.returncode == 0
    return int(done.stdout.removeprefix("COPY ").strip())


def read_both(psql: Path, dsns: Sequence[str]) -> None:
    """Reads the move's rows on both sides at once, and throws them away: the least that a full comparison has to do."""
    command = f"COPY ({ROWS_OF_THE_MOVE} ORDER BY tenant_id, id) TO STDOUT (FORMAT binary)"
    readers = [subprocess.Popen(_psql(psql, dsn, command), stdout=subprocess.DEVNULL) for dsn in dsns]
    assert all(reader.wait() == 0 for reader in readers)


def _psql(psql: Path, dsn: str, command: str) -> list[str]:
    return [str(psql), "--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--dbname={dsn}", f"--command={command}"]


def timed(work: Iterator[float] | Sequence[float]) -> float:
    """The median of so many durations."""
    durations = sorted(work)
    return durations[len(durations) // 2]


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Appends the block's duration in seconds."""
    taken: list[float] = []
    began = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - began)
