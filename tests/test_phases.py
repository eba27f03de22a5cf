"""Traffic phases and cutovers with routers about: who is waited for, what keeps a move in its phase, and what for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import pytest

from shardmove.catalog.routers import Routers
from shardmove.cli.exits import Exit
from shardmove.coordinator import phases
from shardmove.coordinator.cutover import Report, cut_over
from shardmove.coordinator.hold import Hold
from shardmove.coordinator.phases import SAMPLE_RATE, change_phase
from shardmove.coordinator.progress import Progress
from shardmove.domain import points
from shardmove.domain.errors import ConfigurationError, CutoverGaveUp, Failed, Refused
from shardmove.domain.moves import Direction, State
from shardmove.domain.points import Effect
from tests.support.followers import Follower, following, register, until
from tests.support.servers import Databases
from tests.support.shell import Shell, invoked
from tests.support.twins import Mechanism, mechanism
from tests.support.world import World, in_background

__all__ = ["mechanism"]
NO_GATES: Final = {"phase_min_s": 0.000_001, "phase_compared_min": 1, "phase_lag_ms": 60_000.0}
PATIENT: Final = {"router_grace_ms": 60_000.0, "max_stall_ms": 30_000}
MakeWorld = Callable[..., World]


@contextmanager
def ready(make_world: MakeWorld, **limits: Any) -> Iterator[tuple[World, str]]:
    world = make_world(limits={**NO_GATES, **limits})
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    yield world, move_id
    world.catalog.close()


def set_phase(world: World, move_id: str, phase: int, **options: Any) -> None:
    with world.hold(move_id) as held:
        change_phase(held, phase, **options)


def compared(world: World, move_id: str, count: int = 100, **more: int) -> None:
    world.catalog.report_traffic(move_id, world.catalog.traffic(move_id).number, compared=count, **more)


def detail(world: World, move_id: str, kind: str) -> dict[str, Any]:
    return [event.detail for event in world.catalog.events(move_id) if event.kind == kind][-1]


def cut_over_telling(world: World, move_id: str) -> tuple[Report, list[str]]:
    told: list[str] = []
    with world.hold(move_id, progress=Progress(on_step=told.append)) as held:
        return cut_over(held, Direction.FORWARD), told


# --- the cutover


def test_a_cutover_closes_the_fence_after_every_router_has_acknowledged_the_hold(make_world: MakeWorld) -> None:
    with ready(make_world, **PATIENT) as (world, move_id), following(world.config, acknowledges=False) as follower:
        follower.epochs.acknowledge(world.catalog.routes().epoch)
        closed = []
        with points.armed(Effect.CLOSE.before, closed.append):
            join = in_background(lambda: world.cut_over(move_id))
            view = follower.await_view(lambda v: v.routes["shop"].at(20).held)
            assert [each.name for each in world.catalog.late_routers(view.epoch)] == ["r1"]
            assert closed == []
            follower.epochs.acknowledge(view.epoch)
            join()
            assert closed == [Effect.CLOSE.before]
        after = follower.await_view(lambda v: not v.routes["shop"].at(20).held)
        assert after.routes["shop"].at(20).shard == "s2"


def test_twin_without_the_wait_the_fence_is_closed_before_the_routers_hold(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmove.coordinator.cutover._Crossing._await_routers", lambda self: None)
    with ready(make_world, **PATIENT) as (world, move_id), following(world.config, acknowledges=False):
        world.cut_over(move_id)
        assert world.catalog.late_routers(world.catalog.routes().epoch) != []


def test_a_late_router_is_not_waited_for_for_long_and_the_cutover_goes_on(make_world: MakeWorld) -> None:
    limits = {**PATIENT, "router_grace_ms": 1.0}
    with ready(make_world, **limits) as (world, move_id), following(world.config, acknowledges=False):
        report, told = cut_over_telling(world, move_id)
        assert report.attempts == 1
        assert any("not waited for any longer: r1 (process" in step for step in told)
        assert world.move(move_id).state is State.SWITCHED


def test_a_late_router_makes_the_attempt_give_up_where_it_is_to(make_world: MakeWorld) -> None:
    limits = {**PATIENT, "router_grace_ms": 1.0, "late_routers": "give_up", "cutover_attempts": 2}
    with ready(make_world, **limits) as (world, move_id):
        with following(world.config, acknowledges=False):
            with pytest.raises(CutoverGaveUp, match="routers have not acknowledged the hold in 1 ms: r1"):
                world.cut_over(move_id)
            assert world.move(move_id).state is State.READY
            assert not world.catalog.routes()["shop"].at(20).held
            with world.connect("s1") as application:
                application.execute("UPDATE tenants SET name = name WHERE tenant_id = 20")
        world.cut_over(move_id)  # the router took its leave
        assert world.move(move_id).state is State.SWITCHED


@pytest.mark.parametrize("silent_s", [None, 4.0], ids=["no router", "a dead router"])
def test_nobody_else_is_waited_for(make_world: MakeWorld, silent_s: float | None) -> None:
    limits = {**PATIENT, "router_grace_ms": 600_000.0, "late_routers": "give_up"}
    with ready(make_world, **limits) as (world, move_id):
        if silent_s is not None:
            register(world, "r1", silent_s=silent_s)
        report, told = cut_over_telling(world, move_id)
        assert (report.attempts, report.gave_up) == (1, [])
        assert not any("not waited for" in step for step in told)


def test_a_late_routers_setting_is_checked(databases: Databases, world: World) -> None:
    with pytest.raises(ConfigurationError, match="late_routers 'wait'") as caught:
        world._configure({"late_routers": "wait"})
    assert caught.value.hint == "known are: go_on, give_up"


# --- the phases in order


def test_through_all_phases_and_back(make_world: MakeWorld, threads_for_workers: None) -> None:
    with ready(make_world) as (world, move_id), following(world.config) as follower:
        config = world.write_config()

        def phase(*words: str) -> dict[str, Any]:
            said = invoked(config, "phase", move_id, *words, "--json")
            assert said.code == Exit.DONE, said.stderr
            move: dict[str, Any] = said.document["moves"][0]
            return move

        assert phase("2")["phase"] == 2
        shown = phase("3", "--sample", "0.5")
        assert (shown["phase"], shown["sample_rate"]) == (3, 0.5)
        assert follower.await_phase(move_id, 3).moves[move_id].sample_rate == 0.5
        compared(world, move_id, 1)
        shown = phase("4", "--share", "25")
        assert (shown["phase"], shown["read_share"]) == (4, 0.25)
        facts = [follower.await_phase(move_id, 4).moves[move_id] for _ in range(2)]
        assert [fact.read_share for fact in facts] == [0.0, 0.25]
        assert phase("4", "--share", "100")["read_share"] == 1.0
        assert (phase("5")["phase"], world.owner(20)) == (5, "s2")
        shown = phase("4", "--share", "50")
        assert (shown["phase"], shown["state"], shown["read_share"]) == (4, "ready", 0.5)
        assert world.owner(20) == "s1"
        assert phase("3")["phase"] == 3
        assert phase("2")["phase"] == 2
        assert phase("5")["state"] == "switched"
        assert phase("2")["state"] == "ready"
        assert invoked(config, "phase", move_id, "1").code == Exit.REFUSED
        told = invoked(config, "phase", move_id, "3").stdout
        assert f"move {move_id} is ready, in phase 3: 10% of the reads compared" in told
        status = invoked(config, "status", "--json").document
        (router,) = status["routers"]
        assert (router["name"], router["epoch"], router["is_live"]) == ("r1", status["epoch"], True)
        assert "routers: r1" in invoked(config, "status").stdout


def test_a_move_that_is_not_ready_has_the_phase_of_its_state(make_world: MakeWorld, shell: Shell) -> None:
    with ready(make_world) as (world, _):
        other = world.catalog.moves()[0]
        assert world.catalog.traffic(other.id).phase == 2
    said = shell("plan", "split", "shop", "--at", "20", "--to", "s2", "--json")
    move_id = said.document["moves"][0]["id"]
    assert shell("phase", move_id, "1").code == Exit.DONE
    refused = shell("phase", move_id, "3")
    assert refused.code == Exit.REFUSED
    assert "to enter phase 3 it has to be ready" in refused.stderr
    assert shell("phase", move_id, "3", "--share", "10").code == Exit.USAGE
    assert shell("phase", move_id, "4", "--share", "110").code == Exit.USAGE
    assert shell("phase", move_id, "6").code == Exit.USAGE


# --- gates


def test_each_gate_holds_the_phase_until_it_is_met(make_world: MakeWorld) -> None:
    with ready(make_world, phase_min_s=3600.0, phase_compared_min=10) as (world, move_id):
        set_phase(world, move_id, 3)
        with pytest.raises(Refused, match=r"it has been there for \d+ s of at least 3600 s") as caught:
            set_phase(world, move_id, 4)
        assert "0 of at least 10 reads were compared" in caught.value.message
        assert caught.value.hint == f"wait for it, or `shardmove phase {move_id} 4 --force`"
        assert world.catalog.traffic(move_id).phase == 3
        set_phase(world, move_id, 2)  # back is always allowed


@pytest.mark.parametrize(
    ("counted", "complaint"),
    [
        ({"count": 99}, "99 of at least 100 reads"),
        ({"count": 1000, "differing": 1}, "1 of 1000 compared reads differed"),
        ({"count": 1000, "passes": 90, "failures": 10}, "10 of 100 catch-ups of routers failed"),
        ({"count": 1000, "failures": 1}, "1 of 1 catch-ups of routers failed"),
    ],
)
def test_what_routers_counted_keeps_a_move_from_going_on(
    make_world: MakeWorld, counted: dict[str, int], complaint: str
) -> None:
    with ready(make_world, phase_compared_min=100) as (world, move_id):
        set_phase(world, move_id, 3)
        compared(world, move_id, **counted)
        with pytest.raises(Refused, match=complaint):
            set_phase(world, move_id, 4)
        if "differing" in counted or "failures" in counted:
            with pytest.raises(Refused, match=complaint):
                set_phase(world, move_id, 5)
        set_phase(world, move_id, 2)
        set_phase(world, move_id, 3)
        compared(world, move_id, 100)  # the phase before does not count any more
        set_phase(world, move_id, 4)
        assert world.catalog.traffic(move_id).phase == 4


def test_a_mirror_that_lags_keeps_reads_off_the_target(make_world: MakeWorld) -> None:
    with ready(make_world, phase_lag_ms=0.000_001) as (world, move_id):
        for phase in (3, 4):
            with pytest.raises(Refused, match="the mirror lags"):
                set_phase(world, move_id, phase)


def test_an_operator_may_force_it_and_that_is_recorded(make_world: MakeWorld) -> None:
    with ready(make_world, phase_min_s=3600.0, phase_compared_min=10) as (world, move_id):
        set_phase(world, move_id, 4, force=True)
        forced = [event.detail["forced"] for event in world.catalog.events(move_id) if "forced" in event.detail]
        assert forced[0] == ["0 of at least 10 reads were compared in phase 3"]
        set_phase(world, move_id, 5, force=True)
        assert detail(world, move_id, "phase_forced")["phase"] == 5
        assert world.owner(20) == "s2"


def test_a_cutover_by_name_asks_no_gate(make_world: MakeWorld) -> None:
    with ready(make_world, phase_min_s=3600.0) as (world, move_id):
        set_phase(world, move_id, 3)
        world.cut_over(move_id)
        assert world.move(move_id).state is State.SWITCHED


# --- who is read


def begin_reading(world: World, move_id: str, damage: list[str], judge: Callable[[], list[str]]) -> None:
    """Goes to phase 4; what the judge finds at the moment where the first session may read from the target."""

    def look(_: str) -> None:
        if world.catalog.traffic(move_id).read_share > 0:
            damage.extend(judge())

    with points.armed(Effect.SET_PHASE.after, look):
        set_phase(world, move_id, 4)


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody waits for an acknowledgement: a router that is as slow as it may be answers then."""
    asked = threading.Event()
    wait = Routers._wait_for_acknowledgement

    def waits(self: Routers, timeout_s: float) -> None:
        asked.set()
        wait(self, timeout_s)

    monkeypatch.setattr(Routers, "_wait_for_acknowledgement", waits)
    return asked


