"""The checklist's lines about servers and rights: each is seen to fail, and to pass once its advice is followed.

A story is a generator. It brings about what a line is there for, yields how the line is looked at, gets the line that
was found, and follows its advice to the letter; then the line is looked at once more.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.catalog.store import Catalog
from shardmove.cli.exits import Exit
from shardmove.config import Config
from shardmove.coordinator import ending, operating
from shardmove.coordinator.checks import servers as servers_checks
from shardmove.coordinator.checks.privileges import PRIVILEGES, SEES_SESSIONS
from shardmove.coordinator.checks.servers import ANSWERS, SERVERS
from shardmove.coordinator.checks.site import Note
from shardmove.coordinator.checks.surroundings import SURROUNDINGS
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import hold
from shardmove.coordinator.preflight import Line
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.coordinator.shards import grants
from shardmove.domain.errors import Refused
from shardmove.domain.moves import Direction, State
from shardmove.postgres.embedded import LOOPBACK, Cluster
from shardmove.postgres.introspect import Table
from shardmove.protocol.replica import become_replica, may_be_replica
from tests.support.engine import until
from tests.support.preflight import ORDERS, MakePlan, Plan, line
from tests.support.servers import Databases, connect
from tests.support.shell import Shell
from tests.support.world import World
from workers.executors import InlineExecutor

OWN_SETTINGS: Final = {
    "fsync": "off",
    "wal_level": "logical",
    "autovacuum": "off",  # its workers come and go, and a story counts the sessions that there are
    "autovacuum_naptime": "1s",
    "max_connections": "40",
    "max_locks_per_transaction": "10",
    "max_prepared_transactions": "5",
}


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Cluster]:
    """Servers whose settings the stories may change."""
    with Cluster(["own1", "own2"], settings=OWN_SETTINGS) as cluster:
        yield cluster


@dataclass(frozen=True, slots=True)
class Stage:
    """What a story has at hand. The fixtures are asked for when they are needed."""

    request: pytest.FixtureRequest

    def plan(self, schema: str = ORDERS, **options: Any) -> Plan:
        make: MakePlan = self.request.getfixturevalue("make_plan")
        return make(schema, **options)

    def plan_on_own(self, schema: str = ORDERS, **options: Any) -> Plan:
        """A plan between two databases of the servers that may be changed."""
        factory = Databases({"cat": self.servers["cat"], "s1": self.own["own1"], "s2": self.own["own2"]})
        self.request.addfinalizer(factory.drop)
        return self.plan(schema, dsns=factory("cat", "s1", "s2"), **options)

    @property
    def own(self) -> Cluster:
        cluster: Cluster = self.request.getfixturevalue("own_servers")
        return cluster

    @property
    def servers(self) -> Cluster:
        cluster: Cluster = self.request.getfixturevalue("servers")
        return cluster


Look: TypeAlias = Callable[[], Line]
Story: TypeAlias = Callable[[Stage], Generator[Look, Line, None]]

STORIES: list[tuple[str, Story, bool]] = []


def story(text: str, *, note: bool = False) -> Callable[[Story], Story]:
    """Registers the story of a line. `note`: it does not stop a move, but is said."""

    def register(function: Story) -> Story:
        STORIES.append((text, function, note))
        return function

    return register


def looking(plan: Plan, text: str) -> Look:
    return lambda: plan.look(text)


# --- reaching the servers


@story(ANSWERS)
def a_server_is_down(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    stage.servers["s2"].stop()
    try:
        found = yield lambda: operating.checklist(plan.config, plan.move)[0]
        assert found.problem is not None
        assert "[shards.s2]" in str(found.problem.hint)
        assert "s1" not in found.problem.message
    finally:
        stage.servers["s2"].start()


@story(ANSWERS)
def the_catalog_goes_away(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    site = plan.site()
    assert site.catalog is not None
    gone = site.catalog.info.backend_pid
    plan.execute("cat", f"SELECT pg_terminate_backend({gone}, 10000)")
    sites = [site, plan.site()]
    yield lambda: line(sites.pop(0), ANSWERS)


@story("both servers run a version that we know")
def a_version_is_too_old(stage: Stage) -> Generator[Look, Line, None]:
    """No server is older than the oldest that we know: so the oldest that we know is put above one that is there."""
    old: Cluster = stage.request.getfixturevalue("old_servers")
    patch: pytest.MonkeyPatch = stage.request.getfixturevalue("monkeypatch")
    patch.setattr(servers_checks, "SERVER_VERSION_MIN", 160000)
    plan = stage.plan()
    newer = plan.dsns["s2"]
    plan.dsns["s2"] = old["old1"].dsn
    found = yield looking(plan, "a version that we know")
    assert found.problem is not None
    assert "s2" in found.problem.message
    plan.dsns["s2"] = newer


@story("both servers run a version that we know", note=True)
def the_target_is_older(stage: Stage) -> Generator[Look, Line, None]:
    old: Cluster = stage.request.getfixturevalue("old_servers")
    plan = stage.plan()
    newer = plan.dsns["s2"]
    plan.dsns["s2"] = old["old1"].dsn
    yield looking(plan, "a version that we know")
    plan.dsns["s2"] = newer


@story("the source and the target are two databases")
def a_shard_is_named_twice(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    another = plan.dsns["s2"]
    plan.dsns["s2"] = stage.servers["s1"].dsn_for(str(conninfo_to_dict(another)["dbname"]), tcp=True)
    yield looking(plan, "two databases")
    plan.dsns["s2"] = another


@story("all are primaries")
def a_standby(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own()
    server = stage.own["own1"]
    server.stop()
    (server.data / "standby.signal").touch()
    server.start()
    plan.follow((yield looking(plan, "primaries")))


@story("sessions may write by default")
def read_only_databases(stage: Stage) -> Generator[Look, Line, None]:
    yield from read_only(stage, "s1", "s2")


@story("sessions may write by default")
def read_only_for_all_roles(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own()
    plan.execute("s2", "ALTER ROLE ALL SET default_transaction_read_only = yes")
    plan.follow((yield looking(plan, "may write by default")))


@story("sessions may write by default", note=True)
def a_read_only_source(stage: Stage) -> Generator[Look, Line, None]:
    yield from read_only(stage, "s1")


def read_only(stage: Stage, *places: str) -> Generator[Look, Line, None]:
    plan = stage.plan()
    for place in places:
        dbname = conninfo_to_dict(plan.dsns[place])["dbname"]
        plan.execute(place, f"ALTER DATABASE {dbname} SET default_transaction_read_only = on")
    plan.follow((yield looking(plan, "may write by default")))


@story("sessions may write by default")
def a_read_only_server(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own()
    with psycopg.connect(plan.dsns["s2"], autocommit=True) as operator:
        operator.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        operator.execute("SELECT pg_reload_conf()")
    is_read_only: Callable[[bool], bool] = lambda wanted: (  # noqa: E731
        plan.execute("s2", "SHOW default_transaction_read_only") == [("on" if wanted else "off",)]
    )
    until(lambda: is_read_only(True))
    plan.follow((yield looking(plan, "may write by default")))
    until(lambda: is_read_only(False))


def in_latin(plan: Plan, place: str) -> None:
    """From now on the shard is a database in LATIN1."""
    name = f"{conninfo_to_dict(plan.dsns[place])['dbname']}_latin"
    plan.execute(place, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    plan.dsns[place] = make_conninfo(plan.dsns[place], dbname=name)
    plan.execute(place, ORDERS)


@story("the target can hold every text of the source")
def a_target_in_another_encoding(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    in_latin(plan, "s2")
    found = yield looking(plan, "every text of the source")
    assert found.problem is not None
    assert "UTF8" in found.problem.message
    assert "LATIN1" in found.problem.message
    plan.follow(found)
    plan.dsns["s2"] = make_conninfo(plan.dsns["s2"], dbname=f"{conninfo_to_dict(plan.dsns['s2'])['dbname']}_utf8")
    plan.execute("s2", ORDERS)


@story("the target can hold every text of the source", note=True)
def a_source_in_another_encoding(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    in_latin(plan, "s1")
    yield looking(plan, "every text of the source")


# --- a pooler in between


@contextmanager
def pooler(dsn: str) -> Iterator[str]:
    """A relay that gives a client another of its two server sessions with each transaction; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, dsn), daemon=True).start()
        host, port = listener.getsockname()
        yield make_conninfo(dsn, host=host, port=port, sslmode="disable", gssencmode="disable")


