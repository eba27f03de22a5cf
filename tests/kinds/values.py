"""Types of columns, each with the values that are easily spoilt on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tests.kinds.shapes import OLD
from tests.support.cases import Case, literal


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
    "emoji \U0001f600\U0001f469\u200d\U0001f467, 4 bytes \U0010ffff, \uffff, combining e\u0301, \u202eleft, BOM \ufeff",
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
        before="CREATE TYPE mood AS ENUM ('sad', 'it''s, \"ok\"');"
        " CREATE DOMAIN positive AS numeric(8, 2) CHECK (VALUE > 0);"
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
        schema="CREATE TABLE things"
        " (tenant bigint, id bigint, n int, data bytea, words text, PRIMARY KEY (tenant, id));"
        " ALTER TABLE things ALTER data SET STORAGE EXTERNAL",
        rows="INSERT INTO things SELECT t, i, i, '\\x00', 'small'"
        " FROM generate_series(99, 100) t, generate_series(1, 60) i;"
        " UPDATE things SET data = decode(repeat('00ff5c0a', 13107200), 'hex') WHERE tenant = 100 AND id = 30;"
        " UPDATE things SET words = repeat(E'é\\\\\\n\\t😀', 5500000) WHERE tenant = 100 AND id = 50",
        keys=("99", "100"),
        writes=(
            "UPDATE things SET n = n + 1 WHERE tenant = $key AND id < 20",
            "UPDATE things SET n = n + 1 WHERE tenant = $key AND id = CASE $n % 100 WHEN 2 THEN 30 WHEN 52 THEN 50 END",
        ),
        pause_s=0.01,
    ),
)
