"""Three servers that serve for many runs, templates of their databases, and the databases of one run."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.config import Config, load
from shardmove.coordinator import planner
from shardmove.demo import shop
from shardmove.faults import VARIABLE
from shardmove.postgres.embedded import Cluster
from tests.campaign import outside
from tests.campaign.commands import Command, Zygote
from tests.campaign.relay import Relay
from tests.campaign.scenarios import LIMITS, MOVED_FROM, ROWS, TENANTS, Scenario
from tests.campaign.worker import TWIN

SERVERS: Final = ("cat", "s1", "s2")
SHARDS: Final = ("s1", "s2")
TEMPLATE: Final = "campaign_template"
BARE: Final = "campaign_bare"
REFERENCE: Final = "CREATE TABLE countries (code text PRIMARY KEY, name text NOT NULL)"
COUNTRIES: Final = "INSERT INTO countries VALUES ('de', 'Germany'), ('fr', 'France'), ('jp', 'Japan')"
SETTINGS: Final = {"fsync": "off", "max_connections": "60", "shared_buffers": "24MB"}


class Ground:
    """Servers and a zygote. A context manager. `kept`: where evidence of failed runs goes."""

    def __init__(self, kept: Path | None = None) -> None:
        self._numbers = itertools.count(1)
        self._ending = ExitStack()
        self._kept = kept

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="campaign-"))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.servers = stack.enter_context(Cluster(SERVERS, settings=SETTINGS))
            self.zygote = stack.enter_context(Zygote())
            self._make_templates()
            self.version = self._version()
            self._ending = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def keep(self, directory: Path) -> str:
        """Copies a run's files to where evidence is kept, if anywhere; returns where they are then."""
        if self._kept is None:
            return ""
        kept = self._kept / f"{os.getpid()}-{directory.name}"
        shutil.copytree(directory, kept, dirs_exist_ok=True)
        return str(kept)

    def _make_templates(self) -> None:
        for name in SERVERS:
            for template in (TEMPLATE, BARE):
                _execute(self.servers[name].dsn, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(template)))
        for name in SHARDS:
            with outside.session(self.servers[name].dsn_for(TEMPLATE)) as connection:
                shop.create(connection)
                connection.execute(REFERENCE)
                connection.execute(COUNTRIES)
                if name == "s1":
                    shop.load(connection, TENANTS, rows=ROWS, seed=1)
        self.before = {name: outside.objects(self.servers[name].dsn_for(TEMPLATE)) for name in SHARDS}
        dsns = {name: self.servers[name].dsn_for(TEMPLATE) for name in SERVERS}
        config = load(write_config(self.directory / "template.toml", dsns, {}, self.directory / "template.json"))
        with Catalog.install(config.catalog_dsn) as catalog:
            catalog.apply(config)
            planner.split(config, catalog, "shop", at=[MOVED_FROM], to=["s2"])

    def _version(self) -> str:
        with outside.session(self.servers["s1"].dsn) as connection:
            (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
        return str(version)

    @contextmanager
    def place(self, scenario: Scenario, *, twin: str = "") -> Iterator[Place]:
        """New databases; dropped at the end, whoever is connected, with servers that run."""
        number = next(self._numbers)
        dbname = f"campaign_{number}"
        bare = {"cat"} if scenario.is_quiet else {"s2"} if scenario.target_is_bare else set()
        directory = self.directory / f"{number:04}"
        directory.mkdir()

        def create(name: str) -> None:
            # Not by the log: what a sequence of the template had logged ahead would be forgotten by a crash.
            clone = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
            template = BARE if name in bare else TEMPLATE
            _execute(self.servers[name].dsn, clone.format(sql.Identifier(dbname), sql.Identifier(template)))

        def drop(name: str) -> None:
            self.servers[name].start()
            _execute(self.servers[name].dsn, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(dbname)))

        with ThreadPoolExecutor(len(SERVERS)) as threads:
            list(threads.map(create, SERVERS))
            try:
                with Place(self, scenario, dbname, directory, twin) as place:
                    yield place
            finally:
                list(threads.map(drop, SERVERS))
                shutil.rmtree(directory)


