"""The hash of a key: Python and servers of two versions agree, for keys of every type and every shape."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any, Final, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from shardmove.domain.hashing import HASHES, SQL
from tests.conftest import SEED_VARIABLE
from tests.support.servers import Databases

KEYS: Final = int(os.environ.get("SHARDMOVE_HASH_KEYS", "1_000_000"))
"""How many keys of each type."""

EXACT_LENGTHS: Final = (*range(41), 47, 48, 49, 255, 256, 1_000, 100_000)
"""Of texts, in bytes. Every 12 bytes are a block, and a text's header has one byte or four."""

ESCAPES: Final = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})

OPCLASS_HASH: Final = sql.SQL("pg_catalog.hash_record_extended(ROW({}), 0)")
"""Of a record of one column PostgreSQL takes the hash of the column's type by its operator class, and adds nothing."""

SHADOWS: Final = """
    CREATE SCHEMA evil;
    CREATE FUNCTION evil.hashint2extended(int2, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.hashint4extended(int4, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.hashint8extended(int8, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.hashtextextended(text, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.uuid_hash_extended(uuid, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.timestamp_hash_extended(timestamp, int8) RETURNS int8 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE FUNCTION evil.timezone(interval, timestamptz) RETURNS timestamp LANGUAGE sql RETURN timestamp 'infinity';
    CREATE FUNCTION evil.is(date, date) RETURNS bool IMMUTABLE LANGUAGE sql RETURN true;
    CREATE FUNCTION evil.minus(date, date) RETURNS int4 IMMUTABLE LANGUAGE sql RETURN 0;
    CREATE OPERATOR evil.= (FUNCTION = evil.is, LEFTARG = date, RIGHTARG = date);
    CREATE OPERATOR evil.- (FUNCTION = evil.minus, LEFTARG = date, RIGHTARG = date);
"""


@dataclass(frozen=True)
class Sample:
    """Keys of one type, each with the hash that Python gives it, as lines for COPY."""

    type: str
    lines: Sequence[str]


@pytest.fixture(scope="module", params=HASHES)
def sample(request: pytest.FixtureRequest) -> Sample:
    """Made once for all the servers."""
    type_: str = request.param
    rng = random.Random(f"{os.environ[SEED_VARIABLE]} {type_}")
    print(f"seed: {os.environ[SEED_VARIABLE]}")
    hash_, text = HASHES[type_], TEXTS.get(type_, str)
    keys = (key for _, key in zip(range(KEYS), KEYS_OF[type_](rng), strict=False))
    return Sample(type_, [f"{text(key)}\t{hash_(key)}\n" for key in keys])


def test_the_hash_is_that_of_the_server(sample: Sample, databases: Databases) -> None:
    _assert_equal(sample, databases("s1")["s1"])


def test_the_hash_is_that_of_an_older_server(sample: Sample, old_databases: Databases) -> None:
    _assert_equal(sample, old_databases("old1")["old1"])


def test_the_hash_never_changes() -> None:
    """Routes and data lie by these numbers."""
    known = {
        ("smallint", -1): -1888257769727981238,
        ("integer", 0): 4154612158245552303,
        ("bigint", 2**40): -4519207317629470217,
        ("text", "hello world, how are you"): -2496122026219955459,
    }
    assert {(type_, key): HASHES[type_](key) for type_, key in known} == known


def test_a_number_has_one_hash_whatever_its_type() -> None:
    for number in (0, 1, -1, 32767, -32768):
        assert HASHES["smallint"](number) == HASHES["integer"](number) == HASHES["bigint"](number)


def test_a_moment_without_a_time_zone_has_no_hash() -> None:
    with pytest.raises(TypeError):
        HASHES["timestamptz"](datetime(2026, 1, 1))


@pytest.mark.parametrize("type_", HASHES)
def test_a_key_that_is_null_has_no_hash(type_: str, databases: Databases) -> None:
    with psycopg.connect(databases("s1")["s1"]) as connection:
        null = sql.SQL("NULL::{}").format(_words(type_))
        assert _one(connection, sql.SQL("SELECT {}").format(_template(type_).format(null))) is None


@pytest.mark.parametrize(
    ("type_", "key", "number"),
    [
        ("date", "infinity", 2**31 - 1),
        ("date", "-infinity", -(2**31)),
        ("date", "4713-01-01 BC", -2_451_507),
        ("date", "5874897-12-31", 2_145_031_948),
        ("timestamptz", "infinity", 2**63 - 1),
        ("timestamptz", "-infinity", -(2**63)),
        ("timestamptz", "4714-11-24 00:00:00+00 BC", -2_451_545 * 86_400_000_000),
        ("timestamptz", "294276-12-31 23:59:59.999999+00", 9_223_371_331_200_000_000 - 1),
    ],
)
def test_moments_that_python_does_not_know_hash_as_their_numbers(
    any_server: str, type_: str, key: str, number: int
) -> None:
    with psycopg.connect(any_server) as connection:
        moment = sql.SQL("{}::{}").format(key, _words(type_))
        for expression in (_template(type_), OPCLASS_HASH):
            assert _one(connection, sql.SQL("SELECT {}").format(expression.format(moment))) == HASHES["bigint"](number)


