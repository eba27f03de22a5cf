"""Catch-up converges: whatever writers do, whoever runs it beside whom, and wherever it dies.

The gate of these stories has islands: batches are recorded out of order, while the mirror runs.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Final, TypeAlias

import psycopg
import pytest
from psycopg import errors

from shardmove.domain import points
from shardmove.domain.errors import ShardmoveError
from shardmove.postgres.connect import Connection, is_unreachable
from shardmove.postgres.sql import Interval
from shardmove.protocol.catch_up import Mirror, Pass
from shardmove.protocol.replica import become_replica
from tests.support.engine import Engine, until
from tests.support.twins import (
    Died,
    MakeEngine,
    application,
    carry_all,
    copy_all,
    copy_batch,
    differences,
    end_session,
    journalled,
    mirror,
    once,
    spawn,
)
from workers.copy import BatchBlocked

BOUND_S: Final = 180.0
POINTS: Final = (
    "catch_up.after_receiver_lock",
    "catch_up.after_giver_snapshot",
    "catch_up.before_compare",
    "make_durable.before",
    "catch_up.receiver.before",
    "catch_up.receiver.after",
    "catch_up.giver.after",
)

SCHEMA = """
    CREATE TABLE orders (tenant_id bigint, id bigint, note text, PRIMARY KEY (tenant_id, id), UNIQUE (tenant_id, note));
    CREATE TABLE items (
        tenant_id bigint, id bigint, line int, amount int, PRIMARY KEY (tenant_id, id, line),
        FOREIGN KEY (tenant_id, id) REFERENCES orders ON DELETE CASCADE ON UPDATE CASCADE
    )
"""
TABLES: Final = {"orders": "tenant_id", "items": "tenant_id"}
TENANTS: Final = (99, 100, 101, 200)  # the two in the middle move
IDS: Final = range(1, 16)
NOTES: Final = "abcdefghijklmnop"
ROWS = """
    INSERT INTO orders SELECT t, i, chr(96 + i) FROM unnest(ARRAY[99, 100, 101, 200]) t, generate_series(1, 12) i;
    INSERT INTO items SELECT tenant_id, id, 1, 0 FROM orders
