"""Random schemas: a seed makes a whole case, out of the kinds of keys, tables, columns and constraints that there are.

    generated = generate(seed)          # pure: the same seed, the same case
    generated.case                      # what the harness of kinds runs
    generated.kinds                     # what it is made of, as words
    generated.refused                   # what was put in that preflight has to refuse; None: nothing

Each table has a key column, an identity that tells the rows of a key apart, and `n`, a number from which the identity
is made: writes find rows by it. Whatever else the table has (partitions, constraints, triggers, …) is drawn for each.
Writes may fail for a constraint: on the shard and on the shadow alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from tests.support import columns as made_of
from tests.support.cases import Case
from tests.support.columns import quoted, value
from tests.support.refusals import Refusal, refusals
from tests.support.relations import FIRST_NEW, Column, Relation

BOTH_OLD: Final = {"s1": "old1", "s2": "old2", "shadow": "old1"}
SERVERS: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    *[("18", {})] * 6,
    ("15 to 18", {"s1": "old1"}),
    ("18 to 15", {"s2": "old2"}),
    *[("15", BOTH_OLD)] * 2,
)

LOCALES_18: Final[tuple[LiteralString, ...]] = (
    "LOCALE 'C.utf8'",
    "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'",
    "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'PG_UNICODE_FAST' LOCALE 'C'",
)
LOCALES_15: Final[tuple[LiteralString, ...]] = (
    "LOCALE 'C.utf8'",
    "LOCALE_PROVIDER icu ICU_LOCALE 'de' LOCALE 'C.utf8'",
    "LOCALE_PROVIDER icu ICU_LOCALE 'tr' LOCALE 'C.utf8'",
)

_COUNTS: Final = """#variable_conflict use_column
BEGIN
    IF TG_OP <> 'INSERT' THEN
        UPDATE {t} AS t SET n = t.n - 1 WHERE t.{k} = OLD.{k};
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO {t} AS t ({k}, n) VALUES (NEW.{k}, 1) ON CONFLICT ({k}) DO UPDATE SET n = t.n + 1;
    END IF;
    RETURN NULL;
END"""
_AUDITS: Final = """#variable_conflict use_column
BEGIN
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO {t} ({k}, n) VALUES (NEW.{k}, NEW.{n});
    ELSE
        INSERT INTO {t} ({k}, n) VALUES (OLD.{k}, -OLD.{n});
    END IF;
    RETURN NULL;
