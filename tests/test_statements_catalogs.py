"""PostgreSQL's own relations, as servers of the oldest and the newest release list them."""

from __future__ import annotations

import psycopg
import pytest

from router.statements.catalogs import is_catalog
from shardmove.postgres.embedded import Cluster


@pytest.mark.parametrize("release", ["servers", "old_servers"])
def test_every_relation_of_a_server_is_known(release: str, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(release)
    query = (
        "SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind IN ('r', 'v', 'm')"
    )
    with psycopg.connect(next(iter(cluster)).dsn) as connection:
        names = [name for (name,) in connection.execute(query).fetchall()]
    assert len(names) > 100
    assert [name for name in names if not is_catalog(None, name)] == []
    assert not is_catalog(None, "pg_notes")
    assert not is_catalog("public", "pg_class")
