"""Statements of `tests/data/statements`, planned and decided: each line says what has to come out.

    SQL <- arguments => ACTION shards [more]

Arguments are parameters in text form, between semicolons; NULL is NULL. Shards are a, b and c; `-` is any. For a
refusal: its SQLSTATE. `more`: write, locks, keys=…, name=…, value=…, kind=…, order=…, limit=….
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.statements import (
    Action,
    Arguments,
    CopyKeys,
    CopySpec,
    Decision,
    Facts,
    Hint,
    Plans,
    Tables,
    decide,
    execute_arguments,
    restricted,
)
from router.statements.lexer import cut, text_of, tokens
from router.statements.values import Unreadable
from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.routes import Route, Routes, RouteTable

FILES = sorted((Path(__file__).parent / "data" / "statements").glob("*.txt"))


def public(**tables: str) -> dict[TableName, str]:
    return {TableName("public", name): column for name, column in tables.items()}


KEYSPACES = {
    "accounts": Keyspace(
        "accounts",
        KeyType.BIGINT,
        Scheme.RANGE,
        {**public(t="id", u="t_id", Odd="Key"), TableName("sales", "orders"): "t_id"},
        (TableName("public", "r"),),
    ),
    "names": Keyspace("names", KeyType.TEXT, Scheme.RANGE, public(n="name")),
    "ids": Keyspace("ids", KeyType.UUID, Scheme.RANGE, public(g="id")),
    "days": Keyspace("days", KeyType.DATE, Scheme.RANGE, public(d="day")),
    "times": Keyspace("times", KeyType.TIMESTAMPTZ, Scheme.RANGE, public(z="at")),
    "hashed": Keyspace("hashed", KeyType.INTEGER, Scheme.HASH, public(hh="id")),
}


def routes(name: str, *ends: str) -> Routes:
    """a up to the first end, b up to the second, then a again."""
    type_ = KEYSPACES[name].bound_type
    keys = [None, *map(type_.parse, ends), None]
    return Routes.of(name, [Route(KeyRange(keys[n], keys[n + 1]), "aba"[n]) for n in range(len(ends) + 1)])


@dataclass
class View:
    """Keys from 100 up to 200, or what is like them, are on b, all others on a; c has none."""

    routes: RouteTable
    tables: Tables
    home: str = "a"
    shards: tuple[str, ...] = ("a", "b", "c")


VIEW = View(
    RouteTable(
        1,
        {
            "accounts": routes("accounts", "100", "200"),
            "names": routes("names", "m", "p"),
            "ids": routes("ids", "80000000-0000-0000-0000-000000000000"),
            "days": routes("days", "2026-01-01", "2027-01-01"),
            "times": routes("times", "2026-01-01 00:00:00+00:00", "2027-01-01 00:00:00+00:00"),
            "hashed": routes("hashed", "0"),
        },
    ),
    Tables(KEYSPACES),
)
PLANS = Plans(VIEW.tables)


@dataclass
class Case:
    where: str
    sql: str
    arguments: list[str | None]
    expected: str


def cases() -> Iterator[Case]:
    for file in FILES:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            statement, expected = line.rsplit(" => ", 1)
            sql, _, arguments = statement.partition(" <- ")
            values = [None if v.strip() == "NULL" else v.strip() for v in arguments.split(";")] if arguments else []
            yield Case(f"{file.stem}:{number}", sql.replace("\\n", "\n"), values, expected.strip())


def outcome(case: Case) -> str:
    planned = PLANS.of(case.sql.encode())
    arguments = Arguments((), [None if v is None else v.encode() for v in case.arguments]) if case.arguments else None
    decision = decide(planned, arguments, VIEW)
    return described(decision)


def described(decision: Decision) -> str:
    if decision.refusal is not None:
        return f"REFUSED {decision.refusal.sqlstate}"
    words = [decision.action.name, ",".join(decision.shards) or "-"]
    words += ["write"] if decision.is_write else []
    words += ["locks"] if decision.locks_rows else []
    words += ["stays"] if decision.stays else []
    part = decision.part
    if part is not None:
        words += [f"name={part.name}"] if part.name else []
        words += [f"kind={part.kind.replace(' ', '_')}"] if part.kind else []
        words += [f"value={part.value}"] if part.value is not None else []
        flags = {
            "local": part.is_local,
            "chained": part.is_chained,
            "readonly": part.is_read_only,
            "query": part.is_query,
        }
        words += [name for name, is_set in flags.items() if is_set]
        words += [f"isolation={part.isolation.replace(' ', '_')}"] if part.isolation else []
    if decision.merge is not None:
        order = [f"{c.name or c.position}{'-' if c.is_descending else ''}" for c in decision.merge.order]
        words += [f"order={','.join(order)}"] if order else []
        words += [f"limit={decision.merge.limit}"] if decision.merge.limit is not None else []
    return " ".join(words)


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.where)
def test_a_statement_is_decided_as_the_table_says(case: Case) -> None:
    assert outcome(case) == case.expected, case.sql


def test_the_table_is_long() -> None:
    assert sum(1 for _ in cases()) > 300


# Rubbish


def _mutated(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                del data[position : position + rng.randint(1, 8)]
            case 1:
                data[position:position] = rng.choice(
                    [
                        b"'",
                        b'"',
                        b"(",
                        b")",
                        b"$1",
                        b"$$",
                        b";",
                        b"/*",
                        b"--",
                        b"\xff",
                        b" OR ",
                        b"E'",
                        b"\x01",
                        b"*",
                        b",",
                        b".",
                    ]
                )
            case 2 if len(data) > 1:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 3:
                data[position:position] = data[: rng.randint(1, 20)]
            case _:
                data = bytearray(
                    b" ".join(
                        sorted(bytes(data).split(b" "), key=lambda _: rng.random())
                        if rng.random() < 0.2
                        else [bytes(data)]
                    )
                )
    return bytes(data)


def test_nothing_that_a_client_sends_raises(rng: random.Random) -> None:
    plans = Plans(VIEW.tables)
    texts = [case.sql for case in cases()]
    for _ in range(3000):
        data = _mutated(rng, rng.choice(texts))
        planned = plans.of(data)
        for arguments in (None, Arguments((), [b"5", None, b"x"]), Arguments((1,), [b"\0\0\0\x05"], [23])):
            decision = decide(planned, arguments, VIEW)
            if decision.action is Action.SCATTER:
                try:
                    restricted(planned, {})
                except Unreadable:
                    continue


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_raise(data: bytes) -> None:
    decide(PLANS.of(data), None, VIEW)
    list(tokens(text_of(data)))


@pytest.mark.parametrize(
    "text",
    [
        b"SELECT " + b"(" * 5000 + b"1" + b")" * 5000,
        b"SELECT * FROM t WHERE " + b"NOT " * 5000 + b"id = 1",
        b"SELECT * FROM t WHERE id = 1" + b" AND id = 1" * 3000,
        b"SELECT * FROM " + b"(SELECT * FROM " * 1000 + b"t" + b") a" * 1000,
        b"EXECUTE s ($" + b"9" * 5000 + b")",
        b"SELECT * FROM t WHERE id = $" + b"9" * 5000,
        b"SELECT * FROM t WHERE id = " + b"9" * 5000,
        b"SELECT * FROM t ORDER BY " + b"9" * 5000,
        b"SELECT 1" + b" UNION ALL SELECT 1" * 2000,
    ],
    ids=lambda text: text[:30].decode(),
)
def test_what_is_deep_or_long_does_not_raise(text: bytes) -> None:
    decide(Plans(VIEW.tables).of(text), Arguments((), []), VIEW)


# Plans


def test_literals_do_not_make_new_plans() -> None:
    plans = Plans(VIEW.tables)
    first = plans.of(b"SELECT * FROM t WHERE id = 5 AND x = 'a'")
    second = plans.of(b"SELECT * FROM t WHERE id = 150 AND x = 'it''s'")
    assert first.plan is second.plan
    assert (plans.misses, plans.shape_hits) == (1, 1)
    assert decide(first, None, VIEW).shards == ("a",)
    assert decide(second, None, VIEW).shards == ("b",)
    assert plans.of(b"SELECT * FROM t WHERE id = 150 AND x = 'it''s'") is second


def test_a_plan_that_rests_on_a_literal_is_for_this_text_only() -> None:
    plans = Plans(VIEW.tables)
    assert plans.of(b"SET x = 1").plan is not plans.of(b"SET x = 2").plan
    grouped = [plans.of(f"SELECT x, id, count(*) FROM t GROUP BY id, x ORDER BY {n}".encode()) for n in (1, 2)]
    orders = [decide(planned, None, VIEW).merge for planned in grouped]
    assert [merge.order[0].position for merge in orders if merge is not None] == [0, 1]


@pytest.mark.parametrize(("odd", "plain"), [(b"\x01n", b"5"), (b"\x01s", b"'5'"), (b"5 AND x = \x01n", b"5 AND x = 5")])
@pytest.mark.parametrize("is_odd_first", [True, False])
def test_a_byte_like_a_literals_mark_does_not_reach_the_plans_of_others(
    odd: bytes, plain: bytes, is_odd_first: bool
) -> None:
    plans = Plans(VIEW.tables)
    expected = {
        b"SELECT x FROM t WHERE id = " + odd: "REFUSED 42601",
        b"SELECT x FROM t WHERE id = " + plain: "KEYED a",
    }
    for text in expected if is_odd_first else reversed(expected):
        assert described(decide(plans.of(text), None, VIEW)) == expected[text], text


def test_the_cache_does_not_grow_beyond_its_size() -> None:
    plans = Plans(VIEW.tables, size=10)
    for number in range(200):
        plans.of(f"SELECT * FROM t WHERE id = {number}".encode())
        plans.of(f"SELECT a{number} FROM t WHERE id = 1".encode())
    assert len(plans._texts) + len(plans._older_texts) <= 10
    assert len(plans._shapes) + len(plans._older_shapes) <= 10


def test_what_is_cut_is_what_tokens_count() -> None:
    for case in cases():
        found = [token for token in tokens(case.sql) if token.literal >= 0]
        assert len(found) == len(cut(case.sql).literals), case.sql


# Hints


def test_a_hint_of_the_session_sends_statements_to_its_key() -> None:
    facts = Facts(hint=Hint("150", "accounts"))
    for sql in (
        b"UPDATE t SET x = 1",
        b"SELECT f(1)",
        b"SELECT count(*) FROM t",
        b"DO $$ BEGIN END $$",
        b"SELECT * FROM t WHERE id = 5",
    ):
        decision = decide(PLANS.of(sql), None, VIEW, facts)
        assert (decision.action, decision.shards) == (Action.KEYED, ("b",)), sql
    assert decide(PLANS.of(b"INSERT INTO r VALUES (1)"), None, VIEW, facts).action is Action.REFERENCE_WRITE
    assert decide(PLANS.of(b"SELECT * FROM h"), None, VIEW, facts).refusal is not None
    assert decide(PLANS.of(b"SELECT f(1)"), None, VIEW, Facts(hint=Hint("x", "accounts"))).refusal is not None
    assert decide(PLANS.of(b"SELECT f(1)"), None, VIEW, Facts(hint=Hint("1", None))).refusal is not None  # of which?


def test_execute_is_decided_by_the_statement_that_was_prepared() -> None:
    plans = Plans(VIEW.tables)
    prepared = plans.of(b"PREPARE s (bigint, text) AS UPDATE t SET x = $2 WHERE id = $1")
    prepare = prepared.plan.parts[0]
    inner = prepared.within(prepare)
    for text, shards in (
        (b"EXECUTE s (150, 'a')", ("b",)),
        (b"EXECUTE s (-5, NULL)", ("a",)),
        (b"EXECUTE s ('150')", ("b",)),
    ):
        executed = plans.of(text)
        arguments = execute_arguments(executed, executed.plan.parts[0], prepare.types)
        assert decide(inner, arguments, VIEW).shards == shards
    for text in (b"EXECUTE s (1 + 1)", b"EXECUTE s (f(1))", b"EXECUTE s (1.5)", b"EXECUTE s ($1)"):
        executed = plans.of(text)
        assert execute_arguments(executed, executed.plan.parts[0]) is None
    assert decide(inner, None, VIEW).refusal is not None


def test_a_parts_own_text_is_found_in_each_text_of_a_plan() -> None:
    plans = Plans(VIEW.tables)
    for literal in (b"';'", b"'a longer one'"):
        update = b"UPDATE t SET x = " + literal + b" WHERE id = 150"
        planned = plans.of(b"BEGIN; " + update + b" ; COMMIT")
        assert [planned.statement(part) for part in planned.plan.parts] == [b"BEGIN", update, b"COMMIT"]
    assert plans.misses == 1
    prepare = plans.of(b"PREPARE s AS SELECT 'x' FROM t WHERE id = $1")
    inner = prepare.within(prepare.plan.parts[0])
    assert inner.statement(inner.plan.parts[0]) == b"SELECT 'x' FROM t WHERE id = $1"


# Restriction


def test_a_restricted_statement_reads_the_ranges_only() -> None:
    text = b"SELECT a.id, u.x FROM t AS a JOIN ONLY public.u ON a.id = u.t_id /* t */ WHERE a.x = 't'"
    found = restricted(PLANS.of(text), {"accounts": (KeyRange(100, 200), KeyRange(300, None))}).decode()
    predicate = (
        "(\"{0}\" OPERATOR(pg_catalog.>=) '100'::pg_catalog.int8"
        " AND \"{0}\" OPERATOR(pg_catalog.<) '200'::pg_catalog.int8)"
        " OR (\"{0}\" OPERATOR(pg_catalog.>=) '300'::pg_catalog.int8)"
    )
    assert found == (
        f"SELECT a.id, u.x FROM (SELECT * FROM t WHERE {predicate.format('id')}) AS a JOIN "
        f"(SELECT * FROM ONLY public.u WHERE {predicate.format('t_id')}) AS u ON a.id = u.t_id /* t */ WHERE a.x = 't'"
    )
    again = Plans(VIEW.tables).of(found.encode())
    assert decide(again, None, VIEW).action is Action.SCATTER


def test_places_are_those_of_the_text_at_hand() -> None:
    plans = Plans(VIEW.tables)
    for literal in ("'x'", "'a longer one'"):
        planned = plans.of(f"SELECT {literal}, * FROM t".encode())
        found = restricted(planned, {"accounts": (KeyRange(None, None),)})
        assert found == f"SELECT {literal}, * FROM (SELECT * FROM t WHERE true) AS t".encode()


def test_copy_of_a_table_is_restricted_as_a_query() -> None:
    own = {"accounts": (KeyRange(None, 100),)}
    predicate = "(\"id\" OPERATOR(pg_catalog.<) '100'::pg_catalog.int8)"
    for text, expected in (
        (b"COPY t TO STDOUT", f"COPY (SELECT * FROM t WHERE {predicate}) TO STDOUT"),
        (
            b"COPY public.t (id, x) TO STDOUT CSV",
            f'COPY (SELECT "id", "x" FROM public.t WHERE {predicate}) TO STDOUT CSV',
        ),
    ):
        assert restricted(PLANS.of(text), own).decode() == expected


def test_what_cannot_be_restricted_is_refused() -> None:
    with pytest.raises(Unreadable):
        restricted(PLANS.of(b"SELECT public.t.x FROM public.t"), {})


# COPY

ROWS: dict[str, tuple[str, list[tuple[bytes, int | None]]]] = {
    "text": (
        "COPY t (x, id) FROM STDIN",
        [
            (b"a\\tb\t5\n", 5),
            (b"back\\\\\t150\n", 150),
            (b"new\\\nline\t7\r\n", 7),
            (b"\\N\t\\N\n", None),
            (b"x\t\\x35\n", 5),
        ],
    ),
    "csv": (
        "COPY t (x, id) FROM STDIN WITH (FORMAT csv, HEADER)",
        [
            (b'"a\nb",5\n', 5),
            (b'"say ""no"", so",150\n', 150),
            (b",\r\n", None),
            (b'plain,"7"\n', 7),
            (b'x,1"2"3\n', 123),
        ],
    ),
    "old": (
        "COPY t (id, x) FROM STDIN DELIMITER '|' NULL 'none'",
        [(b"5|a\n", 5), (b"none|b\n", None), (b"150|\n", 150)],
    ),
    "escape": (
        "COPY t (x, id) FROM STDIN (FORMAT csv, ESCAPE '\\', QUOTE '''')",
        [(b"'it\\'s\n',6\n", 6), (b"'\\\\',150\n", 150)],
    ),
}


def copied(sql: str) -> CopySpec:
    part = decide(PLANS.of(sql.encode()), None, VIEW).part
    assert part is not None
    assert part.copy is not None
    return part.copy


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_copy_rows_are_cut_whatever_the_boundaries(name: str, size: int) -> None:
    sql, rows = ROWS[name]
    spec = copied(sql)
    keys = CopyKeys(spec)
    header = b"x,id\n" if spec.has_header else b""
    data = header + b"".join(row for row, _ in rows) + (b"\\.\n" if name != "escape" else b"")
    found = [row for n in range(0, len(data), size) for row in keys.feed(data[n : n + size])] + list(keys.finish())
    assert found == rows


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_binary_copy_rows(size: int) -> None:
    head = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 4) + b"more"
    ids = [UUID(int=5), UUID(int=2**127 + 3)]
    rows = [struct.pack("!hi", 2, 3) + b"abc" + struct.pack("!i", 16) + id_.bytes for id_ in ids]
    rows.append(struct.pack("!hii", 2, -1, -1))
    data = head + b"".join(rows) + b"\xff\xff"
    keys = CopyKeys(copied("COPY g (x, id) FROM STDIN (FORMAT binary)"))
    found = [row for n in range(0, len(data), size) for row in keys.feed(data[n : n + size])] + list(keys.finish())
    assert found == list(zip(rows, [*ids, None], strict=True))
    assert list(keys.feed(b"whatever")) == list(keys.finish()) == []


def test_what_stands_behind_the_end_of_copy_data() -> None:
    """In text format servers drop it. In CSV newer ones read on: its rows could be another shard's."""
    keys = CopyKeys(copied("COPY t (id, x) FROM STDIN"))
    assert list(keys.feed(b"5\ta\n\\.\n150\tb\n")) + list(keys.finish()) == [(b"5\ta\n", 5)]
    with pytest.raises(Unreadable, match="behind"):
        list(CopyKeys(copied("COPY t (id, x) FROM STDIN (FORMAT csv)")).feed(b"5,a\n\\.\n150,b\n"))


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    ("options", "data"),
    [
        ("", b"5\ta\r150\tb\r"),
        ("(HEADER)", b"id\tx\r5\ta\r\n150\tb\n"),
        ("(FORMAT csv)", b"5,a\r150,b\r"),
        ("(FORMAT csv, HEADER)", b"id,x\r5,a\r150,b\r"),
        ("(FORMAT csv)", b'5,"a\r"\r150,b\n'),
    ],
)
def test_a_carriage_return_alone_may_end_a_row_of_copy_and_is_refused(options: str, data: bytes, size: int) -> None:
    keys = CopyKeys(copied(f"COPY t (id, x) FROM STDIN {options}"))
    with pytest.raises(Unreadable, match="carriage return"):
        _ = [row for n in range(0, len(data), size) for row in keys.feed(data[n : n + size])] + list(keys.finish())


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_carriage_return_in_quotes_or_before_a_newline_is_fine(size: int) -> None:
    data = b'id,x\r\n5,"a\rb"\r\n"150",\r\n7,"\r\n"\r\n8,a\r'
    keys = CopyKeys(copied("COPY t (id, x) FROM STDIN (FORMAT csv, HEADER)"))
    rows = [row for n in range(0, len(data), size) for row in keys.feed(data[n : n + size])] + list(keys.finish())
    assert [key for _, key in rows] == [5, 150, 7, 8]


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        ("USING DELIMITERS ';'", b"a;150\n", [150]),
        ("(\"delimiter\" ';')", b"a;150\n", [150]),
        ("(FORMAT csv, FORCE_NULL *, DELIMITER ';')", b"a;150\n", [150]),
        ("CSV FORCE NOT NULL x, id DELIMITER ';'", b"a;150\n", [150]),
        ("(FORMAT csv, NULL '5', FORCE_NULL *)", b'a,"5"\n', [None]),
        ("(FORMAT csv, NULL '5', FORCE_NULL (x, id))", b'a,"5"\n', [None]),
        ("(FORMAT csv, NULL '5', FORCE_NULL (x))", b'a,"5"\na,5\n', [5, None]),
        ("(FORMAT csv, NULL '5', FORCE_NOT_NULL (x))", b'a,5\na,"5"\n', [None, 5]),
        ("(FORMAT csv, NULL '5', FORCE_NOT_NULL (\"id\"))", b"a,5\n", [5]),
        ("CSV NULL '5' FORCE NOT NULL x", b"a,5\n", [None]),
        ("CSV NULL '5' FORCE NULL \"ID\", x", b'a,"5"\n', [5]),
    ],
)
def test_options_of_copy_count_for_the_column_that_they_name(
    options: str, data: bytes, expected: list[int | None]
) -> None:
    assert [key for _, key in CopyKeys(copied(f"COPY t (x, id) FROM STDIN {options}")).feed(data)] == expected


