"""Bugs that others have had, by their threads: absent here, and shown where the mechanism that keeps them out is off.

Each test runs twice. The story is that of the thread, on real servers; in the twin one function of the product is
replaced by what the other system did, and plain SQL or the external ledger must find the damage that its users found.
The table is docs/known-bugs.md, and names these tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import psycopg
import pytest
from psycopg import errors, sql

from shardmove.coordinator import cutover, ending, hold, planner, preflight
from shardmove.domain.errors import CutoverGaveUp, DifferencesFound, Failed, LeaseLost, Refused, ShardmoveError
from shardmove.domain.moves import Attempt, Direction, Move, State
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table, table_sql
from shardmove.postgres.sql import Interval
from shardmove.protocol import catch_up, fence
from shardmove.verify import comparison
from tests.support.failover import differences as between_shards
from tests.support.failover import execute, names_of
from tests.support.servers import Databases
from tests.support.twins import (
    Died,
    MakeEngine,
    Mechanism,
    carry_all,
    copy_all,
    die,
    differences,
    make_mover,
    mirror,
    once,
    outside,
    rows,
    spawn,
)
from tests.support.twins_fence import (
    BOUND_S,
    MOVED,
    Clerk,
    Killed,
    at,
    damage,
    owners,
    raising,
    take_baseline,
    until_it_waits,
)
from tests.support.world import World
from workers import copy, erase
from workers.connections import Connections
from workers.cuts import walk
from workers.erase import EraseBatch

MakeWorld: TypeAlias = Callable[..., World]

ROOT: Final = Path(__file__).parents[1]
PATIENT: Final = {"max_stall_ms": 30_000}
ONE_ATTEMPT: Final = {**PATIENT, "cutover_attempts": 1}


def ready(world: World) -> str:
    move = world.split()
    world.run(move, State.READY)
    return move


def the_range_is_taken_by(world: World, shard: str) -> list[str]:
    """Damage where the range is not writable on that shard, and there alone."""
    accepting = owners(world)
    return [] if accepting == [shard] else [f"{accepting} accept writes to the range, it must be {shard}"]


# --- the switch


def test_vitess_9453_an_open_transaction_survives_the_switch(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """It wrote to the range, stayed open while the range was switched, and committed on the old side: lost."""
    mechanism.replace(fence, "lock_exclusively", lambda *_: None)
    world = make_world(limits=PATIENT)
    move = ready(world)
    with Clerk(world, "s1") as clerk:

        def write_and_stay_open() -> None:
            clerk.begin("REPEATABLE READ")
            clerk.rename(25, "in an open transaction")

        with at("cutover.after_hold", write_and_stay_open) as written:
            switching = spawn(lambda: world.cut_over(move))
            assert written.wait(BOUND_S)
            until_it_waits(world, "s1", f"shardmove {move}", or_=switching.done)
            clerk.commit()
            switching.result(BOUND_S)
    mechanism.judge(damage(world))


def test_vitess_16563_positions_are_taken_before_writers_are_flushed(
    mechanism: Mechanism, make_world: MakeWorld
) -> None:
    """Caught up to a position from before the writes were stopped; what was written in between stayed behind."""
    mechanism.replace(cutover._Crossing, "_empty", lambda _: None)
    world = make_world(limits=PATIENT)
    move = ready(world)
    with (
        Clerk(world, "s1") as clerk,
        at("cutover.after_hold", lambda: clerk.rename(25, "after the last catch-up, before the fence")),
    ):
        world.cut_over(move)
    mechanism.judge(damage(world))


def cancel_without_its_locks(*_: object) -> Attempt:
    raise LeaseLost("the context that cancels does not hold the locks that cancelling asks for")


def test_vitess_17620_cancelling_a_switch_always_fails(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """The switch failed after the writes were stopped, its cancellation failed too, and neither side took writes."""
    mechanism.replace(cutover._Crossing, "_finish", cancel_without_its_locks)
    world = make_world(limits=ONE_ATTEMPT)
    move = ready(world)
    with at("cutover.after_empty", raising(Failed("a failure"))), pytest.raises((CutoverGaveUp, LeaseLost)):
        world.cut_over(move)
    mechanism.judge(the_range_is_taken_by(world, "s1"))


def test_vitess_16794_the_way_back_lacks_a_permission(
    mechanism: Mechanism, databases: Databases, tmp_path: Path
) -> None:
    """Switched first, and only then it was seen that the reverse stream may not write to the source."""
    mechanism.replace(preflight, "try_way_back", lambda *_, **__: None)
    world = World(DatabasesOfAMover(databases), tmp_path)  # type: ignore[arg-type]
    try:
        move = ready(world)
        with outside(world.dsns["s1"]) as operator:
            role = psycopg.conninfo.conninfo_to_dict(world.dsns["s1"])["user"]
            revoke = sql.SQL("REVOKE SET ON PARAMETER session_replication_role FROM {}")
            operator.execute(revoke.format(sql.Identifier(str(role))))
        with suppress(ShardmoveError, errors.InsufficientPrivilege):
            world.cut_over(move)
        if world.move(move).state is State.SWITCHED:
            execute(world, "s2", "UPDATE tenants SET name = 'on the new side' WHERE tenant_id = 25")
        mechanism.judge(way_back(world, move))
    finally:
        world.catalog.close()


class DatabasesOfAMover:
    """The databases of a test, reached as a role that is no superuser."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases

    def __call__(self, *names: str) -> dict[str, str]:
        return make_mover(self._databases(*names))


