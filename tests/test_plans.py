"""Plans: what each kind is made of, what it is estimated to take, and verbs over plans of several moves."""

from __future__ import annotations

import io
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardmove.catalog.store import Catalog
from shardmove.cli import render
from shardmove.cli.display import Screen
from shardmove.cli.exits import Exit, exit_code
from shardmove.cli.words import listed
from shardmove.coordinator.estimating import DEFAULT_RATE_ROWS_S
from shardmove.coordinator.operating import worst
from shardmove.coordinator.status import status
from shardmove.domain import errors, points
from shardmove.domain.hashing import HASHES
from shardmove.domain.keys import KeyRange
from shardmove.protocol import objects
from tests.support.engine import until
from tests.support.servers import Databases, connect
from tests.support.shell import Said, Shell, Start, invoked
from tests.support.world import World

ROWS = 10_000
KEYS = 200

ZOO = f"""
    CREATE TABLE numbers (n bigint NOT NULL, id bigint PRIMARY KEY, note text);
    CREATE TABLE long_notes (n bigint NOT NULL, id bigint, note text STORAGE EXTERNAL, PRIMARY KEY (n, id))
        PARTITION BY RANGE (n);
    CREATE TABLE long_notes_low PARTITION OF long_notes FOR VALUES FROM (MINVALUE) TO (1500);
    CREATE TABLE long_notes_high PARTITION OF long_notes FOR VALUES FROM (1500) TO (MAXVALUE);
    CREATE TABLE words (w text NOT NULL PRIMARY KEY, note text);
    CREATE TABLE times (at timestamptz NOT NULL PRIMARY KEY);
    CREATE TABLE hashed (w text NOT NULL, id bigint PRIMARY KEY);
    INSERT INTO numbers SELECT 1000 + i % {KEYS}, i, 'a note' FROM generate_series(1, {ROWS}) i;
    INSERT INTO long_notes SELECT n, n, repeat('a long note ', 1000) FROM generate_series(1400, 1599) n;
    INSERT INTO hashed SELECT 'customer ' || i % {KEYS}, i FROM generate_series(1, {ROWS}) i;
    ANALYZE;
"""

CONFIG = """
[catalog]
dsn = "{cat}"
[shards]
s1 = {{ dsn = "{s1}" }}
s2 = {{ dsn = "{s2}" }}
s3 = {{ dsn = "{s3}" }}
[keyspaces.numbers]
tables = {{ numbers = "n", long_notes = "n" }}
routes = [
    {{ range = ":0", shard = "s1" }}, {{ range = "0:1000", shard = "s2" }}, {{ range = "1000:", shard = "s1" }}
]
[keyspaces.words]
key_type = "text"
tables = {{ words = "w" }}
routes = [{{ range = ":", shard = "s1" }}]
[keyspaces.times]
key_type = "timestamptz"
tables = {{ times = "at" }}
routes = [{{ range = ":", shard = "s1" }}]
[keyspaces.hashed]
key_type = "text"
scheme = "hash"
tables = {{ hashed = "w" }}
routes = [{{ range = ":", shard = "s1" }}]
"""


# --- what a plan is made of


class Zoo:
    """Keyspaces of several key types, one of them by hash; s1 owns nearly all of them."""

    def __init__(self, dsns: dict[str, str], directory: Path) -> None:
        self.dsns = dsns
        self.path = directory / "zoo.toml"
        self.path.write_text(CONFIG.format(**dsns), encoding="utf-8")
        for shard in ("s1", "s2", "s3"):
            with connect(dsns[shard], application_name="test") as connection:
                connection.execute("SET search_path = public")
                connection.execute(ZOO.encode() if shard == "s1" else re.sub("INSERT.*;", "", ZOO).encode())

    def __call__(self, *words: str) -> Said:
        return invoked(self.path, *words)

    def plan(self, *words: str) -> Any:
        said = self("plan", *words, "--json")
        assert said.code == Exit.DONE, said.stderr
        return said.document

    def moves(self, *words: str) -> list[tuple[str, list[str], str, str]]:
        """Keyspace, ranges, source and target of each move planned."""
        moves = self.plan(*words)["moves"]
        return [(each["keyspace"], each["ranges"], each["source"], each["target"]) for each in moves]