def test_a_key_of_copy_is_read_by_what_is_known_of_the_session() -> None:
    at = copied("COPY z (at) FROM STDIN")
    assert len(list(CopyKeys(at, Facts(time_zone="UTC")).feed(b"2026-01-01 03:00:00\n"))) == 1
    with pytest.raises(Unreadable, match="TimeZone"):
        list(CopyKeys(at, Facts()).feed(b"2026-01-01 03:00:00\n"))
    head = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
    for options, data in (("", b"m\xc3\xbc\n"), ("(FORMAT binary)", head + struct.pack("!hi", 1, 3) + b"m\xc3\xbc")):
        name = copied(f"COPY n (name) FROM STDIN {options}")
        assert [key for _, key in CopyKeys(name).feed(data)] == ["mü"]
        with pytest.raises(Unreadable, match="UTF-8"):
            list(CopyKeys(name, Facts(is_utf8=False)).feed(data))


@pytest.mark.parametrize("format_", ["text", "csv"])
def test_a_row_of_copy_without_an_end_does_not_grow(format_: str) -> None:
    keys = CopyKeys(copied(f"COPY t (id, x) FROM STDIN (FORMAT {format_})"), row_bytes_max=1_000)
    assert [row for _ in range(11) for row in keys.feed(b"x" * 100)] == []
    with pytest.raises(Unreadable, match="too long"):
        list(keys.feed(b"x"))


def test_rubbish_in_copy_is_refused_at_worst(rng: random.Random) -> None:
    for name in ROWS:
        spec = copied(ROWS[name][0])
        for _ in range(200):
            keys = CopyKeys(spec)
            try:
                for _ in range(5):
                    list(keys.feed(bytes(rng.choice(b"\\\n\r\t\"',|15NxE\xff") for _ in range(rng.randrange(12)))))
                list(keys.finish())
            except Unreadable:
                continue


def test_every_action_is_in_the_table() -> None:
    named = {re.split(r"\W", case.expected)[0] for case in cases()}
    assert {action.name for action in Action} - named == set()
