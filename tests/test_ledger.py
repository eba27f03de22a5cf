"""The shop's writers, their ledger and its checker. Above all: the checker reports damage, each kind under its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from router.client import CONFIRM_S
from shardmove.demo import ledger, operations, shop
from shardmove.demo.check import Report, check, take_baseline
from shardmove.demo.ledger import Ledger, Outcome, Write
from shardmove.demo.measure import percentile, stall, window
from shardmove.demo.writers import Mark, WriterFleet
from shardmove.domain.keys import KeyRange
from tests.support.servers import Databases

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Connection = psycopg.Connection[Any]

CATALOG = """
    CREATE SCHEMA shardmove_catalog;
    CREATE TABLE shardmove_catalog.current_routes
        (epoch bigint, keyspace text, lower text, upper text, shard text, move_id text, held boolean);
"""
SPLIT = 20  # tenants below are on s1
RESTING = range(4)  # tenants that no writer touches
WRITTEN = [*range(4, SPLIT), *range(SPLIT, 26)]


class ShopWorld:
    """A shop on two shards, and writers for it."""

    def __init__(self, dsns: dict[str, str], ledger_dir: Path) -> None:
        self.cat = dsns["cat"]
        self.shards = {shard: dsns[shard] for shard in ("s1", "s2")}
        self.dir = ledger_dir
        self.split = SPLIT
        with connect(self.cat) as conn:
            conn.execute(CATALOG)
        self.publish(1)
        for shard, tenants in (("s1", range(SPLIT)), ("s2", range(SPLIT, 26))):
            with connect(self.shards[shard]) as conn:
                shop.create(conn)
                shop.load(conn, tenants, rows=40 * len(tenants), seed=1)

    def publish(self, epoch: int) -> None:
        with connect(self.cat) as conn, conn.transaction():
            conn.execute("DELETE FROM shardmove_catalog.current_routes")
            for lower, upper, shard in ((None, str(self.split), "s1"), (str(self.split), None, "s2")):
                conn.execute(
                    "INSERT INTO shardmove_catalog.current_routes VALUES (%s, 'shop', %s, %s, %s, NULL, false)",
                    (epoch, lower, upper, shard),
                )
            conn.execute("NOTIFY shardmove_routes")

    def fleet(self, **options: Any) -> WriterFleet:
        settings = {"tenants": WRITTEN, "processes": 0, "threads": 2, "rate": 400.0, **options}
        return WriterFleet(self.dir, self.cat, self.shards, **settings)

    def owner(self, tenant: int) -> str:
        return "s1" if tenant < self.split else "s2"

    def check(self, **options: Any) -> Report:
        return check(self.dir, self.shards, self.owner, **options)

    @contextmanager
    def behind_the_back(self, shard: str) -> Iterator[Connection]:
        """A connection whose writes fire no trigger and check no foreign key."""
        with connect(self.shards[shard]) as conn:
            conn.execute("SET session_replication_role = replica")
            yield conn


def connect(dsn: str) -> Connection:
    return psycopg.connect(shop.pinned(dsn), autocommit=True)


@pytest.fixture
def world(databases: Databases, tmp_path: Path) -> ShopWorld:
    return ShopWorld(databases("s1", "s2", "cat"), tmp_path / "ledger")


@pytest.fixture
def written(world: ShopWorld) -> ShopWorld:
    """A shop that was written to for a moment, and checked."""
    with world.fleet() as fleet:
        fleet.await_writes(50)
    assert fleet.failed == 0
    report = world.check()
    assert report.ok, str(report)
    return world


# --- a healthy run ----------------------------------------------------------------------------------------------------


def test_a_healthy_run_loses_nothing_and_runs_every_operation(world: ShopWorld) -> None:
    every_operation = dict.fromkeys(operations.MIX, 1.0)
    fleet = world.fleet(operations=every_operation, rate=1000.0)
    fleet.start()
    mark = fleet.mark("all")
    fleet.await_writes(500, timeout_s=200)
    assert fleet.rate_since(mark) > 0
    names = {operation.__name__ for operation in operations.MIX}
    while {write.operation for write in fleet.summary().writes} != names:  # some rarely find a row that they apply to
        fleet.await_writes(20)
    summary = fleet.stop()
    report = world.check()
    assert report.ok, str(report)
    assert (summary.failed, summary.unknown, summary.errors) == (0, 0, ())
    assert summary.acknowledged == report.acknowledged == fleet.acknowledged
    assert set(summary.window(mark.at, time.monotonic()).by_isolation) == {
        "READ_COMMITTED",
        "REPEATABLE_READ",
        "SERIALIZABLE",
    }


def test_paused_writers_write_nothing_and_a_second_fleet_goes_on(world: ShopWorld) -> None:
    with world.fleet() as fleet:
        fleet.await_writes(20)
        fleet.pause()
        count = fleet.acknowledged
        assert world.check().ok
        assert fleet.acknowledged == count
        fleet.resume()
        fleet.await_writes(20)
    with world.fleet() as second:
        second.await_writes(20)
    report = world.check()
    assert report.ok, str(report)
    assert report.acknowledged >= count + 40


def test_writers_follow_tenants_to_another_shard(world: ShopWorld) -> None:
    """A move by hand, while the writers rest. Afterwards the old shard must be empty there, and the ids must go on."""
    fleet = world.fleet()
    fleet.start()
    fleet.await_writes(60)
    fleet.pause()
    since = fleet.mark("flip")
    carry(world, lower=12)
    world.split = 12
    world.publish(2)
    time.sleep(CONFIRM_S)  # no fence is here: who has not heard yet would write to the old shard
    fleet.resume()
    fleet.await_writes(60)
    summary = fleet.stop()
    report = world.check(absent_on={"s1": [KeyRange(12, None)]})
    assert report.ok, str(report)
    assert summary.failed == 0, summary.errors
    found = summary.stall(since.at, time.monotonic(), new_owner="s2", within=lambda tenant: 12 <= tenant < SPLIT)
    assert found is not None
    assert found.ends > since.at


@pytest.mark.fault
def test_connections_that_die_all_the_time_leave_unknown_outcomes_and_no_lies(world: ShopWorld) -> None:
    fleet = world.fleet(rate=1000.0)
    fleet.start()
    for _ in range(40):
        time.sleep(0.02)
        for dsn in world.shards.values():
            with connect(dsn) as conn:
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'shop writer %' AND datname = current_database()"
                )
    summary = fleet.stop()
    report = world.check()
    assert report.ok, str(report)
    assert summary.failed == 0, summary.errors
    assert report.unknown == summary.unknown


# --- writer processes -------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_killed_writer_processes_leave_intents_without_an_outcome(world: ShopWorld) -> None:
    fleet = world.fleet(processes=2, threads=1, rate=400.0)
    fleet.start()
    fleet.await_writes(30)
    fleet.kill()
    summary = fleet.stop()
    wait_until_disconnected(world)
    report = world.check()
    assert report.ok, str(report)
    assert summary.acknowledged >= 30
    assert report.unknown <= 2


@pytest.mark.fault
def test_writer_processes_end_with_their_parent(world: ShopWorld) -> None:
    """Its end of their standard input is all that ties them to it."""
    fleet = world.fleet(processes=2, threads=2, rate=100.0)
    fleet.start()
    for process in fleet._running:
        assert process.stdin is not None
        process.stdin.close()
    for process in fleet._running:
        assert process.wait(timeout=100) == 0
    assert world.check().ok


def test_several_processes_share_the_work(world: ShopWorld) -> None:
    with world.fleet(processes=2, threads=2, rate=200.0) as fleet:
        while len({write.writer for write in fleet.summary().writes}) < 4:
            fleet.await_writes(4)
    summary = fleet.summary()
    assert summary.failed == 0, summary.errors
    assert world.check().ok


# --- damage must be reported ------------------------------------------------------------------------------------------


def findings(report: Report) -> tuple[int, int, int]:
    return report.lost, report.different, report.unexpected


def an_item(world: ShopWorld, tenants: range | list[int]) -> tuple[int, int, int]:
    with connect(world.shards["s1"]) as conn:
        row = conn.execute(
            "SELECT tenant_id, order_id, line FROM order_items WHERE tenant_id = ANY (%s) LIMIT 1", (list(tenants),)
        ).fetchone()
    assert row is not None
    tenant, order, line = row
    return tenant, order, line


ITEM = "tenant_id = %s AND order_id = %s AND line = %s"
ITEM_TENANTS = [pytest.param(WRITTEN, id="of a written tenant"), pytest.param(RESTING, id="of a resting tenant")]


@pytest.mark.parametrize("tenants", ITEM_TENANTS)
def test_a_lost_row_is_reported(written: ShopWorld, tenants: list[int]) -> None:
    item = an_item(written, tenants)
    with written.behind_the_back("s1") as conn:
        conn.execute(f"DELETE FROM order_items WHERE {ITEM}", item)
    report = written.check()
    assert findings(report) == (1, 0, 0)
    assert "lost: order_items {},{},{} on s1".format(*item) in str(report)


@pytest.mark.parametrize("tenants", ITEM_TENANTS)
def test_a_changed_row_is_reported(written: ShopWorld, tenants: list[int]) -> None:
    item = an_item(written, tenants)
    with written.behind_the_back("s1") as conn:
        conn.execute(f"UPDATE order_items SET price = price + 0.01 WHERE {ITEM}", item)
    assert findings(written.check()) == (0, 1, 0)


def test_a_resurrected_row_is_reported(written: ShopWorld) -> None:
    """A deletion that was acknowledged, undone behind the back."""
    with written.fleet(operations={operations.replace_item: 1.0, operations.renumber_line: 9.0}) as fleet:
        fleet.await_writes(60)
    deleted = [
        tuple(map(int, key.split(",")))
        for key, state in ledger.read(written.dir).rows["order_items"].items()
        if state is None and written.owner(int(key.split(",")[0])) == "s1"
    ]
    with written.behind_the_back("s1") as conn:
        conn.execute("INSERT INTO order_items VALUES (%s, %s, %s, 'sku', 1, 1, 0)", deleted[0])
    assert findings(written.check()) == (0, 0, 1)


def test_a_row_that_nobody_wrote_is_reported(written: ShopWorld) -> None:
    with written.behind_the_back("s2") as conn:
        conn.execute("INSERT INTO order_items VALUES (25, 999999, 1, 'sku', 1, 1, 0)")
    assert findings(written.check()) == (0, 0, 1)


def test_a_user_trigger_that_fired_twice_is_reported(written: ShopWorld) -> None:
    """What a mirror does that writes rows without being a replica: the totals count the row twice."""
    with connect(written.shards["s1"]) as conn:
        conn.execute(
            "WITH gone AS (SELECT * FROM orders WHERE tenant_id = 5 LIMIT 1)"
            " UPDATE tenant_totals t SET orders = t.orders + 1, amount = t.amount + gone.amount"
            " FROM gone WHERE t.tenant_id = 5"
        )
    assert findings(written.check()) == (0, 1, 0)


def test_a_before_trigger_that_fired_for_a_mirrored_row_is_reported(written: ShopWorld) -> None:
    with connect(written.shards["s1"]) as conn:
        conn.execute("UPDATE orders SET note = note WHERE tenant_id = 0")
        (count,) = conn.execute("SELECT count(*) FROM orders WHERE tenant_id = 0").fetchone() or (0,)
    assert findings(written.check()) == (0, count, 0)


def test_a_write_that_was_applied_to_the_wrong_shard_is_reported(written: ShopWorld) -> None:
    """The row exists, but not where its tenant lives: a stray there, lost here."""
    item = an_item(written, WRITTEN)
    with written.behind_the_back("s1") as s1, written.behind_the_back("s2") as s2:
        row = s1.execute(f"DELETE FROM order_items WHERE {ITEM} RETURNING *", item).fetchone()
        s2.execute("INSERT INTO order_items VALUES (%s, %s, %s, %s, %s, %s, %s)", row)
    assert findings(written.check()) == (1, 0, 0)
    assert findings(written.check(absent_on={"s2": [KeyRange(None, SPLIT)]})) == (1, 0, 1)


def test_rests_are_reported_only_where_nothing_may_be(written: ShopWorld) -> None:
    with written.behind_the_back("s2") as conn:
        conn.execute("INSERT INTO tenants VALUES (3, 'left over')")
        conn.execute("INSERT INTO tenant_totals VALUES (3, 0, 0)")
    assert written.check().ok
    assert findings(written.check(absent_on={"s2": [KeyRange(3, 4)]})) == (0, 0, 2)
    assert written.check(absent_on={"s2": [KeyRange(4, SPLIT)]}).ok


def test_a_writer_does_not_paper_over_damage(world: ShopWorld) -> None:
    """It says that its row is gone, leaves the tenant alone, and the checker still finds the damage."""
    fleet = world.fleet(operations={operations.change_order: 1.0}, tenants=[5, 6])
    fleet.start()
    fleet.await_writes(4)
    fleet.pause()
    with world.behind_the_back("s1") as conn:
        conn.execute("UPDATE orders SET version = version - 1 WHERE tenant_id = 5")
        (count,) = conn.execute("SELECT count(*) FROM orders WHERE tenant_id = 5").fetchone() or (0,)
    fleet.resume()
    while fleet.failed == 0:
        fleet.await_writes(1)
    summary = fleet.stop()
    assert summary.failed == 1
    assert "Surprise" in summary.errors[0]
    assert findings(world.check()) == (0, count, 0)


def test_ownership_may_be_given_as_ranges(written: ShopWorld) -> None:
    ranges = {"s1": [KeyRange(None, SPLIT)], "s2": [KeyRange(SPLIT, None)]}
    assert check(written.dir, written.shards, ranges).ok
    with pytest.raises(ValueError, match="must have one owner"):
        check(written.dir, written.shards, {"s1": [KeyRange(None, SPLIT)]})


# --- the ledger's files -----------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    ledger.write_baseline(tmp_path, {"t": {"1": "loaded"}})
    return tmp_path


def a_write(number: int = 1, outcome: Outcome = Outcome.ACKNOWLEDGED, **values: Any) -> Write:
    defaults: dict[str, Any] = {
        "writer": "00",
        "tenant": 1,
        "operation": "op",
        "isolation": "SERIALIZABLE",
        "started": 1.0,
        "ended": 2.0,
        "shard": "s1",
        "attempts": 1,
    }
    return Write(number=number, outcome=outcome, **{**defaults, **values})


def recorded(directory: Path, *steps: Callable[[Ledger], None]) -> ledger.Book:
    book = Ledger(ledger.new_ledger_path(directory, ledger.next_generation(directory), "00"))
    for step in steps:
        step(book)
    book.close()
    return ledger.read(directory)


def intend(number: int, image: str | None) -> Callable[[Ledger], None]:
    return lambda book: book.intend(number, [("t", "1", image)])


def conclude(number: int, outcome: Outcome) -> Callable[[Ledger], None]:
    return lambda book: book.conclude(a_write(number, outcome))


def test_the_last_intent_of_an_acknowledged_write_is_the_row(directory: Path) -> None:
    book = recorded(directory, intend(1, "refused"), intend(1, "tried again"), conclude(1, Outcome.ACKNOWLEDGED))
    assert book.rows["t"]["1"] == "tried again"
    assert book.writes == [a_write()]


def test_an_unknown_outcome_allows_before_and_after_until_the_next_acknowledgement(directory: Path) -> None:
    book = recorded(directory, intend(1, None), conclude(1, Outcome.UNKNOWN))
    state = book.rows["t"]["1"]
    assert ledger.allows(state, "loaded")
    assert ledger.allows(state, None)
    assert not ledger.allows(state, "other")
    book = recorded(directory, intend(2, "settled"), conclude(2, Outcome.ACKNOWLEDGED))
    assert book.rows["t"]["1"] == "settled"


def test_a_failed_write_changes_nothing(directory: Path) -> None:
    assert recorded(directory, intend(1, "no"), conclude(1, Outcome.FAILED)).rows["t"]["1"] == "loaded"


@pytest.mark.parametrize("cut", [False, True], ids=["no outcome", "cut outcome"])
def test_a_killed_writers_last_intent_allows_both(directory: Path, cut: bool) -> None:
    recorded(directory, intend(1, "maybe"))
    if cut:
        with next(directory.glob("writer-*")).open("a") as file:
            file.write(json.dumps({"number": 1, "outcome": "acknowledged"})[:20])
    book = ledger.read(directory)
    assert book.unresolved == 1
    assert book.rows["t"]["1"] == frozenset({"loaded", "maybe"})


def test_the_baseline_keeps_what_no_writer_touches(written: ShopWorld, tmp_path: Path) -> None:
    rows = take_baseline(tmp_path / "again", written.shards, written.owner)
    assert rows == written.check().rows_checked
    assert check(tmp_path / "again", written.shards, written.owner).ok


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_stall_is_the_longest_write_that_overlaps_the_cutover() -> None:
    writes = [
        a_write(started=0.0, ended=9.0, shard="s1", tenant=99),  # another range
        a_write(started=0.1, ended=0.9, shard="s1"),  # long, but over before the first hold
        a_write(started=0.990, ended=1.002, shard="s1"),  # under way when the hold began
        a_write(started=1.000, ended=1.030, shard="s2", disturbed_at=1.001, attempts=2),
        a_write(started=1.010, ended=1.025, shard="s2", disturbed_at=1.011),
        a_write(started=1.026, ended=1.500, shard="s2"),  # began after the new owner's first acknowledgement
    ]
    found = stall(writes, 0.95, 2.0, new_owner="s2", within=lambda tenant: tenant == 1)
    assert found is not None
    assert found.stall_ms == pytest.approx(30.0)
    assert (found.begins, found.ends, found.disturbed) == (1.001, 1.025, 2)


def test_a_cutover_that_nobody_noticed_has_a_stall_too() -> None:
    writes = [a_write(started=1.0, ended=1.002, shard="s1"), a_write(started=1.1, ended=1.103, shard="s2")]
    found = stall(writes, 0.5, 2.0, new_owner="s2")
    assert found is not None
    assert found.stall_ms == pytest.approx(3.0)
    assert stall(writes, 0.5, 2.0, new_owner="s3") is None


def test_a_window_counts_acknowledgements_inside_it() -> None:
    writes = [a_write(n, started=n - 0.01 * n, ended=float(n)) for n in range(1, 11)]
    writes.append(a_write(11, Outcome.FAILED, ended=5.0))
    found = window(writes, 2.0, 6.0)
    assert (found.acknowledged, found.rate_s) == (4, 1.0)
    assert found.max_ms == pytest.approx(50.0)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 99) == 0.0
    assert percentile([1.0], 50) == 1.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0


def carry(world: ShopWorld, *, lower: int) -> None:
    """Carries the tenants [lower, SPLIT) from s1 to s2 by COPY, and their rows away from s1."""
    with world.behind_the_back("s1") as source, world.behind_the_back("s2") as target:
        for table in shop.KEY_COLUMNS:
            rows = source.execute(
                psycopg.sql.SQL("DELETE FROM {} WHERE tenant_id >= {} RETURNING *").format(
                    psycopg.sql.Identifier(table), lower
                )
            ).fetchall()
            with target.cursor() as cursor:
                holes = psycopg.sql.SQL(", ").join(psycopg.sql.Placeholder() * len(rows[0]))
                insert = psycopg.sql.SQL("INSERT INTO {} VALUES ({})").format(psycopg.sql.Identifier(table), holes)
                cursor.executemany(insert, [[_as_parameter(value) for value in row] for row in rows])
        target.execute("SELECT setval(pg_get_serial_sequence('customers', 'customer_id'), 1000000)")
        target.execute("SELECT setval(pg_get_serial_sequence('orders', 'order_id'), 1000000)")


def _as_parameter(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def wait_until_disconnected(world: ShopWorld) -> None:
    """A killed client's last COMMIT may still be under way."""
    for dsn in world.shards.values():
        with connect(dsn) as conn:
            query = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name LIKE 'shop writer %' AND datname = current_database()"
            )
            while conn.execute(query).fetchone() != (0,):
                time.sleep(0.01)


def test_marks_remember_the_moment(world: ShopWorld) -> None:
    with world.fleet() as fleet:
        mark = fleet.mark("copy")
    assert fleet.summary().marks == (Mark("copy", mark.at, mark.acknowledged),)
