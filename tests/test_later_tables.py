"""A table that comes to a keyspace later knows nothing of ranges that were given away: `apply` tells it."""

from __future__ import annotations

from dataclasses import replace

import psycopg
import pytest

from shardmove.coordinator.diagnose import diagnose
from shardmove.coordinator.shards import extend_fences
from shardmove.domain.moves import State, TableName
from tests.support.world import World

NOTES = "CREATE TABLE notes (tenant_id bigint, id bigint, PRIMARY KEY (tenant_id, id)) PARTITION BY HASH (id)"
ONE = "CREATE TABLE notes_1 PARTITION OF notes FOR VALUES WITH (MODULUS 1, REMAINDER 0)"


def test_a_later_table_refuses_what_was_given_away_before(world: World) -> None:
    world.run(world.split(at=20), State.COMPLETED)
    for shard in world.shards:
        with world.connect(shard) as connection:
            connection.execute(NOTES)
            connection.execute(ONE)
    shop = world.config.keyspaces["shop"]
    wider = replace(shop, tables={**shop.tables, TableName("public", "notes"): "tenant_id"})
    config = replace(world.config, keyspaces={"shop": wider})
    world.catalog.apply(config)
    with world.connect("s1") as stray:
        stray.execute("INSERT INTO notes VALUES (25, 1)")  # what happens without
        stray.execute("DELETE FROM notes")
        (found,) = diagnose(config, world.catalog)
        assert "notes of shop" in found.problem
        assert found.mend == "shardmove apply"

        assert extend_fences(config, world.catalog) == ["s1: notes refuses the ranges of shop that were given away"]
        for table in ("notes", "notes_1"):
            with pytest.raises(psycopg.errors.SerializationFailure, match="was given to another shard"):
                stray.execute(f"INSERT INTO {table} VALUES (25, 1)".encode())
        stray.execute("INSERT INTO notes VALUES (5, 1)")
    assert extend_fences(config, world.catalog) == []
    assert list(diagnose(config, world.catalog)) == []
