"""The conformance run's own parts: what is recorded of a suite, what counts as a difference, which have a reason."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conformance.differences import REASONS, Reason, compare, load_reasons, told
from tests.conformance.runs import HUNG, Outcomes, run
from tests.conformance.suites import RECORDER, Address, Place, Suite

ADDRESS = Address("127.0.0.1", 1, "nobody", "nothing")
SUITE = Suite("some", lambda _: "1", lambda _: (), lambda _: (), lambda address: address.environment)
TESTS = """
import os, pytest

def test_good(): assert os.environ["PGPORT"] == "1"
def test_bad(): assert 1 == 2
def test_left_out(): pytest.skip("not here")
@pytest.mark.xfail
def test_known(): assert 0
@pytest.fixture
def broken():
    yield
    raise OSError("in tear-down")
def test_torn(broken): pass
def test_crash(): os._exit(3)
@pytest.mark.parametrize("text", ["a", "b[c]"])
def test_after(text): pass
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("tests", "plugin"):
        (tmp_path / name).mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "plugin" / "recorder.py").write_text(RECORDER.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", encoding="utf-8")
    return Place(SUITE, "1", tmp_path, Path(sys.executable), "*")


def outcomes(**of: str) -> Outcomes:
    return Outcomes(dict(of), dict.fromkeys(of, "what it said"))


def test_a_run_records_every_test_also_after_one_that_takes_the_process_with_it(place: Place) -> None:
    found = {
        test.removeprefix("tests/test_it.py::test_"): outcome for test, outcome in run(place, ADDRESS, "a").of.items()
    }
    assert found == {
        "good": "passed",
        "bad": "failed",
        "left_out": "skipped",
        "known": "xfailed",
        "torn": "failed",
        "crash": HUNG,
        "after[a]": "passed",
        "after[b[c]]": "passed",
    }


def test_a_run_of_some_tests_runs_no_others(place: Place) -> None:
    only = {"tests/test_it.py::test_good", "tests/test_it.py::test_after[b[c]]"}
    assert run(place, ADDRESS, "a", only=only).passed == only


def test_a_difference_is_what_passes_directly_and_not_through_the_router() -> None:
    direct = outcomes(a="passed", b="passed", c="failed", d="passed", e="skipped")
    routed = outcomes(a="passed", b="failed", c="passed", e="failed")
    found = compare("some", direct, routed, [Reason("some", ["b"], "it is so"), Reason("other", ["d"], "not here")])
    assert [(each.test, each.routed, each.why) for each in found.differences] == [
        ("b", "failed", "it is so"),
        ("d", "not collected", None),
    ]
    assert [each.test for each in found.unexplained] == ["d"]
    assert (found.direct, found.routed, found.better) == (3, 1, ["c"])
    assert found.ratio == pytest.approx(1 / 3)
    assert "UNEXPLAINED d" in told(found)


def test_a_pattern_takes_brackets_as_they_are() -> None:
    reason = Reason("some", ["t.py::test_a[*-off]"], "…")
    assert reason.explains("some", "t.py::test_a[x-off]")
    assert not reason.explains("some", "t.py::test_a[x-on]")
    assert not reason.explains("some", "t.py::test_ao")


def test_every_reason_says_why_and_is_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
    said = re.sub(r"\s+", " ", page)
    for entry in tomllib.loads(REASONS.read_text(encoding="utf-8"))["difference"]:
        assert set(entry) == {"suite", "tests", "why"}
        assert entry["why"] in said, entry["why"]
    assert load_reasons()