def way_back(world: World, move: str) -> list[str]:
    """Damage where the move is switched, and what is written now cannot be carried back."""
    if world.move(move).state is State.READY:
        return []
    with world.mirror(move, Direction.BACK) as back:
        try:
            back.until_empty()
        except (psycopg.Error, ShardmoveError) as error:
            return [f"switched, and there is no way back: {error}"]
    return []


# --- copy and verification


def from_one_on(table: Table, interval: Interval) -> sql.Composable:
    """The first page begins behind zero."""
    if interval[0] is not None:
        return within(table, interval)
    zero = ["0" for _ in table.keyset]
    return within(table, (tuple(zero), interval[1]))


within: Final = Table.within


def test_ghostferry_305_keys_up_to_zero_are_neither_copied_nor_verified(
    mechanism: Mechanism, make_world: MakeWorld
) -> None:
    """The cursor of the copy began with `> 0`, and so did the verifier's: nobody missed the rows."""
    mechanism.replace(Table, "within", from_one_on)
    world = make_world(limits=PATIENT)
    for tenant in (-3, -2, -1):
        execute(world, "s1", f"INSERT INTO tenants VALUES ({tenant}, 'below zero')")
    take_baseline(world)
    move = world.split(at=-10)
    world.run(move, State.READY)
    world.cut_over(move)
    report = world.check()
    mechanism.judge([] if report.ok else [str(report)])


PEOPLE: Final = """
    CREATE TABLE people (
        tenant_id bigint NOT NULL, id bigint NOT NULL, first_name text, last_name text, PRIMARY KEY (tenant_id, id)
    )
"""
TURNED_ROUND: Final = """
    ALTER TABLE people RENAME first_name TO between;
    ALTER TABLE people RENAME last_name TO first_name;
    ALTER TABLE people RENAME between TO last_name
"""


def every_column(_: Move, table: Table, interval: Interval) -> sql.Composed:
    return sql.SQL("COPY (SELECT * FROM {} WHERE {} ORDER BY {}) TO STDOUT").format(
        table.rows, table.within(interval), table.order
    )


def into_every_column(table: Table) -> sql.Composed:
    return sql.SQL("COPY {} FROM STDIN").format(table_sql(table))


def test_ghostferry_285_columns_in_another_order_are_mixed_up(mechanism: Mechanism, engine: MakeEngine) -> None:
    """`SELECT *` follows each server's own order of columns; read back the same way, it even looks right."""
    mechanism.replace(copy, "rows_of", every_column)
    mechanism.replace(copy, "copy_in", into_every_column)
    made = engine(
        schema=PEOPLE,
        tables={"people": "tenant_id"},
        rows="INSERT INTO people VALUES (150, 1, 'Ada', 'Lovelace'), (150, 2, 'Grace', 'Hopper')",
    )
    made.fetch("s2", TURNED_ROUND)
    copy_all(made)
    names = "SELECT concat_ws(' ', first_name, last_name) FROM people WHERE tenant_id = 150"
    mixed_up = rows(made.dsn["s2"], names) - rows(made.dsn["s1"], names)
    mechanism.judge([f"the target has {name}" for name in mixed_up])


