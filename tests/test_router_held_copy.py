"""A COPY that is not its transaction's first write, in a range that is being held: the transaction stays whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest

from shardmove.domain import points
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.moves import State
from tests.support.engine import until
from tests.support.router import Router, Routers
from tests.support.world import World

TENANT = 30


def await_hold(router: Router) -> None:
    until(
        lambda: any(row["held"] == "yes" for row in router.show("ROUTES")), lambda: router.show("ROUTES"), timeout_s=90
    )


@pytest.mark.parametrize("pooling", ["session", "transaction"])
def test_a_copy_during_a_hold_keeps_what_its_transaction_wrote(
    make_world: Callable[..., World], routers: Routers, pooling: str
) -> None:
    """The range is held after the UPDATE and before the COPY; neither may be left out of what is committed."""
    world = make_world(
        limits={"max_stall_ms": 200_000}
    )  # a transaction that wrote is no reason to wait before the hold
    router = routers.start(world.write_config(), pooling=pooling)
    move_id = world.split(at=20)
    world.run(move_id, State.READY)
    reached: list[str] = []
    errors: list[psycopg.Error] = []
    with psycopg.connect(router.dsn(), autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("UPDATE tenants SET name = 'written first' WHERE tenant_id = %s", (TENANT,))

        def copy_and_commit(_point: str) -> None:
            points.disarm("cutover.after_hold")
            reached.append(_point)
            await_hold(router)
            try:
                with connection.cursor() as cursor, cursor.copy("COPY tenants (tenant_id, name) FROM STDIN") as copy:
                    copy.write_row((TENANT + 1000, "copied"))
                connection.execute("COMMIT")
            except psycopg.Error as error:
                errors.append(error)

        with points.armed("cutover.after_hold", copy_and_commit), suppress(ShardmoveError):
            world.cut_over(move_id)
        assert reached
        assert not errors, errors
        rows = connection.execute(
            "SELECT name FROM tenants WHERE tenant_id IN (%s, %s) ORDER BY 1", (TENANT, TENANT + 1000)
        ).fetchall()
    world.catalog.close()
    assert [name for (name,) in rows] == ["copied", "written first"]
