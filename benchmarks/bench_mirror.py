"""One catch-up over open connections, after an application changed 1, 100 or 5,000 rows of the range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import workload
from benchmarks.workload import Site
from shardmove.protocol.catch_up import Mirror
from tests.support.engine import Engine
from tests.support.servers import connect

pytestmark = [pytest.mark.benchmark(group="mirror"), pytest.mark.timeout(1800)]


@pytest.fixture
def mirror(copied: Engine) -> Iterator[Mirror]:
    with workload.open_mirror(copied) as opened:
        opened.until_empty()
        yield opened


@pytest.mark.parametrize("changed", [1, 100, 5_000])
def test_catch_up(
    benchmark: Any,
    site: Site,
    copied: Engine,
    mirror: Mirror,
    pipe_rows_s: float,
    tell: Callable[..., None],
    changed: int,
) -> None:
    rows = min(changed, site.rows)
    with connect(copied.dsn["s1"], application_name="application") as application:

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            workload.change(application, rows)
            return (mirror, rows), {}

        rounds = workload.rounds_wanted() * (10 if changed <= 100 else 3)
        benchmark.pedantic(workload.carry, setup=setup, rounds=rounds)
    tell(benchmark, rows, peer_rows_s=pipe_rows_s, peer="psql_pipe")
