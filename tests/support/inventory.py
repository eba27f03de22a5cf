"""What is in a database, told by the server: every object of every catalog, by its kind and name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import psycopg

_CATALOGS: Final = """
    SELECT c.oid::regclass::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'oid'
    WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind = 'r' AND NOT c.relisshared
      AND c.oid NOT IN ('pg_largeobject_metadata'::regclass) ORDER BY 1
"""
_SHARED: Final = """
    SELECT 'role ' || rolname FROM pg_roles UNION ALL
    SELECT 'replication slot ' || slot_name FROM pg_replication_slots UNION ALL
    SELECT 'setting ' || array_to_string(setconfig, ' ') FROM pg_db_role_setting UNION ALL
    SELECT 'origin ' || roname FROM pg_replication_origin UNION ALL
    SELECT 'large object ' || oid FROM pg_largeobject_metadata
"""
_PART_OF: Final = re.compile(r"(?:table constraint|default value|index|rule) .*\bshardmove(?:_catalog)?\.")


def inventory(dsn: str) -> set[str]:
    """`kind name` of everything that is there, the system's own objects too."""
    found: set[str] = set()
    with psycopg.connect(dsn, autocommit=True) as connection:
        for (catalog,) in connection.execute(_CATALOGS).fetchall():
            query = (
                "SELECT o.type || ' ' || o.identity"
                f" FROM {catalog} AS c, pg_identify_object('{catalog}'::regclass, c.oid, 0) AS o"
                " WHERE o.identity IS NOT NULL"
            )
            found |= {row[0] for row in connection.execute(query.encode()).fetchall()}
        found |= {row[0] for row in connection.execute(_SHARED).fetchall()}
    return found


def added(before: Iterable[str], now: Iterable[str]) -> set[str]:
    """What came since; without what a table of ours has of its own: row type, toast, indexes, constraints, defaults."""
    new = set(now) - set(before)
    names = {each.split(" ", 1)[1] for each in new if each.startswith(("table ", "view ", "sequence "))}
    return {each for each in new if not _belongs(each, names)}


def _belongs(each: str, names: set[str]) -> bool:
    kind, name = each.split(" ", 1)
    if kind == "type":
        return name.removesuffix("[]") in names
    return each.startswith("toast table ") or "pg_toast." in each or _PART_OF.match(each) is not None
