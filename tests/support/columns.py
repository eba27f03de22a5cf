"""What random schemas are made of: names, keys, and types of columns with odd values of each.

A value is the text that PostgreSQL reads; `value` writes it as SQL. `{n}` in an identity is a row's number, as
SQL: each gives another value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shardmove.domain.keys import KeyType

TABLE_NAMES: Final = (
    "things",
    "Things",
    "order",
    "tab 1",
    'qu"ote',
    "a.b",
    "%s",
    "%(x)s{y}",
    "Ünïcode 漢",
    "l" * 63,
    "new",
    "back\\slash",
    "it's",
    "journal",
    "fence",
    "$$",
)
COLUMN_NAMES: Final = (
    "tenant",
    "Tenant",
    "from",
    "tenant id",
    'a"b',
    "%",
    "{0}",
    "é",
    "c" * 63,
    "old",
    "ordinal",
    "it's",
    "xid",
    "row",
    "user",
    "k.ey",
)
SCHEMA_NAMES: Final = ("public", "shop", "Other Schema", "Select", 'odd"%s')

KEYS: Final[Mapping[KeyType, tuple[str, ...]]] = {
    KeyType.SMALLINT: ("-32768", "-300", "-1", "0", "1", "7", "99", "32767"),
    KeyType.INTEGER: ("-2147483648", "-40000", "-1", "0", "12", "13", "70000", "2147483647"),
    KeyType.BIGINT: ("-9223372036854775808", "-5000000000", "-1", "0", "41", "42", "43", "9223372036854775807"),
    KeyType.TEXT: ("", " ", "A", "B", "a", "a:b", 'b"c', "b'c", "back\\slash", "z", "{}%s", "ä", "é", "漢", "🐘"),
    KeyType.UUID: (
        "00000000-0000-0000-0000-000000000000",
        "12345678-1234-4234-8234-123456789abc",
        "7fffffff-ffff-4fff-bfff-ffffffffffff",
        "80000000-0000-4000-8000-000000000000",
        "c0ffee00-0000-4000-8000-00000000cafe",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ),
    KeyType.DATE: ("0001-01-01", "1582-10-15", "1999-12-31", "2000-01-01", "2024-02-29", "2026-11-21", "9999-12-31"),
    KeyType.TIMESTAMPTZ: (
        "0001-01-02 00:00:00+00:00",
        "1969-12-31 23:59:59.999999+00:00",
        "2000-01-01 00:00:00+00:00",
        "2024-03-31 01:30:00+00:00",
        "2024-03-31 01:30:00.000001+00:00",
        "2026-11-21 12:00:00+00:00",
    ),
}
LOADED_KEYS: Final[Mapping[KeyType, tuple[str, ...]]] = {
    KeyType.DATE: ("-infinity", "infinity", "0044-03-15 BC", "20240-01-01"),
    KeyType.TIMESTAMPTZ: ("-infinity", "infinity", "0044-03-15 12:00:00+00 BC", "20240-01-01 00:00:00+00"),
}
"""Keys that no range can name, and no client writes: rows that are there from the beginning."""

KEY_COLUMNS: Final[Mapping[KeyType, tuple[str, ...]]] = {
    KeyType.SMALLINT: ("smallint",),
    KeyType.INTEGER: ("integer", "integer", "smallint"),
    KeyType.BIGINT: ("bigint", "bigint", "integer", "smallint"),
    KeyType.TEXT: ("text", "text", "varchar", "varchar(40)"),
    KeyType.UUID: ("uuid",),
    KeyType.DATE: ("date",),
    KeyType.TIMESTAMPTZ: ("timestamptz",),
}
SMALL: Final[Mapping[str, int]] = {"smallint": 2**15, "integer": 2**31}

COLLATIONS: Final = ('"C"', '"POSIX"', '"C.utf8"', '"ucs_basic"')
COLLATIONS_18: Final = ('"pg_c_utf8"', '"pg_unicode_fast"')
COLLATIONS_ICU: Final = ('"de-x-icu"', '"und-x-icu"', '"tr-x-icu"')

IDENTITIES: Final[Mapping[str, str]] = {
    "bigint": "({n})::bigint",
    "integer": "-({n})::integer",
    "uuid": "md5(({n})::text)::uuid",
    "text": "chr(65 + (({n}) % 58)::integer) || ({n})::text",
    'text COLLATE "C"': "'é\\ ''' || ({n})::text",
    "varchar(30)": "'v' || ({n})::text || ' '",
    "char(12)": "(({n})::text)::char(12)",
    "name": "('n' || ({n})::text)::name",
    "numeric": "(({n})::text || '.' || repeat('0', 1 + (({n}) % 4)::integer))::numeric",
    "double precision": "({n})::double precision / 3",
    "timestamptz": "'2024-01-01 00:00+00'::timestamptz + ({n}) * interval '1.000001 second'",
    "timestamp(3)": "'2024-01-01 00:00'::timestamp + ({n}) * interval '1 second'",
    "date": "'2000-01-01'::date + ({n})::integer",
    "interval": "({n}) * interval '1 hour'",
    "bytea": "decode(lpad(to_hex(({n})::integer), 8, '0'), 'hex')",
    "inet": "'10.0.0.0'::inet + ({n})::bigint",
    "macaddr": "(lpad(to_hex(({n})::integer), 12, '0'))::macaddr",
    "integer[]": "ARRAY[({n})::integer, NULL, 7]",
    "text[]": "ARRAY['a,b', ({n})::text]",
    "jsonb": "jsonb_build_object('k', ({n}))",
    "int4range": "int4range(({n})::integer, ({n})::integer + 2)",
    "bit(32)": "(({n})::integer)::bit(32)",
    "pg_lsn": "'0/0'::pg_lsn + ({n})::numeric",
    "money": "(({n})::bigint)::money",
    "{pair}": "ROW(({n})::integer, 'x')::{pair}",
    "{label}": "('L' || ({n})::text)::{label}",
}
"""Types of a column that tells rows of one key apart. In braces: types of the schema's own."""

