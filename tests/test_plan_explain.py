"""The hot statements are answered by an index: how they are run on tables of 200,000 rows, and how many they look at.

Each is explained, and run, in a session as the one that runs it: batches in a worker's, cuts and the mirror in plain
ones. The rows that a plan really looks at tell more than its estimates: the server estimates a row comparison by its
first column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
from psycopg import sql

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, describe, index_answers
from shardmove.postgres.sql import Position
from shardmove.protocol.catch_up import delete_rows, oldest_left, read_rows, take_entries
from shardmove.protocol.parts import journal
from tests.support.engine import Engine, make_engine
from tests.support.servers import Databases, connect
from workers.connections import Connections
from workers.copy import rows_of
from workers.cuts import cut_sql
from workers.erase import delete_sql

ROWS: Final = 200_000
BATCH: Final = 5_000
LOOKED_AT_MAX: Final = BATCH * 5 // 4
"""By a cut or a batch. Where the keyset does not begin with the key it looks at rows that do not move, too: here at
three for each that moves."""

Plan = dict[str, Any]

TABLES: Final = {"first": "tenant", "last": "tenant", "parts": "tenant", "skewed": "tenant"}
SCHEMA: Final = """
    CREATE TABLE first (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));
    CREATE TABLE last (tenant bigint, id bigint, note text, PRIMARY KEY (id, tenant));
    CREATE TABLE skewed (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));
    CREATE TABLE parts (tenant bigint, id bigint, day int, note text, PRIMARY KEY (tenant, id, day))
        PARTITION BY RANGE (day);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
    CREATE TABLE parts_rest PARTITION OF parts DEFAULT
"""
LOADED: Final = f"""
    INSERT INTO first SELECT i % 400, i, 'a note' FROM generate_series(1, {ROWS}) i;
    INSERT INTO last SELECT i % 400, i, 'a note' FROM generate_series(1, {ROWS}) i;
    INSERT INTO skewed SELECT CASE WHEN i % 10 = 0 THEN i % 400 ELSE 150 END, i, 'a note'
        FROM generate_series(1, {ROWS}) i;
    INSERT INTO parts SELECT i % 400, i, i % 30, 'a note' FROM generate_series(1, {ROWS}) i;
    ANALYZE
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine with its tables filled, and sessions as those that run the statements."""

    engine: Engine
    worker: Connection
    plain: Connection

    def table(self, name: str) -> Table:
        return next(table for table in self.engine.tables if table.name.name == name)

    def ordinal(self, name: str) -> int:
        return self.engine.tables.index(self.table(name)) + 1


@pytest.fixture(scope="module")
def loaded(servers: Any) -> Iterator[Loaded]:
    databases = Databases(servers)
    engine = make_engine(databases("s1", "s2"), schema=SCHEMA, tables=TABLES, rows=LOADED)
    with Connections() as workers, engine.connect("s1") as plain:
        yield Loaded(engine, workers.get(engine.dsn["s1"], engine.move.id), plain)
    databases.drop()


def explain(connection: Connection, statement: sql.Composable) -> Plan:
    """How a statement was run; of a COPY, its query. Nothing is changed by it."""
    text = statement.as_string(connection)
    copied = re.fullmatch(r"COPY \((.*)\) TO STDOUT .*", text, re.DOTALL)
    with connection.transaction(force_rollback=True):
        row = connection.execute(
            f"EXPLAIN (ANALYZE, TIMING off, FORMAT JSON) {copied[1] if copied else text}".encode()
        ).fetchone()
    assert row is not None
    plan: Plan = row[0][0]["Plan"]
    return plan


class Explained:
    """In the place of a connection: explains what it is given."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.plans: list[Plan] = []

    def execute(self, statement: sql.Composable) -> None:
        self.plans.append(explain(self.connection, statement))

    @classmethod
    def plan(cls, connection: Connection, work: Callable[[Any], object]) -> Plan:
        """Of the only statement of `work`."""
        explained = cls(connection)
        work(explained)
        (plan,) = explained.plans
        return plan


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def assert_by_index(plan: Plan, *, looked_at_max: int, sorted_max: int = 0) -> None:
    """No table is read as a whole, no more rows than that are looked at, and no more sorted."""
    found = list(nodes(plan))
    assert not [node for node in found if node["Node Type"] == "Seq Scan" and node["Actual Loops"]], plan
    assert 0 < sum(map(looked_at, found)) <= looked_at_max, plan
    assert all(node["Actual Rows"] <= sorted_max for node in found if node["Node Type"] == "Sort"), plan


