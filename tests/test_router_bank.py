"""A short slice of `python -m tests.bank`, and what its verdict sees when something is wrong."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from shardmove.demo import ledger
from shardmove.demo.ledger import Ledger, Outcome, Write
from tests.bank.ground import ROUTER, SHARDS, Ground
from tests.bank.play import play
from tests.bank.verdict import Verdict, judge
from tests.support.router import Routers
from tests.support.servers import Databases

SECONDS: Final = float(os.environ.get("SHARDMOVE_BANK_SECONDS", "25"))


@pytest.fixture
def ground(databases: Databases, tmp_path: Path) -> Ground:
    return Ground(databases("cat", *SHARDS), tmp_path)


@pytest.mark.fault
@pytest.mark.timeout(SECONDS + 1200)
def test_money_stays_while_ranges_move_and_routers_die(
    ground: Ground, routers: Routers, tmp_path: Path, rng: random.Random
) -> None:
    started = [routers.start(ground.config_file, **ROUTER) for _ in range(2)]
    seed = rng.randrange(2**32)
    played = play(ground, started, tmp_path / "ledger", seed=seed, seconds=SECONDS, strike_every_s=5.0)
    print(played)
    assert played.ok, str(played)
    assert played.acknowledged > 100, str(played)
    assert played.strikes > 0, str(played)
    assert played.moves["cutover"] > 0, str(played)


# --- the verdict itself: each kind of damage, done behind the bank's back


def test_accounts_that_nobody_touched_are_as_they_should_be(ground: Ground, tmp_path: Path) -> None:
    with written(tmp_path) as writes:
        transfer(ground, writes, "t1", Outcome.ACKNOWLEDGED)
        transfer(ground, writes, "t2", Outcome.UNKNOWN)
        writes.intend(3, [("transfers", "1,t3", "0 1 5")])  # its client died; nothing of it is there, which may be
    assert judge(ground, tmp_path / "ledger").ok


def test_a_lost_transfer_is_seen(ground: Ground, tmp_path: Path) -> None:
    with written(tmp_path) as writes:
        transfer(ground, writes, "t1", Outcome.ACKNOWLEDGED)
    execute(ground, "s1", "DELETE FROM transfers WHERE id = 't1'")
    verdict = judge(ground, tmp_path / "ledger")
    assert verdict.found["lost"] == 1
    assert verdict.found["different"] == 2  # both balances


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        ("UPDATE accounts SET balance = balance + 1 WHERE tenant_id = 1 AND id = 0", "different"),
        ("UPDATE transfers SET amount = amount + 1 WHERE id = 't1'", "different"),
        ("UPDATE accounts SET touches = touches + 1 WHERE tenant_id = 1 AND id = 0", "unexpected"),
        ("INSERT INTO transfers VALUES (1, 'nobody', 0, 1, 5)", "unexpected"),
        ("DELETE FROM accounts WHERE tenant_id = 2 AND id = 3", "lost"),
    ],
)
def test_damage_is_seen(ground: Ground, tmp_path: Path, damage: str, kind: str) -> None:
    assert damaged(ground, tmp_path, "s1", damage).found[kind] > 0


def test_a_row_on_a_shard_that_does_not_own_it_is_seen(ground: Ground, tmp_path: Path) -> None:
    assert damaged(ground, tmp_path, "s2", "INSERT INTO accounts VALUES (1, 0, 10000)").found["stray"] == 1


def test_a_write_that_failed_and_is_there_is_seen(ground: Ground, tmp_path: Path) -> None:
    with written(tmp_path) as writes:
        transfer(ground, writes, "t1", Outcome.FAILED)
    assert judge(ground, tmp_path / "ledger").found["unexpected"] == 1


def test_a_touch_that_was_executed_twice_is_seen(ground: Ground, tmp_path: Path) -> None:
    with written(tmp_path) as writes:
        writes.conclude(outcome_of("touch", Outcome.ACKNOWLEDGED))
        for _ in range(2):
            execute(ground, "s1", "UPDATE accounts SET touches = touches + 1 WHERE tenant_id = 1 AND id = 0")
    assert judge(ground, tmp_path / "ledger").found["unexpected"] == 1


@contextmanager
def written(tmp_path: Path) -> Iterator[Ledger]:
    """A client's ledger, on top of a bank without transfers."""
    directory = tmp_path / "ledger"
    directory.mkdir()
    ledger.write_baseline(directory, {"transfers": {}})
    opened = Ledger(ledger.new_ledger_path(directory, 1, "client-0"))
    yield opened
    opened.close()


def damaged(ground: Ground, tmp_path: Path, shard: str, damage: str) -> Verdict:
    with written(tmp_path) as writes:
        transfer(ground, writes, "t1", Outcome.ACKNOWLEDGED)
    execute(ground, shard, damage)
    return judge(ground, tmp_path / "ledger")


def transfer(ground: Ground, writes: Ledger, id_: str, outcome: Outcome) -> None:
    """It takes effect, whatever its client is told."""
    writes.intend(1, [("transfers", f"1,{id_}", "0 1 5")])
    execute(ground, "s1", f"INSERT INTO transfers VALUES (1, '{id_}', 0, 1, 5)")
    execute(ground, "s1", "UPDATE accounts SET balance = balance - 5 WHERE tenant_id = 1 AND id = 0")
    execute(ground, "s1", "UPDATE accounts SET balance = balance + 5 WHERE tenant_id = 1 AND id = 1")
    writes.conclude(outcome_of("transfer", outcome))


def outcome_of(operation: str, outcome: Outcome) -> Write:
    now = time.monotonic()
    return Write(1, outcome, "client-0", 1, operation, "read committed", now, now, None, 1)


def execute(ground: Ground, shard: str, statement: str) -> None:
    with ground.connect(shard) as connection:
        connection.execute(statement.encode())
