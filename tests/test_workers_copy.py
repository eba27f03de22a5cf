"""A batch: rows, comparison and record are one commit, or nothing at all.

Each safety test has a twin that switches the mechanism off and shows the damage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from shardmove.domain import points
from shardmove.domain.digests import Digest
from shardmove.domain.errors import BatchMismatch, Failed, LeaseLost, MirrorRefused, SchemaDrift, Unreachable
from shardmove.domain.moves import Direction
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import Interval
from shardmove.protocol import fence
from shardmove.protocol.catch_up import Mirror
from tests.support.engine import LEASE, Engine, until
from workers import copy
from workers.copy import BatchBlocked, BatchDone, CopyBatch
from workers.digest import DigestInterval
from workers.executors import InlineExecutor

WHOLE: Interval = (None, None)
FIFTY = "INSERT INTO orders SELECT 100 + i % 3, i, 'note ' || i FROM generate_series(1, 50) i"


def batch(engine: Engine, interval: Interval = WHOLE, *, lease: int = LEASE) -> CopyBatch:
    return CopyBatch(engine.move, 1, engine.table, interval, lease, engine.dsn["s1"], engine.dsn["s2"])


@pytest.fixture
def executor() -> Iterator[InlineExecutor]:
    with InlineExecutor(2) as inline:
        yield inline


def count(engine: Engine, what: str = "orders", shard: str = "s2") -> int:
    ((rows,),) = engine.fetch(shard, f"SELECT count(*) FROM {what}")
    return int(rows)


def assert_nothing_written(engine: Engine) -> None:
    assert (count(engine), count(engine, "shardmove.batch")) == (0, 0)


# --- what a row may be

PLAIN = """
    CREATE TYPE mood AS ENUM ('glad', 'sad');
    CREATE TABLE orders (
        tenant_id bigint NOT NULL, id integer GENERATED ALWAYS AS IDENTITY, gone text, big text, raw bytea,
        small smallint, price numeric(20, 4), ratio float8, real4 real, flag boolean, day date, at timestamptz,
        naive timestamp, span interval, clock timetz, uid uuid, doc json, docb jsonb, feeling mood,
        net inet, bits bit varying,
        fixed char(8), lexeme text COLLATE "C",
        double_price numeric GENERATED ALWAYS AS (price * 2) STORED, "Odd ""name" text,
        PRIMARY KEY (tenant_id, id)
    );
    ALTER TABLE orders DROP COLUMN gone;
"""  # fmt: skip
PLAIN_ROWS = """
    INSERT INTO orders (tenant_id, big, raw, small, price, ratio, real4, flag, day, at, naive, span, clock, uid, doc,
                        docb, feeling, net, bits, fixed, lexeme, "Odd ""name")
    SELECT 150, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 4000) n), '\\x00ff0a5c', i,
           i * 1.5, i / 3.0, i / 7.0, i % 2 = 0, '2020-01-01'::date + i, now(), now(), i * '1 min 3 us'::interval,
           now()::timetz, gen_random_uuid(), '{"b": 1,   "a": [1, null]}', '{"b": 1, "a": [1, null]}', 'sad',
           '10.0.0.1/8',
           B'10110',
           'ab', E'tab\\tline\\n\\\\.', E'"é" \\\\N'
    FROM generate_series(1, 20) i;
    INSERT INTO orders (tenant_id) SELECT 150 FROM generate_series(1, 3);
    INSERT INTO orders (tenant_id, price, ratio, day, at)
    VALUES (150, 'NaN', 'NaN', 'infinity', '-infinity'),
           (150, 0.5, '-Infinity', '0044-03-15 BC', '0044-03-15 12:00:00 BC');
    INSERT INTO orders (tenant_id, big) VALUES (99, 'not in the range'), (200, 'nor this');
"""  # fmt: skip
TEXTUAL = PLAIN.replace(
    "gone text", "gone text, tags text[], moods mood[], words tsvector, cash money, class regclass, point point"
)
TEXTUAL_ROWS = PLAIN_ROWS + """
    UPDATE orders SET tags = ARRAY['a', NULL, '{"'], moods = ARRAY['sad', 'glad']::mood[],
                      words = to_tsvector('simple', 'a b'), cash = 12.5, class = 'orders'::regclass, point = '(1.5,-2)'
    WHERE id % 2 = 0;