def test_reads_move_after_every_router_mirrors_before_it_acknowledges(
    make_world: MakeWorld, mechanism: Mechanism, waited_for: threading.Event
) -> None:
    mechanism.replace(Hold, "await_routers", lambda *_: None)
    damage: list[str] = []
    with ready(make_world) as (world, move_id), following(world.config, acknowledges=False) as follower:
        first = world.catalog.routes().epoch + 2  # phase 3, then this one
        enter_dual_read(world, move_id, follower)

        def answer() -> None:
            view = follower.await_phase(move_id, 4)
            waited_for.wait()
            follower.epochs.acknowledge(view.epoch)
            follower.epochs.acknowledge(follower.await_phase(move_id, 4, 1.0).epoch)

        join = in_background(answer)
        begin_reading(world, move_id, damage, lambda: [str(each) for each in world.catalog.late_routers(first)])
        waited_for.set()
        join()
        mechanism.judge(damage)


def enter_dual_read(world: World, move_id: str, follower: Follower) -> None:
    """Phase 3, with enough reads compared."""
    with world.hold(move_id) as held:
        epoch = world.catalog.set_phase(move_id, 2, 3, lease_number=held.lease.number)
    follower.epochs.acknowledge(epoch)
    until(lambda: world.catalog.late_routers(epoch) == [], "acknowledged")
    compared(world, move_id)


