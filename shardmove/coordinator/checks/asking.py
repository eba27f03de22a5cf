"""How the checks of tables ask: a question goes to a whole family at once, and a line names all that it finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, LiteralString

from shardmove.coordinator.checks.site import Note, Problem, Site
from shardmove.domain.moves import TableName
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import MADE_OF

NAMED_MAX: Final = 10
"""A line names that many of its problems, and counts the others."""

# `family`: the tables of the keyspace that are there, and their partitions at every level. `root`, the table itself,
# has is_root. What inherits from a plain table is not in it: it is to be named in the keyspace.
_FAMILY: Final[LiteralString] = """
    WITH RECURSIVE family(schema_name, table_name, root, key_column, oid, is_root) AS (
        SELECT n.nspname::text, c.relname::text, c.oid, m.key_column, c.oid, true
        FROM unnest(%(schemas)s::text[], %(names)s::text[], %(keys)s::text[]) AS m(schema, name, key_column)
        JOIN pg_catalog.pg_namespace n ON n.nspname = m.schema
        JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = m.name AND c.relkind IN ('r', 'p')
        UNION ALL
        SELECT f.schema_name, f.table_name, f.root, f.key_column, i.inhrelid, false
        FROM family f JOIN pg_catalog.pg_class p ON p.oid = f.oid AND p.relkind = 'p'
        JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid
    )"""

# `used`: the types of all columns of the tables, and what these types are made of, down to the ground.
USED_TYPES: Final[LiteralString] = (
    """, used(root, attname, oid) AS (
        SELECT f.root, a.attname, a.atttypid FROM family f
        JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid AND a.attnum > 0 AND NOT a.attisdropped WHERE f.is_root
        UNION
        SELECT u.root, u.attname, made_of.oid FROM used u JOIN pg_catalog.pg_type t ON t.oid = u.oid
        CROSS JOIN LATERAL """
    + MADE_OF
    + """
    )"""
)


def ask(
    connection: Connection, tables: Mapping[TableName, str], query: LiteralString, **values: object
) -> list[tuple[Any, ...]]:
    """The rows of a query that goes on from the CTE `family`. Names in it come quoted: the search_path is empty."""
    listed = {
        "schemas": [name.schema for name in tables],
        "names": [name.name for name in tables],
        "keys": list(tables.values()),
    }
    return connection.execute(_FAMILY + query, {**listed, **values}).fetchall()


def gathered(found: Iterable[Problem]) -> Problem | None:
    """All that one line found, as one: what stands in the way, or else what should be known."""
    listed = list(found)
    chosen = [each for each in listed if not isinstance(each, Note)] or listed
    if not chosen:
        return None
    named = chosen[:NAMED_MAX]
    more = f"; and {len(chosen) - len(named)} more" if len(chosen) > len(named) else ""
    hints = dict.fromkeys(line for each in named for line in (each.hint or "").splitlines())
    return type(chosen[0])("; ".join(dict.fromkeys(each.message for each in named)) + more, "\n".join(hints) or None)


def shown(relation: object) -> str:
    """A relation as messages name it, from the server's quoted, qualified name."""
    return str(relation).removeprefix("public.")


def entry(site: Site) -> str:
    """The place in the configuration that names the tables."""
    return f"[keyspaces.{site.move.keyspace.name}.tables]"
