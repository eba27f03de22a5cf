"""The fence, the attempts and the numbers: each mechanism's story, told twice, and every race that was reproduced.

A clerk is a client of the shop that is moved step by step, and keeps the external ledger. The judge compares that
ledger with the shards by plain SQL, and asks both of them who accepts writes: in the twin, where one function of the
product is replaced, it must report damage.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import LockNotAvailable, SerializationFailure, UniqueViolation

from shardmove.coordinator import cutover, planner
from shardmove.coordinator.run import run
from shardmove.domain.errors import CutoverGaveUp, Failed, LeaseLost, ServerChanged, ShardmoveError
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Attempt, Direction, Outcome, State
from shardmove.domain.points import Effect
from shardmove.postgres import connect, effects, locks
from shardmove.postgres.connect import Connection
from shardmove.postgres.embedded import Cluster, Server
from shardmove.protocol import capture, catch_up, drift, fence, kept, ownership, parts, sequences
from shardmove.protocol.catch_up import Mirror, Pass
from shardmove.protocol.gate import gate
from tests.support.engine import until
from tests.support.servers import SERVERS, Databases
from tests.support.twins import Mechanism, spawn, stop_the_log_writer
from tests.support.twins_fence import (
    BOUND_S,
    LEVELS,
    Clerk,
    Killed,
    Pause,
    another_catalog,
    at,
    damage,
    lose_lease,
    owners,
    party,
    raising,
    take_baseline,
    until_it_waits,
)
from tests.support.world import World, in_background
from workers.connections import Connections
from workers.erase import EraseBatch
from workers.executors import InlineExecutor

MakeWorld: TypeAlias = Callable[..., World]

PATIENT = {"max_stall_ms": 30_000}  # who stands still inside an attempt is not to be taken for a server that hangs
ONE_ATTEMPT = {**PATIENT, "cutover_attempts": 1, "cutover_grace_s": 0.2}
OURS = "shardmove m1"  # what our sessions for the first move are called


def ready(world: World) -> str:
    move = world.split()
    world.run(move, State.READY)
    return move


def try_to_rename(clerk: Clerk, tenant: int, name: str) -> None:
    """Commits, or is refused by a fence and leaves nothing."""
    with suppress(SerializationFailure):
        clerk.rename(tenant, name)


# --- closing: the exclusive lock


def test_a_writer_that_passed_the_open_fence_is_waited_for(mechanism: Mechanism, make_world: MakeWorld) -> None:
    mechanism.replace(fence, "lock_exclusively", lambda *_: None)
    world = make_world(limits=PATIENT)
    move = ready(world)
    with Clerk(world, "s1") as clerk:

        def pass_the_fence() -> None:
            clerk.begin()
            clerk.rename(25, "passed the open fence")

        with at("cutover.after_hold", pass_the_fence) as passed:
            cutting = spawn(lambda: world.cut_over(move))
            assert passed.wait(BOUND_S)
            until_it_waits(world, "s1", OURS, or_=cutting.done)
            clerk.commit()
            cutting.result(BOUND_S)
    mechanism.judge(damage(world))


def test_a_savepoint_rolled_back_and_written_again_is_waited_for(make_world: MakeWorld) -> None:
    world = make_world(limits=PATIENT)
    move = ready(world)
    with Clerk(world, "s1") as clerk:

        def pass_again() -> None:
            clerk.begin()
            clerk.savepoint("before")
            clerk.rename(25, "rolled back, and the lock with it")
            clerk.roll_back_to("before")
            clerk.rename(25, "written again")

        with at("cutover.after_hold", pass_again) as passed:
            cutting = spawn(lambda: world.cut_over(move))
            assert passed.wait(BOUND_S)
            until_it_waits(world, "s1", OURS, or_=cutting.done)
            assert not cutting.done()
            clerk.commit()
            cutting.result(BOUND_S)
    assert damage(world) == []


def test_a_prepared_transaction_keeps_its_lock(make_world: MakeWorld) -> None:
    world = make_world(limits=ONE_ATTEMPT)
    move = ready(world)
    with Clerk(world, "s1") as clerk:
        clerk.begin()
        clerk.rename(25, "prepared")
        clerk.execute("PREPARE TRANSACTION 'waiting'")
        try:
            with pytest.raises(CutoverGaveUp, match="prepared transaction 'waiting'"):
                world.cut_over(move)
        finally:
            clerk.commit("COMMIT PREPARED 'waiting'")
    world.cut_over(move)
    assert damage(world) == []


@pytest.mark.parametrize("level", LEVELS)
def test_one_statement_guard(mechanism: Mechanism, make_world: MakeWorld, level: str) -> None:
    """A writer that queued behind the closer wakes when it is closed. The state must be read after the lock is had."""
    mechanism.replace(capture, "take_shared_lock", lambda *_: sql.SQL("").format())
    mechanism.replace(capture, "read_state", lock_and_state_in_one_statement)
    world = make_world(limits=PATIENT)
    move = ready(world)
    with Clerk(world, "s1") as clerk, Pause("close.after_lock") as closing:
        cutting = spawn(lambda: world.cut_over(move))
        closing.wait()
        clerk.begin(level)
        writing = spawn(lambda: clerk.rename(25, "behind the closer"))
        until_it_waits(world, "s1", "clerk")
        closing.release()
        cutting.result(BOUND_S)
        if writing.exception(BOUND_S) is None:
            clerk.commit()
        else:
            assert isinstance(writing.exception(), SerializationFailure)
    mechanism.judge(damage(world))


def lock_and_state_in_one_statement(move_id: str) -> sql.Composed:
    return sql.SQL(
        "SELECT s.last_value, pg_catalog.pg_advisory_xact_lock_shared("
        "(SELECT f.fence_key FROM shardmove.fence f WHERE f.move_id = {})) INTO state FROM {} AS s;"
    ).format(sql.Literal(move_id), parts.state_sequence(move_id))


def test_closing_behind_long_writer(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """The cutover looks before it asks for the lock: other writers never queue behind it for as long as it waits."""
    mechanism.replace(fence, "holders", lambda *_, **__: [])
    # For half of that time the lock is waited for; and for so long a transaction has to be open to be looked at.
    world = make_world(limits={**ONE_ATTEMPT, "max_stall_ms": 4_000 if mechanism.on else 16_000})
    move = ready(world)
    with Clerk(world, "s1", "long writer") as long, Clerk(world, "s1", "other") as other:
        long.begin()
        long.rename(25, "written by the long one")
        until_it_is_older(world, "long writer", 2.1)
        cutting = spawn(lambda: world.cut_over(move))
        until_it_waits(world, "s1", OURS, or_=cutting.done)
        other.execute("SET lock_timeout = '300ms'")
        with suppress(LockNotAvailable):
            other.rename(30, "written beside it")
        error = cutting.exception(BOUND_S)
        long.commit()
    assert isinstance(error, CutoverGaveUp)
    if mechanism.on:
        assert f"pid {long.pid} (long writer)" in str(error)
    mechanism.judge(damage(world))


def until_it_is_older(world: World, application: str, age_s: float) -> None:
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        f" AND application_name = '{application}' AND clock_timestamp() - xact_start > '{age_s} s'"
    )
    until(lambda: world.fetch("s1", query) == [(1,)])


# --- what writers read: the state


def plain_row(move_id: str) -> sql.Composed:
    return sql.SQL(
        "SELECT CASE WHEN f.is_open THEN 2 ELSE 1 END INTO state FROM shardmove.fence f WHERE f.move_id = {};"
    ).format(sql.Literal(move_id))


def locked_row(move_id: str) -> sql.Composed:
    return sql.SQL(
        "SELECT CASE WHEN f.is_open THEN 2 ELSE 1 END INTO state FROM shardmove.fence f WHERE f.move_id = {} FOR SHARE;"
    ).format(sql.Literal(move_id))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_old_snapshot_finds_no_fence(
    mechanism: Mechanism, world: World, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """The snapshot is older than the fence row. Even where a row is what is read: not found is not open."""
    monkeypatch.setattr(capture, "read_state", plain_row)
    mechanism.replace(capture, "refused_when", lambda: sql.SQL("state = 1"))
    move = world.split()
    with Clerk(world, "s1") as clerk:
        clerk.begin(level)
        world.run(move, State.READY)
        world.cut_over(move)
        write_on(clerk, 25, "found no fence")
    mechanism.judge(damage(world))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_the_state_is_read_whatever_the_snapshot(mechanism: Mechanism, world: World, level: str) -> None:
    mechanism.replace(capture, "read_state", plain_row)
    move = ready(world)
    with Clerk(world, "s1") as clerk:
        clerk.begin(level)
        world.cut_over(move)
        write_on(clerk, 25, "saw the fence open")
    mechanism.judge(damage(world))


def write_on(clerk: Clerk, tenant: int, name: str) -> None:
    """Goes on with an open transaction, and commits it where no fence refuses."""
    with suppress(SerializationFailure):
        clerk.rename(tenant, name)
        clerk.commit()


@pytest.mark.parametrize("age", ["older than the move", "older than the closing"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_closed_fence_refuses_every_snapshot(world: World, level: str, age: str) -> None:
    move = world.split()
    with Clerk(world, "s1") as clerk:
        if age == "older than the move":
            clerk.begin(level)
        world.run(move, State.READY)
        if age == "older than the closing":
            clerk.begin(level)
        world.cut_over(move)
        with pytest.raises(SerializationFailure, match="are fenced on this shard by move m1") as refused:
            clerk.rename(25, "too late")
        assert "on shard s2" in str(refused.value.diag.message_hint)
    assert damage(world) == []


@pytest.mark.parametrize("age", ["older than the move", "older than the attempt"])
@pytest.mark.parametrize("level", LEVELS)
def test_an_old_snapshot_passes_the_fence_that_a_failed_attempt_opened_again(
    make_world: MakeWorld, level: str, age: str
) -> None:
    world = make_world(limits=ONE_ATTEMPT)
    move = world.split()
    with Clerk(world, "s1") as clerk:
        if age == "older than the move":
            clerk.begin(level)
        world.run(move, State.READY)
        if age == "older than the attempt":
            clerk.begin(level)
        with at("cutover.after_empty", raising(Failed("a failure"))), pytest.raises(CutoverGaveUp, match="a failure"):
            world.cut_over(move)
        clerk.rename(25, "from an old snapshot")
        clerk.commit()
    world.cut_over(move)
    assert damage(world) == []


def test_multixact(mechanism: Mechanism, world: World) -> None:
    """Writers that pass the same fence at once leave no multixact behind: 72,000 a second were measured of a row."""
    mechanism.replace(capture, "read_state", locked_row)
    ready(world)
    before = next_multixact(world)
    with Clerk(world, "s1", "one") as one, Clerk(world, "s1", "two") as two:
        for clerk, tenant in ((one, 25), (two, 26)):
            clerk.begin()
            clerk.savepoint("before")
            clerk.rename(tenant, f"by {clerk.name}")
        one.commit()
        two.commit()
    made = next_multixact(world) - before
    mechanism.judge([f"{made} multixacts"] if made else [])
    assert damage(world) == []


def next_multixact(world: World) -> int:
    ((number,),) = world.fetch("s1", "SELECT mxid_age('1'::xid)")
    return int(number)


# --- DDL


@pytest.mark.parametrize("when", ["before the guards", "behind a guard that was lost"])
def test_fingerprint_under_weak_lock(mechanism: Mechanism, make_world: MakeWorld, when: str) -> None:
    """DDL in flight during the cutover turns the triggers off, writes, and turns them on again: no journal, no fence.

    The table locks keep it out, and a guard's session that is lost with them ends the attempt.
    """
    world = make_world(limits={**PATIENT, "cutover_attempts": 2})
    move = ready(world)
    with Clerk(world, "s1", "operator") as operator:

        def slip() -> None:
            operator.rename_unseen(25, "with all triggers off")

        def slip_past_the_lost_guard() -> None:
            world.fetch("s1", END_THE_GUARD)
            slip()

        if when == "before the guards":
            mechanism.replace(cutover, "lock_tables", lambda *_, **__: None)
            place = at("catch_up.after_pass", slip)
        else:
            mechanism.replace(cutover._Crossing, "_require_guards", lambda _: None)
            place = at("cutover.after_guards", slip_past_the_lost_guard)
        with place as slipped, suppress(CutoverGaveUp):
            world.cut_over(move)
        assert slipped.is_set()
        operator.commit_unseen(move)
    if world.move(move).state is State.READY:
        world.run(move, State.READY)
        world.cut_over(move)
    mechanism.judge(damage(world))


END_THE_GUARD = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE relation = 'tenants'::regclass AND mode = 'RowExclusiveLock' AND application_name = 'shardmove m1'
"""


