"""The shop with its orders partitioned: by tenant, one partition by order again; its items by hash.

orders
├── orders_0       tenants below 20
├── orders_20      from 20 on
└── orders_30      from 30 on
    ├── orders_30_a    orders below 400
    └── orders_30_b    all others
order_items
├── items_0
└── items_1
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Final

import pytest

from shardmove.postgres.connect import Connection
from tests.support.servers import Databases
from tests.support.world import World

PARTITIONS: Final = """
    CREATE TABLE orders_0 PARTITION OF orders FOR VALUES FROM (MINVALUE) TO (20);
    CREATE TABLE orders_20 PARTITION OF orders FOR VALUES FROM (20) TO (30);
    CREATE TABLE orders_30 PARTITION OF orders FOR VALUES FROM (30) TO (100) PARTITION BY RANGE (order_id);
    CREATE TABLE orders_30_a PARTITION OF orders_30 FOR VALUES FROM (MINVALUE) TO (400);
    CREATE TABLE orders_30_b PARTITION OF orders_30 FOR VALUES FROM (400) TO (MAXVALUE);
    CREATE TABLE items_0 PARTITION OF order_items FOR VALUES WITH (MODULUS 4, REMAINDER 0);
    CREATE TABLE items_1 PARTITION OF order_items FOR VALUES WITH (MODULUS 4, REMAINDER 1);
    CREATE TABLE items_2 PARTITION OF order_items FOR VALUES WITH (MODULUS 4, REMAINDER 2);
    CREATE TABLE items_3 PARTITION OF order_items FOR VALUES WITH (MODULUS 4, REMAINDER 3);
"""


def create(connection: Connection) -> None:
    """The shop's own tables, two of them partitioned; all the rest is the same."""
    text = files("shardmove.demo").joinpath("shop.sql").read_text(encoding="utf-8")
    for table, by in (("orders", "RANGE (tenant_id)"), ("order_items", "HASH (tenant_id, order_id)")):
        begin = text.index(f"CREATE TABLE {table} (")
        end = text.index("\n);", begin)
        text = f"{text[:end]}\n) PARTITION BY {by};{text[end + 3 :]}"
    with connection.transaction():
        connection.execute(text.encode())
        connection.execute(PARTITIONS.encode())


@pytest.fixture
def make_partitioned(databases: Databases, tmp_path: Path) -> Callable[..., World]:
    """`make_partitioned(rows_a_tenant=…)`: a world whose orders and items are partitioned."""
    return lambda **options: World(databases, tmp_path, create=create, **options)
