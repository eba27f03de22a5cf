"""What may change under a move: columns, servers, the catalog's own server. Noticed, compared, then carried on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardmove.coordinator import ending
from shardmove.coordinator.run import explained
from shardmove.coordinator.verifying import compare_in_full
from shardmove.demo import shop
from shardmove.domain import points
from shardmove.domain.errors import (
    DifferencesFound,
    Refused,
    SchemaDrift,
    ServerChanged,
    ShardmoveError,
    Unreachable,
)
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from shardmove.postgres.embedded import Cluster
from shardmove.protocol import drift, triggers
from shardmove.protocol.catch_up import Mirror
from tests.support.engine import until
from tests.support.twins import Mechanism, make_role
from tests.support.world import World

MOVED = KeyRange(20, None)


def on_both(world: World, statement: str) -> None:
    for shard in ("s1", "s2"):
        with world.connect(shard) as connection:
            connection.execute(statement.encode())


def ready(world: World) -> str:
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    return move_id


def test_a_column_that_comes_during_a_move_is_carried(world: World) -> None:
    move_id = ready(world)
    on_both(world, "ALTER TABLE orders ADD COLUMN extra text")
    with world.connect("s1") as application:
        written = application.execute("UPDATE orders SET extra = 'x' WHERE tenant_id IN (25, 30)").rowcount
    with pytest.raises(SchemaDrift):
        world.cut_over(move_id)
    world.run(move_id, State.READY)
    world.cut_over(move_id)
    assert world.fetch("s2", "SELECT count(*) FROM orders WHERE extra = 'x'") == [(written,)]
    with world.connect("s2") as application:
        application.execute("UPDATE orders SET extra = 'y' WHERE tenant_id = 25")
    world.cut_over(move_id, Direction.BACK)
    assert world.fetch("s1", "SELECT count(*) > 0 FROM orders WHERE extra = 'y'") == [(True,)]


def test_a_column_that_goes_while_switched_blocks_nothing(world: World) -> None:
    move_id = ready(world)
    world.cut_over(move_id)
    on_both(world, "ALTER TABLE orders DROP COLUMN note")
    with world.connect("s2") as application:
        application.execute("UPDATE orders SET status = 'late' WHERE tenant_id = 25")
    world.run(move_id, State.SWITCHED)
    world.cut_over(move_id, Direction.BACK)
    assert world.fetch("s1", "SELECT DISTINCT status FROM orders WHERE tenant_id = 25") == [("late",)]


def test_a_schema_that_differs_between_the_sides_is_refused_by_name(world: World) -> None:
    move_id = ready(world)
    with world.connect("s1") as source:
        source.execute("ALTER TABLE orders ADD COLUMN only_here text")
    with pytest.raises(Refused, match="orders has only on s1: column only_here"):
        world.run(move_id, State.READY)
    assert world.move(move_id).state in (State.READY, State.VERIFYING)


def pretend_another_history(world: World, move_id: str, server: str) -> None:
    """As after a failover: the recorded timeline is not the one that the server has now."""
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute(
            "UPDATE shardmove_catalog.move SET identities = jsonb_set(identities, %s, '7') WHERE id = %s",
            ([server, "timeline"], move_id),
        )


@pytest.mark.parametrize("server", ["s1", "s2", "(catalog)"])
def test_a_changed_server_is_compared_before_anything_goes_on(world: World, server: str) -> None:
    move_id = ready(world)
    pretend_another_history(world, move_id, server)
    with pytest.raises(ServerChanged):
        world.cut_over(move_id)
    world.run(move_id, State.READY)
    world.cut_over(move_id)
    assert world.move(move_id).state is State.SWITCHED


def test_a_changed_server_that_lost_rows_is_not_gone_on_with(world: World) -> None:
    move_id = ready(world)
    pretend_another_history(world, move_id, "s1")
    with world.connect("s1") as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("SELECT set_config('shardmove.mirror', %s, false)", (move_id,))  # unseen, as a lost commit
        connection.execute("UPDATE tenants SET name = 'older' WHERE tenant_id = 25")
    with pytest.raises(DifferencesFound, match="tenants"):
        world.run(move_id, State.READY)
    with pytest.raises(ServerChanged):
        world.cut_over(move_id)


def test_a_catalog_that_forgot_a_flip_opens_nothing(world: World) -> None:
    move_id = ready(world)
    world.cut_over(move_id)
    with psycopg.connect(world.dsns["cat"], autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "UPDATE shardmove_catalog.attempt SET outcome = 'open', decided_at = NULL WHERE move_id = %s", (move_id,)
        )
        connection.execute("UPDATE shardmove_catalog.move SET state = 'ready' WHERE id = %s", (move_id,))
    with pytest.raises(ServerChanged, match="has lost its last commits"):
        world.cut_over(move_id)
    with world.connect("s1") as forgotten, pytest.raises(psycopg.errors.SerializationFailure):
        forgotten.execute("UPDATE tenants SET name = 'stray' WHERE tenant_id = 25")


def test_a_move_whose_target_is_lost_is_given_up_on_the_source_alone(world: World, servers: Cluster) -> None:
    move_id = ready(world)
    servers["s2"].stop("immediate")
    with pytest.raises(Unreachable):
        world.roll_back(move_id)
    with world.hold(move_id, target_is_lost=True) as held:
        ending.roll_back_without_target(held)
    assert world.move(move_id).state is State.ROLLED_BACK
    assert world.leftovers("s1", move_id) == []
    servers["s2"].start()
    with world.connect("s2") as returned, pytest.raises(psycopg.errors.SerializationFailure):
        returned.execute("UPDATE tenants SET name = 'stray' WHERE tenant_id = 25")


# --- DDL on moving tables, in every state


Statements = Sequence[str]
OWNER, MIRROR, BOTH = "owner", "mirror", "both"
STATES = [State.COPYING, State.READY, State.SWITCHED]


class Stopped(BaseException):
    """The end of the coordinator, between two batches."""


@dataclass(frozen=True, slots=True)
class Moving:
    """A move of partitioned tables in a state, and who owns its range there."""

    world: World
    move_id: str
    state: State
    role: str = ""

    @property
    def owner(self) -> str:
        return "s2" if self.state is State.SWITCHED else "s1"

    @property
    def mirror(self) -> str:
        return "s1" if self.state is State.SWITCHED else "s2"

    def on(self, side: str) -> list[str]:
        return {OWNER: [self.owner], MIRROR: [self.mirror], BOTH: ["s1", "s2"]}[side]

    def apply(self, side: str, *statements: str) -> None:
        """Runs them as an application does, each in a transaction of its own."""
        for shard in self.on(side):
            with self.world.connect(shard) as connection:
                for statement in statements:
                    connection.execute(statement.format(move=self.move_id, role=self.role).encode())

    def cut_over(self) -> None:
        """To the mirror, whichever side that is."""
        self.world.cut_over(self.move_id, Direction.BACK if self.state is State.SWITCHED else Direction.FORWARD)

    def run(self) -> None:
        self.world.run(self.move_id, State.SWITCHED if self.state is State.SWITCHED else State.READY)

    def mirroring(self) -> Mirror:
        direction = Direction.BACK if self.state is State.SWITCHED else Direction.FORWARD
        return Mirror.open(self.world.move(self.move_id), direction, None, self.world.config.shards)

    def run_and_cut_over(self) -> None:
        self.run()
        self.cut_over()

    def rows(self, shard: str) -> list[str]:
        """Every row of the range there, told by itself: no code of the product reads them."""
        found: list[str] = []
        for table in shop.KEY_COLUMNS:
            query = f"SELECT '{table} ' || to_jsonb(t)::text FROM {table} AS t WHERE tenant_id >= 20"
            found += [row[0] for row in self.world.fetch(shard, query)]
        return sorted(found)

    def differences(self) -> list[str]:
        return sorted(set(self.rows("s1")) ^ set(self.rows("s2")))


Begin = Callable[[State], Moving]


@pytest.fixture
def begin(make_partitioned: Callable[..., World]) -> Begin:
    """`begin(State.COPYING)`: a move of partitioned tables that was brought there, and left."""

    def brought(state: State) -> Moving:
        world = make_partitioned(rows_a_tenant=10, limits={"batch_rows_max": 40})
        move_id = world.split(at=20)
        if state is State.COPYING:
            stop_after(world, move_id, batches=4)
        else:
            world.run(move_id, State.READY)
        if state is State.SWITCHED:
            world.cut_over(move_id)
        assert world.move(move_id).state is state
        return Moving(world, move_id, state)

    return brought


def stop_after(world: World, move_id: str, *, batches: int) -> None:
    seen: list[str] = []

    def stop(point: str) -> None:
        seen.append(point)
        if len(seen) == batches:
            raise Stopped

    with points.armed("copying.after_batch", stop), pytest.raises(Stopped):
        world.run(move_id, State.READY)


def parents_of(tenant: int) -> Statements:
    return (
        f"INSERT INTO tenants (tenant_id, name) VALUES ({tenant}, 'late')",
        f"INSERT INTO customers (tenant_id, customer_id, email, name) VALUES ({tenant}, 1, 'l@late', 'Late')",
    )


def order_of(tenant: int) -> str:
    return f"(tenant_id, order_id, customer_id, amount) VALUES ({tenant}, 100001, 1, 5)"


def untied(detached: str) -> str:
    """Else its foreign key would tie rows that stay to rows that move."""
    return f"ALTER TABLE {detached} DROP CONSTRAINT order_items_tenant_id_order_id_fkey"


LATE = "CREATE TABLE late (LIKE orders INCLUDING DEFAULTS)"
ATTACH_LATE = "ALTER TABLE orders ATTACH PARTITION late FOR VALUES FROM (100) TO (200)"
UNDO_LATE = "ALTER TABLE orders DETACH PARTITION late; DROP TABLE late"
UNSEEN_ITEMS = (
    "ALTER TABLE order_items DETACH PARTITION items_0",  # its clones of our triggers go with it
    "UPDATE items_0 SET sku = 'unseen', version = version + 1 WHERE tenant_id >= 20",
    "DELETE FROM items_0 WHERE tenant_id = 31",
    "ALTER TABLE order_items ATTACH PARTITION items_0 FOR VALUES WITH (MODULUS 4, REMAINDER 0)",
)
MENDED: Mapping[str, Sequence[tuple[str, Statements]]] = {
    "add a column": [
        (BOTH, ["ALTER TABLE orders ADD COLUMN extra text DEFAULT 'old'"]),
        (OWNER, ["UPDATE orders SET extra = 'x' WHERE tenant_id IN (25, 30)"]),
    ],
    "alter a type, using": [
        (BOTH, ["ALTER TABLE orders ALTER COLUMN status TYPE varchar(20) USING upper(status)"]),
        (OWNER, ["UPDATE orders SET status = 'late' WHERE tenant_id = 25"]),
    ],
    "truncate a partition unseen": [
        (
            OWNER,
            [
                "ALTER TABLE items_0 DISABLE TRIGGER shardmove_{move}_truncate",
                "TRUNCATE items_0",
                "ALTER TABLE items_0 ENABLE ALWAYS TRIGGER shardmove_{move}_truncate",
            ],
        )
    ],
    "writes while triggers are disabled": [
        (
            OWNER,
            [
                "ALTER TABLE orders DISABLE TRIGGER USER",
                "UPDATE orders SET note = 'unseen' WHERE tenant_id = 25",
                "ALTER TABLE orders ENABLE TRIGGER USER",
            ],
        )
    ],
    "writes while one trigger of one partition is disabled": [
        (
            OWNER,
            [
                "ALTER TABLE orders_30_a DISABLE TRIGGER shardmove_{move}_update",
                "UPDATE orders SET note = 'unseen' WHERE tenant_id >= 30",
                "ALTER TABLE orders_30_a ENABLE ALWAYS TRIGGER shardmove_{move}_update",
            ],
        )
    ],
    "detach, write, attach on the owner": [(OWNER, UNSEEN_ITEMS)],
    "detach, write, attach on the mirror": [(MIRROR, UNSEEN_ITEMS)],
    "attach a partition with rows": [
        (OWNER, [*parents_of(150), LATE, f"INSERT INTO late {order_of(150)}", ATTACH_LATE]),
        (MIRROR, [LATE, ATTACH_LATE]),
    ],
    "detach a partition with rows": [(BOTH, ["ALTER TABLE order_items DETACH PARTITION items_1", untied("items_1")])],
    "detach concurrently": [
        (BOTH, ["ALTER TABLE order_items DETACH PARTITION items_2 CONCURRENTLY", untied("items_2")])
    ],
    "drop a partition": [(BOTH, ["DROP TABLE items_3"])],
    "create a partition": [
        (BOTH, ["CREATE TABLE later PARTITION OF orders FOR VALUES FROM (200) TO (300)"]),
        (OWNER, [*parents_of(250), f"INSERT INTO orders {order_of(250)}"]),
    ],
    "add a check": [(BOTH, ["ALTER TABLE orders ADD CONSTRAINT positive CHECK (amount > 0)"])],
    "drop a foreign key": [(BOTH, ["ALTER TABLE order_items DROP CONSTRAINT order_items_tenant_id_order_id_fkey"])],
    "row security": [(BOTH, ["ALTER TABLE orders ENABLE ROW LEVEL SECURITY"])],
    "a trigger of the application": [(BOTH, ["ALTER TABLE orders DISABLE TRIGGER touch"])],
    "drop a column": [(BOTH, ["ALTER TABLE orders DROP COLUMN note"])],
}


UNNOTICED = [
    "truncate a partition unseen",
    "writes while one trigger of one partition is disabled",
    "detach, write, attach on the owner",
    "detach, write, attach on the mirror",
    "attach a partition with rows",
]


def make(change: str, moving: Moving) -> list[str]:
    """Makes the change; the owner's rows after it."""
    print(change)
    for side, statements in MENDED[change]:
        moving.apply(side, *statements)
    return moving.rows(moving.owner)


