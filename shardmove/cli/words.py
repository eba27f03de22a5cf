"""The words of the command line that are more than text: durations and lists."""

from __future__ import annotations

import re

import typer

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d)?")
_WORD = r'\s*("(?:[^"]|"")*"|[^",\s](?:[^",]*[^",\s])?)\s*'
_PART = re.compile(f"{_WORD},")
_LIST = re.compile(f"{_WORD}(?:,{_WORD})*")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`; a bare number is seconds. Raises a usage error for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found["number"]) <= 0:
        raise typer.BadParameter(f"{text!r} is not a duration: write 90s, 30m or 2h")
    return float(found["number"]) * _SECONDS[found["unit"] or "s"]


def listed(text: str) -> list[str]:
    """`a,b` as its parts; one with a comma, a quote or outer blanks in it stands in double quotes, a quote doubled.

    Raises a usage error where one is empty and not in quotes.
    """
    if _LIST.fullmatch(text) is None:
        raise typer.BadParameter(f'{text!r} is not a list: write a,b; what has a comma in it, in "double quotes"')
    parts = _PART.findall(text + ",")
    return [part[1:-1].replace('""', '"') if part.startswith('"') else part for part in parts]
