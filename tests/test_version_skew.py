"""Two releases over one cluster: a newer one goes on with what an older one left; an older one keeps its hands off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg.types.json import Jsonb

from shardmove.cli.exits import Exit
from shardmove.domain.errors import Refused
from shardmove.domain.moves import CATALOG, Direction, State
from shardmove.postgres.identity import identity
from shardmove.protocol import objects
from shardmove.protocol.catch_up import Mirror
from tests.support.servers import Databases
from tests.support.shell import Said, Shell, invoked
from tests.support.world import World

LEFT_BY: Final = Path(__file__).parent / "data" / "release_0_1_0"
PLACES: Final = ("cat", "s1", "s2")
MOVE: Final = "m1"
TABLES: Final = ("customers", "orders")

# --- what release 0.1.0 left


@dataclass(frozen=True, slots=True)
class Left:
    """A cluster as release 0.1.0 left it, restored; and this release's commands over it."""

    state: str
    dsn: Mapping[str, str]
    command: Shell

    @property
    def owner(self) -> str:
        return "s1" if self.state == State.COPYING else "s2"

    def connect(self, place: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn[place], autocommit=True, application_name="application")

    def fetch(self, place: str, query: str) -> list[tuple[Any, ...]]:
        with self.connect(place) as connection:
            return connection.execute(query.encode()).fetchall()

    def rows(self, shard: str, condition: str = "tenant_id >= 6") -> list[str]:
        query = " UNION ALL ".join(f"SELECT '{t} ' || {t}::text FROM {t} WHERE {condition}" for t in TABLES)
        return sorted(row[0] for row in self.fetch(shard, query))

    def done(self, *words: str) -> str:
        result = self.command(*words)
        assert result.code == Exit.DONE, result.stderr
        return result.stdout

    def write(self) -> None:
        """The application goes on on the owner: an update, an insert, a delete in the moving range."""
        with self.connect(self.owner) as application:
            application.execute("UPDATE orders SET amount = amount + 1 WHERE tenant_id IN (5, 6, 9) AND id % 2 = 0")
            application.execute("INSERT INTO customers VALUES (10, 1099, 'late@t10')")
            application.execute("DELETE FROM orders WHERE tenant_id = 8 AND id = 804")


def restore(databases: Databases, directory: Path, state: str) -> Left:
    dsn = databases(*PLACES)
    identities = {}
    for place in PLACES:
        with psycopg.connect(dsn[place], autocommit=True) as connection:
            connection.execute("SET check_function_bodies = off")
            connection.execute((LEFT_BY / f"{state}_{place}.sql").read_bytes())
            identities[CATALOG if place == "cat" else place] = asdict(identity(connection))
    with psycopg.connect(dsn["cat"], autocommit=True) as connection:  # the servers are others, and nothing was lost
        connection.execute("UPDATE shardmove_catalog.move SET identities = %s", (Jsonb(identities),))
    config = directory / "cluster.toml"
    config.write_text(
        f'[catalog]\ndsn = "{dsn["cat"]}"\n[shards.s1]\ndsn = "{dsn["s1"]}"\n[shards.s2]\ndsn = "{dsn["s2"]}"\n'
        '[keyspaces.shop.tables]\ncustomers = "tenant_id"\norders = "tenant_id"\n'
        '[[keyspaces.shop.routes]]\nrange = ":"\nshard = "s1"\n[limits]\nkeep_source_s = 0.1\nbatch_rows_max = 7\n',
        encoding="utf-8",
    )
    return Left(state, dsn, partial(invoked, config))


@pytest.fixture(params=["copying", "switched"])
def left(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path, threads_for_workers: None) -> Left:
    return restore(databases, tmp_path, request.param)


def layouts(left: Left) -> list[int]:
    return [left.fetch(shard, "SELECT layout FROM shardmove.about")[0][0] for shard in ("s1", "s2")]


def test_a_catalog_of_an_older_release_says_what_to_run(left: Left) -> None:
    for words in (("status",), ("run", MOVE), ("rollback", MOVE), ("diagnose",)):
        result = left.command(*words)
        assert result.code == Exit.USAGE
        assert "made by an older release" in result.stderr
        assert "shardmove apply" in result.stderr
    assert layouts(left) == [1, 1]