@pytest.mark.parametrize("state", [State.READY, State.SWITCHED])
def test_a_change_stops_the_cutover_and_is_compared_and_mended(begin: Begin, state: State) -> None:
    """All of them on one move, one after the other."""
    moving = begin(state)
    for change in MENDED:
        written = make(change, moving)
        with pytest.raises(SchemaDrift, match="changed by DDL"):
            moving.cut_over()
        moving.run()
        assert moving.rows(moving.mirror) == written
    written = moving.rows(moving.owner)
    moving.cut_over()
    assert moving.rows(moving.mirror) == written


@pytest.mark.parametrize(
    "change", [*UNNOTICED, "add a column", "alter a type, using", "drop a partition", "create a partition"]
)
def test_a_change_while_rows_are_copied_is_compared_and_mended(begin: Begin, change: str) -> None:
    moving = begin(State.COPYING)
    written = make(change, moving)
    moving.run_and_cut_over()
    assert moving.rows("s2") == written


@pytest.mark.parametrize("change", UNNOTICED)
def test_without_the_fingerprint_a_change_is_lost(mechanism: Mechanism, begin: Begin, change: str) -> None:
    moving = begin(State.READY)
    mechanism.replace(drift, "check_fingerprint", lambda *_, **__: None)
    mechanism.replace(drift, "is_drifted", lambda *_: False)
    mechanism.replace(triggers, "is_armed", lambda *_: True)
    written = make(change, moving)
    if mechanism.on:
        with pytest.raises(SchemaDrift):
            moving.cut_over()
        moving.run()
    moving.cut_over()
    mechanism.judge(sorted(set(moving.rows(moving.mirror)) ^ set(written)))


