"""DDL that stalls nobody gets through beside our own writers, which give way, and names who does not."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest

from shardmove.domain.errors import Failed
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres import locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.locks import GIVE_WAY, Patience, change_table, in_the_way
from tests.support.engine import until
from tests.support.servers import Databases, connect
from tests.support.twins import Mechanism, spawn

ORDERS = TableName("public", "orders")


@contextmanager
def batches(dsn: str, first: LiteralString, *, patience_s: float | None) -> Iterator[None]:
    """Two sessions write to the table hand over hand, as workers of another move do: each commits once the other has
    written since, or was kept from it for so long. Without a bound there is always one that has written."""
    enough, begun = threading.Event(), threading.Barrier(3)
    may_commit = [threading.Semaphore(0), threading.Semaphore(0)]

    def write(me: int) -> None:
        with connect(dsn, application_name="shardmove m7") as connection:
            for number in itertools.count():
                with connection.transaction():
                    connection.execute(first)
                    connection.execute("INSERT INTO public.orders VALUES (%s)", (2 * number + me,))
                    if number == 0:
                        begun.wait()
                    if (me, number) != (0, 0):
                        may_commit[1 - me].release()
                    may_commit[me].acquire(timeout=patience_s)
                if enough.is_set():
                    return

    threads = [threading.Thread(target=write, args=(each,)) for each in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    try:
        yield
    finally:
        enough.set()
        for each in may_commit:
            each.release()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("mechanism", ["with", "without"])
def test_our_own_writers_give_way_to_a_change_of_the_table(databases: Databases, mechanism: str) -> None:
    """The twin's batches do not give way: one overlaps the next, and no try ever finds the table free."""
    dsn = databases("s1")["s1"]
    with connect(dsn, application_name="shardmove m8") as connection:
        connection.execute("CREATE TABLE public.orders (id bigint PRIMARY KEY)")

        def change() -> None:
            connection.execute("LOCK TABLE public.orders IN SHARE ROW EXCLUSIVE MODE")

        patience = Patience(lock_timeout_ms=20, total_s=60 if mechanism == "with" else 3)
        if mechanism == "with":
            with batches(dsn, GIVE_WAY, patience_s=0.5):
                change_table(connection, ORDERS, Effect.ARM, change, patience=patience)
        else:
            with batches(dsn, "SELECT 1", patience_s=None), pytest.raises(Failed, match="could not lock the table"):
                change_table(connection, ORDERS, Effect.ARM, change, patience=patience)


def test_who_is_in_the_way_is_named_also_on_a_partition(databases: Databases) -> None:
    dsn = databases("s1")["s1"]
    with (
        connect(dsn, application_name="shardmove m8") as connection,
        connect(dsn, application_name="report") as other,
    ):
        connection.execute("CREATE TABLE public.orders (id bigint) PARTITION BY LIST (id)")
        connection.execute("CREATE TABLE public.orders_1 PARTITION OF public.orders DEFAULT")
        other.execute("BEGIN")
        other.execute("INSERT INTO public.orders_1 VALUES (1)")

        def change() -> None:
            connection.execute("LOCK TABLE public.orders IN SHARE ROW EXCLUSIVE MODE")

        with pytest.raises(Failed, match="report"):
            change_table(connection, ORDERS, Effect.ARM, change, patience=Patience(lock_timeout_ms=20, total_s=1))


def test_of_our_own_sessions_only_those_that_give_way_are_not_in_the_way(databases: Databases) -> None:
    """A comparison reads for long, and holds up a DROP TRIGGER: nobody may queue behind it in front of the readers."""
    dsn = databases("s1")["s1"]
    with (
        connect(dsn, application_name="shardmove m8") as connection,
        connect(dsn, application_name="shardmove m9") as reader,
        connect(dsn, application_name="shardmove m10") as batch,
    ):
        connection.execute("CREATE TABLE public.orders (id bigint)")
        reader.execute("BEGIN")
        reader.execute("SELECT FROM public.orders")
        batch.execute("BEGIN")
        batch.execute(GIVE_WAY)
        batch.execute("INSERT INTO public.orders VALUES (1)")
        (who,) = in_the_way(connection, ORDERS, readers=True, longer_than_s=0, givers_of_way=False)
        assert "shardmove m9" in who
        assert len(in_the_way(connection, ORDERS, readers=True, longer_than_s=0)) == 2


