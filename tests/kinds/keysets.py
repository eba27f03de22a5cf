"""What batches are cut by: primary keys and other unique keys, and tables that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardmove.domain.keys import KeyType
from tests.kinds.shapes import OLD, refused, shaped
from tests.support.cases import Case, literal

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
                f" INSERT INTO {table} VALUES ($key, {each}, 'again')"
                " ON CONFLICT (k, tenant) DO UPDATE SET k = EXCLUDED.k"
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
        "UPDATE things SET amount = amount::numeric(20, 4), code = code || ''''"
        " WHERE tenant = $key AND amount = $n / 100.0",
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
        "",
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
        before="CREATE TYPE mood AS ENUM ('sad', 'ok', 'it''s');"
        " CREATE DOMAIN positive AS numeric NOT NULL CHECK (VALUE > 0);"
        " CREATE TYPE point2 AS (x int, y int);",
    ),
)


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