@dataclass(frozen=True, slots=True)
class OneSided:
    """A change on one side that stops the move with these words until it is undone."""

    change: str
    undo: str
    says: str


ONE_SIDED = [
    OneSided("ALTER TABLE orders ADD COLUMN extra text", "ALTER TABLE orders DROP COLUMN extra", "column extra text"),
    OneSided(
        "ALTER TABLE orders ALTER COLUMN status TYPE varchar(20)",
        "ALTER TABLE orders ALTER COLUMN status TYPE text",
        r"column status character varying\(20\)",
    ),
    OneSided("ALTER TABLE orders RENAME note TO remark", "ALTER TABLE orders RENAME remark TO note", "column remark"),
    OneSided("ALTER TABLE tenants RENAME TO clients", "ALTER TABLE clients RENAME TO tenants", "public.tenants"),
    OneSided(
        "CREATE UNIQUE INDEX once ON customers (tenant_id, customer_id, email)", "DROP INDEX once", "unique index"
    ),
    OneSided(
        "ALTER TABLE orders ADD CONSTRAINT positive CHECK (amount > 0)",
        "ALTER TABLE orders DROP CONSTRAINT positive",
        r"constraint CHECK \(\(amount > ",
    ),
    OneSided(
        "CREATE TABLE late PARTITION OF orders FOR VALUES FROM (100) TO (200)",
        UNDO_LATE,
        r"partition / FOR VALUES FROM \('100'\) TO \('200'\)",
    ),
    OneSided(f"{LATE}; {ATTACH_LATE}", UNDO_LATE, r"partition / FOR VALUES FROM \('100'\) TO \('200'\)"),
    OneSided(
        "ALTER TABLE order_items DETACH PARTITION items_1",
        "ALTER TABLE order_items ATTACH PARTITION items_1 FOR VALUES WITH (MODULUS 4, REMAINDER 1)",
        "partition / FOR VALUES WITH",
    ),
    OneSided(
        "CREATE TABLE base (LIKE customers); ALTER TABLE customers INHERIT base",
        "ALTER TABLE customers NO INHERIT base; DROP TABLE base",
        "parent",
    ),
    OneSided("ALTER TABLE tenant_totals SET UNLOGGED", "ALTER TABLE tenant_totals SET LOGGED", "unlogged"),
    OneSided(
        "CREATE RULE quiet AS ON DELETE TO orders WHERE false DO INSTEAD NOTHING;"
        " ALTER TABLE orders ENABLE ALWAYS RULE quiet",
        "DROP RULE quiet ON orders",
        "rule quiet of orders .* fires for replicas",
    ),
    OneSided(
        "ALTER TABLE orders ENABLE ALWAYS TRIGGER touch",
        "ALTER TABLE orders ENABLE TRIGGER touch",
        "fires for replicas",
    ),
]


