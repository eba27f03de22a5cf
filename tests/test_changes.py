"""What may change under a move: columns, servers, the catalog's own server. Noticed, compared, then carried on with."""

from __future__ import annotations

import psycopg
import pytest

from shardmove.coordinator import ending
from shardmove.domain.errors import DifferencesFound, Refused, SchemaDrift, ServerChanged, Unreachable
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, State
from shardmove.postgres.embedded import Cluster
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
    with pytest.raises(Refused, match="orders is not the same"):
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
