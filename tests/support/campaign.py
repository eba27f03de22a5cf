"""Whole moves of random schemas, each under a writer: equal to the shadow at the end, or refused before anything began.

What preflight lets pass has to arrive: a failure after it is a bug of the engine, or a check that is missing.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg
import pytest

from router.client import ShardClient
from shardmove.coordinator import ending
from shardmove.coordinator.cutover import cut_over
from shardmove.domain import hashing, points
from shardmove.domain.errors import Interrupted, Refused
from shardmove.domain.keys import Key
from shardmove.domain.moves import Direction, Scheme, State
from tests.support import columns as made_of
from tests.support.cases import AWAITED_S, MakeDatabase, Shop, Writer
from tests.support.schemas import Generated

AWAITED_TRANSACTIONS: Final = 40
WRITES_A_NUMBER: Final = 20
"""So many writes have the same `$n`: those of one key meet on the same rows."""
CAMPAIGN_VARIABLE: Final = "SHARDMOVE_SCHEMAS"
"""How many seeds, where not the few of every run."""
PROPERTY: Final = "random schema"
"""What a test of a seed records: seed, outcome and kinds."""


def run_seed(generated: Generated, make_database: MakeDatabase) -> str:
    """'equal', or 'refused: …'. Raises AssertionError, or whatever went wrong after preflight had passed."""
    site = RandomShop(generated, make_database)
    try:
        move_id = site.plan()
        if generated.refused is not None:
            return _refused(site, move_id)
        with site.writing() as writer:
            try:
                move_id = _begin(site, writer, move_id)
            except Refused:
                if site.catalog.move(move_id).state is not State.PENDING:
                    raise
                with writer.resting():
                    site.assert_like_shadow(moved=False)
                    return _refused(site, move_id)
            _carry(site, writer, move_id)
        site.assert_like_shadow(moved=True)
        return f"equal ({writer.acknowledged} transactions, {writer.failed} failed on both)"
    finally:
        site.catalog.close()


def _refused(site: RandomShop, move_id: str) -> str:
    problems = [line.problem.message for line in site.checklist(move_id) if line.problem and not line.passed]
    assert problems, f"preflight lets pass: {site.generated.refused}"
    site.assert_untouched(lambda: site.assert_refused(move_id, problems[0]))
    return f"refused: {problems[0]}"


def _begin(site: RandomShop, writer: RandomWriter, move_id: str) -> str:
    """start → cut off here and there → perhaps rollback and start → ready. The move that is ready."""
    for number, stop in enumerate(site.generated.stops):
        with _cut_off_at(stop):
            site.run(move_id)
        if number == 0 and site.generated.goes_back:
            site.with_hold(move_id, ending.roll_back)
            with writer.resting():
                site.assert_like_shadow(moved=False)
                site.assert_nothing_left(move_id, "s1", "s2")
            move_id = site.plan()
    site.run(move_id)
    return move_id


def _carry(site: RandomShop, writer: RandomWriter, move_id: str) -> None:
    """ready → cutover → revert → cutover → complete, which may be cut off."""
    writer.await_round("s1")
    with writer.resting():
        writer.writes = site.case.writes  # rows no longer cross the ends of the range: two shards own its sides
    for direction, owner in ((Direction.FORWARD, "s2"), (Direction.BACK, "s1"), (Direction.FORWARD, "s2")):
        site.with_hold(move_id, lambda held, direction=direction: cut_over(held, direction))
        writer.await_round(owner)
    with _cut_off_at("erase.after" if site.generated.stops else ""):
        site.with_hold(move_id, ending.complete)
    site.with_hold(move_id, ending.complete)
    writer.await_round("s2")
    site.assert_nothing_left(move_id, "s1", "s2")


@contextmanager
def _cut_off_at(stop: str) -> Iterator[None]:
    def interrupt(name: str) -> None:
        raise Interrupted(f"cut off at {name}")

    with points.armed(stop, interrupt), suppress(Interrupted):
        yield


class RandomShop(Shop):
    def __init__(self, generated: Generated, make_database: MakeDatabase) -> None:
        self.generated = generated
        super().__init__(generated.case, make_database)

    @contextmanager
    def writing(self) -> Iterator[RandomWriter]:
        writer = RandomWriter(self)
        writer.thread.start()
        try:
            yield writer
        finally:
            writer.stop()
        writer.check()

    def is_moving(self, key: str) -> bool:
        """Keys that only rows have, no range and no client, are placed by the server."""
        if key not in made_of.LOADED_KEYS.get(self.case.key_type, ()):
            return super().is_moving(key)
        if self.case.scheme is Scheme.HASH:
            hashed = hashing.SQL[self.case.key_type].format(made_of.value(key, str(self.case.key_type)))
            ((place,),) = self.fetch("shadow", f"SELECT {hashed}")
            return place in self.case.range
        is_first = key == "-infinity" or key.endswith("BC")
        return (self.case.range.lower if is_first else self.case.range.upper) is None

    def assert_untouched(self, work: Callable[[], None]) -> None:
        before = self._everything()
        work()
        assert self._everything() == before

    def _everything(self) -> list[object]:
        """Every relation, function and trigger of both shards, and the rows."""
        found: list[object] = []
        for place in ("s1", "s2"):
            found.append(self.fetch(place, _OBJECTS))
            for (relation,) in self.fetch(place, _RELATIONS):
                found.append(sorted(self.fetch(place, f"SELECT t::text FROM ONLY {relation} t")))
        return found


_RELATIONS: Final = """
    SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname !~ '^(pg_(catalog|toast|temp)|information_schema)' ORDER BY 1