@pytest.fixture
def zoo(databases: Databases, tmp_path: Path) -> Zoo:
    made = Zoo(databases("cat", "s1", "s2", "s3"), tmp_path)
    assert made("apply").code == Exit.DONE
    return made


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["words", "--at", '"a,b","c:d"', "--to", "s2,s3"], [('a,b:"c:d"', "s2"), ('"c:d":', "s3")]),
        (["words", "--at", '"say ""hi"""', "--to", "s2"], [('"say ""hi""":', "s2")]),
        (["words", "--at", "k", "--to", "s2", "--range", '"a:b":"x""y"'], [('k:"x""y"', "s2")]),
        (
            ["times", "--at", "2026-01-01 00:00:00+00:00,2026-01-01 02:00:00+01:00", "--to", "s2,s3"],
            [
                ('"2026-01-01 00:00:00+00:00":"2026-01-01 01:00:00+00:00"', "s2"),
                ('"2026-01-01 01:00:00+00:00":', "s3"),
            ],
        ),
        (["numbers", "--at", "-5", "--to", "s2", "--range", "-9:0"], [("-5:0", "s2")]),
        (["numbers", "--at", "700,300", "--to", "s1,s3"], [("300:700", "s3"), ("700:1000", "s1")]),
        (["hashed", "--at", f"{-(2**62)},0", "--to", "s2,s3"], [(f"{-(2**62)}:0", "s2"), ("0:", "s3")]),
    ],
)
def test_a_split_reads_keys_of_every_type(zoo: Zoo, words: list[str], pieces: list[tuple[str, str]]) -> None:
    assert [(*ranges, target) for _, ranges, _, target in zoo.moves("split", *words)] == pieces


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["numbers", "--at", str(-(2**63)), "--to", "s2"], "no key is below"),
        (["words", "--at", '""', "--to", "s2"], "no key is below"),
        (["numbers", "--at", "0", "--to", "s1"], "cut"),
        (["numbers", "--at", "500,1500", "--to", "s1,s3"], "cut"),
        (["numbers", "--at", "500", "--to", "s1", "--range", "400:1100"], "not within one route"),
        (["numbers", "--at", "500", "--to", "s2"], "on s2 already"),
        (["numbers", "--at", "500,600", "--to", "s1"], "one target for each point"),
        (["words", "--at", "a,,b", "--to", "s1,s2"], "not a list"),
        (["hashed", "--at", "customer 7", "--to", "s2"], "customer 7"),
    ],
)
def test_a_split_that_cuts_nothing_is_refused(zoo: Zoo, words: list[str], named: str) -> None:
    said = zoo("plan", "split", *words)
    assert (said.code, said.stdout) == (Exit.USAGE, "")
    assert named in " ".join(said.stderr.split())
    assert zoo("status", "--json").document["moves"] == []


@pytest.mark.parametrize(
    ("keyspace", "key", "range_"),
    [
        ("numbers", "17", "17:18"),
        ("numbers", str(2**63 - 1), f"{2**63 - 1}:"),
        ("numbers", str(-(2**63)), f":{1 - 2**63}"),
        ("words", "a,b", "a,b:a,b\x01"),
        ("words", '"a": b', '"""a"": b":"""a"": b\x01"'),
        ("words", "", ":\x01"),
        ("times", "2026-01-01 00:00:00+00:00", '"2026-01-01 00:00:00+00:00":"2026-01-01 00:00:00.000001+00:00"'),
        ("hashed", "acme", f"{HASHES['text']('acme')}:{HASHES['text']('acme') + 1}"),
    ],
)
def test_a_key_is_isolated_with_nothing_beside_it(zoo: Zoo, keyspace: str, key: str, range_: str) -> None:
    (move,) = zoo.plan("isolate", keyspace, "--key", key, "--to", "s3")["moves"]
    with Catalog.connect(zoo.dsns["cat"]) as catalog:
        type_ = catalog.keyspace(keyspace).bound_type
    assert type_.parse_range(move["ranges"][0]) == type_.parse_range(range_)
    again = zoo("plan", "isolate", keyspace, "--key", key, "--to", "s3")
    assert again.code == Exit.REFUSED
    assert move["id"] in again.stderr


def test_a_merge_brings_neighbours_together(zoo: Zoo) -> None:
    assert zoo.moves("merge", "numbers", "--range", "-10:500", "--to", "s1") == [("numbers", ["0:500"], "s2", "s1")]
    refused = zoo("plan", "merge", "numbers", "--range", "1000:", "--to", "s1")
    assert refused.code == Exit.REFUSED
    assert "already" in refused.stderr
    assert zoo.moves("merge", "numbers", "--range", "600:", "--to", "s3") == [
        ("numbers", ["600:1000"], "s2", "s3"),
        ("numbers", ["1000:"], "s1", "s3"),
    ]


