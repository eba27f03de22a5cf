"""Every kind of key, table and column: a whole move of each, or the words in which preflight refuses it.

`python -m tests.test_kinds` writes docs/kinds.md anew from the cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Scheme
from tests.support.cases import Case, MakeDatabase, literal, page, run_case

PAGE: Final = Path(__file__).parents[1] / "docs" / "kinds.md"

OLD: Final = {"s1": "old1", "s2": "old2", "shadow": "old1"}
"""Kinds that only the older servers' installation has the libraries for: ICU, libxml, btree_gist."""
ICU: Final = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.utf8'"


# --- keys

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
    UNION ALL VALUES ('-infinity'::timestamptz), ('infinity'), ('2026-03-29 02:00+02'), ('294276-12-31 23:59:59.999999+00')
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


# --- what batches are cut by


def shaped(kind: str, columns: str, insert: str, *more_writes: str, rows: str, **more: Any) -> Case:
    """One table `things`. `insert`: the values of a new row; `rows`: those of many, of a key t and a number i."""
    options: dict[str, Any] = {
        "group": "Keys of tables",
        "schema": f"CREATE TABLE things ({columns})",
        "rows": f"INSERT INTO {more.pop('into', 'things')} SELECT {rows} FROM generate_series(95, 104) t, generate_series(1, 25) i",
        "writes": (f"INSERT INTO things VALUES ({insert})", *more_writes),
        "keys": ("99", "100", "101"),
        "moving": "100:",
    }
    return Case(kind=kind, **{**options, **more})


TOUCH: Final = "UPDATE things SET note = 'changed ' || $n WHERE tenant = $key AND note IS NOT NULL AND {} % 7 = $n % 7"


def in_key(kinds: Mapping[str, Sequence[str]], kind: str, **more: Any) -> Case:
    """A table per type: the key column and a column of the type are its primary key."""
    tables, schema, rows, writes = {}, [more.pop("before", "")], [], []
    for number, (type_, values) in enumerate(kinds.items()):
        table = f"things_{number}"
        tables[table] = "tenant"
        schema.append(f"CREATE TABLE {table} (tenant bigint, k {type_}, note text, PRIMARY KEY (k, tenant));")
        for value in values:
            each = literal(value, type_)
            rows.append(f"INSERT INTO {table} SELECT t, {each}, 'loaded' FROM generate_series(95, 105) t;")
            writes.append(
                f"UPDATE {table} SET note = note || $n WHERE tenant = $key AND k = {each};"
                f" DELETE FROM {table} WHERE tenant = $key AND k = {each} AND $n % 3 = 1;"
                f" INSERT INTO {table} VALUES ($key, {each}, 'again') ON CONFLICT (k, tenant) DO UPDATE SET k = EXCLUDED.k"
            )
    options: dict[str, Any] = {"keys": ("99", "100", "101"), "moving": "100:", "group": "Keys of tables"}
    return Case(
        kind=kind,
        schema="\n".join(schema),
        tables=tables,
        rows="\n".join(rows),
        writes=tuple(writes),
        **{**options, **more},
    )


KEYSETS: Final = (
    shaped(
        "a primary key of `bigint`, `text`, `uuid` and `numeric`",
        "tenant bigint, code text, ref uuid, amount numeric, note text, PRIMARY KEY (tenant, code, ref, amount)",
        "$key, 'ä' || $n % 5, md5($n::text)::uuid, $n / 100.0, 'new'",
        TOUCH.format("amount::int"),
        "UPDATE things SET amount = amount::numeric(20, 4), code = code || '''' WHERE tenant = $key AND amount = $n / 100.0",
        "DELETE FROM things WHERE tenant = $key AND amount = ($n - 2) / 100.0",
        rows="t, (ARRAY['a', 'B', 'b', 'ß', E'\\\\', ''])[1 + i % 6], md5(i::text)::uuid, i / 4.0, 'loaded'",
    ),
    shaped(
        "a primary key with a text of a linguistic collation",
        'tenant bigint, code text COLLATE "en-x-icu", note text, PRIMARY KEY (code, tenant)',
        "$key, 'ä' || $n, 'new'",
        "UPDATE things SET code = upper(code) WHERE tenant = $key AND code = 'ä' || $n",
        "DELETE FROM things WHERE tenant = $key AND code = 'Ä' || ($n - 2)",
        rows="t, (ARRAY['a', 'B', 'b', 'ß', 'Z', 'é', '-', 'co-op', 'coop'])[1 + i % 9] || i, 'loaded'",
        servers=OLD,
    ),
    shaped(
        "a primary key that does not begin with the key column",
        "id bigint, tenant bigint, note text, PRIMARY KEY (id, tenant)",
        "1000 + $n, $key, 'new'",
        TOUCH.format("id"),
        "UPDATE things SET id = -id WHERE tenant = $key AND id = 1000 + $n",
        "DELETE FROM things WHERE tenant = $key AND id = 3 - 1000 - $n",
        rows="i, t, 'loaded'",
    ),
    shaped(
        "no primary key, but a unique index over `NOT NULL` columns",
        "tenant bigint NOT NULL, id bigint NOT NULL, note text",
        "$key, 1000 + $n, 'new'",
        TOUCH.format("id"),
        "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        rows="t, i, 'loaded'",
        schema="CREATE TABLE things (tenant bigint NOT NULL, id bigint NOT NULL, note text);"
        " CREATE UNIQUE INDEX ON things (id, tenant) INCLUDE (note)",
    ),
    shaped(
        "a deferrable primary key, and another key that is not",
        "tenant bigint, id bigint, place bigint, note text, PRIMARY KEY (tenant, id) DEFERRABLE, UNIQUE (tenant, place)",
        "",
        rows="t, i, i, 'loaded'",
        schema="CREATE TABLE things (tenant bigint, id bigint, place bigint NOT NULL, note text,"
        " PRIMARY KEY (tenant, id) DEFERRABLE INITIALLY DEFERRED, UNIQUE (tenant, place))",
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 1000 + $n, 'new')",
            "UPDATE things SET id = 26 - id WHERE tenant = $key AND id <= 25",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    shaped(
        "unique values that pass from row to row",
        "tenant bigint, id bigint, seat bigint, PRIMARY KEY (tenant, id), UNIQUE (tenant, seat)",
        "$key, 1000 + $n, NULL",
        "UPDATE things SET seat = -seat WHERE tenant = $key AND id <= 25;"
        " UPDATE things SET seat = 1 + (-seat + id) % 25 WHERE tenant = $key AND id IN (1 + $n % 25) AND false;"
        " UPDATE things SET seat = 1 + (-seat) % 25 WHERE tenant = $key AND id <= 25",
        "UPDATE things SET seat = NULL WHERE tenant = $key AND id = 1 + $n % 25;"
        " UPDATE things SET seat = 1000 WHERE tenant = $key AND id = 1000 + $n;"
        " UPDATE things SET seat = (SELECT s FROM generate_series(1, 25) s WHERE s NOT IN"
        " (SELECT seat FROM things WHERE tenant = $key AND seat IS NOT NULL)) WHERE tenant = $key AND id = 1 + $n % 25;"
        " DELETE FROM things WHERE tenant = $key AND id = 1000 + $n",
        rows="t, i, i",
    ),
    in_key(
        {
            "numeric": ("1.0", "-0.00", "NaN", "Infinity", "-Infinity", "123456789012345678901234567890.123"),
            "double precision": ("0", "NaN", "-Infinity", "5e-324", "0.1"),
            "timestamp": ("-infinity", "infinity", "2026-03-29 02:30:00.000001", "0044-03-15 00:00 BC"),
            "bytea": ("", "\\x00", "\\x00ff5c", "\\xff"),
            "interval": ("1 day", "-1 mon 30 days", "00:00:00.000001", "1000 years"),
            "boolean": ("true", "false"),
        },
        "numbers with `NaN`, times with infinities, `bytea`, `interval` in the primary key",
    ),
    in_key(
        {
            "mood": ("sad", "it's", "ok"),
            "positive": ("1", "2.50"),
            "bigint[]": ("{}", "{1,2}", "{{1,2},{3,4}}", "{NULL,1}", "[0:1]={1,2}"),
            "int8range": ("empty", "[1,5)", "(,)", "[3,)"),
            "int8multirange": ("{}", "{[1,2),[5,9)}"),
            "point2": ("(1,2)", "(-1,)", "(0,7)"),
            "inet": ("10.0.0.1", "10.0.0.0/8", "::1"),
            "varchar(5)": ("", "a b"),
            "char(4)": ("a", "ab"),
        },
        "an enum, a domain, an array, a range, a composite, `inet` or `char` in the primary key",
        before="CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s'); CREATE DOMAIN positive AS numeric CHECK (VALUE > 0);"
        " CREATE TYPE point2 AS (x int, y int);",
    ),
)

