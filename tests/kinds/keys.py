"""Key columns: every type, by range and by hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Scheme
from tests.kinds.shapes import ICU, OLD
from tests.support.cases import Case

KEYED: Final = (
    "INSERT INTO things VALUES ($key, 1000 + $n, 'new')",
    "UPDATE things SET note = note || $n WHERE tenant = $key AND id <= 5",
    "UPDATE things SET tenant = $other, id = id + 100000 WHERE tenant = $key AND id = 1000 + $n",
    "DELETE FROM things WHERE tenant = $key AND id BETWEEN 101000 AND 100997 + $n",
)


def keyed(key_type: KeyType, keys: Sequence[str], loaded: str, moving: str, **more: Any) -> Case:
    """A table whose rows have little but their key. `loaded`: a query of the keys that have rows from the beginning."""
    type_ = more.pop("type_", key_type)
    options: dict[str, Any] = {
        "kind": f"`{type_}`",
        "group": "Key columns",
        "schema": f"CREATE TABLE things (tenant {type_}, id bigint, note text, PRIMARY KEY (tenant, id))",
        "rows": f"INSERT INTO things SELECT k, i, 'loaded' FROM ({loaded}) AS l(k), generate_series(1, 12) i",
        "writes": KEYED,
    }
    return Case(key_type=key_type, moving=moving, keys=tuple(keys), **{**options, **more})


TEXTS: Final = ("a", "B", "b", "ba", "cé", "d", "é")
TEXTS_LOADED: Final = "VALUES ('a'), ('A'), ('b'), ('B'), ('ba'), ('c'), ('c ''\\'), ('Ç'), ('d'), ('é'), ('😀'), ('')"
UUIDS: Final = tuple(f"{digit}0000000-0000-4000-8000-000000000001" for digit in (0, 3, 4, 9, "f"))
UUIDS_LOADED: Final = "SELECT md5(i::text)::uuid FROM generate_series(1, 25) i"
DATES: Final = ("0001-01-01", "2024-02-28", "2024-02-29", "2025-12-31", "2026-01-01", "9999-12-31")
DATES_LOADED: Final = """
    SELECT date '2024-01-01' + 40 * i FROM generate_series(0, 25) i
    UNION ALL VALUES (date '-infinity'), ('infinity'), ('4713-01-01 BC'), ('5874897-12-31')
"""
TIMES: Final = tuple(
    f"{time}+00:00"
    for time in ("1999-12-31 23:59:59.999999", "2000-01-01 00:00", "2026-03-29 00:59:59.5", "2026-03-29 01:00")
)
TIMES_LOADED: Final = """
    SELECT timestamptz '1999-12-31 20:00+00' + i * interval '1000001 ms' FROM generate_series(0, 25) i
    UNION ALL VALUES ('-infinity'::timestamptz), ('infinity'), ('2026-03-29 02:00+02'),
        ('294276-12-31 23:59:59.999999+00')
