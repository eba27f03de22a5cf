"""Names of schemas, tables and columns."""

from __future__ import annotations

from typing import Final

from tests.support.cases import Case

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
            f"INSERT INTO {table} SELECT t, i, 'loaded {table}'"
            " FROM generate_series(97, 102) t, generate_series(1, 20) i;"
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
        schema="CREATE TABLE batch"
        ' (p0 bigint, row_number bigint, "position" text, PRIMARY KEY (row_number, p0));'
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
                ("batch", "p0", "row_number", '"position"'),
                ("journal_m1_1", "tenant", "after", "upto"),
                ('"position"', "p1", "p0", "b"),
            )
        ),
    ),
)