class Place:
    """The databases of one run, and commands over them."""

    def __init__(self, ground: Ground, scenario: Scenario, dbname: str, directory: Path, twin: str) -> None:
        self.ground = ground
        self.scenario = scenario
        self.directory = directory
        self.dsns = {name: ground.servers[name].dsn_for(dbname) for name in SERVERS}
        self.shards = {name: self.dsns[name] for name in SHARDS}
        self.ledger = directory / "ledger"
        self._dbname = dbname
        self._twin = twin
        self._ending = ExitStack()
        self._started: list[Command] = []
        self._stopped: set[int] = set()
        self._config_file = write_config(
            directory / "cluster.toml", self.dsns, scenario.limits, directory / "routes.json"
        )
        self.config: Config = load(self._config_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for command in self._started:
            command.kill()
        for pid in self._stopped:
            wake(pid)
        self._ending.close()

    def relay(self) -> Relay:
        """One more way to the servers, for a command's connections alone."""
        return self._ending.enter_context(Relay({name: self.ground.servers[name].port for name in SERVERS}))

    def config_through(self, relay: Relay) -> Path:
        dsns = {
            name: self.ground.servers[name]
            .dsn_for(self._dbname, tcp=True)
            .replace(f"port={self.ground.servers[name].port}", f"port={relay.ports[name]}")
            for name in SERVERS
        }
        path = self.directory / "relayed.toml"
        return write_config(path, dsns, self.scenario.limits, self.directory / "routes.json")

    def start(self, words: Sequence[str], *, faults: Path | None = None, config: Path | None = None) -> Command:
        """Begins a command; it does not outlive the run. `faults`: where its orders are."""
        environment = {
            "SHARDMOVE_CONFIG": str(config or self._config_file),
            VARIABLE: "" if faults is None else str(faults),
            TWIN: self._twin,
        }
        command = self.ground.zygote.start(words, self.directory, environment)
        self._started.append(command)
        return command

    def faults(self, name: str) -> Path:
        """A directory for orders to one process and its workers."""
        path = self.directory / f"faults-{name}"
        path.mkdir(exist_ok=True)
        return path

    def will_wake(self, pid: int) -> None:
        """Whatever becomes of the run, that process is not left stopped."""
        self._stopped.add(pid)

    def move(self) -> str:
        """The newest move's id."""
        with outside.session(self.dsns["cat"]) as connection:
            row = connection.execute(
                "SELECT id FROM shardmove_catalog.move ORDER BY substr(id, 2)::int DESC LIMIT 1"
            ).fetchone()
        assert row is not None, "no move is planned"
        return str(row[0])


def write_config(path: Path, dsns: Mapping[str, str], limits: Mapping[str, Any], routes_file: Path) -> Path:
    lines = ["[catalog]", f'dsn = "{dsns["cat"]}"']
    for name in SHARDS:
        lines += [f"[shards.{name}]", f'dsn = "{dsns[name]}"']
    lines += ["[keyspaces.shop]", 'reference_tables = ["countries"]', "[keyspaces.shop.tables]"]
    lines += [f'{table} = "{column}"' for table, column in shop.KEY_COLUMNS.items()]
    lines += ["[[keyspaces.shop.routes]]", 'range = ":"', 'shard = "s1"']
    lines += ["[export]", f'routes_file = "{routes_file}"', "[limits]"]
    lines += [f"{name} = {value}" for name, value in {**LIMITS, **limits}.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def wake(pid: int) -> None:
    """Lets a stopped process go on, where it is there still."""
    try:
        if is_stopped(pid):
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


def is_stopped(pid: int) -> bool:
    """Raises ProcessLookupError where no such process is there any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    state = stat.rpartition(")")[2].split()[0]
    if state in "ZX":
        raise ProcessLookupError(pid)
    return state == "T"


def _execute(dsn: str, statement: sql.Composable) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement)