def test_a_drain_deals_out_every_route_by_size(zoo: Zoo) -> None:
    """The hashed keyspace is small beside the numbers from 1000 on: they are alone on their target."""
    moves = zoo.moves("drain", "s1", "--to", "s2,s3")
    assert moves == [
        ("hashed", [":"], "s1", "s3"),
        ("numbers", ["1000:"], "s1", "s2"),
        ("numbers", [":0"], "s1", "s3"),
        ("times", [":"], "s1", "s3"),
        ("words", [":"], "s1", "s3"),
    ]


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["s3", "--to", "s1"], Exit.REFUSED, "owns nothing"),
        (["s1", "--to", "s2,s1"], Exit.USAGE, "other shards"),
        (["s1", "--to", "s2,s2"], Exit.USAGE, "each once"),
        (["s1", "--to", "s9"], Exit.USAGE, "s9"),
        (["s9", "--to", "s1"], Exit.USAGE, "s9"),
    ],
)
def test_a_drain_that_empties_nothing_is_refused(zoo: Zoo, words: list[str], code: Exit, named: str) -> None:
    said = zoo("plan", "drain", *words)
    assert (said.code, said.stdout) == (code, "")
    assert named in said.stderr


def test_lists_are_read_or_refused() -> None:
    assert listed(' a , "b,c","d""e" ,""') == ["a", "b,c", 'd"e', ""]
    for text in ("", "a,", ",a", 'a"b', '"a', '"a"b'):
        with pytest.raises(Exception, match="not a list"):
            listed(text)


# --- what it is estimated to take


def test_rows_bytes_and_time_are_estimated_from_statistics(zoo: Zoo) -> None:
    plan = zoo.plan("move", "numbers", "--range", "1000:1100", "--to", "s3", "--rate", "100")
    (move,) = plan["moves"]
    estimate = move["estimate"]
    assert estimate == plan["estimate"]
    assert 0.8 < estimate["rows"] / (ROWS * 100 / KEYS) < 1.2
    assert estimate["seconds"] == round(estimate["rows"] / 100, 1)
    assert (estimate["rate_rows_s"], estimate["rate_from"]) == (100, "--rate")
    assert plan["disk_bytes"] == {"s3": estimate["bytes"]}
    whole = zoo.plan("move", "numbers", "--range", "1100:", "--to", "s3")["estimate"]
    assert (whole["rate_rows_s"], whole["rate_from"]) == (DEFAULT_RATE_ROWS_S, "default")
    assert whole["bytes"] > 200 * 12_000, "partitions and what is stored out of line count"
    assert 0.8 < whole["rows"] / (ROWS * 100 / KEYS + 200) < 1.2


def test_hashes_are_estimated_as_spread_evenly(zoo: Zoo) -> None:
    half = zoo.plan("split", "hashed", "--at", "0", "--to", "s2")["estimate"]
    assert 0.9 < half["rows"] / (ROWS / 2) < 1.1
    low = next(f"customer {i}" for i in range(KEYS) if HASHES["text"](f"customer {i}") < 0)
    alone = zoo.plan("isolate", "hashed", "--key", low, "--to", "s2")["estimate"]
    assert 0.8 < alone["rows"] / (ROWS / KEYS) < 1.2


def test_a_table_without_rows_is_estimated_as_none(zoo: Zoo) -> None:
    estimate = zoo.plan("move", "words", "--range", ":", "--to", "s3")["estimate"]
    assert (estimate["rows"], estimate["bytes"], estimate["seconds"]) == (0, 0, 0)


def test_a_plan_is_made_while_its_shard_is_down(zoo: Zoo) -> None:
    zoo.path.write_text(CONFIG.format(**{**zoo.dsns, "s1": "host=127.0.0.1 port=1 dbname=gone"}), encoding="utf-8")
    plan = zoo.plan("merge", "numbers", "--range", "-10:1010", "--to", "s3")
    estimates = {move["source"]: (move["estimate"], move["estimate_error"]) for move in plan["moves"]}
    assert estimates["s1"][0] is None
    assert "port=1" in estimates["s1"][1]
    assert estimates["s2"][0]["rows"] == 0
    assert estimates["s2"][1] is None
    assert (plan["estimate"], plan["disk_bytes"]) == (None, {"s3": None})
    said = zoo("plan", "drain", "s1", "--to", "s2,s3")
    assert said.code == Exit.REFUSED, "a part of it is moving"
    said = zoo("plan", "split", "words", "--at", "k", "--to", "s2")
    assert said.code == Exit.DONE
    assert "not estimated: cannot connect" in said.stdout


