"""The seed of the run, and the fixtures of `tests/support`."""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

SEED_VARIABLE: Final = "SHARDMOVE_SEED"

pytest.register_assert_rewrite("tests.support")  # before one of its modules imports another

# How long an example takes is the machine's affair.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

pytest_plugins = [
    f"tests.support.{module.stem}"
    for module in sorted((Path(__file__).parent / "support").glob("*.py"))
    if not module.stem.startswith("_")
]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses the run's seed once; parallel test processes inherit it through the environment."""
    seed = os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**32)))
    if hasattr(config.option, "hypothesis_seed"):
        config.option.hypothesis_seed = config.option.hypothesis_seed or seed


def pytest_report_header() -> str:
    seed = os.environ[SEED_VARIABLE]
    return f"seed: {seed} (again with {SEED_VARIABLE}={seed})"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness that depends on the run's seed and the test's name, and not on which tests ran before."""
    return random.Random(f"{os.environ[SEED_VARIABLE]} {request.node.nodeid}")
