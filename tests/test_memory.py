"""A table of a million rows splits with little memory, in the coordinator and in every worker."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shardmove.domain.moves import State
from tests.support.world import World

ROWS = 1_000_000
RESIDENT_MAX_BYTES = 128 * 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peaks from /proc")


DEFAULTS = {"batch_bytes": 4_000_000, "batch_rows_max": 50_000}


@pytest.mark.timeout(900)
def test_a_million_rows_split_with_little_memory(make_world: Callable[..., World]) -> None:
    world = make_world(limits=DEFAULTS)
    with world.connect("s1") as connection:
        connection.execute(
            "INSERT INTO tenants (tenant_id, name) SELECT i, 'tenant ' || i FROM generate_series(1000, 1000 + %s) i"
            " ON CONFLICT DO NOTHING",
            (ROWS,),
        )
        connection.execute("VACUUM ANALYZE tenants")  # else the server does it, while the move asks for its locks
    move_id = world.split(at=1000)
    coordinator = world.spawn("run", move_id)
    peaks: dict[int, int] = {}
    while coordinator.poll() is None:
        for process in _family(coordinator.pid):
            peaks[process] = max(peaks.get(process, 0), _peak_bytes(process))
        with suppress(subprocess.TimeoutExpired):
            coordinator.wait(timeout=0.2)
    assert coordinator.returncode == 0
    assert world.move(move_id).state is State.READY
    assert world.fetch("s2", "SELECT count(*) FROM tenants WHERE tenant_id >= 1000") == [(ROWS + 1,)]
    print({process: f"{peak / 2**20:.0f} MB" for process, peak in peaks.items()})
    assert len(peaks) >= 3, "the coordinator and two workers were seen"
    assert max(peaks.values()) < RESIDENT_MAX_BYTES, peaks


def _family(process_id: int) -> list[int]:
    try:
        process = psutil.Process(process_id)
        return [process_id, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _peak_bytes(process_id: int) -> int:
    """The most that was ever resident (VmHWM), or 0 where the process is gone."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
