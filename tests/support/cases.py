"""A kind of table, key or column, and a whole move of it: what the harness of kinds runs.

    run_case(Case(kind="…", schema="CREATE TABLE …", rows="INSERT …", keys=("99", "100"), writes=("UPDATE …",)), make)

One case is one schema with its rows and one writer. The writer is an application: it sends each statement to the shard
that owns the key and, once that is acknowledged, to a *shadow*: a third database that never moved. Under it the move is
run to ready, rolled back, planned again, cut over, reverted, cut over again and completed, by a role that is no
superuser and has what `shardmove grants` prints. At the end both shards together must be the shadow, row for row, as
text; the comparison and the question who owns a key are not the engine's. A statement that touches other rows on the
shard than on the shadow fails at once.

A case that is refused stops at preflight: with its message, and with nothing changed.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from router.client import ShardClient
from shardmove.catalog.store import Catalog
from shardmove.config import Config, parse
from shardmove.coordinator import ending, planner, preflight, shards
from shardmove.coordinator.checks.site import Site
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.domain.errors import Refused, SchemaDrift
from shardmove.domain.keys import Key, KeyRange, KeyType, key_text
from shardmove.domain.moves import Direction, Keyspace, Scheme, State, TableName
from shardmove.postgres.embedded import Cluster
from shardmove.postgres.sql import names
from shardmove.postgres.sql import table as relation
from shardmove.protocol import fence
from tests.support.servers import OLD_SERVERS, Databases, connect
from workers.executors import InlineExecutor

KEYSPACE: Final = "shop"
PLACES: Final = ("cat", "s1", "s2", "shadow")
SERVERS: Final[Mapping[str, str]] = {"cat": "cat", "s1": "s1", "s2": "s2", "shadow": "s3"}
LIMITS: Final[Mapping[str, Any]] = {
    "batch_bytes": 5_000,
    "batch_rows_max": 40,
    "workers": 2,
    "erase_rows": 50,
    "mirror_rows": 200,
    # `complete` is called when the writer has been seen on the new owner: nothing is left to wait for.
    "keep_source_s": 0.01,
    # How long writes wait is no matter here: on a slow machine each attempt would be given up.
    "max_stall_ms": 10_000,
    "cutover_lag_ms": 5_000.0,
}
SETTINGS: Final = (
    "-c datestyle=ISO -c timezone=UTC -c intervalstyle=postgres -c bytea_output=hex -c extra_float_digits=1"
)
AWAITED_S: Final = 200.0
LONG_BYTES: Final = 1_000
"""A row whose text is longer is compared by its md5."""

MakeDatabase: TypeAlias = Callable[[str, LiteralString], str]
"""(name of a server, further words of CREATE DATABASE) → the connection string, as superuser."""


@pytest.fixture
def make_database(servers: Cluster, request: pytest.FixtureRequest) -> Iterator[MakeDatabase]:
    """What `run_case` asks for. Older servers are started when the first case asks for one, which else is skipped."""
    made: list[Databases] = []

    def make(name: str, options: LiteralString) -> str:
        cluster: Cluster = request.getfixturevalue("old_servers") if name in OLD_SERVERS else servers
        made.append(Databases(cluster))
        return made[-1](name, template="template0", options=options)[name]

    yield make
    for databases in made:
        databases.drop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is moved.

    Attributes:
        kind: as docs/kinds.md names it, under the heading `group`.
        schema: run on both shards and the shadow, by the role that owns the tables from then on and is the writer.
        target_schema: run on the target instead.
        prepared: run before it, by a superuser: extensions and the like; `target_prepared` on the target only.
        tables: table = key column.
        moving: the range that goes from s1 to s2.
        rows: fills the source, inside and outside the range; `everywhere` is run on the target, too.
        keys: what the writer writes to in turn; inside and outside the range.
        writes: one transaction each, in turn. In them `$key` is the key, as a literal; `$other` another key on the same
            side of the range (the same where there is none); `$n` the number of the round.
        unpredictable: per table, columns that every database fills as it likes; they are not compared.
        ddl: run when the move is ready: on the target, the shadow and then the source; after it `later` is written.
        servers: by place (cat, s1, s2, shadow): other servers than `SERVERS`.
        options: by place: further words of CREATE DATABASE.
        limits: others than `LIMITS`.
        pause_s: between two transactions of the writer.
        refused: None, or a part of what preflight says.
        says: words that the docs add.
        target_is_source: s2 is the database of s1 under another name.
    """

    kind: str
    group: str
    schema: str
    keys: tuple[str, ...] = ("99", "100", "150", "199", "200")
    writes: tuple[str, ...] = ()
    rows: str = ""
    everywhere: str = ""
    tables: Mapping[str, str] = field(default_factory=lambda: {"things": "tenant"})
    reference_tables: tuple[str, ...] = ()
    key_type: KeyType = KeyType.BIGINT
    scheme: Scheme = Scheme.RANGE
    moving: str = "100:200"
    target_schema: str | None = None
    prepared: str = ""
    target_prepared: str = ""
    unpredictable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ddl: str = ""
    later: tuple[str, ...] = ()
    servers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, LiteralString] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    pause_s: float = 0.002
    refused: str | None = None
    says: str = ""
    target_is_source: bool = False

    def server(self, place: str) -> str:
        return self.servers.get(place, SERVERS[place])

    @property
    def range(self) -> KeyRange:
        return (KeyType.BIGINT if self.scheme is Scheme.HASH else self.key_type).parse_range(self.moving)


