"""Dual reads (phase 3) and reads of the target (phase 4), through a router, beside real moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from router.comparing import is_comparable
from shardmove.coordinator import phases
from shardmove.domain.moves import State
from shardmove.postgres.connect import Connection
from tests.support import engine
from tests.support.replacing import replaced
from tests.support.router import Router, Routers
from tests.support.world import World

BOUND_S: Final = 150.0
PATIENCE_S: Final = 30.0
"""For targets that are to answer, however busy the machine is."""
await_true = partial(engine.until, timeout_s=BOUND_S)
TENANT: Final = 25
"""Of the moving range: tenants from 20 on go from s1 to s2."""
READ: Final = "SELECT * FROM customers WHERE tenant_id = %s"


def enter(world: World, move_id: str, phase: int, **words: Any) -> None:
    with world.hold(move_id) as held:
        phases.change_phase(held, phase, force=True, **words)


@pytest.fixture
def move_id(world: World) -> str:
    """A move that is ready."""
    planned = world.split(at=20)
    world.run(planned, State.READY)
    return planned


def stats(router: Router) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in router.show("STATS"):
        values = list(row.values())
        if len(values) == 2:
            found[str(values[0])] = int(float(values[1]))
        else:
            found |= {name: int(value) for name, value in row.items() if str(value).isdigit()}
    return found


def recorded(world: World) -> list[tuple[Any, ...]]:
    with world.connect("cat") as connection:
        return connection.execute(
            "SELECT table_name, key, source_rows, target_rows FROM shardmove_catalog.difference"
        ).fetchall()


def counted(world: World, move_id: str) -> tuple[int, int]:
    traffic = world.catalog.traffic(move_id)
    return traffic.compared, traffic.differing


# --- phase 3


def test_reads_are_compared_and_under_writers_nothing_differs(world: World, routers: Routers, move_id: str) -> None:
    router = routers.start(world.write_config())
    enter(world, move_id, 3, sample=1.0)
    with psycopg.connect(router.dsn(), autocommit=True) as client, world.attended(), world.writers():
        simple = psycopg.ClientCursor(client)
        deadline = time.monotonic() + BOUND_S
        while counted(world, move_id)[0] < 50:
            assert time.monotonic() < deadline, (stats(router), counted(world, move_id))
            for tenant in range(20, 40):
                client.execute("SELECT * FROM orders WHERE tenant_id = %s", (tenant,)).fetchall()
                simple.execute("SELECT sum(amount), count(*) FROM orders WHERE tenant_id = %s", (tenant,)).fetchall()
                client.execute("SELECT * FROM orders WHERE tenant_id = %s", (tenant - 20,)).fetchall()
        assert counted(world, move_id)[1] == 0, recorded(world)


def test_a_row_that_differs_is_recorded_with_both_sides(world: World, routers: Routers, move_id: str) -> None:
    router = routers.start(world.write_config())
    with world.connect("s2") as saboteur:
        saboteur.execute("SELECT set_config('shardmove.mirror', %s, false)", (move_id,))
        saboteur.execute("UPDATE tenants SET name = 'somebody else' WHERE tenant_id = %s", (TENANT,))
    enter(world, move_id, 3, sample=1.0)
    with psycopg.connect(router.dsn(), autocommit=True) as client:

        def is_seen() -> bool:
            client.execute("SELECT tenant_id, name FROM tenants WHERE tenant_id = %s", (TENANT,)).fetchall()
            return bool(recorded(world))

        await_true(is_seen, lambda: (stats(router), router.said))
        name = client.execute("SELECT name FROM tenants WHERE tenant_id = %s", (TENANT,)).fetchone()
        assert name is not None
    table, key, source_rows, target_rows = recorded(world)[0]
    assert "tenants" in table
    assert key == str(TENANT)
    assert source_rows == f"({TENANT}, {name[0]})"
    assert target_rows == f"({TENANT}, somebody else)"
    await_true(lambda: counted(world, move_id)[1] > 0, lambda: counted(world, move_id))


def test_what_is_not_compared(world: World, routers: Routers, move_id: str) -> None:
    router = routers.start(world.write_config())
    enter(world, move_id, 3, sample=1.0)
    with psycopg.connect(router.dsn(), autocommit=True) as client:
        client.execute("SELECT * FROM orders WHERE tenant_id = 25 LIMIT 1")
        client.execute("SELECT *, now() FROM orders WHERE tenant_id = 25")
        client.execute("SELECT * FROM orders WHERE tenant_id = 5")
        client.execute("UPDATE tenants SET name = name WHERE tenant_id = 25")
        client.execute("SELECT * FROM tenants WHERE tenant_id = 25 FOR UPDATE")
        with client.transaction():
            client.execute("SELECT * FROM orders WHERE tenant_id = 25")
        client.execute("SELECT * FROM tenants WHERE tenant_id = 25")
        await_true(lambda: counted(world, move_id)[0] > 0, lambda: router.said)
    assert counted(world, move_id) == (1, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT a FROM t WHERE k = $1", True),
        ("SELECT upper(a), count(*) FROM t WHERE k = $1 AND a IN ('LIMIT', 'x') GROUP BY 1", True),
        ('SELECT "limit" FROM t WHERE k = 1', True),
        ("SELECT a FROM t WHERE k = 1 LIMIT 1", False),
        ("SELECT DISTINCT ON (a) a FROM t WHERE k = 1", False),
        ("SELECT DISTINCT a FROM t WHERE k = 1", True),
        ("SELECT row_number() OVER () FROM t WHERE k = 1", False),
        ("SELECT random() FROM t WHERE k = 1", False),
        ("SELECT current_timestamp FROM t WHERE k = 1", False),
        ("SELECT ours(a) FROM t WHERE k = 1", False),
        ("SELECT ours.upper(a) FROM t WHERE k = 1", False),
        ("SELECT pg_catalog.upper(a) FROM t WHERE k = 1", True),
        ('SELECT "ours"(a) FROM t WHERE k = 1', False),
        ('SELECT "random"() FROM t WHERE k = 1', False),
        ("SELECT array_agg(a) FROM t WHERE k = 1", False),
        ("SELECT ctid FROM t WHERE k = 1", False),
    ],
)
def test_statements_that_can_be_compared(text: str, expected: bool) -> None:
    assert is_comparable(text.encode()) is expected


# --- phase 4

UNMIRRORED: Final = """
    from router.service import Router
    Router.acknowledges_late = lambda self, moves: False
