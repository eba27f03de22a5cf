"""What docs/applications.md tells an application: it is routed like that, refused like that, and told like that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.routed import Routed
from tests.support.router import Router

PAGE = Path(__file__).parents[1] / "docs/applications.md"
REFUSED = {
    "a write to rows of several shards": "UPDATE items SET amount = 1 WHERE tenant_id IN (1, 200)",
    "a key that changes to another shard's": "UPDATE items SET tenant_id = 200 WHERE tenant_id = 1",
    "an aggregate of several shards": "SELECT sum(amount) FROM items",
    "DISTINCT without the key": "SELECT DISTINCT amount FROM items",
    "OFFSET": "SELECT tenant_id FROM items ORDER BY tenant_id OFFSET 1",
    "UNION": "SELECT id FROM items UNION SELECT amount FROM items",
    "several statements of several shards": "DELETE FROM items WHERE id = 9 AND tenant_id = 1;"
    " DELETE FROM items WHERE id = 9 AND tenant_id = 200",
    "a cursor": "DECLARE c CURSOR WITH HOLD FOR SELECT * FROM items",
    "PREPARE": "PREPARE p AS SELECT * FROM items WHERE tenant_id = 1",
    "LOCK": "LOCK TABLE items",
}


@pytest.fixture
def router(routed: Routed) -> Router:
    for shard, tenant in (("s1", 1), ("s2", 200)):
        routed.execute(shard, f"INSERT INTO items (tenant_id, id) VALUES ({tenant}, 1)")
    return routed.router()


@pytest.fixture
def connection(router: Router, routed: Routed) -> Iterator[psycopg.Connection]:
    with psycopg.connect(router.dsn(routed.dbname), autocommit=True) as opened:
        yield opened


def said_no(connection: psycopg.Connection, *statements: str, in_block: bool) -> psycopg.errors.Diagnostic:
    """The refusal of the last statement; the others come through."""
    cursor = psycopg.ClientCursor(connection)
    for statement in [*(["BEGIN ISOLATION LEVEL SERIALIZABLE"] if in_block else []), *statements[:-1]]:
        cursor.execute(statement.encode())
    with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
        cursor.execute(statements[-1].encode())
    if in_block:
        cursor.execute(b"ROLLBACK")
    return caught.value.diag


@pytest.mark.parametrize("in_block", [False, True], ids=["alone", "in a transaction"])
def test_what_is_refused_says_why_and_what_to_do(connection: psycopg.Connection, in_block: bool) -> None:
    """Also as the first statement of a transaction, which no shard knows of by then; and the session goes on."""
    for what, statement in REFUSED.items():
        assert said_no(connection, statement, in_block=in_block).message_hint, what
        assert connection.execute("SELECT id FROM items WHERE tenant_id = 200").fetchall() == [(1,)], what


def test_a_transaction_belongs_to_the_shard_of_its_first_key(connection: psycopg.Connection, routed: Routed) -> None:
    refusal = said_no(
        connection,
        "SELECT 1",
        "SET LOCAL work_mem = '7MB'",
        "SAVEPOINT here",
        "UPDATE items SET amount = 7, note = current_setting('work_mem') WHERE tenant_id = 200",
        "RELEASE here",
        "UPDATE items SET amount = 7 WHERE tenant_id = 1",
        in_block=True,
    )
    assert refusal.message_hint
    assert routed.execute("s2", "SELECT amount, note FROM items") == [(0, None)]
    with connection.transaction():
        connection.execute("SET LOCAL work_mem = '7MB'")
        connection.execute("UPDATE items SET amount = 7, note = current_setting('work_mem') WHERE tenant_id = 200")
    assert routed.execute("s2", "SELECT amount, note FROM items") == [(7, "7MB")]


@pytest.mark.parametrize("hint", ["SET shardmove.key = '200'; ", "/* shardmove: key=200 */ "])
def test_a_hint_says_where(connection: psycopg.Connection, hint: str) -> None:
    for statement in (hint + "SELECT tenant_id FROM items").split("; "):
        cursor = connection.execute(statement.encode())
    assert cursor.fetchall() == [(200,)]


def test_explain_tells_the_route_as_the_page_shows_it(connection: psycopg.Connection) -> None:
    said: list[str] = []
    connection.add_notice_handler(lambda notice: said.append(f"{notice.severity}:  {notice.message_primary}"))
    connection.execute("EXPLAIN SELECT * FROM items WHERE tenant_id = 200")
    shown = re.search(r"^INFO: .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown is not None
    assert [re.sub(r"\d+", "N", line) for line in said] == [re.sub(r"\d+", "N", shown[0])]


def test_settings_follow_the_session_to_each_shard(connection: psycopg.Connection) -> None:
    connection.execute("SET application_name = 'told once'")
    for tenant in (1, 200):
        query = "SELECT current_setting('application_name'), tenant_id FROM items WHERE tenant_id = %s"
        assert connection.execute(query, (tenant,)).fetchone() == ("told once", tenant)