def looked_at(node: Plan) -> float:
    if "Relation Name" not in node or node["Node Type"] == "ModifyTable":
        return 0
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float((node["Actual Rows"] + removed) * node["Actual Loops"])


def by_batch(table: Table) -> int:
    """How many rows of the table may be looked at for a batch."""
    return LOOKED_AT_MAX if table.keyset_names[0] == table.key_column else 4 * LOOKED_AT_MAX


def middle(table: Table) -> Position:
    """A position in the middle of the range 100:200 of the tables above."""
    values = {"tenant": "150", "id": "100150", "day": "0"}
    return tuple(values[name] for name in table.keyset_names)


def behind(table: Table) -> Position:
    """The position of about BATCH rows later."""
    tenant, id_ = {"last": ("150", "120150"), "skewed": ("150", "105700")}.get(table.name.name, ("160", "100160"))
    values = {"tenant": tenant, "id": id_, "day": "0"}
    return tuple(values[name] for name in table.keyset_names)


def positions(table: Table, count: int) -> Sequence[Position]:
    """So many rows of the range, all over it."""
    ids = [100 + i % 100 + 400 * (i % 500) for i in range(count)]
    values = [{"tenant": str(id_ % 400), "id": str(id_), "day": str(id_ % 30)} for id_ in ids]
    return [tuple(each[name] for name in table.keyset_names) for each in values]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("begins", ["at the beginning", "in the middle"])
def test_a_cut_follows_the_index(loaded: Loaded, name: str, begins: str) -> None:
    table = loaded.table(name)
    after = None if begins == "at the beginning" else middle(table)
    for connection in (loaded.plain, loaded.worker):
        plan = explain(connection, cut_sql(loaded.engine.move, table, (after, None), BATCH))
        assert_by_index(plan, looked_at_max=by_batch(table))


def test_a_cut_by_hash_follows_the_keyset(loaded: Loaded) -> None:
    """Keys of a hash range lie all over the table: of a quarter of all hashes, it looks at three others for each."""
    shop = Keyspace("shop", KeyType.BIGINT, Scheme.HASH, loaded.engine.move.keyspace.tables)
    move = replace(loaded.engine.move, keyspace=shop, ranges=(KeyType.BIGINT.parse_range(":-4611686018427387904"),))
    plan = explain(loaded.plain, cut_sql(move, loaded.table("first"), (None, None), BATCH))
    assert_by_index(plan, looked_at_max=6 * BATCH)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("statement", [rows_of, delete_sql], ids=["rows_of", "delete_sql"])
def test_a_batch_reads_its_interval(loaded: Loaded, name: str, statement: Any) -> None:
    table = loaded.table(name)
    plan = explain(loaded.worker, statement(loaded.engine.move, table, (middle(table), behind(table))))
    assert_by_index(plan, looked_at_max=by_batch(table), sorted_max=LOOKED_AT_MAX)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [1, 50, 1_000])
def test_the_mirror_finds_its_rows(loaded: Loaded, name: str, count: int) -> None:
    move, table = loaded.engine.move, loaded.table(name)
    wanted = positions(table, count)
    deleted = Explained.plan(loaded.plain, lambda connection: delete_rows(connection, move, table, wanted))
    read = explain(loaded.plain, read_rows(move, table, wanted))
    for plan in (deleted, read):
        assert_by_index(plan, looked_at_max=count, sorted_max=count)