def literal(value: str | None, type_: str) -> str:
    """A value as it stands in a statement."""
    return f"{sql.Literal(value).as_string()}::{type_}"


def run_case(case: Case, make_database: MakeDatabase) -> None:
    """Raises AssertionError that says what was lost, left over, or not refused."""
    site = Shop(case, make_database)
    try:
        move_id = site.plan()
        if case.refused is not None:
            site.assert_refused(move_id, case.refused)
            return
        site.assert_passes(move_id)
        with site.writing() as writer:
            _carry(site, writer, move_id)
        site.assert_like_shadow(moved=True)
    finally:
        site.catalog.close()


def _carry(site: Shop, writer: Writer, first: str) -> None:
    """start → rollback → start → cutover → revert → cutover → complete, each with a round of writes behind it."""
    site.run(first)
    site.with_hold(first, ending.roll_back)
    with writer.resting():
        site.assert_like_shadow(moved=False)
        site.assert_nothing_left(first, "s1", "s2")

    second = site.plan()
    site.run(second)
    if site.case.ddl:
        with writer.resting():
            site.execute_ddl(second)
            writer.writes = site.case.later or writer.writes
        site.run(second)
    writer.await_round("s1")
    for direction, owner in ((Direction.FORWARD, "s2"), (Direction.BACK, "s1"), (Direction.FORWARD, "s2")):
        site.with_hold(second, lambda held, direction=direction: cut_over(held, direction))
        writer.await_round(owner)
    site.with_hold(second, ending.complete)
    writer.await_round("s2")
    site.assert_nothing_left(second, "s1", "s2")