@pytest.mark.parametrize("side", [OWNER, MIRROR])
@pytest.mark.parametrize("state", STATES)
def test_a_change_on_one_side_stops_the_move_by_name_until_it_is_undone(begin: Begin, state: State, side: str) -> None:
    """All of them on one move, one after the other: none leaves anything behind."""
    moving = begin(state)
    for each in ONE_SIDED:
        moving.apply(side, each.change)
        with pytest.raises((Refused, SchemaDrift), match=each.says):
            moving.run_and_cut_over()
        moving.apply(side, each.undo)
        if state is not State.COPYING:
            moving.run()
    moving.run()
    written = moving.rows(moving.owner)
    moving.cut_over()
    assert moving.rows(moving.mirror) == written


@pytest.mark.parametrize("state", STATES)
def test_truncate_is_refused_on_every_member(begin: Begin, state: State) -> None:
    moving = begin(state)
    for table in ("order_items", "items_0", "tenant_totals"):
        for side in (OWNER, MIRROR):
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="TRUNCATE of"):
                moving.apply(side, f"TRUNCATE {table}")
    moving.run()
    moving.cut_over()
    assert moving.differences() == []


FURIOUS = ("ALTER TYPE mood ADD VALUE 'furious'", "UPDATE orders SET mood = 'furious' WHERE tenant_id = 25")


