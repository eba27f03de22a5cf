"""Journal, gate, catch-up and batch: one story for each mechanism, told with it and without it (DESIGN §4.2–4.5).

Each test runs twice. With the mechanism, plain SQL finds both shards equal at the end; in the twin the one function of
the product that makes the mechanism is replaced, and the same plain SQL finds the damage. The races that were
reproduced before anybody built the product stand here under their own names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql

from shardmove.coordinator import preflight
from shardmove.coordinator.checks.site import Site
from shardmove.domain.digests import Digest
from shardmove.domain.errors import BatchMismatch, Failed, Refused, SchemaDrift
from shardmove.domain.moves import Move, State
from shardmove.postgres import connect as connecting
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection
from shardmove.postgres.embedded import Cluster, Server
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import TRUE, Interval
from shardmove.protocol import capture, catch_up, drift, fence, objects, parts
from shardmove.protocol import gate as gating
from shardmove.protocol.catch_up import Mirror, Pass
from tests.support.engine import LEASE, ORDERS, Engine, make_engine, until
from tests.support.servers import Databases, connect, old_binaries
from tests.support.twins import (
    WHOLE,
    Died,
    MakeEngine,
    Mechanism,
    application,
    carry_all,
    copy_all,
    copy_batch,
    die,
    differences,
    end_session,
    journalled,
    make_mover,
    make_role,
    mirror,
    once,
    outside,
    rows,
    spawn,
    stop_the_log_writer,
    waits_for_advisory_lock,
)
from tests.support.world import World
from workers import copy, erase
from workers.connections import Connections
from workers.copy import BatchBlocked, CopyBatch
from workers.erase import EraseBatch
from workers.tasks import run

TEN = "INSERT INTO orders SELECT 150, i, 'note ' || i FROM generate_series(1, 10) i"

WITH_ITEMS = f"{TEN}; INSERT INTO items SELECT 150, i, 1 FROM generate_series(1, 10) i"

FAMILY = """
    CREATE TABLE orders (tenant_id bigint, id bigint, note text, PRIMARY KEY (tenant_id, id));
    CREATE TABLE items (
        tenant_id bigint, id bigint, line int, PRIMARY KEY (tenant_id, id, line),
        FOREIGN KEY (tenant_id, id) REFERENCES orders ON DELETE CASCADE ON UPDATE CASCADE
    )
"""
FAMILY_TABLES = {"orders": "tenant_id", "items": "tenant_id"}


# --- I1: the journal


def test_journal(mechanism: Mechanism, engine: MakeEngine) -> None:
    """Whatever an application does to a copied row arrives, because the same transaction wrote its key down."""
    mechanism.replace(capture, "journal_row", lambda *_: sql.SQL(""))
    made = engine(schema=FAMILY, tables=FAMILY_TABLES, rows=WITH_ITEMS)
    copy_all(made)
    with application(made) as client:
        client.execute("UPDATE orders SET note = 'changed' WHERE id = 1")
        client.execute("INSERT INTO orders VALUES (150, 11, 'inserted')")
        client.execute("DELETE FROM orders WHERE id = 2")  # and its item, by cascade
        client.execute("UPDATE orders SET id = 33 WHERE id = 3")  # another key; its item follows
        client.execute("INSERT INTO orders VALUES (99, 4, 'for the item that leaves')")
        client.execute("UPDATE items SET tenant_id = 99 WHERE id = 4")  # out of the range
        client.execute("INSERT INTO orders VALUES (99, 50, 'comes in')")
        client.execute("UPDATE orders SET tenant_id = 150 WHERE id = 50")
        with client.cursor().copy("COPY orders FROM STDIN") as stream:
            stream.write_row((150, 12, "by COPY"))
    carry_all(made)
    mechanism.judge(differences(made))


def journal_that_keeps_one_entry_a_key(move: Move, ordinal: int, table: Table) -> sql.Composable:
    text = journal_row(move, ordinal, table).as_string(None)
    return sql.SQL(text.replace(");", ") ON CONFLICT DO NOTHING;"))


def make_journal_unique(connection: Connection, move_id: str, ordinal: int, table: Table) -> None:
    create_journal(connection, move_id, ordinal, table)
    connection.execute(f"CREATE UNIQUE INDEX ON shardmove.journal_{move_id}_{ordinal} (tenant_id, id)".encode())


journal_row, create_journal = capture.journal_row, objects._create_journal


def test_journal_dedup(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A second change finds the first one's entry; that entry is consumed before the second change is visible."""
    mechanism.replace(capture, "journal_row", journal_that_keeps_one_entry_a_key)
    mechanism.replace(objects, "_create_journal", make_journal_unique)
    made = engine(rows=TEN)
    copy_all(made)
    with application(made) as first, application(made) as second, mirror(made) as running:
        first.execute("UPDATE orders SET note = 'v1' WHERE id = 7")
        second.execute("BEGIN")
        second.execute("UPDATE orders SET note = 'v2' WHERE id = 7")  # its key is in the journal already
        running.catch_up()  # takes the entry, and carries v1: v2 is not committed
        second.execute("COMMIT")
    carry_all(made)
    mechanism.judge(differences(made))


