"""Random schemas: what preflight lets pass is moved whole, and what it refuses is left alone.

A short slice with every run; `make schemas SEEDS=200 FIRST=0` for more. A seed is one schema, always the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

import pytest

from tests.support.campaign import CAMPAIGN_VARIABLE, PROPERTY, run_seed
from tests.support.cases import MakeDatabase
from tests.support.schemas import generate

SLICE: Final = (0, 1, 3, 4, 7, 9, 10, 13, 14, 15, 105, 108)
"""Of every pair of versions, key by hash and by range, partitioned, inherited, with triggers; two are refused."""


def _seeds() -> Sequence[int]:
    """Those of a campaign, or the few of every run."""
    first = int(os.environ.get("SHARDMOVE_SCHEMAS_FIRST", "0"))
    seeds = os.environ.get(CAMPAIGN_VARIABLE)
    return SLICE if seeds is None else range(first, first + int(seeds))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", _seeds())
def test_random_schema(seed: int, make_database: MakeDatabase, record_property: Callable[[str, object], None]) -> None:
    generated = generate(seed)
    said = {"seed": seed, "kinds": ", ".join(generated.kinds), "outcome": ""}
    record_property(PROPERTY, said)
    said["outcome"] = run_seed(generated, make_database)


def test_a_seed_is_always_the_same_schema() -> None:
    assert generate(3) == generate(3)
    assert generate(3).case.schema != generate(4).case.schema
