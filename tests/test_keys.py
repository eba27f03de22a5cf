"""Keys of every type: read, written, ordered as PostgreSQL orders them; ranges round-trip through their text."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmove.catalog.session import connect
from shardmove.catalog.upgrade import upgrade
from shardmove.domain.errors import ConfigurationError
from shardmove.domain.keys import Key, KeyRange, KeyType, key_text, merged, subtract
from shardmove.domain.moves import Keyspace, Scheme, TableName
from tests.support.servers import Databases

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
KEYS: dict[KeyType, st.SearchStrategy[Any]] = {
    KeyType.SMALLINT: st.integers(-(2**15), 2**15 - 1),
    KeyType.INTEGER: st.integers(-(2**31), 2**31 - 1),
    KeyType.BIGINT: st.integers(-(2**63), 2**63 - 1),
    KeyType.TEXT: TEXTS | st.sampled_from(["", '"', ":", "a:b", " x", "x ", "ä", "Z", "a", "\\", "'", "\U0001f600"]),
    KeyType.UUID: st.uuids() | st.sampled_from([UUID(int=0), UUID(int=2**128 - 1)]),
    KeyType.DATE: st.dates(),
    KeyType.TIMESTAMPTZ: st.datetimes(timezones=st.just(UTC)),
}
TYPES = pytest.mark.parametrize("type_", KeyType)
AT_MOST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def server(servers: Any) -> Iterator[psycopg.Connection[Any]]:
    databases = Databases(servers)
    with connect(databases("cat")["cat"], application_name="test") as connection:
        upgrade(connection)
        yield connection
    databases.drop()


@TYPES
@AT_MOST
@given(data=st.data())
def test_a_key_is_read_back_from_its_text(type_: KeyType, data: st.DataObject) -> None:
    key = data.draw(KEYS[type_])
    assert type_.parse(key_text(key)) == key


@TYPES
@AT_MOST
@given(data=st.data())
def test_a_range_is_read_back_from_its_text(type_: KeyType, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(KEYS[type_], min_size=1, max_size=2)))
    lower, upper = (
        (ends[0], ends[-1]) if len(ends) == 2 else data.draw(st.sampled_from([(ends[0], None), (None, ends[0])]))
    )
    if upper == type_.least:
        return  # nothing is below it
    range_ = KeyRange(None if lower == type_.least else lower, upper)
    assert type_.parse_range(str(range_)) == range_
    assert type_.range_of(*range_.ends) == range_


@TYPES
@AT_MOST
@given(data=st.data())
def test_keys_sort_as_postgresql_sorts_them(
    type_: KeyType, data: st.DataObject, server: psycopg.Connection[Any]
) -> None:
    """In Python, in PostgreSQL by the key's own type (texts in collation "C"), and by the catalog's sort_key."""
    keys: list[Key] = data.draw(st.lists(KEYS[type_], min_size=2, max_size=20, unique=True))
    texts = [key_text(key) for key in sorted(keys)]
    collate = ' COLLATE "C"' if type_ is KeyType.TEXT else ""
    rows = server.execute(
        f"SELECT k FROM unnest(%s::text[]) AS k ORDER BY k::{type_}{collate}".encode(), (texts[::-1],)
    ).fetchall()
    assert [row[0] for row in rows] == texts
    rows = server.execute(
        "SELECT k FROM unnest(%s::text[]) AS k ORDER BY shardmove_catalog.sort_key(%s, k)", (texts[::-1], str(type_))
    ).fetchall()
    assert [row[0] for row in rows] == texts


@TYPES
@AT_MOST
@given(data=st.data())
def test_nothing_lies_between_a_key_and_its_successor(type_: KeyType, data: st.DataObject) -> None:
    key, other = data.draw(KEYS[type_]), data.draw(KEYS[type_])
    try:
        alone = KeyRange(key, type_.successor(key))
    except ConfigurationError:
        assert type_ in (KeyType.DATE, KeyType.TIMESTAMPTZ)
        return
    assert key in alone
    assert (other in alone) == (other == key)


@TYPES
@AT_MOST
@given(data=st.data())
def test_what_is_taken_away_and_what_is_left_are_the_whole(type_: KeyType, data: st.DataObject) -> None:
    def drawn() -> KeyRange:
        lower, upper = sorted(data.draw(st.sets(KEYS[type_], min_size=2, max_size=2)))
        return KeyRange(data.draw(st.sampled_from([lower, None])), data.draw(st.sampled_from([upper, None])))

    whole, hole, key = drawn(), drawn(), data.draw(KEYS[type_])
    left = subtract([whole], [hole])
    assert any(key in range_ for range_ in left) == (key in whole and key not in hole)
    common = whole.intersection(hole)
    assert merged([*left, *([common] if common else [])]) == (whole,)


def test_texts_that_are_no_keys_are_named() -> None:
    for type_, text in (
        (KeyType.SMALLINT, "32768"),
        (KeyType.BIGINT, "x"),
        (KeyType.TEXT, "a\0b"),
        (KeyType.TEXT, "\ud800"),
        (KeyType.UUID, "123"),
        (KeyType.DATE, "2026-02-30"),
        (KeyType.TIMESTAMPTZ, "2026-01-01 00:00:00"),
    ):
        with pytest.raises(ConfigurationError, match="key"):
            type_.parse(text)


def test_ranges_that_are_none_are_named() -> None:
    for type_, text in (
        (KeyType.BIGINT, "5"),
        (KeyType.BIGINT, "5:4"),
        (KeyType.BIGINT, f":{-(2**63)}"),
        (KeyType.TEXT, ':""'),
        (KeyType.TEXT, "a:b:c"),
        (KeyType.TIMESTAMPTZ, "2026-01-01 00:00:00+00:"),
    ):
        with pytest.raises(ConfigurationError, match="range"):
            type_.parse_range(text)


def test_the_smallest_key_is_an_open_end() -> None:
    assert KeyType.BIGINT.parse_range(f"{-(2**63)}:5") == KeyRange(None, 5)
    assert KeyType.TEXT.parse_range('"":b') == KeyRange(None, "b")
    assert KeyType.DATE.parse_range("0001-01-01:") == KeyRange(date(1, 1, 1), None)


def test_a_key_lies_where_its_scheme_says() -> None:
    plain = Keyspace("k", KeyType.TEXT, Scheme.RANGE, {})
    hashed = Keyspace("k", KeyType.TEXT, Scheme.HASH, {})
    assert (plain.place("a"), plain.bound_type) == ("a", KeyType.TEXT)
    assert hashed.bound_type is KeyType.BIGINT
    assert isinstance(hashed.place("a"), int)
    assert hashed.place("a") != hashed.place("b")


def test_moments_are_compared_across_time_zones() -> None:
    assert KeyType.TIMESTAMPTZ.parse("2026-01-01 01:00:00+01:00") == datetime(2026, 1, 1, tzinfo=UTC)


@given(st.tuples(*[st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)] * 2))
@settings(deadline=None)
def test_a_table_name_is_read_back_from_its_text(parts: tuple[str, str]) -> None:
    name = TableName(*parts)
    assert TableName.parse(str(name)) == name


def test_table_names_as_people_write_them() -> None:
    assert TableName.parse("orders") == TableName("public", "orders")
    assert TableName.parse("sales.Items") == TableName("sales", "Items")
    assert TableName.parse('"Sales.2026"."odd ""name"""') == TableName("Sales.2026", 'odd "name"')
    for text in ("", "a.b.c", '"a', "a.", ".b", 'a"b'):
        with pytest.raises(ConfigurationError, match="name"):
            TableName.parse(text)