"""  # fmt: skip


@pytest.mark.parametrize(("schema", "rows", "binary"), [(PLAIN, PLAIN_ROWS, True), (TEXTUAL, TEXTUAL_ROWS, False)])
def test_rows_of_every_type_arrive_as_they_are(
    engine: Callable[..., Engine], executor: InlineExecutor, schema: str, rows: str, binary: bool
) -> None:
    made = engine(schema=schema, rows=rows)
    made.fetch("s2", "INSERT INTO orders (tenant_id, big) VALUES (99, 'a resident')")
    assert made.table.binary is binary
    done = executor.submit(batch(made)).result()
    assert done.digest.rows == 25
    rows_of = "SELECT orders::text FROM orders WHERE tenant_id = 150 ORDER BY id"
    assert made.fetch("s2", rows_of) == made.fetch("s1", rows_of)
    record = "SELECT ordinal, after, upto, row_count, size_bytes, digest FROM shardmove.batch"
    assert made.fetch("s2", record) == [(1, None, None, 25, done.digest.size_bytes, done.digest.hash)]
    for shard in ("s1", "s2"):
        assert executor.submit(DigestInterval(made.move, 1, made.table, WHOLE, made.dsn[shard])).result() == done.digest


def test_copying_leaves_no_trace_in_the_journals(engine: Callable[..., Engine], executor: InlineExecutor) -> None:
    made = engine(rows=FIFTY)
    made.fetch("s1", "DELETE FROM shardmove.journal_m1_1")
    executor.submit(batch(made)).result()
    assert (count(made, "shardmove.journal_m1_1", "s1"), count(made, "shardmove.journal_m1_1", "s2")) == (0, 0)


def test_a_digest_reads_at_the_snapshot_that_it_was_given(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(rows=FIFTY)
    with made.connect("s1") as connection, connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        ((snapshot,),) = connection.execute("SELECT pg_export_snapshot()").fetchall()
        made.fetch("s1", "DELETE FROM orders WHERE id > 10")
        task = DigestInterval(made.move, 1, made.table, WHOLE, made.dsn["s1"], snapshot)
        assert executor.submit(task).result().rows == 50
        assert executor.submit(replace(task, snapshot=None)).result().rows == 10
    with pytest.raises(Failed, match=r"snapshot"):
        executor.submit(task).result()


# --- what the target may do to rows

TAMPER = """
    CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;
    CREATE TRIGGER tamper BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION tamper();
    ALTER TABLE orders ENABLE ALWAYS TRIGGER tamper
