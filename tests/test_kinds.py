"""Every kind of key, table and column: a whole move of each, or the words in which preflight refuses it.

`python -m tests.test_kinds` writes docs/kinds.md anew from the cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from shardmove.coordinator import ending
from shardmove.coordinator.hold import Hold
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from tests.kinds import CASES
from tests.support.cases import Case, MakeDatabase, page, run_case

PAGE: Final = Path(__file__).parents[1] / "docs" / "kinds.md"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_kind(case: Case, make_database: MakeDatabase) -> None:
    run_case(case, make_database)


def test_a_row_that_is_lost_is_missed(make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of all the others: what the engine does not see, because it happens behind it, the shadow shows."""
    (case,) = [case for case in CASES if case.kind == "`bigint`"]
    end = ending.complete

    def complete_and_lose(held: Hold) -> None:
        end(held)
        with effects.writing(held.target, Effect.ERASE):
            held.target.execute("DELETE FROM public.things WHERE tenant = 120 AND id = 7")

    monkeypatch.setattr(ending, "complete", complete_and_lose)
    with pytest.raises(AssertionError, match="things on s2: 1 rows are missing"):
        run_case(case, make_database)


def test_the_page_of_kinds_is_that_of_the_cases() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CASES), "python -m tests.test_kinds"


if __name__ == "__main__":
    PAGE.write_text(page(CASES), encoding="utf-8")
