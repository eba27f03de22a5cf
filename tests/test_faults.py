"""A slice of the crash campaign (`tests/campaign`), its matrix, and its twins. `make fault` plays all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from shardmove.domain.points import Effect
from tests.campaign.cells import EACH_POINT, NOT_REACHED, cells, not_recorded
from tests.campaign.driver import told
from tests.campaign.ground import Ground
from tests.campaign.play import Recording, play, record
from tests.campaign.strikes import VICTIMS, Spec
from tests.campaign.twins import TWINS

CELLS: dict[str, str] = {
    "coordinator": "complete:0:command:flip.after:1:coordinator::serve:0",
    "paused": "complete:0:command:flip.before:1:paused::again:0",
    "paused early": "rollback:0:command:arm.before:3:paused::twice:1",
    "paused, with an attendant alone": "undo:1:command:catch_up.after_giver_snapshot:3:paused::serve:0",
    "error": "undo:1:command:give_away.before:1:error::twice:0",
    "worker": "complete:0:worker:batch.after:2:worker::again:0",
    "worker without its coordinator": "rollback:1:worker:erase.before:2:coordinator::race:1",
    "attendant": "served:0:attendant:catch_up.receiver.after:1:attendant::again:0",
    "source": "complete:0:command:close.after:1:source::again:1",
    "target": "complete:0:command:open.before:1:target::serve:0",
    "catalog": "complete:0:command:flip.before:1:catalog::race:0",
    "cut": "complete:0:command:catch_up.giver.before:1:cut:s1:twice:0",
    "half-open": "complete:0:command:open_attempt.after:1:half-open:cat:again:0",
}
"""One of each kind, where it hurts."""

BLIND: dict[str, tuple[str, str]] = {
    "closing": ("complete:0:command:flip.after:1:coordinator::again:0", "rows"),
    "lease of objects": ("complete:0:command:initializing.before_objects:1:paused::again:1", "left over"),
    "one transaction": ("complete:0:worker:batch.before:2:worker::again:0", "failures"),
    "bounded waits": (CELLS["paused, with an attendant alone"], "failures"),
}
"""Which mechanism the commands go without, where they are struck, and what has to be seen."""

COMPLETE = ("served", "phases", "create", "takeover", "pause", "mend", "estate")
"""Scenarios that reach all points between them."""

TRIES = 5
"""A point may be passed unseen, where this process gets no turn, and a twin's damage with it."""
PATIENCE_S = 3.0
"""Of a twin, which may well come to no end."""


pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground() as made:
        yield made


@pytest.mark.fault
@pytest.mark.parametrize("kind", CELLS)
def test_a_strike(ground: Ground, kind: str) -> None:
    for _ in range(TRIES):
        result = play(ground, Spec.parse(CELLS[kind]))
        assert result.ok, told(result)
        if result.hit:
            assert result.writes > 0
            return
    pytest.fail(f"{CELLS[kind]}: the point was not reached")


@pytest.fixture(scope="module")
def recordings(ground: Ground) -> list[Recording]:
    made = [record(ground, name) for name in COMPLETE]
    for recording in made:
        assert recording.result.ok, told(recording.result)
    return made


@pytest.mark.fault
def test_every_point_is_in_a_scenario(recordings: Sequence[Recording]) -> None:
    """Recorded or excused, and not both; what is recorded and is no point of the list has been forgotten there."""
    missing = not_recorded(recordings)
    assert missing == set(NOT_REACHED)
    assert {point for recording in recordings for _, _, point in recording.counts} == EACH_POINT - missing


@pytest.mark.fault
def test_every_effect_is_struck_before_and_after(recordings: Sequence[Recording]) -> None:
    """By every victim of whoever reaches it; and what is drawn can be said in a word, and read again."""
    matrix = cells(recordings)
    for effect in Effect:
        for point in {effect.before, effect.after} - set(NOT_REACHED):
            roles = {cell.role for cell in matrix if cell.point == point}
            assert roles
            for role in roles:
                struck = {cell.victim for cell in matrix if (cell.role, cell.point) == (role, point)}
                assert struck == set(VICTIMS[role])
    for cell in matrix:
        for run in range(4):
            spec = cell.draw(1, run)
            assert Spec.parse(str(spec)) == spec
        assert len({cell.draw(1, run).aftermath for run in range(4)}) > 1


@pytest.mark.fault
@pytest.mark.parametrize("twin", BLIND)
def test_the_campaign_sees_what_a_missing_mechanism_does(ground: Ground, twin: str) -> None:
    assert set(BLIND) == set(TWINS)
    word, damage = BLIND[twin]
    for _ in range(TRIES):
        result = play(ground, Spec.parse(word), twin=twin, patience_s=PATIENCE_S)
        found = {
            "rows": result.lost + result.different,
            "left over": len(result.left),
            "failures": len(result.failures),
        }
        if result.hit and found[damage]:
            return
    pytest.fail(f"without {twin} the run ended as well as with it: {told(result)}")