def test_ddl_stall(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """Triggers are made behind a long writer: the others write on, and the message says who is in the way."""
    mechanism.replace(locks, "change_table", change_without_looking)
    world = make_world(limits={"ddl_patience_s": 3.0})
    move = world.split()
    with Clerk(world, "s1", "long writer") as long, Clerk(world, "s1", "other") as other:
        long.begin()
        long.rename(25, "written by the long one")
        installing = spawn(lambda: world.run(move, State.READY))
        until_it_waits(world, "s1", OURS, or_=installing.done)
        other.execute("SET lock_timeout = '2s'")  # ten times what ours may wait
        with suppress(LockNotAvailable):
            other.rename(30, "written beside it")
        if mechanism.on:
            with pytest.raises(Failed, match=f"in the way: pid {long.pid} \\(long writer"):
                installing.result(BOUND_S)
        long.commit()
        installing.exception(BOUND_S)
    world.run(move, State.READY)
    mechanism.judge(damage(world))


def test_a_serializable_reader_is_in_nobodys_way(world: World) -> None:
    """Its predicate locks are on the table for as long as it lasts, and keep nobody out."""
    with Clerk(world, "s1") as reader:
        reader.begin("SERIALIZABLE")
        reader.execute("SELECT count(*) FROM tenants")
        move = ready(world)
        world.cut_over(move)
    assert damage(world) == []


def change_without_looking(
    connection: Connection, _name: object, _effect: object, change: Callable[[], None], **_: object
) -> None:
    with connection.transaction():
        change()


# --- numbers (I8)


@pytest.fixture
def former_sessions_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a process live that was just about to send something when it was taken over."""
    monkeypatch.setattr(fence, "end_former", lambda *_: None)


@pytest.mark.usefixtures("former_sessions_live")
def test_plain_number_check(mechanism: Mechanism, world: World) -> None:
    """A batch of a dead coordinator wakes after another one took over, and copied everything as it is by then."""
    plainly = fence.read
    mechanism.replace(fence, "read", lambda connection, move_id, *, share=False: plainly(connection, move_id))
    move = world.split()
    with Clerk(world, "s1") as clerk, Pause("batch.before") as zombie:
        first = spawn(lambda: run_with_one_worker(world, move))
        zombie.wait()
        clerk.delete_all(20)
        lose_lease(world, move)
        world.run(move, State.READY)
        zombie.release()
        assert isinstance(first.exception(BOUND_S), ShardmoveError | psycopg.Error)
        world.cut_over(move)
    mechanism.judge(damage(world))


def run_with_one_worker(world: World, move: str) -> None:
    with world.hold(move, make_executor=lambda: InlineExecutor(1)) as held:
        run(held, State.READY)


@pytest.mark.usefixtures("former_sessions_live")
def test_paused_zombie_holds_row(mechanism: Mechanism, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that keeps a zombie from harm would keep its successor out too: its session is ended."""
    raise_number = fence.raise_number
    patience_s = 60.0 if mechanism.on else 1.0
    monkeypatch.setattr(fence, "raise_number", lambda *args: raise_number(*args, patience_s=patience_s))
    mechanism.replace(fence, "_end_holders", lambda *_: None)
    move = world.split()
    with Pause("batch.before") as zombie:
        first = spawn(lambda: run_with_one_worker(world, move))
        zombie.wait()
        lose_lease(world, move)
        second = spawn(lambda: world.run(move, State.READY))
        damage = [str(second.exception(BOUND_S))] if second.exception(BOUND_S) else []
        zombie.release()
        first.exception(BOUND_S)
    mechanism.judge(damage)


def test_the_verdict_of_a_zombie(mechanism: Mechanism, world: World) -> None:
    """A coordinator that was taken for dead found both sides equal, before the schema was changed behind its back."""
    if not mechanism.on:
        in_catalog(world, "CREATE OR REPLACE FUNCTION shardmove_catalog.lock_move(the_move text, the_lease bigint)"
                          " RETURNS void LANGUAGE sql AS ''")  # fmt: skip
    move = world.split()
    with Clerk(world, "s1", "operator") as operator, Pause("verifying.after_comparison") as zombie:
        first = spawn(lambda: world.run(move, State.READY))
        zombie.wait()
        operator.rename_unseen(25, "with all triggers off")
        operator.commit_unseen(move)
        lose_lease(world, move)
        with at("pairs.between_snapshots", raising(Killed())), pytest.raises(Killed):
            world.run(move, State.READY)  # sees the change, begins to compare, and dies
        zombie.release()
        first.exception(BOUND_S)
    if mechanism.on:
        assert isinstance(first.exception(), LeaseLost)
    if world.move(move).state is not State.READY:
        world.run(move, State.READY)
    world.cut_over(move)
    mechanism.judge(damage(world))


def in_catalog(world: World, statement: str) -> None:
    with world.connect("cat") as connection:
        connection.execute(statement.encode())


# --- attempts


def test_a_flip_needs_its_attempt_to_be_open(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """While the holder slept before its flip, somebody took it for dead, gave the attempt up and opened the source."""
    world = make_world(limits=PATIENT)
    if not mechanism.on:
        flip_whatever_the_attempt(world)
    move = ready(world)
    with Clerk(world, "s1") as clerk, another_catalog(world) as catalog, party(world, move) as reach:

        def meanwhile() -> None:
            ownership.settle(catalog, catalog.move(move), 1, reach, reason="taken for dead")
            clerk.rename(25, "after it was opened again")

        with at("flip.before", meanwhile):
            world.cut_over(move)
    mechanism.judge(damage(world))


def flip_whatever_the_attempt(world: World) -> None:
    """The catalog's own function, but for the one statement that turns the attempt from open."""
    ((source,),) = world.fetch("cat", "SELECT pg_get_functiondef('shardmove_catalog.flip'::regproc)")
    condition = re.compile(r"UPDATE shardmove_catalog\.attempt.*?RETURNING \* INTO decided;", re.DOTALL)
    without, replaced = condition.subn(
        "SELECT * INTO decided FROM shardmove_catalog.attempt WHERE move_id = the_move AND number = the_number;", source
    )
    assert replaced == 1
    in_catalog(world, without)


def any_attempt() -> str:
    return "%s IS NOT NULL"


def test_late_opener(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """Somebody gave attempt 1 up, and wakes to open the source for it when attempt 2 has closed it."""
    mechanism.replace(fence, "opening_condition", any_attempt)
    world = make_world(limits=PATIENT)
    move = ready(world)
    with Clerk(world, "s1") as clerk, another_catalog(world) as catalog, party(world, move) as reach:
        given_up: list[Attempt] = []

        def give_up() -> None:
            outcome = catalog.settle_attempt(catalog.move(move), 1, "taken for dead")
            given_up.append(Attempt(move, 1, Direction.FORWARD, outcome))

        def wake() -> None:
            assert given_up[0].outcome is Outcome.ABANDONED
            ownership.carry_out(given_up[0], catalog.move(move), reach)
            try_to_rename(clerk, 25, "through the late opening")

        with at("cutover.after_hold", give_up), at("cutover.after_empty", wake, nth=2) as woken:
            world.cut_over(move)
        assert woken.is_set()
    mechanism.judge(damage(world))


def test_late_opener_of_the_target(mechanism: Mechanism, world: World) -> None:
    """Somebody saw the flip of attempt 1, and wakes to open the target for it when a revert has flipped back."""
    mechanism.replace(fence, "opening_condition", any_attempt)
    move = ready(world)
    world.cut_over(move)
    with Clerk(world, "s2") as clerk, another_catalog(world) as catalog, party(world, move) as reach:
        seen = catalog.attempt(move, 1)
        assert seen.outcome is Outcome.FLIPPED
        world.cut_over(move, Direction.BACK)
        ownership.carry_out(seen, catalog.move(move), reach)
        try_to_rename(clerk, 25, "through the late opening")
    mechanism.judge(damage(world))


# --- ends


def test_erase_against_catch_up(mechanism: Mechanism, world: World) -> None:
    """A catch-up that was let in before the erasure must not bring a row back after it."""
    mechanism.replace(fence, "retire", lambda *_, **__: None)
    mechanism.replace(fence, "check_erasable", fence.check_lease)
    move = ready(world)
    world.cut_over(move)
    cleaning = threading.Event()
    with (
        Clerk(world, "s2") as clerk,
        world.mirror(move, Direction.BACK) as late,
        Pause("catch_up.after_giver_snapshot", when=cleaning.is_set) as reading,
    ):

        def catch_up_late() -> None:
            clerk.rename(25, "the last write before the end")
            cleaning.set()
            carried.append(spawn(late.catch_up))
            reading.wait()

        def stand_until_it_carried() -> None:
            erased.set()
            carried[0].result(BOUND_S)

        carried: list[Future[Pass]] = []
        erased = threading.Event()
        with (
            at("transition.after", catch_up_late) as begun,
            at("ending.after_erase", stand_until_it_carried),
        ):
            completing = spawn(lambda: world.complete(move))
            assert begun.wait(BOUND_S)
            until_it_waits(world, "s1", OURS, or_=erased.is_set)
            reading.release()
            completing.result(BOUND_S)
    mechanism.judge(damage(world, absent_on="s1"))


@pytest.mark.parametrize("end", ["complete", "roll_back"])
def test_a_forgotten_writer_meets_the_kept_fence(mechanism: Mechanism, world: World, end: str) -> None:
    """For ever: also a rolled-back target keeps its fence, if it ever owned the range."""
    mechanism.replace(kept, "keep_fence", lambda *_, **__: None)
    move = world.split()
    world.run(move, State.SWITCHED)
    getattr(world, end)(move)
    with Clerk(world, {"complete": "s1", "roll_back": "s2"}[end]) as clerk, suppress(SerializationFailure):
        clerk.add_tenant(60, "by a forgotten cron job")
    mechanism.judge(damage(world))


def test_a_target_that_never_owned_the_range_keeps_no_fence(world: World) -> None:
    move = ready(world)
    world.roll_back(move)
    assert world.fetch("s2", "SELECT lower, upper FROM shardmove.kept") == []
    assert kept_triggers(world, "s2") == 0


def kept_triggers(world: World, shard: str) -> int:
    ((count,),) = world.fetch(shard, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'shardmove\\_kept%'")
    return int(count)


def test_a_kept_fence_goes_when_the_range_comes_back(world: World) -> None:
    """First a part of it, then the rest: what remains stays fenced on the old shard, one condition a table."""
    gone = world.split()
    world.run(gone, State.COMPLETED)
    assert owners(world, 25) == owners(world, 35) == ["s2"]
    for part, owners_after in ((KeyRange(20, 30), (["s1"], ["s2"])), (KeyRange(30, None), (["s1"], ["s1"]))):
        back = planner.move(world.config, world.catalog, "shop", range_=part, to="s1").move_ids[0]
        world.run(back, State.READY)
        assert owners(world, 25) == owners_after[0] or part.lower == 20
        assert owners(world, 35) == ["s2"]
        world.run(back, State.COMPLETED)
        assert (owners(world, 25), owners(world, 35)) == owners_after
    assert world.fetch("s1", "SELECT lower, upper FROM shardmove.kept") == []
    assert kept_triggers(world, "s1") == 0
    assert world.fetch("s2", "SELECT lower, upper FROM shardmove.kept") == [("20", None)]


def test_two_moves_that_complete_at_once_merge_their_kept_fences(mechanism: Mechanism, world: World) -> None:
    mechanism.replace(kept, "changing", lambda *_: nullcontext())
    plan = planner.split(world.config, world.catalog, "shop", at=[20, 50], to=["s2", "s3"])
    one, two = plan.move_ids
    for move in (one, two):
        world.run(move, State.SWITCHED)
    with Pause("keep_fence.before_tables") as keeping:
        first = in_background(lambda: world.complete(one))
        keeping.wait()
        second = spawn(lambda: world.complete(two))
        until_it_waits(world, "s1", f"shardmove {two}", or_=second.done)
        keeping.release()
        first()
        second.result(BOUND_S)
    with Clerk(world, "s1") as clerk:
        for tenant in (45, 60):
            with suppress(SerializationFailure):
                clerk.add_tenant(tenant, "by a forgotten cron job")
    mechanism.judge(damage(world, one_owner=False))
    if mechanism.on:
        assert world.fetch("s1", "SELECT lower, upper FROM shardmove.kept") == [("20", None)]


@pytest.mark.parametrize("when", ["after the next move", "on the side that owns the range"])
def test_an_eraser_asks_the_shard_each_time(mechanism: Mechanism, world: World, when: str) -> None:
    """I6: a zombie's batch of an erasure wakes where the range has been given to meanwhile, or was sent there."""
    mechanism.replace(fence, "check_erasable", lambda *_: None)
    take_baseline(world)
    move = ready(world)
    if when == "after the next move":
        batch = erasure(world, move)
        world.roll_back(move)
        world.run(world.split(), State.SWITCHED)
    else:
        world.cut_over(move)
        batch = erasure(world, move)
    with Connections() as connections, suppress(ShardmoveError):
        batch.run(connections)
    mechanism.judge(damage(world))


def erasure(world: World, move: str) -> EraseBatch:
    """Of all order items of the range on s2, as its coordinator would have it done now."""
    with world.hold(move) as held:
        ordinal, table = next(pair for pair in enumerate(held.tables, 1) if pair[1].name.name == "order_items")
        return EraseBatch(
            held.move, ordinal, table, (None, None), world.move(move).lease_number, "s2", world.dsns["s2"], 1000
        )


# --- sequences


def test_sequences_go_along(mechanism: Mechanism, world: World) -> None:
    mechanism.replace(sequences, "advance", lambda *_, **__: [])
    mechanism.replace(sequences, "check", lambda *_: None)
    move = world.split(at=0)  # of the tenant who has the orders from number 1 on
    world.run(move, State.SWITCHED)
    with Clerk(world, "s2") as clerk, suppress(UniqueViolation):
        clerk.add_order(0, "the first one after the cutover")
    mechanism.judge(damage(world))


def test_a_sequence_that_is_behind_stops_the_cutover(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "advance", lambda *_, **__: [])
    world = make_world(limits=ONE_ATTEMPT)
    move = ready(world)
    with pytest.raises(CutoverGaveUp, match="is behind the other shard's: it would hand out used numbers"):
        world.cut_over(move)
    assert owners(world) == ["s1"]


def set_whatever_it_is(receiver: Connection, name: str, value: int) -> None:
    effects.once(receiver, Effect.SET_SEQUENCE, "SELECT pg_catalog.setval(%s::regclass, %s)", (name, value))


def test_sequence_race(mechanism: Mechanism, world: World) -> None:
    """A resident of the receiver draws more than the margin between our look and our setval: nothing is put back."""
    mechanism.replace(sequences, "set_ahead", set_whatever_it_is)
    move = ready(world)
    with world.hold(move) as held:
        tables = held.tables
    issued: list[int] = []

    def resident() -> None:
        draw = "SELECT nextval(pg_get_serial_sequence('orders', 'order_id')) FROM generate_series(1, 1000)"
        issued.extend(number for (number,) in world.fetch("s3", draw))

    with world.connect("s3") as receiver, world.connect("s1") as giver:
        receiver.execute("SET search_path = ''")
        giver.execute("SET search_path = ''")
        with at("set_sequence.before", resident, nth=1):
            sequences.advance(receiver, giver, tables, margin=500)
        resident()
    twice = sorted({number for number in issued if issued.count(number) > 1})
    mechanism.judge([f"{len(twice)} numbers were issued twice, from {twice[0]} on"] if twice else [])


# --- two kinds of locks


def test_same_lock_for_catch_up(mechanism: Mechanism, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catch-up that comes late, and has to wait with its lock, does not hold up the writers of the open shard."""
    mechanism.replace(catch_up, "begin_receiver", begin_with_the_fences_lock)
    move = ready(world)
    world.cut_over(move)
    standing, go_on = threading.Event(), threading.Event()
    check = fence.check_receiving

    def stand(*args: Any) -> Any:
        standing.set()
        assert go_on.wait(BOUND_S)
        return check(*args)

    monkeypatch.setattr(fence, "check_receiving", stand)
    with Clerk(world, "s2") as clerk, world.mirror(move) as late:
        catching_up = spawn(late.catch_up)
        try:
            assert standing.wait(BOUND_S)
            until(lambda: bool(world.fetch("s2", ADVISORY_LOCKS)))
            clerk.execute("SET lock_timeout = '1s'")
            with suppress(LockNotAvailable):
                clerk.rename(25, "while the late one stands still")
        finally:
            go_on.set()
        assert isinstance(catching_up.exception(BOUND_S), ShardmoveError)
    mechanism.judge(damage(world))


ADVISORY_LOCKS = """
    SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND granted AND application_name = 'shardmove m1' AND datname = current_database()
"""


def begin_with_the_fences_lock(mirror: Mirror) -> None:
    effects.begin(mirror.receiver)
    mirror.receiver.execute(
        "SELECT pg_catalog.pg_advisory_xact_lock(fence_key) FROM shardmove.fence WHERE move_id = %s", (mirror.move.id,)
    )
    row = fence.check_receiving(mirror.receiver, mirror.move.id, mirror.move.giver(mirror.direction))
    mirror.gate = gate(mirror.receiver, row, mirror.tables)


# --- servers that lose their tail


def test_async_commit_crash(mechanism: Mechanism, tmp_path: Path) -> None:
    """The role commits without waiting for the disk. A closing of ours that a crash undoes would open the source."""
    mechanism.replace(connect, "_PIN_DURABILITY", "SELECT 1")
    with own_world(tmp_path, UNFLUSHED) as (world, cluster):
        with world.connect("s1") as connection:
            connection.execute("ALTER ROLE postgres SET synchronous_commit = off")
        take_baseline(world)
        move = ready(world)

        def crash() -> None:
            cluster["s1"].kill()
            cluster["s1"].start()

        with at("cutover.after_hold", lambda: hold_up_the_log(world)), at("flip.after", crash) as crashed:
            world.cut_over(move)
        assert crashed.is_set()
        with Clerk(world, "s1") as clerk:
            try_to_rename(clerk, 25, "after the crash")
        mechanism.judge(damage(world))


UNFLUSHED = {
    "wal_writer_delay": "10s",
    "wal_writer_flush_after": "1GB",
    "bgwriter_lru_maxpages": "0",
    "autovacuum": "off",
}
"""Nobody but who commits synchronously writes the log out."""


def hold_up_the_log(world: World) -> None:
    """Everything up to now is durable; from now on the log's own writer on s1 does nothing."""
    with world.connect("s1") as connection:
        connection.execute("CHECKPOINT")
        stop_the_log_writer(connection)


def test_a_server_that_lost_its_tail_takes_over_nothing(mechanism: Mechanism, tmp_path: Path) -> None:
    """After the cutover the new owner fails over to a standby that is behind: it lacks what the old one still has."""
    mechanism.replace(drift, "check_identity", lambda *_: None)
    with own_world(tmp_path, {"fsync": "off"}) as (world, cluster):
        move = ready(world)
        standby = copy_of(cluster["s2"], tmp_path)
        with Clerk(world, "s1") as clerk:
            clerk.rename(25, "the standby never heard of it")
        world.cut_over(move)
        fail_over(cluster["s2"], standby)
        with suppress(ServerChanged):
            world.complete(move)
        query = "SELECT count(*) FROM tenants WHERE name = 'the standby never heard of it'"
        copies = sum(world.fetch(shard, query)[0][0] for shard in ("s1", "s2"))
        mechanism.judge([] if copies else ["an acknowledged write is on no shard any more"])
        if mechanism.on:
            assert owners(world) == []  # until somebody has compared both sides
            assert world.move(move).state is State.SWITCHED


def copy_of(server: Server, directory: Path) -> Path:
    """A standby's data directory, as old as this moment."""
    copy = directory / "standby"
    server.stop()
    subprocess.run(["cp", "-a", server.data, copy], check=True)
    server.start()
    return copy


def fail_over(server: Server, standby: Path) -> None:
    """From now on the standby answers at the server's address, on a timeline of its own."""
    server.stop("immediate")
    shutil.rmtree(server.data)
    subprocess.run(["cp", "-a", standby, server.data], check=True)
    promoted = server.data / "standby.signal"
    promoted.touch()
    server.binaries.own(promoted)
    server.start()
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        assert connection.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)


@contextmanager
def own_world(directory: Path, settings: Mapping[str, str]) -> Iterator[tuple[World, Cluster]]:
    """A world on servers of its own, which may be crashed and swapped."""
    with Cluster(SERVERS, settings=settings) as cluster:
        world = World(Databases(cluster), directory, limits=PATIENT)
        try:
            yield world, cluster
        finally:
            world.catalog.close()