EQUAL: Final[Mapping[str, str]] = {
    "numeric": "round({id}, 1 + $n % 5)",
    "interval": "CASE WHEN $n % 4 < 2 THEN justify_hours({id}) ELSE extract(epoch FROM {id}) * interval '1 second' END",
}
"""The same identity in another text."""

VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "smallint": ("-32768", "0", "32767"),
    "integer": ("-2147483648", "0", "2147483647"),
    "bigint": ("-9223372036854775808", "9223372036854775807"),
    "numeric": ("0.00", "1.5", "1.500", "NaN", "Infinity", "-Infinity", "1e-30", "98765432109876543210.0123456789"),
    "numeric(12,3)": ("1.5", "-999999999.999", "NaN"),
    "numeric(3,-2)": ("12300", "0"),
    "real": ("NaN", "-0", "1e-45", "3.4028235e38", "Infinity"),
    "double precision": ("-0", "NaN", "5e-324", "0.1", "1.7976931348623157e308", "-Infinity"),
    "text": (
        "",
        " ",
        "\\N",
        "\\.",
        "a\tb\nc\rd\\",
        'it\'s "é ü" 漢字 🐘 e\u0301',
        "NULL",
        "\x01\x7f",
        "{}",
        "%s %(x)s {x}",
        "long " * 600,
    ),
    "varchar(20)": ("", "trailing   ", "ÄÖÜ"),
    "char(7)": ("", "a", "abc\\ d"),
    '"char"': ("x", "\\"),
    "name": ("Name", ""),
    "bytea": ("\\x", "\\x00ff5c27", "\\x" + "0abc" * 1500),
    "boolean": ("t", "f"),
    "date": ("infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "2024-02-29"),
    "timestamp": ("infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999"),
    "timestamptz": ("infinity", "2024-03-31 02:30:00+01", "1883-11-18 12:03:58 America/New_York"),
    "timestamptz(2)": ("2024-01-01 00:00:00.129+00",),
    "time": ("24:00:00", "00:00:00", "12:34:56.789012"),
    "timetz": ("23:59:59.999999+15:59", "12:00-08"),
    "interval": ("1 mon -1 day +25:00", "-178000000 years", "00:00:00.000001"),
    "interval day to second(2)": ("1 day 00:00:01.239",),
    "uuid": ("00000000-0000-0000-0000-000000000000", "{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}"),
    "json": ('{ "a": 1,  "a": 2, "b": [1.50, null] }', '"\\u00e9\\n"', "null"),
    "jsonb": ('{"a": 1.50, "b": null}', "null", '"\\u00e9\\n\\\\"', "[1e400]"),
    "jsonpath": ('$.a[*] ? (@.b > 1)."c d"',),
    "integer[]": ("{}", "{NULL,1}", "[2:3]={5,6}", "{{1,2},{3,4}}"),
    "text[]": ('{"a,b","NULL",NULL,"\\"",""}', "{}", '{"{}","\\\\"}'),
    "numeric[]": ("{NaN,1.10,NULL}",),
    "bytea[]": ('{"\\\\x00","\\\\x"}',),
    "timestamptz[]": ('{infinity,"2024-01-01 00:00:00+00"}',),
    "jsonb[]": ('{"{\\"a\\": \\"\\\\\\"b\\"}",null}',),
    "int4range": ("empty", "[1,5)", "(,)", "(3,7]"),
    "numrange": ("[1.10,1.100]", "(,NaN]", "empty"),
    "tstzrange": ("[2024-01-01 00:00+00,infinity)", "(,)"),
    "int8multirange": ("{}", "{[1,3),[5,9)}"),
    "datemultirange": ("{[2024-01-01,infinity)}", "{(,)}"),
    "inet": ("10.1.2.3/8", "::1", "::ffff:1.2.3.4/120"),
    "cidr": ("10.0.0.0/8", "2001:db8::/32"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "bit(5)": ("10101", "00000"),
    "bit varying(9)": ("", "1", "010101010"),
    "point": ("(1,2)", "(-0,NaN)", "(Infinity,1e-300)"),
    "line": ("{1,-1,0.5}",),
    "lseg": ("[(0,0),(1,0.1)]",),
    "box": ("(3,4),(1,2)",),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1),(2,0))"),
    "polygon": ("((0,0),(1,1),(2,0))",),
    "circle": ("<(0.1,0.2),3>",),
    "tsvector": ("'a':1A 'b c':2,3 'it''s'", ""),
    "tsquery": ("'a' & !'b' <-> 'c':*A", ""),
    "regclass": ("pg_class", "pg_catalog.pg_type"),
    "regtype": ("integer", "text[]"),
    "regproc": ("pg_sleep",),
    "regprocedure": ("lower(text)",),
    "regconfig": ("simple",),
    "regnamespace": ("pg_catalog",),
    "regcollation": ('"C"',),
    "money": ("12.34", "-1"),
    "oid": ("0", "4294967295"),
    "xid8": ("18446744073709551615",),
    "pg_lsn": ("FFFFFFFF/FFFFFFFF", "0/0"),
    "pg_snapshot": ("10:20:10,14,15",),
    "int2vector": ("1 2 3", ""),
    "oidvector": ("16 23",),
    "{mood}": ("sad", "so so", "Ünfroh", "it's"),
    "{mood}[]": ('{sad,"so so",NULL}',),
    "{positive}": ("1", "2147483647"),
    "{label}": ("Label", "L with \\ and é"),
    "{vector}": ("{1,2,NULL}", "{}"),
    "{pair}": ('(1,"a,b")', "(,)", '(,"\\"\\\\")'),
    "{pair}[]": ('{"(1,\\"a,b\\")","(,)",NULL}',),
    "{floats}": ("[0.1,0.3)", "empty", "(,NaN)"),
    "{nested}": ('("(1,x)","{sad}","[1,2)")', "(,,)"),
}
VALUES_17: Final[Mapping[str, tuple[str, ...]]] = {"interval": ("infinity", "-infinity")}
VALUES_15: Final[Mapping[str, tuple[str, ...]]] = {
    "xml": ("<a b='c'>é<!-- x --></a>", "text only"),
    "citext": ("CiText", "citext"),
    "hstore": ('"a b"=>"1", "n"=>NULL',),
}
"""Types of servers with the usual extensions, and with libxml."""

FUNCTIONS: Final = (
    "CREATE FUNCTION public.inner_{0}(integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 > -2000000000'",
    "CREATE FUNCTION public.outer_{0}(integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS"
    " 'BEGIN RETURN inner_{0}($1); END'",
)
OWN_TYPES: Final = (
    "CREATE TYPE {mood} AS ENUM ('sad', 'so so', 'it''s', 'Ünfroh')",
    "CREATE DOMAIN {positive} AS integer CHECK (VALUE > 0)",
    "CREATE DOMAIN {label} AS text CHECK (length(VALUE) < 1000) NOT NULL DEFAULT 'Label'",
    "CREATE DOMAIN {vector} AS integer[] CHECK (coalesce(array_length(VALUE, 1), 0) < 10)",
    "CREATE TYPE {pair} AS (a integer, \"B b\" text)",
    "CREATE TYPE {floats} AS RANGE (subtype = double precision)",
    "CREATE TYPE {nested} AS (p {pair}, m {mood}[], r int4range)",
)  # fmt: skip


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def value(text: str, type_: str) -> str:
    return "'" + text.replace("'", "''") + f"'::{type_}"
