"""Servers that lose their last commits: by a crash of who commits asynchronously, or by a failover to a standby.

    with Standby(servers["s1"], servers["standby"]) as standby:
        standby.fall_behind()                    # connected no more; what comes now it will never have
        …writes…
        standby.take_over()                      # answers at s1's address from now on, on a timeline of its own

What a server lost by itself is no fault of a move, and has to be told apart exactly. Writers own disjoint tenants, so a
crash leaves of each writer's transactions a beginning, and nothing behind it: `Book.cut` finds where it ends.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.demo import check, ledger, shop
from shardmove.demo.ledger import Image, Outcome
from shardmove.demo.writers import WriterFleet
from shardmove.domain import points
from shardmove.domain.errors import Failed
from shardmove.postgres import watcher
from shardmove.postgres.embedded import Cluster, Server
from tests.support.engine import until
from tests.support.servers import SERVERS
from tests.support.twins import rows, stop_the_log_writer
from tests.support.world import World

LOSING: Final = {
    "fsync": "off",
    "wal_writer_delay": "10s",
    "wal_writer_flush_after": "1GB",
    "bgwriter_lru_maxpages": "0",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
}
"""Nobody but who commits synchronously writes the log out."""

PLACE: Final = "standby"
MOVED: Final = "tenant_id >= 20"
WRITES_AT_RISK: Final = 15
"""So many writes are acknowledged behind the last flush before a server crashes, where the fence lets them."""

Key: TypeAlias = tuple[str, str]
"""A table's name, and a row's primary key as the ledger writes it."""


@pytest.fixture(scope="module")
def losing() -> Iterator[Cluster]:
    """Servers of this module alone, which may be crashed and swapped; one more is the place for a standby."""
    with Cluster((*SERVERS, PLACE), settings=LOSING) as cluster:
        yield cluster


# --- standbys


class Standby:
    """A physical standby of one server, streaming asynchronously, in another server's place.

    Args:
        place: a running server that nobody needs; its data directory is replaced.
    """

    def __init__(self, primary: Server, place: Server) -> None:
        self._primary = primary
        self._place = place

    def __enter__(self) -> Self:
        own_settings = _settings(self._place).read_bytes()
        self._place.stop("immediate")
        shutil.rmtree(self._place.data)
        source = make_conninfo("", **conninfo_to_dict(self._primary.dsn))
        options = ("--checkpoint=fast", "--no-sync", "--write-recovery-conf", f"--pgdata={self._place.data}")
        with watcher.start_lock(self._place.data) as lock:
            self._primary.binaries.run("pg_basebackup", f"--dbname={source}", *options, lock=lock)
        _settings(self._place).write_bytes(own_settings)
        self._place.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._place.stop("immediate")

    def fall_behind(self) -> None:
        """When it returns, the standby has everything up to now, and will never have anything more."""
        with _session(self._primary) as primary:
            ((now,),) = primary.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        with _session(self._place) as standby:
            until(lambda: standby.execute("SELECT pg_last_wal_replay_lsn() >= %s", (now,)).fetchone() == (True,))
            standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
            standby.execute("SELECT pg_reload_conf()")
            until(lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchone() == (0,))

    def take_over(self) -> None:
        """The primary dies; from now on the standby answers at its address."""
        self._primary.stop("immediate")
        self._place.stop("immediate")
        self._swap()
        self._primary.start()
        with _session(self._primary) as promoted:
            assert promoted.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)

    def bring_back(self) -> None:
        """The old primary's disk was found again: it answers at its own address, with all that it ever had."""
        self._primary.stop("immediate")
        self._swap()
        self._primary.start()

    def _swap(self) -> None:
        settings = {each: _settings(each).read_bytes() for each in (self._primary, self._place)}
        aside = self._place.directory / "aside"
        self._primary.data.rename(aside)
        self._place.data.rename(self._primary.data)
        aside.rename(self._place.data)
        for server, own in settings.items():
            _settings(server).write_bytes(own)


def _settings(server: Server) -> Path:
    """What a server alone has: its port, above all."""
    return server.data / "shardmove.conf"


def _session(server: Server) -> psycopg.Connection[Any]:
    return psycopg.connect(server.dsn, autocommit=True, application_name="operator")


# --- plain sessions


def execute(world: World, shard: str, statement: str) -> None:
    """As an application does: a session of its own, in autocommit, with nothing of ours set."""
    with psycopg.connect(world.dsns[shard], autocommit=True, application_name="application") as connection:
        connection.execute(statement.encode())


def names_of(world: World, shard: str, tenant: int) -> list[str]:
    return [row[0] for row in world.fetch(shard, f"SELECT name FROM tenants WHERE tenant_id = {tenant}")]


def differences(world: World, condition: str = MOVED) -> list[str]:
    """Every row of the range that only one of s1 and s2 has, of every table; by plain SQL."""
    found: list[str] = []
    for table in shop.KEY_COLUMNS:
        query = f"SELECT t::text FROM {table} AS t WHERE {condition}"
        source, target = (rows(world.dsns[shard], query) for shard in ("s1", "s2"))
        found += [f"{table}: only s1 has {row}" for row in (source - target).elements()]
        found += [f"{table}: only s2 has {row}" for row in (target - source).elements()]
    return found


