"""Servers that lose their last commits in the middle of a move: by a crash, or by a failover to a standby.

Two different things. An application that commits asynchronously may lose its last writes in a crash of its own server;
the move may not: what the server has lost is nowhere else either, and both sides go on agreeing, unnoticed by anybody.
A standby that takes over may lack anything, ours too: that is noticed by name, nothing opens or is erased, and the
documented commands mend it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from shardmove.catalog.store import Catalog
from shardmove.cli.exits import Exit
from shardmove.coordinator import verifying
from shardmove.coordinator.diagnose import diagnose
from shardmove.coordinator.run import run
from shardmove.domain import points
from shardmove.domain.errors import CutoverGaveUp, DifferencesFound, Failed, ServerChanged
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import CATALOG, Direction, State
from shardmove.postgres import identity
from shardmove.postgres.embedded import Cluster
from shardmove.protocol import catch_up
from tests.support.failover import PLACE, Stage, Standby, differences, execute, names_of, struck
from tests.support.servers import Databases
from tests.support.shell import Said, invoked
from tests.support.twins import Mechanism
from tests.support.twins_fence import damage, owners, take_baseline
from tests.support.world import BOUND_S, World
from workers import copy
from workers.executors import InlineExecutor

LIMITS: Final = {"max_stall_ms": 30_000, "keep_source_s": 0.1, "cutover_attempts": 2}
MOVED: Final = KeyRange(20, None)
TRIES: Final = 10

COPYING: Final = ("batch.before_compare", "batch.before", "batch.after", "make_durable.after", "copying.after_batch")
CATCH_UP: Final = (
    "catch_up.after_receiver_lock",
    "catch_up.after_giver_snapshot",
    "catch_up.before_compare",
    "catch_up.receiver.before",
    "catch_up.receiver.after",
    "catch_up.giver.before",
    "catch_up.giver.after",
)
CUTTING_OVER: Final = (
    "cutover.after_guards",
    "cutover.after_hold",
    "close.after_lock",
    "close.before",
    "close.after",
    "cutover.after_empty",
    "flip.before",
)
FLIPPED: Final = ("flip.after", "open.before", "open.after", "give_away.before", "give_away.after")

Shell: TypeAlias = Callable[..., Said]


@pytest.fixture
def world(losing: Cluster, tmp_path: Path) -> Iterator[World]:
    databases = Databases(losing)
    made = World(databases, tmp_path, limits=LIMITS)
    yield made
    made.catalog.close()
    databases.drop()


@pytest.fixture
def shell(world: World, threads_for_workers: None) -> Shell:
    path = world.write_config()
    return lambda *words: invoked(path, *words)


def go_on(world: World, move: str, goal: State) -> None:
    """The same command again, until it is there. A difference is nothing that it gets over."""
    for _ in range(TRIES):
        try:
            return world.run(move, goal)
        except (Failed, CutoverGaveUp) as error:
            print(f"{type(error).__name__}: {error}")
    raise AssertionError(f"move {move} does not come to {goal}")


# --- asynchronous commits


def strike(stage: Stage, world: World, move: str, goal: State, shard: str, point: str, nth: int = 1) -> None:
    """The server crashes where the move reaches the point, and the move goes on."""
    with struck(point, lambda: stage.crash(shard, point), nth=nth) as done:
        go_on(world, move, goal)
        assert done.is_set(), f"{point} was not reached {nth} times"


def strike_while_mirrored(stage: Stage, world: World, shard: str, point: str, nth: int) -> None:
    """The same while the move rests and an attendant mirrors."""
    with struck(point, lambda: stage.crash(shard, point), nth=nth) as done, world.attended():
        assert done.wait(BOUND_S), f"{point} was not reached {nth} times"
        stage.write_on()


def strike_until_something_is_lost(stage: Stage, world: World, shard: str, rng: random.Random) -> None:
    """A crash loses nothing where nobody wrote just before it."""
    for _ in range(TRIES):
        if stage.lost:
            return
        strike_while_mirrored(stage, world, shard, rng.choice(CATCH_UP), 1)


@pytest.mark.fault
def test_asynchronous_commits_that_a_server_lost_are_lost_on_both_sides(
    losing: Cluster, world: World, rng: random.Random
) -> None:
    """One crash of who gives rows in each phase, where the run's seed says."""
    stage = Stage(world, losing)
    with stage.writing():
        move = world.split()
        strike(stage, world, move, State.READY, "s1", rng.choice((*COPYING, *CATCH_UP)), rng.randint(1, 3))
        strike(stage, world, move, State.SWITCHED, "s1", rng.choice((*CUTTING_OVER, *FLIPPED)))
        strike_while_mirrored(stage, world, "s2", rng.choice(CATCH_UP), rng.randint(1, 4))
        strike_until_something_is_lost(stage, world, "s2", rng)
    ends_right(stage, world, move)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(8))
