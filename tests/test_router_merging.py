"""Keys of merged rows sort as PostgreSQL sorts the values: PostgreSQL is asked, in both formats."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any, Final

import psycopg
import pytest

from router.merging import Settings, Unmergeable, row_key, value_of
from router.statements import OrderColumn
from shardmove.wire.messages import Column
from tests.support.servers import Databases

SETTINGS: Final = Settings(is_iso=True, is_server_encoding=True)
VALUES: Final[dict[str, list[str]]] = {
    "int2": ["0", "-1", "7", "32767", "-32768", "12"],
    "int4": ["0", "-1", "2147483647", "-2147483648", "99", "100"],
    "int8": ["0", "9223372036854775807", "-9223372036854775808", "5"],
    "oid": ["0", "4294967295", "2147483648", "17"],
    "float4": ["0", "-0", "NaN", "Infinity", "-Infinity", "1.5", "-2e30", "1e-30"],
    "float8": ["0", "NaN", "Infinity", "-Infinity", "1.1", "1.10000000000000001", "-2e300", "1e-300"],
    "numeric": ["0", "NaN", "Infinity", "-Infinity", "1.10", "1.1", "-0.0001", "12345678901234567890.5", "1e-20", "-3",
                "10000", "9999", "100000000", "0.00010001"],
    "bool": ["t", "f"],
    "date": ["infinity", "-infinity", "2024-02-29", "2000-01-01", "0044-03-15 BC", "0001-01-01", "5874897-12-31",
             "2024-03-01", "4713-01-01 BC", "1999-12-31"],
    "timestamp": ["infinity", "-infinity", "2024-02-29 12:00:00", "2024-02-29 12:00:00.000001", "294276-12-31 23:59:59",
                  "0044-03-15 01:02:03.5 BC", "1999-12-31 23:59:59.999999", "2000-01-01"],
    "timestamptz": ["infinity", "-infinity", "2024-03-31 02:30:00+01", "2024-03-31 00:59:59.9+00",
                    "2024-10-27 01:30:00Z",
                    "2024-10-27 00:30:00Z", "0001-01-01 00:00:00 BC", "1850-01-01 00:00:00+00",
                    "294276-12-31 00:00:00Z"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
             "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "09000000-0000-0000-0000-000000000000"],
    "bytea": ["", "a", "\\x00", "\\x0000", "\\xff", "\\x5c", "b", "ab", "\\x7f80"],
    'text COLLATE "C"': ["", "a", "B", "ä", "ab", "a b", "Z", "😀", "~", "A"],
    'varchar COLLATE "C"': ["", "a", "B", "ä", "ab"],
    'char(5) COLLATE "C"': ["", "a", "B", "ab", "a b", "a\t"],
    "name": ["", "a", "B", "ab"],
}  # fmt: skip
SESSIONS: Final = (
    (),
    ("SET TimeZone TO 'Europe/Vienna'", "SET bytea_output TO escape", "SET DateStyle TO ISO, DMY"),
    ("SET TimeZone TO 'America/St_Johns'",),
)


@pytest.mark.parametrize("binary", [False, True], ids=["text", "binary"])
@pytest.mark.parametrize("type_", VALUES)
def test_keys_sort_as_the_server_does(databases: Databases, type_: str, binary: bool, rng: random.Random) -> None:
    values = [*VALUES[type_], *more(type_, rng)]
    plain = type_.split()[0]
    with psycopg.connect(databases("s1")["s1"], autocommit=True) as connection:
        for session in SESSIONS:
            for statement in session:
                connection.execute(statement.encode())
            given = f"(SELECT unnest(%s::text[])::{plain} AS v) AS t"
            query = f"SELECT v FROM {given} ORDER BY v{collation(type_)}, random()"
            cursor = connection.execute(query.encode(), (values,), binary=binary)
            result = cursor.pgresult
            assert result is not None
            found = [result.get_value(row, 0) for row in range(result.ntuples)]
            read = value_of(result.ftype(0), int(binary), SETTINGS, is_c_collated=True)
            keys = [read(value) for value in found if value is not None]
            assert len(keys) == len(values)
            assert keys == sorted(keys), list(zip(found, keys, strict=True))
            count = f"SELECT count(DISTINCT v{collation(type_)}) FROM {given}"
            same = connection.execute(count.encode(), (values,)).fetchone()
            assert same == (len({repr(key) if isinstance(key, float) else key for key in keys}),)


def collation(type_: str) -> str:
    return ' COLLATE "C"' if "COLLATE" in type_ else ""


def more(type_: str, rng: random.Random) -> list[str]:
    match type_:
        case "numeric":
            return [str(Decimal(rng.randint(-(10**30), 10**30)).scaleb(-rng.randint(0, 30))) for _ in range(200)]
        case "float8":
            return [repr(rng.uniform(-1, 1) * 10 ** rng.randint(-200, 200)) for _ in range(200)]
        case "date":
            return [f"{rng.randint(1, 9999):04}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(200)]
        case "int8":
            return [str(rng.randint(-(2**63), 2**63 - 1)) for _ in range(200)]
        case _:
            return []


def column(name: str, oid: int = 23, format_: int = 0) -> Column:
    return Column(name.encode(), 0, 0, oid, 4, -1, format_)


def by(position: int | None, name: str = "", **words: Any) -> OrderColumn:
    given = {"is_descending": False, "is_nulls_first": False, "is_c_collated": False, **words}
    return OrderColumn(position=position, name=name, **given)


@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("is_nulls_first", [False, True])
def test_nulls_and_directions(is_descending: bool, is_nulls_first: bool) -> None:
    key = row_key(
        [by(0, is_descending=is_descending, is_nulls_first=is_nulls_first), by(None, "b")],
        [column("a"), column("b")],
        SETTINGS,
    )
    rows: list[list[bytes | None]] = [[a, b] for a in (None, b"2", b"10") for b in (b"2", b"1")]
    numbers = [b"10", b"10", b"2", b"2"] if is_descending else [b"2", b"2", b"10", b"10"]
    expected = [None, None, *numbers] if is_nulls_first else [*numbers, None, None]
    ordered = sorted(rows, key=key)
    assert [row[0] for row in ordered] == expected
    assert [row[1] for row in ordered] == [b"1", b"2"] * 3


@pytest.mark.parametrize(
    ("wanted", "columns"),
    [
        (by(3), [column("a")]),
        (by(None, "b"), [column("a")]),
        (by(None, "a"), [column("a"), column("a")]),
        (by(0), [column("a", 25)]),
        (by(0), [column("a", 3802)]),
        (by(0), [column("a", 1186)]),
    ],
)
def test_what_cannot_be_merged(wanted: OrderColumn, columns: list[Column]) -> None:
    with pytest.raises(Unmergeable):
        row_key([wanted], columns, SETTINGS)


def test_what_depends_on_settings() -> None:
    elsewhere = Settings(is_iso=False, is_server_encoding=False)
    with pytest.raises(Unmergeable, match="ISO"):
        value_of(1082, 0, elsewhere)
    assert value_of(1082, 1, elsewhere)
    with pytest.raises(Unmergeable, match="encoding"):
        value_of(25, 0, elsewhere, is_c_collated=True)
