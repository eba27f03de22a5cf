"""The ways from pgbench to the rows: a bare server, PgBouncer in front of it, routers in front of it.

Every row that is read lies on the first shard, so that servers do the same work on every path; the router has two
shards, and looks up each key. All connections go over the loopback address.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import psycopg

from shardmove.catalog.store import Catalog
from shardmove.config import load
from shardmove.postgres.embedded import LOOPBACK, SUPERUSER, Cluster
from tests.support.router import Router, Routers, free_port

DBNAME: Final = "bench"
SHARDS: Final = ("s1", "s2")
SETTINGS: Final = {"fsync": "off", "max_connections": "300", "jit": "off"}
SCHEMA: Final = """
    CREATE TABLE accounts (tenant_id bigint PRIMARY KEY, balance integer NOT NULL, filler char(84) NOT NULL DEFAULT '')
"""
ROWS: Final = "INSERT INTO accounts SELECT i, i %% 1000 FROM generate_series(1::bigint, %s) i"
SCRIPT: Final = "\\set id random(1, {rows})\nSELECT balance FROM accounts WHERE tenant_id = :id;\n"
START_BOUND_S: Final = 60.0

POOLER_WITH_PREPARED: Final = (1, 21)
"""The first PgBouncer that pools prepared statements by transaction; an older one pools them by session."""


@dataclass(frozen=True, slots=True)
class Way:
    """One path: where it is entered in a mode of pgbench, and the processes in between."""

    name: str
    ports: Mapping[str, int]
    processes: Callable[[str], Sequence[psutil.Process]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """All paths, and the script that pgbench runs on each of them."""

    ways: Sequence[Way]
    script: Path
    pgbench: Path


@contextmanager
def site(rows: int, modes: Sequence[str]) -> Iterator[Site]:
    """Servers with so many rows that are read, and as many beyond the split; PgBouncer where it is installed."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-router-")))
        directory.chmod(0o755)
        cluster = stack.enter_context(Cluster(("cat", *SHARDS), settings=SETTINGS))
        config = _filled(cluster, directory, rows)
        script = directory / "script.sql"
        script.write_text(SCRIPT.format(rows=rows), encoding="utf-8")
        routers = stack.enter_context(Routers(directory))
        port = cluster["s1"].port
        ways = [Way("direct", dict.fromkeys(modes, port), lambda _: [])]
        if (program := _pooler()) is not None:
            ways.append(stack.enter_context(_behind_pooler(program, directory, port, modes)))
        for processes in (1, 2):
            router = routers.start(config, pooling="transaction", processes=processes)
            ways.append(_behind_router(f"router ×{processes}", router, modes))
        yield Site(ways, script, find_pgbench(cluster["s1"].binaries.directory))


def find_pgbench(binaries: Path) -> Path:
    """Of the servers' own programs, else the machine's."""
    found = binaries / "pgbench" if (binaries / "pgbench").exists() else shutil.which("pgbench")
    assert found is not None, "there is no pgbench: neither beside the servers' programs nor on the PATH"
    return Path(found)


def _filled(cluster: Cluster, directory: Path, rows: int) -> Path:
    """Two shards, split above the rows that are read; returns the configuration."""
    config = directory / "cluster.toml"
    lines = ["[catalog]", f'dsn = "{cluster["cat"].dsn_for(DBNAME)}"']
    for name in ("cat", *SHARDS):
        with psycopg.connect(cluster[name].dsn, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(DBNAME)))
    for name in SHARDS:
        with psycopg.connect(cluster[name].dsn_for(DBNAME), autocommit=True) as connection:
            connection.execute(SCHEMA)
            connection.execute(ROWS, (rows,))
            connection.execute("VACUUM ANALYZE accounts")
        lines += [f"[shards.{name}]", f'dsn = "{cluster[name].dsn_for(DBNAME, tcp=True)}"']
    lines += ["[keyspaces.bank.tables]", 'accounts = "tenant_id"']
    for range_, shard in ((f":{rows + 1}", "s1"), (f"{rows + 1}:", "s2")):
        lines += ["[[keyspaces.bank.routes]]", f'range = "{range_}"', f'shard = "{shard}"']
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with Catalog.install(load(config).catalog_dsn) as catalog:
        catalog.apply(load(config))
    return config


def _behind_router(name: str, router: Router, modes: Sequence[str]) -> Way:
    return Way(name, dict.fromkeys(modes, router.port), lambda _: router.processes())


# --- PgBouncer


def _pooler() -> Path | None:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    return None if found is None else Path(found)


@contextmanager
def _behind_pooler(program: Path, directory: Path, server_port: int, modes: Sequence[str]) -> Iterator[Way]:
    """One PgBouncer a mode: an old one cannot pool prepared statements by transaction."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    pooling = {
        mode: "session" if mode == "prepared" and version < POOLER_WITH_PREPARED else "transaction" for mode in modes
    }
    with ExitStack() as stack:
        started = {
            mode: stack.enter_context(_started(program, directory, server_port, pooling[mode], version))
            for mode in modes
        }
        notes = ", ".join(f"{mode}: {kind} pooling" for mode, kind in pooling.items())
        yield Way(
            "PgBouncer",
            {mode: port for mode, (port, _) in started.items()},
            lambda mode: [started[mode][1]],
            note=f"PgBouncer {'.'.join(map(str, version))}; {notes}",
        )


@contextmanager
def _started(
    program: Path, directory: Path, server_port: int, pooling: str, version: tuple[int, ...]
) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    settings = directory / f"pgbouncer-{port}.ini"
    prepared = ["max_prepared_statements = 100"] if version >= POOLER_WITH_PREPARED else []
    lines = [
        "[databases]",
        f"{DBNAME} = host={LOOPBACK} port={server_port} dbname={DBNAME} user={SUPERUSER}",
        "[pgbouncer]",
        *(f"listen_addr = {LOOPBACK}", f"listen_port = {port}", "unix_socket_dir =", "auth_type = any"),
        *(f"pool_mode = {pooling}", "default_pool_size = 64", "max_client_conn = 200"),
        *("log_connections = 0", "log_disconnections = 0", *prepared),
    ]
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    account = "nobody" if os.geteuid() == 0 else None  # it refuses to run as root
    group = None if account is None else pwd.getpwnam(account).pw_gid
    with (directory / f"pgbouncer-{port}.err").open("wb") as log:
        process = subprocess.Popen(
            [program, "-q", settings],
            user=account,
            group=group,
            extra_groups=None if account is None else (),
            stderr=log,
        )
    try:
        _await_port(port, process)
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_BOUND_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError("PgBouncer did not start")
