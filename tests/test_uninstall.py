"""Everything of ours is on the page that lists it, goes when the page says, and nothing is left in the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest

from shardmove.coordinator.diagnose import Finding, diagnose
from shardmove.coordinator.uninstalling import Item, uninstall
from shardmove.domain.errors import Refused
from shardmove.domain.moves import Direction, State
from tests.support.inventory import added, inventory
from tests.support.world import World

PAGE: Final = Path(__file__).parents[1] / "docs" / "objects.md"
MEMBERS: Final = [
    "customers",
    "items_0",
    "items_1",
    "items_2",
    "items_3",
    "order_items",
    "orders",
    "orders_0",
    "orders_20",
    "orders_30",
    "orders_30_a",
    "orders_30_b",
    "tenant_totals",
    "tenants",
]
END, KEPT = "end of the move", "when the ranges come back"


def documented(heading: str) -> dict[str, str]:
    """`kind name` of each object that the page lists under the heading, and the last column of its row."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    listed: dict[str, str] = {}
    for row in re.findall(r"^\| (\w+ `.*) \|$", section, re.MULTILINE):
        cells = row.split(" | ")
        for kind, names in re.findall(r"(\w+) ((?:`[^`]+`(?:, (?=`))?)+)", cells[0]):
            listed |= {f"{kind} {name}": cells[-1] for name in re.findall(r"`([^`]+)`", names)}
    return listed


ON_A_SHARD: Final = documented("On a shard")
IN_THE_CATALOG: Final = documented("In the catalog's database")


def on_shard(*, during: bool = False, kept: bool = False) -> set[str]:
    """What the page says is there during a move, or after one that has left a kept fence, or not."""
    return {
        name
        for name, goes in ON_A_SHARD.items()
        if (during or not goes.startswith(END)) and (kept or not goes.startswith(KEPT))
    }


def as_documented(objects: set[str]) -> set[str]:
    """Names of moves and tables as placeholders; a trigger without its table, a function without its arguments."""
    found = set()
    for each in objects:
        name = re.sub(r" on .*|\(.*\)", "", each)
        name = re.sub(r"\b(journal|capture)_m\d+_\d+", r"\1_<m>_<n>", name)
        found.add(re.sub(r"_m\d+(?=_|$)", "_<m>", name))
    return found


def carriers(objects: set[str], trigger: str) -> list[str]:
    """The tables that have the trigger."""
    return sorted(each.split(" on public.")[1] for each in objects if each.startswith(f"trigger {trigger} on "))


