"""DDL that stalls nobody gets through beside our own writers, which give way, and names who does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import pytest

from shardmove.domain.errors import Failed
from shardmove.domain.moves import TableName
from shardmove.domain.points import Effect
from shardmove.postgres.locks import GIVE_WAY, Patience, change_table, in_the_way
from tests.support.servers import Databases, connect

ORDERS = TableName("public", "orders")


@contextmanager
def batches(dsn: str, first: LiteralString) -> Iterator[None]:
    """Two sessions write to the table hand over hand, as workers of another move do: each commits once the other has
    written since, or was kept from it for half a second."""
    enough, begun = threading.Event(), threading.Barrier(3)
    may_commit = [threading.Semaphore(0), threading.Semaphore(0)]

    def write(me: int) -> None:
        with connect(dsn, application_name="shardmove m7") as connection:
            for number in range(10_000):
                with connection.transaction():
                    connection.execute(first)
                    connection.execute("INSERT INTO public.orders VALUES (%s)", (10_000 * me + number,))
                    if number == 0:
                        begun.wait()
                    if (me, number) != (0, 0):
                        may_commit[1 - me].release()
                    may_commit[me].acquire(timeout=0.5)
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
        with batches(dsn, GIVE_WAY if mechanism == "with" else "SELECT 1"):
            if mechanism == "with":
                change_table(connection, ORDERS, Effect.ARM, change, patience=patience)
            else:
                with pytest.raises(Failed, match="could not lock the table orders"):
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
