"""A short slice of the benchmarks: each function of them, with few rows and one round, so that none can rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = 1_000
CHOSEN = "pipe or catch_up or 10000-2 or (comparison and 2)"
BOUND_S = 240.0


def test_every_benchmark_runs_and_tells_its_ratio_to_a_peer(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = ["--benchmark-only", "-q", "-p", "no:cacheprovider", "-k", CHOSEN]
    places = [f"--benchmark-json={results}", f"--basetemp={tmp_path / 'benchmarks'}"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, *places],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    benchmarks = json.loads(results.read_text(encoding="utf-8"))["benchmarks"]
    if "skipped" not in ended.stdout:  # without psql there is no peer, and the benchmarks say so
        assert {each["group"] for each in benchmarks} == {"copy", "mirror", "comparison"}
    for each in benchmarks:
        assert each["extra_info"]["rows_s"] > 0
        assert any(name.startswith("ratio_to_") for name in each["extra_info"])


def _environment() -> dict[str, str]:
    """Ours, without what the test run around us told its own processes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    wanted = {"SHARDMOVE_BENCH_ROWS": str(ROWS), "SHARDMOVE_BENCH_ROUNDS": "1", "SHARDMOVE_BENCH_FSYNC": "off"}
    return {**inherited, **wanted}