def test_a_shard_that_is_down_is_drained_by_the_number_of_its_routes(zoo: Zoo) -> None:
    zoo.path.write_text(CONFIG.format(**{**zoo.dsns, "s1": "host=127.0.0.1 port=1 dbname=gone"}), encoding="utf-8")
    moves = zoo.moves("drain", "s1", "--to", "s2,s3")
    dealt = {target: sum(len(ranges) for _, ranges, _, to in moves if to == target) for target in ("s2", "s3")}
    assert sorted(dealt.values()) == [2, 3]


# --- plans of several moves

SPLIT = ("plan", "split", "shop", "--at", "10,20,30", "--to", "s2,s3,s2", "--json")


@pytest.fixture
def three(shell: Shell) -> tuple[str, list[str]]:
    """A plan of three moves from s1, two of them to s2; and their ids."""
    assert shell("apply").code == Exit.DONE
    plan = shell(*SPLIT).document
    return plan["id"], [move["id"] for move in plan["moves"]]


def states(world: World, move_ids: Sequence[str]) -> list[str]:
    return [str(world.move(move_id).state) for move_id in move_ids]


def done(said: Said) -> Said:
    assert said.code == Exit.DONE, said.stderr
    return said


def test_moves_with_the_same_ends_go_side_by_side(world: World, shell: Shell, three: tuple[str, list[str]]) -> None:
    plan, moves = three
    with world.attended(), world.writers(focus=list(range(10, 40))) as fleet:
        done(shell("run", plan, "--parallel", "2"))
        assert states(world, moves) == ["ready"] * 3
        done(shell("cutover", plan))
        assert [world.owner(tenant) for tenant in (9, 10, 20, 30)] == ["s1", "s2", "s3", "s2"]
        done(shell("revert", plan))
        assert world.owner(30) == "s1"
        done(shell("cutover", plan))
        done(shell("complete", plan))
        assert fleet.acknowledged > 0
    world.assert_nothing_lost(absent_on={"s1": [KeyRange(10, None)]})
    assert states(world, moves) == ["completed"] * 3
    assert [world.leftovers(shard, move) for shard in ("s1", "s2", "s3") for move in moves if shard != "s3"] == [[]] * 6
    later = shell("plan", "move", "shop", "--range", "10:11", "--to", "s3", "--json").document["estimate"]
    assert later["rate_from"] in moves
    assert later["rate_rows_s"] == world.catalog.stats(later["rate_from"])["rate_rows_s"] > 0


def test_a_plan_that_is_half_switched_rolls_back(world: World, shell: Shell, three: tuple[str, list[str]]) -> None:
    plan, moves = three
    with world.writers(focus=list(range(10, 40))):
        done(shell("run", plan, "--parallel", "3"))
        done(shell("cutover", moves[0]))
        done(shell("cutover", moves[2]))
        done(shell("rollback", plan))
    assert states(world, moves) == ["rolled_back"] * 3
    world.assert_nothing_lost(absent_on={"s2": [KeyRange(10, None)], "s3": [KeyRange(10, None)]})
    given_up = [each.move_id for each in all_events(world) if each.detail.get("after") == "rolling_back"]
    assert given_up == moves[::-1]
    done(shell("rollback", plan))


def all_events(world: World) -> list[Any]:
    found, page = [], world.catalog.events()
    while page:
        found += page
        page = world.catalog.events(after_id=page[-1].id)
    return found