"""


@pytest.fixture
def shop(engine: MakeEngine) -> Engine:
    """Orders with a unique value that wanders between them, and items that follow by cascade."""
    return engine(schema=SCHEMA, tables=TABLES, rows=ROWS)


# --- random writers and batches


def write(client: Connection, rng: random.Random) -> None:
    """One transaction of an application, which gives it up where a constraint or another transaction is in its way."""
    with suppress(errors.IntegrityError, errors.DeadlockDetected), client.transaction():
        for _ in range(rng.randint(1, 3)):
            client.execute(statement(rng).encode())


def statement(rng: random.Random) -> str:
    tenant, id_ = rng.choice(TENANTS), rng.choice(IDS)
    here = f"tenant_id = {tenant} AND id = {id_}"
    note = rng.choice(NOTES)
    return rng.choice(
        [
            f"INSERT INTO orders VALUES ({tenant}, {id_}, '{note}') ON CONFLICT DO NOTHING",
            f"UPDATE orders SET note = '{note}' WHERE {here}",
            f"UPDATE orders SET id = {rng.choice(IDS)} WHERE {here}",
            f"UPDATE orders SET tenant_id = {rng.choice(TENANTS)} WHERE {here}",
            f"DELETE FROM orders WHERE {here}",
            pass_round(tenant, rng),
            pass_round(tenant, rng),
            f"INSERT INTO items SELECT tenant_id, id, {rng.randint(1, 3)}, 1 FROM orders WHERE {here}"
            " ON CONFLICT DO NOTHING",
            f"UPDATE items SET amount = amount + 1 WHERE tenant_id = {tenant}",
        ]
    )


def pass_round(tenant: int, rng: random.Random) -> str:
    """Some orders of a tenant pass their unique values round, in two statements."""
    mine = f"tenant_id = {tenant} AND id = ANY (ARRAY{rng.sample(list(IDS), rng.randint(2, 4))})"
    return (
        f"UPDATE orders SET note = '~' || note WHERE {mine};"
        " WITH ring AS (SELECT tenant_id, id, note, row_number() OVER (ORDER BY id) AS place, count(*) OVER () AS size"
        f" FROM orders WHERE {mine})"
        " UPDATE orders o SET note = substr(giver.note, 2) FROM ring AS taker JOIN ring AS giver"
        " ON giver.place = taker.place % taker.size + 1 WHERE (o.tenant_id, o.id) = (taker.tenant_id, taker.id)"
    )


Batch: TypeAlias = tuple[int, Interval]


def cut(rng: random.Random) -> list[Batch]:
    """The batches of both tables, in the order in which they happen to be copied."""
    batches: list[Batch] = []
    for ordinal, width in ((1, 2), (2, 3)):
        places = sorted({(rng.choice(TENANTS[1:3]), rng.choice(IDS), 1) for _ in range(5)})
        ends = [None, *(tuple(str(value) for value in place[:width]) for place in places), None]
        batches += [(ordinal, interval) for interval in dict.fromkeys(pairwise(ends)) if interval[0] != interval[1]]
    batches += [] if len(batches) > 2 else [(1, (None, None)), (2, (None, None))]
    rng.shuffle(batches)
    return batches


def copy_in_turn(engine: Engine, batches: list[Batch], unblock: Callable[[], object]) -> None:
    """Copies every batch; one that meets a unique value on its way is tried again after `unblock`."""
    while batches:
        ordinal, interval = batches.pop()
        try:
            copy_batch(engine, interval, ordinal)
        except BatchBlocked:
            batches.insert(0, (ordinal, interval))
            unblock()


# --- one pass that dies


@pytest.mark.parametrize("point", POINTS)
def test_a_pass_that_dies_anywhere_loses_nothing(shop: Engine, point: str) -> None:
    """The process ends there, or one of its two sessions does: the next pass, of anybody, makes good."""
    copy_all(shop)
    for number, fault in enumerate(FAULTS):
        shop.fetch("s1", f"UPDATE orders SET note = 'v1 {number}' WHERE tenant_id = 100 AND id = 3")
        with (
            mirror(shop) as doomed,
            once(point, partial(fault, doomed)),
            suppress(Died, psycopg.OperationalError),
        ):
            doomed.catch_up()
        assert differences(shop) == [] or journalled(shop) > 0
        shop.fetch("s1", f"UPDATE orders SET note = 'v2 {number}' WHERE tenant_id = 100 AND id = 3")
        carry_all(shop)
        assert differences(shop) == []


def process_dies(_: Mirror) -> None:
    raise Died


def giver_session_ends(running: Mirror) -> None:
    end_session(running.giver)


def receiver_session_ends(running: Mirror) -> None:
    end_session(running.receiver)


FAULTS: Final[tuple[Callable[[Mirror], None], ...]] = (process_dies, giver_session_ends, receiver_session_ends)


# --- unique values that a batch under way holds


def test_a_value_that_a_batch_commits_meanwhile_does_not_end_the_mirror(shop: Engine) -> None:
    """The batch has written the old holder of a unique value; the mirror wants to give it to the new one, and waits.

    When the batch commits, the value is taken; the next look lets the old holder's entry through as well.
    """
    copy_batch(shop, (None, ("100", "6")))
    with mirror(shop) as running:
        others: list[Future[Pass]] = []

        def value_moves_on() -> None:
            shop.fetch("s1", "UPDATE orders SET note = 'z' WHERE tenant_id = 100 AND id = 8;"
                       " UPDATE orders SET note = 'h' WHERE tenant_id = 100 AND id = 3")  # fmt: skip
            others.append(spawn(lambda: running.catch_up(full_look=True)))
            until(lambda: others[0].done() or waits_for_a_transaction(shop))

        with once("batch.before_compare", value_moves_on):
            copy_batch(shop, (("100", "6"), None))
        others[0].result(BOUND_S)
    copy_batch(shop, ordinal=2)
    carry_all(shop)
    assert differences(shop) == []


def test_a_deadlock_with_a_batch_does_not_end_the_mirror(shop: Engine) -> None:
    """Batch and mirror write two unique values in opposite orders. The server ends the mirror's transaction."""
    copy_batch(shop, (None, ("100", "6")))
    shop.fetch("s1", "UPDATE orders SET note = id + 100 WHERE tenant_id = 100 AND id IN (8, 9);"
               " UPDATE orders SET note = 'i' WHERE tenant_id = 100 AND id = 2;"
               " UPDATE orders SET note = 'h' WHERE tenant_id = 100 AND id = 3")  # fmt: skip
    with mirror(shop) as running, shop.connect("s2") as a_batch:
        running.receiver.execute("SET deadlock_timeout = '6s'")  # it looks once: the circle has to be closed by then
        a_batch.execute("SET deadlock_timeout = '200s'")
        a_batch.execute("BEGIN")
        become_replica(a_batch, shop.move.id, shop.tables)
        a_batch.execute("INSERT INTO public.orders VALUES (100, 8, 'h')")
        other = spawn(lambda: running.catch_up(full_look=True))
        until(lambda: other.done() or waits_for_a_transaction(shop))
        a_batch.execute("INSERT INTO public.orders VALUES (100, 9, 'i')")
        a_batch.execute("ROLLBACK")
        other.result(BOUND_S)
    copy_batch(shop, (("100", "6"), None))
    copy_batch(shop, ordinal=2)
    carry_all(shop)
    assert differences(shop) == []


def test_a_value_that_a_resident_holds_is_told(shop: Engine) -> None:
    """No catch-up can get over it: bounded, then the server's own words."""
    copy_all(shop)
    with shop.connect("s2") as target, target.transaction():
        become_replica(target, shop.move.id, shop.tables)
        target.execute("INSERT INTO public.orders VALUES (100, 999, 'taken')")
    shop.fetch("s1", "UPDATE orders SET note = 'taken' WHERE tenant_id = 100 AND id = 3")
    with mirror(shop) as running, pytest.raises(errors.UniqueViolation):
        running.catch_up(rows_max=1)
    assert journalled(shop) == 1


