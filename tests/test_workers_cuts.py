"""The cuts tile the key space, whatever is in it; and the server answers them from the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql

from shardmove.config import Limits
from shardmove.domain.digests import Digest
from shardmove.postgres.connect import Connection
from shardmove.postgres.sql import Interval, Position
from shardmove.protocol.gate import islands
from tests.support.engine import LEASE, Engine
from workers.connections import Connections
from workers.copy import CopyBatch, record_batch, rows_of
from workers.cuts import GROWTH, ROWS_FIRST, BatchSizer, cut_sql, next_rows, walk

WHOLE: Interval = (None, None)

COMPOSITE = """
    CREATE TABLE orders (
        tenant_id bigint, line integer, code text COLLATE "C", at timestamptz, PRIMARY KEY (code, at, line, tenant_id)
    );
    ALTER TABLE orders ALTER tenant_id SET NOT NULL
"""

ROWS = {
    "negative and sparse": (
        None,
        "INSERT INTO orders SELECT 100 + i % 7, (i - 50) * 10000000000000::bigint FROM generate_series(1, 100) i",
    ),
    "one key with nearly all rows": (
        None,
        "INSERT INTO orders SELECT CASE WHEN i % 50 = 0 THEN 100 + i % 90 ELSE 150 END, i"
        " FROM generate_series(1, 500) i",
    ),
    "rows outside the range": (
        None,
        "INSERT INTO orders SELECT CASE WHEN i % 3 = 0 THEN 100 + i % 90 ELSE 99 END, i FROM generate_series(1, 300) i",
    ),
    "composite": (
        COMPOSITE,
        "INSERT INTO orders SELECT 100 + i % 5, i % 3, 'it''s \\ \"é\" ' || i % 4,"
        " '2020-01-01'::timestamptz + i * '1 us'::interval FROM generate_series(1, 200) i",
    ),
    "nothing": (None, ""),
}  # fmt: skip


def rows_within(engine: Engine, interval: Interval) -> int:
    condition = engine.table.within(interval).as_string()
    ((rows,),) = engine.fetch("s1", f"SELECT count(*) FROM orders WHERE tenant_id BETWEEN 100 AND 199 AND {condition}")
    return int(rows)


def assert_tiles(gap: Interval, intervals: Sequence[Interval]) -> None:
    assert (intervals[0][0], intervals[-1][1]) == gap
    assert [end for _, end in intervals[:-1]] == [begin for begin, _ in intervals[1:]]
    assert len(set(intervals)) == len(intervals)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", ROWS)
def test_intervals_tile_the_key_space(engine: Callable[..., Engine], kind: str, size: int) -> None:
    schema, rows = ROWS[kind]
    made = engine(rows=rows, **({"schema": schema} if schema else {}))
    with made.connect("s1") as connection:
        intervals = list(walk(connection, made.move, made.table, WHOLE, lambda: size))
    assert_tiles(WHOLE, intervals)
    counts = [rows_within(made, interval) for interval in intervals[:50]]
    assert all(count == size for count in counts[:-1] if len(intervals) <= 50)
    assert counts[0] in (size, rows_within(made, WHOLE))


def test_gaps_that_a_resume_finds_are_tiled_and_nothing_else(engine: Callable[..., Engine]) -> None:
    made = engine(rows="INSERT INTO orders SELECT 150, i FROM generate_series(1, 100) i")
    recorded: list[Interval] = [(("150", "10"), ("150", "20")), (("150", "60"), ("150", "70"))]
    with made.connect("s2") as target, made.connect("s1") as source:
        for interval in recorded:
            task = CopyBatch(made.move, 1, made.table, interval, LEASE, made.dsn["s1"], made.dsn["s2"])
            record_batch(target, task, Digest(10, 0, ""))
        gaps = islands(target, made.move.id, 1, made.table).gaps()
        assert gaps == ((None, ("150", "10")), (("150", "20"), ("150", "60")), (("150", "70"), None))
        cut = [list(walk(source, made.move, made.table, gap, lambda: 10)) for gap in gaps]
    for gap, intervals in zip(gaps, cut, strict=True):
        assert_tiles(gap, intervals)
    assert [[rows_within(made, each) for each in intervals] for intervals in cut] == [[10], [10] * 4, [10] * 3 + [0]]


def test_a_walk_is_lazy_and_sees_a_new_size_at_once(engine: Callable[..., Engine]) -> None:
    made = engine(rows="INSERT INTO orders SELECT 150, i FROM generate_series(1, 100) i")
    sizes = iter([5, 20])
    with made.connect("s1") as connection:
        walking = walk(connection, made.move, made.table, WHOLE, lambda: next(sizes))
        assert [next(walking)[1], next(walking)[1]] == [("150", "5"), ("150", "25")]
        with pytest.raises(StopIteration):
            next(sizes)


# --- the plans of the two hot queries

EVEN = "INSERT INTO orders SELECT i % 500, i, repeat('x', 100) FROM generate_series(1, 50000) i"
SKEWED = """
    INSERT INTO orders SELECT CASE WHEN i % 10 = 0 THEN 100 + i % 90 ELSE 120 END, i, repeat('x', 100)
    FROM generate_series(1, 50000) i ORDER BY md5(i::text)