"""
CHANGES = "IF NEW.id = 7 THEN NEW.note := 'changed'; END IF; RETURN NEW;"
SWALLOWS = "IF NEW.id = 7 THEN RETURN NULL; END IF; RETURN NEW;"


@pytest.mark.parametrize("body", [CHANGES, SWALLOWS])
def test_a_target_that_changes_a_row_is_found_out(
    engine: Callable[..., Engine], executor: InlineExecutor, body: str
) -> None:
    made = engine(rows=FIFTY)
    made.fetch("s2", TAMPER.replace("{body}", body))
    with pytest.raises(BatchMismatch):
        executor.submit(batch(made)).result()
    assert_nothing_written(made)


def test_twin_without_the_comparison_the_changed_row_stays(
    engine: Callable[..., Engine], executor: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(rows=FIFTY)
    made.fetch("s2", TAMPER.replace("{body}", CHANGES))
    monkeypatch.setattr(copy, "compare", lambda *_: None)
    executor.submit(batch(made)).result()
    assert count(made, "orders WHERE note = 'changed'") == 1


def test_what_the_target_refuses_is_told_without_values(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(rows=FIFTY)
    made.fetch("s2", "ALTER TABLE orders ADD CONSTRAINT no_seven CHECK (note <> 'note 7')")
    with pytest.raises(Failed, match=r"no_seven.*23514") as caught:
        executor.submit(batch(made)).result()
    assert "note 7" not in caught.value.message
    assert_nothing_written(made)


def test_a_column_that_is_gone_is_drift(engine: Callable[..., Engine], executor: InlineExecutor) -> None:
    made = engine(rows=FIFTY)
    made.fetch("s2", "ALTER TABLE orders DROP COLUMN note")
    with pytest.raises(SchemaDrift):
        executor.submit(batch(made)).result()
    assert_nothing_written(made)


# --- exactly once


def test_a_batch_that_is_recorded_is_not_copied_again(engine: Callable[..., Engine], executor: InlineExecutor) -> None:
    made = engine(rows=FIFTY)
    first = executor.submit(batch(made)).result()
    made.fetch("s1", "INSERT INTO orders VALUES (100, 1000, 'later')")
    again = executor.submit(batch(made)).result()
    assert (again.digest, again.interval) == (first.digest, first.interval)
    assert (count(made), count(made, "shardmove.batch")) == (50, 1)


class Died(BaseException):
    """What stands for the end of the process at a control point."""


def die(_: str) -> None:
    raise Died


@pytest.mark.parametrize("point", ["batch.before_compare", "batch.before", "batch.after"])
def test_a_batch_that_dies_anywhere_is_done_once_by_its_repeat(
    engine: Callable[..., Engine], executor: InlineExecutor, point: str
) -> None:
    made = engine(rows=FIFTY)
    with points.armed(point, die), pytest.raises(Died):
        executor.submit(batch(made)).result()
    assert executor.submit(batch(made)).result().digest.rows == 50
    assert (count(made), count(made, "shardmove.batch")) == (50, 1)


def test_twin_a_record_in_a_transaction_of_its_own_loses_the_rows(
    engine: Callable[..., Engine], executor: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(rows=FIFTY)
    record_batch = copy.record_batch

    def record_apart(_: Connection, task: CopyBatch, digest: Digest) -> None:
        with made.connect("s2") as connection:
            record_batch(connection, task, digest)

    monkeypatch.setattr(copy, "record_batch", record_apart)
    with points.armed("batch.before", die), pytest.raises(Died):
        executor.submit(batch(made)).result()
    assert executor.submit(batch(made)).result().digest.rows == 50
    assert count(made) == 0


def two_tries_at_once(engine: Engine, executor: InlineExecutor, is_second_held: Callable[[], bool]) -> list[BatchDone]:
    """Two tries of one batch; the first is held before its commit until the second waits, or has ended."""
    go_on = threading.Event()
    first_only = threading.Lock()

    def hold(_: str) -> None:
        if first_only.acquire(blocking=False):
            reached.set()
            assert go_on.wait(100)

    reached = threading.Event()
    with points.armed("batch.before", hold):
        first = executor.submit(batch(engine))
        assert reached.wait(100)
        second = executor.submit(batch(engine))
        until(lambda: second.done() or is_second_held())
        go_on.set()
        return [first.result(), second.result()]


def waits_for_a_lock(engine: Engine) -> bool:
    return count(engine, "pg_locks WHERE locktype = 'advisory' AND NOT granted") > 0


def test_a_second_try_waits_for_a_first_one_that_may_still_commit(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine()  # without rows no unique key is in the way of the second try
    first, second = two_tries_at_once(made, executor, lambda: waits_for_a_lock(made))
    assert first.digest == second.digest
    assert count(made, "shardmove.batch") == 1


def test_twin_without_the_wait_the_batch_is_recorded_twice(
    engine: Callable[..., Engine], executor: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine()
    monkeypatch.setattr(copy, "await_earlier_try", lambda *_: None)
    two_tries_at_once(made, executor, lambda: waits_for_a_lock(made))
    assert count(made, "shardmove.batch") == 2


@pytest.mark.parametrize(
    ("interval", "overlaps"),
    [
        ((("101", "10"), ("101", "20")), False),
        ((("101", "9"), ("101", "20")), False),  # recorded as ("101", "9"): touches, in the order of numbers
        (((None), ("100", "100")), False),
        ((("101", "2"), ("101", "7")), True),
        (((None), ("101", "7")), True),
        ((("101", "8"), None), True),
        (WHOLE, True),
    ],
)
def test_an_interval_that_overlaps_a_recorded_one_is_refused(
    engine: Callable[..., Engine], executor: InlineExecutor, interval: Interval, overlaps: bool
) -> None:
    made = engine(rows=FIFTY)
    executor.submit(batch(made, (("100", "100"), ("101", "9")))).result()
    if overlaps:
        with pytest.raises(Failed, match="overlaps"):
            executor.submit(batch(made, interval)).result()
    else:
        executor.submit(batch(made, interval)).result()
    assert count(made, "shardmove.batch") == (1 if overlaps else 2)


# --- who may write


def take_over(engine: Engine) -> None:
    with engine.connect("s2") as connection:
        fence.raise_number(connection, engine.move.id, LEASE + 1)


def test_a_lost_lease_writes_nothing(engine: Callable[..., Engine], executor: InlineExecutor) -> None:
    made = engine(rows=FIFTY)
    take_over(made)
    with pytest.raises(LeaseLost):
        executor.submit(batch(made)).result()
    assert_nothing_written(made)
    executor.submit(batch(made, lease=LEASE + 1)).result()
    assert count(made) == 50


def rows_after_takeover_in_mid_batch(engine: Engine, executor: InlineExecutor) -> tuple[int, int]:
    """How many rows were there when the takeover was done, and when the batch was."""
    seen: list[int] = []

    def paused(_: str) -> None:
        take_over(engine)
        seen.append(count(engine))

    with points.armed("batch.before_compare", paused):
        future = executor.submit(batch(engine))
        assert isinstance(future.exception(), Unreachable | None)
    return seen[0], count(engine)


def test_a_takeover_ends_the_batch_under_way(engine: Callable[..., Engine], executor: InlineExecutor) -> None:
    made = engine(rows=FIFTY)
    assert rows_after_takeover_in_mid_batch(made, executor) == (0, 0)
    assert_nothing_written(made)


def test_twin_with_a_plain_read_of_the_number_a_zombie_writes_after_the_takeover(
    engine: Callable[..., Engine], executor: InlineExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(rows=FIFTY)
    read = fence.read
    monkeypatch.setattr(fence, "read", lambda connection, move_id, share=False: read(connection, move_id))
    assert rows_after_takeover_in_mid_batch(made, executor) == (0, 50)


def test_a_side_that_is_not_mirrored_into_takes_no_rows(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(rows=FIFTY)
    with made.connect("s2") as connection:
        fence.retire(connection, made.move.id, lease_number=LEASE)
    with pytest.raises(MirrorRefused):
        executor.submit(batch(made)).result()
    assert_nothing_written(made)


# --- unique values

UNIQUE = """
    CREATE TABLE orders (
        tenant_id bigint NOT NULL, id bigint, note text, PRIMARY KEY (tenant_id, id), UNIQUE (tenant_id, note)
    )