# --- whose writes are not journalled


def without_the_role(move_id: str) -> sql.Composed:
    """The marker alone decides."""
    return sql.SQL("IF pg_catalog.current_setting({}, true) = {} THEN RETURN NULL; END IF;").format(
        sql.Literal(parts.MARKER), sql.Literal(move_id)
    )


def with_current_user(move_id: str) -> sql.Composed:
    """Inside a SECURITY DEFINER function `current_user` is its owner, whoever called."""
    text = skip_own_writes(move_id).as_string(None).replace("session_user", "current_user")
    return sql.Composed([sql.SQL(text)])


def marker_alone_in_when(_connection: Connection, move_id: str) -> sql.Composed:
    """The trigger's WHEN asks for the marker, and not for the role."""
    return sql.SQL("pg_catalog.current_setting({}, true) IS DISTINCT FROM {}").format(
        sql.Literal(parts.MARKER), sql.Literal(move_id)
    )


skip_own_writes = capture.skip_own_writes


@pytest.mark.parametrize(
    ("name", "weaker"),
    [
        ("skip_own_writes", without_the_role),
        ("skip_own_writes", with_current_user),
        ("not_our_own", marker_alone_in_when),
    ],
)
def test_marker_by_anyone(
    mechanism: Mechanism, engine: MakeEngine, name: str, weaker: Callable[..., sql.Composed]
) -> None:
    """A client without rights of ours sets the marker and writes: its write is a change like any other."""
    mechanism.replace(capture, name, weaker)
    made = engine(rows=TEN)
    copy_all(made)
    role = make_role({"s1": made.dsn["s1"]}, "clerk", grants="GRANT ALL ON orders TO {role}")
    with application(made, user=role) as clerk:
        clerk.execute("SET shardmove.mirror = 'm1'")
        clerk.execute("UPDATE orders SET note = 'by the clerk' WHERE id = 7")
    carry_all(made)
    mechanism.judge(differences(made))


def for_any_move(move_id: str) -> sql.Composed:
    """Whichever move the marker names."""
    text = skip_own_writes(move_id).as_string(None).replace("true) = 'm1'", "true) <> ''")
    return sql.Composed([sql.SQL(text)])