def _accept(listener: socket.socket, dsn: str) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_relay_until_it_ends, args=(client, dsn), daemon=True).start()


def _relay_until_it_ends(client: socket.socket, dsn: str) -> None:
    with suppress(OSError):
        _relay(client, dsn)


def _relay(client: socket.socket, dsn: str) -> None:
    parts = conninfo_to_dict(dsn)
    path = Path(str(parts["host"])) / f".s.PGSQL.{parts['port']}"
    with closing(client):
        startup = _exactly(client, int.from_bytes(size := _exactly(client, 4)) - 4)
        sessions = []
        for _ in range(2):
            session = socket.socket(socket.AF_UNIX)
            session.connect(str(path))
            session.sendall(size + startup)
            greeting = _until_ready(session)
            sessions.append(session)
        client.sendall(greeting)
        try:
            while True:
                kind, message = _message(client)
                while kind not in (b"Q", b"S", b"X"):
                    kind, more = _message(client)
                    message += more
                sessions[0].sendall(message)
                if kind == b"X":
                    return
                answer = _until_ready(sessions[0])
                client.sendall(answer)
                if answer.endswith(b"I"):
                    sessions.reverse()
        finally:
            for session in sessions:
                session.close()


def _until_ready(session: socket.socket) -> bytes:
    answer = b""
    while True:
        kind, message = _message(session)
        answer += message
        if kind == b"Z":
            return answer