def test_crashes_in_every_state_lose_nothing_but_what_servers_lost(
    losing: Cluster, world: World, rng: random.Random, number: int
) -> None:
    """A whole move there, back and there again."""
    stage = Stage(world, losing)
    with stage.writing():
        move = world.split()
        strike(stage, world, move, State.COPYING, "s1", rng.choice(("install.after", "arm.after")), rng.randint(1, 2))
        at = rng.choice(CATCH_UP)
        with struck(at, lambda: stage.crash("s1", at), nth=rng.randint(1, 4)):
            strike(stage, world, move, State.READY, "s1", rng.choice(COPYING), rng.randint(1, 4))
        world.run(move, State.READY)
        strike_while_mirrored(stage, world, rng.choice(("s1", "s2")), rng.choice(CATCH_UP), rng.randint(1, 6))
        strike(stage, world, move, State.SWITCHED, "s1", rng.choice(CUTTING_OVER))
        for shard in ("s1", "s2"):
            strike_while_mirrored(stage, world, shard, rng.choice(CATCH_UP), rng.randint(1, 6))
        world.cut_over(move, Direction.BACK)
        strike(stage, world, move, State.SWITCHED, "s1", rng.choice(FLIPPED))
        strike_until_something_is_lost(stage, world, "s2", rng)
    ends_right(stage, world, move)


def ends_right(stage: Stage, world: World, move: str) -> None:
    """Of a switched move: no shard holds more than the giver kept, both sides are equal, and it completes."""
    print(*stage.crashes, sep="\n")
    assert stage.damage == []
    assert stage.lost > 0, "no crash lost anything: this was no trial"
    with world.mirror(move, Direction.BACK) as mirror:
        mirror.until_empty()
    assert differences(world) == []
    go_on(world, move, State.COMPLETED)
    report = world.check(absent_on={"s1": [MOVED]})
    assert report.ok, str(report)


def do_not_flush(mechanism: Mechanism) -> None:
    mechanism.replace(catch_up, "flush_log", lambda _: None)
    mechanism.replace(copy, "make_durable", lambda _: None)


@pytest.mark.fault
def test_a_catch_up_carries_nothing_that_its_giver_may_lose(
    mechanism: Mechanism, losing: Cluster, world: World
) -> None:
    do_not_flush(mechanism)
    stage = Stage(world, losing)
    with stage.writing():
        crash_in_a_pass(stage, world, world.split())
        for _ in range(0 if mechanism.on else TRIES):  # the pass may have carried nothing of what was lost
            if stage.damage:
                break
            world.roll_back(world.catalog.moves(unfinished_only=True)[0].id)
            crash_in_a_pass(stage, world, world.split())
    mechanism.judge(stage.damage)


def crash_in_a_pass(stage: Stage, world: World, move: str) -> None:
    """The giver crashes when the receiver has committed what was written just before the pass."""
    at = "catch_up.receiver.after"

    def write() -> None:
        stage.hold_up_the_log("s1")
        stage.write_on()

    with (
        struck("catch_up.after_receiver_lock", write, nth=2) as written,  # behind what the last pass flushed
        struck(at, lambda: stage.crash("s1", at), when=written.is_set) as done,
        suppress(Failed, DifferencesFound),
    ):
        world.run(move, State.READY)
    assert done.is_set()


