"""The sequences of the differential test, while the rows that they touch move between two shards, back and forth.

A client must not see a difference from a bare PostgreSQL, but for one: a transaction that read before its first write,
or that began before the range changed hands, may be told to try again (40001). It does, and then sees none.

SHARDMOVE_MOVING=all plays each sequence in all three ways.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from shardmove.catalog.store import Catalog
from shardmove.config import load
from shardmove.coordinator import ending, planner
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Direction, State
from shardmove.postgres.embedded import Cluster
from tests.support.routed import SCHEMA, Routed, standing
from tests.support.router import Router
from tests.test_router_differential import (
    ALIKE,
    BIG,
    ONLY_IN_STEPS,
    RANDOM,
    RESETS,
    SCRIPTS,
    SEED,
    Script,
    in_order,
    play,
    sequence,
)
from workers.executors import InlineExecutor

WAYS: Final = ("steps", "at once", "bytes") if os.environ.get("SHARDMOVE_MOVING") == "all" else ("at once",)
TRIES: Final = 30
KEYS: Final = (7, 8)
MOVING: Final = "5:10"
PATIENCE_S: Final = 200.0
APART: Final = "the transaction is on shard"
"""What a random transaction of tables at home and rows that have moved is told."""
CHANGED_HANDS: Final = 3
"""So often at least while the sequences are played."""


@dataclass
class Mover:
    """Moves the range to s2 and back, over and over: there, back, there again, for good."""

    routed: Routed
    changed_hands: int = 0
    error: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Mover:
        self._thread = threading.Thread(target=self._guarded, name="mover")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def await_changes(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.changed_hands >= number or self.error is not None, PATIENCE_S)
        assert self.error is None
        assert self.changed_hands >= number

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def _run(self) -> None:
        config = load(self.routed.config_file)
        config = replace(config, limits=replace(config.limits, cutover_attempts=100))
        with Catalog.connect(config.catalog_dsn) as catalog:
            target, other = "s2", "s1"
            while not self._stop.is_set():
                range_ = KeyType.BIGINT.parse_range(MOVING)
                move_id = planner.move(config, catalog, "shop", range_=range_, to=target).move_ids[0]
                settings = {"holder": "test", "make_executor": lambda: InlineExecutor(2), "progress": Progress()}
                with hold(config, catalog, move_id, **settings) as held:
                    run(held, State.READY)
                    for direction in (Direction.FORWARD, Direction.BACK, Direction.FORWARD):
                        cut_over(held, direction)
                        with self._changed:
                            self.changed_hands += 1
                            self._changed.notify_all()
                    ending.complete(held)
                target, other = other, target


class Moving:
    """A router before the two shards, and a bare server."""

    def __init__(self, routed: Routed, bare: tuple[int, str], routers: dict[str, Router]) -> None:
        self.bare = bare
        self.routers = routers
        self._routed = routed

    def told(self, door: str, script: Script, way: str) -> list[str]:
        """What the client is told, and what is left then."""
        port, dbname = self.bare if door == "bare" else (self.routers[door].port, self._routed.dbname)
        where = f"host=127.0.0.1 port={port} dbname={dbname} user=postgres"
        with psycopg.connect(where, autocommit=True) as connection:
            for statement in RESET:
                executed(connection, statement)
            said = in_order(play((port, dbname), script, way))
            left = [executed(connection, statement).fetchall() for statement in LEFT]
        return [*said, f"left: {left}"]


def executed(connection: psycopg.Connection[Any], statement: str) -> psycopg.Cursor[Any]:
    """Once more where it was held for too long."""
    for _ in range(TRIES):
        with suppress(psycopg.errors.SerializationFailure):
            return connection.execute(statement.encode())
    raise AssertionError(f"{statement} is refused again and again")


RESET: Final = (
    "DELETE FROM t",
    "DELETE FROM empty",
    "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 5) i",
    "INSERT INTO empty SELECT FROM generate_series(1, 2)",
    *(f"DELETE FROM items WHERE tenant_id = {key}" for key in KEYS),
    "INSERT INTO items (tenant_id, id, note) VALUES " + ", ".join(f"(7, {i}, 'note {i}')" for i in range(1, 6)),
)
LEFT: Final = (
    "SELECT a, b, c FROM t ORDER BY a",
    *(f"SELECT tenant_id, id, note, amount FROM items WHERE tenant_id = {key} ORDER BY id" for key in KEYS),
)


@pytest.fixture(scope="module")
def moving(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    with standing(servers, tmp_path_factory.mktemp("moving")) as routed:
        bare = conninfo_to_dict(routed.databases("s1")["s1"])
        for shard in ("s1", "s2"):
            routed.execute(shard, ALIKE)
        with psycopg.connect(**bare, autocommit=True) as connection:
            connection.execute((SCHEMA + ALIKE).encode())
        started = {pooling: routed.router(pooling=pooling) for pooling in ("session", "transaction")}
        with Mover(routed) as mover:
            mover.await_changes(1)
            yield Moving(routed, (servers["s1"].port, str(bare["dbname"])), started)
            mover.await_changes(CHANGED_HANDS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_client_sees_no_difference_while_its_rows_move(moving: Moving, name: str, way: str) -> None:
    script = SCRIPTS[name]
    if way == "bytes" and sum(len(step) for step in script if isinstance(step, bytes)) > BIG:
        pytest.skip("too long to send byte by byte")
    if any(isinstance(step, bytes) and b"1/(" in step for step in script):
        pytest.skip("which rows come before the error is the plan's choice")
    if way != "steps" and name in ONLY_IN_STEPS:
        way = "steps"
    compare(moving, name, script, way)


@pytest.mark.parametrize("number", range(RANDOM))
def test_random_sequences_are_answered_alike_while_rows_move(moving: Moving, number: int) -> None:
    rng = random.Random(f"{SEED} moving {number}")
    script = sequence(rng)
    print(f"sequence {number} of seed {SEED}:", *script, sep="\n  ")
    if not is_fair(script):
        pytest.skip("what it is told depends on the shard")
    compare(moving, "", script, rng.choice(["at once", "bytes"]))


def is_fair(script: Sequence[bytes]) -> bool:
    """A simple query in the middle of a unit is in its transaction on one shard only; of a Parse that is wrong twice
    the server says one thing, and the router, which knows the name, another."""
    is_open = False
    for each in script:
        kind = each[:1]
        if kind == b"Q" and is_open:
            return False
        if kind == b"P" and b"SELEKT" in each and each[5:6] != b"\0":
            return False
        is_open = kind in (b"P", b"B", b"D", b"E", b"C", b"H") or (is_open and kind != b"S")
    return True


def compare(moving: Moving, name: str, script: Script, way: str) -> None:
    bare = moving.told("bare", script, way)
    for pooling in moving.routers:
        if pooling not in name.partition("(")[2] and "(" in name:
            continue
        for _ in range(TRIES):
            routed = moving.told(pooling, script, way)
            if routed == bare or not (name in RESETS or any("40001" in each for each in routed)):
                break
            bare = moving.told("bare", script, way) if name in RESETS else bare
        assert routed == bare or APART in "".join(routed), f"{pooling} pooling, {way}"