"""


def test_a_unique_value_that_wandered_blocks_the_batch_until_a_catch_up(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(schema=UNIQUE, rows="INSERT INTO orders SELECT 100, i, 'secret ' || i FROM generate_series(1, 20) i")
    executor.submit(batch(made, (None, ("100", "10")))).result()
    made.fetch("s1", "UPDATE orders SET note = 'other' WHERE id = 3; UPDATE orders SET note = 'secret 3' WHERE id = 15")
    rest = batch(made, (("100", "10"), None))
    with pytest.raises(BatchBlocked, match="orders_tenant_id_note_key") as caught:
        executor.submit(rest).result()
    assert "secret" not in caught.value.message
    assert (count(made), count(made, "shardmove.batch")) == (10, 1)
    with Mirror.open(made.move, Direction.FORWARD, made.tables, made.dsn) as mirror:
        mirror.catch_up()
        executor.submit(rest).result()
        assert mirror.catch_up(full_look=True).is_empty
    rows = "SELECT * FROM orders ORDER BY id"
    assert made.fetch("s2", rows) == made.fetch("s1", rows)


def test_a_batch_beside_writers_ends_equal_after_a_catch_up(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(rows=FIFTY)

    def write(_: str) -> None:
        made.fetch("s1", "UPDATE orders SET note = 'new' WHERE id % 2 = 0; DELETE FROM orders WHERE id % 5 = 0")

    with points.armed("batch.before_compare", write):
        assert executor.submit(batch(made)).result().digest.rows == 50
    with Mirror.open(made.move, Direction.FORWARD, made.tables, made.dsn) as mirror:
        assert mirror.until_empty().is_empty
    rows = "SELECT * FROM orders ORDER BY id"
    assert made.fetch("s2", rows) == made.fetch("s1", rows)


def test_a_server_that_went_away_between_tasks_is_connected_to_again(
    engine: Callable[..., Engine], executor: InlineExecutor
) -> None:
    made = engine(rows=FIFTY)
    with InlineExecutor(1) as one:
        one.submit(batch(made, (None, ("101", "0")))).result()
        terminate = (
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name = 'shardmove m1'"
        )
        for shard in ("s1", "s2"):
            made.fetch(shard, terminate)
        one.submit(batch(made, (("101", "0"), None))).result()
    assert count(made) == 50
