"""What a campaign came to: a few lines for the terminal, and the tables of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from shardmove import __version__
from tests.campaign.cells import NOT_REACHED, not_recorded
from tests.campaign.driver import Campaign
from tests.campaign.play import Result
from tests.campaign.strikes import VICTIMS

BEGIN: Final = "<!-- the campaign's tables begin -->"
END: Final = "<!-- the campaign's tables end -->"
COLUMNS: Final = tuple(dict.fromkeys(victim for victims in VICTIMS.values() for victim in victims))


def summary(campaign: Campaign) -> str:
    """For the terminal."""
    total = _sums([result for _, result in campaign.runs])
    lines = [
        f"seed {campaign.seed}: {len(campaign.runs)} runs of {len({cell for cell, _ in campaign.runs})} of"
        f" {len(campaign.cells)} cells in {campaign.seconds / 60:.0f} min, {len(campaign.not_hit)} not hit",
        f"{total[1]} acknowledged writes: lost {total[2]}, different {total[3]}, left over {total[4]},"
        f" failures {total[5]}",
    ]
    failed = campaign.failed
    lines += [f"FAILED: python -m tests.campaign --replay {result.spec}" for result in failed]
    return "\n".join(lines)


def write(campaign: Campaign, page: Path) -> None:
    """Puts the tables between the page's two marks; all else stays as it is."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{tables(campaign)}\n\n{END}{tail}", encoding="utf-8")


def tables(campaign: Campaign) -> str:
    """As Markdown."""
    return "\n\n".join(["\n".join(_what(campaign)), "\n".join(_by_victim(campaign)), "\n".join(_by_point(campaign))])


def _what(campaign: Campaign) -> Iterable[str]:
    results = [result for _, result in campaign.runs]
    runs, writes, lost, different, left, failures = _sums(results)
    yield (
        f"{datetime.now(UTC):%Y-%m-%d}, shardmove {__version__}, PostgreSQL {campaign.version}, seed {campaign.seed}:"
        f" **{runs:,} runs** of {len({cell for cell, _ in campaign.runs})} of {len(campaign.cells)} cells, in"
        f" {campaign.seconds / 60:.0f} minutes, beside **{writes:,} acknowledged writes**:"
        f" **{lost} lost, {different} different, {left} left over, {failures} failures**."
    )
    if campaign.not_hit:
        yield f"Not counted: {len(campaign.not_hit)} runs in which the point was not reached this time."
    missing = sorted(not_recorded(campaign.recordings) - set(NOT_REACHED))
    if missing:
        yield f"Points that no scenario reached: {', '.join(missing)}."


def _by_victim(campaign: Campaign) -> Iterable[str]:
    yield "| victim | cells | runs | acknowledged writes | lost | different | left over | failures |"
    yield "|---|---|---|---|---|---|---|---|"
    for victim in COLUMNS:
        of_victim = [(cell, result) for cell, result in campaign.runs if cell.victim == victim]
        if of_victim:
            cells = len({cell for cell, _ in of_victim})
            sums = _sums([result for _, result in of_victim])
            yield f"| {victim} | {cells} | " + " | ".join(f"{each:,}" for each in sums) + " |"


def _by_point(campaign: Campaign) -> Iterable[str]:
    yield "Runs of each point:"
    yield ""
    yield "| point | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    known = {(cell.point, cell.victim) for cell in campaign.cells}
    counts: dict[tuple[str, str], int] = {}
    for cell, _ in campaign.runs:
        counts[cell.point, cell.victim] = counts.get((cell.point, cell.victim), 0) + 1
    for point in sorted({point for point, _ in known}):
        cells = [str(counts.get((point, each), 0)) if (point, each) in known else "" for each in COLUMNS]
        yield f"| `{point}` | " + " | ".join(cells) + " |"


def _sums(results: Sequence[Result]) -> tuple[int, int, int, int, int, int]:
    """Runs, acknowledged writes, lost, different, left over, failures."""
    return (
        len(results),
        sum(result.writes for result in results),
        sum(result.lost for result in results),
        sum(result.different for result in results),
        sum(len(result.left) for result in results),
        sum(len(result.failures) for result in results),
    )
