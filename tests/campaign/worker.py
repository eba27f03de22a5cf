"""A worker process as the zygote's fork server makes it. A module of its own: it is imported there by its name."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from typing import Any, Final

TWIN: Final = "SHARDMOVE_CAMPAIGN_TWIN"
"""Names the mechanism that a command and its workers go without."""
_PR_SET_PDEATHSIG: Final = 1


def work(environment: Mapping[str, str], errors: str, pipe: Any) -> None:
    """Runs tasks as `workers.process.serve` does, with the command's environment and standard error."""
    from workers import process

    die_with_parent()
    handle = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 2)
    os.close(handle)
    os.environ.update(environment)
    if os.environ.get(TWIN):
        from tests.campaign import twins

        twins.take_away(os.environ[TWIN])
    process.serve(pipe)


def die_with_parent() -> None:
    """Linux kills this process when the thread that forked it ends, however it ends; also a stopped one."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