def _message(peer: socket.socket) -> tuple[bytes, bytes]:
    head = _exactly(peer, 5)
    return head[:1], head + _exactly(peer, int.from_bytes(head[1:]) - 4)


def _exactly(peer: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = peer.recv(count - len(found))
        if not piece:
            raise ConnectionError
        found += piece
    return found


@story("all are reached without a transaction pooler")
def a_transaction_pooler(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    direct = plan.dsns["s2"]
    with pooler(direct) as address:
        plan.dsns["s2"] = address
        found = yield looking(plan, "transaction pooler")
    assert found.problem is not None
    assert "s2 is reached" in found.problem.message
    plan.dsns["s2"] = direct


PGBOUNCER: Final = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed; the relay above stands for it")
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_pgbouncer(make_plan: MakePlan, mode: str) -> None:
    """The real one hands a lone client the same server session again: it takes a second client to find out."""
    plan = make_plan()
    with pgbouncer(plan.dsns["s2"], mode) as address:
        plan.dsns["s2"] = address
        assert line(plan.site(), "transaction pooler").passed is (mode == "session")


@contextmanager
def pgbouncer(dsn: str, mode: str) -> Iterator[str]:
    """It does not run as root; whoever it runs as has to be let into its directory."""
    assert PGBOUNCER is not None
    parts = conninfo_to_dict(dsn)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = ["-u", "nobody"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory() as path:
        directory = Path(path)
        directory.chmod(0o777)
        (directory / "users").write_text('"postgres" ""\n')
        (directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={LOOPBACK} port={parts['port']}\n[pgbouncer]\nlisten_addr = {LOOPBACK}\n"
            f"listen_port = {port}\npool_mode = {mode}\nauth_type = trust\nauth_file = {directory}/users\n"
            "unix_socket_dir =\n"
        )
        process = subprocess.Popen([PGBOUNCER, *user, str(directory / "pgbouncer.ini")])
        try:
            address = make_conninfo(dsn, host=LOOPBACK, port=port, sslmode="disable", gssencmode="disable")
            until(lambda: _answers(address))
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        psycopg.connect(address).close()
    except psycopg.OperationalError:
        return False
    return True


# --- what goes on beside


@story("no subscription feeds the tables")
def a_subscription(stage: Stage) -> Generator[Look, Line, None]:
    with subscribed(stage) as plan:
        plan.follow((yield looking(plan, "subscription")))


@story("no subscription feeds the tables", note=True)
def a_disabled_subscription(stage: Stage) -> Generator[Look, Line, None]:
    with subscribed(stage) as plan:
        plan.execute("s1", 'ALTER SUBSCRIPTION "The Feed" DISABLE')
        yield looking(plan, "subscription")


@contextmanager
def subscribed(stage: Stage) -> Iterator[Plan]:
    """The source is fed by the target."""
    plan = stage.plan_on_own()
    plan.execute("s2", "CREATE PUBLICATION p FOR TABLE orders")
    address = sql.Literal(plan.dsns["s2"]).as_string()
    plan.execute("s1", f'CREATE SUBSCRIPTION "The Feed" CONNECTION {address} PUBLICATION p WITH (slot_name = the_feed)')
    try:
        yield plan
    finally:
        plan.execute("s1", 'DROP SUBSCRIPTION "The Feed"')


@story("nobody follows the changes of the tables", note=True)
def followers(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own()
    plan.execute("s1", "CREATE PUBLICATION everything FOR ALL TABLES")
    plan.execute("s2", "CREATE PUBLICATION ours FOR TABLE orders; CREATE TABLE t (); CREATE PUBLICATION t FOR TABLE t")
    plan.execute("s2", "SELECT pg_create_logical_replication_slot('a_follower', 'pgoutput')")
    try:
        found = yield looking(plan, "follows the changes")
        assert found.problem is not None
        said = found.problem.message
        assert all(name in said for name in ("everything on s1", "ours on s2", "a_follower on s2"))
        assert "publication t " not in said
    finally:
        plan.execute("s2", "SELECT pg_drop_replication_slot('a_follower')")


@story("no prepared transaction is open")
def prepared_transactions(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    for place, gid in (("s1", "it's one"), ("s2", 'a; "b"')):
        prepare = sql.SQL("BEGIN; INSERT INTO orders VALUES (1, 1); PREPARE TRANSACTION {}").format(sql.Literal(gid))
        plan.execute(place, prepare.as_string())
    plan.follow((yield looking(plan, "prepared transaction")))


@story("no long transaction is in the way")
def a_long_transaction_in_front(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan(limits={"ddl_patience_s": 0.01})
    writer = plan.session("s2")
    writer.execute("BEGIN")
    writer.execute("INSERT INTO orders VALUES (1, 1)")
    look = looking(plan, "long transaction")
    until(lambda: look().problem is not None)
    plan.follow((yield look))


@story("no long transaction is in the way", note=True)
def a_long_report(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan(limits={"ddl_patience_s": 0.01})
    report = plan.session("s1")
    report.execute("BEGIN")
    report.execute("SELECT count(*) FROM orders")
    look = looking(plan, "long transaction")
    until(lambda: look().problem is not None)
    found = yield look
    assert found.problem is not None
    assert f"pid {report.info.backend_pid} on s1 (application application, role postgres)" in found.problem.message
    report.close()
    until(lambda: look().problem is None)


@story("no vacuum against wraparound is at work on the tables")
def a_vacuum_against_wraparound(stage: Stage) -> Generator[Look, Line, None]:
    """A real one: the table's limit is the least that there is, and so many transactions are used up."""
    plan = stage.plan_on_own()
    plan.execute("s1", "INSERT INTO orders SELECT 1, i, repeat('x', 500) FROM generate_series(1, 500) i")
    plan.execute("s1", "ALTER TABLE orders SET (autovacuum_freeze_max_age = 100000, autovacuum_vacuum_cost_delay = 50,"
                       " autovacuum_vacuum_cost_limit = 1)")  # fmt: skip
    plan.execute("s1", "DO 'BEGIN FOR i IN 1..100100 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END'")
    look = looking(plan, "wraparound")
    plan.execute("s1", "ALTER SYSTEM SET autovacuum = on")
    plan.execute("s1", "SELECT pg_reload_conf()")
    try:
        until(lambda: look().problem is not None)
        plan.follow((yield look))
        until(lambda: look().problem is None)
    finally:
        plan.execute("s1", "ALTER SYSTEM RESET autovacuum")
        plan.execute("s1", "SELECT pg_reload_conf()")


@story("there is room for our sessions")
def limits_of_role_and_database(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    plan.user = make_role(plan, "Limited")
    plan.execute("s1", f'ALTER ROLE "{plan.user}" CONNECTION LIMIT 3')
    plan.execute("s2", f"ALTER DATABASE {conninfo_to_dict(plan.dsns['s2'])['dbname']} CONNECTION LIMIT 7")
    found = yield looking(plan, "room for our sessions")
    assert found.problem is not None
    assert "the limit of our role on s1" in found.problem.message
    assert "the limit of the database on s2" in found.problem.message
    plan.follow(found)
    until(lambda: not any(sessions(plan, place) for place in ("s1", "s2")))


def sessions(plan: Plan, place: str) -> int:
    """Of the plan's database: one that was closed takes its room until the server has noticed."""
    dsn = plan.dsns[place]
    with psycopg.connect(make_conninfo(dsn, dbname="postgres"), autocommit=True) as operator:
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = %s"
        return operator.execute(query, (conninfo_to_dict(dsn)["dbname"],)).rowcount


@story("there is room for our sessions")
def a_full_server(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own()
    for _ in range(34):
        plan.session("s1")
    plan.follow((yield looking(plan, "room for our sessions")))
    plan.opened.close()
    stage.own["own1"].restart()
    for _ in range(34):
        plan.session("s1")


@story("there is room for our locks")
def many_partitions(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan_on_own(
        "CREATE TABLE orders (tenant_id bigint, id bigint, PRIMARY KEY (tenant_id, id)) PARTITION BY HASH (tenant_id)"
    )
    for number in range(60):
        partition = f"PARTITION OF orders FOR VALUES WITH (MODULUS 60, REMAINDER {number})"
        plan.execute("s2", f"CREATE TABLE orders_{number} {partition}")
    plan.follow((yield looking(plan, "room for our locks")))
    stage.own["own2"].restart()


@story("there is room on the target's disk", note=True)
def rows_to_be_carried(stage: Stage) -> Generator[Look, Line, None]:
    plan = stage.plan()
    plan.execute("s1", "INSERT INTO orders SELECT 100 + i % 200, i, repeat('x', 100) FROM generate_series(1, 10000) i")
    plan.execute("s1", "VACUUM ANALYZE orders")
    found = yield looking(plan, "disk")
    assert found.problem is not None
    ((size,),) = plan.execute("s1", "SELECT pg_total_relation_size('orders')")
    said = int(found.problem.message.split()[1].replace(",", ""))
    assert size * 0.3 < said < size * 0.7


# --- rights


def make_role(plan: Plan, kind: str) -> str:
    """A role without any right, on every server, that no other test knows."""
    role = f"{kind} {conninfo_to_dict(plan.dsns['s1'])['dbname']}"
    for place in plan.dsns:
        plan.execute(place, f'CREATE ROLE "{role}" LOGIN')
    return role


# Everything that takes a right of its own. {n} makes the roles' names the test's.
RICH: Final = """
    CREATE ROLE "App {n}"; CREATE ROLE "Other {n}"; CREATE SCHEMA sales; CREATE SCHEMA "My Numbers";
    REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC;
    CREATE SEQUENCE "My Numbers"."Seq";
    CREATE FUNCTION sales."is fine"(text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
    REVOKE EXECUTE ON FUNCTION sales."is fine"(text) FROM PUBLIC;
    CREATE TABLE sales.orders (
        tenant_id bigint, id bigint DEFAULT nextval('"My Numbers"."Seq"'), note text CHECK (sales."is fine"(note)),
        PRIMARY KEY (tenant_id, id)
    ) PARTITION BY RANGE (tenant_id);
    CREATE TABLE sales."Part 1" PARTITION OF sales.orders FOR VALUES FROM (0) TO (1000);
    ALTER TABLE sales.orders OWNER TO "App {n}"; ALTER TABLE sales."Part 1" OWNER TO "Other {n}";
    CREATE TABLE sales.items (
        tenant_id bigint, id bigint GENERATED ALWAYS AS IDENTITY, order_id bigint, country text,
        PRIMARY KEY (tenant_id, id), FOREIGN KEY (tenant_id, order_id) REFERENCES sales.orders ON DELETE CASCADE
    );
    ALTER TABLE sales.items ENABLE ROW LEVEL SECURITY; ALTER TABLE sales.items FORCE ROW LEVEL SECURITY;
    CREATE TABLE sales.countries (code text PRIMARY KEY);
    ALTER TABLE sales.countries ENABLE ROW LEVEL SECURITY;
"""
RICH_OPTIONS: Final = {
    "tables": {"sales.orders": "tenant_id", "sales.items": "tenant_id"},
    "keyspace": {"reference_tables": ["sales.countries"]},
}


def rich_plan(stage: Stage) -> Plan:
    dsns = stage.request.getfixturevalue("databases")("cat", "s1", "s2")
    return stage.plan(RICH.replace("{n}", str(conninfo_to_dict(dsns["s1"])["dbname"])), dsns=dsns, **RICH_OPTIONS)


def without_rights(text: str) -> Story:
    def tell(stage: Stage) -> Generator[Look, Line, None]:
        plan = rich_plan(stage)
        plan.user = make_role(plan, "Mover")
        found = yield looking(plan, text)
        assert found.problem is not None
        assert f"the role {plan.user} may not" in found.problem.message
        plan.follow(found)

    tell.__name__ = "without_rights"
    return tell


for _text, _ in PRIVILEGES:
    story(_text, note=_text == SEES_SESSIONS)(without_rights(_text))


@story("our role may keep its records on both shards")
def records_of_other_roles(stage: Stage) -> Generator[Look, Line, None]:
    """The schema is there, made by a superuser on the one, and by a role that was used before on the other."""
    plan = stage.plan()
    before = make_role(plan, "Before")
    plan.user = make_role(plan, "Mover")
    for place, owner in (("s1", "CURRENT_USER"), ("s2", f'"{before}"')):
        plan.execute(place, f"CREATE SCHEMA shardmove AUTHORIZATION {owner}; CREATE TABLE shardmove.t (i int);"
                            f" ALTER TABLE shardmove.t OWNER TO {owner}; CREATE SEQUENCE shardmove.s;"
                            " CREATE FUNCTION shardmove.f(int) RETURNS int LANGUAGE sql AS 'SELECT 1'")  # fmt: skip
    plan.follow((yield looking(plan, "keep its records")))


# --- the stories


@pytest.mark.parametrize(
    ("text", "story_", "note"), STORIES, ids=[f"{story_.__name__}: {text}" for text, story_, _ in STORIES]
)
def test_a_line_fails_and_passes_once_its_advice_is_followed(
    request: pytest.FixtureRequest, text: str, story_: Story, note: bool
) -> None:
    told = story_(Stage(request))
    with closing(told):
        look = next(told)
        found = look()
        assert found.check == text
        assert found.problem is not None, "nothing was said"
        assert found.problem.hint
        assert isinstance(found.problem, Note) is note, found.problem
        assert found.passed is note
        with pytest.raises(StopIteration):
            told.send(found)
        again = look()
        assert again.passed, again.problem


def test_every_line_has_its_story() -> None:
    assert {text for text, _ in (*SERVERS, *SURROUNDINGS, *PRIVILEGES)} == {text for text, _, _ in STORIES}


# --- a line that nobody stops at


def test_preflight_of_a_shard_that_is_down(world: World, shell: Shell) -> None:
    """One line says who does not answer; the others cannot be asked."""
    move_id = world.split(at=20)
    path = world.directory / "gone.toml"
    path.write_text(world.write_config().read_text().replace(world.shards["s2"], "host=127.0.0.1 port=1 dbname=gone"))
    said = shell("preflight", move_id, "--json", config=path)
    assert said.code == Exit.FAILED
    (check,) = said.document["moves"][0]["checks"]
    assert (check["check"], check["passed"], check["note"]) == (ANSWERS, False, None)
    assert "port=1" in check["problem"]
    assert "[shards.s2]" in check["hint"]
    assert "port=1" in said.stderr


def test_notes_are_shown_and_stop_nothing(world: World, shell: Shell) -> None:
    move_id = world.split(at=20)
    said = shell("preflight", move_id)
    assert said.code == Exit.DONE
    assert "  ! there is room on the target's disk\n      note: about " in said.stdout
    assert "\n      what to do: make sure that s2 has" in said.stdout
    document = shell("preflight", move_id, "--json").document
    assert document["passed"]
    (check,) = [each for each in document["moves"][0]["checks"] if "disk" in each["check"]]
    assert check["note"].startswith("about ")
    assert check["problem"] is None


# --- grants, and whole moves of roles that have no more than these


def run_sql(dsn: str, printed: str) -> None:
    """As psql does: statement by statement; every line is a statement or a comment."""
    with psycopg.connect(dsn, autocommit=True) as operator:
        for each in printed.splitlines():
            assert each.startswith("--") or each.endswith(";"), each
            if not each.startswith("--"):
                operator.execute(each.encode())


def acting_as(config: Config, role: str) -> Config:
    return replace(
        config,
        catalog_dsn=make_conninfo(config.catalog_dsn, user=role),
        shards={shard: make_conninfo(dsn, user=role) for shard, dsn in config.shards.items()},
    )


def carry_there_and_back(world: World, move_id: str) -> None:
    world.run(move_id, State.READY)
    world.cut_over(move_id)
    world.cut_over(move_id, Direction.BACK)
    world.cut_over(move_id)
    world.complete(move_id)


def test_grants_are_all_that_a_new_role_needs(world: World, shell: Shell) -> None:
    """Foreign keys, triggers, sequences: the whole way as a role with nothing but what was printed."""
    move_id = world.split(at=20)
    role = f"New {conninfo_to_dict(world.dsns['s1'])['dbname']}"
    printed = {place: shell("grants", "--role", role, "--on", place).stdout for place in (*world.shards, "catalog")}
    assert all(f'CREATE ROLE "{role}" LOGIN;' in text for text in printed.values())
    assert shell("grants", "--role", role, "--on", "nowhere").code == Exit.USAGE
    for place, text in printed.items():
        dsn = world.dsns["cat" if place == "catalog" else place]
        run_sql(dsn, f'CREATE ROLE "{role}" LOGIN;\n{text}')
    assert "GRANT" in shell("grants", "--role", role, "--all").stdout
    for place in printed:
        assert shell("grants", "--role", role, "--on", place).stdout == f"-- {place}\n-- nothing is missing\n"
    world.config = acting_as(world.config, role)
    lines = operating.checklist(world.config, world.move(move_id))
    assert [each for each in lines if not each.passed] == []
    assert [each for each in lines if each.check in dict(PRIVILEGES) and each.problem is not None] == []
    carry_there_and_back(world, move_id)


PLAIN: Final = "CREATE TABLE orders (tenant_id bigint, id bigserial, note text, PRIMARY KEY (tenant_id, id))"


def test_plain_tables_move_with_ownership_alone(make_plan: MakePlan) -> None:
    plan = make_plan(PLAIN)
    owner = make_role(plan, "App")
    for shard in ("s1", "s2"):
        plan.execute(shard, f'ALTER TABLE orders OWNER TO "{owner}"')
    plan.execute("s1", "INSERT INTO orders SELECT 50 + i, i, 'x' FROM generate_series(1, 200) i")
    plan.user = make_role(plan, "Owner")
    for each in grants(plan.config, plan.user):
        assert not any("session_replication_role" in statement for statement in each.statements)
        run_sql(plan.dsns["cat" if each.place == "catalog" else each.place], "\n".join(each.statements))
    with connect(plan.dsn("s2"), application_name="test") as connection:
        assert not may_be_replica(connection)
    config = acting_as(plan.config, plan.user)
    assert [each for each in operating.checklist(config, plan.move) if not each.passed] == []
    with (
        Catalog.connect(config.catalog_dsn) as catalog,
        hold(
            config, catalog, plan.move.id, holder="test", make_executor=lambda: InlineExecutor(2), progress=Progress()
        ) as held,
    ):
        run(held, State.READY)
        plan.execute("s1", "UPDATE orders SET note = 'changed' WHERE tenant_id < 120")
        cut_over(held, Direction.FORWARD)
        plan.execute("s2", "DELETE FROM orders WHERE tenant_id = 130")
        cut_over(held, Direction.BACK)
        cut_over(held, Direction.FORWARD)
        ending.complete(held)
    assert plan.execute("s1", "SELECT count(*), max(tenant_id) FROM orders WHERE tenant_id BETWEEN 100 AND 199") == [
        (0, None)
    ]
    assert plan.execute("s2", "SELECT count(*), count(*) FILTER (WHERE note = 'changed') FROM orders") == [(99, 20)]


FIRES: Final = {
    "a trigger": "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
    " CREATE TRIGGER t BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION f()",
    "a foreign key to it": "CREATE TABLE items (a bigint, b bigint, FOREIGN KEY (a, b) REFERENCES orders)",
    "a foreign key of it": "CREATE TABLE tenants (id bigint PRIMARY KEY);"
    " ALTER TABLE orders ADD FOREIGN KEY (tenant_id) REFERENCES tenants",
    "a rule": "CREATE RULE r AS ON DELETE TO orders DO ALSO NOTHING",
}


@pytest.mark.parametrize("what", FIRES)
def test_what_would_fire_is_found_in_the_transaction_itself(make_plan: MakePlan, what: str) -> None:
    """A role without the right writes as anybody, until something is there that would fire; then it writes nothing."""
    plan = make_plan(ORDERS + "; GRANT ALL ON orders TO PUBLIC")
    plan.user = make_role(plan, "Plain")
    tables = [Table(name, key, (), (), False) for name, key in plan.move.keyspace.tables.items()]
    with connect(plan.dsn("s2"), application_name="test") as connection:
        with connection.transaction():
            become_replica(connection, "m1", tables)
            assert connection.execute("SHOW session_replication_role").fetchone() == ("origin",)
        plan.execute("s2", FIRES[what])
        with pytest.raises(Refused, match="session_replication_role"), connection.transaction():
            become_replica(connection, "m1", tables)
    assert not line(plan.site(), "as a replica").passed
    plan.execute("s2", "ALTER TABLE orders DISABLE TRIGGER ALL; ALTER TABLE orders DISABLE RULE r" if what == "a rule"
                       else "ALTER TABLE orders DISABLE TRIGGER ALL")  # fmt: skip
    assert line(plan.site(), "as a replica").passed


def test_a_move_under_publications_of_everything(world: World) -> None:
    """Our own tables are published with all others: none of our updates and deletes is refused for that."""
    for shard in world.shards:
        with world.connect(shard) as connection:
            connection.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    carry_there_and_back(world, world.split(at=20))
    world.run(world.split(at=10), State.READY)


def test_lines_and_grants_on_older_servers(
    servers: Cluster, old_servers: Cluster, make_plan: MakePlan, request: pytest.FixtureRequest
) -> None:
    """Membership is granted otherwise there, and inherited only by a role that inherits."""
    factory = Databases({"cat": servers["cat"], "s1": old_servers["old1"], "s2": old_servers["old2"]})
    request.addfinalizer(factory.drop)
    dsns = factory("cat", "s1", "s2")
    plan = make_plan(RICH.replace("{n}", str(conninfo_to_dict(dsns["s1"])["dbname"])), dsns=dsns, **RICH_OPTIONS)
    plan.execute("s1", "CREATE PUBLICATION everything FOR ALL TABLES; CREATE PUBLICATION p FOR TABLE sales.orders")
    site = plan.site()
    said = {text: check(site) for text, check in (*SERVERS, *SURROUNDINGS)}
    assert [each for each in said.values() if each is not None and not isinstance(each, Note)] == []
    followers = said["nobody follows the changes of the tables"]
    assert followers is not None
    assert "the publication p on s1" in followers.message
    plan.user = make_role(plan, "Mover")
    for place in plan.dsns:
        plan.execute(place, f'ALTER ROLE "{plan.user}" NOINHERIT')
    site = plan.site()
    assert [text for text, check in PRIVILEGES if check(site) is None] == []
    for each in grants(plan.config, plan.user):
        run_sql(plan.dsns["cat" if each.place == "catalog" else each.place], "\n".join(each.statements))
    assert {text: problem for text, check in PRIVILEGES if (problem := check(plan.site())) is not None} == {}