@pytest.mark.parametrize("state", STATES)
def test_a_label_that_only_the_owner_knows_is_the_error(begin: Begin, state: State) -> None:
    """The mirror, or a batch, fails on it: the error says that the types differ, and not only what the server said."""
    moving = begin(state)
    moving.apply(BOTH, "CREATE TYPE mood AS ENUM ('calm')", "ALTER TABLE orders ADD COLUMN mood mood")
    if state is not State.COPYING:
        moving.run()
    moving.apply(OWNER, *FURIOUS)
    with pytest.raises((SchemaDrift, Refused), match=r"enum public\.mood of 'calm', 'furious'"):
        moving.run_and_cut_over()
    moving.apply(MIRROR, "ALTER TYPE mood ADD VALUE 'furious'")
    written = moving.rows(moving.owner)
    moving.run_and_cut_over()
    assert moving.rows(moving.mirror) == written


def test_a_step_that_fails_on_a_label_says_that_the_types_differ(begin: Begin) -> None:
    """Nothing looks at types while rows are copied: there the failure itself is explained, with what failed."""
    moving = begin(State.READY)
    moving.apply(BOTH, "CREATE TYPE mood AS ENUM ('calm')", "ALTER TABLE orders ADD COLUMN mood mood")
    moving.run()
    with moving.world.hold(moving.move_id) as held:
        moving.apply(OWNER, *FURIOUS)
        with pytest.raises(SchemaDrift, match=r"enum public\.mood.*it stopped at: .*22P02") as raised, explained(held):
            compare_in_full(held)
    assert raised.value.__cause__ is not None