class Shop:
    """The databases of a case, its roles, its configuration, and the verbs of an operator who is no superuser."""

    def __init__(self, case: Case, make_database: MakeDatabase) -> None:
        self.case = case
        self.dsns = {place: make_database(case.server(place), case.options.get(place, "")) for place in PLACES}
        if case.target_is_source:
            self.dsns["s2"] = make_conninfo(self.dsns["s1"], connect_timeout=7)
        unique = conninfo_to_dict(self.dsns["cat"])["dbname"]
        self.owner, self.mover = f"{unique} owner", f"{unique} mover"
        for place in PLACES:
            self._create_roles(place)
        for place in ("s1", "shadow") if case.target_is_source else ("s1", "s2", "shadow"):
            self._load(place)
        self.config = self._config(self.mover)
        self._grant()
        self.catalog = Catalog.install(self.config.catalog_dsn)
        self.catalog.apply(self.config)
        self._admit_owner()

    # --- setting up

    def dsn(self, place: str, role: str | None = None) -> str:
        return self.dsns[place] if role is None else make_conninfo(self.dsns[place], user=role)

    def execute(self, place: str, statements: str, role: str | None = None) -> None:
        with psycopg.connect(self.dsn(place, role), autocommit=True) as connection:
            connection.execute(statements.encode())

    def fetch(self, place: str, query: sql.Composable | str) -> list[tuple[Any, ...]]:
        """As superuser, who sees every row; everywhere with the same settings."""
        with psycopg.connect(self.dsn(place), options=SETTINGS, autocommit=True) as connection:
            return connection.execute(query.encode() if isinstance(query, str) else query).fetchall()

    def _create_roles(self, place: str) -> None:
        """Roles are the server's, not the database's: each case has its own, which hold nothing from before."""
        with psycopg.connect(self.dsn(place), autocommit=True) as connection:
            known = {row[0] for row in connection.execute("SELECT rolname FROM pg_roles").fetchall()}
            for role in {self.owner, self.mover} - known:
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
            if place == "cat":
                return
            database = sql.Identifier(connection.info.dbname)
            owner = sql.Identifier(self.owner)
            connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(database, owner))
            connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(owner))

    def _load(self, place: str) -> None:
        for statements in (self.case.prepared, self.case.target_prepared if place == "s2" else ""):
            if statements:
                self.execute(place, statements)
        other = self.case.target_schema if place == "s2" else None
        self.execute(place, self.case.schema if other is None else other, self.owner)
        for statements in (self.case.everywhere, self.case.rows if place != "s2" else ""):
            if statements:
                self.execute(place, statements, self.owner)

    def _config(self, role: str | None) -> Config:
        case = self.case
        return parse(
            {
                "catalog": {"dsn": self.dsn("cat", role)},
                "shards": {place: {"dsn": self.dsn(place, role)} for place in ("s1", "s2")},
                "keyspaces": {
                    KEYSPACE: {
                        "key_type": case.key_type.value,
                        "scheme": case.scheme.value,
                        "tables": dict(case.tables),
                        "reference_tables": list(case.reference_tables),
                        "routes": [{"range": ":", "shard": "s1"}],
                    }
                },
                "limits": {**LIMITS, **case.limits},
            }
        )

    def _grant(self) -> None:
        """What `shardmove grants --role` prints, to the letter."""
        for granted in shards.grants(self._config(None), self.mover):
            place = granted.place if granted.place in self.dsns else "cat"
            for statement in granted.statements:
                self.execute(place, statement)

    def _admit_owner(self) -> None:
        """What the README says that an application's role needs."""
        owner = sql.Identifier(self.owner).as_string()
        self.execute(
            "cat",
            f"GRANT USAGE ON SCHEMA shardmove_catalog TO {owner};"
            f" GRANT SELECT ON shardmove_catalog.current_routes TO {owner}",
            self.mover,
        )

    # --- the verbs

    @property
    def keyspace(self) -> Keyspace:
        return self.config.keyspace(KEYSPACE)

    def plan(self) -> str:
        plan = planner.move(self.config, self.catalog, KEYSPACE, range_=self.case.range, to="s2")
        return plan.move_ids[0]

    def with_hold(self, move_id: str, verb: Callable[[Hold], object]) -> None:
        with hold(
            self.config,
            self.catalog,
            move_id,
            holder="test",
            make_executor=lambda: InlineExecutor(2),
            progress=Progress(),
        ) as held:
            verb(held)

    def run(self, move_id: str) -> None:
        self.with_hold(move_id, lambda held: run(held, State.READY))

    def execute_ddl(self, move_id: str) -> None:
        """The target first. Until the source has it, too, and everything was compared anew, nothing is cut over."""
        for place in ("s2", "shadow", "s1"):
            self.execute(place, self.case.ddl, self.owner)
            with pytest.raises((Refused, SchemaDrift)):
                self.with_hold(move_id, lambda held: cut_over(held, Direction.FORWARD))

    # --- what is asserted

    def checklist(self, move_id: str) -> list[preflight.Line]:
        name = fence.application_name(move_id)
        with (
            connect(self.config.catalog_dsn, application_name=name) as catalog,
            connect(self.config.shard_dsn("s1"), application_name=name) as source,
            connect(self.config.shard_dsn("s2"), application_name=name) as target,
        ):
            return preflight.checklist(Site(self.catalog.move(move_id), source, target, self.config.limits, catalog))

    def assert_passes(self, move_id: str) -> None:
        problems = [line for line in self.checklist(move_id) if not line.passed]
        assert not problems, problems

    def assert_refused(self, move_id: str, text: str) -> None:
        """The text is in a line of the checklist, `run` refuses with one of them, and nothing has changed."""
        said = [
            line.problem.message for line in self.checklist(move_id) if line.problem is not None and not line.passed
        ]
        assert any(text in message for message in said), said or "it is not refused"
        with pytest.raises(Refused) as refusal:
            self.run(move_id)
        assert any(message in str(refusal.value) for message in said)
        for place in ("s1", "s2"):
            assert self.fetch(place, _LEFT.format("%")) == []

    def assert_nothing_left(self, move_id: str, *places: str) -> None:
        for place in places:
            assert self.fetch(place, _LEFT.format(f"%{move_id}%")) == []
            assert self.fetch(place, "TABLE shardmove.fence") == self.fetch(place, "TABLE shardmove.batch") == []

    def assert_like_shadow(self, *, moved: bool) -> None:
        """Both shards together hold what the shadow holds; the target the range, the source the rest."""
        for name in self.keyspace.tables:
            wanted = self._rows("shadow", name)
            found = {place: self._rows(place, name) for place in ("s1", "s2")}
            for place, is_target in (("s1", False), ("s2", True)):
                here = Counter({row: n for row, n in wanted.items() if (moved and row[0]) == is_target})
                assert here == found[place], _difference(name, place, here - found[place], found[place] - here)
            assert wanted, f"{name} is empty: nothing was tried"

    def _rows(self, place: str, name: TableName) -> Counter[tuple[bool, str, str]]:
        """(is in the moving range, table or partition, the row as text), each as often as it is there."""
        left_out = self.case.unpredictable.get(str(name), ())
        with connect(self.dsns["shadow"], application_name="test") as shadow:
            columns = [row[0] for row in shadow.execute(_ALL_COLUMNS, (name.schema, name.name)).fetchall()]
        query = sql.SQL(
            "SELECT key::text, part::regclass::text, CASE WHEN octet_length(row) > {long} THEN md5(row) ELSE row END"
            " FROM (SELECT {key}, tableoid, ROW({columns})::text FROM {table} OFFSET 0) AS t(key, part, row)"
        ).format(
            key=sql.Identifier(self.keyspace.tables[name]),
            long=sql.Literal(LONG_BYTES),
            columns=names(column for column in columns if column not in left_out),
            table=relation(name),
        )
        return Counter((self.is_moving(key), part, row) for key, part, row in self.fetch(place, query))

    def is_moving(self, key: str) -> bool:
        """From the key as PostgreSQL prints it. Dates and times that Python does not have are beyond every end."""
        range_ = self.case.range
        if self.case.key_type in (KeyType.DATE, KeyType.TIMESTAMPTZ) and not _IN_PYTHON.match(key):
            return (range_.lower if key == "-infinity" or key.endswith("BC") else range_.upper) is None
        return self.keyspace.place(self.case.key_type.parse(key)) in range_

    # --- the writer

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        writer = Writer(self)
        writer.thread.start()
        try:
            yield writer
        finally:
            writer.stop()
        writer.check()