# --- what a crashed server kept


@dataclass(slots=True)
class Cut:
    """What a crash left of what one server had acknowledged.

    Attributes:
        lost: acknowledged transactions of the application that are gone, each writer's last ones.
        images: what each row has ever been, within what was kept.
        damage: rows that no beginning of the writers' transactions explains.
    """

    lost: int = 0
    images: dict[Key, set[Image]] = field(default_factory=lambda: defaultdict(set))
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Step:
    """One transaction of a writer that committed, or may have."""

    changes: Sequence[tuple[Key, Image]]
    is_certain: bool

    def within(self, wanted: Callable[[int], bool]) -> _Step:
        """What it did to those tenants; the others are on another shard by now."""
        return _Step([(key, image) for key, image in self.changes if wanted(_tenant(key))], self.is_certain)


class Book:
    """The ledger of one incarnation of the writers, read transaction by transaction."""

    def __init__(self, directory: Path) -> None:
        baseline = json.loads((directory / ledger.BASELINE).read_text(encoding="utf-8"))
        self.baseline: dict[Key, Image] = {
            (table, key): image for table, rows_ in baseline.items() for key, image in rows_.items()
        }
        self._writers = [list(_steps(path)) for path in sorted(directory.glob("writer-*.jsonl"))]

    def cut(self, held: Mapping[Key, Image], within: Callable[[int], bool]) -> Cut:
        """Where the transactions end that explain what a server holds.

        Args:
            held: every row of the server, of the tenants that it owns.
            within: whether a tenant is one of them.
        """
        cut = Cut()
        expected = {key: image for key, image in self.baseline.items() if within(_tenant(key))}
        for key, image in expected.items():
            cut.images[key].add(image)
        for steps in self._writers:
            own = [step.within(within) for step in steps]
            own = [step for step in own if step.changes]
            touched = {key for step in own for key, _ in step.changes}
            best = _explained(own, {key: expected.get(key) for key in touched}, held)
            if best is None:
                cut.damage.append(
                    f"no beginning of a writer's {len(own)} transactions explains {_nearest(own, expected, held)}"
                )
                continue
            kept = own[: best + 1]
            cut.lost += sum(step.is_certain for step in own[best + 1 :])
            for step in kept:
                for key, image in step.changes:
                    cut.images[key].add(image)
            for key in touched:
                expected.pop(key, None)
        cut.damage += [
            f"{table} {key} is {held.get((table, key))}, and nobody changed {image}"
            for (table, key), image in expected.items()
            if held.get((table, key)) != image
        ]
        return cut