"""
_OBJECTS: Final = """
    SELECT oid::regclass::text, relkind::text, reloptions::text FROM pg_class WHERE oid > 16383
    UNION ALL SELECT oid::regprocedure::text, 'function', prosrc FROM pg_proc WHERE oid > 16383
    UNION ALL SELECT tgrelid::regclass::text, tgname, tgenabled::text FROM pg_trigger
    ORDER BY 1, 2, 3
"""


class RandomWriter(Writer):
    """Random writes may break constraints: then they have to break them on the shard and on the shadow alike."""

    def __init__(self, site: RandomShop) -> None:
        super().__init__(site)
        self.failed = 0
        self.writes = (*site.case.writes, *site.generated.crossing)
        self._rng = random.Random(site.generated.seed)

    def await_round(self, owner: str) -> None:
        """Not every write: so many transactions, since the first that went to that shard."""
        deadline = time.monotonic() + AWAITED_S
        begun = None
        while begun is None or self.acknowledged < begun + AWAITED_TRANSACTIONS:
            self.check()
            assert time.monotonic() < deadline, f"the writer does not come around on {owner}"
            if self.owner_of_range != owner:
                begun = None
            elif begun is None:
                begun = self.acknowledged
            self._ends.wait(0.002)

    def _transaction(
        self, client: ShardClient, shadow: psycopg.Connection[Any], key: Key, write: str, number: int
    ) -> None:
        """Of which key and write, is drawn anew: no two rounds are in the same order."""
        key, write = self._rng.choice(list(self.sides)), self._rng.choice(self.writes)
        number = 1 + self.acknowledged // WRITES_A_NUMBER
        opposite = next(each for each, side in self.sides.items() if side != self.sides[key])
        statement = self._statement(key, write.replace("$cross", self._literal(opposite)), number)
        found = _tried(lambda: client.transaction(key, lambda connection: _run(connection, statement)))
        self.acknowledged += 1
        if self.sides[key] and isinstance(found, list):
            self.owner_of_range = client.last.shard
        expected = _tried(lambda: _run(shadow, statement, commits=True))
        shadow.rollback()
        self.failed += isinstance(found, str)
        assert found == expected, f"{statement.decode()}: {found} on {client.last.shard}, {expected} on the shadow"


def _run(connection: psycopg.Connection[Any], statements: bytes, *, commits: bool = False) -> list[int]:
    """How many rows each statement touched."""
    cursor = connection.execute(statements, prepare=False)
    counts = [cursor.rowcount]
    while cursor.nextset():
        counts.append(cursor.rowcount)
    if commits:
        connection.commit()
    return counts


def _tried(work: Callable[[], list[int]]) -> list[int] | str:
    """What it returns, or the class of the constraint, value or policy that stood in the way.

    Which one of several constraints is found broken first is not told apart.
    """
    try:
        return work()
    except (psycopg.IntegrityError, psycopg.DataError, psycopg.errors.InsufficientPrivilege) as error:
        return f"refused with {(error.sqlstate or '')[:2]}"


# --- what a campaign prints

_outcomes: list[str] = []
_reporters: list[pytest.TerminalReporter] = []


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if isinstance(reporter, pytest.TerminalReporter):
        _reporters[:] = [reporter]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each seed, where it is a campaign."""
    if report.when != "call":
        return
    for name, said in report.user_properties:
        if not isinstance(said, dict) or name != PROPERTY:
            continue
        outcome = said["outcome"] if report.passed else "FAILED"
        _outcomes.append(outcome.split()[0].strip(":"))
        for reporter in _reporters if CAMPAIGN_VARIABLE in os.environ else ():
            reporter.ensure_newline()
            reporter.line(f"seed {said['seed']}: {outcome}   [{said['kinds']}]")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _outcomes:
        counted = ", ".join(f"{number} {outcome}" for outcome, number in sorted(Counter(_outcomes).items()))
        terminalreporter.line(f"{len(_outcomes)} random schemas: {counted}")