# What none of the cases above may do.
PLAIN: Final = "CREATE TABLE things (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id))"


def refused(kind: str, schema: str, text: str, **more: Any) -> Case:
    return Case(kind=kind, schema=schema, refused=text, **{"group": "Keys of tables", **more})


NO_KEY: Final = (
    refused(
        "a primary key without the key column",
        "CREATE TABLE things (tenant bigint NOT NULL, id bigint PRIMARY KEY, UNIQUE (tenant, id))",
        "does not hold the key column tenant",
    ),
    refused("no key at all", "CREATE TABLE things (tenant bigint NOT NULL, note text)", "has no primary key"),
    refused(
        "only a unique index with NULLs",
        "CREATE TABLE things (tenant bigint NOT NULL, id bigint, UNIQUE (tenant, id))",
        "has no primary key and no unique index over NOT NULL columns",
    ),
    refused(
        "only a deferrable primary key",
        "CREATE TABLE things (tenant bigint, id bigint, PRIMARY KEY (tenant, id) DEFERRABLE)",
        "has no primary key and no unique index over NOT NULL columns",
    ),
    refused(
        "only a partial unique index, or one over expressions",
        "CREATE TABLE things (tenant bigint NOT NULL, id bigint NOT NULL);"
        " CREATE UNIQUE INDEX ON things (tenant, id) WHERE id > 0; CREATE UNIQUE INDEX ON things (tenant, abs(id))",
        "has no primary key and no unique index over NOT NULL columns",
    ),
    refused(
        "a key column that may be NULL",
        "CREATE TABLE things (tenant bigint, id bigint PRIMARY KEY)",
        "may be NULL",
        group="Key columns",
    ),
    refused(
        "a key column of another type than the keyspace's",
        "CREATE TABLE things (tenant numeric, id bigint, PRIMARY KEY (tenant, id))",
        "is numeric, the keyspace's keys are bigint",
        group="Key columns",
    ),
    refused(
        "a key column with a nondeterministic collation",
        "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        " CREATE TABLE things (tenant text COLLATE nocase, id bigint, PRIMARY KEY (tenant, id))",
        "takes different texts for equal",
        group="Key columns",
        servers=OLD,
        key_type=KeyType.TEXT,
        moving="b:d",
    ),
    refused(
        "a generated key column",
        "CREATE TABLE things (real bigint, tenant bigint GENERATED ALWAYS AS (real / 10) STORED NOT NULL, id bigint,"
        " PRIMARY KEY (tenant, id))",
        "is generated",
        group="Key columns",
    ),
    refused("a table that is missing", "SELECT 1", "the table things does not exist", group="Tables"),
)


# --- partitions and inheritance

PARTED: Final = (
    "INSERT INTO things VALUES ($key, 1000 + $n, 1 + $n % 30, 'new')",
    "UPDATE things SET note = note || $n WHERE tenant = $key AND id <= 5",
    "UPDATE things SET day = 1 + (day + 10) % 30 WHERE tenant = $key AND id % 7 = $n % 7",
    "DELETE FROM things WHERE tenant = $key AND id = 997 + $n",
)


def parted(kind: str, by: str, partitions: str, **more: Any) -> Case:
    """Rows of 30 days; an update of the day takes a row from partition to partition."""
    head = more.pop("head", "tenant bigint, id bigint, day int, note text, PRIMARY KEY (tenant, id, day)")
    return Case(
        kind=kind,
        schema=f"CREATE TABLE things ({head}) PARTITION BY {by}; {partitions}",
        rows="INSERT INTO things SELECT t, i, 1 + i % 30, 'loaded'"
        " FROM generate_series(95, 104) t, generate_series(1, 30) i",
        **{
            "writes": PARTED,
            "keys": ("99", "100", "101"),
            "moving": "100:",
            "group": "Partitions and inheritance",
            **more,
        },
    )


