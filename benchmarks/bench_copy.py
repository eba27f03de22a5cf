"""The verified copy, beside `psql COPY | psql COPY` of the same rows in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import workload
from benchmarks.workload import Site
from workers.pool import ProcessExecutor

pytestmark = [pytest.mark.benchmark(group="copy"), pytest.mark.timeout(1800)]


@pytest.fixture
def targets() -> Iterator[ExitStack]:
    """What a round's set-up opened is closed by the next one's, or at the end."""
    with ExitStack() as stack:
        yield stack


def test_psql_pipe_unverified(
    benchmark: Any, site: Site, psql: Path, pipe_rows_s: float, tell: Callable[..., None], targets: ExitStack
) -> None:
    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        targets.close()
        return (psql, site.engine.dsn["s1"], targets.enter_context(site.plain_target())), {}

    benchmark.pedantic(workload.pipe, setup=setup, rounds=workload.rounds_wanted())
    tell(benchmark, site.rows, peer_rows_s=pipe_rows_s, peer="psql_pipe")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("batch_rows", [2_000, 10_000, 50_000])
def test_copy_verified(
    benchmark: Any,
    site: Site,
    pipe_rows_s: float,
    tell: Callable[..., None],
    targets: ExitStack,
    make_pool: Callable[[int], ProcessExecutor],
    batch_rows: int,
    workers: int,
) -> None:
    pool = make_pool(workers)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        targets.close()
        return (targets.enter_context(site.fresh_target()), pool, batch_rows), {}

    copied = benchmark.pedantic(workload.copy_verified, setup=setup, rounds=workload.rounds_wanted())
    assert copied == site.rows
    tell(
        benchmark,
        site.rows,
        peer_rows_s=pipe_rows_s,
        peer="psql_pipe",
        worker_memory_mb=round(pool.memory_bytes_max / 2**20),
    )
