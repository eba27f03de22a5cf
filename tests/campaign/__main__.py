"""The crash campaign: real processes and servers, struck at every control point.

python -m tests.campaign                                  every cell three times
python -m tests.campaign --minutes 20 --jobs 2            as many as that, in the order of the seed
python -m tests.campaign --only 'flip.*:paused'           cells that match scenario:step:role:point:victim
python -m tests.campaign --replay SPEC                    one run again, and its story
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from tests.campaign import driver, report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="of each cell")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--jobs", type=int, default=2, help="processes with servers of their own")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="where the tables of the report go")
    parser.add_argument("--evidence", type=Path, default=None, metavar="DIRECTORY", help="of runs that failed")
    parser.add_argument("--replay", nargs="+", metavar="SPEC")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, nothing of ours stays
    kept = asked.evidence or Path(tempfile.mkdtemp(prefix="campaign-evidence-"))
    kept.mkdir(parents=True, exist_ok=True)
    if asked.replay:
        return 0 if all(result.ok for result in driver.replay(asked.replay, kept)) else 1
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    print(f"seed {seed}; evidence of failed runs: {kept}", flush=True)
    campaign = driver.Driver(
        seed=seed, runs=asked.runs, only=asked.only, minutes=asked.minutes, jobs=asked.jobs, kept=kept
    ).run()
    print(report.summary(campaign), flush=True)
    if asked.write is not None:
        report.write(campaign, asked.write)
    return 1 if campaign.failed or not campaign.runs else 0


if __name__ == "__main__":
    sys.exit(main())