def test_marker_of_another_move(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The marker names one move: what another move's mirror applies here is a change for this one."""
    mechanism.replace(capture, "skip_own_writes", for_any_move)
    made = engine(rows=TEN)
    copy_all(made)
    with made.connect("s1") as other, other.transaction():
        catch_up.become_replica(other, "m2", made.tables)
        other.execute("UPDATE public.orders SET note = 'by the mirror of m2' WHERE id = 7")
    carry_all(made)
    mechanism.judge(differences(made))


QUALIFIED, UNQUALIFIED = '"shardmove"."journal_m1_1"', '"journal_m1_1"'
PINNED = "SET search_path = pg_catalog, pg_temp"
capture_sql = capture.capture_sql


def unqualified_under(path: str) -> Callable[..., sql.Composed]:
    """The journal's name left to the function's search_path."""

    def weakened(*arguments: Any) -> sql.Composed:
        text = capture_sql(*arguments).as_string(None)
        assert QUALIFIED in text
        assert PINNED in text
        return sql.Composed([sql.SQL(text.replace(QUALIFIED, UNQUALIFIED).replace(PINNED, path))])

    return weakened


def temporary_journal(engine: Engine) -> None:
    """A client whose temporary table has the journal's name changes a row."""
    with application(engine) as client:
        client.execute("CREATE TEMPORARY TABLE journal_m1_1 (tenant_id bigint, id bigint)")
        client.execute("UPDATE orders SET note = 'changed' WHERE id = 7")


def test_pg_temp_capture(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A temporary table is found first of all, unless the path says where pg_temp stands, or the name its schema."""
    mechanism.replace(capture, "capture_sql", unqualified_under("SET search_path = pg_catalog, shardmove"))
    made = engine(rows=TEN)
    copy_all(made)
    temporary_journal(made)
    carry_all(made)
    mechanism.judge(differences(made))


def test_pg_temp_last_in_the_path_is_enough_for_an_unqualified_name(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin holds by itself: either of the two would do."""
    path = "SET search_path = pg_catalog, shardmove, pg_temp"
    monkeypatch.setattr(capture, "capture_sql", unqualified_under(path))
    made = engine(rows=TEN)
    copy_all(made)
    temporary_journal(made)
    carry_all(made)
    assert differences(made) == []


def test_the_trigger_functions_are_volatile_pinned_and_their_owners(engine: MakeEngine) -> None:
    """STABLE would see the caller's snapshot. Checked as the server keeps it, for every function of ours on a shard."""
    made = engine()
    functions = made.fetch(
        "s1",
        "SELECT proname, provolatile, prosecdef, proconfig FROM pg_proc"
        " WHERE pronamespace = 'shardmove'::regnamespace AND prorettype = 'trigger'::regtype",
    )
    assert {name for name, *_ in functions} >= {"capture_m1_1", "refuse_kept", "refuse_truncate"}
    for name, *properties in functions:
        assert properties == ["v", True, ["search_path=pg_catalog, pg_temp"]], name


# --- I2: the gate


def all_pass(_connection: Connection, _row: fence.FenceRow, tables: Sequence[Table]) -> dict[int, sql.Composable]:
    return {ordinal: TRUE for ordinal, _ in enumerate(tables, 1)}


def test_gate(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A batch has read a row; the row is deleted; a catch-up meets the entry before the batch commits."""
    mechanism.replace(catch_up, "gate", all_pass)
    made = engine(rows=TEN)

    def deleted_meanwhile() -> None:
        made.fetch("s1", "DELETE FROM orders WHERE id = 7")
        with mirror(made) as early:
            early.catch_up()  # finds nothing to delete on the target yet

    with once("batch.before_compare", deleted_meanwhile):
        copy_batch(made)
    carry_all(made)
    mechanism.judge(differences(made))


SWAP = """
    CREATE TABLE orders (tenant_id bigint, id bigint, note text, PRIMARY KEY (tenant_id, id), UNIQUE (tenant_id, note))
"""
recorded_islands = gating.islands


def below_the_watermark(connection: Connection, move_id: str, ordinal: int, table: Table) -> gating.Islands:
    """One watermark: only what is recorded without a gap from the beginning."""
    recorded = recorded_islands(connection, move_id, ordinal, table).intervals
    return gating.Islands(tuple(interval for interval in recorded[:1] if interval[0] is None))


def test_one_watermark(mechanism: Mechanism, engine: MakeEngine) -> None:
    """Three rows pass a unique value round: one copied, one pending, one copied out of order."""
    mechanism.replace(gating, "islands", below_the_watermark)
    made = engine(schema=SWAP, rows="INSERT INTO orders VALUES (150, 1, 'a'), (150, 50, 'b'), (150, 100, 'c')")
    pending: Interval = (("150", "1"), ("150", "99"))
    copy_batch(made, (None, ("150", "1")))
    copy_batch(made, (("150", "99"), None))
    made.fetch(
        "s1",
        "BEGIN; UPDATE orders SET note = id WHERE true; UPDATE orders SET note = 'c' WHERE id = 1;"
        " UPDATE orders SET note = 'a' WHERE id = 50; UPDATE orders SET note = 'b' WHERE id = 100; COMMIT",
    )
    with mirror(made) as running:
        for _ in range(3):  # batch and mirror in turn, as long as either is blocked
            with suppress(BatchBlocked):
                copy_batch(made, pending)
            with suppress(psycopg.errors.UniqueViolation):
                running.catch_up(full_look=True)
    mechanism.judge(differences(made))


def test_scan_past_gated(mechanism: Mechanism, engine: MakeEngine) -> None:
    """An entry is refused by the gate; the next scan must not start behind it."""

    def none_left(giver: Connection, *_: object) -> Any:
        return giver.execute("SELECT '4611686018427387904'")  # so that the snapshot's xmin is always the smaller one

    mechanism.replace(catch_up, "oldest_left", none_left)
    made = engine(rows=TEN)
    with mirror(made) as running:

        def changed_meanwhile() -> None:
            made.fetch("s1", "UPDATE orders SET note = 'changed' WHERE id = 7")
            until(lambda: everything_before_has_ended(made))
            running.catch_up()  # refused by the gate

        with once("batch.before_compare", changed_meanwhile):
            copy_batch(made)  # with the old row
        for _ in range(3):
            made.fetch("s1", "UPDATE orders SET note = note WHERE id = 3")
            running.catch_up()
    mechanism.judge(differences(made))


def everything_before_has_ended(engine: Engine) -> bool:
    """A snapshot taken now has an xmin behind every entry of the journal."""
    query = "SELECT bool_and(shardmove_xid < pg_snapshot_xmin(pg_current_snapshot())) FROM shardmove.journal_m1_1"
    return engine.fetch("s1", query) == [(True,)]


# --- I3: the last word


def test_rows_are_read_again(mechanism: Mechanism, engine: MakeEngine) -> None:
    """What is carried is the row as it is when its entry is visible, not as somebody read it before."""
    made = engine(rows=TEN)
    copy_all(made)
    with outside(made.dsn["s1"]) as before, mirror(made) as running:
        before.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        before.execute("SELECT 1")
        made.fetch("s1", "UPDATE orders SET note = 'changed' WHERE id = 7")

        def relay_what_was_read(_: Connection, query: sql.Composed, *into: Any) -> Digest:
            return relay(before, query, *into)

        mechanism.replace(catch_up, "relay", relay_what_was_read)
        running.catch_up()
    carry_all(made)
    mechanism.judge(differences(made))


relay = catch_up.relay


def source_first() -> Sequence[Callable[[Mirror], None]]:
    return catch_up.begin_giver, catch_up.begin_receiver


def test_order_of_the_two_beginnings(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The first catch-up has its snapshot (v1) and no lock yet; a second one applies v2, then the first goes on.

    v2's transaction got its number before v1's: a pass that is bounded takes v2's entry, and leaves v1's.
    """
    mechanism.replace(catch_up, "beginnings", source_first)
    made = engine(rows=TEN)
    copy_all(made)
    with application(made) as late, mirror(made) as first, mirror(made) as second:
        late.execute("BEGIN; SELECT pg_current_xact_id()")
        made.fetch("s1", "UPDATE orders SET note = 'v1' WHERE id = 7")
        others: list[Future[Pass]] = []

        def overtaken() -> None:
            late.execute("UPDATE orders SET note = 'v2' WHERE id = 7; COMMIT")
            others.append(spawn(lambda: second.catch_up(rows_max=1)))
            until(lambda: others[0].done() or waits_for_advisory_lock(made))

        with once("catch_up.after_giver_snapshot", overtaken):
            first.catch_up()
        others[0].result()
    carry_all(made)
    mechanism.judge(differences(made))


def begin_receiver_without_lock(running: Mirror) -> None:
    """As the product's own, but that the others are not held off."""
    effects.begin(running.receiver)
    row = fence.check_receiving(running.receiver, running.move.id, running.move.giver(running.direction))
    running.gate = gating.gate(running.receiver, row, running.tables)


def test_stale_catch_up(mechanism: Mechanism, engine: MakeEngine) -> None:
    """D1 read v1 and loses its session on the source; v2 is written; D2 applies v2, empties the journal; D1 commits."""
    mechanism.replace(catch_up, "begin_receiver", begin_receiver_without_lock)
    made = engine(rows=TEN)
    copy_all(made)
    with mirror(made) as first, mirror(made) as second:
        made.fetch("s1", "INSERT INTO orders VALUES (150, 77, 'v1: it is there')")
        others: list[Future[Pass]] = []

        def overtaken() -> None:
            end_session(first.giver)
            made.fetch("s1", "DELETE FROM orders WHERE id = 77")  # v2: it is not
            others.append(spawn(second.catch_up))
            until(lambda: others[0].done() or waits_for_advisory_lock(made))

        with once("catch_up.receiver.before", overtaken), pytest.raises(psycopg.OperationalError):
            first.catch_up()
        others[0].result()
    carry_all(made)
    mechanism.judge(differences(made))


def test_delete_at_one_snapshot(mechanism: Mechanism, engine: MakeEngine) -> None:
    """An order and its item are written between the looks at two journals: a pass carries whole transactions.

    The writer holds up the second look by a lock on that journal, which is how it comes to stand between the two.
    """
    mechanism.replace(catch_up, "giver_isolation", lambda: "READ COMMITTED")
    made = engine(schema=FAMILY, tables=FAMILY_TABLES, rows=TEN)
    copy_all(made)
    with application(made) as writer, mirror(made) as running:
        writer.execute("BEGIN; LOCK TABLE shardmove.journal_m1_2 IN SHARE MODE")
        done = spawn(running.catch_up)
        until(lambda: waits_for_table(made, "shardmove.journal_m1_2"))
        writer.execute("INSERT INTO orders VALUES (150, 77, 'new')")
        writer.execute("INSERT INTO items VALUES (150, 77, 1); COMMIT")
        assert done.result().is_empty  # that is: the target is the source as of the pass's snapshot
    orphans = "SELECT i::text FROM items i WHERE NOT EXISTS (SELECT FROM orders o WHERE o.id = i.id)"
    mechanism.judge([f"an item without its order: {row}" for row in rows(made.dsn["s2"], orphans)])


def waits_for_table(engine: Engine, table: str) -> bool:
    query = f"SELECT EXISTS (SELECT FROM pg_locks WHERE relation = '{table}'::regclass AND NOT granted)"
    return engine.fetch("s1", query) == [(True,)]


# --- the comparison

TAMPER = """
    CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.note := replace(NEW.note, 'note 7', 'tampered'); RETURN NEW; END $$;
    CREATE TRIGGER tamper BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION tamper();
    ALTER TABLE orders ENABLE ALWAYS TRIGGER tamper
"""


def test_comparison_of_a_batch(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A trigger that was made on the target after preflight: found out, taken away, and the batch is copied anew."""
    mechanism.replace(copy, "compare", lambda *_: None)
    made = engine(rows=TEN)
    made.fetch("s2", TAMPER)
    assert raises(BatchMismatch, lambda: copy_batch(made)) is mechanism.on
    assert bool(rows(made.dsn["s2"], "SELECT 'a record' FROM shardmove.batch")) is not mechanism.on
    made.fetch("s2", "DROP TRIGGER tamper ON orders")
    copy_batch(made)
    mechanism.judge(differences(made))


def test_comparison_in_a_catch_up(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The same for a mirrored row: its entry comes back, and is carried when the trigger has gone."""
    mechanism.replace(catch_up, "compare", lambda *_: None)
    made = engine(rows=TEN)
    copy_all(made)
    made.fetch("s2", TAMPER)
    made.fetch("s1", "UPDATE orders SET note = 'note 7, changed' WHERE id = 7")
    with mirror(made) as running:
        assert raises(BatchMismatch, running.catch_up) is mechanism.on
        assert journalled(made) == (1 if mechanism.on else 0)
    made.fetch("s2", "DROP TRIGGER tamper ON orders")
    carry_all(made)
    mechanism.judge(differences(made))


def raises(kind: type[BaseException], work: Callable[[], object]) -> bool:
    try:
        work()
    except kind:
        return True
    return False


# --- the range's predicate

BY_ID = "CREATE TABLE orders (id bigint PRIMARY KEY, tenant_id bigint NOT NULL, note text)"


def test_delete_without_range(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The target is live: id 5 is there, of another tenant. On the source id 5 came and went."""
    mechanism.replace(catch_up, "in_move", lambda *_: TRUE)
    made = engine(schema=BY_ID, rows="INSERT INTO orders VALUES (1, 150, 'moves')")
    made.fetch("s2", "INSERT INTO orders VALUES (5, 7, 'a resident')")
    copy_all(made)
    made.fetch("s1", "INSERT INTO orders VALUES (5, 150, 'a guest'); DELETE FROM orders WHERE id = 5")
    carry_all(made)
    assert differences(made) == []
    mechanism.judge(residents_lost(made))


def test_erase_without_range(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The way back: the reverse deletes take what the move brought, and nothing else in the same interval."""
    mechanism.replace(erase, "in_move", lambda *_: TRUE)
    made = engine(schema=BY_ID, rows="INSERT INTO orders VALUES (1, 150, 'moves'), (9, 150, 'moves')")
    made.fetch("s2", "INSERT INTO orders VALUES (5, 7, 'a resident')")
    copy_all(made)
    with made.connect("s2") as target:
        fence.retire(target, made.move.id, lease_number=LEASE)
    with Connections() as connections:
        run(EraseBatch(made.move, 1, made.table, WHOLE, LEASE, "s2", made.dsn["s2"], 100), connections)
    assert rows(made.dsn["s2"], "SELECT id FROM orders WHERE tenant_id = 150") == {}
    mechanism.judge(residents_lost(made))


def residents_lost(engine: Engine) -> list[str]:
    found = rows(engine.dsn["s2"], "SELECT o::text FROM orders AS o WHERE tenant_id = 7")
    return [] if found == {'(5,7,"a resident")': 1} else [f"of the resident is left: {list(found)}"]


# --- the batch's record


def test_record_in_the_transaction_of_the_rows(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A worker dies before its commit; the next run goes by the records."""
    made = engine(rows=TEN)

    def record_apart(_: Connection, task: CopyBatch, digest: Digest) -> None:
        with made.connect("s2") as other:
            record_batch(other, task, digest)

    mechanism.replace(copy, "record_batch", record_apart)
    with once("batch.before", die), pytest.raises(Died):
        copy_batch(made)
    copy_batch(made)
    carry_all(made)
    mechanism.judge(differences(made))


record_batch = copy.record_batch


# --- what our sessions are pinned to

FORCED = """
    CREATE POLICY half ON orders USING (id % 2 = 0);
    ALTER TABLE orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY
"""


def test_force_rls(mechanism: Mechanism, databases: Databases) -> None:
    """A policy that binds the owner too shows half of the rows: an error; without it, all of them."""
    pinned = {name: value for name, value in connecting.PINNED.items() if name != "row_security"}
    mechanism.replace(connecting, "PINNED", pinned)
    made = make_engine(make_mover(databases("s1", "s2")), schema=ORDERS, rows=TEN)
    with outside(made.dsn["s1"]) as operator:
        operator.execute(FORCED)
        assert raises(Failed, lambda: copy_batch(made)) is mechanism.on
        operator.execute("ALTER TABLE orders NO FORCE ROW LEVEL SECURITY")
    with made.connect("s1") as source:
        drift.record_fingerprint(source, made.move.id, made.tables, lease_number=LEASE)
    copy_batch(made)
    carry_all(made)
    mechanism.judge(differences(made))


# --- the source's log


UNFLUSHED = {"autovacuum": "off", "checkpoint_timeout": "1h"}


@pytest.fixture(scope="module")
def fragile() -> Iterator[Server]:
    """A server that nobody else uses, and that writes to its log only what a commit asks for."""
    with Cluster(["fragile"], settings=UNFLUSHED) as cluster:
        yield cluster["fragile"]


@pytest.fixture(scope="module")
def fragile_and_old() -> Iterator[Server]:
    """The same, of a PostgreSQL where a session cannot flush the log for what it has only read."""
    with Cluster(["fragile"], binaries=old_binaries(), settings=UNFLUSHED) as cluster:
        yield cluster["fragile"]


@pytest.fixture
def on_fragile(fragile: Server, databases: Databases) -> Engine:
    return away_from(fragile, databases)


def away_from(server: Server, databases: Databases) -> Engine:
    """A move away from that server."""
    target = databases("s2")
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        connection.execute("CREATE DATABASE shop")
    return make_engine({"s1": server.dsn_for("shop"), **target}, rows=TEN)


@pytest.mark.fault
def test_crash_between_commits(mechanism: Mechanism, fragile: Server, on_fragile: Engine) -> None:
    """The application commits asynchronously; the source dies between the target's commit and its own."""
    mechanism.replace(catch_up, "flush_log", lambda _: None)
    copy_all(on_fragile)
    with mirror(on_fragile) as running, application(on_fragile) as client:
        client.execute("SET synchronous_commit = off")
        stop_the_log_writer(client)
        client.execute("UPDATE orders SET note = 'v2' WHERE id = 7")
        with once("catch_up.receiver.after", fragile.kill), pytest.raises(psycopg.OperationalError):
            running.catch_up()
    fragile.start()
    carry_all(on_fragile)
    mechanism.judge(differences(on_fragile))


@pytest.mark.fault
def test_log_flushed_by_another_session(mechanism: Mechanism, fragile_and_old: Server, databases: Databases) -> None:
    """The source restarts between the reading of a row and the flush for it, which a new session then does in vain."""
    mechanism.replace(catch_up, "require_reader", lambda _: None)
    made = away_from(fragile_and_old, databases)
    copy_all(made)

    def restart() -> None:
        fragile_and_old.kill()
        fragile_and_old.start()

    with mirror(made) as running, application(made) as client:
        client.execute("SET synchronous_commit = off")
        stop_the_log_writer(client)
        client.execute("UPDATE orders SET note = 'v2' WHERE id = 7")
        with once("catch_up.before_compare", restart), pytest.raises(psycopg.OperationalError):
            running.catch_up()
    carry_all(made)
    mechanism.judge(differences(made))


# --- DDL that leaves no entry

BEHIND_THE_JOURNAL = {
    "alter type using": "ALTER TABLE orders ALTER note TYPE text USING upper(note)",
    "disabled trigger": "ALTER TABLE orders DISABLE TRIGGER ALL; UPDATE orders SET note = 'unjournalled' WHERE id = 7;"
    " ALTER TABLE orders ENABLE ALWAYS TRIGGER shardmove_m1_insert;"
    " ALTER TABLE orders ENABLE ALWAYS TRIGGER shardmove_m1_update;"
    " ALTER TABLE orders ENABLE ALWAYS TRIGGER shardmove_m1_delete;"
    " ALTER TABLE orders ENABLE ALWAYS TRIGGER shardmove_m1_truncate",
    "truncate": "ALTER TABLE orders DISABLE TRIGGER shardmove_m1_truncate; TRUNCATE orders;"
    " ALTER TABLE orders ENABLE ALWAYS TRIGGER shardmove_m1_truncate",
}


@pytest.mark.parametrize("ddl", BEHIND_THE_JOURNAL.values(), ids=BEHIND_THE_JOURNAL.keys())
def test_unjournalled_ddl(mechanism: Mechanism, engine: MakeEngine, ddl: str) -> None:
    """It changes rows behind the triggers: the next catch-up refuses to go on, and repairs are looked for."""
    mechanism.replace(drift, "fingerprint", lambda *_: "as ever")
    made = engine(rows=TEN)
    copy_all(made)
    made.fetch("s1", f"BEGIN; {ddl}; COMMIT")
    found_out = raises(SchemaDrift, lambda: carry_all(made))
    assert found_out is mechanism.on
    mechanism.judge([] if found_out else differences(made))


def test_unjournalled_ddl_before_a_cutover(mechanism: Mechanism, world: World) -> None:
    """Between `ready` and the cutover: refused, then compared anew and mended, then cut over."""
    mechanism.replace(drift, "fingerprint", lambda *_: "as ever")
    move = world.split(at=20)
    world.run(move, State.READY)
    with world.connect("s1") as client:
        client.execute("BEGIN; ALTER TABLE tenants DISABLE TRIGGER ALL")
        client.execute("UPDATE tenants SET name = 'unjournalled' WHERE tenant_id = 25")
        client.execute("ALTER TABLE tenants ENABLE TRIGGER ALL")
        for event in ("insert", "update", "delete", "truncate"):
            client.execute(f"ALTER TABLE tenants ENABLE ALWAYS TRIGGER shardmove_{move}_{event}".encode())
        client.execute("COMMIT")
    refused = raises(SchemaDrift, lambda: world.cut_over(move))
    assert refused is mechanism.on
    if refused:
        world.run(move, State.READY)
        world.cut_over(move)
    found = world.fetch("s2", "SELECT name FROM tenants WHERE tenant_id = 25")
    mechanism.judge([] if found == [("unjournalled",)] else [f"an acknowledged write is lost: {found}"])


def test_truncate_is_refused(engine: MakeEngine) -> None:
    """No row trigger sees it, so that a statement trigger refuses it."""
    made = engine(rows=TEN)
    with application(made) as client, pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="TRUNCATE"):
        client.execute("TRUNCATE orders")


# --- applied as a replica


def only_marked(connection: Connection, move_id: str, _tables: Sequence[Table]) -> None:
    connection.execute("SELECT pg_catalog.set_config(%s, %s, true)", (parts.MARKER, move_id))


def test_cascade_of_a_mirrored_parent(mechanism: Mechanism, engine: MakeEngine) -> None:
    """A mirrored parent is deleted and inserted again: as an ordinary session that takes its children along."""
    mechanism.replace(catch_up, "become_replica", only_marked)
    made = engine(schema=FAMILY, tables=FAMILY_TABLES, rows=WITH_ITEMS)
    copy_all(made)
    made.fetch("s1", "UPDATE orders SET note = 'changed' WHERE id = 7")
    carry_all(made)
    mechanism.judge(differences(made))


def test_cascade_without_replica_right(databases: Databases) -> None:
    """A role that may not apply rows as a replica is refused before anything is touched, with what to grant."""
    dsn = make_mover(databases("s1", "s2"), may_be_replica=False)
    made = make_engine(dsn, schema=FAMILY, tables=FAMILY_TABLES)
    with ExitStack() as stack:
        source, target = (stack.enter_context(connect(dsn[shard], application_name="test")) for shard in ("s1", "s2"))
        site = Site(made.move, source, target)
        with pytest.raises(Refused, match="session_replication_role") as refused:
            preflight.require(site)
    assert "GRANT SET ON PARAMETER session_replication_role" in (refused.value.hint or "")


# --- a long report


@pytest.mark.parametrize("rows_max", [None, 1000])
@pytest.mark.parametrize("analyzed", [False, True])
def test_dead_journal(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, rows_max: int | None, analyzed: bool
) -> None:
    """50,000 entries are gone, but a long report keeps them from vacuum: a pass does not step over them."""
    made = engine(rows=TEN)
    copy_all(made)
    made.fetch("s1", "ALTER TABLE shardmove.journal_m1_1 SET (autovacuum_enabled = off)")
    with outside(made.dsn["s1"]) as report, mirror(made) as running:
        report.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        report.execute("SELECT count(*) FROM orders")
        ((entries,),) = made.fetch(
            "s1",
            "INSERT INTO shardmove.journal_m1_1 SELECT 150, i FROM generate_series(1, 50000) i"
            " RETURNING shardmove_xid::text::int8",
        )[:1]
        if analyzed:
            made.fetch("s1", "ANALYZE shardmove.journal_m1_1")
        made.fetch("s1", "DELETE FROM shardmove.journal_m1_1")
        until(lambda: running.catch_up(full_look=True).xmin > entries)
        made.fetch("s1", "UPDATE orders SET note = 'changed' WHERE id = 7")
        pages, plans = journal_pages(running, monkeypatch, rows_max)
        assert pages < 30, plans
        running.scan_from.clear()
        assert journal_pages(running, monkeypatch, rows_max)[0] > 200
    carry_all(made)
    assert differences(made) == []


def journal_pages(running: Mirror, monkeypatch: pytest.MonkeyPatch, rows_max: int | None) -> tuple[int, Any]:
    """How many pages a pass's statements on the journal read, and their plans. The pass itself is rolled back."""
    statements = []
    execute = running.giver.execute

    def listen(query: Any, *arguments: Any) -> Any:
        if "journal_m1_1" in (text := sql.as_string(query, running.giver)):
            statements.append(text)
        return execute(query, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(running.giver, "execute", listen)
        with once("catch_up.receiver.before", die), pytest.raises(Died):
            running.catch_up(rows_max=rows_max)
    assert len(statements) == 2
    plans = []
    for statement in statements:
        execute("BEGIN READ WRITE")
        ((plan,),) = execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}".encode()).fetchall()
        execute("ROLLBACK")
        plans.append(plan[0]["Plan"])
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans), json.dumps(plans, indent=1)
