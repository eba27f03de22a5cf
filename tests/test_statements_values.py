"""Keys read from literals and parameters, compared with what PostgreSQL makes of the same text.

A key may be refused; it is never another one than the server's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.statements.actions import Arguments, Facts, Literal, Origin, Term
from router.statements.values import Unreadable, keys_of
from shardmove.domain.keys import Key, KeyType, key_text
from tests.support.servers import Databases

LITERAL = Term(Origin.LITERAL)
PARAMETER = Term(Origin.PARAMETER)
UTC_FACTS = Facts(time_zone="UTC")
AT_MOST = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

BLANKS = st.text(" \t\n", max_size=2)
DIGITS = (
    st.integers(-(2**70), 2**70).map(str)
    | st.integers(-300, 300).map(str)
    | st.sampled_from(
        [
            "+5",
            "-0",
            "007",
            "0x1F",
            "0b11",
            "0o17",
            "1_000",
            "1__0",
            "1e3",
            "5.0",
            "5.",
            ".5",
            "",
            "٣",
            "5 5",
            "- 5",
            "1e400",
            "NaN",
        ]
    )
)
UUIDS = (
    st.uuids().map(str)
    | st.uuids().map(lambda u: u.hex)
    | st.uuids().map(lambda u: "{" + str(u).upper() + "}")
    | st.uuids().map(lambda u: "-".join(u.hex[n : n + 4] for n in range(0, 32, 4)))
    | st.sampled_from(
        [
            "",
            "{",
            "a0ee-bc999c0b4ef8bb6d6bb9bd380a11",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a1",
            " a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
        ]
    )
)
DATES = st.dates().map(str) | st.sampled_from(
    [
        "2026-1-2",
        "01/02/2026",
        "20260102",
        "today",
        "infinity",
        "2026-02-30",
        "99-01-02",
        "2026-01-02 BC",
        "Jan 2 2026",
        " 2026-01-02 ",
        "2026-01-02 10:00",
        "0001-01-01",
    ]
)
TIMES = (
    st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat(" "))
    | st.datetimes().map(str)
    | st.sampled_from(
        [
            "2026-01-02 10:00+02",
            "2026-01-02T10:00:00Z",
            "2026-01-02 10:00:00.1234567+00",
            "2026-01-02",
            "2026-01-02 24:00+00",
            "2026-01-02 10:00:60+00",
            "2026-01-02 10:00:00+0530",
            "2026-01-02 10:00:00-15:59:59",
            "2026-01-02 10:00 Europe/Berlin",
            "now",
            "infinity",
            "2026-01-02+02",
            "2026-01-02 10:00:00 +02",
            "0001-01-01 00:00:00+15",
        ]
    )
)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=6)
INPUTS: dict[KeyType, Any] = {
    KeyType.SMALLINT: st.tuples(BLANKS, DIGITS, BLANKS).map("".join),
    KeyType.INTEGER: st.tuples(BLANKS, DIGITS, BLANKS).map("".join),
    KeyType.BIGINT: st.tuples(BLANKS, DIGITS, BLANKS).map("".join),
    KeyType.TEXT: TEXTS,
    KeyType.UUID: UUIDS,
    KeyType.DATE: st.tuples(BLANKS, DATES, BLANKS).map("".join),
    KeyType.TIMESTAMPTZ: st.tuples(BLANKS, TIMES, BLANKS).map("".join),
}
TYPES = pytest.mark.parametrize("type_", KeyType)


@pytest.fixture(scope="module")
def server(servers: Any) -> Iterator[psycopg.Connection[Any]]:
    databases = Databases(servers)
    with psycopg.connect(databases("s1")["s1"], autocommit=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        yield connection
    databases.drop()


def read(
    term: Term,
    type_: KeyType,
    *,
    literal: Literal | None = None,
    arguments: Arguments | None = None,
    is_assigned: bool = False,
) -> Any:
    """The key, None for no key, or "refused"."""
    try:
        keys = keys_of(term, type_, (literal,) if literal else (), arguments, UTC_FACTS, is_assigned)
    except Unreadable:
        return "refused"
    return keys[0] if keys else None


def theirs(server: psycopg.Connection[Any], type_: KeyType, text: str) -> str | None:
    """How PostgreSQL writes the key, or None where it is an error."""
    try:
        row = server.execute(f"SELECT %s::text::{type_}::text".encode(), (text,)).fetchone()
    except psycopg.Error:
        return None
    assert row is not None
    return row[0]


def same(server: psycopg.Connection[Any], type_: KeyType, ours: Key, text: str) -> bool:
    row = server.execute(f"SELECT %s::{type_} = %s::{type_}".encode(), (key_text(ours), text)).fetchone()
    return row is not None and row[0] is True


@TYPES
@AT_MOST
@given(data=st.data())
def test_a_string_is_the_key_that_postgresql_reads(
    type_: KeyType, data: st.DataObject, server: psycopg.Connection[Any]
) -> None:
    text = data.draw(INPUTS[type_])
    found = [
        read(LITERAL, type_, literal=Literal("s", text)),
        read(PARAMETER, type_, arguments=Arguments((), [text.encode()], [0])),
    ]
    their = theirs(server, type_, text)
    for ours in found:
        if ours == "refused":
            continue
        if their is None:
            assert ours is None or not type_.name.endswith("INT"), (text, ours)
        else:
            assert ours is not None, text
            assert same(server, type_, ours, text), (text, ours, their)


@pytest.mark.parametrize("type_", [KeyType.SMALLINT, KeyType.INTEGER, KeyType.BIGINT])
@AT_MOST
@given(text=DIGITS, is_assigned=st.booleans(), is_negative=st.booleans())
def test_a_number_is_the_key_that_equals_it(
    type_: KeyType, text: str, is_assigned: bool, is_negative: bool, server: psycopg.Connection[Any]
) -> None:
    if not text or not text[0].isdigit() or not text.isascii() or " " in text:
        return
    term = Term(Origin.LITERAL, is_negative=is_negative)
    ours = read(term, type_, literal=Literal("n", text), is_assigned=is_assigned)
    if ours == "refused":
        return
    sql = f"SELECT {'-' if is_negative else ''}{text}::numeric"
    row = server.execute(sql.encode()).fetchone()
    assert row is not None
    if ours is None:
        bits = {KeyType.SMALLINT: 15, KeyType.INTEGER: 31, KeyType.BIGINT: 63}[type_]
        assert row[0] != row[0].to_integral_value() or not -(2**bits) <= row[0] < 2**bits
    else:
        assert ours == row[0]


BINARY: dict[KeyType, Any] = {
    KeyType.SMALLINT: (21, lambda k: struct.pack("!h", k), st.integers(-(2**15), 2**15 - 1)),
    KeyType.INTEGER: (23, lambda k: struct.pack("!i", k), st.integers(-(2**31), 2**31 - 1)),
    KeyType.BIGINT: (20, lambda k: struct.pack("!q", k), st.integers(-(2**63), 2**63 - 1)),
    KeyType.TEXT: (25, str.encode, TEXTS),
    KeyType.UUID: (2950, lambda k: k.bytes, st.uuids()),
    KeyType.DATE: (1082, lambda k: struct.pack("!i", (k - date(2000, 1, 1)).days), st.dates()),
    KeyType.TIMESTAMPTZ: (
        1184,
        lambda k: struct.pack("!q", (k - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)),
        st.datetimes(timezones=st.just(UTC)),
    ),
}


@TYPES
@AT_MOST
@given(data=st.data())
def test_a_binary_parameter_is_read(type_: KeyType, data: st.DataObject) -> None:
    oid, pack, keys = BINARY[type_]
    key = data.draw(keys)
    for declared in (oid, 0):
        assert read(PARAMETER, type_, arguments=Arguments((1,), [pack(key)], [declared])) == key
    assert read(PARAMETER, type_, arguments=Arguments([1, 0], [pack(key), b"x"], [oid, 25])) == key


@TYPES
@AT_MOST
@given(data=st.data())
def test_arrays_are_read_as_psycopg_sends_them(
    type_: KeyType, data: st.DataObject, server: psycopg.Connection[Any]
) -> None:
    _oid, pack, strategy = BINARY[type_]
    keys = data.draw(st.lists(strategy, max_size=4))
    row = server.execute(f"SELECT %s::text[]::{type_}[]::text".encode(), ([key_text(k) for k in keys],)).fetchone()
    assert row is not None
    term = Term(Origin.PARAMETER, is_array=True)
    assert keys_of(term, type_, (), Arguments((), [row[0].encode()], [0]), UTC_FACTS, False) == keys
    binary = struct.pack("!iiI", 1 if keys else 0, 0, _oid)
    if keys:
        binary += struct.pack("!ii", len(keys), 1) + b"".join(struct.pack("!i", len(pack(k))) + pack(k) for k in keys)
    assert keys_of(term, type_, (), Arguments((1,), [binary], [0]), UTC_FACTS, False) == keys


@TYPES
@given(
    data=st.binary(max_size=40),
    oid=st.sampled_from([0, 20, 21, 23, 25, 1700, 701, 2950, 1082, 1184, 1114, 1016, 99]),
    formats=st.sampled_from([(), (1,), (0,)]),
    is_array=st.booleans(),
    is_shared=st.booleans(),
    is_assigned=st.booleans(),
    casts=st.lists(st.sampled_from(["bigint", "integer", "text", "uuid", "numeric", "date", "x"]), max_size=2),
)
def test_rubbish_is_refused_at_worst(
    type_: KeyType,
    data: bytes,
    oid: int,
    formats: Any,
    is_array: bool,
    is_shared: bool,
    is_assigned: bool,
    casts: list[str],
) -> None:
    term = Term(Origin.PARAMETER, casts=tuple(casts), is_array=is_array, is_shared=is_shared)
    read(term, type_, arguments=Arguments(formats, [data], [oid]), is_assigned=is_assigned)
    text = data.decode("utf-8", "surrogateescape")
    for kind in "nso":
        literal = Term(Origin.LITERAL, casts=tuple(casts), is_array=is_array, is_negative=is_shared)
        read(literal, type_, literal=Literal(kind, text), is_assigned=is_assigned)


def test_what_depends_on_settings_is_refused_without_them() -> None:
    naive = Literal("s", "2026-01-02 10:00")
    assert read(LITERAL, KeyType.TIMESTAMPTZ, literal=naive) == datetime(2026, 1, 2, 10, tzinfo=UTC)
    for facts in (Facts(), Facts(time_zone="Nowhere/At_All"), Facts(time_zone="<+03>-03")):
        with pytest.raises(Unreadable):
            keys_of(LITERAL, KeyType.TIMESTAMPTZ, (naive,), None, facts, False)
    berlin = Facts(time_zone="Europe/Berlin")
    assert keys_of(LITERAL, KeyType.TIMESTAMPTZ, (naive,), None, berlin, False) == (
        datetime(2026, 1, 2, 9, tzinfo=UTC),
    )
    for within in ("2026-10-25 02:30", "2026-03-29 02:30"):  # twice, and never
        with pytest.raises(Unreadable):
            keys_of(LITERAL, KeyType.TIMESTAMPTZ, (Literal("s", within),), None, berlin, False)
    with pytest.raises(Unreadable):
        keys_of(LITERAL, KeyType.TEXT, (Literal("s", "ä"),), None, Facts(is_utf8=False), False)


def test_parameters_of_other_types() -> None:
    bigint, text = KeyType.BIGINT, KeyType.TEXT
    assert read(PARAMETER, bigint, arguments=Arguments((), [b"5.0"], [1700])) == 5
    assert read(PARAMETER, bigint, arguments=Arguments((), [b"5.5"], [1700])) is None
    assert read(PARAMETER, bigint, arguments=Arguments((), [b"5.5"], [1700]), is_assigned=True) == "refused"
    assert read(PARAMETER, bigint, arguments=Arguments((), [b"5"], [701])) == "refused"
    assert read(PARAMETER, bigint, arguments=Arguments((), [b"5"], [25])) == "refused"
    assert read(Term(Origin.PARAMETER, casts=("bigint",)), bigint, arguments=Arguments((), [b"5"], [25])) == 5
    assert read(PARAMETER, bigint, arguments=Arguments((1,), [struct.pack("!i", 5)], [23])) == 5
    assert read(PARAMETER, KeyType.SMALLINT, arguments=Arguments((1,), [struct.pack("!i", 70000)], [23])) is None
    assert read(PARAMETER, text, arguments=Arguments((), [b"a"], [1043])) == "a"
    assert read(PARAMETER, text, arguments=Arguments((), [b"a "], [1042])) == "refused"  # bpchar
    assert read(Term(Origin.PARAMETER, is_shared=True), bigint, arguments=Arguments((1,), [bytes(8)], [0])) == "refused"
    assert read(PARAMETER, bigint, arguments=Arguments((), [None], [0])) is None
    assert read(PARAMETER, KeyType.UUID, arguments=Arguments((), [str(UUID(int=5)).encode()], [0])) == UUID(int=5)


def test_casts_that_change_the_value_are_refused() -> None:
    def number(text: str, *casts: str) -> Any:
        return read(Term(Origin.LITERAL, casts=casts), KeyType.BIGINT, literal=Literal("n", text))

    assert number("5", "integer") == 5
    assert number("5.4", "integer") == "refused"
    assert number("5", "double precision") == "refused"
    assert read(Term(Origin.LITERAL, casts=("varchar()",)), KeyType.TEXT, literal=Literal("s", "abc")) == "refused"