PARTITIONS: Final = (
    parted(
        "partitioned by range, with a default partition",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (10);"
        " CREATE TABLE things_2 PARTITION OF things FOR VALUES FROM (10) TO (20);"
        " CREATE TABLE things_rest PARTITION OF things DEFAULT",
        says="the root is named in the configuration; its partitions move with it",
    ),
    parted(
        "partitioned by list",
        "LIST (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES IN (1, 3, 5, NULL);"
        " CREATE TABLE things_rest PARTITION OF things DEFAULT",
    ),
    parted(
        "partitioned by hash",
        "HASH (tenant, day)",
        " ".join(
            f"CREATE TABLE things_{rest} PARTITION OF things FOR VALUES WITH (MODULUS 3, REMAINDER {rest});"
            for rest in range(3)
        ),
    ),
    parted(
        "partitions of partitions, one with its columns in another order",
        "RANGE (tenant)",
        "CREATE TABLE things_low PARTITION OF things FOR VALUES FROM (MINVALUE) TO (100);"
        " CREATE TABLE things_high PARTITION OF things FOR VALUES FROM (100) TO (MAXVALUE) PARTITION BY LIST (day);"
        " CREATE TABLE things_odd (note text, gone int, day int NOT NULL, id bigint NOT NULL, tenant bigint NOT NULL);"
        " ALTER TABLE things_odd DROP COLUMN gone;"
        " ALTER TABLE things_high ATTACH PARTITION things_odd FOR VALUES IN (1, 3, 5, 7, 9, 11);"
        " CREATE TABLE things_even PARTITION OF things_high DEFAULT PARTITION BY HASH (id);"
        " CREATE TABLE things_even_0 PARTITION OF things_even FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        " CREATE TABLE things_even_1 PARTITION OF things_even FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    ),
    parted(
        "a partition that is added while the table moves",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (40)",
        ddl="CREATE TABLE things_2 PARTITION OF things FOR VALUES FROM (40) TO (80)",
        later=(*PARTED, "UPDATE things SET day = 40 + $n % 40 WHERE tenant = $key AND id % 5 = $n % 5"),
        says="on the target first; then `run` goes on, and compares everything anew",
    ),
    Case(
        kind="inherited tables",
        group="Partitions and inheritance",
        schema=f"{PLAIN}; CREATE TABLE big_things (size int, PRIMARY KEY (tenant, id)) INHERITS (things)",
        tables={"things": "tenant", "big_things": "tenant"},
        rows="INSERT INTO things SELECT t, i, 'loaded' FROM generate_series(95, 104) t, generate_series(1, 20) i;"
        " INSERT INTO big_things SELECT t, i, 'loaded', i FROM generate_series(95, 104) t, generate_series(10, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new'); INSERT INTO big_things VALUES ($key, 1000 + $n, 'new', $n)",
            "UPDATE things SET note = note || $n WHERE tenant = $key AND id % 7 = $n % 7",
            "UPDATE ONLY things SET note = 'parent ' || $n WHERE tenant = $key AND id % 5 = $n % 5",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="parent and children are named in the configuration, each moves its own rows",
    ),
    refused(
        "an inherited table whose parent or child is not named",
        f"{PLAIN}; CREATE TABLE big_things (size int, PRIMARY KEY (tenant, id)) INHERITS (things)",
        "inherits from things and is not in the keyspace: its rows stay",
        group="Partitions and inheritance",
    ),
    refused(
        "a partition that is named instead of the root",
        "CREATE TABLE root (tenant bigint, id bigint, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (tenant);"
        " CREATE TABLE things PARTITION OF root DEFAULT",
        "is a partition of root",
        group="Partitions and inheritance",
    ),
    parted(
        "a foreign table as a partition",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (40);"
        " CREATE FOREIGN TABLE things_far PARTITION OF things FOR VALUES FROM (40) TO (80) SERVER far",
        prepared="CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER far FOREIGN DATA WRAPPER nothing;"
        " GRANT USAGE ON FOREIGN SERVER far TO PUBLIC",
        refused="is a foreign table",
        head="tenant bigint NOT NULL, id bigint NOT NULL, day int NOT NULL, note text",
    ),
)


# --- constraints and triggers

