"""Shards, keyspaces and epochs: I7 holds in the database, whoever writes to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from shardmove.catalog.export import export_routes
from shardmove.catalog.moves import NewMove
from shardmove.catalog.store import Catalog
from shardmove.config import Config, parse
from shardmove.domain import points
from shardmove.domain.errors import EpochConflict, NotFound, Refused
from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import TableName
from shardmove.domain.routes import Route, Routes, RouteTable

REFUSED = "SM006"
SHOP = {
    "key_type": "bigint",
    "reference_tables": ["countries"],
    "tables": {"orders": "tenant_id", "sales.items": "tenant_id"},
    "routes": [{"range": ":", "shard": "s1"}],
}


def config(**keyspaces: object) -> Config:
    shards = {name: {"dsn": f"host=db dbname={name} password=hunter2"} for name in ("s1", "s2", "s3")}
    return parse({"catalog": {"dsn": "dbname=c"}, "shards": shards, "keyspaces": keyspaces or {"shop": SHOP}})


def without(config: Config, shard: str) -> Config:
    kept = {name: dsn for name, dsn in config.shards.items() if name != shard}
    return Config(config.catalog_dsn, kept, config.keyspaces, config.first_routes)


@pytest.fixture
def dsn(databases: Any) -> str:
    return str(databases("cat")["cat"])


@pytest.fixture
def catalog(dsn: str) -> Iterator[Catalog]:
    with Catalog.install(dsn) as catalog:
        catalog.apply(config())
        yield catalog


def split(at: int, shard: str = "s2") -> Routes:
    return Routes.of("shop", [Route(KeyRange(None, at), "s1"), Route(KeyRange(at, None), shard)])


def test_a_new_catalog_has_epoch_0_and_no_keyspaces(dsn: str) -> None:
    with Catalog.install(dsn) as catalog:
        assert catalog.routes() == RouteTable(0, {})


def test_apply_publishes_first_routes_and_says_what_changed(dsn: str) -> None:
    with Catalog.install(dsn) as catalog:
        assert catalog.apply(config()) == [
            "shard s1 added",
            "shard s2 added",
            "shard s3 added",
            "keyspace shop added",
            "keyspace shop: first routes published",
        ]
        assert catalog.routes() == RouteTable(1, dict(config().first_routes))
        assert catalog.keyspace("shop") == config().keyspace("shop")


def test_apply_is_safe_to_repeat_and_leaves_the_routes_alone(catalog: Catalog) -> None:
    catalog.publish(split(100), base=1, reason="a test")
    assert catalog.apply(config()) == []
    assert catalog.routes().epoch == 2


def test_a_second_keyspace_joins_the_same_epoch(catalog: Catalog) -> None:
    catalog.publish(split(100), base=1, reason="a test")
    two = config(shop=SHOP, log={**SHOP, "key_type": "smallint"})
    catalog.apply(two)
    table = catalog.routes()
    assert table.epoch == 3
    assert table["shop"] == split(100)
    assert table["log"] == two.first_routes["log"]
    assert catalog.keyspace("log").key_type is KeyType.SMALLINT


def test_a_keyspace_without_moves_can_be_dropped_with_its_routes(catalog: Catalog) -> None:
    catalog.apply(config(shop=SHOP, log=SHOP))
    assert catalog.apply(config()) == ["keyspace log dropped"]
    assert set(catalog.routes().keyspaces) == {"shop"}


def test_passwords_are_never_stored(catalog: Catalog, dsn: str) -> None:
    assert catalog.shards()["s1"] == "dbname=s1 host=db"
    uri = {name: {"dsn": f"postgresql://u:hunter2@db/{name}?sslpassword=hunter2"} for name in ("s1", "s2", "s3")}
    catalog.apply(parse({"catalog": {"dsn": ""}, "shards": uri, "keyspaces": {"shop": SHOP}}))
    with psycopg.connect(dsn) as connection:
        tables = ("shard", "event", "keyspace", "route_epoch")
        dump = [connection.execute(f"SELECT t::text FROM shardmove_catalog.{name} t").fetchall() for name in tables]
    assert "hunter2" not in str(dump)


def test_a_shard_that_owns_a_range_cannot_be_dropped(catalog: Catalog) -> None:
    catalog.publish(split(100), base=1, reason="a test")
    with pytest.raises(Refused, match=r"s2 cannot be dropped.*100:"):
        catalog.apply(without(config(), "s2"))
    assert catalog.apply(without(config(), "s3")) == ["shard s3 dropped"]


def test_a_shard_in_an_unfinished_move_cannot_be_dropped(catalog: Catalog) -> None:
    catalog.create_plan("move", "", [NewMove("shop", (KeyRange(0, 9),), "s1", "s2")])
    with pytest.raises(Refused, match=r"s2 cannot be dropped.*m1"):
        catalog.apply(without(config(), "s2"))


def test_the_key_type_of_a_keyspace_cannot_change(catalog: Catalog) -> None:
    with pytest.raises(Refused, match="cannot become range of integer"):
        catalog.apply(config(shop={**SHOP, "key_type": "integer"}))


def test_tables_change_only_while_no_move_is_unfinished(catalog: Catalog) -> None:
    more = config(shop={**SHOP, "tables": {"orders": "tenant_id", "notes": "tenant"}})
    assert catalog.apply(more) == ["keyspace shop: tables changed"]
    assert catalog.keyspace("shop").tables == {
        TableName("public", "notes"): "tenant",
        TableName("public", "orders"): "tenant_id",
    }
    catalog.create_plan("move", "", [NewMove("shop", (KeyRange(0, 9),), "s1", "s2")])
    with pytest.raises(Refused, match="m1 is unfinished"):
        catalog.apply(config())
    with pytest.raises(Refused, match="cannot be dropped"):
        catalog.apply(config(log=SHOP))


def test_an_unknown_keyspace_is_named_with_those_that_are_close(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        catalog.keyspace("shp")
    assert caught.value.hint == "did you mean shop?"


NEXT_EPOCH = """
    UPDATE shardmove_catalog.cluster SET epoch = 2;
    INSERT INTO shardmove_catalog.route_epoch (epoch, reason) VALUES (2, 'by hand');
