"""Stories for a while, with a new seed each time; or one story again, step by step.

python -m tests.machine --minutes 30
python -m tests.machine .hypothesis/machine-17.txt
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

from shardmove.postgres.embedded import Cluster
from tests.machine.machine import FAILED, machine, play, replay, told, tour
from tests.machine.place import SERVERS, Ground

EXAMPLES = 50
"""Stories from one seed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.machine", description=__doc__)
    parser.add_argument("script", nargs="?", type=Path, help="a story to tell again")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="this one alone")
    asked = parser.parse_args()
    logging.getLogger("psycopg").addHandler(logging.NullHandler())  # it tells of each session that is cut off
    with Cluster(SERVERS, settings={"fsync": "off"}) as servers:
        ground = Ground(servers)
        if asked.script is not None:
            return again(ground, asked.script)
        return explore(ground, asked.minutes, asked.seed)


def again(ground: Ground, script: Path) -> int:
    """0 where the story ends well now."""
    try:
        replay(ground, script.read_text(encoding="utf-8"))
    except AssertionError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


def explore(ground: Ground, minutes: float, only: int | None) -> int:
    """0 where nothing was found."""
    began, counts = time.monotonic(), Counter[str]()
    points = tour(ground)
    while True:
        number = secrets.randbelow(2**32) if only is None else only
        made = machine(ground, points, failed=FAILED / f"machine-{number}.txt")
        try:
            play(made, number=number, examples=EXAMPLES)
        except Exception as error:
            print(made.failed.read_text(encoding="utf-8") if made.failed.exists() else "(no script)")
            print(f"{type(error).__name__}: {error}")
            print(f"seed {number}; again: python -m tests.machine {made.failed}", flush=True)
            return 1
        finally:
            counts.update(made.counts)
            print(f"seed {number}", told(counts, began), sep="\n", flush=True)
        if only is not None or time.monotonic() - began > minutes * 60:
            return 0


if __name__ == "__main__":
    sys.exit(main())