CONSTRAINTS: Final = (
    Case(
        kind="a foreign key to the same table",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, parent bigint, note text, PRIMARY KEY (tenant, id),"
        " FOREIGN KEY (tenant, parent) REFERENCES things ON DELETE CASCADE ON UPDATE CASCADE)",
        rows="INSERT INTO things SELECT t, i, CASE WHEN i > 3 THEN i / 3 END, 'loaded'"
        " FROM generate_series(95, 104) t, generate_series(1, 60) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 1 + $n % 60, 'new'), ($key, 5000 + $n, 1000 + $n, 'newer')",
            "UPDATE things SET id = 100000 + $n WHERE tenant = $key AND id = 1000 + $n",
            "UPDATE things SET parent = (parent + $n) % 60 + 1 WHERE tenant = $key AND id BETWEEN 40 AND 60",
            "DELETE FROM things WHERE tenant = $key AND id = 99998 + $n",
        ),
        says="a role that moves tables with foreign keys needs `SET ON PARAMETER session_replication_role`",
    ),
    Case(
        kind="foreign keys in a circle, deferrable, initially deferred",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, best bigint, PRIMARY KEY (tenant, id));"
        " CREATE TABLE parts (tenant bigint, id bigint, thing bigint NOT NULL, PRIMARY KEY (tenant, id),"
        " FOREIGN KEY (tenant, thing) REFERENCES things DEFERRABLE INITIALLY DEFERRED);"
        " ALTER TABLE things ADD FOREIGN KEY (tenant, best) REFERENCES parts DEFERRABLE INITIALLY DEFERRED",
        tables={"things": "tenant", "parts": "tenant"},
        rows="BEGIN; INSERT INTO things SELECT t, i, i FROM generate_series(95, 104) t, generate_series(1, 40) i;"
        " INSERT INTO parts SELECT t, i, i FROM generate_series(95, 104) t, generate_series(1, 40) i; COMMIT",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 1000 + $n); INSERT INTO parts VALUES ($key, 1000 + $n, 1000 + $n)",
            "UPDATE things SET best = 1 + (best + $n) % 40 WHERE tenant = $key AND id <= 40",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n; DELETE FROM parts WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    Case(
        kind="a foreign key to a reference table",
        group="Constraints and triggers",
        schema="CREATE TABLE countries (code text PRIMARY KEY, name text);"
        " CREATE TABLE things (tenant bigint, id bigint, country text REFERENCES countries ON UPDATE CASCADE,"
        " PRIMARY KEY (tenant, id))",
        everywhere="INSERT INTO countries VALUES ('nl', 'Nederland'), ('dk', 'Danmark'), ('is', NULL)",
        reference_tables=("countries",),
        rows="INSERT INTO things SELECT t, i, (ARRAY['nl', 'dk', 'is', NULL])[1 + i % 4]"
        " FROM generate_series(95, 104) t, generate_series(1, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'nl')",
            "UPDATE things SET country = CASE country WHEN 'nl' THEN 'dk' ELSE 'nl' END WHERE tenant = $key AND id % 9 = $n % 9",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="the reference table is named in `reference_tables`",
    ),
    refused(
        "a foreign key to a table that does not move",
        "CREATE TABLE countries (code text PRIMARY KEY);"
        " CREATE TABLE things (tenant bigint, id bigint, country text REFERENCES countries, PRIMARY KEY (tenant, id))",
        "ties things to countries, and countries does not move",
        group="Constraints and triggers",
    ),
    refused(
        "a foreign key without the key column",
        f"{PLAIN}; ALTER TABLE things ADD UNIQUE (id);"
        " CREATE TABLE parts (tenant bigint, id bigint, thing bigint REFERENCES things (id), PRIMARY KEY (tenant, id))",
        "does not tie tenant to things.tenant",
        tables={"things": "tenant", "parts": "tenant"},
        group="Constraints and triggers",
    ),
    refused(
        "a unique constraint without the key column",
        "CREATE TABLE things (tenant bigint, id bigint, mail text UNIQUE, PRIMARY KEY (tenant, id))",
        "does not hold the key column tenant",
        group="Constraints and triggers",
    ),
    Case(
        kind="an exclusion constraint with the key column",
        group="Constraints and triggers",
        prepared="CREATE EXTENSION btree_gist",
        schema="CREATE TABLE things (tenant bigint, id bigint, slot int8range, PRIMARY KEY (tenant, id),"
        " EXCLUDE USING gist (tenant WITH =, slot WITH &&))",
        rows="INSERT INTO things SELECT t, i, int8range(10 * i, 10 * i + 10)"
        " FROM generate_series(95, 104) t, generate_series(1, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, int8range(5000 + $n, 5001 + $n))",
            "UPDATE things SET slot = 'empty' WHERE tenant = $key AND id IN (5, 35);"
            " UPDATE things SET slot = int8range(10 * (40 - id), 10 * (40 - id) + 10) WHERE tenant = $key AND id IN (5, 35)"
            " AND $n % 2 = 1;"
            " UPDATE things SET slot = int8range(10 * id, 10 * id + 10) WHERE tenant = $key AND id IN (5, 35) AND $n % 2 = 0",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        servers=OLD,
    ),
    refused(
        "an exclusion constraint without the key column",
        "CREATE TABLE things (tenant bigint, id bigint, slot int8range, PRIMARY KEY (tenant, id),"
        " EXCLUDE USING gist (slot WITH &&))",
        "does not hold the key column tenant",
        group="Constraints and triggers",
    ),
    shaped(
        "checks; partial, expression and `NULLS NOT DISTINCT` unique indexes; a deferred unique constraint",
        "",
        "",
        rows="t, i, i, CASE i % 3 WHEN 0 THEN NULL ELSE 'M' || i END",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, place bigint NOT NULL CHECK (place <> 0), mail text,"
        " PRIMARY KEY (tenant, id), UNIQUE (tenant, place) DEFERRABLE INITIALLY DEFERRED,"
        " UNIQUE NULLS NOT DISTINCT (tenant, mail, id));"
        " CREATE UNIQUE INDEX ON things (tenant, lower(mail));"
        " CREATE UNIQUE INDEX ON things (tenant, mail) WHERE place > 10",
        writes=(
            "UPDATE things SET place = 26 - place WHERE tenant = $key AND id <= 25",
            "INSERT INTO things VALUES ($key, 1000 + $n, 1000 + $n, NULL)",
            "UPDATE things SET mail = 'x' || mail WHERE tenant = $key AND id % 5 = $n % 5 AND length(mail) < 20",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    Case(
        kind="triggers and rules of the application",
        group="Constraints and triggers",
        schema=f"{PLAIN}; CREATE TABLE changes (tenant bigint, id bigint, times int, said text, PRIMARY KEY (tenant, id));"
        " CREATE TABLE copies (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));"
        " CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN"
        " INSERT INTO changes AS c VALUES (coalesce(NEW.tenant, OLD.tenant), coalesce(NEW.id, OLD.id), 1, TG_OP)"
        " ON CONFLICT (tenant, id) DO UPDATE SET times = c.times + 1, said = c.said || TG_OP; RETURN NULL; END $f$;"
        " CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN NEW.note := NEW.note || '!'; RETURN NEW;"
        " END $f$;"
        " CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION shout();"
        " CREATE TRIGGER z AFTER INSERT OR UPDATE OR DELETE ON things FOR EACH ROW EXECUTE FUNCTION note_change();"
        " CREATE RULE r AS ON INSERT TO things DO ALSO INSERT INTO copies VALUES (NEW.tenant, NEW.id, NEW.note)",
        tables={"things": "tenant", "changes": "tenant", "copies": "tenant"},
        rows="INSERT INTO things SELECT t, i, 'loaded' FROM generate_series(95, 104) t, generate_series(1, 30) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new')",
            "UPDATE things SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="they fire once, for the application's own statement",
    ),
    refused(
        "a trigger that fires for replicas, too (`ENABLE ALWAYS` or `REPLICA`)",
        f"{PLAIN}; CREATE TRIGGER t BEFORE UPDATE ON things FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();"
        " ALTER TABLE things ENABLE ALWAYS TRIGGER t",
        "fires for replicas too",
        group="Constraints and triggers",
    ),
    Case(
        kind="row security, also where it is forced",
        group="Constraints and triggers",
        schema=f"{PLAIN}; ALTER TABLE things ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY p ON things USING (note <> 'hidden') WITH CHECK (true);"
        " CREATE TABLE parts (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));"
        " ALTER TABLE parts ENABLE ROW LEVEL SECURITY; ALTER TABLE parts FORCE ROW LEVEL SECURITY;"
        " CREATE POLICY p ON parts USING (note <> 'hidden') WITH CHECK (true)",
        tables={"things": "tenant", "parts": "tenant"},
        rows="".join(
            f"INSERT INTO {table} SELECT t, i, CASE i % 2 WHEN 0 THEN 'seen' ELSE 'hidden' END"
            " FROM generate_series(95, 104) t, generate_series(1, 30) i;"
            for table in ("things", "parts")
        ),
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new'); INSERT INTO parts VALUES ($key, 1000 + $n, 'hidden')",
            "UPDATE things SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "UPDATE parts SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="where it is forced, the role that moves needs `BYPASSRLS`",
    ),
)


# --- columns

COLUMNS: Final = (
    shaped(
        "generated columns, stored and virtual",
        "",
        "",
        rows="t, i, i, 'loaded'",
        into="things (tenant, id, a, b)",
        group="Columns",
        schema="CREATE TABLE things (tenant bigint, id bigint, a int, doubled int GENERATED ALWAYS AS (a * 2) STORED,"
        " tripled int GENERATED ALWAYS AS (a * 3) VIRTUAL, b text, PRIMARY KEY (tenant, id))",
        writes=(
            "INSERT INTO things (tenant, id, a, b) VALUES ($key, 1000 + $n, $n, 'new')",
            "UPDATE things SET a = a + 1 WHERE tenant = $key AND id % 9 = $n % 9",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    Case(
        kind="identity columns (`ALWAYS`, `BY DEFAULT`), `serial`, sequences that count down",
        group="Columns",
        schema="CREATE SEQUENCE down INCREMENT -1; CREATE TABLE things (tenant bigint,"
        " id bigint GENERATED ALWAYS AS IDENTITY, n bigint, PRIMARY KEY (tenant, id));"
        " CREATE TABLE parts (tenant bigint, id bigint GENERATED BY DEFAULT AS IDENTITY (CACHE 10), n bigint,"
        " PRIMARY KEY (tenant, id));"
        " CREATE TABLE bits (tenant bigint, id bigserial, less bigint NOT NULL DEFAULT nextval('down'), n bigint,"
        " PRIMARY KEY (tenant, id), UNIQUE (tenant, less))",
        tables={"things": "tenant", "parts": "tenant", "bits": "tenant"},
        unpredictable={"things": ("id",), "parts": ("id",), "bits": ("id", "less")},
        rows="".join(
            f"INSERT INTO {table} (tenant, n) SELECT t, i FROM generate_series(95, 104) t, generate_series(1, 30) i;"
            for table in ("things", "parts", "bits")
        ),
        keys=("99", "100", "101"),
        writes=tuple(
            f"INSERT INTO {table} (tenant, n) VALUES ($key, 1000 + $n);"
            f" UPDATE {table} SET n = -n WHERE tenant = $key AND n = 999 + $n;"
            f" DELETE FROM {table} WHERE tenant = $key AND n = -995 - $n"
            for table in ("things", "parts", "bits")
        ),
        says="the target's sequences are set a margin above the source's",
    ),
    shaped(
        "dropped columns, and columns in another order on the target",
        "",
        "",
        rows="t, i, i, 'loaded', '{1}'",
        group="Columns",
        schema="CREATE TABLE things (tenant bigint, id bigint, gone text, a int DEFAULT 7, b text NOT NULL, c int[],"
        " PRIMARY KEY (tenant, id)); ALTER TABLE things DROP COLUMN gone",
        target_schema="CREATE TABLE things (c int[], x int, b text NOT NULL, id bigint, y int, a int DEFAULT 7,"
        " tenant bigint, PRIMARY KEY (tenant, id)); ALTER TABLE things DROP COLUMN x; ALTER TABLE things DROP COLUMN y",
        writes=(
            "INSERT INTO things (tenant, id, b, c) VALUES ($key, 1000 + $n, 'new', '{}')",
            "UPDATE things SET a = a + 1, c = c || a WHERE tenant = $key AND id % 9 = $n % 9 AND cardinality(c) < 20",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    shaped(
        "a column that is added while the table moves",
        "tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id)",
        "$key, 1000 + $n, 'new'",
        rows="t, i, 'loaded'",
        group="Columns",
        ddl="ALTER TABLE things ADD COLUMN fresh numeric DEFAULT 1.50",
        later=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new', $n)",
            "UPDATE things SET fresh = fresh * 2 WHERE tenant = $key AND id = $n % 25",
        ),
        says="on the target first; then `run` goes on, and compares everything anew",
    ),
    refused(
        "columns that are not the same on both sides",
        PLAIN,
        "things has only on s1: column note text",
        target_schema=PLAIN.replace("note text", "note varchar(10)"),
        group="Columns",
    ),
    refused(
        "an enum with other labels, or a domain with another check, on the target",
        f"CREATE TYPE mood AS ENUM ('sad', 'ok'); {PLAIN}; ALTER TABLE things ADD feels mood",
        "things has only on s1: enum public.mood of 'sad', 'ok'",
        target_schema=f"CREATE TYPE mood AS ENUM ('ok', 'sad'); {PLAIN}; ALTER TABLE things ADD feels mood",
        group="Columns",
    ),
)


def typed(kind: str, columns: Mapping[str, Sequence[str | None]], **more: Any) -> Case:
    """A table with a column of each type, and one with a column of arrays of each."""
    rounds = max(len(values) for values in columns.values())
    types = list(columns)

    def row(number: int) -> str:
        values = [columns[type_] for type_ in types]
        return ", ".join(literal(each[number % len(each)], type_) for each, type_ in zip(values, types, strict=True))

    def lists(number: int) -> str:
        return ", ".join(
            f"ARRAY[{literal(columns[type_][number % len(columns[type_])], type_)}, NULL,"
            f" {literal(columns[type_][0], type_)}]::{type_}[]"
            for type_ in types
        )

    def declared(suffix: str) -> str:
        return ", ".join(f"c{number} {type_}{suffix}" for number, type_ in enumerate(types))

    def assigned(values: str) -> str:
        return f"({', '.join(f'c{number}' for number, _ in enumerate(types))}) = ROW({values})"

    key = "tenant bigint, id bigint"
    options: dict[str, Any] = {
        "group": "Types of columns",
        "schema": more.pop("before", "") + f"CREATE TABLE things ({key}, {declared('')}, PRIMARY KEY (tenant, id));"
        f" CREATE TABLE lists ({key}, {declared('[]')}, PRIMARY KEY (tenant, id))",
        "tables": {"things": "tenant", "lists": "tenant"},
        "rows": "".join(
            f"INSERT INTO {table} SELECT t, {number} + {rounds} * i, {values(number)}"
            " FROM generate_series(97, 102) t, generate_series(0, 2) i;"
            for number in range(rounds)
            for table, values in (("things", row), ("lists", lists))
        ),
        "keys": ("99", "100", "101"),
        "moving": "100:",
        "writes": tuple(
            f"INSERT INTO {table} VALUES ($key, 1000 + {rounds} * $n + {number}, {values(number)});"
            f" UPDATE {table} SET {assigned(values(number + 1))} WHERE tenant = $key AND id = {number} + $n % 3;"
            f" DELETE FROM {table} WHERE tenant = $key AND id = 1000 + {rounds} * ($n - 2) + {number}"
            for number in range(rounds)
            for table, values in (("things", row), ("lists", lists))
        ),
    }
    return Case(kind=kind, **{**options, **more})


ODD_TEXTS: Final = (
    "",
    None,
    "".join(map(chr, range(1, 32))) + "\x7f",
    "quotes ' \" `, backslashes \\ \\\\ \\N \\. \\x00, braces {} () , ;",
    "\\.\n\\.",
    "NULL",
    "emoji 😀👩‍👩‍👧, 4 bytes \U0010ffff, \uffff, combining e\u0301, right to left \u202eabc, a zero width\u200b space, BOM \ufeff",
    " outer blanks \t",
)

TYPES: Final = (
    typed(
        "numbers: `numeric` with `NaN`, infinities and trailing zeros, floats with `NaN`, `-0` and denormals, `money`",
        {
            "numeric": ("1", "1.0", "1.000", "NaN", "Infinity", "-Infinity", "-0.0", "1e-300"),
            "numeric(12,4)": ("1", "-99999999.9999", None),
            "real": ("NaN", "-0", "Infinity", "1e-45", "3.4028235e38", "0.1"),
            "double precision": (
                "NaN",
                "-0",
                "-Infinity",
                "5e-324",
                "1.7976931348623157e308",
                "0.1",
                "0.30000000000000004",
            ),
            "money": ("-92233720368547758.08", "0.01", None),
            "smallint": ("-32768", "32767"),
            "oid": ("0", "4294967295"),
        },
    ),
    typed(
        "times: infinite dates and timestamps, years BC, `timetz`, `interval`",
        {
            "date": ("infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "2024-02-29"),
            "timestamp": ("infinity", "-infinity", "0001-01-01 00:00:00 BC", "2026-03-29 02:30:00.123456"),
            "timestamptz": (
                "infinity",
                "-infinity",
                "2026-03-29 02:30:00.000001+05:45",
                "1883-11-18 12:03:58-04:56:02",
            ),
            "time": ("24:00:00", "00:00:00.000001"),
            "timetz": ("24:00:00+14", "12:00:00-03:30"),
            "interval": (
                "1 mon -1 day",
                "30 days",
                "-178000000 years",
                "00:00:00.000001",
                "1 year 2 mons 3 days -04:05:06.7",
            ),
            "interval(0)": ("1 day 01:01:01", None),
        },
    ),
    typed(
        "odd texts: control characters, quotes, backslashes, 4-byte characters, the empty string and NULL",
        {"text": ODD_TEXTS, "varchar(300)": ODD_TEXTS, "char(300)": ODD_TEXTS, '"char"': ("", "a", "\\377", None)},
    ),
    typed(
        "`json`, `jsonb`, `bytea`, `uuid`, `boolean`",
        {
            "json": ('{"b": 1.00,  "a": [null], "b": 2}', '"\\u00e9\\\\"', "[]", " 1e400 "),
            "jsonb": ('{"b": 1.00, "a": [null], "b": 2}', '"\\u00e9\\\\"', "null", "12345678901234567890.10"),
            "bytea": ("", "\\x00", "\\x5c2e0a5c4e", "\\xff00fe", None),
            "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
            "boolean": ("true", "false", None),
        },
    ),
    typed(
        "`xml`",
        {"xml": ("<a>é &lt; 1</a>", "text <b/> only", "", None), "text": ("x",)},
        servers=OLD,
    ),
    typed(
        "`tsvector`, `tsquery`, `jsonpath`",
        {
            "tsvector": ("a:1A fat:2B,4C cat:5D", "", "''' \\\\':1", None),
            "tsquery": ("fat & (rat | !cat:AB) <2> dog:*", "", "'a '' b'"),
            "jsonpath": ("$.a[*] ? (@.b > 1.0)", "strict $"),
        },
    ),
    typed(
        "`regclass`, `regtype`, `regrole` and the like",
        {
            "regclass": ("things", "pg_class", "-", None),
            "regtype": ("things", "numeric[]", "-"),
            "regrole": ("postgres", "pg_read_all_data"),
            "regproc": ("pg_catalog.now", "mine"),
            "regprocedure": ("mine(integer)", "lower(text)"),
            "regoperator": ("+(integer,integer)",),
            "regnamespace": ("public", "pg_catalog"),
            "regconfig": ("english",),
            "regdictionary": ("simple",),
            "regcollation": ('"C"',),
        },
        before="CREATE FUNCTION mine(int) RETURNS int LANGUAGE sql AS 'SELECT $1';",
        says="carried by name; the named object has to be on the target",
    ),
    typed(
        "enums, domains, composites, and composites of them",
        {
            "mood": ("sad", 'it\'s, "ok"', None),
            "positive": ("1.50", "2"),
            "point2": ('(1,"a, ""b""")', "(,)", None),
            "line2": ('("(1,a)","{""(2,b)"",NULL}",sad)', "(,,)"),
            "checked": ("(1,x)",),
        },
        before="CREATE TYPE mood AS ENUM ('sad', 'it''s, \"ok\"'); CREATE DOMAIN positive AS numeric(8, 2) CHECK (VALUE > 0);"
        " CREATE TYPE point2 AS (x int, label text); CREATE TYPE line2 AS (a point2, more point2[], feels mood);"
        " CREATE DOMAIN checked AS point2 CHECK ((VALUE).x > 0);",
    ),
    typed(
        "ranges and multiranges, also of own types",
        {
            "int4range": ("empty", "(,)", "[1,5)", "[1,1]"),
            "numrange": ("[1.0,2.00)", "(,NaN]", "(1,)"),
            "tstzrange": ('["2026-01-01 00:00+00",infinity)', "(-infinity,infinity)", "(,)"),
            "textrange": ('[a,"b c")', '("",)', None),
            "int8multirange": ("{}", "{[1,2),[5,9)}", "{(,)}"),
            "textmultirange": ("{[a,b),[c,d)}", "{}"),
        },
        before="CREATE TYPE textrange AS RANGE (subtype = text);",
    ),
    typed(
        "networks, bit strings, geometry",
        {
            "inet": ("10.0.0.1/8", "::1", "fe80::1/64"),
            "cidr": ("10.0.0.0/8", "::/0"),
            "macaddr": ("08:00:2b:01:02:03",),
            "macaddr8": ("08:00:2b:01:02:03:04:05",),
            "bit(9)": ("101010101", None),
            "varbit": ("", "1", "00000000001"),
            "point": ("(-0,1e-300)", "(NaN,Infinity)"),
            "line": ("{1,-1,0}",),
            "lseg": ("[(0,0),(1,1)]",),
            "path": ("[(0,0),(1,1),(2,0)]", "((0,0),(1,1))"),
            "polygon": ("((0,0),(1,1),(2,0))",),
            "circle": ("<(0,0),0.1>",),
            "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF"),
        },
    ),
    Case(
        kind="values of 50 MB",
        group="Types of columns",
        schema="CREATE TABLE things (tenant bigint, id bigint, n int, data bytea, words text, PRIMARY KEY (tenant, id));"
        " ALTER TABLE things ALTER data SET STORAGE EXTERNAL",
        rows="INSERT INTO things SELECT t, i, i, '\\x00', 'small' FROM generate_series(99, 100) t, generate_series(1, 60) i;"
        " UPDATE things SET data = decode(repeat('00ff5c0a', 13107200), 'hex') WHERE tenant = 100 AND id = 30;"
        " UPDATE things SET words = repeat(E'é\\\\\\n\\t😀', 5500000) WHERE tenant = 100 AND id = 50",
        keys=("99", "100"),
        writes=(
            "UPDATE things SET n = n + 1 WHERE tenant = $key AND id < 20",
            "UPDATE things SET n = n + 1 WHERE tenant = $key AND id = CASE $n % 100 WHEN 2 THEN 30 WHEN 52 THEN 50 END",
        ),
        limits={"max_stall_ms": 10_000, "cutover_lag_ms": 5_000.0},
        pause_s=0.01,
    ),
)


# --- names

LONG: Final = "é" * 31 + "x"
NAMES: Final = (
    Case(
        kind="quoted names: upper case, dots, quotes, blanks; several schemas; key words; 63 bytes",
        group="Names",
        schema='CREATE SCHEMA "Odd.Schema"; CREATE SCHEMA sales;'
        ' CREATE TABLE "Odd.Schema"."a ""b"" c.d" ("Ten.ant ""x""" bigint, "ID %s" bigint, "no te" text,'
        ' PRIMARY KEY ("Ten.ant ""x""", "ID %s"));'
        f' CREATE TABLE "{LONG}" (tenant bigint, "{LONG}" bigint, note text, PRIMARY KEY (tenant, "{LONG}"));'
        f' CREATE TABLE "{LONG[:-1]}y" (tenant bigint, "{LONG}" bigint, note text, PRIMARY KEY (tenant, "{LONG}"));'
        ' CREATE TABLE sales.things (tenant bigint, "select" bigint, "user" text, PRIMARY KEY (tenant, "select"));'
        ' CREATE TABLE things (tenant bigint, "select" bigint, "user" text, PRIMARY KEY (tenant, "select"));'
        ' CREATE TABLE "table" ("order" bigint, "select" bigint, "user" text, PRIMARY KEY ("select", "order"));'
        ' CREATE TABLE "Things" (tenant bigint, "select" bigint, "user" text, PRIMARY KEY (tenant, "select"))',
        tables={
            '"Odd.Schema"."a ""b"" c.d"': 'Ten.ant "x"',
            LONG: "tenant",
            LONG[:-1] + "y": "tenant",
            "sales.things": "tenant",
            "things": "tenant",
            "table": "order",
            "Things": "tenant",
        },
        rows="".join(
            f"INSERT INTO {table} SELECT t, i, 'loaded {table}' FROM generate_series(97, 102) t, generate_series(1, 20) i;"
            for table in (
                '"Odd.Schema"."a ""b"" c.d"',
                f'"{LONG}"',
                f'"{LONG[:-1]}y"',
                "sales.things",
                "things",
                '"table"',
                '"Things"',
            )
        ),
        keys=("99", "100", "101"),
        writes=tuple(
            f"INSERT INTO {table} VALUES ($key, 1000 + $n, 'new');"
            f" UPDATE {table} SET {note} = left({note}, 20) || $n WHERE {key} = $key AND {id_} % 5 = $n % 5;"
            f" DELETE FROM {table} WHERE {key} = $key AND {id_} = 998 + $n"
            for table, key, id_, note in (
                ('"Odd.Schema"."a ""b"" c.d"', '"Ten.ant ""x"""', '"ID %s"', '"no te"'),
                (f'"{LONG}"', "tenant", f'"{LONG}"', "note"),
                (f'"{LONG[:-1]}y"', "tenant", f'"{LONG}"', "note"),
                ("sales.things", "tenant", '"select"', '"user"'),
                ("things", "tenant", '"select"', '"user"'),
                ('"table"', '"order"', '"select"', '"user"'),
                ('"Things"', "tenant", '"select"', '"user"'),
            )
        ),
        says='a part with a dot or a quote stands in double quotes: `"\\"Odd.Schema\\".things" = "tenant"`',
    ),
    Case(
        kind="tables and columns that are called as ours are",
        group="Names",
        schema='CREATE TABLE batch (p0 bigint, shardmove_place bigint, "position" text, PRIMARY KEY (shardmove_place, p0));'
        " CREATE TABLE journal_m1_1 (tenant bigint, after bigint, upto text, PRIMARY KEY (tenant, after));"
        ' CREATE TABLE "position" (p1 bigint, p0 bigint, b text, PRIMARY KEY (p1, p0))',
        tables={"batch": "p0", "journal_m1_1": "tenant", "position": "p1"},
        rows="".join(
            f"INSERT INTO {table} SELECT t, i, 'loaded' FROM generate_series(97, 102) t, generate_series(1, 60) i;"
            for table in ("batch", "journal_m1_1", '"position"')
        ),
        keys=("99", "100", "101"),
        writes=tuple(
            f"INSERT INTO {table} VALUES ($key, 1000 + $n, 'new');"
            f" UPDATE {table} SET {note} = left({note}, 20) || $n WHERE {key} = $key AND {id_} % 5 = $n % 5;"
            f" DELETE FROM {table} WHERE {key} = $key AND {id_} = 998 + $n"
            for table, key, id_, note in (
                ("batch", "p0", "shardmove_place", '"position"'),
                ("journal_m1_1", "tenant", "after", "upto"),
                ('"position"', "p1", "p0", "b"),
            )
        ),
    ),
)


# --- servers and tables as a whole

MIXED: Final = {
    "schema": "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TABLE countries (code text PRIMARY KEY, name text);"
    " CREATE TABLE things (tenant bigint, id bigint GENERATED BY DEFAULT AS IDENTITY, feels mood NOT NULL DEFAULT 'ok',"
    " country text REFERENCES countries, more jsonb, doubled bigint GENERATED ALWAYS AS (id * 2) STORED,"
    " PRIMARY KEY (tenant, id));"
    " CREATE TABLE parts (tenant bigint, thing bigint, at date, price numeric(10, 2) CHECK (price > 0), tags text[],"
    " PRIMARY KEY (tenant, thing, at), FOREIGN KEY (tenant, thing) REFERENCES things) PARTITION BY RANGE (at);"
    " CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');"
    " CREATE TABLE parts_rest PARTITION OF parts DEFAULT",
    "tables": {"things": "tenant", "parts": "tenant"},
    "reference_tables": ("countries",),
    "everywhere": "INSERT INTO countries VALUES ('nl', 'Nederland')",
    "rows": "INSERT INTO things (tenant, id, country, more) SELECT t, i, 'nl', '{\"a\": 1.0}'"
    " FROM generate_series(95, 104) t, generate_series(1, 20) i;"
    " INSERT INTO parts SELECT t, i, date '2025-12-25' + i, i, ARRAY['a', NULL]"
    " FROM generate_series(95, 104) t, generate_series(1, 20) i",
    "keys": ("99", "100", "101"),
    "moving": "100:",
    "writes": (
        "INSERT INTO things (tenant, id, more) VALUES ($key, 1000 + $n, '[1, 2.50]');"
        " INSERT INTO parts VALUES ($key, 1000 + $n, '2026-02-03', $n, '{}')",
        "UPDATE things SET feels = 'sad', more = more || to_jsonb($n) WHERE tenant = $key AND id = 1 + $n % 20",
        "UPDATE parts SET price = price + 0.01, at = at + 30 WHERE tenant = $key AND thing = 1 + $n % 20",
        "DELETE FROM parts WHERE tenant = $key AND thing = 998 + $n; DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
    ),
}

SERVERS: Final = (
    Case(kind="PostgreSQL 15 → 18", group="Servers", servers={"s1": "old1", "shadow": "old1"}, **MIXED),
    Case(kind="PostgreSQL 18 → 15", group="Servers", servers={"s2": "old2"}, **MIXED),
    Case(kind="PostgreSQL 15 → 15, the catalog on 15", group="Servers", servers={**OLD, "cat": "old2"}, **MIXED),
    Case(kind="two databases of one server", group="Servers", servers={"s2": "s1", "cat": "s1"}, **MIXED),
    refused(
        "one database named as two shards",
        PLAIN,
        "are the same database: a shard is named twice",
        group="Servers",
        target_is_source=True,
    ),
    refused(
        "an unlogged table",
        PLAIN.replace("CREATE TABLE", "CREATE UNLOGGED TABLE"),
        "is unlogged: a crash would empty it",
        group="Tables",
    ),
    refused("a view", "CREATE VIEW things AS SELECT 1::bigint AS tenant", "things on s1 is a view", group="Tables"),
    refused(
        "a foreign table",
        "CREATE FOREIGN TABLE things (tenant bigint NOT NULL, id bigint NOT NULL) SERVER far",
        "things on s1 is a foreign table",
        prepared="CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER far FOREIGN DATA WRAPPER nothing;"
        " GRANT USAGE ON FOREIGN SERVER far TO PUBLIC",
        group="Tables",
    ),
)

CASES: Final = (
    *KEYS, *BY_HASH, *KEYSETS, *NO_KEY, *PARTITIONS, *CONSTRAINTS, *COLUMNS, *TYPES, *NAMES, *SERVERS,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_kind(case: Case, make_database: MakeDatabase) -> None:
    run_case(case, make_database)


def test_the_page_of_kinds_is_that_of_the_cases() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CASES), "python -m tests.test_kinds"


if __name__ == "__main__":
    PAGE.write_text(page(CASES), encoding="utf-8")