"""


@pytest.mark.parametrize("pooling", ["session", "transaction"])
@pytest.mark.parametrize("is_mirrored_first", [True, False])
def test_a_client_reads_its_own_writes_at_the_target(
    world: World, routers: Routers, move_id: str, tmp_path: Path, is_mirrored_first: bool, pooling: str
) -> None:
    with replaced(tmp_path, "" if is_mirrored_first else UNMIRRORED):
        router = routers.start(world.write_config(), pooling=pooling, target_patience_s=PATIENCE_S)
    enter(world, move_id, 4, share=1.0)
    stale: list[str] = []
    at_target: list[int] = []

    def use(tenant: int) -> None:
        with psycopg.connect(router.dsn(), autocommit=True) as client:
            for number in range(40):
                name = f"{tenant} {number}"
                if number % 2:
                    client.execute("UPDATE tenants SET name = %s WHERE tenant_id = %s", (name, tenant))
                else:
                    with client.transaction():
                        client.execute("SELECT FROM tenants WHERE tenant_id = %s", (tenant,))
                        client.execute("UPDATE tenants SET name = %s WHERE tenant_id = %s", (name, tenant))
                row = client.execute("SELECT name FROM tenants WHERE tenant_id = %s", (tenant,)).fetchone()
                if row != (name,):
                    stale.append(f"{row} instead of {name}")
            at_target.append(reads_of_target(world))

    with nullcontext() if is_mirrored_first else unwritten(world), ThreadPoolExecutor() as threads:
        list(threads.map(use, (21, 22, 23)))
    assert world.catalog.traffic(move_id).phase == 4
    assert max(at_target) > 0
    if is_mirrored_first:
        assert stale == []
    else:
        assert stale, "commits were acknowledged at once, and nobody read what was there before"


@contextmanager
def unwritten(world: World) -> Iterator[None]:
    """The mirror waits for rows of the target, which can be read."""
    with world.connect("s2") as blocker:
        blocker.execute("BEGIN")
        blocker.execute("SELECT FROM tenants FOR UPDATE")
        yield
        blocker.execute("ROLLBACK")


def reads_of_target(world: World) -> int:
    """Sessions of routers on the target that read tenants."""
    statement = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT name FROM%'"
    )
    return int(world.fetch("s2", statement)[0][0])


def test_a_share_of_the_sessions_reads_at_the_target(world: World, routers: Routers, move_id: str) -> None:
    router = routers.start(world.write_config(), target_patience_s=PATIENCE_S)
    mark(world, move_id)
    enter(world, move_id, 4, share=0.5)
    found = []
    for _ in range(40):
        with psycopg.connect(router.dsn(), autocommit=True) as client:
            first, second = name_of(client), name_of(client)
            assert first == second
            found.append(first)
            with client.transaction():
                assert name_of(client) != "the target's"
            client.execute("UPDATE tenants SET plan = plan WHERE tenant_id = 5")
    assert 5 < found.count("the target's") < 35


def mark(world: World, move_id: str) -> None:
    """Makes the target tell itself apart."""
    with world.connect("s2") as saboteur:
        saboteur.execute("SELECT set_config('shardmove.mirror', %s, false)", (move_id,))
        saboteur.execute("UPDATE tenants SET name = 'the target''s' WHERE tenant_id = %s", (TENANT,))


def name_of(client: psycopg.Connection[Any]) -> str:
    row = client.execute("SELECT name FROM tenants WHERE tenant_id = %s", (TENANT,)).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize("way", ["slow", "closed", "in the middle"])
def test_a_target_that_does_not_answer_ends_phase_4_and_the_read_goes_to_the_source(
    world: World, routers: Routers, move_id: str, way: str
) -> None:
    router = routers.start(world.write_config(), target_patience_s=2.0)
    mark(world, move_id)
    with psycopg.connect(router.dsn(), autocommit=True) as client, world.connect("s2") as blocker:
        await_true(partial(reads_target, world, move_id, client), lambda: router.said)
        if way == "closed":
            other = world.connect("s2")
            let_in(world, False)
            end_routers(other)
        else:
            blocker.execute("BEGIN")
            blocker.execute("LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE")
        if way == "in the middle":
            ending = threading.Timer(0.3, end_routers, [world.connect("s2")])
            ending.start()
        assert name_of(client) != "the target's"
        if way == "in the middle":
            ending.join()
        await_true(lambda: world.catalog.traffic(move_id).phase == 3, lambda: router.said)
        assert name_of(client) != "the target's"
        if way == "closed":
            let_in(world, True)


def reads_target(world: World, move_id: str, client: psycopg.Connection[Any]) -> bool:
    """In phase 4, which has ended already where the target was slow to answer the read before."""
    if world.catalog.traffic(move_id).phase != 4:
        enter(world, move_id, 4, share=1.0)
    return name_of(client) == "the target's"


def let_in(world: World, is_open: bool) -> None:
    """Whether the target's database takes new connections."""
    with psycopg.connect(make_conninfo(world.dsns["s2"], dbname="postgres"), autocommit=True) as connection:
        dbname = sql.Identifier(str(conninfo_to_dict(world.dsns["s2"])["dbname"]))
        connection.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(dbname, sql.Literal(is_open)))


def end_routers(connection: Connection) -> None:
    """Ends the routers' sessions there."""
    with connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND application_name = 'shardmove router' AND query LIKE 'SELECT name%'"
        )