@pytest.mark.slow
@pytest.mark.fault
def test_a_batch_holds_nothing_that_its_source_may_lose(mechanism: Mechanism, losing: Cluster, world: World) -> None:
    """A row of the last table is written asynchronously, copied, and forgotten by its own server."""
    do_not_flush(mechanism)
    Stage(world, losing)
    move = world.split()

    def crash_once_it_is_copied(_: str) -> None:
        if names_of(world, "s2", 25) == ["written asynchronously"]:
            points.disarm("batch.after")
            losing["s1"].restart("immediate")

    with (
        struck("copying.after_batch", lambda: rename(world, "s1", 25, "written asynchronously")),
        points.armed("batch.after", crash_once_it_is_copied),
        suppress(Failed, DifferencesFound),
    ):
        run_with_one_worker(world, move)
    assert names_of(world, "s2", 25) == ["written asynchronously"]
    mechanism.judge(differences(world, "tenant_id = 25"))


def run_with_one_worker(world: World, move: str) -> None:
    with world.hold(move, make_executor=lambda: InlineExecutor(1)) as held:
        run(held, State.READY)


# --- standbys that lack the last commits


def rename(world: World, shard: str, tenant: int, name: str) -> None:
    execute(world, shard, f"UPDATE tenants SET name = '{name}' WHERE tenant_id = {tenant}")


def ready(world: World) -> str:
    move = world.split()
    world.run(move, State.READY)
    return move


def carry(world: World, move: str, direction: Direction = Direction.FORWARD) -> None:
    with world.mirror(move, direction) as mirror:
        mirror.until_empty()


def blind(mechanism: Mechanism) -> None:
    """In the twin a server's history is always the same."""
    mechanism.replace(identity, "_IDENTITY", "SELECT system_identifier::text, 1 FROM pg_catalog.pg_control_system()")


def is_noticed(world: World, server: str, told: Said) -> None:
    """By name, by the verb and by `diagnose`; and the move is where it was."""
    assert told.code == Exit.FAILED, told
    assert f"{server} is another server than " in told.stderr
    if server.startswith("shard "):
        assert any(f"{server} is another server" in each.problem for each in diagnose(world.config, world.catalog))


def mended(shell: Shell, move: str, goal: str = "ready") -> None:
    """As documented: `run` compares and finds what differs, `verify --repair` mends it, `run` goes on."""
    told = shell("run", move, "--until", goal)
    assert told.code == Exit.DIFFERENCES, told
    assert "the two sides differ" in told.stderr
    assert shell("verify", move, "--repair").code == Exit.DONE
    assert shell("run", move, "--until", goal).code == Exit.DONE


