"""The shape of the cluster: its shards and keyspaces, as the configuration last said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from shardmove.catalog.routes import RouteTables, as_json
from shardmove.catalog.session import without_secrets
from shardmove.config import Config
from shardmove.domain.errors import NotFound, Refused
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.points import Effect


class Shape(RouteTables):
    def shards(self) -> dict[str, str]:
        """Each shard's dsn, without a password."""
        return dict(self._rows("SELECT name, dsn FROM shardmove_catalog.shard ORDER BY name"))

    def keyspaces(self) -> dict[str, Keyspace]:
        rows = self._rows(
            """SELECT k.name, k.key_type, k.scheme, k.reference_tables,
                      coalesce(jsonb_object_agg(t.table_name, t.key_column) FILTER (WHERE t.keyspace IS NOT NULL), '{}')
               FROM shardmove_catalog.keyspace k LEFT JOIN shardmove_catalog.keyspace_table t ON t.keyspace = k.name
               GROUP BY k.name ORDER BY k.name"""
        )
        return {row[0]: as_keyspace(*row) for row in rows}

    def keyspace(self, name: str) -> Keyspace:
        """Raises NotFound, with names that are close."""
        found = self.keyspaces()
        if name not in found:
            raise NotFound(f"there is no keyspace {name}", hint=close_to(name, found))
        return found[name]

    def apply(self, config: Config) -> list[str]:
        """Makes the catalog say what the configuration says; a line for each thing that it changed.

        First routes are published where a keyspace is new; after that the catalog owns them. One transaction.

        Raises Refused, and changes nothing, where a shard to drop owns a range or is in an unfinished move, a keyspace
        to drop ever had a move, a keyspace's key type or scheme differs, or the tables differ while it has unfinished
        moves. Safe to repeat.
        """
        with self._transaction(Effect.APPLY):
            # Whoever publishes or makes a plan waits for this row: what is read below stays true until the commit.
            base = self._value("SELECT epoch FROM shardmove_catalog.cluster FOR NO KEY UPDATE")
            present = self.keyspaces()
            changes = [
                *self._put_shards(config),
                *self._drop_keyspaces(present, config),
                *self._put_keyspaces(present, config),
                *self._publish_first(present, config, base),
                *self._drop_shards(config),
            ]
            if changes:
                self.record("applied", changes=changes)
        if changes:
            self._published()
        return changes

    def _put_shards(self, config: Config) -> Iterator[str]:
        present = self.shards()
        for name, given in config.shards.items():
            dsn = without_secrets(given, f"the shard {name}")
            if present.get(name) == dsn:
                continue
            self._rows(
                """INSERT INTO shardmove_catalog.shard (name, dsn) VALUES (%s, %s)
                   ON CONFLICT (name) DO UPDATE SET dsn = excluded.dsn""",
                (name, dsn),
            )
            yield f"shard {name}: dsn changed" if name in present else f"shard {name} added"

    def _drop_shards(self, config: Config) -> Iterator[str]:
        for name in self.shards():
            if name not in config.shards:
                self._rows("DELETE FROM shardmove_catalog.shard WHERE name = %s", (name,))
                yield f"shard {name} dropped"

    def _drop_keyspaces(self, present: Mapping[str, Keyspace], config: Config) -> Iterator[str]:
        for name in present:
            if name in config.keyspaces:
                continue
            if self._value("SELECT id FROM shardmove_catalog.move WHERE keyspace = %s LIMIT 1", (name,)):
                raise Refused(
                    f"the keyspace {name} cannot be dropped: its moves are history that the catalog keeps",
                    hint=f"put [keyspaces.{name}] back into the configuration",
                )
            self._rows("DELETE FROM shardmove_catalog.keyspace WHERE name = %s", (name,))
            yield f"keyspace {name} dropped"

    def _put_keyspaces(self, present: Mapping[str, Keyspace], config: Config) -> Iterator[str]:
        for name, given in config.keyspaces.items():
            if name not in present:
                self._rows(
                    "INSERT INTO shardmove_catalog.keyspace (name, key_type, scheme) VALUES (%s, %s, %s)",
                    (name, given.key_type.value, given.scheme),
                )
                self._put_tables(given)
                yield f"keyspace {name} added"
            elif present[name] != given:
                self._refuse_reshaping(present[name], given)
                self._put_tables(given)
                yield f"keyspace {name}: tables changed"

    def _refuse_reshaping(self, present: Keyspace, given: Keyspace) -> None:
        name = given.name
        if (present.key_type, present.scheme) != (given.key_type, given.scheme):
            raise Refused(
                f"the keyspace {name} is {present.scheme} of {present.key_type}; it cannot become {given.scheme} of "
                f"{given.key_type}",
                hint="make a new keyspace",
            )
        self._rows("SELECT FROM shardmove_catalog.keyspace WHERE name = %s FOR NO KEY UPDATE", (name,))
        unfinished = self._rows(
            "SELECT id FROM shardmove_catalog.move WHERE keyspace = %s AND NOT is_finished ORDER BY created_at", (name,)
        )
        if unfinished:
            raise Refused(
                f"the tables of {name} cannot change: {', '.join(row[0] for row in unfinished)} is unfinished",
                hint="complete it or roll it back first",
            )

    def _put_tables(self, given: Keyspace) -> None:
        self._rows(
            "UPDATE shardmove_catalog.keyspace SET reference_tables = %s WHERE name = %s",
            ([str(table) for table in given.reference_tables], given.name),
        )
        self._rows("DELETE FROM shardmove_catalog.keyspace_table WHERE keyspace = %s", (given.name,))
        for table, column in given.tables.items():
            self._rows(
                "INSERT INTO shardmove_catalog.keyspace_table (keyspace, table_name, key_column) VALUES (%s, %s, %s)",
                (given.name, str(table), column),
            )

    def _publish_first(self, present: Mapping[str, Keyspace], config: Config, base: int) -> Iterator[str]:
        first = [config.first_routes[name] for name in config.keyspaces if name not in present]
        if first or set(present) - set(config.keyspaces):
            self._rows("SELECT shardmove_catalog.publish(%s, %s, %s)", (base, "configuration applied", as_json(*first)))
        for routes in first:
            yield f"keyspace {routes.keyspace}: first routes published"


def as_keyspace(
    name: str, key_type: str, scheme: str, reference_tables: list[str], tables: Mapping[str, str]
) -> Keyspace:
    """A row of the catalog as a value, its tables in the order of their names."""
    return Keyspace(
        name,
        KeyType(key_type),
        Scheme(scheme),
        {TableName.parse(table): tables[table] for table in sorted(tables)},
        tuple(map(TableName.parse, reference_tables)),
    )


def close_to(name: str, known: Mapping[str, object] | list[str]) -> str:
    """A hint: the names that are close, else all of them."""
    close = get_close_matches(name, list(known), 3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(list(known)[:20])}" if known else "there are none yet"
