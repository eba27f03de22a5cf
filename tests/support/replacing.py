"""Twins of mechanisms that live in another process: routers whose functions are replaced as they start."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def replaced(directory: Path, code: str) -> Iterator[None]:
    """Python processes that start within the block run this first; e.g. `from router import scatter; scatter.x = …`."""
    place = directory / "replaced"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(textwrap.dedent(code), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{place}:{ROOT}")
        yield