def test_the_journal_is_read_from_its_old_end(loaded: Loaded) -> None:
    """Entries before `start` are known to be gone, and of the others only the oldest are taken."""
    move_id, table, ordinal = loaded.engine.move.id, loaded.table("first"), loaded.ordinal("first")
    name = journal(move_id, ordinal)
    loaded.plain.execute(
        sql.SQL("INSERT INTO {} SELECT i % 400, i, i::text::xid8 FROM generate_series(1, {}) i").format(
            name, sql.Literal(ROWS)
        )
    )
    loaded.plain.execute(sql.SQL("ANALYZE {}").format(name))
    for start, rows_max in ((0, 1_000), (ROWS - 500, 1_000), (ROWS - 500, None)):
        taken = Explained.plan(
            loaded.plain,
            lambda connection, start=start, rows_max=rows_max: take_entries(
                connection, move_id, ordinal, table, sql.SQL("true"), start, rows_max
            ),
        )
        assert_scans_nothing_whole(taken)
    assert_scans_nothing_whole(
        Explained.plan(loaded.plain, lambda connection: oldest_left(connection, move_id, ordinal, 0))
    )


def assert_scans_nothing_whole(plan: Plan) -> None:
    assert not [node for node in nodes(plan) if node["Node Type"] in ("Seq Scan", "Sort")], plan


# --- texts

TEXTS: Final = f"""
    CREATE TABLE things (tenant text, id bigint, note text, PRIMARY KEY (tenant, id));
    INSERT INTO things SELECT 'tenant ' || i % 400, i, 'a note' FROM generate_series(1, {ROWS}) i;
    ANALYZE
"""
BY_BYTES: Final = 'CREATE UNIQUE INDEX ON things (tenant COLLATE "C", id); ANALYZE things'
TEXT_RANGE: Final = KeyType.TEXT.parse_range("tenant 2:tenant 3")


def plans_of_texts(loaded: Loaded, connection: Connection, key: Table, *, worker: Connection) -> list[Plan]:
    shop = Keyspace("shop", KeyType.TEXT, Scheme.RANGE, {TableName("public", "things"): "tenant"})
    move = replace(loaded.engine.move, keyspace=shop, ranges=(TEXT_RANGE,))
    after, upto = ("tenant 250", "100000"), ("tenant 26", "100000")
    return [
        explain(connection, cut_sql(move, key, (after, None), BATCH)),
        explain(worker, rows_of(move, key, (after, upto))),
        explain(worker, delete_sql(move, key, (after, upto))),
        explain(connection, read_rows(move, key, [("tenant 250", "250"), ("tenant 251", "251")])),
    ]


@pytest.mark.parametrize(
    ("locale", "index", "answers"),
    [("C", "", True), ("C.utf8", BY_BYTES, True), ("C.utf8", "", False)],
    ids=["C database", "collated with an index by bytes", "collated without one"],
)
def test_texts_are_read_by_an_index_that_sorts_by_bytes(
    loaded: Loaded, databases: Databases, locale: str, index: str, answers: bool
) -> None:
    options = "LOCALE 'C'" if locale == "C" else "LOCALE 'C.utf8'"
    dsn = databases("s1", template="template0", options=options)["s1"]
    with connect(dsn, application_name="test") as connection, Connections() as workers:
        connection.execute(f"SET search_path = public; {TEXTS}; {index}".encode())
        table = describe(connection, TableName("public", "things"), "tenant")
        assert index_answers(connection, table) is answers
        plans = plans_of_texts(loaded, connection, table, worker=workers.get(dsn, "m1"))
    if answers:
        for plan in plans:
            assert_by_index(plan, looked_at_max=LOOKED_AT_MAX, sorted_max=LOOKED_AT_MAX)
    else:  # as preflight notes: each batch looks at the whole table
        for plan in plans[:3]:
            assert sum(map(looked_at, nodes(plan))) > ROWS / 2
