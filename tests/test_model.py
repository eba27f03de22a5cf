"""The model of the move protocol: nothing is wrong in it, and without each of its mechanisms something is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from shardmove.domain.points import Effect
from tests.model import check, drawing
from tests.model.cases import LARGE, SMALL, TRACES, VARIANTS, Variant

MODEL = Path(check.__file__).parent
SOURCES = sorted(MODEL.glob("*.pml"))
NEEDED = "SHARDMOVE_NEEDS_SPIN"


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """Without the tools the tests are skipped, but where CI says that they are needed."""
    lacking = check.missing_tool()
    if lacking is not None and not os.environ.get(NEEDED):
        pytest.skip(lacking)
    assert lacking is None, lacking


def names_said(source: Path) -> set[str]:
    return set(re.findall(r'printf\("@ %d (\S+) \|', source.read_text(encoding="utf-8")))


def test_effects_are_named_as_in_the_code() -> None:
    said = {name for source in SOURCES for name in names_said(source)}
    assert said
    assert said <= {effect.value for effect in Effect}


def test_every_mechanism_has_a_variant() -> None:
    taken_out = {
        macro
        for source in SOURCES
        for macro in re.findall(r"^#(?:if|ifdef|ifndef) (WITHOUT_\w+)", source.read_text(), re.MULTILINE)
    }
    assert taken_out == {variant.macro for variant in VARIANTS}
    assert {path.stem for path in TRACES.glob("*.txt")} == {variant.name for variant in VARIANTS}


@pytest.mark.timeout(900)
def test_nothing_is_wrong_and_everything_is_reached() -> None:
    checked = check.check_runs(SMALL, "small")
    assert [(run, verdict.broken, verdict.trace) for run, verdict in checked if verdict.broken] == []
    assert check.never_said(checked) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_without_the_mechanism_its_invariant_breaks(variant: Variant) -> None:
    verdict = check.check_variant(variant)
    assert verdict.broken == variant.invariant
    assert drawing.as_text(verdict.trace) == variant.trace_file.read_text(encoding="utf-8"), (
        "the kept counterexample is not the one of today: `python -m tests.model.check --write`"
    )


def test_the_page_shows_the_kept_counterexamples_and_every_run() -> None:
    page = drawing.PAGE.read_text(encoding="utf-8")
    for variant in VARIANTS:
        assert f"### {variant.name}\n" in page
        assert variant.story in page
        for line in variant.trace_file.read_text(encoding="utf-8").splitlines():
            about = line[51:].replace(";", ",")
            assert about in page, line
    for run in LARGE:
        assert run.note in page, run
