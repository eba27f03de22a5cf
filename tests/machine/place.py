"""Where a story happens: two shards and a catalog, each a server of its own, with databases for one story alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Final, LiteralString, Self, TypeAlias

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.config import Config, parse
from shardmove.postgres.embedded import Cluster, Server
from tests.machine import oracle
from workers.connections import Connections
from workers.tasks import Result, Task, run

SHARDS: Final = ("s1", "s2")
SERVERS: Final = (*SHARDS, "cat")
KEYSPACE: Final = "shop"
BEGINS, STORY = "machine", "machine_story"
LOCK_TIMEOUT_MS: Final = 100

LIMITS: Final[Mapping[str, Any]] = {
    "batch_rows_max": 2,
    "ddl_lock_timeout_ms": 50,
    "ddl_patience_s": 0.2,
    "keep_source_s": 0.001,
    "cutover_attempts": 3,
    "cutover_grace_s": 0.05,
    "max_stall_ms": 20_000,
}
HURRIED: Final[Mapping[str, Any]] = {"cutover_attempts": 1, "max_stall_ms": 200}
"""Where a writer is known to be in the way."""
UNHURRIED: Final[Mapping[str, Any]] = {"ddl_lock_timeout_ms": 1_000, "ddl_patience_s": 30.0}
"""Where nobody is in the way of a table's change: only a machine that is busy holds it up, and not for long."""

Session: TypeAlias = psycopg.Connection[tuple[Any, ...]]


class Ground:
    """The servers, for as many stories as one likes, one at a time.

    The shards' databases are emptied for each story, that of the catalog is made anew from a template: whichever is
    quicker.
    """

    def __init__(self, servers: Cluster | Mapping[str, Server]) -> None:
        self.servers = servers
        for name in SERVERS:
            self._make(name, BEGINS)
        Catalog.install(servers["cat"].dsn_for(BEGINS)).close()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """As it is before a story, whatever the one before has left."""
        for server in SERVERS:
            self.servers[server].start()
        for shard in SHARDS:
            self._clear(shard)
        self._make("cat", STORY, template=BEGINS)
        dsns = {shard: self.servers[shard].dsn_for(BEGINS) for shard in SHARDS}
        with Place(self, {**dsns, "cat": self.servers["cat"].dsn_for(STORY)}) as place:
            yield place

    def _make(self, server: str, dbname: str, *, template: str = "template1") -> None:
        name, made_from = sql.Identifier(dbname), sql.Identifier(template)
        with psycopg.connect(self.servers[server].dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, made_from))

    def _clear(self, shard: str) -> None:
        with psycopg.connect(self.servers[shard].dsn_for(BEGINS), autocommit=True) as connection:
            connection.execute(_END_OTHERS)
            connection.execute("DROP SCHEMA IF EXISTS shardmove CASCADE; DROP TABLE IF EXISTS orders, items")
            connection.execute(oracle.SCHEMA)
            for table in oracle.KEY_COLUMNS:
                rows = [
                    sql.SQL("({})").format(sql.SQL(", ").join(map(sql.Literal, columns)))
                    for columns in oracle.first_rows_of(table, shard)
                ]
                connection.execute(
                    sql.SQL("INSERT INTO {} VALUES {}").format(sql.Identifier(table), sql.SQL(", ").join(rows))
                )


_END_OTHERS: Final[LiteralString] = (
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


class Place:
    """The databases of one story, and sessions of the application on them."""

    def __init__(self, ground: Ground, dsns: Mapping[str, str]) -> None:
        self.ground = ground
        self.dsns = dsns
        self.config = self.configured()
        self._sessions: dict[str, Session] = {}
        self._catalog: Catalog | None = None
        self.catalog.apply(self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions.values():
            session.close()
        if self._catalog is not None:
            self._catalog.close()

    def configured(self, limits: Mapping[str, Any] | None = None) -> Config:
        routes = [{"range": ":300", "shard": "s1"}, {"range": "300:", "shard": "s2"}]
        return parse(
            {
                "catalog": {"dsn": self.dsns["cat"]},
                "shards": {shard: {"dsn": self.dsns[shard]} for shard in SHARDS},
                "keyspaces": {KEYSPACE: {"tables": dict(oracle.KEY_COLUMNS), "routes": routes}},
                "limits": {**LIMITS, **(limits or {})},
            }
        )

    @property
    def catalog(self) -> Catalog:
        """The observer's own."""
        if self._catalog is None:
            self._catalog = Catalog.connect(self.dsns["cat"], application_name="observer")
        return self._catalog

    # --- the application

    def new_session(self, shard: str, name: str = "application") -> Session:
        options = f"-c lock_timeout={LOCK_TIMEOUT_MS}ms"
        return psycopg.connect(self.dsns[shard], autocommit=True, application_name=name, options=options)

    def session(self, shard: str) -> Session:
        """In autocommit, kept from step to step; opened anew where the server has ended it."""
        known = self._sessions.get(shard)
        with suppress(psycopg.OperationalError):
            if known is not None and not known.closed:
                known.execute("SELECT 1")
                return known
        self._sessions[shard] = self.new_session(shard)
        return self._sessions[shard]

    def rows(self, shard: str, connection: Session | None = None) -> oracle.Rows:
        """Everything that a shard holds."""
        reader = connection or self.session(shard)
        orders = reader.execute("SELECT tenant, id, note, to_jsonb(o) ->> 'extra' FROM orders AS o").fetchall()
        items = reader.execute("SELECT tenant, id, line, amount FROM items").fetchall()
        rows: oracle.Rows = {("orders", tenant, id_): (note, extra) for tenant, id_, note, extra in orders}
        rows.update({("items", *key): amount for *key, amount in items})
        return rows

    # --- the servers

    def crash(self, server: str) -> None:
        self.ground.servers[server].restart("immediate")
        self._after_a_cut(server)

    def cut(self, server: str) -> None:
        """Ends every session that the engine has there."""
        with psycopg.connect(self.dsns[server], autocommit=True, application_name="operator") as operator:
            operator.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND starts_with(application_name, 'shardmove')"
            )

    def lose_lease(self, move_id: str) -> None:
        with psycopg.connect(self.dsns["cat"], autocommit=True, application_name="operator") as operator:
            operator.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = %s",
                (f"shardmove lease {move_id}",),
            )

    def _after_a_cut(self, server: str) -> None:
        if server == "cat" and self._catalog is not None:
            self._catalog.close()
            self._catalog = None


class AtOnce:
    """An executor that runs each task where it is submitted: the same steps reach the same points in the same order."""

    workers = 2

    def __init__(self) -> None:
        self._connections = Connections()

    def submit(self, task: Task[Result]) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(run(task, self._connections))
        except BaseException as error:
            future.set_exception(error)
        return future

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
