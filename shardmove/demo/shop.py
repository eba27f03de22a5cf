"""The shop: its tables, and how they are created and filled."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

Connection: TypeAlias = psycopg.Connection[Any]

KEYSPACE: Final = "shop"
KEY_COLUMNS: Final = {
    "tenants": "tenant_id",
    "customers": "tenant_id",
    "orders": "tenant_id",
    "order_items": "tenant_id",
    "tenant_totals": "tenant_id",
}
"""Table → key column, as the configuration file wants it (`[keyspaces.shop.tables]`), parents first."""

CUSTOMERS_SHARE: Final = 0.1  # of a tenant's rows; three orders a customer, two items an order
ORDERS_A_CUSTOMER: Final = 3
ITEMS_AN_ORDER: Final = 2

_NOTES: Final = (None, "gift", "leave at the door", 'says "soon"', "two\nlines", "back\\slash\tand tab", "größe 😀", "")


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table that clients write. Its primary key begins with the tenant; its rows carry a `version`.

    Each table is one object, equal to itself alone: it is a key of the writers' dictionaries.
    """

    name: str
    key: tuple[str, ...]
    extra: tuple[str, ...] = ()

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.name)

    @property
    def image(self) -> sql.Composed:
        """Select list of one row, its table named `t`: key as 'tenant,id,…', text of the row, version, the extra."""
        key = sql.SQL(" || ',' || ").join(sql.Identifier("t", column) for column in self.key)
        columns = [sql.SQL("{}::text").format(key) if len(self.key) == 1 else key, sql.SQL("t::text")]
        return sql.SQL(", ").join([*columns, *(sql.Identifier("t", column) for column in ("version", *self.extra))])


TENANTS: Final = Table("tenants", ("tenant_id",))
CUSTOMERS: Final = Table("customers", ("tenant_id", "customer_id"), ("email",))
ORDERS: Final = Table("orders", ("tenant_id", "order_id"), ("customer_id",))
ITEMS: Final = Table("order_items", ("tenant_id", "order_id", "line"))
WRITTEN_TABLES: Final = (TENANTS, CUSTOMERS, ORDERS, ITEMS)
"""The tables whose rows the ledger knows; `tenant_totals` follows from `orders`."""


def pinned(dsn: str) -> str:
    """The same connection string, with every setting pinned that decides how a row reads as text."""
    options = conninfo_to_dict(dsn).get("options")
    settings = "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3"
    return make_conninfo(dsn, options=f"{options} {settings}" if options else settings)


def create(conn: Connection) -> None:
    """Creates the shop's tables, in one transaction, in the first schema of the search path."""
    with conn.transaction():
        conn.execute(files("shardmove.demo").joinpath("shop.sql").read_bytes())


def load(conn: Connection, tenants: Sequence[int], *, rows: int, seed: int = 0) -> int:
    """Fills the given tenants with about `rows` rows in total, and returns how many they are; the same each time.

    One transaction. Needs the ownership of the tables and nothing else: the user triggers of `orders` rest meanwhile,
    and the totals are computed once.
    """
    plan = list(_tenants(conn, tenants, rows, random.Random(seed)))
    with conn.transaction():
        conn.execute("ALTER TABLE orders DISABLE TRIGGER USER")
        _copy(conn, "COPY tenants (tenant_id, name, plan) FROM STDIN", (t.row for t in plan))
        _copy(conn, "COPY customers (tenant_id, customer_id, email, name) FROM STDIN", _each(t.customers for t in plan))
        _copy(
            conn,
            "COPY orders (tenant_id, order_id, customer_id, status, amount, note, attributes) FROM STDIN",
            _each(t.orders for t in plan),
        )
        _copy(
            conn,
            "COPY order_items (tenant_id, order_id, line, sku, quantity, price) FROM STDIN",
            _each(t.items for t in plan),
        )
        conn.execute("ALTER TABLE orders ENABLE TRIGGER USER")
        conn.execute(
            "INSERT INTO tenant_totals SELECT tenant_id, count(*), sum(amount) FROM orders"
            " WHERE tenant_id = ANY (%s) GROUP BY tenant_id",
            (list(tenants),),
        )
        _raise_identities(conn)
    conn.execute("ANALYZE tenants, customers, orders, order_items, tenant_totals")
    return sum(1 + len(t.customers) + len(t.orders) + len(t.items) for t in plan)


Row: TypeAlias = tuple[Any, ...]


@dataclass(slots=True)
class _Tenant:
    row: Row
    customers: list[Row]
    orders: list[Row]
    items: list[Row]


def _tenants(conn: Connection, tenants: Sequence[int], rows: int, dice: random.Random) -> Iterator[_Tenant]:
    """Tenants of equal size; ids of customers and orders go on from the highest ones that are there."""
    customer_id = _highest(conn, "SELECT max(customer_id) FROM customers")
    order_id = _highest(conn, "SELECT max(order_id) FROM orders")
    customers_each = max(1, round(rows / max(1, len(tenants)) * CUSTOMERS_SHARE))
    for tenant in tenants:
        made = _Tenant((tenant, f"Tenant {tenant}", dice.choice(("basic", "plus"))), [], [], [])
        for _ in range(customers_each):
            customer_id += 1
            made.customers.append((tenant, customer_id, f"c{customer_id}@t{tenant}.example", f"Customer {customer_id}"))
            for _ in range(ORDERS_A_CUSTOMER):
                order_id += 1
                made.orders.append(_order(tenant, order_id, customer_id, dice))
                made.items.extend(_item(tenant, order_id, line, dice) for line in range(1, ITEMS_AN_ORDER + 1))
        yield made


def _order(tenant: int, order_id: int, customer_id: int, dice: random.Random) -> Row:
    amount = f"{dice.randrange(1, 100_000) / 100:.2f}"
    attributes = f'{{"channel": "{dice.choice(("web", "app", "phone"))}", "weight": {dice.randrange(5000)}}}'
    return tenant, order_id, customer_id, dice.choice(("open", "paid", "sent")), amount, dice.choice(_NOTES), attributes


def _item(tenant: int, order_id: int, line: int, dice: random.Random) -> Row:
    return tenant, order_id, line, f"sku-{dice.randrange(1000):03}", dice.randrange(1, 10), dice.randrange(1, 1000)


def _each(groups: Iterator[list[Row]]) -> Iterator[Row]:
    return (row for group in groups for row in group)


def _copy(conn: Connection, statement: LiteralString, rows: Iterator[Row]) -> None:
    with conn.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _highest(conn: Connection, query: LiteralString) -> int:
    row = conn.execute(query).fetchone()
    return int(row[0] or 0) if row else 0


def _raise_identities(conn: Connection) -> None:
    conn.execute("SELECT setval(pg_get_serial_sequence('customers', 'customer_id'), max(customer_id)) FROM customers")
    conn.execute("SELECT setval(pg_get_serial_sequence('orders', 'order_id'), max(order_id)) FROM orders")