"""
FAR_BEYOND_THE_CACHE = "SET effective_cache_size = '1MB'"
"""As the planner sees a table of the size that is worth moving."""

STARTS: list[Position | None] = [None, ("119", "0"), ("120", "10000"), ("189", "0")]


def plan(connection: Connection, query: sql.Composable) -> str:
    """The plan of a query, or of the one inside a COPY."""
    text = re.sub(r"^COPY \((.*)\) TO STDOUT .*$", r"\1", query.as_string(connection))
    return json.dumps(connection.execute(f"EXPLAIN (FORMAT json) {text}".encode()).fetchall())


@pytest.mark.parametrize("rows", [EVEN, SKEWED], ids=["even", "skewed"])
def test_cuts_and_batches_are_answered_by_the_index(engine: Callable[..., Engine], rows: str) -> None:
    made = engine(rows=rows)
    made.fetch("s1", "VACUUM ANALYZE orders")
    with Connections() as connections:
        connection = connections.get(made.dsn["s1"], made.move.id)
        connection.execute(FAR_BEYOND_THE_CACHE)
        for start in STARTS:
            cut = plan(connection, cut_sql(made.move, made.table, (start, None), 2000))
            assert "Index Only Scan" in cut
            assert "Sort" not in cut
            interval = next(walk(connection, made.move, made.table, (start, None), lambda: 2000))
            batch = plan(connection, rows_of(made.move, made.table, interval))
            assert "Seq Scan" not in batch
            bounds = zip(("> ", "<="), interval, strict=True)
            assert all(f"ROW(tenant_id, id) {operator}" in batch for operator, end in bounds if end)


def test_twin_with_the_default_settings_a_skewed_table_is_read_whole(engine: Callable[..., Engine]) -> None:
    made = engine(rows=SKEWED)
    made.fetch("s1", "VACUUM ANALYZE orders")
    with made.connect("s1") as connection:
        connection.execute(FAR_BEYOND_THE_CACHE)
        interval = next(walk(connection, made.move, made.table, (("119", "0"), None), lambda: 2000))
        assert "Seq Scan" in plan(connection, rows_of(made.move, made.table, interval))


# --- the sizer

LIMITS = Limits()
batches = st.tuples(
    st.integers(0, 100_000), st.integers(0, 2**40), st.floats(0, 1e5, allow_nan=False, allow_infinity=False)
)


@given(now=st.integers(1, LIMITS.batch_rows_max), batch=batches)
def test_size_stays_in_bounds_and_grows_by_steps(now: int, batch: tuple[int, int, float]) -> None:
    after = next_rows(LIMITS, now, *batch)
    assert 1 <= after <= LIMITS.batch_rows_max
    assert after <= math.ceil(now * GROWTH)


@given(now=st.integers(1, LIMITS.batch_rows_max), batch=batches)
def test_a_batch_that_missed_a_target_shrinks_the_next_at_once(now: int, batch: tuple[int, int, float]) -> None:
    rows, size_bytes, elapsed_s = batch
    after = next_rows(LIMITS, now, *batch)
    if rows and size_bytes > LIMITS.batch_bytes:
        assert after == 1 or after * size_bytes / rows <= LIMITS.batch_bytes * 1.001
    if rows and elapsed_s > LIMITS.batch_time_s:
        assert after == 1 or after * elapsed_s / rows <= LIMITS.batch_time_s * 1.001
    if size_bytes <= LIMITS.batch_bytes and elapsed_s <= LIMITS.batch_time_s:
        assert after >= now


@given(row_bytes=st.integers(1, 10**9), row_s=st.floats(1e-7, 10))
def test_steady_rows_lead_to_a_size_that_meets_both_targets(row_bytes: int, row_s: float) -> None:
    sizer = BatchSizer(LIMITS)
    for _ in range(60):
        rows = sizer.rows()
        sizer.learn(rows, rows * row_bytes, rows * row_s)
    ideal = min(LIMITS.batch_bytes / row_bytes, LIMITS.batch_time_s / row_s, LIMITS.batch_rows_max)
    assert max(1, math.floor(ideal * 0.99)) <= sizer.rows() <= max(1, math.ceil(ideal))


def test_the_first_batch_is_small_and_within_the_limit() -> None:
    assert BatchSizer(LIMITS).rows() == ROWS_FIRST
    assert BatchSizer(replace(LIMITS, batch_rows_max=10)).rows() == 10


def test_predicates_are_composed_not_pasted(engine: Callable[..., Engine]) -> None:
    made = engine()
    query = cut_sql(made.move, made.table, ((("1'); DROP TABLE orders; --"), "2"), None), 10)
    assert isinstance(query, sql.Composed)
    assert "'1''); DROP TABLE orders; --'" in query.as_string()