BUMP = """
    CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
    BEGIN
        UPDATE tenants SET version = version + 1 WHERE tenant_id = NEW.tenant_id;
        RETURN NULL;
    END $$
"""
ARM_BUMP = "ALTER TABLE orders ENABLE ALWAYS TRIGGER bump"


@pytest.mark.parametrize("state", [State.READY, State.SWITCHED])
def test_a_trigger_that_begins_to_fire_for_the_mirror_is_noticed_and_its_traces_mended(
    mechanism: Mechanism, begin: Begin, state: State
) -> None:
    moving = begin(state)
    moving.apply(
        BOTH, BUMP, "CREATE TRIGGER bump AFTER UPDATE OR INSERT ON orders FOR EACH ROW EXECUTE FUNCTION bump()"
    )
    moving.run()
    mechanism.replace(drift, "check_fingerprint", lambda *_, **__: None)
    mechanism.replace(drift, "is_drifted", lambda *_: False)
    moving.apply(MIRROR, ARM_BUMP)
    moving.apply(OWNER, "UPDATE orders SET note = 'seen' WHERE tenant_id = 25")
    with moving.mirroring() as mirror:
        mirror.until_empty()
    written = moving.rows(moving.owner)
    if mechanism.on:
        with pytest.raises(SchemaDrift):
            moving.cut_over()
        with pytest.raises(Refused, match="fires for replicas"):
            moving.run()
        moving.apply(MIRROR, "ALTER TABLE orders ENABLE TRIGGER bump")
        moving.run()
    moving.cut_over()
    mechanism.judge(sorted(set(moving.rows(moving.mirror)) ^ set(written)))


# --- what our role may do