def waits_for_a_transaction(engine: Engine) -> bool:
    query = (
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND wait_event = 'transactionid')"
    )
    return engine.fetch("s2", query) == [(True,)]


# --- where the next pass begins


def test_no_entry_is_passed_over_where_transaction_numbers_gain_a_digit(shop: Engine) -> None:
    """The oldest entry that a bounded pass leaves is 9, and not 10, which comes first as a word."""
    copy_all(shop)
    shop.fetch("s1", "UPDATE orders SET note = 'changed ' || id WHERE tenant_id = 100 AND id IN (8, 9, 10)")
    shop.fetch("s1", "UPDATE shardmove.journal_m1_1 SET shardmove_xid = id::text::xid8")
    with mirror(shop) as running:
        running.catch_up(rows_max=1)
        assert running.scan_from[1] == 9
        running.catch_up()
    assert differences(shop) == []


# --- in turn


@pytest.mark.parametrize("life", range(3))
def test_writes_batches_and_passes_in_any_order_end_equal(shop: Engine, rng: random.Random, life: int) -> None:
    """Random, in one thread, with writes at every control point of passes and batches."""
    batches = cut(rng)
    with application(shop) as client, mirror(shop) as running:

        def write_some(_point: str) -> None:
            for _ in range(rng.randint(0, 3)):
                write(client, rng)

        with ExitStack() as stack:
            for point in (*POINTS[:-1], "batch.before_compare", "batch.before"):
                stack.enter_context(points.armed(point, write_some))
            for _ in range(60):
                write_some("")
                if batches and rng.random() < 0.3:
                    copy_in_turn(shop, [batches.pop()], running.catch_up)
                if rng.random() < 0.5:
                    running.catch_up(rows_max=rng.choice([None, 1, 3]), full_look=rng.random() < 0.1)
        copy_in_turn(shop, batches, running.catch_up)
    carry_all(shop)
    assert differences(shop) == []


# --- at the same time


class Passing:
    """Threads that each run one catch-up after the other, on mirrors that die at random control points."""

    def __init__(self, engine: Engine, rng: random.Random, *, threads: int, faults: float) -> None:
        self._engine = engine
        self._rng = rng
        self._faults = faults
        self._stop = threading.Event()
        self._mine = threading.local()
        self.passes = 0
        self.deaths = 0
        self._threads = [spawn(self._keep_passing) for _ in range(threads)]

    def stop(self) -> None:
        """Raises what a thread died of, where that was not a fault of ours."""
        self._stop.set()
        for thread in self._threads:
            thread.result(BOUND_S)

    def has_failed(self) -> bool:
        """`stop` says why."""
        return any(thread.done() for thread in self._threads)

    def may_die(self, _point: str) -> None:
        running: Mirror | None = getattr(self._mine, "mirror", None)
        if running is not None and self._rng.random() < self._faults:
            self.deaths += 1
            self._rng.choice(FAULTS)(running)

    def _keep_passing(self) -> None:
        while not self._stop.is_set():
            try:
                with mirror(self._engine) as running:
                    self._mine.mirror = running
                    self._pass_until_dead(running)
            except Died:
                continue
            except (psycopg.Error, ShardmoveError) as error:
                if not is_unreachable(error):
                    raise

    def _pass_until_dead(self, running: Mirror) -> None:
        while not self._stop.is_set():
            running.catch_up(rows_max=self._rng.choice([None, 2, 10]), full_look=self._rng.random() < 0.1)
            self.passes += 1


@contextmanager
def passing(engine: Engine, rng: random.Random, *, threads: int, faults: float) -> Iterator[Passing]:
    running = Passing(engine, rng, threads=threads, faults=faults)
    with ExitStack() as stack:
        for point in POINTS:
            stack.enter_context(points.armed(point, running.may_die))
        try:
            yield running
        finally:
            running.stop()


def write_until(engine: Engine, rng: random.Random, enough: threading.Event) -> int:
    written = 0
    with application(engine) as client:
        while not enough.is_set():
            write(client, rng)
            written += 1
    return written


@pytest.mark.timeout(900)
@pytest.mark.parametrize("life", range(2))
def test_several_mirrors_that_die_beside_writers_and_batches_end_equal(
    shop: Engine, rng: random.Random, life: int
) -> None:
    """Three mirrors at once, each killed now and then on either side, two writers, batches out of order."""
    enough = threading.Event()
    with passing(shop, rng, threads=3, faults=0.02) as running:
        writers = [spawn(lambda: write_until(shop, random.Random(rng.random()), enough)) for _ in range(2)]
        try:
            copy_in_turn(shop, cut(rng), lambda: until(another_pass(running)))
            until(lambda: running.has_failed() or (running.passes > 150 and running.deaths > 5), timeout_s=600)
        finally:
            enough.set()
        assert sum(writer.result(BOUND_S) for writer in writers) > 0
    carry_all(shop)
    assert differences(shop) == []


def another_pass(running: Passing) -> Callable[[], bool]:
    """Whether a pass that began later than this call has ended: at most three were under way."""
    wanted = running.passes + 4
    return lambda: running.has_failed() or running.passes >= wanted
