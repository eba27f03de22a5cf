"""The command line, as an operator types it: real servers, real commands, exit codes and JSON."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shardmove.cli.exits import EXITS, Exit, exit_code
from shardmove.cli.signals import stoppable
from shardmove.cli.words import listed, seconds
from shardmove.coordinator.hold import PAUSE_LOOK_S
from shardmove.domain import errors, points
from shardmove.domain.moves import State
from shardmove.protocol import objects
from tests.support.engine import until
from tests.support.shell import Shell, Start
from tests.support.world import BOUND_S, World

STEPS_OF_A_CUTOVER = ("open an attempt", "close the fence of s1", "the cutover", "open the fence of s2")


@pytest.fixture
def planned(shell: Shell) -> str:
    """The id of a move, planned and not begun."""
    assert shell("apply").code == Exit.DONE
    return str(shell("plan", "split", "shop", "--at", "20", "--to", "s2", "--json").document["moves"][0]["id"])


def table_of(world: World) -> Any:
    return world.catalog.routes()


# --- the whole way


def test_a_split_from_apply_to_complete(world: World, shell: Shell) -> None:
    assert {each["name"] for each in shell("apply", "--json").document["shards"]} == {"s1", "s2", "s3"}
    plan = shell("plan", "split", "shop", "--at", "20", "--to", "s2", "--json").document
    (planned,) = plan["moves"]
    assert (planned["ranges"], planned["source"], planned["target"]) == (["20:"], "s1", "s2")
    assert shell("preflight", plan["id"], "--json").document["passed"]

    (ready,) = shell("run", plan["id"], "--json").document["moves"]
    assert (ready["state"], ready["error"], ready["rows_failed"]) == ("ready", None, 0)
    assert ready["rows_copied"] > 500
    assert ready["rows_verified"] == ready["rows_copied"]

    move_id = planned["id"]
    assert shell("cutover", move_id).code == Exit.DONE
    assert world.owner(20) == "s2"
    verdict = shell("verify", move_id, "--json").document
    assert verdict["equal"]
    assert {each["table"] for each in verdict["tables"]} == {str(t) for t in world.config.keyspaces["shop"].tables}
    for each in verdict["tables"]:
        assert each["rows_source"] == each["rows_target"]
        assert each["digest_source"] == each["digest_target"]
        assert (each["missing"], each["extra"], each["different"]) == (0, 0, 0)

    assert shell("revert", move_id).code == Exit.DONE
    assert world.owner(20) == "s1"
    (switched,) = shell("cutover", move_id, "--json").document["moves"]
    assert (switched["state"], switched["phase"]) == ("switched", 5)
    assert switched["stall_ms"]["attempts"] >= 3
    assert 0 < switched["stall_ms"]["p50"] <= switched["stall_ms"]["max"]
    assert shell("complete", move_id).code == Exit.DONE
    assert world.fetch("s1", "SELECT count(*) FROM orders WHERE tenant_id >= 20") == [(0,)]
    assert [each["kind"] for each in shell("events", move_id, "--json").document["events"]].count(
        "attempt_flipped"
    ) == 3
    assert shell("diagnose", "--json").document == {"findings": []}


def test_a_run_goes_to_the_end_when_told_to(world: World, shell: Shell, planned: str) -> None:
    assert shell("run", planned, "--until", "completed").code == Exit.DONE
    assert world.move(planned).state is State.COMPLETED


def test_a_rollback_leaves_nothing(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned, "--until", "switched")
    assert shell("rollback", planned).code == Exit.DONE
    assert world.move(planned).state is State.ROLLED_BACK
    assert world.leftovers("s1", planned) == []
    assert world.fetch("s2", "SELECT count(*) FROM orders") == [(0,)]
    refused = shell("run", planned)
    assert (refused.code, refused.stdout) == (Exit.REFUSED, "")


def test_routes_and_shards_say_who_owns_what(shell: Shell, planned: str) -> None:
    shell("run", planned, "--until", "switched")
    routes = shell("routes", "--json").document
    assert [(each["range"], each["shard"]) for each in routes["ranges"]] == [(":20", "s1"), ("20:", "s2")]
    assert routes["epoch"] > 1
    (at,) = shell("routes", "--at", "20", "--json").document["ranges"]
    assert (at["shard"], at["move"]) == ("s2", planned)
    owned = {each["name"]: each["ranges"] for each in shell("shards", "--json").document["shards"]}
    assert owned == {
        "s1": [{"keyspace": "shop", "range": ":20"}],
        "s2": [{"keyspace": "shop", "range": "20:"}],
        "s3": [],
    }


def test_status_has_every_promised_figure(shell: Shell, planned: str) -> None:
    (move,) = shell("status", "--json").document["moves"]
    promised = (
        "id keyspace ranges source target state state_since phase paused throttled rows_estimate rows_copied"
        " rows_verified bytes_copied rows_failed batches_done journal_backlog mirror_lag_s unattended rate_rows_s eta_s"
        " stall_ms error"
    )
    assert set(promised.split()) <= set(move)
    assert set(move["stall_ms"]) == {"p50", "p99", "max", "attempts"}
    assert (move["id"], move["state"], move["phase"]) == (planned, "pending", 1)


def test_what_people_read_is_there_for_every_verb(shell: Shell, planned: str) -> None:
    shell("run", planned)
    for words, expected in (
        (["apply"], "nothing to change"),
        (["shards"], "20"),
        (["routes"], "epoch"),
        (["preflight", planned], "✓"),
        (["status"], "ready"),
        (["events"], "state_changed"),
        (["verify", planned], "equal"),
        (["diagnose"], "unattended"),
        (["cutover", planned, "--dry-run"], "nothing was changed"),
        (["grants", "--role", "mover"], "GRANT CREATE ON DATABASE"),
    ):
        said = shell(*words)
        assert said.code == Exit.DONE, said.stderr
        assert expected in said.stdout


# --- dry runs


def test_dry_runs_list_the_steps_and_change_nothing(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned)
    before = (table_of(world), world.move(planned).state, len(world.catalog.events()))
    steps = {
        verb: shell(verb, planned, "--dry-run", "--json").document["moves"][0]["steps"]
        for verb in ("cutover", "rollback")
    }
    for expected in STEPS_OF_A_CUTOVER:
        assert any(expected in step for step in steps["cutover"]), expected
    assert any("reverse deletes" in step for step in steps["rollback"])
    assert (table_of(world), world.move(planned).state, len(world.catalog.events())) == before
    assert shell("revert", planned, "--dry-run").code == Exit.REFUSED
    assert shell("complete", planned, "--dry-run").code == Exit.REFUSED
    assert shell("cutover", planned).code == Exit.DONE
    before = (table_of(world), world.move(planned).state, len(world.catalog.events()))
    assert shell("complete", planned, "--dry-run").code == Exit.DONE
    assert shell("revert", planned, "--dry-run").code == Exit.DONE
    assert shell("rollback", planned, "--dry-run").code == Exit.DONE
    assert (table_of(world), world.move(planned).state, len(world.catalog.events())) == before


# --- how commands end


def test_the_most_special_class_decides_the_exit_code() -> None:
    assert exit_code(errors.NotFound("")) == Exit.USAGE
    assert exit_code(errors.LeaseHeld("")) == Exit.REFUSED
    assert exit_code(errors.CutoverGaveUp("")) == Exit.REFUSED
    assert exit_code(errors.DifferencesFound("")) == Exit.DIFFERENCES
    assert exit_code(errors.Unreachable("")) == Exit.FAILED
    assert exit_code(KeyError()) == Exit.FAILED
    for position, (kind, _) in enumerate(EXITS):
        assert not any(issubclass(kind, earlier) for earlier, _ in EXITS[:position]), "never reached"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["status", "m99"], "m99"),
        (["plan", "split", "shopp", "--at", "20", "--to", "s2"], "shop"),
        (["plan", "split", "shop", "--at", "twenty", "--to", "s2"], "twenty"),
        (["plan", "split", "shop", "--at", "20", "--to", "s9"], "s9"),
        (["plan", "move", "shop", "--range", "20", "--to", "s2"], "L:U"),
        (["run"], "ID"),
        (["run", "m1", "--timeout", "soon"], "duration"),
        (["cutoverr", "m1"], "cutover"),
    ],
)
def test_wrong_words_end_with_2_and_name_them(shell: Shell, planned: str, words: list[str], named: str) -> None:
    said = shell(*words)
    assert (said.code, said.stdout) == (Exit.USAGE, "")
    assert named in said.stderr


def test_an_error_with_json_is_a_json_line_on_standard_error(shell: Shell, planned: str) -> None:
    said = shell("cutover", planned, "--json")
    assert said.stdout == ""
    line = json.loads(said.stderr.splitlines()[-1])
    assert line["exit"] == said.code == Exit.REFUSED
    assert "pending" in line["error"]
    assert "shardmove run" in line["hint"]


def test_differences_end_with_3_and_repair_mends_them(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned)
    spoil = "SET session_replication_role = replica; SET shardmove.mirror = '{}'; UPDATE orders SET note = 'spoilt'"
    with world.connect("s2") as connection:
        connection.execute(spoil.format(planned).encode())
    said = shell("verify", planned, "--json")
    assert said.code == Exit.DIFFERENCES
    orders = next(each for each in said.document["tables"] if each["table"] == "orders")
    assert orders["different"] == orders["rows_source"] == len(orders["keys"]["different"])
    assert orders["digest_source"] != orders["digest_target"]
    mended = shell("verify", planned, "--repair", "--json")
    assert (mended.code, mended.document["equal"]) == (Exit.DONE, True)
    assert mended.document["repaired"] == orders["different"]


def test_a_typo_in_the_configuration_ends_with_2_and_names_the_entry(world: World, shell: Shell) -> None:
    path = world.directory / "typo.toml"
    path.write_text(world.write_config().read_text() + "batch_byte = 1\n")
    said = shell("apply", config=path)
    assert said.code == Exit.USAGE
    assert "'batch_byte'" in said.stderr
    assert "did you mean batch_bytes?" in said.stderr


def test_a_wrong_password_is_never_shown(world: World, shell: Shell) -> None:
    path = world.directory / "secret.toml"
    text = world.write_config().read_text()
    path.write_text(text.replace(world.shards["s2"], f"{world.shards['s2']} user=nobody password=hunter2"))
    for words in (["apply"], ["apply", "--json"], ["apply", "--debug", "--log-level", "debug"], ["shards"]):
        said = shell(*words, config=path)
        assert "hunter2" not in said.stdout + said.stderr
    assert shell("apply", config=path).code == Exit.FAILED
    path.write_text(text.replace(world.shards["s2"], "hunter2 is no dsn"))
    said = shell("apply", "--debug", config=path)
    assert said.code == Exit.USAGE
    assert "hunter2" not in said.stdout + said.stderr


def test_a_shard_that_does_not_answer_ends_with_1_and_is_named(world: World, shell: Shell, planned: str) -> None:
    path = world.directory / "gone.toml"
    path.write_text(world.write_config().read_text().replace(world.shards["s2"], "host=127.0.0.1 port=1 dbname=gone"))
    for words in (["apply"], ["run", planned], ["preflight", planned]):
        said = shell(*words, config=path)
        assert said.code == Exit.FAILED
        assert "port 1" in said.stderr
        assert len(said.stderr.strip().splitlines()) < 12
    found = shell("diagnose", "--json", config=path).document["findings"]
    assert any(each["subject"] == "shard s2" for each in found)


def test_a_table_without_a_key_is_refused_by_name(world: World, shell: Shell, planned: str) -> None:
    for shard in ("s1", "s2"):
        with world.connect(shard) as connection:
            connection.execute("ALTER TABLE tenant_totals DROP CONSTRAINT tenant_totals_pkey")
    checklist = shell("preflight", planned, "--json")
    assert checklist.code == Exit.REFUSED
    failed = [each for move in checklist.document["moves"] for each in move["checks"] if not each["passed"]]
    assert "tenant_totals" in failed[0]["problem"]
    assert failed[0]["hint"]
    run = shell("run", planned)
    assert run.code == Exit.REFUSED
    assert "tenant_totals" in run.stderr
    assert world.move(planned).state is State.PENDING


# --- pause, interrupt, go on


@contextmanager
def copying_held_up(world: World) -> Iterator[None]:
    """Within the block no batch can be recorded on the target: a run gets as far as `copying`, and stays there."""
    with world.connect("s2") as locker:
        objects.install_schema(locker, world.catalog.cluster_id())
        locker.execute("BEGIN")
        locker.execute("LOCK TABLE shardmove.batch IN EXCLUSIVE MODE")
        yield
        locker.execute("ROLLBACK")


SEVERAL_LOOKS_S = 3 * PAUSE_LOOK_S


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    world: World, shell: Shell, start: Start, planned: str, number: signal.Signals
) -> None:
    with copying_held_up(world):
        running = start("run", planned, "--json")
        until(lambda: world.move(planned).state is State.COPYING)
        refused = shell("run", planned)
        assert refused.code == Exit.REFUSED
        assert f"process {running.process.pid}" in refused.stderr
        running.signal(number)
        running.read_until("stopping")
    said = running.end()
    assert (said.code, said.stdout) == (Exit.INTERRUPTED, "")
    assert f"shardmove run {planned}" in json.loads(said.stderr.splitlines()[-1])["hint"]
    assert world.move(planned).error is None
    assert shell("run", planned).code == Exit.DONE
    assert world.move(planned).state is State.READY


def test_a_second_interrupt_ends_the_process_and_the_same_command_goes_on(
    world: World, shell: Shell, start: Start, planned: str
) -> None:
    with copying_held_up(world):
        running = start("run", planned)
        until(lambda: world.move(planned).state is State.COPYING)
        running.signal(signal.SIGINT)
        running.read_until("stopping")
        running.signal(signal.SIGINT)
        assert running.process.wait(timeout=BOUND_S) == -signal.SIGINT
    until(lambda: not is_held(world, planned))
    assert shell("run", planned).code == Exit.DONE


def is_held(world: World, move_id: str) -> bool:
    """The server takes a moment to notice that a coordinator has died."""
    holder = world.catalog.holder(move_id)
    return holder is not None and holder.is_connected


def test_a_pause_stops_the_coordinator_until_it_is_resumed(
    world: World, shell: Shell, start: Start, planned: str
) -> None:
    with copying_held_up(world):
        running = start("run", planned)
        until(lambda: world.move(planned).state is State.COPYING)
        assert shell("pause", planned, "--json").document["moves"][0]["paused"]
        paused_at = time.monotonic()
        while time.monotonic() < paused_at + SEVERAL_LOOKS_S:
            running.read_until("progress")  # one line may be from before the pause
    said = running.end()
    assert said.code == Exit.INTERRUPTED
    assert f"shardmove resume {planned}" in said.stderr
    refused = shell("run", planned)
    assert refused.code == Exit.REFUSED
    assert "paused" in refused.stderr
    assert shell("resume", planned).code == Exit.DONE
    assert shell("run", planned).code == Exit.DONE


def test_a_paused_move_is_not_cut_over_and_can_be_rolled_back(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned)
    shell("pause", planned)
    assert shell("cutover", planned).code == Exit.REFUSED
    assert shell("rollback", planned).code == Exit.DONE
    assert world.move(planned).state is State.ROLLED_BACK
    assert "was rolled back" in shell("run", planned).stderr


def test_a_run_that_fails_is_rolled_back_where_that_was_wanted(world: World, shell: Shell, planned: str) -> None:
    def fail(_point: str) -> None:
        raise errors.Failed("the disk is full", hint="buy one")

    with points.armed("mark_whole.after", fail):
        said = shell("run", planned)
        assert (said.code, world.move(planned).error) == (Exit.FAILED, "the disk is full")
        said = shell("run", planned, "--on-error", "rollback")
    assert said.code == Exit.FAILED
    assert "the disk is full; it was rolled back" in said.stderr
    assert world.move(planned).state is State.ROLLED_BACK
    assert world.leftovers("s2", planned) == []


def test_a_move_that_ended_keeps_no_error(world: World, shell: Shell, planned: str) -> None:
    """The last transition was committed, and its answer was lost: who repeats the command has nothing to do."""

    def fail(_point: str) -> None:
        if world.move(planned).state is State.ROLLED_BACK:
            raise errors.Failed("the answer was lost")

    shell("run", planned)
    with points.armed("transition.after", fail):
        assert shell("rollback", planned).code == Exit.FAILED
    assert world.move(planned).error is None
    assert shell("rollback", planned).code == Exit.DONE


def test_a_timeout_sets_the_same_event_as_an_interrupt() -> None:
    with stoppable(timeout_s=0.01) as stop:
        assert stop.wait(BOUND_S)


def test_serve_attends_until_it_is_told_to_end(world: World, shell: Shell, start: Start, planned: str) -> None:
    shell("run", planned)
    assert shell("status", "--json").document["moves"][0]["unattended"]
    serving = start("serve")
    until(lambda: not shell("status", "--json").document["moves"][0]["unattended"])
    until(lambda: shell("diagnose", "--json").document == {"findings": []})
    serving.signal(signal.SIGTERM)
    assert serving.end().code == Exit.DONE


# --- what is wrong, and what is ours


def test_diagnose_names_what_is_inconsistent_and_the_command(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned)
    with world.connect("s1") as connection:
        connection.execute(f"ALTER TABLE orders DISABLE TRIGGER shardmove_{planned}_update".encode())
        connection.execute("UPDATE shardmove.fence SET is_open = false")
    with world.connect("s2") as connection:
        connection.execute("INSERT INTO shardmove.fence SELECT 'm77' AS move_id, f.keyspace, f.peer, f.standing,"
                           " f.is_open, f.is_whole, 0, 0, 1, 2 FROM shardmove.fence f")  # fmt: skip
    world.catalog.set_paused(planned, True)
    found = shell("diagnose", "--json").document["findings"]
    told = {(each["subject"], word) for each in found for word in each["problem"].split()}
    assert {(f"move {planned}", "paused"), ("shard s1", "orders:"), ("shard s1", "closed"), ("shard s2", "m77")} <= told
    assert all("shardmove" in each["mend"] for each in found)


def test_uninstall_lists_removes_and_leaves_nothing(world: World, shell: Shell, planned: str) -> None:
    shell("run", planned)
    refused = shell("uninstall", "--dry-run")
    assert refused.code == Exit.REFUSED
    assert planned in refused.stderr
    shell("run", planned, "--until", "completed")
    listed = shell("uninstall", "--dry-run", "--json").document
    assert listed["dry_run"]
    kinds = {(each["place"], each["kind"]) for each in listed["objects"]}
    assert {("s1", "schema"), ("s2", "schema"), ("catalog", "schema"), ("s1", "trigger")} <= kinds
    assert ("s3", "schema") not in kinds
    assert ours(world) == {"s1": 2, "s2": 1, "s3": 0, "cat": 1}
    removed = shell("uninstall", "--json").document
    assert removed["objects"] == listed["objects"]
    assert ours(world) == {"s1": 0, "s2": 0, "s3": 0, "cat": 0}
    assert shell("uninstall").code == Exit.USAGE


def ours(world: World) -> dict[str, int]:
    """Per database: 1 for a schema of ours, and 1 for any trigger of ours."""
    query = (
        "SELECT (SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'shardmove%')"
        " + EXISTS (SELECT FROM pg_trigger WHERE tgname LIKE 'shardmove%')::int"
    )
    return {name: world.fetch(name, query)[0][0] for name in world.dsns}


def test_words_are_read_or_refused() -> None:
    assert [seconds(text) for text in ("90s", "30m", "2h", "5", "250ms")] == [90, 1800, 7200, 5, 0.25]
    assert listed("1, 2") == ["1", "2"]
