"""What the cases of several groups are made of."""

from __future__ import annotations

from typing import Any, Final

from tests.support.cases import Case

OLD: Final = {"s1": "old1", "s2": "old2", "shadow": "old1"}
"""Kinds that only the older servers' installation has the libraries for: ICU, libxml, btree_gist."""
ICU: Final = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.utf8'"


PLAIN: Final = "CREATE TABLE things (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id))"


def refused(kind: str, schema: str, text: str, **more: Any) -> Case:
    return Case(kind=kind, schema=schema, refused=text, **{"group": "Keys of tables", **more})


def shaped(kind: str, columns: str, insert: str, *more_writes: str, rows: str, **more: Any) -> Case:
    """One table `things`. `insert`: the values of a new row; `rows`: those of many, of a key t and a number i."""
    options: dict[str, Any] = {
        "group": "Keys of tables",
        "schema": f"CREATE TABLE things ({columns})",
        "rows": f"INSERT INTO {more.pop('into', 'things')} SELECT {rows}"
        " FROM generate_series(95, 104) t, generate_series(1, 25) i",
        "writes": (f"INSERT INTO things VALUES ({insert})", *more_writes),
        "keys": ("99", "100", "101"),
        "moving": "100:",
    }
    return Case(kind=kind, **{**options, **more})