def test_what_was_acknowledged_unmirrored_is_carried_before_anybody_reads(
    make_world: MakeWorld, mechanism: Mechanism
) -> None:
    mechanism.replace(phases, "carry_all", lambda hold: None)
    damage: list[str] = []
    with ready(make_world) as (world, move_id):
        set_phase(world, move_id, 3)
        compared(world, move_id)

        def write(_: str) -> None:
            with world.connect("s1") as application:
                application.execute("UPDATE tenants SET name = 'late' WHERE tenant_id = 20")

        def stale() -> list[str]:
            rows = world.fetch("s2", "SELECT name FROM tenants WHERE tenant_id = 20")
            return [] if rows == [("late",)] else [f"a session reads {rows} after the write was acknowledged"]

        with points.armed("phase.before_readers", write):
            begin_reading(world, move_id, damage, stale)
        mechanism.judge(damage)


def test_a_router_that_does_not_follow_keeps_reads_off_the_target(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmove.coordinator.hold.ROUTERS_PATIENCE_S", 0.05)
    with ready(make_world) as (world, move_id):
        set_phase(world, move_id, 3, sample=0.5)
        compared(world, move_id)
        register(world, "stuck", acknowledged=world.catalog.routes().epoch, confirm_s=3600)
        with pytest.raises(Refused, match=r"waits for routers that have not acknowledged epoch \d+: stuck"):
            set_phase(world, move_id, 4)
        traffic = world.catalog.traffic(move_id)
        assert (traffic.phase, traffic.read_share, traffic.sample_rate) == (3, 0.0, 0.5)
        world.catalog.forget_router("stuck")
        register(world, "dead", silent_s=4)
        compared(world, move_id)
        set_phase(world, move_id, 4)
        assert world.catalog.traffic(move_id).read_share == 1.0


def test_no_row_is_copied_before_the_routers_know_of_the_move(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmove.coordinator.hold.ROUTERS_PATIENCE_S", 0.05)
    move_id = world.split(at=20)
    register(world, "stuck", confirm_s=3600)
    with pytest.raises(Refused, match=r"copying rows to s2 waits for routers .*: stuck"):
        world.run(move_id, State.READY)
    assert world.fetch("s2", "SELECT count(*) FROM tenants") == [(0,)]
    world.catalog.forget_router("stuck")
    world.run(move_id, State.READY)
    assert world.fetch("s2", "SELECT count(*) FROM tenants") == [(20,)]


def test_a_phase_that_died_between_its_steps_is_gone_on_with(make_world: MakeWorld) -> None:
    with ready(make_world) as (world, move_id):
        set_phase(world, move_id, 3)
        compared(world, move_id)

        def die(_: str) -> None:
            raise KeyboardInterrupt

        with points.armed("phase.before_readers", die), pytest.raises(KeyboardInterrupt):
            set_phase(world, move_id, 4)
        assert (world.catalog.traffic(move_id).phase, world.catalog.traffic(move_id).read_share) == (4, 0.0)
        with world.connect("s1") as application:
            application.execute("UPDATE tenants SET name = 'late' WHERE tenant_id = 20")
        set_phase(world, move_id, 4, share=0.5)
        assert world.catalog.traffic(move_id).read_share == 0.5
        assert world.fetch("s2", "SELECT name FROM tenants WHERE tenant_id = 20") == [("late",)]


def test_a_fall_back_while_an_operator_begins_to_read_keeps_reads_off_the_target(make_world: MakeWorld) -> None:
    with ready(make_world) as (world, move_id):
        set_phase(world, move_id, 3)
        compared(world, move_id)

        def fall_back(_: str) -> None:
            number = world.catalog.traffic(move_id).number
            assert world.catalog.fall_back(move_id, number, "r1", "it does not answer")

        with (
            points.armed("phase.before_readers", fall_back),
            pytest.raises(Refused, match="is in phase 3, not 4: somebody changed it"),
        ):
            set_phase(world, move_id, 4, force=True)
        traffic = world.catalog.traffic(move_id)
        assert (traffic.phase, traffic.read_share) == (3, 0.0)
        set_phase(world, move_id, 4, force=True)
        assert world.catalog.traffic(move_id).phase == 4
        number = world.catalog.traffic(move_id).number
        assert world.catalog.fall_back(move_id, number, "r1", "it does not answer")
        traffic = world.catalog.traffic(move_id)
        assert (traffic.phase, traffic.sample_rate) == (3, SAMPLE_RATE)  # it goes on comparing
        assert detail(world, move_id, "phase_fell_back")["reason"] == "it does not answer"


@pytest.mark.parametrize("ends", ["rollback", "complete"])
def test_nothing_is_erased_where_a_router_may_still_read(
    make_world: MakeWorld, mechanism: Mechanism, waited_for: threading.Event, ends: str
) -> None:
    mechanism.replace(Hold, "await_routers", lambda *_: None)
    mechanism.replace(Hold, "await_silent_routers", lambda *_: None)
    damage: list[str] = []
    with ready(make_world, router_grace_ms=1.0) as (world, move_id):
        if ends == "rollback":
            set_phase(world, move_id, 4, force=True)
        with following(world.config, acknowledges=False) as follower:
            follower.epochs.acknowledge(world.catalog.routes().epoch)
            if ends == "complete":
                world.cut_over(move_id)
                waited_for.clear()
            changed = world.catalog.routes().epoch + (1 if ends == "rollback" else 0)

            def look(_: str) -> None:
                damage.extend(str(each) for each in world.catalog.late_routers(changed))

            finish = world.roll_back if ends == "rollback" else world.complete
            with points.armed(Effect.ERASE.before, look):

                def answer() -> None:
                    waited_for.wait()
                    follower.acknowledges = True
                    follower.epochs.acknowledge(follower.await_view(lambda v: v.epoch >= changed).epoch)

                join = in_background(answer)
                finish(move_id)
                waited_for.set()
                join()
        mechanism.judge(damage)


# --- what is told


def test_diagnose_names_routers_that_are_silent_or_stuck(make_world: MakeWorld, threads_for_workers: None) -> None:
    with ready(make_world) as (world, move_id):
        config = world.write_config()
        register(world, "fine", confirm_s=3600)
        register(world, "dead", silent_s=60)
        register(world, "stuck", acknowledged=world.catalog.routes().epoch, confirm_s=0.2)
        set_phase(world, move_id, 2)
        with world.hold(move_id) as held:
            world.catalog.set_phase(move_id, 2, 3, lease_number=held.lease.number)
        deadline = time.monotonic() + 120
        while True:
            world.catalog.beat_router("stuck", "stuck", "elsewhere", 1, 4.0, 0)  # alive while it is looked at
            found = invoked(config, "diagnose", "--json").document["findings"]
            told = {each["subject"].split()[1]: each["problem"] for each in found if "router" in each["subject"]}
            if "stuck" in told and "still acts by epoch" in told["stuck"]:
                break
            assert time.monotonic() < deadline, found
        assert set(told) == {"dead", "stuck"}
        assert "has been silent for" in told["dead"]
        with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
            connection.execute("UPDATE shardmove_catalog.router SET beat_at = beat_at - interval '1 hour'")
        assert invoked(config, "status", "--json").document["routers"] == []


def test_a_failed_wait_does_not_leave_a_phase_behind(make_world: MakeWorld) -> None:
    with ready(make_world) as (world, move_id):
        set_phase(world, move_id, 3)
        compared(world, move_id)

        def fail(_: str) -> None:
            raise Failed("the target does not answer")

        with points.armed("catch_up.after_receiver_lock", fail), pytest.raises((Failed, Refused)):
            set_phase(world, move_id, 4, force=True)
        assert world.catalog.traffic(move_id).read_share == 0
