"""The catalog's schema: made once, upgraded in order, refused where it is not this release's."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from shardmove import __version__
from shardmove.catalog import upgrade as upgrading
from shardmove.catalog.moves import NewMove
from shardmove.catalog.session import connect, translated
from shardmove.catalog.store import Catalog
from shardmove.catalog.upgrade import HOOKS, Hook, check, require_current, upgrade
from shardmove.config import parse
from shardmove.domain.errors import ConfigurationError, Refused, Unreachable
from shardmove.domain.keys import KeyRange

CONFIG = parse(
    {
        "catalog": {"dsn": "dbname=catalog"},
        "shards": {"s1": {"dsn": "dbname=one"}, "s2": {"dsn": "dbname=two"}},
        "keyspaces": {"shop": {"tables": {"orders": "tenant_id"}, "routes": [{"range": ":", "shard": "s1"}]}},
    }
)


@pytest.fixture
def dsn(databases: Any) -> str:
    return str(databases("cat")["cat"])


def add_table(connection: psycopg.Connection[Any]) -> None:
    connection.execute("CREATE TABLE shardmove_catalog.later (n integer)")


def fail(connection: psycopg.Connection[Any]) -> None:
    add_table(connection)
    raise Refused("the hook cannot go on")


ALL = [hook.number for hook in HOOKS]
LATER = Hook(1000, "0.2.0", True, add_table)


def upgrade_in_process(dsn: str) -> list[int]:
    with connect(dsn, application_name="test") as connection:
        return upgrade(connection)


def test_the_hooks_of_this_release_keep_the_rules() -> None:
    check(HOOKS, __version__)


@pytest.mark.parametrize(
    ("hooks", "complaint"),
    [
        ([Hook(1, "0.1.0", True, add_table), Hook(1, "0.1.0", True, add_table)], "follows"),
        ([Hook(2, "0.2.0", True, add_table), Hook(3, "0.1.0", True, add_table)], "before"),
        ([Hook(1, "0.3.0", True, add_table)], "above"),
        ([Hook(1, "0.1.1", False, add_table)], "offline"),
    ],
)
def test_a_list_of_hooks_that_breaks_a_rule_is_named(hooks: list[Hook], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(hooks, "0.2.0")


def test_each_hook_runs_once(dsn: str) -> None:
    with connect(dsn, application_name="test") as connection:
        assert upgrade(connection) == ALL
        assert upgrade(connection) == []
        assert upgrade(connection, [*HOOKS, LATER]) == [1000]
        assert upgrade(connection, [*HOOKS, LATER]) == []


def test_concurrent_upgrades_from_processes_and_threads_run_each_hook_once(dsn: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as processes, ThreadPoolExecutor(2) as threads:
        ran = [pool.submit(upgrade_in_process, dsn) for pool in (processes, processes, threads, threads)]
        assert sorted(result.result() for result in ran) == [[], [], [], ALL]


def test_a_process_that_stops_in_an_upgrade_holds_up_the_next_one_for_a_while_only(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrading, "STOPPED_S", 1)
    with connect(dsn, application_name="stopped") as stopped, connect(dsn, application_name="next") as following:
        with suppress(Unreachable), translated(stopped), upgrading._alone(stopped):
            monkeypatch.undo()  # the next one may take its time
            upgrade(following)
        assert stopped.closed
        require_current(following)


def test_a_hook_that_fails_leaves_nothing_of_itself(dsn: str) -> None:
    with connect(dsn, application_name="test") as connection:
        upgrade(connection)
        with pytest.raises(Refused, match="cannot go on"):
            upgrade(connection, [*HOOKS, Hook(1000, "0.2.0", True, fail)])
        assert upgrade(connection, [*HOOKS, LATER]) == [1000]


def test_a_newer_catalog_is_refused(dsn: str) -> None:
    with connect(dsn, application_name="test") as connection:
        upgrade(connection, [*HOOKS, LATER])
        with pytest.raises(Refused, match=r"version skew.*0\.2\.0"):
            require_current(connection)
        with pytest.raises(Refused, match="version skew"):
            upgrade(connection)
    with pytest.raises(Refused, match="version skew"):
        Catalog.connect(dsn)


def test_a_missing_or_older_catalog_says_what_to_run(dsn: str) -> None:
    with pytest.raises(ConfigurationError) as missing:
        Catalog.connect(dsn)
    assert missing.value.hint == "run `shardmove apply`"
    with connect(dsn, application_name="test") as connection:
        upgrade(connection)
        with pytest.raises(ConfigurationError, match="older") as older:
            require_current(connection, [*HOOKS, LATER])
    assert older.value.hint == "run `shardmove apply`"


def test_an_offline_hook_waits_for_unfinished_moves(dsn: str) -> None:
    offline = replace(LATER, online=False)
    with Catalog.install(dsn) as catalog, connect(dsn, application_name="test") as connection:
        catalog.apply(CONFIG)
        catalog.create_plan("move", "", [NewMove("shop", (KeyRange(0, 9),), "s1", "s2")])
        with pytest.raises(Refused, match="m1"):
            upgrade(connection, [*HOOKS, offline])
        assert upgrade(connection, [*HOOKS, LATER]) == [1000]


def test_an_offline_hook_runs_where_every_move_is_finished(dsn: str) -> None:
    with Catalog.install(dsn), connect(dsn, application_name="test") as connection:
        assert upgrade(connection, [*HOOKS, replace(LATER, online=False)]) == [1000]


def test_uninstall_is_refused_while_a_move_is_unfinished(dsn: str) -> None:
    with Catalog.install(dsn) as catalog:
        catalog.apply(CONFIG)
        plan = catalog.create_plan("move", "", [NewMove("shop", (KeyRange(0, 9),), "s1", "s2")])
        with pytest.raises(Refused, match=plan.move_ids[0]):
            catalog.uninstall()
        assert catalog.move(plan.move_ids[0])


def test_uninstall_leaves_nothing_and_install_begins_anew(dsn: str) -> None:
    with Catalog.install(dsn) as catalog:
        first = catalog.cluster_id()
        catalog.uninstall()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT to_regnamespace('shardmove_catalog')").fetchone() == (None,)
    with Catalog.install(dsn) as catalog:
        assert catalog.cluster_id() != first


def test_a_server_that_does_not_answer_is_named_without_the_password() -> None:
    with pytest.raises(Unreachable) as caught:
        Catalog.connect("host=127.0.0.1 port=1 user=mover password=hunter2 dbname=x")
    assert "hunter2" not in repr(caught.value) + str(caught.value.__cause__)


def test_a_dsn_that_cannot_be_read_is_not_quoted() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Catalog.connect("dbname=x password=secret word hunter2")
    assert "hunter2" not in str(caught.value)
    assert "word" not in str(caught.value)
