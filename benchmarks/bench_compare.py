"""The full comparison of both sides, beside psql that only reads both sides and throws the rows away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import workload
from benchmarks.workload import Site
from tests.support.engine import Engine
from workers.pool import ProcessExecutor

pytestmark = [pytest.mark.benchmark(group="comparison"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def read_rows_s(site: Site, copied: Engine, psql: Path) -> float:
    """Rows per second of reading both sides at once; a row of both sides counts once."""
    taken = []
    for _ in range(workload.rounds_wanted()):
        with workload.stopwatch() as watch:
            workload.read_both(psql, list(copied.dsn.values()))
        taken += watch
    return site.rows / workload.timed(taken)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_comparison(
    benchmark: Any,
    site: Site,
    copied: Engine,
    read_rows_s: float,
    tell: Callable[..., None],
    make_pool: Callable[[int], ProcessExecutor],
    workers: int,
) -> None:
    pool = make_pool(workers)
    found = benchmark.pedantic(workload.compare_all, args=(copied, pool), rounds=workload.rounds_wanted())
    assert sum(table.rows_owner for table in found) == site.rows
    tell(benchmark, site.rows, peer_rows_s=read_rows_s, peer="psql_read", intervals=found[0].intervals)
