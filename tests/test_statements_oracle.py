"""Random statements, each run twice: on one database that holds everything, and where the router would send it.

The answers have to be equal, and after a write the rows, or the statement is refused: never another result. Shards hold
rows of other shards besides, in a changed state, as they do while keys move: nobody may see them.

SHARDMOVE_STATEMENTS says how many statements.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.statements import (
    Action,
    Arguments,
    Decision,
    Plans,
    Tables,
    conditions,
    decide,
    froms,
    queries,
    reading,
    restricted,
)
from router.statements.values import Unreadable
from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.routes import Route, Routes, RouteTable
from tests.support.servers import Databases

COUNT: Final = int(os.environ.get("SHARDMOVE_STATEMENTS", "150"))
KEYS: Final = range(1, 9)
SHARDS: Final = ("s1", "s2", "s3")
ROUTES: Final = (
    Route(KeyRange(None, 4), "s1"),
    Route(KeyRange(4, 6), "s2"),
    Route(KeyRange(6, 8), "s3"),
    Route(KeyRange(8, None), "s1"),
)
OTHER_ROUTES: Final = (Route(KeyRange(None, 3), "s2"), Route(KeyRange(3, 7), "s1"), Route(KeyRange(7, None), "s3"))
ACCOUNTS: Final = Keyspace(
    "accounts",
    KeyType.BIGINT,
    Scheme.RANGE,
    {TableName("public", "t"): "id", TableName("public", "u"): "t_id"},
    (TableName("public", "r"),),
)
OTHERS: Final = Keyspace("others", KeyType.BIGINT, Scheme.RANGE, {TableName("public", "o"): "id"})
"""Its keys are those of the accounts, on other shards."""
OWN_ROUTES: Final = {"accounts": ROUTES, "others": OTHER_ROUTES}
SPLIT: Final = {"t": "accounts", "u": "accounts", "o": "others"}
SCHEMA: Final = b"""
    CREATE TABLE t (id bigint NOT NULL, n int NOT NULL, x int, y text, PRIMARY KEY (id, n));
    CREATE TABLE u (t_id bigint NOT NULL, n int NOT NULL, x int, PRIMARY KEY (t_id, n));
    CREATE TABLE o (id bigint NOT NULL, n int NOT NULL, x int, PRIMARY KEY (id, n));
    CREATE TABLE r (x int PRIMARY KEY, name text);
    CREATE TABLE h (x int, z int);