# --- who has used the table, and then writes


PATIENT = Patience(lock_timeout_ms=30_000, total_s=60)
"""Ours waits until the client has written: who loses is decided by the locks, and not by the clock."""

ONE_TABLE: Sequence[LiteralString] = (
    "CREATE TABLE public.orders (id bigint)",
    "CREATE FUNCTION public.probe() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "CREATE TRIGGER old AFTER INSERT ON public.orders FOR EACH ROW EXECUTE FUNCTION public.probe()",
)
PARTITIONED: Sequence[LiteralString] = (
    "CREATE TABLE public.orders (id bigint) PARTITION BY LIST (id)",
    "CREATE TABLE public.orders_1 PARTITION OF public.orders DEFAULT",
    *ONE_TABLE[1:],
)
MAKE: LiteralString = "CREATE TRIGGER new AFTER INSERT ON public.orders FOR EACH ROW EXECUTE FUNCTION public.probe()"
DROP: LiteralString = "DROP TRIGGER old ON public.orders"


@pytest.mark.parametrize(
    ("tables", "used", "changes"),
    [
        # CREATE TRIGGER passes the reader, DROP TRIGGER waits for it: the reader's write would close the circle.
        pytest.param(ONE_TABLE, "SELECT FROM public.orders", (MAKE, DROP), id="a stronger lock later"),
        # DROP TRIGGER begins with the partitions: it would wait for the parent with their locks in its hands.
        pytest.param(PARTITIONED, "SELECT FROM ONLY public.orders", (DROP,), id="partitions first"),
        # CREATE TRIGGER begins with the parent: a client that came by the partition would wait for it there.
        pytest.param(PARTITIONED, "INSERT INTO public.orders_1 VALUES (1)", (MAKE,), id="the parent first"),
    ],
)
def test_who_has_used_a_table_and_writes_loses_to_no_change(
    databases: Databases,
    mechanism: Mechanism,
    monkeypatch: pytest.MonkeyPatch,
    tables: Sequence[LiteralString],
    used: LiteralString,
    changes: Sequence[LiteralString],
) -> None:
    mechanism.replace(locks, "_lock", lambda *_, **__: None)
    dsn = databases("s1")["s1"]
    with connect(dsn, application_name="shardmove m8") as connection, connect(dsn, application_name="client") as client:
        connection.execute("SET deadlock_timeout = '20s'")  # ours would be the victim of nothing that takes time
        client.execute("SET deadlock_timeout = '10ms'")
        for statement in tables:
            client.execute(statement)

        def change() -> None:
            for statement in changes:
                connection.execute(statement)

        tried = telling(monkeypatch)
        client.execute("BEGIN")
        client.execute(used)
        drops = DROP in changes
        changing = spawn(
            lambda: change_table(connection, ORDERS, Effect.ARM, change, patience=PATIENT, readers_block=drops)
        )
        until(lambda: tried.is_set() or is_waiting(dsn, connection))
        mechanism.judge(write(client))
        changing.result(30)
        names = client.execute("SELECT DISTINCT tgname FROM pg_trigger ORDER BY 1").fetchall()
        assert names == [(name,) for name in ("new", "old") if {"new": MAKE in changes, "old": not drops}[name]]


def telling(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a try has ended, whichever way."""
    tried, try_ = threading.Event(), locks._try

    def try_and_tell(*args: Any, **options: Any) -> bool:
        try:
            return try_(*args, **options)
        finally:
            tried.set()

    monkeypatch.setattr(locks, "_try", try_and_tell)
    return tried


def is_waiting(dsn: str, connection: Connection) -> bool:
    query = "SELECT FROM pg_locks WHERE pid = %s AND NOT granted"
    with connect(dsn, application_name="judge") as judge:
        return judge.execute(query, (connection.info.backend_pid,)).rowcount > 0


def write(client: Connection) -> list[str]:
    """Writes to the table in the open transaction, and commits; returns what the server had against it."""
    try:
        client.execute("INSERT INTO public.orders VALUES (1)")
    except psycopg.errors.DeadlockDetected as error:
        client.execute("ROLLBACK")
        return [str(error)]
    client.execute("COMMIT")
    return []