@pytest.mark.slow
@pytest.mark.fault
def test_a_source_that_fails_over_while_rows_are_copied(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """What was copied and mirrored meanwhile is not on the source any more: the comparison before `ready` tells."""
    mechanism.replace(verifying, "require_equal", lambda *_: None)
    move = world.split()
    with Standby(losing["s1"], losing[PLACE]) as standby:

        def lose_the_tail() -> None:
            standby.fall_behind()
            rename(world, "s1", 25, "the standby never had it")

        with (
            struck("copying.after_batch", lose_the_tail),
            struck("mark_whole.before", standby.take_over) as taken,
            pytest.raises(Failed),
        ):
            run_with_one_worker(world, move)
        assert taken.is_set()
    rename(world, "s1", 26, "after the failover")
    assert any("shard s1 is another server" in each.problem for each in diagnose(world.config, world.catalog))
    if mechanism.on:
        mended(shell, move)
    else:
        assert shell("run", move).code == Exit.DONE
    assert shell("cutover", move).code == Exit.DONE
    mechanism.judge(differences(world))


@pytest.mark.fault
@pytest.mark.parametrize("shard", ["s1", pytest.param("s2", marks=pytest.mark.slow)])
def test_a_shard_that_fails_over_when_the_move_is_ready(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell, shard: str
) -> None:
    """The source may lack what the target has, or the other way round: no cutover before both were compared."""
    blind(mechanism)
    move = ready(world)
    with Standby(losing[shard], losing[PLACE]) as standby:
        standby.fall_behind()
        rename(world, "s1", 25, "the standby never had it")
        carry(world, move)
        standby.take_over()
    told = shell("cutover", move)
    if mechanism.on:
        is_noticed(world, f"shard {shard}", told)
        assert owners(world) == ["s1"]
        mended(shell, move)
        kept = {"s1": "Tenant 25", "s2": "the standby never had it"}[shard]
        assert names_of(world, "s1", 25) == names_of(world, "s2", 25) == [kept]
        assert shell("cutover", move).code == Exit.DONE
    mechanism.judge(differences(world))


@pytest.mark.fault
def test_a_row_that_the_source_has_lost_is_in_the_way_of_a_new_one(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """The target still has it, and a unique value with it that the source has given away anew: no row passes by."""
    mechanism.replace(verifying, "mark_stale", lambda _: 0)
    move = ready(world)
    with Standby(losing["s1"], losing[PLACE]) as standby:
        standby.fall_behind()
        add_customer(world, 1001)
        carry(world, move)
        standby.take_over()
    add_customer(world, 1002)
    told = shell("run", move)
    assert told.code == Exit.DIFFERENCES, told
    assert "the same value of customers_tenant_id_email_key" in told.stderr
    told = shell("verify", move, "--repair")
    mechanism.judge([] if told.code == Exit.DONE else [told.stderr])
    if mechanism.on:
        assert shell("run", move).code == shell("cutover", move).code == Exit.DONE
        assert differences(world) == []


def add_customer(world: World, number: int) -> None:
    execute(
        world,
        "s1",
        "INSERT INTO customers (tenant_id, customer_id, email, name) OVERRIDING SYSTEM VALUE"
        f" VALUES (25, {number}, 'x@t25.example', 'X')",
    )


@pytest.mark.slow
@pytest.mark.fault
def test_a_target_that_lost_batches_is_copied_again(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """A ready move whose target is half copied by its own records: what they lack is copied, not compared for ever."""
    mechanism.replace(verifying, "_copy_again", lambda _: None)
    move = world.split()
    with Standby(losing["s2"], losing[PLACE]) as standby:
        with struck("copying.after_batch", standby.fall_behind) as fallen:
            run_with_one_worker(world, move)
        assert fallen.is_set()
        recorded = world.fetch("s2", "SELECT count(*) FROM shardmove.batch")
        standby.take_over()
    assert world.fetch("s2", "SELECT count(*) FROM shardmove.batch") < recorded
    rename(world, "s1", 39, "not copied yet")
    told = shell("run", move)
    mechanism.judge([] if told.code == Exit.DONE else [told.stderr])
    if mechanism.on:
        assert differences(world) == []
        assert shell("rollback", move).code == Exit.DONE
        assert world.fetch("s2", "SELECT count(*) FROM orders") == [(0,)]


@pytest.mark.fault
def test_a_new_owner_that_fails_over_to_before_its_opening(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """Neither side is the owner by its own record; the former one has every row, and the repair must go its way."""
    move = ready(world)
    mechanism.replace(verifying, "flow_by_records", lambda _: Direction.BACK)
    with Standby(losing["s2"], losing[PLACE]) as standby:
        standby.fall_behind()
        rename(world, "s1", 25, "before the cutover")
        world.cut_over(move)
        rename(world, "s2", 26, "after it, and carried back")
        carry(world, move, Direction.BACK)
        standby.take_over()
    is_noticed(world, "shard s2", shell("complete", move))
    assert owners(world) == []
    mended(shell, move, "switched")
    assert owners(world) == ["s2"]
    assert differences(world) == []
    assert shell("complete", move).code == Exit.DONE
    lost = [name for name in ("before the cutover", "after it, and carried back") if name not in both_names(world)]
    mechanism.judge([f"an acknowledged write is on no shard any more: {name}" for name in lost])


def both_names(world: World) -> list[str]:
    return [name for shard in ("s1", "s2") for tenant in (25, 26) for name in names_of(world, shard, tenant)]


@pytest.mark.slow
@pytest.mark.fault
def test_a_new_owner_that_fails_over_and_is_open_is_not_erased_behind(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """What the new owner lost is on the old one still: nothing is erased there before a person has seen it."""
    blind(mechanism)
    move = ready(world)
    world.cut_over(move)
    with Standby(losing["s2"], losing[PLACE]) as standby:
        standby.fall_behind()
        rename(world, "s2", 25, "the standby never had it")
        carry(world, move, Direction.BACK)
        standby.take_over()
    rename(world, "s2", 26, "after the failover")
    told = shell("complete", move)
    mechanism.judge([] if names_of(world, "s1", 25) else ["an acknowledged write is on no shard any more"])
    if mechanism.on:
        is_noticed(world, "shard s2", told)
        mended(shell, move, "switched")
        assert differences(world) == []
        assert shell("complete", move).code == Exit.DONE
        assert names_of(world, "s2", 25) == ["Tenant 25"]  # its own owner has lost it, and was promoted by a person
        assert names_of(world, "s2", 26) == ["after the failover"]


@pytest.mark.fault
def test_a_former_owner_that_forgot_its_closing_is_closed_again(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """Until then two shards take writes, which only synchronous replication prevents."""
    mechanism.replace(verifying, "_close_again", lambda _: None)
    move = ready(world)
    with Standby(losing["s1"], losing[PLACE]) as standby:
        standby.fall_behind()
        world.cut_over(move)
        rename(world, "s2", 26, "on the new owner")
        standby.take_over()
    assert owners(world) == ["s1", "s2"]
    rename(world, "s1", 27, "by a stale client")
    told = shell("complete", move)
    assert told.code == Exit.FAILED, told
    told = shell("run", move, "--until", "switched")
    mechanism.judge([] if owners(world) == ["s2"] else [f"{owners(world)} take writes, and {told.stderr}"])
    if mechanism.on:
        assert told.code == Exit.DIFFERENCES  # the stale client's write: a person looks at it first
        mended(shell, move, "switched")
        assert differences(world) == []
        assert shell("complete", move).code == Exit.DONE


@pytest.mark.slow
@pytest.mark.fault
def test_a_source_older_than_the_move_is_named_and_given_up(losing: Cluster, world: World, shell: Shell) -> None:
    move = world.split()
    with Standby(losing["s1"], losing[PLACE]) as standby:
        standby.fall_behind()
        world.run(move, State.READY)
        standby.take_over()
    told = shell("run", move)
    assert told.code == Exit.FAILED, told
    assert "s1 has none of the move's objects" in told.stderr
    assert shell("rollback", move).code == Exit.DONE
    again = world.split()
    world.run(again, State.COMPLETED)
    assert owners(world) == ["s2"]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(4))
def test_failovers_in_every_state_under_writers(
    losing: Cluster, world: World, shell: Shell, rng: random.Random, number: int
) -> None:
    """Each shard fails over in each state of rest, its standby some writes behind; the move ends right all the same."""
    stage = Stage(world, losing)
    with stage.writing():
        move = world.split()
        with (
            Standby(losing["s1"], losing[PLACE]) as standby,
            struck("copying.after_batch", standby.fall_behind, nth=rng.randint(1, 3)) as fallen,
            struck(
                rng.choice(("mark_whole.before", "batch.before")),
                lambda: stage.fail_over("s1", standby),
                when=fallen.is_set,
            ),
            suppress(Failed),
        ):
            run_with_one_worker(world, move)
        put_right(shell, move, "ready")
        for shard in rng.sample(["s1", "s2"], 2):
            fail_over_at_rest(stage, world, losing, shard)
            assert shell("cutover", move).code == Exit.FAILED
            put_right(shell, move, "ready")
        assert shell("cutover", move).code == Exit.DONE
        for shard in rng.sample(["s1", "s2"], 2):
            fail_over_at_rest(stage, world, losing, shard)
            assert shell("revert", move).code == Exit.FAILED
            put_right(shell, move, "switched")
    ends_right(stage, world, move)


def fail_over_at_rest(stage: Stage, world: World, losing: Cluster, shard: str) -> None:
    with Standby(losing[shard], losing[PLACE]) as standby, world.attended():
        standby.fall_behind()
        stage.write_on(50)
        stage.fail_over(shard, standby)
        stage.write_on(20)


def put_right(shell: Shell, move: str, goal: str) -> None:
    """`run`, and where it finds differences `verify --repair` and `run`."""
    told = shell("run", move, "--until", goal)
    if told.code == Exit.DIFFERENCES:
        told = shell("verify", move, "--repair")
        assert told.code == Exit.DONE, told
        told = shell("run", move, "--until", goal)
    assert told.code == Exit.DONE, told


# --- a catalog that lacks the last commits


@pytest.mark.slow
@pytest.mark.fault
def test_a_catalog_that_forgot_nothing_of_weight_goes_on(losing: Cluster, world: World, shell: Shell) -> None:
    move = ready(world)
    with Standby(losing["cat"], losing[PLACE]) as standby:
        standby.fall_behind()
        standby.take_over()
    is_noticed(world, "the catalog", shell("cutover", move))
    assert shell("run", move, "--until", "completed").code == Exit.DONE


@pytest.mark.slow
@pytest.mark.fault
def test_a_catalog_that_forgot_a_flip_opens_nothing(
    mechanism: Mechanism, losing: Cluster, world: World, shell: Shell
) -> None:
    """It knows of the attempt and not of its end; and the new owner, who could tell, does not answer."""
    blind(mechanism)
    take_baseline(world)
    move = ready(world)
    with Standby(losing["cat"], losing[PLACE]) as standby:
        with struck("cutover.after_hold", standby.fall_behind):
            world.cut_over(move)
        losing["s2"].stop()
        standby.take_over()
        for _ in range(TRIES):  # its lease numbers are behind those that the shards have seen
            told = shell("cutover", move)
            if "another coordinator" not in told.stderr:
                break
        losing["s2"].start()
        both = owners(world)
        mechanism.judge([] if both == ["s2"] else [f"{both} take writes"])
        standby.bring_back()
    if mechanism.on:
        assert told.code == Exit.FAILED, told
        assert any(shell("run", move, "--until", "completed").code == Exit.DONE for _ in range(TRIES))
        reconnected(world)
        assert damage(world, absent_on="s1") == []


@pytest.mark.parametrize("verb", ["roll_back", "complete"])
def test_a_catalog_that_may_have_forgotten_ends_no_move(world: World, verb: str) -> None:
    """The state would be entered, and the shard's own record would then refuse all that follows from it."""
    goal = State.READY if verb == "roll_back" else State.SWITCHED
    move = world.split()
    world.run(move, goal)
    with world.hold(move) as held:
        another = replace(held.catalog.identity(), timeline=7)
        held.catalog.set_identities(move, {**held.move.identities, CATALOG: another}, held.lease.number)
    with pytest.raises(ServerChanged, match="the catalog is another server"):
        getattr(world, verb)(move)
    assert world.move(move).state is goal
    world.run(move, goal)  # looks at the shards' own records, compares, and takes the new one for its catalog
    getattr(world, verb)(move)
    assert world.move(move).state.is_final


def reconnected(world: World) -> Catalog:
    """The world's own catalog, whose connection may have been lost."""
    with suppress(Failed):
        world.catalog.routes()
    return world.catalog