def first_page(*arguments: Any) -> Iterator[Interval]:
    """As many rows as the limit says."""
    after, upto = next(walk(*arguments))
    yield after, upto


def test_vitess_14777_a_row_limit_cuts_the_comparison_short(mechanism: Mechanism, make_world: MakeWorld) -> None:
    """Rows beyond the limit were never compared, and the report said that all was well."""
    mechanism.replace(comparison, "walk", first_page)
    world = make_world(limits={**PATIENT, "batch_rows_max": 20})
    take_baseline(world)
    move = world.split()
    with at("mark_whole.after", lambda: slip_past_the_fence(world, move)), suppress(DifferencesFound):
        world.run(move, State.READY)
    if world.move(move).state is State.READY:
        world.cut_over(move)
    mechanism.judge(damage(world, one_owner=False))


def slip_past_the_fence(world: World, move: str) -> None:
    """The last row of a table of the target is changed behind every trigger."""
    with outside(world.dsns["s2"]) as operator:
        operator.execute("SET session_replication_role = replica")
        operator.execute("SELECT set_config('shardmove.mirror', %s, false)", (move,))
        changed = operator.execute(
            "UPDATE customers SET name = 'by nobody' WHERE (tenant_id, customer_id) ="
            " (SELECT tenant_id, customer_id FROM customers ORDER BY 1 DESC, 2 DESC LIMIT 1)"
        )
        assert changed.rowcount == 1


# --- resuming


def taken_at_once(giver: Connection, *arguments: Any) -> Any:
    """The entries are gone when they are read, in a transaction of their own."""
    return take_entries(outside(giver.info.dsn), *arguments)  # type: ignore[arg-type]


take_entries: Final = catch_up.take_entries


def test_gh_ost_1684_the_checkpoint_is_ahead_of_what_was_applied(mechanism: Mechanism, engine: MakeEngine) -> None:
    """The position moved on, the process died before the changes were applied, and the resumed one began behind."""
    mechanism.replace(catch_up, "take_entries", taken_at_once)
    made = engine(rows="INSERT INTO orders SELECT 150, i, 'note ' || i FROM generate_series(1, 10) i")
    copy_all(made)
    made.fetch("s1", "UPDATE orders SET note = 'changed' WHERE id = 7")
    with mirror(made) as dying, once("catch_up.receiver.before", die), pytest.raises(Died):
        dying.catch_up()
    carry_all(made)
    mechanism.judge(differences(made))


def all_but_the_last(move: Move, table: Table, interval: Interval) -> sql.Composed:
    """Another range than the batch was copied with: its end is left out."""
    whole, (_, upto) = delete_sql(move, table, interval), interval
    return whole if upto is None else whole + sql.SQL(" AND NOT {}").format(table.listed([upto]))


delete_sql: Final = erase.delete_sql


def test_spirit_eb6aff6a_what_is_deleted_is_not_what_was_copied(mechanism: Mechanism, world: World) -> None:
    """One row a range was neither deleted nor copied again: deleted on the source, it rose again on the target."""
    mechanism.replace(erase, "delete_sql", all_but_the_last)
    move = ready(world)
    world.roll_back(move)
    execute(world, "s1", "DELETE FROM order_items WHERE tenant_id >= 20")
    risen = rows(world.dsns["s2"], "SELECT t::text FROM order_items AS t WHERE tenant_id >= 20")
    mechanism.judge([f"the target still has {row}" for row in risen])