"""
ROUTE = "INSERT INTO shardmove_catalog.route (epoch, keyspace, lower, upper, shard) VALUES "


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(NEXT_EPOCH, id="no routes"),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, '10', 's1')", id="no upper end"),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', '10', NULL, 's1')", id="no lower end"),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, '9', 's1'), (2, 'shop', '10', NULL, 's2')", id="gap"),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, '10', 's1'), (2, 'shop', '9', NULL, 's2')", id="overlap"),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, NULL, 's1'), (2, 'shop', NULL, NULL, 's2')", id="twice"),
        pytest.param(
            NEXT_EPOCH
            + ROUTE
            + "(2, 'shop', NULL, '9', 's1'), (2, 'shop', '9', '9', 's1'), (2, 'shop', '9', NULL, 's2')",
            id="empty range",
        ),
        pytest.param(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, NULL, 's9')", id="unknown shard"),
        pytest.param(
            NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, NULL, 's1'), (2, 'log', NULL, NULL, 's1')", id="unknown keyspace"
        ),
        pytest.param(ROUTE + "(1, 'shop', '5', '6', 's1')", id="added to a published epoch"),
        pytest.param("UPDATE shardmove_catalog.route SET shard = 's2'", id="changed in a published epoch"),
        pytest.param("DELETE FROM shardmove_catalog.route", id="removed from a published epoch"),
        pytest.param("TRUNCATE shardmove_catalog.route", id="truncated"),
        pytest.param("TRUNCATE shardmove_catalog.route_epoch CASCADE", id="epochs truncated"),
        pytest.param("UPDATE shardmove_catalog.route_epoch SET reason = ''", id="an epoch changed"),
        pytest.param("UPDATE shardmove_catalog.cluster SET epoch = 0", id="back to an earlier epoch"),
        pytest.param("DELETE FROM shardmove_catalog.cluster", id="no cluster"),
        pytest.param(
            "INSERT INTO shardmove_catalog.route_epoch (epoch, reason) VALUES (2, '');"
            + ROUTE
            + "(2, 'shop', NULL, NULL, 's1')",
            id="an epoch that is not the newest",
        ),
        pytest.param(
            NEXT_EPOCH
            + ROUTE
            + "(2, 'shop', NULL, NULL, 's1'); SET CONSTRAINTS ALL IMMEDIATE;"
            + ROUTE
            + "(2, 'shop', '5', '6', 's2')",
            id="added behind the check",
        ),
        pytest.param(
            NEXT_EPOCH
            + ROUTE
            + "(2, 'shop', NULL, '5', 's1'), (2, 'shop', '5', NULL, 's2'); SET CONSTRAINTS ALL IMMEDIATE;"
            + "DELETE FROM shardmove_catalog.route WHERE epoch = 2 AND lower = '5'",
            id="removed behind the check",
        ),
        pytest.param(
            "INSERT INTO shardmove_catalog.keyspace (name, key_type, scheme) VALUES ('log', 'bigint', 'range')",
            id="a keyspace without routes",
        ),
        pytest.param(
            "INSERT INTO shardmove_catalog.keyspace (name, key_type, scheme) VALUES ('log', 'bigint', 'range');"
            + ROUTE
            + "(1, 'log', NULL, NULL, 's1')",
            id="a keyspace added to a published epoch",
        ),
        pytest.param("DELETE FROM shardmove_catalog.keyspace", id="a keyspace removed from under its routes"),
        pytest.param("DELETE FROM shardmove_catalog.shard WHERE name = 's1'", id="an owner removed"),
        pytest.param("UPDATE shardmove_catalog.shard SET name = 's9' WHERE name = 's1'", id="an owner renamed"),
        pytest.param("UPDATE shardmove_catalog.keyspace SET key_type = 'uuid'", id="a key type changed"),
    ],
)
def test_plain_sql_cannot_break_the_coverage(catalog: Catalog, dsn: str, statements: LiteralString) -> None:
    before = catalog.routes()
    with pytest.raises(psycopg.Error) as caught, psycopg.connect(dsn) as connection:
        connection.execute(statements)
    assert caught.value.diag.sqlstate == REFUSED
    assert catalog.routes() == before


def test_plain_sql_may_publish_what_covers(catalog: Catalog, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(NEXT_EPOCH)
        connection.execute(ROUTE + "(2, 'shop', '9', NULL, 's2')")
        connection.execute(ROUTE + "(2, 'shop', NULL, '-9', 's1'), (2, 'shop', '-9', '9', 's3')")
    assert [route.shard for route in catalog.routes()["shop"].routes] == ["s1", "s3", "s2"]


def test_without_the_constraint_a_gap_is_published(catalog: Catalog, dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("ALTER TABLE shardmove_catalog.route_epoch DISABLE TRIGGER epoch_covers")
        connection.execute(NEXT_EPOCH + ROUTE + "(2, 'shop', NULL, '9', 's1')")
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT count(*) FROM shardmove_catalog.current_routes").fetchone() == (1,)


def test_bounds_are_compared_in_the_order_of_the_key_type(catalog: Catalog, dsn: str) -> None:
    ordered = {
        "bigint": [str(-(2**63)), "-10", "-9", "0", "9", "10", "100", str(2**63 - 1)],
        "text": ["", "B", "a", "b", "é"],
        "uuid": ["00000000-0000-0000-0000-000000000001", "0A000000-0000-0000-0000-000000000000", "f" * 32],
    }
    with psycopg.connect(dsn) as connection:
        for key_type, keys in ordered.items():
            query = "SELECT shardmove_catalog.sort_key(%s, key) FROM unnest(%s::text[]) key"
            sorted_as = [row[0] for row in connection.execute(query, (key_type, keys))]
            assert sorted_as == sorted(sorted_as)
            assert len(set(sorted_as)) == len(keys)


def test_an_old_base_publishes_nothing(catalog: Catalog) -> None:
    assert catalog.publish(split(100), base=1, reason="a test") == 2
    with pytest.raises(EpochConflict):
        catalog.publish(split(200), base=1, reason="a test")
    with pytest.raises(EpochConflict):
        catalog.publish(split(200), base=3, reason="a test")
    assert catalog.routes() == RouteTable(2, {"shop": split(100)})


def test_of_concurrent_publishers_on_one_base_exactly_one_wins(catalog: Catalog, dsn: str) -> None:
    barrier = threading.Barrier(4)

    def publish(worker: int) -> list[int]:
        won = []
        with Catalog.connect(dsn) as own:
            for epoch in range(1, 21):
                barrier.wait()
                try:
                    won.append(own.publish(split(worker), base=epoch, reason="a race"))
                except EpochConflict:
                    assert own.routes().epoch > epoch
        return won

    with ThreadPoolExecutor(4) as pool:
        won = [epoch for worker in pool.map(publish, range(1, 5)) for epoch in worker]
    assert sorted(won) == list(range(2, 22))


def test_concurrent_changes_are_all_in_the_last_epoch(catalog: Catalog, dsn: str) -> None:
    def change(worker: int) -> None:
        with Catalog.connect(dsn) as own:
            for step in range(5):
                key = worker * 100 + step * 10
                own.change_routes("shop", lambda r, k=key: r.assign([KeyRange(k, k + 1)], shard="s2"), "a race")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(change, range(3)))
    table = catalog.routes()
    assert table.epoch == 16
    moved = {route.range.lower for route in table["shop"].routes if route.shard == "s2"}
    assert moved == {worker * 100 + step * 10 for worker in range(3) for step in range(5)}


def test_a_change_that_changes_nothing_publishes_nothing(catalog: Catalog) -> None:
    assert catalog.change_routes("shop", lambda routes: routes, "nothing").epoch == 1
    assert catalog.routes().epoch == 1


def test_each_epoch_is_notified(catalog: Catalog, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN shardmove_routes")
        catalog.publish(split(100), base=1, reason="a test")
        assert [n.payload for n in listener.notifies(timeout=100, stop_after=1)] == ["2"]


def test_the_last_thousand_epochs_are_kept(catalog: Catalog, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("""
            DO $$ BEGIN FOR base IN 1..1003 LOOP
                PERFORM shardmove_catalog.publish(base, 'many', '[]'); COMMIT;
            END LOOP; END $$""")
        row = connection.execute("SELECT min(epoch), max(epoch) FROM shardmove_catalog.route_epoch").fetchone()
        assert row == (5, 1004)
        assert connection.execute("SELECT min(epoch) FROM shardmove_catalog.route").fetchone() == (5,)
    assert catalog.routes().epoch == 1004


def test_the_file_has_every_range(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    table = RouteTable(7, {"shop": split(100).assign([KeyRange(0, 5)], shard="s1", move_id="m1", held=True)})
    assert export_routes(table, path)
    document = json.loads(path.read_text())
    assert document["epoch"] == 7
    assert document["ranges"][1] == {"keyspace": "shop", "range": "0:5", "shard": "s1", "move": "m1", "held": True}
    assert [entry["range"] for entry in document["ranges"]] == [":0", "0:5", "5:100", "100:"]


def test_the_file_never_goes_back_and_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    export_routes(RouteTable(0, {"shop": split(1)}), path)
    writing = threading.Event()

    def write(first: int) -> None:
        for epoch in range(first, 120, 4):
            export_routes(RouteTable(epoch, {"shop": split(epoch)}), path, patience_s=60)

    def read() -> None:
        last = 0
        while not writing.is_set():
            document = json.loads(path.read_text())
            assert document["epoch"] >= last
            last = document["epoch"]

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        for each in [pool.submit(write, first) for first in range(1, 5)]:
            each.result()
        writing.set()
        reader.result()
    assert json.loads(path.read_text())["epoch"] == 119
    assert not export_routes(RouteTable(3, {"shop": split(3)}), path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".routes.json.lock", "routes.json"]


def test_a_writer_that_is_stopped_holds_nobody_up_and_writes_the_newest_epoch_in_the_end(
    catalog: Catalog, dsn: str, tmp_path: Path
) -> None:
    path = tmp_path / "routes.json"
    arrived, wake = threading.Event(), threading.Event()

    def stand(_: str) -> None:
        arrived.set()
        assert wake.wait(60)

    def publish(base: int, at: int) -> int:
        with Catalog.connect(dsn, routes_file=path) as exporting:
            return exporting.publish(split(at), base=base, reason="a test")

    with ThreadPoolExecutor(2) as pool:
        with points.armed("export_routes.before", stand):
            stopped = pool.submit(publish, 1, 100)
            assert arrived.wait(60)
        try:
            assert pool.submit(publish, 2, 200).result(50) == 3
        finally:
            wake.set()
        assert stopped.result(60) == 2
    assert json.loads(path.read_text())["epoch"] == 3
    (failed,) = [event.detail for event in catalog.events() if event.kind == "routes_file_failed"]
    assert "another process has been writing it" in failed["error"]


def test_a_file_of_another_cluster_or_of_nothing_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    path.write_text("{")
    assert export_routes(RouteTable(9, {"shop": split(1)}), path, cluster_id="a")
    assert export_routes(RouteTable(2, {"shop": split(2)}), path, cluster_id="b")
    assert json.loads(path.read_text())["epoch"] == 2


def test_each_publish_is_exported(catalog: Catalog, dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    with Catalog.connect(dsn, routes_file=path) as exporting:
        exporting.publish(split(100), base=1, reason="a test")
        assert json.loads(path.read_text())["epoch"] == 2


def test_a_file_that_cannot_be_written_is_an_event_and_the_epoch_stands(
    catalog: Catalog, dsn: str, tmp_path: Path
) -> None:
    with Catalog.connect(dsn, routes_file=tmp_path / "missing" / "routes.json") as exporting:
        assert exporting.publish(split(100), base=1, reason="a test") == 2
    assert [event.kind for event in catalog.events()][-1] == "routes_file_failed"
    assert catalog.routes().epoch == 2


def test_a_publisher_stopped_before_its_effect_has_none_and_after_it_all(catalog: Catalog) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str) -> None:
        raise Stopped(name)

    for point, epoch in (("publish.before", 1), ("publish.after", 2)):
        with points.armed(point, stop), pytest.raises(Stopped):
            catalog.publish(split(100), base=1, reason="a test")
        assert catalog.routes().epoch == epoch
