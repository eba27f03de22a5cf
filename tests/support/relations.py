"""Tables as random schemas draw them: what their SQL is made of, their rows, and what is written to them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from shardmove.domain.moves import TableName
from tests.support.columns import quoted

FIRST_NEW: Final = 1000
"""Rows of the writer are numbered from here; those that are there from the beginning, below."""


@dataclass(slots=True)
class Column:
    """`extra` comes behind the type; `auto`, what a partition does not repeat: identity, default."""

    name: str
    type: str
    extra: str = ""
    auto: str = ""
    values: tuple[str, ...] = ()
    is_nullable: bool = True
    is_written: bool = True

    def ddl(self, *, is_partition: bool = False) -> str:
        return f"{quoted(self.name)} {self.type} {self.extra} {'' if is_partition else self.auto}".rstrip()

    def one_of(self, n: str) -> str:
        """One of its values, by a number."""
        listed = [*self.values, *(["NULL"] if self.is_nullable else [])]
        whens = " ".join(f"WHEN {number} THEN {text}" for number, text in enumerate(listed))
        return f"CASE ({n}) % {len(listed)} {whens} END"


@dataclass(slots=True)
class Relation:
    """A table as it is drawn. `unique`: columns that a foreign key may name beside the key."""

    name: TableName
    key: Column
    number: Column
    identity: Column
    template: str
    form: str
    payload: list[Column] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    partition_by: str = ""
    parent: Relation | None = None
    later: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    unpredictable: list[str] = field(default_factory=list)
    has_rules: bool = False

    @property
    def sql(self) -> str:
        return f"{quoted(self.name.schema)}.{quoted(self.name.name)}"

    @property
    def k(self) -> str:
        return quoted(self.key.name)

    @property
    def i(self) -> str:
        return quoted(self.identity.name)

    @property
    def n(self) -> str:
        return quoted(self.number.name)

    @property
    def columns(self) -> list[Column]:
        return [self.key, self.number, self.identity, *self.payload]

    @property
    def can_be_referenced(self) -> bool:
        if self.parent is not None or self.identity.type.endswith('"Label"'):
            return False  # the domain forbids NULL
        return self.form in ("key, id", "id, key", "unique index", "unique constraint")

    @property
    def has_plain_primary_key(self) -> bool:
        return any(each.startswith("PRIMARY") and "DEFERRABLE" not in each for each in self.constraints)

    @property
    def is_parted_by_number(self) -> bool:
        return f"({self.n})" in self.partition_by

    @property
    def or_nothing(self) -> str:
        """PostgreSQL has no ON CONFLICT where a unique constraint is deferrable."""
        return "" if any("DEFERRABLE" in each for each in self.constraints) else " ON CONFLICT DO NOTHING"

    def id_of(self, n: str) -> str:
        return self.template.replace("{n}", n)

    # --- rows and writes

    def load(self, rng: random.Random, keys: str) -> list[str]:
        """`keys`: a list of VALUES."""
        if self.form in ("totals", "audit"):
            return []  # its triggers fill it
        rows = 1 if self.form == "key" else rng.randint(5, 14)
        return [f"{self._insert('n', 'k')} FROM (VALUES {keys}) AS loaded(k), generate_series(1, {rows}) AS n"]

    def _insert(self, n: str, key: str) -> str:
        """INSERT … SELECT of a row with that number."""
        columns = [self.k, self.n, self.i]
        values = [key, n, self.id_of(n)]
        for place, column in enumerate(self.payload):
            if column.name == "code":
                columns.append("code")
                values.append(f"'c' || ({n})::text")
            elif column.is_written and not (column.auto and place % 2):
                columns.append(quoted(column.name))
                values.append(column.one_of(f"(({n}) + {place})"))
        return f"INSERT INTO {self.sql} ({', '.join(columns)}) SELECT {', '.join(values)}"

    def write(self, rng: random.Random) -> list[str]:
        """One transaction each; other kinds add their own to `writes`."""
        match self.form:
            case "totals" | "audit":
                return []
            case "key":
                return [*self._writes_of_one_row(), *self._writes_of_values(rng)]
            case _:
                return [*self._writes_of_rows(), *self._writes_of_values(rng)]

    def _writes_of_one_row(self) -> list[str]:
        inserts = self._insert("1", "$key")
        return [inserts, f"{inserts}{self.or_nothing}", f"DELETE FROM {self.sql} WHERE {self.k} = $key AND $n % 4 = 0"]

    def _writes_of_rows(self) -> list[str]:
        k, n, t = self.k, self.n, self.sql
        newest, some = f"WHERE {k} = $key AND {n} = {FIRST_NEW} + $n", f"WHERE {k} = $key AND {n} % 4 = $n % 4"
        # Whether PostgreSQL lets two updates of rows that reference each other pass depends on the order of the rows.
        one = f"WHERE {k} = $key AND {n} = 1 + $n % 6"
        inserts = self._insert(f"({FIRST_NEW} + $n)", "$key")
        another, free = (self.id_of(f"({n} + {more})") for more in ("100000 * ($n % 5)", "700000"))
        writes = [
            inserts,
            inserts,
            f"{self._insert('(1 + $n % 6)', '$key')}{self.or_nothing}",
            f"DELETE FROM {t} WHERE {k} = $key AND {n} BETWEEN {FIRST_NEW} AND {FIRST_NEW} + $n - 8",
            f"DELETE FROM {t} {one}",
            f"{inserts}; DELETE FROM {t} {newest}; {inserts}",
            f"UPDATE {t} SET {self.i} = {another} {some}",
            f"UPDATE {t} SET {self.i} = {free} {one}; UPDATE {t} SET {self.i} = {another} {one}",
            f"UPDATE {t} SET {k} = $other {newest}",
            f"UPDATE {t} SET {k} = $other {some} AND {n} % 3 = 0",
        ]
        if self.is_parted_by_number:
            writes.append(f"UPDATE {t} SET {n} = {n} + 20000 {some} AND {n} BETWEEN {FIRST_NEW} AND {10 * FIRST_NEW}")
        return writes

    def _writes_of_values(self, rng: random.Random) -> list[str]:
        written = [column for column in self.payload if column.is_written]
        chosen = rng.sample(written, min(2, len(written)))
        writes = [
            f"UPDATE {self.sql} SET {quoted(column.name)} = {column.one_of('$n')} WHERE {self.k} = $key"
            for column in chosen
        ]
        if chosen and not self.has_rules and self.parent is None:
            column = chosen[0]
            writes.append(
                f"MERGE INTO {self.sql} AS t USING (SELECT $key AS k) AS s"
                f" ON t.{self.k} = s.k AND t.{self.n} % 3 = $n % 3"
                f" WHEN MATCHED THEN UPDATE SET {quoted(column.name)} = {column.one_of('($n + 1)')}"
            )
        return writes

    def cross(self) -> list[str]:
        """Rows that go over the end of the range."""
        if self.form in ("totals", "audit", "key"):
            return []
        move = f"UPDATE {self.sql} SET {self.k} = $cross WHERE {self.k} = $key AND {self.n} ="
        return [f"{move} {FIRST_NEW} + $n", f"{move} {FIRST_NEW} + $n - 1", f"{move} 1 + $n % 7"]
