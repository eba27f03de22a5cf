"""The words of the command line that are more than text: durations, lists of keys, key ranges."""

from __future__ import annotations

import re

import typer

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`; a bare number is seconds. Raises a usage error for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found["number"]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a duration: write 90s, 30m or 2h")
    return float(found["number"]) * _SECONDS[found["unit"] or "s"]


def listed(text: str) -> list[str]:
    """`a,b` as its parts. Raises a usage error where one is empty."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(f"{text!r} is not a list: write a,b")
    return parts
