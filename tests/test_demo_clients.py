"""The shop's writers behind a router: what they are told in a move, when the router dies, and how it is counted."""

from __future__ import annotations

from typing import Any

import pytest

from shardmove.demo import ledger, measure, operations
from shardmove.demo.ledger import ANYTHING, Ledger, Outcome, Write
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from tests.support.router import Routers
from tests.support.world import BOUND_S, World

LATE = {operation.__name__ for operation in operations.LATE}


def test_clients_of_a_router_see_no_error_in_a_whole_move(world: World, routers: Routers) -> None:
    """Transactions may be told to try again; single statements are told nothing but their result."""
    router = routers.start(world.write_config(), hold_timeout_s=60.0)
    with world.writers(router_dsn=router.dsn(), singles_share=0.6) as fleet:
        fleet.await_writes(50)
        move_id = world.split(at=20)
        world.run(move_id, State.READY)
        for direction in (Direction.FORWARD, Direction.BACK, Direction.FORWARD):
            world.cut_over(move_id, direction)
            fleet.await_writes(50)
        world.complete(move_id)
        fleet.await_writes(50)
    summary = fleet.summary()
    assert summary.errors == ()
    assert summary.unknown == 0
    seen = measure.behaviour(summary.writes, within=lambda tenant: tenant >= 20, late=LATE)
    assert (seen.single_errors, seen.fenced_first) == (0, 0)
    assert seen.singles > 0
    assert seen.transactions > 0
    report = world.check(absent_on={"s1": [KeyRange(20, None)]})
    assert report.ok, str(report)


@pytest.mark.fault
def test_a_router_that_dies_leaves_unknown_outcomes_and_no_lies(world: World, routers: Routers) -> None:
    router = routers.start(world.write_config())
    with world.writers(router_dsn=router.dsn(), singles_share=0.6, rate=1000.0, deadline_s=BOUND_S) as fleet:
        for _ in range(3):
            fleet.await_writes(40)
            router.kill()
            router.start()
        fleet.await_writes(40)
    summary = fleet.summary()
    assert summary.errors == ()
    report = world.check()
    assert report.ok, str(report)
    assert report.unknown == summary.unknown


def test_every_single_operation_knows_its_row_beforehand(world: World, routers: Routers) -> None:
    """Else the ledger could not say which row an interrupted statement may have made."""
    router = routers.start(world.write_config())
    mix = dict.fromkeys(operations.SINGLES, 1.0)
    graves = {operations.cancel_order: 1.0}
    with world.writers(router_dsn=router.dsn(), operations=graves, singles=mix, singles_share=0.8) as fleet:
        fleet.await_writes(200)
    assert fleet.summary().errors == ()
    intents = [record for path in (world.directory / "ledger").glob("writer-*") for record in ledger._records(path)]
    announced = {
        (record["intent"], path_row[0], path_row[1])
        for record in intents
        if "intent" in record
        for path_row in record["rows"]
        if path_row[2] == ANYTHING
    }
    assert announced
    written = {write.operation for write in fleet.summary().writes if write.is_single}
    assert written == {operation.__name__ for operation in operations.SINGLES}
    assert world.check().ok


# --- the ledger, and what is counted


def a_write(number: int = 1, outcome: Outcome = Outcome.ACKNOWLEDGED, **values: Any) -> Write:
    defaults: dict[str, Any] = {
        "writer": "00",
        "tenant": 1,
        "operation": "change_order",
        "isolation": "READ_COMMITTED",
        "started": 1.0,
        "ended": 2.0,
        "shard": None,
        "attempts": 1,
    }
    return Write(number=number, outcome=outcome, **{**defaults, **values})


@pytest.mark.parametrize("outcome", [None, Outcome.UNKNOWN])
def test_a_single_statement_that_was_interrupted_allows_any_row_until_the_next(tmp_path: Any, outcome: Any) -> None:
    ledger.write_baseline(tmp_path, {"t": {"1": "(before)"}})
    book = Ledger(ledger.new_ledger_path(tmp_path, 1, "00"))
    book.intend(1, [("t", "1", ANYTHING)])
    if outcome is not None:
        book.conclude(a_write(1, outcome))
    book.close()
    state = ledger.read(tmp_path).rows["t"]["1"]
    assert all(ledger.allows(state, image) for image in ("(before)", "(after)", None))
    book = Ledger(ledger.new_ledger_path(tmp_path, 2, "00"))
    book.intend(2, [("t", "1", "(known)")])
    book.conclude(a_write(2))
    book.close()
    state = ledger.read(tmp_path).rows["t"]["1"]
    assert ledger.allows(state, "(known)")
    assert not ledger.allows(state, "(after)")


def test_a_stall_behind_a_router_lasts_from_the_hold_to_the_first_answer_after_the_flip() -> None:
    writes = [
        a_write(started=0.0, ended=9.0, tenant=99),  # another range
        a_write(started=0.1, ended=0.9),  # over before the hold
        a_write(started=0.990, ended=1.002),  # under way when the range was held
        a_write(started=1.000, ended=1.030),  # held
        a_write(started=1.010, ended=1.025),
        a_write(started=1.026, ended=1.500),  # began after the first answer of the new owner
        a_write(outcome=Outcome.FAILED, started=1.0, ended=1.4),
    ]
    found = measure.stall_around(writes, 1.0, 1.02, within=lambda tenant: tenant == 1)
    assert found is not None
    assert found.stall_ms == pytest.approx(30.0)
    assert (found.begins, found.ends, found.disturbed) == (1.0, 1.025, 3)
    assert measure.stall_around(writes, 1.0, 10.0) is None


def test_who_was_fenced_is_counted_by_how_the_transaction_began() -> None:
    writes = [
        a_write(fenced=2),
        a_write(operation="review_orders", fenced=1),
        a_write(tenant=99, fenced=4),
        a_write(collided=3),
        a_write(is_single=True),
        a_write(outcome=Outcome.FAILED, is_single=True),
    ]
    seen = measure.behaviour(writes, within=lambda tenant: tenant == 1, late=LATE)
    assert seen == measure.Behaviour(singles=1, single_errors=1, transactions=4, collided=3, fenced=5, fenced_first=2)