def test_a_move_that_an_older_release_began_is_completed(left: Left) -> None:
    assert left.rows("s1") != left.rows("s2"), "the dump should hold changes that are yet to be carried"
    left.done("apply")  # while the move is unfinished: the hooks are online
    assert left.fetch("cat", "SELECT number FROM shardmove_catalog.upgrade_hook ORDER BY 1") == [(1,), (2,), (3,)]
    left.write()
    expected, stay = left.rows(left.owner), left.rows("s1", "tenant_id < 6")
    left.done("run", MOVE, "--until", "completed")
    assert left.rows("s2") == expected
    assert left.rows("s1") == []
    assert left.rows("s1", "tenant_id < 6") == stay
    assert layouts(left) == [objects.LAYOUT, objects.LAYOUT]
    with left.connect("s1") as late, pytest.raises(psycopg.errors.SerializationFailure):
        late.execute("INSERT INTO customers VALUES (7, 1, 'stray')")
    assert json.loads(left.done("diagnose", "--json")) == {"findings": []}
    left.done("uninstall")
    assert left.fetch("s1", "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'shardmove%'") == [(0,)]


def test_a_move_that_an_older_release_began_is_rolled_back(left: Left) -> None:
    left.done("apply")
    left.write()
    expected = left.rows(left.owner)
    if left.state == State.SWITCHED:
        left.done("run", MOVE, "--until", "switched")  # the older release's fingerprint is not this one's
    left.done("rollback", MOVE)
    assert left.rows("s1") == expected
    assert left.rows("s2") == []
    with left.connect("s1") as application:
        application.execute("INSERT INTO customers VALUES (7, 1, 'at home')")
    left.done("uninstall")


def test_a_new_move_begins_beside_what_an_older_release_left(left: Left) -> None:
    left.done("apply")
    left.done("run", MOVE, "--until", "completed")
    moved = left.rows("s2", "tenant_id >= 8")
    left.done("plan", "move", "shop", "--range", "8:", "--to", "s1")
    left.done("run", "m2", "--until", "completed")
    assert left.rows("s1") == moved
    assert left.rows("s2", "tenant_id >= 8") == []


# --- what a newer release touched


def refused(said: Said) -> str:
    assert said.code == Exit.REFUSED, said.stderr
    return said.stderr


def test_a_catalog_of_a_newer_release_is_left_alone(world: World, shell: Shell) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute("INSERT INTO shardmove_catalog.upgrade_hook VALUES (1000, '9.9.0', '9.9.0')")
    verbs = ("run", "cutover", "revert", "rollback", "complete", "verify", "pause")
    for words in (("apply",), ("status",), ("diagnose",), ("uninstall",), *((verb, move_id) for verb in verbs)):
        said = refused(shell(*words))
        assert "version skew: the catalog was made by release 9.9.0" in said
        assert "hint: use shardmove 9.9.0 or newer" in said


@pytest.mark.parametrize("shard", ["s1", "s2"])
def test_a_shard_that_a_newer_release_touched_is_left_alone(world: World, shell: Shell, shard: str) -> None:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    with world.connect(shard) as connection:
        connection.execute("UPDATE shardmove.about SET layout = layout + 1")
    for verb in ("run", "cutover", "rollback", "verify"):
        said = refused(shell(verb, move_id))
        assert f"shard {shard}: this shard was touched by a newer release" in said
        assert "hint: use that release" in said
    assert world.move(move_id).state is State.READY
    found = shell("diagnose", "--json").stdout
    assert f"shard {shard}" in found
    assert "newer release" in found
    giver_first = {"s1": Direction.FORWARD, "s2": Direction.BACK}
    with pytest.raises(Refused, match="newer release"):  # what an attendant does
        Mirror.open(world.move(move_id), giver_first[shard], None, world.shards)


def test_a_new_move_refuses_a_shard_that_a_newer_release_touched(world: World, shell: Shell) -> None:
    world.run(world.split(at=30), State.COMPLETED)
    second = world.split(at=20)
    with world.connect("s2") as connection:
        connection.execute("UPDATE shardmove.about SET layout = layout + 1")
    assert "shard s2: this shard was touched by a newer release" in refused(shell("run", second))
    with world.connect("s2") as connection:
        connection.execute("UPDATE shardmove.about SET layout = layout - 1")
    assert shell("rollback", second).code == Exit.DONE
    with world.connect("s2") as connection:
        connection.execute("UPDATE shardmove.about SET layout = layout + 1")
    assert "shard s2: this shard was touched by a newer release" in refused(shell("uninstall"))