@pytest.fixture
def plain_role(make_partitioned: Callable[..., World]) -> Moving:
    """A move by a role that owns the tables and is no superuser, `ready`."""
    world = make_partitioned(rows_a_tenant=10)
    role = make_role(world.shards, "mover")
    for shard in world.shards:
        with world.connect(shard) as connection:
            name = sql.Identifier(role)
            connection.execute(sql.SQL("GRANT SET ON PARAMETER session_replication_role TO {}").format(name))
            connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
                sql.Identifier(connection.info.dbname), name))  # fmt: skip
            connection.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(name))
            for (table,) in connection.execute(TABLES_HERE).fetchall():
                connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(table), name))
    world.config = replace(
        world.config, shards={shard: make_conninfo(dsn, user=role) for shard, dsn in world.shards.items()}
    )
    world.catalog.apply(world.config)
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    return Moving(world, move_id, State.READY, role)


TABLES_HERE = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"


@pytest.mark.parametrize("side", [OWNER, MIRROR])
@pytest.mark.parametrize(
    ("change", "undo", "says"),
    [
        (
            "REVOKE SET ON PARAMETER session_replication_role FROM {role}",
            "GRANT SET ON PARAMETER session_replication_role TO {role}",
            "session_replication_role",
        ),
        ("ALTER TABLE tenants OWNER TO postgres", "ALTER TABLE tenants OWNER TO {role}", "tenants"),
    ],
)
def test_a_right_that_our_role_loses_stops_the_cutover(
    plain_role: Moving, side: str, change: str, undo: str, says: str
) -> None:
    plain_role.apply(side, change)
    plain_role.apply(OWNER, "UPDATE tenants SET name = 'new' WHERE tenant_id = 25")
    with pytest.raises(ShardmoveError, match=says):
        plain_role.cut_over()
    plain_role.apply(side, undo)
    written = plain_role.rows("s1")
    plain_role.run_and_cut_over()
    assert plain_role.rows("s2") == written


@pytest.mark.parametrize("side", [OWNER, MIRROR])
def test_policies_that_bind_our_role_are_refused_and_hide_no_row_from_the_mirror(plain_role: Moving, side: str) -> None:
    """A row that we did not see would be one that the mirror takes for deleted: our sessions rather fail."""
    for hides in ("ENABLE", "FORCE"):
        plain_role.apply(side, f"ALTER TABLE tenants {hides} ROW LEVEL SECURITY")
    plain_role.apply(OWNER, "UPDATE tenants SET name = 'new' WHERE tenant_id = 25")
    written, before = plain_role.rows("s1"), plain_role.rows("s2")
    with pytest.raises(SchemaDrift):
        plain_role.cut_over()
    with pytest.raises(Refused, match=r"row.(level )?security"):
        plain_role.run()
    assert plain_role.rows("s2") == before
    for shows in ("NO FORCE", "DISABLE"):
        plain_role.apply(side, f"ALTER TABLE tenants {shows} ROW LEVEL SECURITY")
    plain_role.run_and_cut_over()
    assert plain_role.rows("s2") == written


# --- a server that crashes


@pytest.mark.parametrize("shard", ["s1", "s2"])
def test_a_crash_of_a_shard_while_partitions_are_copied_loses_nothing(
    make_partitioned: Callable[..., World], servers: Cluster, shard: str
) -> None:
    world = make_partitioned(limits={"batch_rows_max": 50})
    move_id = world.split(at=20)
    batches: list[str] = []

    def crash(point: str) -> None:
        batches.append(point)
        if len(batches) in (3, 9):
            servers[shard].restart("immediate")

    with world.writers() as fleet:
        with points.armed("copying.after_batch", crash):
            for _ in range(10):
                with suppress(Unreachable):
                    world.run(move_id, State.READY)
                    break
        assert len(batches) >= 9
        assert world.move(move_id).state is State.READY
        world.cut_over(move_id)
        seen = fleet.acknowledged
        until(lambda: fleet.acknowledged > seen)
    report = world.check()
    assert report.ok, str(report)
