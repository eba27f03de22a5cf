"""Faults on order: arms the control points of whole processes from outside, for drills and for the crash campaign.

SHARDMOVE_FAULTS names a directory; without it nothing here happens. A file in it that has the name of a point is an
order. The first process that reaches the point takes it, by giving the file the name `POINT.taken.PID`, and does what
is written in it:

    kill     ends the process by SIGKILL
    error    the step fails there, with `Failed`
    pause    stops the process, all of its threads, until it is sent SIGCONT

Each order is carried out once; write it under another name, then rename it. Orders may be given and taken back at any
time. Where there is a file named `reached`, every process adds a line for each point: its id, its role, the point's
name.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

from shardmove.domain import points
from shardmove.domain.errors import Failed

VARIABLE: Final = "SHARDMOVE_FAULTS"
REACHED: Final = "reached"


def arm_as_ordered(role: str) -> None:
    """Lets this process carry out what is ordered in the directory that the environment names, if it names one."""
    directory = os.environ.get(VARIABLE)
    if directory:
        points.arm_all(lambda name: _reach(Path(directory), role, name))


def _reach(directory: Path, role: str, name: str) -> None:
    _tell(directory, role, name)
    try:
        with (directory / name).open(encoding="utf-8") as order:  # whoever sees it taken may remove it at once
            (directory / name).rename(directory / f"{name}.taken.{os.getpid()}")
            what = order.read().strip()
    except FileNotFoundError:
        return
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "error":
            raise Failed(f"a fault was ordered at {name}", hint=f"unset {VARIABLE}")
        case other:
            raise Failed(f"an order at {name} that nobody understands: {other!r}", hint="kill, error or pause")


def _tell(directory: Path, role: str, name: str) -> None:
    try:
        handle = os.open(directory / REACHED, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return
    try:
        os.write(handle, f"{os.getpid()} {role} {name}\n".encode())
    finally:
        os.close(handle)