"""

KEYS: Final = (
    keyed(KeyType.SMALLINT, ("-32768", "-6", "-5", "6", "7", "32767"), "SELECT generate_series(-10, 10)", "-5:7"),
    keyed(
        KeyType.INTEGER,
        ("-2147483648", "-1", "0", "2147483646", "2147483647"),
        "SELECT generate_series(-20, 20, 3) UNION ALL VALUES (-2147483648), (2147483647)",
        "0:2147483647",
    ),
    keyed(KeyType.BIGINT, ("99", "100", "150", "199", "200"), "SELECT generate_series(90, 210, 5)", "100:200"),
    keyed(
        KeyType.BIGINT,
        ("-9223372036854775808", "-9223372036854775807", "-1", "0", "9223372036854775807"),
        "VALUES ('-9223372036854775808'::bigint), (-9223372036854775807), (-1000000000000000), (-3), (0), (7),"
        " (1000000000000000), (9223372036854775807)",
        ":0",
        kind="`bigint`: negative, extreme and sparse keys",
    ),
    keyed(
        KeyType.BIGINT,
        ("99", "100", "101"),
        "",
        "100:",
        kind="one key with most of the rows",
        rows="INSERT INTO things SELECT 100, -i, 'loaded' FROM generate_series(-5, 1500) i;"
        " INSERT INTO things SELECT t, 1, 'loaded' FROM generate_series(90, 110) t WHERE t <> 100",
    ),
    keyed(KeyType.TEXT, TEXTS, TEXTS_LOADED, "b:d"),
    keyed(KeyType.TEXT, ("", "a", "b:c", 'say "b"', "z z"), "VALUES (''), ('b:c'), (' x '), ('z')", '" b":"z"',
          kind="`text`: blanks, quotes and colons"),
    keyed(
        KeyType.TEXT,
        TEXTS,
        TEXTS_LOADED,
        "b:d",
        type_='text COLLATE "en-x-icu"',
        kind="`text` with a linguistic collation",
        servers=OLD,
        says="ranges are in the order of bytes (`COLLATE \"C\"`)",
    ),
    keyed(
        KeyType.TEXT,
        TEXTS,
        TEXTS_LOADED,
        "b:d",
        kind="`text`, the two databases with different collations",
        servers={"s1": "old1", "shadow": "old1"},
        options={"s1": ICU, "shadow": ICU},
        says="ranges and batches are in the order of bytes",
    ),
    keyed(KeyType.TEXT, TEXTS, TEXTS_LOADED, "b:d", type_="varchar(20)"),
    keyed(
        KeyType.BIGINT,
        ("-3", "0", "32767"),
        "SELECT generate_series(-10, 10)",
        "0:",
        type_="smallint",
        kind="`smallint` or `integer` in a keyspace of `bigint`",
    ),
    keyed(
        KeyType.TEXT,
        TEXTS,
        TEXTS_LOADED,
        "b:d",
        kind="a domain over a key type",
        schema="CREATE DOMAIN tenant_name AS varchar(30) CHECK (VALUE <> 'nobody');"
        " CREATE TABLE things (tenant tenant_name, id bigint, note text, PRIMARY KEY (tenant, id))",
    ),
    keyed(KeyType.UUID, UUIDS, UUIDS_LOADED, "40000000-0000-0000-0000-000000000000:"),
    keyed(KeyType.DATE, DATES, DATES_LOADED, "2024-02-29:2026-01-01", says="`-infinity` and `infinity`, too"),
    keyed(KeyType.DATE, DATES, DATES_LOADED, "2024-02-29:", kind="`date`, an open range with `infinity` in it"),
    keyed(KeyType.TIMESTAMPTZ, TIMES, TIMES_LOADED, '"2000-01-01 00:00:00+00:00":"2026-03-29 01:00:00+00:00"'),
)  # fmt: skip


def hashed(key_type: KeyType, keys: Sequence[str], loaded: str, **more: Any) -> Case:
    return keyed(
        key_type,
        keys,
        loaded,
        more.pop("moving", "0:"),
        **{"kind": f"`{key_type}`, by hash", **more},
        scheme=Scheme.HASH,
    )


BY_HASH: Final = (
    hashed(KeyType.SMALLINT, [str(key) for key in range(-3, 5)], "SELECT generate_series(-20, 20)"),
    hashed(KeyType.INTEGER, [str(key) for key in range(-3, 5)], "SELECT generate_series(-20, 20)"),
    hashed(
        KeyType.BIGINT,
        [str(key) for key in (-(2**63), -1, 0, 1, 2, 3, 2**63 - 1)],
        "SELECT generate_series(-20, 20)",
        moving="-4611686018427387904:4611686018427387904",
    ),
    hashed(KeyType.TEXT, TEXTS, TEXTS_LOADED),
    hashed(KeyType.UUID, UUIDS, UUIDS_LOADED),
    hashed(KeyType.DATE, DATES, DATES_LOADED.split("UNION")[0]),
    hashed(KeyType.TIMESTAMPTZ, TIMES, TIMES_LOADED.split("UNION")[0]),
    hashed(
        KeyType.TEXT,
        TEXTS,
        TEXTS_LOADED,
        kind="`text` by hash, PostgreSQL 15 with ICU → 18",
        servers={"s1": "old1", "shadow": "old1"},
        options={"s1": ICU, "shadow": ICU},
    ),
)
