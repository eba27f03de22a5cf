"""Embedded servers: real ones, each its own, and never alive after their owner."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest

from shardmove.domain.errors import ConfigurationError, Failed, NotFound, Refused
from shardmove.postgres import binaries, watcher
from shardmove.postgres.embedded import Cluster, Mode, Server

UNSAFE_BUT_FAST = {"fsync": "off"}
PATIENCE_S = 120.0

OWNER = """
    import sys
    from pathlib import Path
    from shardmove.postgres.embedded import Cluster

    cluster = Cluster(["a", "b"], settings={"fsync": "off"}, directory=Path(sys.argv[1]) if sys.argv[1:] else None)
    cluster.__enter__()
    print(*(server.directory for server in cluster), cluster["a"].dsn, sep="|", flush=True)
    %s
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(["a", "b"], settings=UNSAFE_BUT_FAST) as cluster:
        yield cluster


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that does not exist yet, where the server's account can go (pytest's own lets nobody in)."""
    parent = Path(tempfile.mkdtemp(prefix="shardmove-test-")).resolve()
    parent.chmod(0o755)
    yield parent / "kept"
    shutil.rmtree(parent)


def ask(dsn: str, query: psycopg.abc.QueryNoTemplate) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def run(server: Server, statement: psycopg.abc.QueryNoTemplate) -> None:
    with psycopg.connect(server.dsn) as connection:
        connection.execute(statement)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_servers_answer_over_the_socket_and_over_tcp(cluster: Cluster) -> None:
    for server in cluster:
        assert ask(server.dsn, "SELECT inet_client_addr() IS NULL")
        assert ask(server.dsn_for("template1", tcp=True), "SELECT inet_server_port()") == server.port


def test_each_server_has_a_system_identifier_of_its_own(cluster: Cluster) -> None:
    identifiers = {ask(server.dsn, "SELECT system_identifier FROM pg_control_system()") for server in cluster}
    assert len(identifiers) == 2


def test_settings_reach_the_server_quoted() -> None:
    odd = r"it's a \ backslash"
    with Cluster(["a"], settings={**UNSAFE_BUT_FAST, "cluster_name": odd, "max_connections": "17"}) as cluster:
        assert ask(cluster["a"].dsn, "SHOW cluster_name") == odd
        assert ask(cluster["a"].dsn, "SHOW max_connections") == "17"
        assert ask(cluster["a"].dsn, "SHOW max_prepared_transactions") == "20"


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_committed_data_survives_a_stop(cluster: Cluster, mode: Mode) -> None:
    server = cluster["a"]
    run(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    before = server.pid
    server.stop(mode)
    assert not server.is_running
    server.stop(mode)
    server.start()
    server.start()
    assert server.pid != before
    assert ask(server.dsn, "SELECT answer FROM kept") == 42
    run(server, "DROP TABLE kept")


def processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Those that are there still."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


@pytest.mark.fault
def test_committed_data_survives_a_kill_of_all_processes(cluster: Cluster) -> None:
    server = cluster["b"]
    run(server, "CREATE TABLE kept AS SELECT 42 AS answer")
    children = processes(server.child_pids())
    server.kill()
    assert not server.is_running
    assert watcher.wait_gone(children, 0)
    server.start()
    assert ask(server.dsn, "SELECT answer FROM kept") == 42
    run(server, "DROP TABLE kept")


@pytest.mark.fault
def test_a_server_starts_again_while_orphans_of_its_dead_postmaster_live(cluster: Cluster) -> None:
    server = cluster["b"]
    with psycopg.connect(server.dsn) as connection:
        orphan = psutil.Process(connection.info.backend_pid)
        orphan.suspend()
        postmaster = psutil.Process(server.pid)
        postmaster.kill()
        assert watcher.wait_gone([postmaster], PATIENCE_S)  # it may stay a zombie for as long as nobody asks
        with ThreadPoolExecutor(1) as pool:
            started = pool.submit(server.start)
            try:
                wait_until(lambda: "pre-existing shared memory block" in server.log.read_text())
            finally:
                orphan.resume()
            started.result(PATIENCE_S)
    assert ask(server.dsn, "SELECT 1") == 1


def test_a_server_can_be_pickled(cluster: Cluster) -> None:
    assert pickle.loads(pickle.dumps(cluster["a"])) == cluster["a"]


def test_a_name_that_no_server_has_is_an_error_that_says_so(cluster: Cluster) -> None:
    with pytest.raises(NotFound, match="'nope'"):
        cluster["nope"]


@pytest.mark.parametrize("names", [[], ["a", "a"], ["../a"]])
def test_names_that_cannot_be_directories_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="distinct names"):
        Cluster(names)


def test_missing_binaries_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"no initdb, pg_ctl, postgres in {tmp_path}") as raised:
        Cluster(["a"], binaries=tmp_path).__enter__()
    assert raised.value.hint is not None
    assert "SHARDMOVE_PG_BIN" in raised.value.hint


def test_a_missing_wheel_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(binaries.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(binaries, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="no PostgreSQL server programs") as raised:
        Cluster(["a"]).__enter__()
    assert raised.value.hint is not None
    assert "shardmove[embedded]" in raised.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the servers as somebody else")
def test_as_root_the_wheel_is_copied_when_nobody_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(binaries.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(binaries, "_world_readable", lambda _: False)
    with Cluster(["a"], settings=UNSAFE_BUT_FAST) as cluster:
        assert cluster["a"].binaries.directory.is_relative_to(cluster["a"].directory.parent)
        assert ask(cluster["a"].dsn, "SELECT 1") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the servers as somebody else")
def test_as_root_a_directory_that_nobody_can_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="out of reach"):
        Cluster(["a"], directory=tmp_path / "private").__enter__()


def test_a_failed_start_shows_the_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(directory.parent))
    with pytest.raises(Failed, match="unrecognized configuration parameter"):
        Cluster(["a", "b"], settings={"no_such_setting": "1"}).__enter__()
    assert list(directory.parent.iterdir()) == []


def test_a_temporary_cluster_leaves_nothing() -> None:
    with Cluster(["a"], settings=UNSAFE_BUT_FAST) as cluster:
        server = cluster["a"]
        postmaster = psutil.Process(server.pid)
    assert watcher.wait_gone([postmaster], 0)
    assert not server.directory.parent.exists()


def test_a_given_directory_is_kept_for_the_next_cluster(directory: Path) -> None:
    with Cluster(["a"], directory=directory, settings=UNSAFE_BUT_FAST) as cluster:
        run(cluster["a"], "CREATE TABLE kept AS SELECT 42 AS answer")
    with Cluster(["a"], directory=directory, settings=UNSAFE_BUT_FAST) as cluster:
        assert ask(cluster["a"].dsn, "SELECT answer FROM kept") == 42
        assert "not properly shut down" not in cluster["a"].log.read_text()


def test_a_directory_serves_one_cluster_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmove.postgres.embedded._DIRECTORY_BOUND_S", 0.1)
    with Cluster(["a"], directory=directory, settings=UNSAFE_BUT_FAST) as first:
        with pytest.raises(Refused, match="in use by another cluster"):
            Cluster(["a"], directory=directory).__enter__()
        assert ask(first["a"].dsn, "SELECT 1") == 1


def test_several_clusters_start_at_once() -> None:
    def identify(_: int) -> set[object]:
        with Cluster(["a", "b"], settings=UNSAFE_BUT_FAST) as cluster:
            return {ask(server.dsn, "SELECT system_identifier FROM pg_control_system()") for server in cluster}

    with ThreadPoolExecutor(3) as pool:
        identifiers = list(pool.map(identify, range(3)))
    assert len(set().union(*identifiers)) == 6


def test_a_port_that_somebody_takes_first_is_tried_again_elsewhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardmove.postgres import embedded

    taken, free = cluster["a"].port, embedded._free_port()
    ports = iter([taken, free])
    monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
    with Cluster(["c"], settings=UNSAFE_BUT_FAST) as other:
        assert other["c"].port == free


class Owner:
    """A process that owns a cluster of two servers."""

    def __init__(self, *arguments: str, then: str = "") -> None:
        script = textwrap.dedent(OWNER) % then
        self.process = subprocess.Popen(
            (sys.executable, "-c", script, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self.process.stdout is not None
        *directories, self.dsn = self.process.stdout.readline().strip().split("|")
        self.directories = [Path(directory) for directory in directories]
        found = [watcher.postmaster_of(directory / "data") for directory in self.directories]
        self.postmasters = [postmaster for postmaster in found if postmaster is not None]
        assert len(self.postmasters) == 2

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.fault
def test_servers_and_directory_are_gone_after_the_owner_is_killed() -> None:
    owner = Owner()
    owner.kill()
    assert watcher.wait_gone(owner.postmasters, PATIENCE_S)
    wait_until(lambda: not owner.directories[0].parent.exists())


@pytest.mark.fault
def test_a_given_directory_is_kept_after_the_owner_is_killed(directory: Path) -> None:
    owner = Owner(str(directory))
    with psycopg.connect(owner.dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    owner.kill()
    assert watcher.wait_gone(owner.postmasters, PATIENCE_S)
    with Cluster(["a", "b"], directory=directory, settings=UNSAFE_BUT_FAST) as cluster:
        assert ask(cluster["a"].dsn, "SELECT answer FROM kept") == 42


@pytest.mark.fault
def test_a_forked_child_does_not_keep_the_servers_alive() -> None:
    owner = Owner(then="import os, signal\nif os.fork() == 0: print(os.getpid(), flush=True); signal.pause()")
    assert owner.process.stdout is not None
    child = psutil.Process(int(owner.process.stdout.readline()))
    try:
        owner.kill()
        assert watcher.wait_gone(owner.postmasters, PATIENCE_S)
        assert child.is_running()
    finally:
        child.kill()


@pytest.mark.fault
def test_the_watcher_waits_for_a_start_that_outlives_its_owner(directory: Path) -> None:
    owner = Owner(str(directory))
    data = owner.directories[0] / "data"
    with watcher.start_lock(data):
        owner.kill()
        assert not watcher.wait_gone(owner.postmasters, 0.2)
    assert watcher.wait_gone(owner.postmasters, PATIENCE_S)


def test_a_process_that_has_a_dead_postmasters_number_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path}\n")
    assert watcher.postmaster_of(tmp_path) is None


def test_fresh_databases_share_a_name_on_every_server(databases: Callable[..., dict[str, str]]) -> None:
    first, second = databases("s1", "s2"), databases("s1")
    names = [ask(dsn, "SELECT current_database()") for dsn in (*first.values(), *second.values())]
    assert names[0] == names[1] != names[2]