class Watched:
    """A world of partitioned tables, and what came into its databases since it was made."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.before = {name: inventory(dsn) for name, dsn in world.dsns.items()}

    def new(self, shard: str) -> set[str]:
        return added(self.before[shard], inventory(self.world.dsns[shard]))

    def uninstall(self) -> list[Item]:
        with_trial = uninstall(self.world.config, self.world.catalog, dry_run=True, tell=lambda _: None)
        removed = uninstall(self.world.config, self.world.catalog, dry_run=False, tell=lambda _: None)
        assert removed == with_trial
        return removed

    def diagnose(self) -> list[Finding]:
        return diagnose(self.world.config, self.world.catalog)

    def assert_nothing_is_left(self) -> None:
        assert {shard: self.new(shard) for shard in self.world.shards} == {shard: set() for shard in self.world.shards}


@pytest.fixture
def watched(make_partitioned: Callable[..., World]) -> Iterator[Watched]:
    made = Watched(make_partitioned(rows_a_tenant=5))
    yield made
    made.world.catalog.close()


def test_the_page_lists_what_a_move_makes_and_nothing_outlives_its_end(watched: Watched) -> None:
    world = watched.world
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    for shard in ("s1", "s2"):
        during = watched.new(shard)
        assert as_documented(during) == on_shard(during=True)
        for event in ("insert", "update", "delete", "truncate"):
            assert carriers(during, f"shardmove_{move_id}_{event}") == MEMBERS
    assert watched.new("s3") == set()
    world.cut_over(move_id)
    assert as_documented(watched.new("s1")) == as_documented(watched.new("s2")) == on_shard(during=True)
    world.complete(move_id)
    assert as_documented(watched.new("s1")) == on_shard(kept=True)
    assert carriers(watched.new("s1"), "shardmove_kept_update") == MEMBERS
    assert as_documented(watched.new("s2")) == on_shard()
    assert watched.diagnose() == []
    watched.uninstall()
    watched.assert_nothing_is_left()


def test_a_rollback_leaves_what_the_page_says(watched: Watched) -> None:
    world = watched.world
    never_cut_over = world.split(at=20)
    world.run(never_cut_over, State.READY)
    world.roll_back(never_cut_over)
    assert as_documented(watched.new("s1")) == as_documented(watched.new("s2")) == on_shard()
    back_and_forth = world.split(at=20)
    world.run(back_and_forth, State.SWITCHED)
    world.cut_over(back_and_forth, Direction.BACK)
    world.roll_back(back_and_forth)
    assert as_documented(watched.new("s1")) == on_shard()
    assert as_documented(watched.new("s2")) == on_shard(kept=True)  # it owned the range once
    watched.uninstall()
    watched.assert_nothing_is_left()


def test_the_page_lists_what_is_in_the_catalog(watched: Watched) -> None:
    objects = {each for each in watched.before["cat"] if "shardmove_catalog" in each}
    ours = {each for each in as_documented(added(set(), objects)) if "RI_ConstraintTrigger" not in each}
    assert {each.replace("shardmove_catalog.", "") for each in ours} == set(IN_THE_CATALOG)
    watched.uninstall()
    left = inventory(watched.world.dsns["cat"])
    assert [each for each in left if "shardmove" in each] == []


def test_all_of_it_belongs_to_our_role(watched: Watched) -> None:
    world = watched.world
    world.run(world.split(at=20), State.READY)
    query = (
        "SELECT DISTINCT pg_get_userbyid(relowner)::text FROM pg_class WHERE relnamespace = 'shardmove'::regnamespace"
        " UNION SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'shardmove'::regnamespace"
        " UNION SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'shardmove'"
    )
    with world.connect("s1") as connection:
        assert connection.execute(query.encode()).fetchall() == [(connection.info.user,)]
        closed = connection.execute("SELECT nspacl::text FROM pg_namespace WHERE nspname = 'shardmove'").fetchone()
    assert closed is not None
    assert "=U" not in str(closed[0]).replace("postgres=U", "")


def test_a_partition_that_was_detached_is_freed_at_the_end_of_the_move(watched: Watched) -> None:
    world = watched.world
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    for shard in ("s1", "s2"):
        with world.connect(shard) as connection:
            connection.execute("ALTER TABLE order_items DETACH PARTITION items_1")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                connection.execute("TRUNCATE items_1")
        assert carriers(watched.new(shard), f"shardmove_{move_id}_truncate") == MEMBERS
        assert "items_1" not in carriers(watched.new(shard), f"shardmove_{move_id}_update")
    world.roll_back(move_id)
    for shard in ("s1", "s2"):
        assert not any(name.startswith("trigger shardmove_") for name in watched.new(shard))
        with world.connect(shard) as connection:
            connection.execute("TRUNCATE items_1")
    watched.uninstall()
    assert not any("shardmove" in name for name in watched.new("s1") | watched.new("s2"))


def test_diagnose_names_what_a_hand_has_done_to_partitions(watched: Watched) -> None:
    world = watched.world
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.connect("s1") as connection:
        connection.execute(f"ALTER TABLE orders_30_a DISABLE TRIGGER shardmove_{move_id}_update".encode())
    with world.connect("s2") as connection:
        connection.execute("ALTER TABLE tenants RENAME TO clients")
    found = {each.subject: each.problem for each in watched.diagnose()}
    assert "missing or disabled on orders" in found["shard s1"]
    assert "not there any more: tenants" in found["shard s2"]
    with world.connect("s2") as connection:
        connection.execute("ALTER TABLE clients RENAME TO tenants")
    world.run(move_id, State.COMPLETED)
    assert watched.diagnose() == []
    with world.connect("s1") as connection:
        connection.execute("ALTER TABLE orders_20 DISABLE TRIGGER shardmove_kept_insert")
    (disabled,) = watched.diagnose()
    assert "shardmove_kept_insert on public.orders_20 is disabled" in disabled.problem
    with world.connect("s1") as connection:
        connection.execute(disabled.mend.encode())
    assert watched.diagnose() == []


def test_what_is_left_to_run_is_not_thrown_away(watched: Watched) -> None:
    world = watched.world
    world.run(world.split(at=20), State.COMPLETED)
    with world.connect("s2") as connection:
        connection.execute("INSERT INTO shardmove.later VALUES ('m1', 1, 'CREATE INDEX ON orders (note)')")
    (unfinished,) = watched.diagnose()
    assert (unfinished.subject, "lack indexes" in unfinished.problem) == ("shard s2", True)
    with pytest.raises(Refused, match="shard s2: tables that a move made lack indexes"):
        watched.uninstall()
    with world.connect("s2") as connection:
        connection.execute("DELETE FROM shardmove.later")
    watched.uninstall()
    watched.assert_nothing_is_left()