END"""


@dataclass(frozen=True, slots=True)
class Generated:
    """A random case.

    Attributes:
        crossing: writes that bring rows over the end of the range, `$cross`; possible while one shard has all keys.
        refused: the name of what preflight must refuse.
        stops: control points at which runs are cut off, one after the other; and `complete`, where there are any.
        goes_back: the move is rolled back at the first of them, and planned again.
    """

    seed: int
    case: Case
    kinds: tuple[str, ...]
    crossing: tuple[str, ...]
    refused: str | None
    stops: tuple[str, ...]
    goes_back: bool


def generate(seed: int) -> Generated:
    return _Builder(seed).build()


class _Builder:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"schema {seed}")
        self.kinds: list[str] = []
        self.tables: list[Relation] = []
        self.reference_tables: list[TableName] = []
        self.prepared: list[str] = []
        self.preamble: list[str] = []
        self.rows: list[str] = []
        self.after_rows: list[str] = []
        self.everywhere: list[str] = []
        self.crossing: list[str] = []
        self.refusal: Refusal | None = None
        self.named = dict[str, str]()
        self.names = self._shuffled(made_of.TABLE_NAMES)
        self.schemas = self._shuffled(made_of.SCHEMA_NAMES)[: self.rng.randint(1, 3)]
        versions, self.servers = self.rng.choice(SERVERS)
        self.kinds.append(f"PostgreSQL {versions}")
        self.is_old, self.is_new = versions == "15", versions == "18"
        self.locales: dict[str, LiteralString] = {}
        if (self.is_old or self.is_new) and self._sometimes(0.25, "another locale"):
            listed = LOCALES_18 if self.is_new else LOCALES_15
            self.locales = {place: self.rng.choice(listed) for place in ("s1", "s2", "shadow")}

    # --- drawing

    def _shuffled(self, items: Sequence[str]) -> list[str]:
        return self.rng.sample(items, len(items))

    def _sometimes(self, share: float, kind: str = "") -> bool:
        chosen = self.rng.random() < share
        if chosen and kind:
            self.kinds.append(kind)
        return chosen

    def _choice(self, *choices: str) -> str:
        chosen = self.rng.choice(choices)
        self.kinds.append(chosen)
        return chosen

    def _new_name(self) -> TableName:
        return TableName(self.rng.choice(self.schemas), self.names.pop())

    # --- the whole

    def build(self) -> Generated:
        self._keys()
        self._types()
        self.column_names = self._shuffled(made_of.COLUMN_NAMES)
        for _ in range(self.rng.randint(1, 3)):
            self._table()
        if self._sometimes(0.2, "inherited table"):
            self._child_table()
        self._foreign_keys()
        self._effects()
        if self._sometimes(0.12):
            listed = refusals(self.schemas[0], self.key_type, self.keys)
            self.refusal = self.rng.choice(listed)
        stops = tuple(
            stop
            for stop in (
                self.rng.choice(("", "", "", "record_fingerprint.after", "arm.after")),
                self.rng.choice(("", "batch.after", "batch.before", "mark_whole.after")),
                self.rng.choice(("", "", "catch_up.receiver.after", "catch_up.receiver.before")),
                self.rng.choice(("", "verifying.after_comparison")),
            )
            if stop
        )
        return Generated(
            self.seed,
            self._case(),
            tuple(dict.fromkeys(self.kinds)),
            tuple(self.crossing),
            self.refusal.name if self.refusal else None,
            stops,
            self._sometimes(0.5),
        )

    def _case(self) -> Case:
        keys = ", ".join(f"({value(key, str(self.key_type))})" for key in self.loaded)
        for table in self.tables:
            self.rows += table.load(self.rng, keys)
            table.writes += table.write(self.rng)
            self.crossing += table.cross()
        refusal = self.refusal or Refusal("", "")
        unpredictable = {str(each.name): tuple(each.unpredictable) for each in self.tables if each.unpredictable}
        return Case(
            kind=f"seed {self.seed}",
            group="random",
            schema=";\n".join([*self._schema(), *refusal.schema, *refusal.source]),
            target_schema=";\n".join([*self._schema(), *refusal.schema, *refusal.target]),
            prepared=";\n".join(self.prepared),
            tables={
                **{str(each.name): each.key.name for each in self.tables},
                **({refusal.table: "k"} if self.refusal else {}),
            },
            reference_tables=tuple(map(str, self.reference_tables)),
            key_type=self.key_type,
            scheme=self.scheme,
            moving=str(self.range),
            rows=";\n".join([*self.rows, *self.after_rows, *refusal.rows]),
            everywhere=";\n".join(self.everywhere),
            keys=tuple(self.keys),
            writes=tuple(write for each in self.tables for write in each.writes),
            unpredictable=unpredictable,
            servers=self.servers,
            options=self.locales,
            pause_s=0.004,
        )

    # --- keys

    def _keys(self) -> None:
        self.key_type = self.rng.choice(list(KeyType))
        self.scheme = Scheme.HASH if self._sometimes(0.3) else Scheme.RANGE
        self.kinds.append(f"{self.key_type} by {self.scheme}")
        self.key_columns = list(made_of.KEY_COLUMNS[self.key_type])
        narrowest = min((made_of.SMALL.get(each, 2**63) for each in self.key_columns), default=2**63)
        if self._sometimes(0.7):
            self.key_columns = self.key_columns[:1]
            narrowest = made_of.SMALL.get(self.key_columns[0], 2**63)
        pool = [
            text
            for text in made_of.KEYS[self.key_type]
            if not isinstance(key := self.key_type.parse(text), int) or -narrowest <= key < narrowest
        ]
        self.collate = ""
        if self.key_type is KeyType.TEXT and self._sometimes(0.5):
            more = made_of.COLLATIONS_18 if self.is_new else made_of.COLLATIONS_ICU if self.is_old else ()
            self.collate = f"COLLATE {self._choice(*made_of.COLLATIONS, *more)}"
        keyspace = Keyspace("shop", self.key_type, self.scheme, {})
        places = {text: keyspace.place(self.key_type.parse(text)) for text in pool}
        ends: list[Any] = sorted(places.values())
        low = self.rng.randrange(len(ends) - 1)
        high = self.rng.randrange(low + 1, len(ends))
        is_open_below = low == 0 and self._sometimes(0.7)
        is_open_above = not is_open_below and low > 0 and self._sometimes(0.3)
        lower = None if is_open_below or ends[low] == keyspace.bound_type.least else ends[low]
        self.range = KeyRange(lower, None if is_open_above else ends[high])
        inside = [text for text, place in places.items() if place in self.range]
        outside = [text for text in pool if text not in inside]
        self.keys = [*self.rng.sample(inside, min(3, len(inside))), *self.rng.sample(outside, min(2, len(outside)))]
        self.loaded = [*pool, *made_of.LOADED_KEYS.get(self.key_type, ())]

    def _key_column(self) -> Column:
        type_ = self.rng.choice(self.key_columns)
        if self._sometimes(0.1, "key of a domain type"):
            name = self._own_type("key domain")
            strict = " NOT NULL CHECK (VALUE IS NOT NULL)" if self._sometimes(0.4, "domain NOT NULL") else ""
            self.preamble.append(f"CREATE DOMAIN {name} AS {type_} {self.collate}{strict}")
            type_ = name
        else:
            type_ = f"{type_} {self.collate}".rstrip()
        return Column(self.column_names[0] if self._sometimes(0.5) else self._column_name(0), type_, "NOT NULL")

    def _column_name(self, number: int) -> str:
        odd = self.column_names[(number + 1) % len(self.column_names)]
        return odd if self._sometimes(0.2) else f"c{number}"

    # --- types

    def _types(self) -> None:
        self.preamble += [f"CREATE SCHEMA {quoted(name)}" for name in self.schemas if name != "public"]
        own = [part.split("}")[0] for line in made_of.OWN_TYPES for part in line.split("{")[1:]]
        for name in dict.fromkeys(own):
            self.named[name] = self._own_type(name)
        self.preamble += [self._resolved(line) for line in made_of.OWN_TYPES]
        self.plain_names = {self._resolved(type_): type_ for type_ in made_of.VALUES}
        self.values = {self._resolved(type_): texts for type_, texts in made_of.VALUES.items()}
        if self.is_new:
            for type_, texts in made_of.VALUES_17.items():
                self.values[type_] += texts
        if self.is_old:
            self.values |= made_of.VALUES_15
            self.prepared.append(
                "CREATE EXTENSION btree_gist SCHEMA public; CREATE EXTENSION citext SCHEMA public;"
                " CREATE EXTENSION hstore SCHEMA public"
            )

    def _own_type(self, name: str) -> str:
        number = sum(1 for line in self.preamble if line.startswith("CREATE DOMAIN"))
        suffix = f" {number}" if name == "key domain" else ""
        return f"{quoted(self.rng.choice(self.schemas))}.{quoted(name.capitalize() + suffix)}"

    def _resolved(self, text: str) -> str:
        for name, type_ in self.named.items():
            text = text.replace("{" + name + "}", type_)
        return text

    # --- tables

    def _table(self) -> Relation:
        type_, template = self.rng.choice(list(made_of.IDENTITIES.items()))
        form = self.rng.choice(
            ("key, id", "key, id", "id, key", "key, id, n", "key", "unique index", "unique constraint")
        )
        table = Relation(
            self._new_name(),
            self._key_column(),
            Column("n", "integer", "NOT NULL"),
            Column("id", self._resolved(type_), "NOT NULL"),
            self._resolved(template),
            form,
        )
        self.tables.append(table)
        self._payload(table, self.rng.randint(1, 6))
        kind = self.rng.choice(("plain", "plain", "plain", "range", "list", "hash", "nested", "by number"))
        if kind != "plain":
            self._partitions(table, kind)
        self._keyset(table)
        self._uniqueness(table)
        self._generated(table)
        self._check(table)
        self._indexes(table)
        if type_ in made_of.EQUAL:
            equal = made_of.EQUAL[type_].format(id=table.i)
            table.writes.append(
                f"UPDATE {table.sql} SET {table.i} = {equal} WHERE {table.k} = $key AND {table.n} % 2 = $n % 2"
            )
        self.kinds += [f"{kind} table", f"keyset ({table.form})", f"id {type_}"]
        return table

    def _payload(self, table: Relation, count: int) -> None:
        for type_ in self.rng.sample(list(self.values), count):
            values = tuple(value(text, type_) for text in self.values[type_])
            is_nullable = type_ != self.named["label"] and not self._sometimes(0.2)
            default = f"DEFAULT {self.rng.choice(values)}" if self._sometimes(0.3, "default") else ""
            name = self._column_name(len(self.kinds) % 7 + len(table.payload) + 1)
            if name in {column.name for column in table.columns}:
                name = f"p{len(table.payload)}"
            table.payload.append(
                Column(name, type_, "" if is_nullable else "NOT NULL", default, values, is_nullable=is_nullable)
            )
            self.kinds.append(self.plain_names.get(type_, type_))

    def _partitions(self, table: Relation, kind: str) -> None:
        cut = value(self.keys[0], str(self.key_type))
        listed = ", ".join(value(key, str(self.key_type)) for key in self.keys[:2])
        below = {
            "range": [f"FOR VALUES FROM (MINVALUE) TO ({cut})", f"FOR VALUES FROM ({cut}) TO (MAXVALUE)"],
            "list": [f"FOR VALUES IN ({listed})", "DEFAULT"],
            "hash": [f"FOR VALUES WITH (MODULUS 3, REMAINDER {rest})" for rest in range(3)],
            "by number": ["FOR VALUES FROM (MINVALUE) TO (4)", f"FOR VALUES FROM (4) TO ({FIRST_NEW + 40})", "DEFAULT"],
        }
        method = {"range": "RANGE", "list": "LIST", "hash": "HASH", "by number": "RANGE"}
        if kind == "by number":
            table.form = "key, id, n"
        top = "range" if kind == "nested" else kind
        if top == "range" and self._lowest_key(self.keys[0]):
            top = "list"  # no partition can end below the first key
        table.partition_by = f" PARTITION BY {method[top]} ({table.n if top == 'by number' else table.k})"
        nested = f" PARTITION BY HASH ({table.k})" if kind == "nested" else ""
        for number, bounds in enumerate(below[top]):
            part = f"{quoted(table.name.schema)}.{quoted(f'{table.name.name[:50]} {number}')}"
            is_parted = bool(nested) and number == 1
            self._partition(table, part, table.sql, bounds + (nested if is_parted else ""))
            for rest in range(2) if is_parted else ():
                leaf = f'{part[:-1]} {rest}"'
                self._partition(table, leaf, part, f"FOR VALUES WITH (MODULUS 2, REMAINDER {rest})")

    def _lowest_key(self, key: str) -> bool:
        return self.key_type.parse(key) == self.key_type.least

    def _partition(self, table: Relation, part: str, of: str, bounds: str) -> None:
        """A partition is made as one, or as a table with its columns in another order, and attached."""
        if " PARTITION BY" in bounds or self._sometimes(0.6):
            table.parts.append(f"CREATE TABLE {part} PARTITION OF {of} {bounds}")
        else:
            self.kinds.append("attached partition")
            order = self.rng.random()
            table.parts.append(f"\0{order}\0{part}")  # its columns are not all known yet: see `_attached`
            table.parts.append(f"ALTER TABLE {of} ATTACH PARTITION {part} {bounds}")

    def _attached(self, table: Relation, line: str) -> str:
        if not line.startswith("\0"):
            return line
        _, order, part = line.split("\0")
        shuffled = table.columns
        random.Random(order).shuffle(shuffled)
        return f"CREATE TABLE {part} ({', '.join([*(c.ddl(is_partition=True) for c in shuffled), *table.checks])})"

    def _keyset(self, table: Relation) -> None:
        k, i, n = table.k, table.i, table.n
        match table.form:
            case "key, id" if not table.partition_by and self._sometimes(0.1, "deferrable primary key"):
                table.constraints.append(f"PRIMARY KEY ({k}, {i}) DEFERRABLE")
                table.later.append(f"CREATE UNIQUE INDEX ON {table.sql} ({i}, {k})")
                table.form = "deferrable"
            case "key, id":
                include = f" INCLUDE ({n})" if self._sometimes(0.15, "INCLUDE") else ""
                table.constraints.append(f"PRIMARY KEY ({k}, {i}){include}")
            case "id, key":
                table.constraints.append(f"PRIMARY KEY ({i}, {k})")
            case "key, id, n":
                table.constraints.append(
                    f"PRIMARY KEY ({n}, {k}, {i})" if self._sometimes(0.5) else f"PRIMARY KEY ({k}, {i}, {n})"
                )
            case "key":
                table.constraints.append(f"PRIMARY KEY ({k})")
            case "unique index":
                table.later.append(f"CREATE UNIQUE INDEX ON {table.sql} ({k}, {i})")
            case _:
                table.constraints.append(f"UNIQUE ({k}, {i})")

    def _uniqueness(self, table: Relation) -> None:
        """Values that are unique for a key, and change hands in the writes."""
        k, n, t = table.k, table.n, table.sql
        if table.form == "key" or not self._sometimes(0.5):
            return
        table.payload.append(Column("code", "text", values=(), is_written=False))
        partition = f", {n}" if table.is_parted_by_number else ""
        kinds = ["unique", "unique expression", "nulls not distinct", "deferrable unique", "partial unique"]
        if not table.partition_by:
            kinds.append("exclusion by btree")
            if self.is_old:
                kinds.append("exclusion by gist")
        chosen = self._choice(*kinds)
        columns = f"({k}, code{partition})"
        match chosen:
            case "unique":
                table.constraints.append(f"UNIQUE {columns}")
            case "unique expression":
                table.later.append(f"CREATE UNIQUE INDEX ON {t} ({k}, lower(code){partition})")
            case "nulls not distinct":
                table.constraints.append(f"UNIQUE NULLS NOT DISTINCT {columns}")
            case "deferrable unique":
                table.constraints.append(
                    f"UNIQUE {columns} DEFERRABLE INITIALLY {self._choice('DEFERRED', 'IMMEDIATE')}"
                )
                table.writes.append(
                    f"UPDATE {t} SET code = CASE code WHEN 'c1' THEN 'c2' ELSE 'c1' END"
                    f" WHERE {k} = $key AND code IN ('c1', 'c2')"
                )
            case "partial unique":
                table.later.append(f"CREATE UNIQUE INDEX ON {t} ({k}{partition}) WHERE code = 'first'")
                table.writes.append(
                    f"UPDATE {t} SET code = 'second' WHERE {k} = $key AND code = 'first';"
                    f" UPDATE {t} SET code = 'first' WHERE {k} = $key AND {n} = 1 + $n % 5"
                )
            case "exclusion by btree":
                table.constraints.append(f"EXCLUDE ({k} WITH =, code WITH =) WHERE (code <> 'x')")
            case _:
                table.constraints.append(f"EXCLUDE USING gist ({k} WITH =, code WITH =, {n} WITH =)")
        table.writes += [
            f"UPDATE {t} SET code = 'c' || {n} WHERE {k} = $key AND code IS NULL;"
            f" UPDATE {t} SET code = NULL WHERE {k} = $key AND {n} = 1 + $n % 5",
            f"UPDATE {t} SET code = 'gone' || {n} WHERE {k} = $key AND code = 'c3';"
            f" UPDATE {t} SET code = 'c3' WHERE {k} = $key AND {n} = 1 + $n % 7",
        ]

    def _generated(self, table: Relation) -> None:
        if self._sometimes(0.3, "generated stored"):
            table.payload.append(
                Column("stored", "text", f"GENERATED ALWAYS AS (({table.n} * 2)::text || 'é') STORED", is_written=False)
            )
            if self._sometimes(0.3, "index on a generated column"):
                unique = "UNIQUE " if not table.partition_by and self._sometimes(0.5) else ""
                table.later.append(f"CREATE {unique}INDEX ON {table.sql} ({table.k}, stored, {table.i})")
        if self.is_new and self._sometimes(0.3, "generated virtual"):
            table.payload.append(
                Column("virtual", "bigint", f"GENERATED ALWAYS AS ({table.n}::bigint * 3) VIRTUAL", is_written=False)
            )
        if self._sometimes(0.3):
            kind = self._choice("ALWAYS AS IDENTITY", "BY DEFAULT AS IDENTITY", "serial", "sequence counts down")
            auto, type_ = f"GENERATED {kind}", "bigint NOT NULL"
            if kind == "serial" and not table.partition_by:
                auto, type_ = "", "serial"
            elif "AS IDENTITY" not in kind or table.partition_by:
                sequence = f"{quoted(table.name.schema)}.{quoted('s ' + table.name.name[:40])}"
                self.preamble.append(f"CREATE SEQUENCE {sequence} INCREMENT {-1 if 'down' in kind else 2}")
                auto = f"DEFAULT nextval('{sequence.replace(chr(39), chr(39) * 2)}')"
            table.payload.append(Column("counted", type_, auto=auto, is_written=False))
            table.unpredictable.append("counted")
        if self._sometimes(0.2, "default clock_timestamp()"):
            table.payload.append(Column("at", "timestamptz", auto="DEFAULT clock_timestamp()", is_written=False))
            table.unpredictable.append("at")

    def _check(self, table: Relation) -> None:
        if self._sometimes(0.3, "check"):
            table.checks.append(f'CONSTRAINT "n is small" CHECK ({table.n} < 90000000)')
        if self._sometimes(0.2, "check NOT VALID"):
            no_inherit = " NO INHERIT" if not table.partition_by and self._sometimes(0.3) else ""
            table.later.append(
                f"ALTER TABLE {table.sql} ADD CONSTRAINT late CHECK ({table.n} > -1000000){no_inherit} NOT VALID"
            )
        if self._sometimes(0.03, "check by a function that needs a search_path"):
            number = len(self.preamble)
            self.preamble += [line.format(number) for line in made_of.FUNCTIONS]
            table.later.append(
                f"ALTER TABLE {table.sql} ADD CONSTRAINT called CHECK (public.outer_{number}({table.n}))"
            )
        if self.is_new and self._sometimes(0.1, "check NOT ENFORCED"):
            table.later.append(f"ALTER TABLE {table.sql} ADD CONSTRAINT loose CHECK ({table.n} < 0) NOT ENFORCED")

    def _indexes(self, table: Relation) -> None:
        k, n, t = table.k, table.n, table.sql
        for index in (
            f"({n}) WHERE {n} % 2 = 0",
            f"(abs({n}), {k} DESC NULLS LAST)",
            f"USING hash ({n})",
            f"USING brin ({n})",
            f"({n}) INCLUDE ({k}) WITH (fillfactor = 50)",
        ):
            if self._sometimes(0.15, "further index"):
                table.later.append(f"CREATE INDEX ON {t} {index}")
        if self._sometimes(0.1, "statistics"):
            table.later.append(f'CREATE STATISTICS {t[:-1]} statistics" ON {k}, {n} FROM {t}')
        if self._sometimes(0.1, "replica identity full"):
            table.later.append(f"ALTER TABLE {t} REPLICA IDENTITY FULL")
        elif table.has_plain_primary_key and self._sometimes(0.1, "published table"):
            table.later.append(f"CREATE PUBLICATION {quoted(table.name.name)} FOR TABLE {t}")
        if not table.partition_by and self._sometimes(0.2, "storage parameters"):
            table.later.append(f"ALTER TABLE {t} SET (fillfactor = 60, autovacuum_enabled = off)")

    def _child_table(self) -> None:
        plain = [each for each in self.tables if not each.partition_by]
        if not plain:
            return
        parent = self.rng.choice(plain)
        child = Relation(
            self._new_name(), parent.key, parent.number, parent.identity, parent.template, "key, id", parent=parent
        )
        child.payload = [column for column in parent.payload if column.name != "code"]
        child.payload.append(Column("own", "text", values=("'own'", "'é'")))
        child.unpredictable = list(parent.unpredictable)
        child.constraints = [f"PRIMARY KEY ({child.k}, {child.i})"]
        # Identities are not inherited, NOT NULL is.
        if any("IDENTITY" in column.auto for column in child.payload):
            child.later.append(f"ALTER TABLE {child.sql} ALTER counted ADD GENERATED BY DEFAULT AS IDENTITY")
        self.tables.append(child)

    # --- what ties tables to each other

    def _foreign_keys(self) -> None:
        for child in self.tables:
            for parent in self.tables:
                if parent.can_be_referenced and child.parent is None and self._sometimes(0.35):
                    self._foreign_key(child, parent)
        if self._sometimes(0.3, "foreign key to a reference table"):
            self._reference_table(self.rng.choice([each for each in self.tables if each.parent is None]))

    def _foreign_key(self, child: Relation, parent: Relation) -> None:
        name = f"ref{len(child.payload)}"
        child.payload.append(Column(name, parent.identity.type, is_written=False))
        ref = quoted(name)
        deferrable = " DEFERRABLE INITIALLY DEFERRED" if self._sometimes(0.3, "deferrable foreign key") else ""
        on_delete = self._choice("CASCADE", "SET NULL", "NO ACTION", "RESTRICT", "SET DEFAULT")
        on_delete += f" ({ref})" if on_delete.startswith("SET") else ""
        on_update = self._choice("CASCADE", "NO ACTION", "CASCADE")
        valid = " NOT VALID" if not child.partition_by and self._sometimes(0.2, "foreign key NOT VALID") else ""
        columns = ((child.k, ref), (parent.k, parent.i))
        if self._sometimes(0.5) and parent.form != "unique index":
            columns = ((ref, child.k), (parent.i, parent.k))
        child.later.append(
            f"\1ALTER TABLE {child.sql} ADD FOREIGN KEY ({', '.join(columns[0])}) REFERENCES {parent.sql}"
            f" ({', '.join(columns[1])}) ON DELETE {on_delete} ON UPDATE {on_update}{deferrable}{valid}"
        )
        self.kinds.append("foreign key to itself" if child is parent else "foreign key")
        self.after_rows.append(
            f"UPDATE {child.sql} SET {ref} = {parent.id_of(f'(1 + {child.n} % 4)')} WHERE {child.n} % 3 <> 0 AND EXISTS"
            f" (SELECT FROM {parent.sql} p WHERE p.{parent.k} = {child.sql}.{child.k} AND p.{parent.i}"
            f" = {parent.id_of(f'(1 + {child.sql}.{child.n} % 4)')})"
        )
        sets, some = f"UPDATE {child.sql} SET {ref}", f"WHERE {child.k} = $key AND {child.n} % 4 ="
        child.writes += [
            f"{sets} = {parent.id_of('(1 + $n % 5)')} {some} 1",
            f"{sets} = NULL {some} 2",
        ]

    def _reference_table(self, table: Relation) -> None:
        name = self._new_name()
        countries = f"{quoted(name.schema)}.{quoted(name.name)}"
        self.preamble.append(
            f'CREATE TABLE {countries} (code text PRIMARY KEY, "Name" text, flag {self.named["mood"]})'
        )
        rows = f"INSERT INTO {countries} VALUES ('de', 'Ä\\', 'sad'), ('ch', NULL, NULL), ('%s', '', 'Ünfroh')"
        if self._sometimes(0.5, "reference table filled by the move"):
            self.rows.insert(0, rows)
        else:
            self.everywhere.append(rows)
        self.reference_tables.append(name)
        action = self._choice("CASCADE", "NO ACTION")
        table.payload.append(Column("country", "text", values=("'de'", "'ch'", "'%s'")))
        table.later.append(
            f"\1ALTER TABLE {table.sql} ADD FOREIGN KEY (country) REFERENCES {countries} ON UPDATE {action}"
        )

    # --- what tables do by themselves

    def _effects(self) -> None:
        for table in list(self.tables):
            if table.parent is None and self._sometimes(0.3, "BEFORE trigger"):
                self._touch(table)
            if table.parent is None and self._sometimes(0.25, "AFTER triggers into another table"):
                self._totals(table)
            if self._sometimes(0.2):
                self._policies(table)
            if table.parent is None and self._sometimes(0.15):
                self._rule(table)

    def _policies(self, table: Relation) -> None:
        """Where they are forced, they bind the application too: it does not see all that it could collide with."""
        is_forced = self._choice("row security", "forced row security") == "forced row security"
        table.later += [
            f"ALTER TABLE {table.sql} ENABLE ROW LEVEL SECURITY{', FORCE ROW LEVEL SECURITY' if is_forced else ''}",
            f"CREATE POLICY few ON {table.sql} USING ({table.n} % 3 <> 0) WITH CHECK ({str(is_forced).lower()})",
        ]

    def _touch(self, table: Relation) -> None:
        table.payload.append(Column("touched", "integer", "NOT NULL", "DEFAULT 0", is_written=False))
        function = f"{quoted(table.name.schema)}.{quoted('touch ' + table.name.name[:40])}"
        self.preamble.append(
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN NEW.touched := OLD.touched + 1; RETURN NEW; END'"
        )
        when = f" WHEN (OLD.{table.n} % 5 <> 1)" if self._sometimes(0.3) else ""
        table.later.append(
            f'CREATE TRIGGER "1 touch" BEFORE UPDATE ON {table.sql} FOR EACH ROW{when} EXECUTE FUNCTION {function}()'
        )

    def _totals(self, table: Relation) -> None:
        """A table that only triggers write: it drifts as soon as one of them fires for a row that is mirrored."""
        key = Column(table.key.name, table.key.type, "NOT NULL")
        totals = Relation(
            self._new_name(),
            key,
            Column("n", "bigint", "NOT NULL"),
            Column("id", "integer"),
            "({n})::integer",
            "totals",
        )
        totals.constraints.append(f"PRIMARY KEY ({totals.k})")
        function = f"{quoted(totals.name.schema)}.{quoted('count ' + totals.name.name[:40])}"
        k, t = totals.k, totals.sql
        body = _COUNTS.format(t=t, k=k)
        if self._sometimes(0.5, "trigger writes an audit with an identity"):
            totals.form = "audit"
            totals.identity.auto = "GENERATED ALWAYS AS IDENTITY"
            totals.unpredictable.append("id")
            totals.constraints[0] = f"PRIMARY KEY ({k}, id)"
            body = _AUDITS.format(t=t, k=k, n=table.n)
        totals.writes = [f"UPDATE {t} SET n = n + 1000 WHERE {k} = $key"]
        self.tables.append(totals)
        constraint = "CONSTRAINT " if self._sometimes(0.3, "constraint trigger") else ""
        deferred = "DEFERRABLE INITIALLY DEFERRED " if constraint else ""
        table.later += [
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $body${body}$body$",
            f'CREATE {constraint}TRIGGER "after" AFTER INSERT OR UPDATE OR DELETE ON {table.sql} {deferred}FOR EACH ROW'
            f" EXECUTE FUNCTION {function}()",
        ]

    def _rule(self, table: Relation) -> None:
        table.has_rules = True
        rule = self._choice("rule DO INSTEAD NOTHING", "rule DO ALSO")
        do = "INSTEAD NOTHING" if "INSTEAD" in rule else "ALSO SELECT 1"
        where = f"WHERE OLD.{table.n} % 3 = 2 " if "INSTEAD" in rule else ""
        table.later.append(f'CREATE RULE "no loss" AS ON DELETE TO {table.sql} {where}DO {do}')

    # --- the schema as it is run

    def _schema(self) -> list[str]:
        """Drawn for each shard: columns stand in another order, and others have been dropped."""
        lines = [*self.preamble, *(line for each in self.tables for line in self._create(each))]
        later = [line for each in self.tables for line in each.later]
        return [
            *lines,
            *(line for line in later if not line.startswith("\1")),
            *(line[1:] for line in later if line.startswith("\1")),
        ]

    def _create(self, table: Relation) -> list[str]:
        if table.parent is not None:
            own = [column.ddl() for column in table.payload if column.name == "own"]
            return [f"CREATE TABLE {table.sql} ({', '.join([*own, *table.constraints])}) INHERITS ({table.parent.sql})"]
        columns = table.columns
        if self._sometimes(0.4, "other order of columns"):
            self.rng.shuffle(columns)
        listed = [column.ddl() for column in columns]
        drop = []
        if self._sometimes(0.3, "dropped column"):
            listed.insert(self.rng.randrange(len(listed)), "dead integer")
            drop = [f"ALTER TABLE {table.sql} DROP COLUMN dead"]
        body = ", ".join([*listed, *table.checks, *table.constraints])
        return [
            f"CREATE TABLE {table.sql} ({body}){table.partition_by}",
            *drop,
            *(self._attached(table, line) for line in table.parts),
        ]
