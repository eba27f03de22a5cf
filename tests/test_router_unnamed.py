"""INSERT and COPY that do not name the columns: the router asks a shard for them, and writes them into the text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from router import columns
from router.columns import told_of
from router.statements import Plans, Tables, plans
from router.statements.actions import Added
from router.statements.tables import Columns
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.wire import messages as wire
from tests.support import engine
from tests.support.inside import inside
from tests.support.rawclient import RawClient, codes, told
from tests.support.routed import Routed
from tests.support.router import Router

BOUND_S = 30.0
until = partial(engine.until, timeout_s=BOUND_S)
HERE, THERE = 7, 107
TABLE = TableName("public", "items")
SPACE = Keyspace("shop", KeyType.BIGINT, Scheme.RANGE, {TABLE: "k"})
KNOWN = Tables({"shop": SPACE}, {TABLE: Columns(("a", "k", 'o"dd', "g"), frozenset({"g"}))})


@pytest.fixture
def routed(routed: Routed) -> Routed:
    """Its view rests on columns that go away here."""
    for shard in ("s1", "s2"):
        routed.execute(shard, "DROP VIEW noted")
    return routed


@pytest.fixture(params=["session", "transaction"])
def router(routed: Routed, request: pytest.FixtureRequest) -> Router:
    return routed.router(pooling=request.param)


def client(router: Router) -> psycopg.Connection[Any]:
    return psycopg.connect(router.dsn(), autocommit=True)


def rows(routed: Routed, shard: str, columns: str = "tenant_id, id, note, amount") -> list[tuple[Any, ...]]:
    return routed.execute(shard, f"SELECT {columns} FROM items ORDER BY tenant_id, id")


# --- the text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("INSERT INTO items VALUES (1, 2)", 'INSERT INTO items ("a", "k") VALUES (1, 2)'),
        ("insert into public.items as i values (1, 2, 3, 4)", 'insert into public.items as i ("a", "k", "o""dd", "g")'),
        ("INSERT INTO items OVERRIDING USER VALUE VALUES (1, 2)", 'INSERT INTO items ("a", "k") OVERRIDING'),
        ("INSERT INTO items SELECT 1, 2, 3", 'INSERT INTO items ("a", "k", "o""dd") SELECT'),
        ("INSERT INTO items (SELECT 1, 2)", 'INSERT INTO items ("a", "k") (SELECT'),
        (
            "/* VALUES */ WITH n AS (INSERT INTO items VALUES ('x', 2) RETURNING k) INSERT INTO items VALUES ('y', 2)",
            '/* VALUES */ WITH n AS (INSERT INTO items ("a", "k") VALUES (\'x\', 2) RETURNING k)'
            ' INSERT INTO items ("a", "k") VALUES',
        ),
        ("INSERT INTO items VALUES (1, 2); INSERT INTO items VALUES (3, 2)", '(1, 2); INSERT INTO items ("a", "k") V'),
        ("EXPLAIN INSERT INTO items VALUES (1, 2)", 'EXPLAIN INSERT INTO items ("a", "k") VALUES (1, 2)'),
        ("COPY items FROM STDIN", 'COPY items ("a", "k", "o""dd") FROM STDIN'),
        ("COPY BINARY public.items FROM STDIN", 'COPY BINARY public.items ("a", "k", "o""dd") FROM STDIN'),
    ],
)
def test_columns_are_written_behind_the_tables_name(text: str, expected: str) -> None:
    planned = Plans(KNOWN).of(text.encode())
    assert planned.plan.refusal is None
    assert expected in planned.text.decode()
    said = planned.text.decode()
    for each in reversed(planned.added):  # what was put in, taken out again, leaves the client's own
        at = each.position + sum(before.length for before in planned.added if before.position < each.position)
        said = said[:at] + said[at + each.length :]
    assert said == text


def test_texts_of_one_shape_are_planned_once_each_with_its_own_literals() -> None:
    known = Plans(KNOWN)
    for number in range(3):
        planned = known.of(f"INSERT INTO items VALUES ('{'x' * number}', {number})".encode())
        assert planned.text == f'INSERT INTO items ("a", "k") VALUES (\'{"x" * number}\', {number})'.encode()
        assert known.of(f"INSERT INTO items VALUES ('{'x' * number}', {number})".encode()) is planned
    assert (known.misses, known.shape_hits, known.hits) == (1, 2, 3)


@pytest.mark.parametrize(
    "text",
    ["INSERT INTO items VALUES (1, 2, 3, 4, 5)", "INSERT INTO items TABLE items", "INSERT INTO items VALUES (1)"],
)
def test_what_cannot_be_completed_is_refused(text: str) -> None:
    planned = Plans(KNOWN).of(text.encode())
    assert planned.plan.refusal is not None
    assert planned.wants == ((TABLE,) if "5" in text else ())


@pytest.mark.parametrize(("position", "expected"), [(5, 5), (18, 17), (25, 17), (26, 17), (27, 18), (40, 31)])
def test_an_errors_position_is_that_in_the_clients_text(position: int, expected: int) -> None:
    frame = wire.message(b"E", b"SERROR\0C42703\0Mno\0P%d\0\0" % position)
    told = told_of(frame, (Added(17, 9),))
    assert wire.error_fields(told[5:])["P"] == str(expected)


# --- statements


def test_rows_without_named_columns_go_where_they_belong(routed: Routed, router: Router) -> None:
    with client(router) as connection:
        connection.execute(f"INSERT INTO items VALUES ({HERE}, 1, 'simple', 5)".encode())
        connection.execute("INSERT INTO items VALUES (%s, %s, %s)", (THERE, 1, "extended"))
        for number in (2, 3):
            connection.execute("INSERT INTO items VALUES (%s, %s)", (THERE, number), prepare=True)
        connection.execute(f"INSERT INTO items SELECT {HERE}, 2, 'selected' RETURNING *".encode())
        connection.execute(f"INSERT INTO items VALUES ({THERE}, 4), ({THERE}, 5)".encode())
        with connection.transaction():
            connection.execute("INSERT INTO items VALUES (%s, 3)", (HERE,))
    assert rows(routed, "s1") == [(HERE, 1, "simple", 5), (HERE, 2, "selected", 0), (HERE, 3, None, 0)]
    assert [row[:2] for row in rows(routed, "s2")] == [(THERE, number) for number in range(1, 6)]


@pytest.mark.parametrize("options", ["", " WITH (FORMAT csv, HEADER)"])
def test_copied_rows_without_named_columns_go_where_they_belong(routed: Routed, router: Router, options: str) -> None:
    for shard in ("s1", "s2"):
        routed.execute(shard, "ALTER TABLE items ADD COLUMN double integer GENERATED ALWAYS AS (amount * 2) STORED")
    separator = "," if options else "\t"
    with client(router) as connection, connection.cursor() as cursor:
        for tenants in (range(100), range(100, 200)):
            with cursor.copy(f"COPY items FROM STDIN{options}".encode()) as copy:
                if options:
                    copy.write("tenant_id,id,note,amount\n")
                for number in tenants:
                    copy.write(separator.join(map(str, (number, 1, f"note {number}", number))) + "\n")
    for shard, tenants in (("s1", range(100)), ("s2", range(100, 200))):
        expected = [(number, 1, f"note {number}", number, 2 * number) for number in tenants]
        assert rows(routed, shard, "tenant_id, id, note, amount, double") == expected


def test_columns_in_another_order_on_another_shard_are_met_by_name(routed: Routed, router: Router) -> None:
    routed.execute("s2", "ALTER TABLE items DROP COLUMN note, DROP COLUMN amount")
    routed.execute("s2", "ALTER TABLE items ADD COLUMN amount integer NOT NULL DEFAULT 0, ADD COLUMN note text")
    with client(router) as connection:
        for tenant in (HERE, THERE):
            connection.execute("INSERT INTO items VALUES (%s, 1, 'named', 5)", (tenant,))
    assert rows(routed, "s1") == [(HERE, 1, "named", 5)]
    assert rows(routed, "s2") == [(THERE, 1, "named", 5)]


def test_errors_are_those_of_a_server_asked_directly(routed: Routed) -> None:
    router = routed.router()
    texts = (
        "INSERT INTO items VALUES (7, 1, nope)",
        "INSERT INTO items VALUES (7, 'x')",
        "INSERT INTO items VALUES (7)",
    )
    with client(router) as connection, psycopg.connect(routed.dsns["s1"], autocommit=True) as direct:
        direct.execute("SET search_path = public")
        for text in texts:
            found = []
            for one in (connection, direct):
                with pytest.raises(psycopg.Error) as caught:
                    one.execute(text.encode())
                diagnostics = caught.value.diag
                found.append((caught.value.sqlstate, diagnostics.message_primary, diagnostics.statement_position))
            assert found[0] == found[1]


def test_a_table_that_no_shard_has_is_refused_without_an_end(routed: Routed) -> None:
    for shard in ("s1", "s2"):
        routed.execute(shard, "DROP TABLE items")
    with client(routed.router()) as connection:
        for _ in range(2):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="does not name its columns"):
                connection.execute("INSERT INTO items VALUES (7, 1)")
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_while_the_router_is_paused_nobody_is_asked(routed: Routed, router: Router) -> None:
    with (
        psycopg.connect(router.dsn("shardmove"), autocommit=True) as console,
        RawClient(router.port, dbname=routed.dbname, bound_s=BOUND_S) as waiting,
    ):
        console.execute("PAUSE")
        waiting.query(f"INSERT INTO items VALUES ({HERE}, 1)")
        until(
            lambda: any(row["pid"] == str(waiting.pid) and row["state"] == "waiting" for row in router.show("CLIENTS")),
            "it does not wait",
        )
        assert not rows(routed, "s1")
        console.execute("RESUME")
        assert codes(told(waiting.until_ready())) == []
    assert rows(routed, "s1") == [(HERE, 1, None, 0)]


# --- tables that change


def alter(routed: Routed, statement: str) -> None:
    """Around the router."""
    for shard in ("s1", "s2"):
        routed.execute(shard, statement)


def succeeds(execute: Callable[[], object]) -> bool:
    try:
        execute()
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.SyntaxError, psycopg.errors.UndefinedColumn):
        return False
    return True


def test_ddl_through_the_router_counts_at_once(routed: Routed, router: Router) -> None:
    with client(router) as connection:
        connection.execute("INSERT INTO items VALUES (%s, 1)", (HERE,))
        connection.execute("ALTER TABLE items DROP COLUMN note")
        connection.execute("ALTER TABLE items ADD COLUMN more text")
        connection.execute("INSERT INTO items VALUES (%s, 2, 3, 'more')", (HERE,))
    assert rows(routed, "s1", "tenant_id, id, amount, more") == [(HERE, 1, 0, None), (HERE, 2, 3, "more")]


def test_ddl_around_the_router_is_noticed(routed: Routed, router: Router) -> None:
    with client(router) as connection:
        connection.execute("INSERT INTO items VALUES (%s, 1)", (HERE,))
        alter(routed, "ALTER TABLE items ADD COLUMN more text")
        more = partial(connection.execute, "INSERT INTO items VALUES (%s, 2, 'note', 3, 'more')", (HERE,))
        until(lambda: succeeds(more), "the new column is never known")
        alter(routed, "ALTER TABLE items DROP COLUMN note")
        less = partial(connection.execute, "INSERT INTO items VALUES (%s, 3, 4, 'less')", (HERE,))
        until(lambda: succeeds(less), "the old column is never forgotten")
    assert rows(routed, "s1", "tenant_id, id, amount, more") == [
        (HERE, 1, 0, None),
        (HERE, 2, 3, "more"),
        (HERE, 3, 4, "less"),
    ]


def test_what_is_known_is_asked_for_again_after_a_while(routed: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "AGE_MAX_S", 0.0)
    with inside(routed.config_file) as it, RawClient(it.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        assert codes(client.ask(wire.query(f"INSERT INTO items VALUES ({HERE}, 1)"))) == []
        known = it.router.columns
        assert known.by_table[TABLE].names == ("tenant_id", "id", "note", "amount")
        plans_before = it.router.known.tables
        it.call(known.refresh)
        until(lambda: it.call(lambda: not known._asking), "the answer does not come")
        assert it.router.known.tables is plans_before, "the same columns are no reason to plan anew"
        alter(routed, "ALTER TABLE items DROP COLUMN note")
        it.call(known.refresh)
        until(lambda: it.call(lambda: known.by_table[TABLE].names == ("tenant_id", "id", "amount")), "nobody looks")
        assert codes(client.ask(wire.query(f"INSERT INTO items VALUES ({HERE}, 2, 3)"))) == []
        alter(routed, "DROP TABLE items")
        it.call(known.refresh)
        until(lambda: it.call(lambda: TABLE not in known.by_table), "the table is not missed")


@pytest.mark.parametrize("is_written", [True, False], ids=["written", "twin without"])
def test_columns_that_were_moved_put_no_row_on_a_wrong_shard(
    routed: Routed, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """The key is the second column now, and the router still takes it for the first."""
    if not is_written:
        monkeypatch.setattr(plans, "_with_columns", lambda text, unnamed: (text, ()))
    with inside(routed.config_file) as it, RawClient(it.port, dbname=routed.dbname, bound_s=BOUND_S) as client:
        assert codes(client.ask(wire.query(f"INSERT INTO items VALUES ({HERE}, 1)"))) == []
        alter(routed, "ALTER TABLE items DROP COLUMN id CASCADE")
        alter(routed, "ALTER TABLE items RENAME COLUMN tenant_id TO id")
        alter(routed, "ALTER TABLE items RENAME COLUMN note TO words")
        alter(routed, "ALTER TABLE items ALTER COLUMN words TYPE bigint USING 0")
        alter(routed, "ALTER TABLE items RENAME COLUMN words TO tenant_id")
        client.ask(wire.query(f"INSERT INTO items VALUES ({HERE}, {THERE})"))
    misplaced = routed.execute("s1", f"SELECT 1 FROM items WHERE tenant_id = {THERE}")
    assert bool(misplaced) is not is_written