class Writer:
    """One thread, one transaction after the other: on the owner of the key, then on the shadow."""

    def __init__(self, site: Shop) -> None:
        self.site = site
        self.writes = site.case.writes
        self.acknowledged = 0
        self.owner_of_range: str | None = None
        self.rounds = 0
        self.failure: BaseException | None = None
        self._ends = threading.Event()
        self._at_rest = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="writer", daemon=True)
        keys = [site.case.key_type.parse(text) for text in site.case.keys]
        self.sides = {key: site.keyspace.place(key) in site.case.range for key in keys}
        assert set(self.sides.values()) == {True, False}, "a case writes inside and outside the range"

    def stop(self) -> None:
        self._ends.set()
        self.thread.join(AWAITED_S)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No transaction is under way in the block."""
        with self._at_rest:
            self.check()
            yield

    def await_round(self, owner: str) -> None:
        """Returns when every write was made with every key, and those of the range went to that shard."""
        deadline = time.monotonic() + AWAITED_S
        begun = None
        while True:
            self.check()
            assert time.monotonic() < deadline, f"the writer does not come around on {owner}"
            if self.owner_of_range != owner:
                begun = None
            elif begun is None:
                begun = self.rounds
            elif self.rounds > begun + 1:
                return
            self._ends.wait(0.002)

    def _work(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self.failure = error

    def _write(self) -> None:
        site = self.site
        client = ShardClient(
            site.dsn("cat", site.owner),
            {place: site.dsn(place, site.owner) for place in ("s1", "s2")},
            keyspace=KEYSPACE,
        )
        with psycopg.connect(site.dsn("shadow", site.owner)) as shadow:
            try:
                for number in itertools.count(1):
                    for key, write in itertools.product(self.sides, range(len(self.writes))):
                        with self._at_rest:
                            # Another thread may have changed the writes since.
                            self._transaction(client, shadow, key, self.writes[write % len(self.writes)], number)
                        if self._ends.wait(site.case.pause_s):
                            return
                    self.rounds = number
            finally:
                client.close()

    def _transaction(
        self, client: ShardClient, shadow: psycopg.Connection[Any], key: Key, write: str, number: int
    ) -> None:
        statement = self._statement(key, write, number)
        touched = client.transaction(key, lambda connection: _execute(connection, statement))
        self.acknowledged += 1
        if self.sides[key]:
            self.owner_of_range = client.last.shard
        expected = _execute(shadow, statement)
        shadow.commit()
        assert touched == expected, f"{statement}: {touched} rows on {client.last.shard}, {expected} on the shadow"

    def _statement(self, key: Key, write: str, number: int) -> bytes:
        same_side = [each for each in self.sides if self.sides[each] == self.sides[key]]
        other = same_side[(same_side.index(key) + 1) % len(same_side)]
        for word, value in (("$key", self._literal(key)), ("$other", self._literal(other)), ("$n", str(number))):
            write = write.replace(word, value)
        return write.encode()

    def _literal(self, key: Key) -> str:
        return literal(key_text(key), self.site.case.key_type)


def _execute(connection: psycopg.Connection[Any], statements: bytes) -> list[int]:
    """How many rows each statement touched."""
    cursor = connection.execute(statements, prepare=False)
    counts = [cursor.rowcount]
    while cursor.nextset():
        counts.append(cursor.rowcount)
    return counts


def page(cases: Iterable[Case]) -> str:
    """docs/kinds.md."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    lines = [_HEAD]
    for group, members in groups.items():
        lines += [f"\n## {group}\n", "| kind | a move of it |", "|---|---|"]
        lines += [f"| {case.kind} | {_verdict(case)} |" for case in members]
    return "\n".join(lines) + "\n"