def test_the_servers_functions_are_those_of_the_operator_classes(databases: Databases) -> None:
    """By name, which takes a function for the very type: before PostgreSQL 18, dates and moments had none."""
    with psycopg.connect(databases("s1")["s1"]) as connection:
        if connection.info.server_version < 180_000:
            pytest.skip("needs PostgreSQL 18")
        connection.execute("SET search_path = ''")
        for type_ in HASHES:
            function = _one(
                connection,
                sql.SQL(
                    "SELECT p.amproc::text FROM pg_catalog.pg_opclass c"
                    " JOIN pg_catalog.pg_am a ON a.oid = c.opcmethod AND a.amname = 'hash'"
                    " JOIN pg_catalog.pg_amproc p ON p.amprocfamily = c.opcfamily AND p.amproclefttype = c.opcintype"
                    " WHERE c.opcintype = {}::regtype AND c.opcdefault AND p.amprocnum = 2"
                ).format(type_),
            )
            key = sql.SQL("{}::{}").format(PLAIN[type_], _words(type_))
            equal = sql.SQL("SELECT {} = {}({}, 0)").format(
                _template(type_).format(key), sql.Identifier("pg_catalog", str(function)), _collated(type_, key)
            )
            assert _one(connection, equal) is True


@pytest.mark.parametrize("search_path", ["", "evil, pg_catalog, public"])
@pytest.mark.parametrize("type_", HASHES)
def test_the_expression_serves_indexes_and_triggers_whatever_the_search_path(
    any_server: str, type_: str, search_path: str
) -> None:
    """An index takes immutable expressions only; a trigger's condition is evaluated in the writer's session."""
    expression = _template(type_)
    with psycopg.connect(any_server) as connection:
        connection.execute(SHADOWS)
        connection.execute(sql.SQL("CREATE TABLE t (key {} NOT NULL)").format(_words(type_)))
        connection.execute("CREATE TABLE seen (hash int8)")
        connection.execute(
            "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO public.seen VALUES (TG_ARGV[0]::int8); RETURN NEW; END $$"
        )
        connection.execute("SELECT set_config('search_path', %s, false)", (search_path,))
        key = sql.Identifier("key")
        connection.execute(sql.SQL("CREATE INDEX ON public.t (({}))").format(expression.format(key)))
        expected = HASHES[type_](PLAIN[type_])
        connection.execute(
            sql.SQL(
                "CREATE TRIGGER see AFTER INSERT ON public.t FOR EACH ROW WHEN ({} OPERATOR(pg_catalog.=) {})"
                " EXECUTE FUNCTION public.see({})"
            ).format(expression.format(sql.SQL("NEW.key")), expected, str(expected))
        )
        connection.execute("SELECT set_config('timezone', 'Asia/Kathmandu', false)")
        connection.execute(sql.SQL("INSERT INTO public.t VALUES ({})").format(str(PLAIN[type_])))
        assert connection.execute("SELECT hash FROM public.seen").fetchall() == [(expected,)]
        shown = sql.SQL("SELECT {} FROM public.t")
        assert _one(connection, shown.format(expression.format(key))) == expected
        if "evil" in search_path:  # were it not qualified, the search_path would count
            bare = sql.SQL(re.sub(r"OPERATOR\(pg_catalog\.(.)\)|pg_catalog\.", r"\1", SQL[type_]))
            assert _one(connection, shown.format(bare.format(key))) == 0


@pytest.fixture(params=["databases:s1", "old_databases:old1"], ids=["new", "old"])
def any_server(request: pytest.FixtureRequest) -> str:
    factory, _, name = request.param.partition(":")
    databases: Databases = request.getfixturevalue(factory)
    return databases(name)[name]