def test_a_verb_goes_on_with_a_plan_that_is_done_in_part(
    world: World, shell: Shell, three: tuple[str, list[str]]
) -> None:
    plan, moves = three
    first, second, third = moves
    done(shell("run", first))
    assert shell("cutover", plan).code == Exit.REFUSED
    assert states(world, moves) == ["switched", "pending", "pending"]
    assert "passed over" in done(shell("revert", plan)).stderr
    assert states(world, moves) == ["ready", "pending", "pending"]
    done(shell("run", plan))
    done(shell("cutover", first))
    told = done(shell("revert", plan, "--dry-run", "--json")).document["moves"]
    assert [len(each["steps"]) for each in told][1:] == [1, 1]
    assert all("passed over" in each["steps"][0] for each in told[1:])
    told = done(shell("cutover", plan, "--dry-run", "--json")).document["moves"]
    assert told[0]["steps"] == ["passed over: the move is switched"]
    done(shell("complete", first))
    done(shell("rollback", second))
    assert states(world, moves) == ["completed", "rolled_back", "ready"]

    done(shell("run", plan))
    done(shell("cutover", plan))
    done(shell("cutover", plan))
    said = done(shell("revert", plan))
    assert [word in said.stderr for word in ("the move is completed", "the move is rolled_back")] == [True, True]
    done(shell("revert", plan))
    assert states(world, moves) == ["completed", "rolled_back", "ready"]
    assert shell("complete", plan).code == Exit.REFUSED
    done(shell("cutover", third))
    done(shell("complete", plan))
    assert states(world, moves) == ["completed", "rolled_back", "completed"]
    for verb in ("run", "complete", "rollback"):
        done(shell(verb, plan))
    for verb in ("cutover", "revert"):
        assert shell(verb, plan).code == Exit.REFUSED


def test_a_failure_starts_no_others_and_lets_those_beside_it_arrive(
    world: World, shell: Shell, three: tuple[str, list[str]]
) -> None:
    plan, moves = three
    once = threading.Lock()

    def fail_first(_point: str) -> None:
        if once.acquire(blocking=False):
            raise errors.Failed("the disk is full")

    with points.armed("mark_whole.after", fail_first):
        said = shell("run", plan, "--parallel", "2", "--until", "switched", "--on-error", "rollback")
    assert said.code == Exit.FAILED
    assert "the disk is full; it was rolled back" in said.stderr
    assert sorted(states(world, moves)[:2]) == ["ready", "rolled_back"]
    assert states(world, moves)[2] == "pending"
    done(shell("run", plan, "--parallel", "2", "--until", "completed"))
    assert sorted(states(world, moves)) == ["completed", "completed", "rolled_back"]


def test_a_target_whose_schema_is_being_made_takes_one_move_at_a_time(
    world: World, shell: Shell, three: tuple[str, list[str]]
) -> None:
    plan, moves = three
    for shard in ("s2", "s3"):
        with world.connect(shard) as connection:
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    done(shell("run", plan, "--parallel", "3", "--create-schema"))
    assert states(world, moves) == ["ready"] * 3
    done(shell("cutover", plan))
    done(shell("complete", plan))
    made = "SELECT count(*) FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
    assert world.fetch("s2", made) == world.fetch("s3", made) == world.fetch("s1", made)


def test_a_move_that_cannot_begin_keeps_the_others_from_nothing_but_beginning(
    world: World, shell: Shell, three: tuple[str, list[str]]
) -> None:
    plan, moves = three
    world.catalog.set_paused(moves[1], True)
    said = shell("run", plan, "--parallel", "3")
    assert said.code == Exit.REFUSED
    assert f"{moves[1]} is paused" in said.stderr
    assert states(world, moves) == ["ready", "pending", "pending"]


@contextmanager
def copying_held_up(world: World, *shards: str) -> Iterator[None]:
    """Within the block no batch can be recorded on these targets: a run gets as far as `copying`, and stays there."""
    with ExitStack() as stack:
        for shard in shards:
            locker = stack.enter_context(world.connect(shard))
            objects.install_schema(locker, world.catalog.cluster_id())
            locker.execute("BEGIN")
            locker.execute("LOCK TABLE shardmove.batch IN EXCLUSIVE MODE")
        yield


def test_an_interrupt_stops_all_of_them_cleanly(
    world: World, shell: Shell, start: Start, three: tuple[str, list[str]]
) -> None:
    plan, moves = three
    with copying_held_up(world, "s2", "s3"):
        running = start("run", plan, "--parallel", "2")
        until(lambda: states(world, moves) == ["copying", "copying", "pending"])
        until(lambda: all(world.catalog.holder(move) is not None for move in moves[:2]))
        running.signal(signal.SIGINT)
        running.read_until("stopping")
    said = running.end()
    assert said.code == Exit.INTERRUPTED, said.stderr
    assert f"shardmove run {plan}" in said.stderr
    assert [world.catalog.holder(move) for move in moves] == [None] * 3
    assert [world.move(move).error for move in moves] == [None] * 3
    done(shell("run", plan, "--parallel", "3"))
    assert states(world, moves) == ["ready"] * 3