_HEAD: Final = """\
# Kinds of keys, tables and columns

Each line is a test that makes the whole way under writers, as a role that is no superuser: copied, rolled back, copied
again, cut over, reverted, cut over, completed; every row is compared in the end. Or it is refused before anything has
changed, with a message that has these words. This page is made from the tests: `python -m tests.test_kinds`."""


def _verdict(case: Case) -> str:
    said = f"; {case.says}" if case.says else ""
    return f"works{said}" if case.refused is None else f"refused: “{case.refused}”{said}"


def _difference(
    name: TableName, place: str, missing: Counter[tuple[bool, str, str]], extra: Counter[tuple[bool, str, str]]
) -> str:
    def some(rows: Counter[tuple[bool, str, str]]) -> Sequence[str]:
        return [row for *_, row in itertools.islice(rows, 5)]

    return (
        f"{name} on {place}: {missing.total()} rows are missing, like {some(missing)};"
        f" {extra.total()} should not be there, like {some(extra)}"
    )


_IN_PYTHON: Final = re.compile(r"\d{4}-(?!.*BC)")
_ALL_COLUMNS: Final = """
    SELECT attname FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped
      AND attrelid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                      WHERE nspname = %s AND relname = %s)
    ORDER BY attnum
"""

# Objects of a move. Where none was ever begun there is no schema, and no function of ours.
_LEFT: Final = """
    SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE 'shardmove_{0}'
    UNION ALL
    SELECT 'function ' || proname FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE nspname = 'shardmove' AND proname LIKE '{0}'
    UNION ALL
    SELECT 'relation ' || relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname = 'shardmove' AND relname LIKE '{0}'
"""