def _assert_equal(sample: Sample, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(sql.SQL("CREATE TEMP TABLE keys (key {}, hash int8)").format(_words(sample.type)))
        with connection.cursor().copy("COPY keys FROM STDIN") as copy:
            for start in range(0, len(sample.lines), 10_000):
                copy.write("".join(sample.lines[start : start + 10_000]))
        key = sql.Identifier("key")
        server, opclass = _template(sample.type).format(key), OPCLASS_HASH.format(_collated(sample.type, key))
        different = sql.SQL(
            "SELECT key::text, hash, {0}, {1} FROM keys WHERE hash IS DISTINCT FROM {0} OR hash IS DISTINCT FROM {1}"
        ).format(server, opclass)
        assert connection.execute(sql.SQL("{} LIMIT 5").format(different)).fetchall() == []
        assert _one(connection, sql.SQL("SELECT count(*) FROM keys WHERE hash = {}").format(server)) == KEYS


def _template(type_: str) -> sql.SQL:
    return sql.SQL(SQL[type_])


def _collated(type_: str, key: sql.Composable) -> sql.Composable:
    """The hash of a text by its operator class needs a collation; all that are deterministic give the same."""
    return sql.SQL('{} COLLATE pg_catalog."default"').format(key) if type_ == "text" else key


def _words(type_: str) -> sql.SQL:
    words: dict[str, LiteralString] = {
        "smallint": "pg_catalog.int2",
        "integer": "pg_catalog.int4",
        "bigint": "pg_catalog.int8",
        "text": "pg_catalog.text",
        "uuid": "pg_catalog.uuid",
        "date": "pg_catalog.date",
        "timestamptz": "pg_catalog.timestamptz",
    }
    return sql.SQL(words[type_])


def _one(connection: psycopg.Connection, query: sql.Composed) -> object:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


# Keys: first those at the borders, then random ones without end.


def _integers(bits: int) -> Callable[[random.Random], Iterator[int]]:
    def keys(rng: random.Random) -> Iterator[int]:
        for power in (1 << bit for bit in range(bits + 1)):
            yield from (power - 1, power, -power, -power - 1, power + 1 if power > 1 else 0)
        while True:
            yield rng.randrange(-(1 << bits), 1 << bits) >> rng.randrange(bits)  # few digits as often as many

    return lambda rng: (key for key in keys(rng) if -(1 << bits) <= key < 1 << bits)


def _texts(rng: random.Random) -> Iterator[str]:
    for length in EXACT_LENGTHS:
        yield from (_text_of(rng, length, wide) for wide in (0.0, 0.1, 0.5, 1.0))
        yield "\x01" * length
        yield "\x7f" * length
        yield "\U0010ffff" * (length // 4) + " " * (length % 4)
    pool = _text_of(rng, 1_000_000, 0.3)
    while True:
        start = rng.randrange(len(pool))
        yield pool[start : start + rng.randrange(21)]


def _text_of(rng: random.Random, length: int, wide: float) -> str:
    """A text of exactly so many bytes; about that share of its characters is not ASCII."""
    characters: list[str] = []
    while length:
        width = min(length, rng.randint(2, 4)) if rng.random() < wide else 1
        lowest, highest = {1: (0x01, 0x7F), 2: (0x80, 0x7FF), 3: (0x800, 0xD7FF), 4: (0x10000, 0x10FFFF)}[width]
        characters.append(chr(rng.randint(lowest, highest)))
        length -= width
    return "".join(characters)


def _uuids(rng: random.Random) -> Iterator[UUID]:
    yield from (UUID(int=number) for number in (0, 1, 2**128 - 1, 2**127, 2**64 - 1, 2**32))
    while True:
        yield UUID(int=rng.getrandbits(128))


def _dates(rng: random.Random) -> Iterator[date]:
    yield from (date.min, date.max, date(1999, 12, 31), date(2000, 1, 1), date(2000, 1, 2), date(1970, 1, 1))
    last = date.max.toordinal()
    while True:
        yield date.fromordinal(rng.randint(1, last))


def _moments(rng: random.Random) -> Iterator[datetime]:
    epoch, tick = datetime(2000, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
    yield from (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), epoch - tick, epoch, epoch + tick)
    zones = [UTC, *(timezone(timedelta(minutes=minutes)) for minutes in (-720, -210, -1, 1, 345, 840))]
    last_day = date.max.toordinal()
    while True:
        midnight = datetime.fromordinal(rng.randint(2, last_day - 1)).replace(tzinfo=rng.choice(zones))
        yield midnight + rng.randrange(86_400_000_000) * tick


KEYS_OF: Final[dict[str, Callable[[random.Random], Iterator[Any]]]] = {
    "smallint": _integers(15),
    "integer": _integers(31),
    "bigint": _integers(63),
    "text": _texts,
    "uuid": _uuids,
    "date": _dates,
    "timestamptz": _moments,
}
TEXTS: Final[dict[str, Callable[[Any], str]]] = {"text": lambda key: key.translate(ESCAPES)}
PLAIN: Final[dict[str, Any]] = {
    "smallint": -7,
    "integer": 7_000_000,
    "bigint": -(2**40),
    "text": "Zoë\\'s",
    "uuid": UUID("0f36a7c1-5d0e-4a4c-8a2e-3f6f2a1be0d4"),
    "date": date(2026, 11, 21),
    "timestamptz": datetime(2026, 11, 21, 8, 0, 0, 1, tzinfo=UTC),
}
"""One key of each type that is nothing special."""