"""


@dataclass
class View:
    """As the router sees it."""

    tables: Tables = field(default_factory=lambda: Tables({"accounts": ACCOUNTS, "others": OTHERS}))
    routes: RouteTable = field(
        default_factory=lambda: RouteTable(1, {name: Routes.of(name, own) for name, own in OWN_ROUTES.items()})
    )
    home: str = "s1"
    shards: Sequence[str] = SHARDS

    def owner(self, table: str, key: int) -> str:
        return self.routes[SPLIT[table]].at(key).shard

    def ranges(self, shard: str) -> dict[str, tuple[KeyRange, ...]]:
        return {name: tuple(one.range for one in own if one.shard == shard) for name, own in OWN_ROUTES.items()}


class Sides:
    """The whole, and the shards."""

    def __init__(self, dsns: dict[str, str]) -> None:
        self.view = View()
        self.plans = Plans(self.view.tables)
        self.whole = psycopg.connect(dsns["cat"], autocommit=True)
        self.shards = {name: psycopg.connect(dsns[name], autocommit=True) for name in SHARDS}
        self.seen: Counter[str] = Counter()
        for connection in (self.whole, *self.shards.values()):
            connection.execute(SCHEMA)
            connection.execute("SET statement_timeout = '20s'")
            connection.execute("INSERT INTO r VALUES (1, 'one'), (2, 'two'), (3, 'three')")
        for connection in (self.whole, self.shards["s1"]):
            connection.execute("INSERT INTO h VALUES (1, 1), (2, 2), (2, 3)")
        for key in KEYS:
            self._fill(key)
        for connection in (self.whole, *self.shards.values()):
            connection.execute("UPDATE t SET y = substr('abc', n % 3 + 1, 1)")

    def _fill(self, key: int) -> None:
        """Every shard has the key's rows; those that are not the owner's differ, and there are more of them."""
        for name, connection in (("", self.whole), *self.shards.items()):
            for table in (b"t", b"u", b"o"):
                is_owner = name in ("", self.view.owner(table.decode(), key))
                for n in range(key % 3 + (0 if is_owner else 2)):
                    x = (key + n) % 4 if is_owner else n % 4
                    row = (key, n, x if table != b"u" else (x + 1) % 4 if n else None)
                    connection.execute(b"INSERT INTO " + table + b" VALUES (%s, %s, %s)", row)

    def close(self) -> None:
        for connection in (self.whole, *self.shards.values()):
            connection.close()

    def rows_of(self) -> list[Any]:
        """What the shards hold of their own, all tables."""
        found: list[Any] = []
        for name, connection in self.shards.items():
            for table in (b"t", b"u", b"o"):
                rows = connection.execute(b"SELECT * FROM " + table).fetchall()
                found += [(table, *row) for row in rows if self.view.owner(table.decode(), row[0]) == name]
        home = self.shards["s1"]
        return sorted(map(repr, found + _others(home)))

    def whole_rows(self) -> list[Any]:
        tables = (b"t", b"u", b"o")
        found = [(t, *row) for t in tables for row in self.whole.execute(b"SELECT * FROM " + t).fetchall()]
        return sorted(map(repr, found + _others(self.whole)))


def _others(connection: psycopg.Connection[Any]) -> list[Any]:
    return [(t, *row) for t in (b"r", b"h") for row in connection.execute(b"SELECT * FROM " + t).fetchall()]


@pytest.fixture(scope="module")
def sides(servers: Any) -> Iterator[Sides]:
    databases = Databases(servers)
    both = Sides(databases("s1", "s2", "s3", "cat"))
    yield both
    both.close()
    databases.drop()


WRITES: Final = ["update", "update", "delete", "insert", "insert", "merge", "cte"]


class Sql:
    """Writes one random statement; most are valid, many name a key."""

    def __init__(self, rng: Random, *, is_outer: bool = False) -> None:
        self.rng = rng
        self.is_outer = is_outer
        """All joins are LEFT JOIN, and bind one side or the other."""
        self.parameters: list[str | None] = []
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"q{self._names}"

    def statement(self) -> str:
        kind = self.rng.choice(["select"] * 7 + WRITES + ["values"])
        match kind:
            case "select":
                return self.top()
            case "update":
                return self.update()
            case "delete":
                return self.delete()
            case "insert":
                return self.insert()
            case "merge":
                return self.merge()
            case "values":
                return self.values()
            case _:
                return self.writing_cte()

    def key(self) -> str:
        value = self.rng.choice([*KEYS, *KEYS, 77])
        match self.rng.randrange(14):
            case 0:
                return f"'{value}'"
            case 1:
                return f"'{value}'::bigint"
            case 2:
                return f"{value}::int"
            case 3:
                return f"{value}.0"
            case 4:
                return f"CAST({value} AS bigint)"
            case 5 | 6:
                self.parameters.append(str(value))
                return f"${len(self.parameters)}::bigint"
            case 7:
                return f"({value})"
            case 8 if value == 77:
                return "NULL"
            case _:
                return str(value)

    def keys(self) -> str:
        return ", ".join(self.key() for _ in range(self.rng.randint(1, 3)))

    # SELECT

    def top(self) -> str:
        body = self.select(2)
        tail = self.rng.randrange(7)
        if tail == 6:
            query = self.select(1, columns="k, n, x", is_plain=True)
            return f"SELECT k, n, x FROM ({query} ORDER BY {self.rng.choice(['1, 2, 3', '3, 2, 1'])}) s LIMIT 3"
        if tail == 0:
            body = self.select(2, columns="k, n, x", is_plain=True) + self.rng.choice(
                ["", " UNION ALL ", " UNION "]
            ).join(["", self.select(1, columns="k, n, x", is_plain=True)][: self.rng.randint(1, 2)])
        if tail == 1:
            return (
                f"SELECT k, n, x FROM ({self.select(1, columns='k, n, x', is_plain=True)}) s ORDER BY k, n, x LIMIT 3"
            )
        if tail == 2:
            cte = self.name()
            query = self.select(1, columns="k, n, x", is_plain=True)
            again = self.rng.choice(["", f" JOIN {cte} b ON a.k = b.k"])
            return f"WITH {cte} AS ({query}) SELECT a.* FROM {cte} a{again} WHERE {self.condition([('a', 'k')], 1)}"
        return body

    def select(self, depth: int, *, columns: str = "", is_plain: bool = False) -> str:
        from_, scope = self.from_(depth)
        first = scope[0]
        where = f" WHERE {self.condition(scope, depth)}" if self.rng.random() < 0.9 else ""
        key, alias = f"{first[0]}.{first[1]}", first[0]
        if columns:
            distinct = self.rng.choice(["", "", "", "DISTINCT "])
            return f"SELECT {distinct}{key} AS k, {alias}.n, {alias}.x FROM {from_}{where}"
        match self.rng.randrange(10):
            case 9 if not is_plain:
                on, name = self.rng.choice([key, first[1], "k"]), self.rng.choice([first[1], "k", "q"])
                given = self.rng.choice([key, f"{alias}.x"])
                return f"SELECT DISTINCT ON ({on}) {given} AS {name}, {alias}.n FROM {from_}{where} ORDER BY 1, 2"
            case 0 if not is_plain:
                return (
                    f"SELECT {key}, count(*), max({alias}.x) FROM {from_}{where} GROUP BY {self.rng.choice([key, '1'])}"
                )
            case 1 if not is_plain:
                return f"SELECT count(*), sum({alias}.n) FROM {from_}{where}"
            case 2:
                return f"SELECT DISTINCT {self.rng.choice([key, alias + '.x'])} FROM {from_}{where}"
            case 3 if not is_plain:
                over = self.rng.choice([key, f"{alias}.x", f"{key}, {alias}.x"])
                return f"SELECT {key}, {alias}.n, count(*) OVER (PARTITION BY {over}) FROM {from_}{where}"
            case 4 if depth:
                inner = self.correlated(scope, depth - 1)
                return f"SELECT {key}, {alias}.n, (SELECT max(i.x) FROM {inner}) FROM {from_}{where}"
            case 5:
                return f"SELECT {alias}.* FROM {from_}{where}"
            case _:
                return f"SELECT {key}, {alias}.n, {alias}.x FROM {from_}{where}"

    def correlated(self, scope: list[tuple[str, str]], depth: int) -> str:
        table, key = self.rng.choice([("t", "id"), ("u", "t_id")])
        outer = self.rng.choice(scope)
        column = f"{outer[0]}.{outer[1]}"
        match self.rng.randrange(10):
            case 0:
                own = f"j.{key} = {column} AND {column} = {self.key()}"
                return f"(SELECT count(*) AS x FROM {table} j WHERE {own}) i WHERE true"
            case 1:
                kind = self.rng.choice(["LEFT", "FULL", "RIGHT", ""])
                other = self.rng.choice(["(SELECT 1 AS k WHERE {}) j", "(r j JOIN r l ON {})"])
                other = other.format(f"{column} = {self.key()}")
                return f"r i {kind} JOIN {other} ON true WHERE true"
            case _:
                pass
        condition = self.rng.choice(
            [f"i.{key} = {outer[0]}.{outer[1]}"] * 3 + [f"i.x = {outer[0]}.x", f"i.{key} = {self.key()}"]
        )
        return f"{table} i WHERE {condition}"

    def from_(self, depth: int) -> tuple[str, list[tuple[str, str]]]:
        text, scope = self.item(depth)
        for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
            if self.rng.random() < 0.15 and not self.is_outer:
                other, more = self.lateral(scope)
                text, scope = f"{text} {other}", scope + more
                continue
            other, more = self.item(depth)
            left, right = self.rng.choice(scope), more[0]
            on = self.rng.choice(
                [f"{left[0]}.{left[1]} = {right[0]}.{right[1]}"] * 4
                + [
                    f"{left[0]}.x = {right[0]}.x",
                    f"{right[0]}.{right[1]} = {self.key()}",
                    f"{left[0]}.{left[1]} = {self.key()}",
                ]
            )
            if self.rng.random() < 0.3:
                on += f" AND {self.condition([left, right], 0)}"
            kind = self.rng.choice(["JOIN", "JOIN", "LEFT JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", ","])
            if self.is_outer:
                side = self.rng.choice([left, right])
                kind, on = "LEFT JOIN", f"{on} AND {side[0]}.{side[1]} = {self.key()}"
            if kind == ",":
                text = f"{text}, {other}"
            elif kind == "FULL JOIN":
                text = f"{text} FULL JOIN {other} ON {left[0]}.{left[1]} = {right[0]}.{right[1]}"
            else:
                text = f"{text} {kind} {other} ON {on}"
            scope = scope + more
        return text, scope

    def lateral(self, scope: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
        """A join with LATERAL, which may restrict the rows before it, or seem to."""
        alias, outer = self.name(), self.rng.choice(scope)
        table, key = self.rng.choice([("t", "id"), ("u", "t_id")])
        column = f"{outer[0]}.{outer[1]}"
        where = f"i.{key} = {column}" + self.rng.choice(["", "", f" AND {self.condition([outer], 0)}"])
        body = self.rng.choice(
            [
                f"SELECT i.{key} AS k, i.n, i.x FROM {table} i WHERE {where}",
                f"SELECT {column} AS k, i.n, i.x FROM {table} i WHERE {where}",
                f"SELECT max(i.{key}) AS k, count(*) AS n, max(i.x) AS x FROM {table} i WHERE {where}",
                f"SELECT 0 AS k, s.n, 1 AS x FROM (SELECT count(*) AS n FROM r WHERE {self.condition([outer], 0)}) s",
            ]
        )
        join = self.rng.choice(["LEFT JOIN LATERAL ({}) {} ON true", "JOIN LATERAL ({}) {} ON true"])
        return join.format(body, alias), [(alias, "k")]

    def item(self, depth: int) -> tuple[str, list[tuple[str, str]]]:
        alias = self.name()
        match self.rng.randrange(14):
            case 12:
                return f"o {alias}", [(alias, "id")]
            case 13 if depth:
                where = self.rng.choice(["", f" WHERE t.id = {self.key()}"])
                query = f"SELECT max(id) AS k, count(*) AS n, max(x) AS x FROM t{where}"
                return f"({query}) {alias}", [(alias, "k")]
            case 0:
                return f"(SELECT x, x AS n, name FROM r) {alias}", [(alias, "x")]
            case 1:
                values = ", ".join(f"({self.rng.choice(KEYS)}, 0, 1)" for _ in range(self.rng.randint(1, 2)))
                return f"(VALUES {values}) {alias} (k, n, x)", [(alias, "k")]
            case 2 | 3 if depth:
                inner = self.select(depth - 1, columns="k, n, x")
                limit = self.rng.choice(["", "", " ORDER BY 1, 2, 3 LIMIT 2"])
                return f"({inner}{limit}) {alias}", [(alias, "k")]
            case 4 if depth:
                query = "SELECT id AS k, max(n) AS n, max(x) AS x FROM t"
                where = self.rng.choice(["", f" WHERE t.id IN ({self.keys()})"])
                return f"({query}{where} GROUP BY id) {alias}", [(alias, "k")]
            case 5:
                return f"(SELECT x, z AS n FROM h) {alias}", [(alias, "x")]
            case n:
                table, key = ("t", "id") if n % 2 else ("u", "t_id")
                return f"{self.rng.choice(['', 'public.'])}{table} {alias}", [(alias, key)]

    def condition(self, scope: list[tuple[str, str]], depth: int) -> str:
        parts = [self.atom(scope, depth) for _ in range(self.rng.choice([1, 1, 2, 2, 3]))]
        return self.rng.choice([" AND ", " AND ", " AND ", " OR "]).join(parts)

    def atom(self, scope: list[tuple[str, str]], depth: int) -> str:
        alias, key = self.rng.choice(scope)
        column = f"{alias}.{key}"
        match self.rng.randrange(18):
            case 16:
                return f"{column} IS NOT DISTINCT FROM {self.rng.choice([self.key(), 'NULL', self.null()])}"
            case 17 if depth:
                return f"{column} IN (SELECT {column} FROM {self.correlated(scope, depth - 1)})"
            case 0 | 1 | 2 | 3:
                return f"{column} = {self.key()}"
            case 4:
                return f"{self.key()} = {column}"
            case 5 | 6:
                return f"{column} {self.rng.choice(['IN', 'IN', 'NOT IN'])} ({self.keys()})"
            case 7:
                return f"{column} = ANY ('{{{self.rng.choice(KEYS)},{self.rng.choice(KEYS)}}}')"
            case 8:
                return f"({column}, {alias}.n) = ({self.key()}, {self.rng.randrange(3)})"
            case 9:
                other = self.rng.choice(scope)
                return f"{column} = {other[0]}.{other[1]}"
            case 10 if depth:
                return f"{self.rng.choice(['', 'NOT '])}EXISTS (SELECT 1 FROM {self.correlated(scope, depth - 1)})"
            case 11 if depth:
                query = self.rng.choice(
                    [
                        "SELECT u.t_id FROM u",
                        f"SELECT t_id FROM u WHERE t_id IN ({self.keys()})",
                        "SELECT id FROM t WHERE x = 1",
                        "SELECT max(id) FROM t",
                        "SELECT id FROM t ORDER BY x, id, n LIMIT 1",
                    ]
                )
                return f"{column} {self.rng.choice(['IN', 'IN', 'NOT IN'])} ({query})"
            case 12:
                return f"({self.atom(scope, 0)} OR {self.atom(scope, 0)})"
            case 13:
                return f"NOT ({self.atom(scope, 0)})"
            case 14:
                return f"{alias}.x IS NOT NULL"
            case _:
                return f"{alias}.x {self.rng.choice(['=', '<', '>'])} {self.rng.randrange(4)}"

    def null(self) -> str:
        self.parameters.append(None)
        return f"${len(self.parameters)}::bigint"

    def values(self) -> str:
        queries = [
            f"(SELECT {self.rng.choice(['count(*)', 'max(i.x)'])} FROM t i WHERE {self.condition([('i', 'id')], 1)})"
            for _ in range(self.rng.randint(1, 2))
        ]
        return f"VALUES ({self.rng.choice([', ', '), (']).join(queries)})"

    # Writes

    def update(self) -> str:
        table, key = self.rng.choice([("t", "id"), ("u", "t_id")])
        alias = self.rng.choice([table, f"{table} AS w"])
        name = alias.rsplit(" ", 1)[-1]
        sets = self.rng.choice(
            ["x = 9", "x = coalesce(x, 0) + 1", f"{key} = {self.key()}, n = n + 100", f"{key} = {key}"]
        )
        from_, scope = "", [(name, key)]
        if self.rng.random() < 0.3:
            item, more = self.item(1)
            from_, scope = f" FROM {item}{self.more(more)}", scope + more
            link = f"{name}.{key} = {more[0][0]}.{more[0][1]} AND "
        else:
            link = ""
        returning = self.rng.choice(["", f" RETURNING {name}.{key}, {name}.x"])
        return f"UPDATE {alias} SET {sets}{from_} WHERE {link}{self.condition(scope, 1)}{returning}"

    def more(self, scope: list[tuple[str, str]]) -> str:
        return f" {self.lateral(scope)[0]}" if self.rng.random() < 0.3 else ""

    def delete(self) -> str:
        table, key = self.rng.choice([("t", "id"), ("u", "t_id")])
        if self.rng.random() < 0.3:
            item, more = self.item(1)
            link = f"{table}.{key} = {more[0][0]}.{more[0][1]}"
            item += self.more(more)
            return f"DELETE FROM {table} USING {item} WHERE {link} AND {self.condition([(table, key), *more], 1)}"
        return f"DELETE FROM {table} WHERE {self.condition([(table, key)], 1)} RETURNING *"

    def insert(self) -> str:
        table, key = self.rng.choice([("t", "id"), ("u", "t_id")])
        n = 1000
        match self.rng.randrange(6):
            case 0 | 1:
                rows = ", ".join(f"({self.key()}, {n + i}, {i})" for i in range(self.rng.randint(1, 3)))
                return f"INSERT INTO {table} ({key}, n, x) VALUES {rows}{self.conflict(key)}"
            case 2:
                query = self.select(1, columns="k, n, x", is_plain=True)
                where = f"WHERE {self.condition([('q', 'k')], 0)}"
                return f"INSERT INTO {table} ({key}, n, x) SELECT k, n + 1000, x FROM ({query}) q {where}"
            case 3:
                rows = ", ".join(f"({self.rng.choice(KEYS)}, {n + i}, {i})" for i in range(2))
                query = f"SELECT v.x, v.k::bigint, v.n FROM (VALUES {rows}) v (k, n, x)"
                return f"INSERT INTO {table} (x, {key}, n) {query} RETURNING {key}"
            case 4:
                value = self.rng.choice(KEYS)
                query = f"SELECT * FROM unnest('{{{value},{value}}}'::bigint[], ARRAY[1001, 1002])"
                return f"INSERT INTO {table} ({key}, n) {query} ON CONFLICT DO NOTHING"
            case _:
                return f"INSERT INTO {table} (n, {key}) SELECT {n}, {self.key()} FROM r WHERE x = 1"

    def conflict(self, key: str) -> str:
        return self.rng.choice(
            [
                "",
                " ON CONFLICT DO NOTHING",
                f" ON CONFLICT ({key}, n) DO UPDATE SET x = excluded.x",
                f" RETURNING {key}",
            ]
        )

    def merge(self) -> str:
        source = self.rng.choice(
            [
                f"(VALUES ({self.rng.choice(KEYS)}, 0), ({self.rng.choice(KEYS)}, 5)) s (k, n)",
                f"(SELECT t_id AS k, n FROM u WHERE t_id = {self.key()}) s",
                "(SELECT t_id AS k, n FROM u) s",
            ]
        )
        return (
            f"MERGE INTO t USING {source} ON t.id = s.k AND t.n = s.n "
            "WHEN MATCHED THEN UPDATE SET x = 8 WHEN NOT MATCHED THEN INSERT (id, n, x) VALUES (s.k, s.n, 7)"
        )

    def writing_cte(self) -> str:
        condition = self.condition([("t", "id")], 0)
        write = self.rng.choice(
            [
                f"DELETE FROM t WHERE {condition} RETURNING id, n, x",
                f"UPDATE t SET x = 6 WHERE {condition} RETURNING id, n, x",
                f"UPDATE t SET id = {self.key()}, n = n + 50 WHERE t.id = {self.key()} RETURNING id, n, x",
                f"INSERT INTO t (id, n) VALUES ({self.key()}, 0) "
                "ON CONFLICT (id, n) DO UPDATE SET x = 5 RETURNING id, n, x",
            ]
        )
        use = self.rng.choice(
            [
                "SELECT * FROM w",
                "SELECT w.id, u.n FROM w JOIN u ON u.t_id = w.id",
                "INSERT INTO u (t_id, n, x) SELECT id, n + 50, x FROM w",
                "INSERT INTO o (id, n, x) SELECT id, n + 50, x FROM w",
                "DELETE FROM o USING w WHERE o.id = w.id",
            ]
        )
        return f"WITH w AS ({write}) {use}"


class Differs(AssertionError):
    pass


def _run(connection: psycopg.Connection[Any], text: bytes, parameters: Sequence[str | None]) -> list[Any]:
    with psycopg.RawCursor(connection) as cursor:
        cursor.execute(text, list(parameters))
        return cursor.fetchall() if cursor.description is not None else [cursor.rowcount]


def _answer(sides: Sides, decision: Decision, text: bytes, parameters: Sequence[str | None], rng: Random) -> list[Any]:
    """What the router would make of it."""
    if decision.action is Action.SCATTER:
        planned = sides.plans.of(text)
        rows: list[Any] = []
        for shard in decision.shards:
            rows += _run(sides.shards[shard], restricted(planned, sides.view.ranges(shard)), parameters)
        assert decision.merge is not None
        for column in reversed(decision.merge.order):
            assert column.position is not None
            place = column.position
            rows.sort(key=lambda row: (row[place] is None, row[place] or 0), reverse=column.is_descending)
        return rows if decision.merge.limit is None else rows[: decision.merge.limit]
    shards = decision.shards or (rng.choice(SHARDS),)
    answers = [_run(sides.shards[shard], text, parameters) for shard in shards]
    return answers[0]


def check(sides: Sides, text: str, parameters: Sequence[str | None], rng: Random) -> None:
    """Raises Differs where the two sides differ."""
    data = text.encode()
    arguments = Arguments((), [None if value is None else value.encode() for value in parameters])
    decision = decide(sides.plans.of(data), arguments, sides.view)
    sides.seen[decision.action.name] += 1
    if decision.refusal is not None:
        return
    connections = (sides.whole, *sides.shards.values())
    for connection in connections:
        connection.execute("BEGIN")
    try:
        try:
            expected = _run(sides.whole, data, parameters)
        except psycopg.Error:
            return  # what it would have done is not known
        try:
            found = _answer(sides, decision, data, parameters, rng)
        except Unreadable:
            return
        except psycopg.errors.UniqueViolation as error:
            raise Differs(f"{text} {parameters}: {error}") from error
        if sorted(map(repr, expected)) != sorted(map(repr, found)):
            raise Differs(f"{text} {parameters}: {decision.action.name} {decision.shards}: {expected} != {found}")
        if decision.is_write and sides.whole_rows() != sides.rows_of():
            raise Differs(f"{text} {parameters}: {decision.action.name} {decision.shards}: other rows afterwards")
        sides.seen["compared"] += 1
    finally:
        for connection in connections:
            connection.execute("ROLLBACK")


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(rng=st.randoms(use_true_random=False))
def test_a_statement_is_answered_as_by_one_database_or_refused(sides: Sides, rng: Random) -> None:
    sql = Sql(rng)
    text = sql.statement()
    check(sides, text, sql.parameters, rng)


def test_most_statements_that_name_a_key_are_not_refused(sides: Sides, rng: Random) -> None:
    """What the test above compares has to be more than a few."""
    before = Counter(sides.seen)
    for _ in range(max(200, COUNT)):
        sql = Sql(rng)
        check(sides, sql.statement(), sql.parameters, rng)
    made = sides.seen - before
    print(dict(made))
    assert made["compared"] > sum(made.values()) / 12
    assert made["SCATTER"]
    assert made["KEYED"] > made["SCATTER"]


def _damage(sides: Sides, rng: Random, count: int, *, is_outer: bool) -> int:
    """How many of so many statements are answered wrongly."""
    sides.plans = Plans(sides.view.tables)
    wrong = 0
    for _ in range(count):
        sql = Sql(rng, is_outer=is_outer)
        try:
            check(sides, sql.statement(), sql.parameters, rng)
        except Differs:
            wrong += 1
            break
    sides.plans = Plans(sides.view.tables)
    return wrong


TWINS_COUNT: Final = 4000


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["outer joins", "grouping", "levels", "restriction"])
def test_twin_without_a_rule_answers_wrongly(
    sides: Sides, rng: Random, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    """Each rule of the planner left out in turn: wrong answers have to be seen."""
    match mechanism:
        case "outer joins":
            monkeypatch.setattr(froms.From, "_left", froms.From._inner)
        case "grouping":
            monkeypatch.setattr(froms, "can_push", lambda node: True)
            monkeypatch.setattr(conditions, "can_push", lambda node: True)
        case "levels":
            monkeypatch.setattr(queries, "level_obstacle", lambda level: None)
        case _:
            monkeypatch.setitem(globals(), "restricted", lambda planned, ranges: planned.text)
    assert _damage(sides, rng, TWINS_COUNT, is_outer=mechanism == "outer joins") > 0


def test_twin_without_the_rule_of_empty_groups_answers_wrongly(
    sides: Sides, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aggregate has its row where its WHERE holds for none: what that says of other tables binds them to nothing."""
    text = "SELECT id, n FROM t WHERE id IN (SELECT t.id FROM (SELECT count(*) FROM r WHERE t.id = 4) s)"
    check(sides, text, [], rng)
    monkeypatch.setattr(reading, "has_row_of_none", lambda node, scope: False)
    sides.plans = Plans(sides.view.tables)
    try:
        with pytest.raises(Differs):
            check(sides, text, [], rng)
    finally:
        sides.plans = Plans(sides.view.tables)
