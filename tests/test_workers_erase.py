"""Erasing: only rows of the range, only on a retired side, and the record goes with the last of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shardmove.domain import points
from shardmove.domain.errors import LeaseLost, Refused, ServerChanged
from shardmove.domain.moves import ServerIdentity
from shardmove.postgres.sql import Interval
from shardmove.protocol import fence
from tests.support.engine import LEASE, Engine
from workers.connections import Connections
from workers.copy import CopyBatch
from workers.erase import EraseBatch
from workers.tasks import run

WHOLE: Interval = (None, None)
ROWS = "INSERT INTO orders SELECT 100 + i % 100, i FROM generate_series(1, 100) i"
RESIDENTS = "INSERT INTO orders SELECT CASE WHEN i % 2 = 0 THEN 99 ELSE 200 END, i FROM generate_series(1, 10) i"


def erasure(engine: Engine, interval: Interval = WHOLE, *, rows_max: int = 30) -> EraseBatch:
    return EraseBatch(engine.move, 1, engine.table, interval, LEASE, "s2", engine.dsn["s2"], rows_max, drop_record=True)


@pytest.fixture
def copied(engine: Callable[..., Engine]) -> Engine:
    """All rows of the range on both sides, in one recorded batch, and residents on the target."""
    made = engine(rows=ROWS)
    made.fetch("s2", RESIDENTS)
    with Connections() as connections:
        run(CopyBatch(made.move, 1, made.table, WHOLE, LEASE, made.dsn["s1"], made.dsn["s2"]), connections)
    return made


def retire(engine: Engine) -> None:
    with engine.connect("s2") as connection:
        fence.retire(connection, engine.move.id, lease_number=LEASE)


def left(engine: Engine) -> tuple[int, int, int]:
    """Rows of the range, residents, records."""
    return engine.fetch(
        "s2",
        "SELECT count(*) FILTER (WHERE tenant_id BETWEEN 100 AND 199),"
        " count(*) FILTER (WHERE tenant_id NOT BETWEEN 100 AND 199), (SELECT count(*) FROM shardmove.batch)"
        " FROM orders",
    )[0]  # type: ignore[return-value]


def test_erases_the_range_and_its_record_and_nothing_else(copied: Engine) -> None:
    retire(copied)
    with Connections() as connections:
        assert run(erasure(copied), connections) == 100
        assert left(copied) == (0, 10, 0)
        assert run(erasure(copied), connections) == 0


def test_erases_within_the_interval_only(copied: Engine) -> None:
    retire(copied)
    with Connections() as connections:
        assert run(erasure(copied, (("109", "9"), ("119", "19"))), connections) == 10
    assert left(copied) == (90, 10, 1)


def test_a_side_that_is_still_mirrored_into_is_not_erased(copied: Engine) -> None:
    with Connections() as connections, pytest.raises(Refused, match="nothing may be erased"):
        run(erasure(copied), connections)
    assert left(copied) == (100, 10, 1)


def test_twin_without_the_check_a_mirrored_side_is_erased(copied: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "check_erasable", lambda *_: None)
    with Connections() as connections:
        run(erasure(copied), connections)
    assert left(copied)[0] == 0


def test_the_owner_is_not_erased(copied: Engine) -> None:
    with Connections() as connections, pytest.raises(Refused):
        run(replace(erasure(copied), shard="s1", dsn=copied.dsn["s1"]), connections)
    assert copied.fetch("s1", "SELECT count(*) FROM orders") == [(100,)]


def test_a_lost_lease_ends_an_erasure_between_two_transactions(copied: Engine) -> None:
    retire(copied)

    def take_over(_: str) -> None:
        with copied.connect("s2") as connection:
            fence.raise_number(connection, copied.move.id, LEASE + 1)

    with points.armed("erase.after", take_over), Connections() as connections, pytest.raises(LeaseLost):
        run(erasure(copied), connections)
    assert left(copied) == (70, 10, 1)


def test_a_server_that_lost_its_tail_is_not_erased(copied: Engine) -> None:
    retire(copied)
    known = {**copied.move.identities, "s2": ServerIdentity("1", 1)}
    task = replace(erasure(copied), move=replace(copied.move, identities=known))
    with Connections() as connections, pytest.raises(ServerChanged):
        run(task, connections)
    assert left(copied) == (100, 10, 1)


def test_the_record_stays_until_the_last_row_has_gone(copied: Engine) -> None:
    retire(copied)
    seen: list[int] = []

    def note(_: str) -> None:
        seen.append(left(copied)[2])

    with points.armed("erase.after", note), Connections() as connections:
        run(erasure(copied), connections)
    assert seen == [1, 1, 1, 0]
