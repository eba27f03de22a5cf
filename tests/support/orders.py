"""Orders to routers: to die, or to stop, where a control point is reached (`shardmove/faults.py`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import pytest

from shardmove.faults import VARIABLE

BOUND_S: Final = 60.0


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Orders for the routers that are started; a file named as a point, with `kill` or `pause` in it."""
    place = tmp_path / "faults"
    place.mkdir()
    monkeypatch.setenv(VARIABLE, str(place))
    return place


def order(faults: Path, point: str, what: str) -> None:
    (faults / "order").write_text(what, encoding="utf-8")
    (faults / "order").rename(faults / point)


def await_taken(faults: Path, point: str) -> int:
    """The process that carried the order out."""
    deadline = time.monotonic() + BOUND_S
    while not list(faults.glob(f"{point}.taken.*")):
        assert time.monotonic() < deadline, f"{point} is not reached"
        time.sleep(0.02)
    return int(next(faults.glob(f"{point}.taken.*")).name.rpartition(".")[2])
