"""Orders to routers: to die, or to stop, where a control point is reached (`shardmove/faults.py`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from shardmove.faults import VARIABLE

BOUND_S: Final = 120.0


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
    """The process that carried the order out. One that was to stop has stopped: what wakes it comes behind that."""
    deadline = time.monotonic() + BOUND_S
    while not (found := list(faults.glob(f"{point}.taken.*"))):
        assert time.monotonic() < deadline, f"{point} is not reached"
        time.sleep(0.02)
    [taken] = found
    pid = int(taken.name.rpartition(".")[2])
    if taken.read_text(encoding="utf-8").strip() == "pause":
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, f"{point} does not stop process {pid}"
            time.sleep(0.005)
    return pid