def _steps(path: Path) -> Iterator[_Step]:
    intent: list[tuple[Key, Image]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "intent" in record:
            intent = [((table, key), image) for table, key, image in record["rows"]]
        elif intent and record["outcome"] != Outcome.FAILED:
            yield _Step(intent, record["outcome"] == Outcome.ACKNOWLEDGED)
            intent = []
        else:
            intent = []


def _explained(steps: Sequence[_Step], before: Mapping[Key, Image], held: Mapping[Key, Image]) -> int | None:
    """The last step of the longest beginning after which the touched rows are as they are held; -1 for none of them.

    A step that is not certain may be there or not: both are tried.
    """
    best: int | None = None
    states: list[dict[Key, Image]] = [dict(before)]
    for number in range(-1, len(steps)):
        if number >= 0:
            step = steps[number]
            changed = [{**state, **dict(step.changes)} for state in states]
            states = changed if step.is_certain else [*states, *changed]
        if any(all(held.get(key) == image for key, image in state.items()) for state in states):
            best = number
    return best


def _nearest(steps: Sequence[_Step], before: Mapping[Key, Image], held: Mapping[Key, Image]) -> str:
    """What differs where the least does."""
    state = {key: before.get(key) for step in steps for key, _ in step.changes}
    least = [(key, image, held.get(key)) for key, image in state.items() if held.get(key) != image]
    where = 0
    for number, step in enumerate(steps, 1):
        state.update(step.changes)
        differing = [(key, image, held.get(key)) for key, image in state.items() if held.get(key) != image]
        if len(differing) <= len(least):
            least, where = differing, number
    return f"(after {where}) {least[:3]}"


def _tenant(key: Key) -> int:
    return int(key[1].partition(",")[0])


def held_rows(world: World, shard: str, within: Callable[[int], bool]) -> dict[Key, Image]:
    """Every row of a shard whose tenant is wanted, in the ledger's words."""
    found: dict[Key, Image] = {}
    with psycopg.connect(shop.pinned(world.dsns[shard]), autocommit=True) as connection:
        for table in shop.WRITTEN_TABLES:
            query = sql.SQL("SELECT {} FROM {} t").format(table.image, table.identifier)
            for key, image, *_ in connection.execute(query).fetchall():
                if within(_tenant((table.name, key))):
                    found[table.name, key] = image
    return found


# --- writers whose servers crash


class Stage:
    """A world whose application commits asynchronously, its writers, and what was seen of their rows so far.

    Each crash ends an incarnation of the writers: what the server kept is the next one's beginning.
    """

    def __init__(self, world: World, cluster: Cluster, *, rate: float = 300.0) -> None:
        self.world = world
        self._cluster = cluster
        self._rate = rate
        self._fleet: WriterFleet | None = None
        self._seen: dict[Key, set[Image]] = defaultdict(set)
        self.damage: list[str] = []
        self.lost = 0
        self.crashes: list[str] = []
        for shard in ("s1", "s2"):
            database = conninfo_to_dict(world.dsns[shard])["dbname"]
            execute(world, shard, f"ALTER DATABASE {database} SET synchronous_commit = off")

    @contextmanager
    def writing(self) -> Iterator[Self]:
        self._start()
        try:
            yield self
        finally:
            self._stop()

    def write_on(self, count: int = WRITES_AT_RISK, *, timeout_s: float = 60.0) -> None:
        assert self._fleet is not None
        self._fleet.await_writes(count, timeout_s=timeout_s)

    def hold_up_the_log(self, shard: str) -> None:
        """From now on, until the server crashes, its log's own writer does nothing: it comes by now and then."""
        with _session(self._cluster[shard]) as operator:
            stop_the_log_writer(operator)

    def crash(self, shard: str, where: str) -> None:
        """The server is stopped as by a loss of power, judged, and started again; then others write on.

        Its writers may have lost their last transactions, and nobody may have kept what it lost.
        """
        server = self._cluster[shard]
        self.hold_up_the_log(shard)
        with suppress(Failed):  # a closed fence lets nobody write
            self.write_on(timeout_s=0.5)
        server.kill()
        self._stop()
        other = {"s1": "s2", "s2": "s1"}[shard]
        elsewhere = held_rows(self.world, other, lambda tenant: tenant >= 20)  # before anybody carries anything more
        server.start()
        self._judge(shard, where)
        is_own = self._owned_by(shard)
        self.damage += [
            f"{where}: {table} {key}: {other} has {image}, which {shard} lost"
            for (table, key), image in elsewhere.items()
            if is_own(_tenant((table, key))) and image not in self._seen[table, key]
        ]
        self._start_anew()

    def fail_over(self, shard: str, standby: Standby) -> None:
        """The standby takes over; what it lacks is lost, and may be left on the other side until that is mended."""
        self._cluster[shard].stop("immediate")
        self._stop()  # or they would write on behind what was lost
        standby.take_over()
        self._judge(shard, "a failover")
        self._start_anew()

    def _judge(self, crashed: str, where: str) -> None:
        """Every shard holds what its owners' writers did; the crashed one alone may lack their last transactions."""
        book = Book(self.world.directory / "ledger")
        for shard in ("s1", "s2"):
            within = self._owned_by(shard)
            cut = book.cut(held_rows(self.world, shard, within), within)
            self.damage += [f"{where}: {shard}: {line}" for line in cut.damage]
            if shard != crashed and cut.lost:
                self.damage.append(f"{where}: {shard} lost {cut.lost} transactions when {crashed} crashed")
            for key, images in cut.images.items():
                self._seen[key] |= images
            if shard == crashed:
                self.crashes.append(f"{shard} at {where}: {cut.lost} lost")
                self.lost += cut.lost

    def _owned_by(self, shard: str) -> Callable[[int], bool]:
        routes = self.world.catalog.routes()["shop"]
        return lambda tenant: routes.at(tenant).shard == shard

    def _start(self) -> None:
        self._fleet = WriterFleet(
            self.world.directory / "ledger",
            self.world.dsns["cat"],
            self.world.shards,
            tenants=list(range(40)),
            focus=list(range(20, 40)),
            processes=0,
            threads=3,
            rate=self._rate,
            deadline_s=0.5,
        )
        self._fleet.start()

    def _start_anew(self) -> None:
        """What is there now is the beginning of the next incarnation's ledger, and on disk on both shards."""
        for shard in ("s1", "s2"):
            execute(self.world, shard, "CHECKPOINT")
        directory = self.world.directory / "ledger"
        directory.rename(directory.with_name(f"ledger-{len(self.crashes)}"))
        routes = self.world.catalog.routes()["shop"]
        check.take_baseline(directory, self.world.shards, lambda tenant: routes.at(tenant).shard)
        self._start()

    def _stop(self) -> None:
        if self._fleet is not None:
            self._fleet.stop()


@contextmanager
def struck(
    point: str, strike: Callable[[], object], *, nth: int = 1, when: Callable[[], bool] = lambda: True
) -> Iterator[threading.Event]:
    """Strikes once, where the point is reached for the n-th time by whoever, from when on; yields an event: it did."""
    reached = itertools.count(1)
    done = threading.Event()

    def hook(_: str) -> None:
        if when() and next(reached) == nth:
            strike()
            done.set()

    with points.armed(point, hook):
        yield done