def test_the_worst_error_decides_how_a_plan_ends() -> None:
    interrupted = errors.Interrupted("m1 was interrupted", hint="run m1")
    refused, failed = errors.LeaseHeld("m2 is held"), errors.Unreachable("s2 is down", hint="start it")
    different = errors.DifferencesFound("m3 differs")
    assert worst([refused], "p1") is refused
    both = worst([interrupted, refused], "p1")
    assert (type(both), str(both)) == (errors.LeaseHeld, "m2 is held; and m1 was interrupted")
    assert exit_code(worst([refused, failed, interrupted], "p1")) == Exit.FAILED
    assert exit_code(worst([failed, different], "p1")) == Exit.DIFFERENCES
    stopped = worst([interrupted, errors.Interrupted("m2 was interrupted")], "p1")
    assert isinstance(stopped, errors.Interrupted)
    assert stopped.hint == "`shardmove run p1` goes on from there"
    bug = KeyError("x")
    assert worst([different, bug], "p1") is bug


def test_a_key_that_was_isolated_is_merged_back(world: World, shell: Shell) -> None:
    shell("apply")
    with world.writers():
        for words in (
            ["isolate", "shop", "--key", "25", "--to", "s2"],
            ["merge", "shop", "--range", ":", "--to", "s1"],
        ):
            plan = shell("plan", *words, "--json").document["id"]
            done(shell("run", plan))
            assert world.owner(25) != {"isolate": "s2", "merge": "s1"}[words[0]]
            done(shell("cutover", plan))
            assert [world.owner(tenant) for tenant in (24, 26)] == ["s1", "s1"]
            done(shell("complete", plan))
    world.assert_nothing_lost(absent_on={"s2": [KeyRange(None, None)]})
    assert [(str(each.range), each.shard) for each in world.catalog.routes()["shop"].routes] == [(":", "s1")]


def test_a_drained_shard_can_be_dropped(world: World, shell: Shell) -> None:
    shell("apply")
    done(shell("run", shell("plan", "split", "shop", "--at", "30", "--to", "s2", "--json").document["id"],
               "--until", "completed"))  # fmt: skip
    done(shell("run", shell("plan", "move", "shop", "--range", "10:20", "--to", "s3", "--json").document["id"],
               "--until", "completed"))  # fmt: skip
    plan = shell("plan", "drain", "s1", "--to", "s2,s3", "--json").document
    assert {move["target"]: move["ranges"] for move in plan["moves"]} in (
        {"s2": [":10"], "s3": ["20:30"]}, {"s3": [":10"], "s2": ["20:30"]})  # fmt: skip
    done(shell("run", plan["id"], "--until", "completed", "--parallel", "2"))
    assert "s1" not in {world.owner(tenant) for tenant in range(40)}
    path = world.directory / "smaller.toml"
    lines = world.write_config().read_text(encoding="utf-8")
    path.write_text(re.sub(r'\[shards.s1\]\ndsn = ".*"\n', "", lines).replace('shard = "s1"', 'shard = "s2"'))
    assert "shard s1 dropped" in done(shell("apply", config=path)).stdout


def test_a_screen_shows_the_moves_one_below_the_other(
    world: World, three: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen = Screen()
    screen._console = Console(file=out, force_terminal=True, width=120)
    first, second = (world.move(move) for move in three[1][:2])
    with screen.watched(first) as one:
        one.table("orders").rows_copied = 5
        with screen.watched(second) as two:
            two.step("catch up")
            assert screen._live is not None
            screen._live.refresh()
    assert screen._live is None
    shown = out.getvalue()
    assert f"{second.id}  catch up" in shown
    assert all(move.ranges_text in shown for move in (first, second))
    with screen.watched(first):
        pass


def test_a_move_that_died_before_it_had_estimated_anything_is_shown(world: World) -> None:
    """Killed between the step into `copying` and the first word of progress."""
    move = world.move(world.split(at=20))
    figures = status(world.config, world.catalog, move)
    told = {**figures, "state": "copying", "rows_copied": 0, "rows_estimate": None}
    shown = io.StringIO()
    Console(file=shown, width=200).print(render.statuses({"moves": [told], "routers": [], "epoch": 1}))
    assert "copying" in shown.getvalue()