def test_citus_4955_a_killed_coordinator_confuses_the_move_for_good(
    mechanism: Mechanism, make_world: MakeWorld
) -> None:
    """Killed between closing and switching: both sides refuse writes, until the next command settles it."""
    mechanism.replace(hold, "settle_newest", lambda _: None)
    world = make_world(limits=ONE_ATTEMPT)
    move = ready(world)
    with at("close.after", raising(Killed())), pytest.raises(Killed):
        killed_with_its_watchdog(world, move)
    assert owners(world) == []
    with suppress(ShardmoveError):
        world.run(move, State.SWITCHED)
    mechanism.judge(the_range_is_taken_by(world, "s2"))


def killed_with_its_watchdog(world: World, move: str) -> None:
    """A process that dies takes its threads along, and settles nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutover._Crossing, "_watch", lambda _: None)
        patch.setattr(cutover._Crossing, "_settle", cancel_without_its_locks)
        world.cut_over(move)


# --- ends


def erasing(world: World, move: str) -> EraseBatch:
    """The cleaner's next piece, as its coordinator had it handed out: all order items of the range on s1."""
    with world.hold(move) as held:
        ordinal, table = next(pair for pair in enumerate(held.tables, 1) if pair[1].name.name == "order_items")
        number = world.move(move).lease_number
        return EraseBatch(held.move, ordinal, table, (None, None), number, "s1", world.dsns["s1"], 1000)


def test_citus_4909_a_late_cleaner_drops_what_just_moved_back(mechanism: Mechanism, world: World) -> None:
    """The shard had moved away and back; a cleaner that woke late dropped it for having moved away."""
    mechanism.replace(fence, "check_erasable", lambda *_: None)
    take_baseline(world)
    away = ready(world)
    world.cut_over(away)
    late = erasing(world, away)
    world.complete(away)
    back = planner.move(world.config, world.catalog, "shop", range_=MOVED, to="s1").move_ids[0]
    world.run(back, State.COMPLETED)
    with Connections() as connections, suppress(ShardmoveError):
        late.run(connections)
    mechanism.judge(damage(world))


def test_vitess_13998_deny_rules_are_left_after_a_cancel(mechanism: Mechanism, world: World) -> None:
    """Cancelled and forgotten, but the target went on refusing writes to a range that another move brings to it."""
    mechanism.replace(ending, "remove", lambda *_: None)
    move = ready(world)
    world.roll_back(move)
    with suppress(psycopg.errors.SerializationFailure):
        execute(world, "s2", "INSERT INTO tenants VALUES (999, 'of an application that lives there')")
    refused = [] if names_of(world, "s2", 999) else ["the target refuses writes to a range that no move is about"]
    mechanism.judge(refused + world.leftovers("s1", move) + world.leftovers("s2", move))


def test_citus_8236_a_stopped_move_leaves_rows_that_block_the_next_one(mechanism: Mechanism, world: World) -> None:
    """Stopped in the middle of the copy, it left its half-filled target behind, and no later move could begin."""
    mechanism.replace(ending, "_reverse_deletes", lambda _: None)
    move = world.split()
    with at("batch.after", raising(Failed("stopped")), nth=3), pytest.raises(Failed, match="stopped"):
        world.run(move, State.READY)
    world.roll_back(move)
    found: list[str] = []
    try:
        world.run(world.split(), State.READY)
    except Refused as error:
        found.append(str(error))
    mechanism.judge(found or between_shards(world))


# --- the table


def table_rows() -> list[list[str]]:
    text = (ROOT / "docs" / "known-bugs.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names_of_tests(pattern: str) -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob(pattern)]
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_the_table_names_tests_that_exist_and_all_of_these() -> None:
    named = {test for *_, cell in table_rows() for test in re.findall(r"`(test_\w+)`", cell)}
    assert named <= names_of_tests("test_*.py")
    by_thread = {
        name for name in names_of_tests("test_known_bugs.py") if not name.startswith(("test_the_table", "test_each"))
    }
    assert by_thread <= named


def test_each_row_of_the_table_names_a_thread() -> None:
    for thread, there, here, test in table_rows():
        assert re.fullmatch(r"[A-Za-z-]+ (#\d+|[0-9a-f]{8})(, (#\d+|[0-9a-f]{8}))*", thread), thread
        assert there, thread
        assert here, thread
        assert test, thread
