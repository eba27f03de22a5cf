"""A short slice of `python -m benchmarks.router`, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from benchmarks.router import MODES

ROOT: Final = Path(__file__).parents[1]
BOUND_S: Final = 500.0


@pytest.mark.timeout(BOUND_S + 100)
def test_every_path_is_measured_in_every_mode(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--seconds", "1", "--rounds", "1", "--clients", "2", "--rows", "1000", "--json", str(figures)]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.router", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    assert {row["mode"] for row in found} == set(MODES)
    assert {row["path"] for row in found} >= {"direct", "router ×1", "router ×2"}
    for row in found:
        assert row["tps"] > 0
        assert 0 < row["p50"] <= row["p99"]
        assert row["path"] == "direct" or row["memory_mb"] > 0
        assert row["path"] in ended.stdout
    assert sum(row["cpu"] for row in found if row["path"] != "direct") > 0  # it is counted in hundredths of a second
