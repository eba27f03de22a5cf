"""The servers of the benchmarks, the peers' figures, and one line a benchmark at the end.

fsync is on, as in earnest, unless SHARDMOVE_BENCH_FSYNC says off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from benchmarks import workload
from benchmarks.workload import Site
from shardmove.postgres.embedded import Cluster
from tests.support.engine import Engine
from workers.executors import InlineExecutor
from workers.pool import ProcessExecutor

SETTINGS: Final = {
    "fsync": os.environ.get("SHARDMOVE_BENCH_FSYNC", "on"),
    "max_wal_size": "4GB",  # no checkpoint begins in the middle of a round
    "checkpoint_timeout": "1h",
}

_lines: list[str] = []


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with Cluster(("s1", "s2"), settings=SETTINGS) as cluster:
        yield workload.prepare(cluster["s1"], cluster["s2"], workload.rows_wanted())


@pytest.fixture(scope="module")
def copied(site: Site) -> Iterator[Engine]:
    """The move, copied whole."""
    with site.fresh_target() as engine, InlineExecutor(2) as executor:
        workload.copy_verified(engine, executor, 10_000)
        workload.finish_copy(engine)
        yield engine


@pytest.fixture(scope="session")
def psql(site: Site) -> Path:
    found = workload.find_psql(site.source.binaries.directory)
    if found is None:
        pytest.skip("there is no psql: neither beside the embedded servers' programs nor on the PATH")
    return found


@pytest.fixture(scope="session")
def pipe_rows_s(site: Site, psql: Path) -> float:
    """Rows per second of the unverified pipe: the median of as many rounds as everything else has."""
    taken = []
    for _ in range(workload.rounds_wanted()):
        with site.plain_target() as target:
            with workload.stopwatch() as watch:
                assert workload.pipe(psql, site.engine.dsn["s1"], target) == site.rows
            taken += watch
    return site.rows / workload.timed(taken)


@pytest.fixture
def make_pool(site: Site) -> Iterator[Callable[[int], ProcessExecutor]]:
    """`make_pool(2)`: a pool of worker processes that are up and warm; closed at the end."""
    pools: list[ProcessExecutor] = []

    def make(workers: int) -> ProcessExecutor:
        pools.append(ProcessExecutor(workers))
        workload.warm(pools[-1], site.engine)
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Puts rows per second, and the ratio to the peer, into the benchmark's extra_info and into the last lines."""

    def record(benchmark: Any, rows: int, *, peer_rows_s: float, peer: str, **more: Any) -> None:
        rows_s = rows / benchmark.stats.stats.median
        benchmark.extra_info.update(
            {"rows": rows, "rows_s": round(rows_s), f"ratio_to_{peer}": float(f"{rows_s / peer_rows_s:.3g}"), **more}
        )
        figures = "  ".join(f"{name} {value:,}" for name, value in benchmark.extra_info.items())
        _lines.append(f"{request.node.name:48} {benchmark.stats.stats.median * 1000:10,.1f} ms  {figures}")

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _lines:
        terminalreporter.section("medians; a ratio above 1 is faster than the peer")
        for line in _lines:
            terminalreporter.write_line(line)
