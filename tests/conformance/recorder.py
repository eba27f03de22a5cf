"""A pytest plugin, loaded by itself into the process of a suite (`-p recorder`): it imports nothing of ours.

It appends to the file that CONFORMANCE_RECORD names, a JSON line each: what was collected, which test began, what
became of it. Left out is what does not match CONFORMANCE_PATTERN, and what the JSON list of
the file CONFORMANCE_ONLY does not name.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

_SAID_MAX = 400
_pattern = os.environ.get("CONFORMANCE_PATTERN", "*").replace("[", "[[]")  # a bracket stands for itself
_chosen = set(json.loads(Path(_file).read_text("utf-8"))) if (_file := os.environ.get("CONFORMANCE_ONLY")) else None
_found: dict[str, tuple[str, str]] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _is_wanted(item.nodeid)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if _is_wanted(item.nodeid)]


def _is_wanted(test: str) -> bool:
    return fnmatchcase(test, _pattern) and (_chosen is None or test in _chosen)


def pytest_collection_finish(session: pytest.Session) -> None:
    _append(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    _found[nodeid] = ("passed", "")
    _append(began=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The worst of set-up, call, subtests and tear-down is what became of the test."""
    if report.nodeid in _found and _found[report.nodeid][0] == "passed" and report.outcome != "passed":
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        _found[report.nodeid] = (outcome, _said(report.longrepr))


def pytest_runtest_logfinish(nodeid: str) -> None:
    outcome, said = _found.pop(nodeid, ("passed", ""))
    _append(ended=nodeid, outcome=outcome, said=said)


def _said(longrepr: Any) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    return str(longrepr[-1] if isinstance(longrepr, tuple) else crash.message if crash else longrepr)[:_SAID_MAX]


def _append(**record: Any) -> None:
    with Path(os.environ["CONFORMANCE_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
