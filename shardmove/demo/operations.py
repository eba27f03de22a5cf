"""What the shop's clients do: one function an operation, each the body of one transaction.

An operation takes an `Attempt` and may be run several times; it makes the same choices each time (the attempt's dice
are thrown anew from the same seed) from what the writer knows, and changes only the database and its own attempt.

Each write finds its row by primary key *and version*: whatever was lost or overwritten on the way makes it find
nothing, which is a `Surprise`, rolled back and reported, instead of papering over the damage with a fresh value.
After-images come from the database itself (RETURNING, or a read at the end), so that defaults, identities, triggers and
cascades are in the ledger exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, TypeAlias

import psycopg
from psycopg import sql

from shardmove.demo.shop import CUSTOMERS, ITEMS, ORDERS, TENANTS, WRITTEN_TABLES, Table

Connection: TypeAlias = psycopg.Connection[Any]
Key: TypeAlias = tuple[int, ...]

KEY_VALUES: Final = ("tenant", "order", "line")  # of the rows that single statements write, in the order of their keys
CASCADE_MAX = 12  # orders of a customer that is deleted or moved at once
GRAVES_MAX = 50


class Skip(Exception):
    """The operation does not apply here. Rolled back, not counted."""


class Surprise(Exception):
    """The database does not hold what the ledger says. Rolled back, and reported as an error."""


@dataclass(frozen=True, slots=True)
class Known:
    """A row as it was last acknowledged. `extra`: the e-mail of a customer, the customer of an order."""

    image: str
    version: int
    extra: Any = None


Change: TypeAlias = tuple[Table, Key, Known | None]


class Tenant:
    """What a writer knows of one of its tenants."""

    def __init__(self, tenant_id: int) -> None:
        self.id = tenant_id
        self.rows: dict[Table, dict[Key, Known]] = {table: {} for table in WRITTEN_TABLES}
        self.graves: list[Key] = []  # deleted orders whose keys are used again

    def apply(self, table: Table, key: Key, known: Known | None) -> None:
        if known is not None:
            self.rows[table][key] = known
        elif self.rows[table].pop(key, None) is not None and table is ORDERS:
            self.graves = [*self.graves, key][-GRAVES_MAX:]

    def orders_of(self, customer: Key) -> list[Key]:
        return [key for key, known in self.rows[ORDERS].items() if known.extra == customer[1]]

    def items_of(self, order: Key) -> list[Key]:
        return [key for key in self.rows[ITEMS] if key[1] == order[1]]


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement that returns the image of each row of `table` that it touched or read."""

    table: Table
    text: bytes


def _statement(table: Table, template: LiteralString) -> Statement:
    return Statement(table, sql.SQL(template).format(table.image).as_bytes())


@dataclass(slots=True)
class Attempt:
    """One attempt at one operation: its connection, its dice, and the changes that it made so far.

    Attributes:
        announce: is told the key of a row before it is written, where that is a statement of its own.
    """

    conn: Connection
    tenant: Tenant
    other: Tenant | None
    dice: random.Random
    version: int
    changes: dict[tuple[Table, Key], Known | None] = field(default_factory=dict)
    announce: Callable[[Table, Key], None] | None = None

    def pick(self, table: Table, tenant: Tenant | None = None) -> tuple[Key, Known]:
        """One of the tenant's rows. Skips where it has none."""
        rows = (tenant or self.tenant).rows[table]
        if not rows:
            raise Skip
        key = self.dice.choice(list(rows))
        return key, rows[key]

    def write(self, statement: Statement, rows: int | None = 1, **values: Any) -> list[Key]:
        """Runs it, notes every returned row, and returns their keys. Surprised unless they are `rows` in number."""
        values = {"tenant": self.tenant.id, "new_version": self.version, **values}
        if self.announce is not None:
            self.announce(statement.table, tuple(values[name] for name in KEY_VALUES if name in values))
        found = self.conn.execute(statement.text, values).fetchall()
        if rows is not None and len(found) != rows:
            raise Surprise(f"{len(found)} rows instead of {rows} of {statement.table.name} with {_keys(values)}")
        keys = []
        for key, known in map(_known, found):
            self.changes[statement.table, key] = known
            keys.append(key)
        return keys

    def read(self, statement: Statement, expected: Mapping[Key, Known], **values: Any) -> None:
        """Reads rows and compares them whole with what is known. Surprised by any difference."""
        found = dict(map(_known, self.conn.execute(statement.text, {"tenant": self.tenant.id, **values}).fetchall()))
        if found != expected:
            differing = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            raise Surprise(f"{statement.table.name} {differing[:5]} are not as they were acknowledged")

    def gone(self, table: Table, keys: Iterable[Key]) -> None:
        self.changes.update({(table, key): None for key in keys})

    def money(self) -> str:
        return f"{self.dice.randrange(1, 100_000) / 100:.2f}"


Operation: TypeAlias = Callable[[Attempt], None]

READ_TENANT: Final = {
    TENANTS: _statement(TENANTS, "SELECT {} FROM tenants t WHERE tenant_id = ANY (%(tenants)s)"),
    CUSTOMERS: _statement(CUSTOMERS, "SELECT {} FROM customers t WHERE tenant_id = ANY (%(tenants)s)"),
    ORDERS: _statement(ORDERS, "SELECT {} FROM orders t WHERE tenant_id = ANY (%(tenants)s)"),
    ITEMS: _statement(ITEMS, "SELECT {} FROM order_items t WHERE tenant_id = ANY (%(tenants)s)"),
}
LOCK_PARENTS: Final = (
    "SELECT FROM tenants WHERE tenant_id = ANY (%(tenants)s) FOR UPDATE",
    "SELECT FROM customers WHERE tenant_id = ANY (%(tenants)s) FOR UPDATE",
    "SELECT FROM orders WHERE tenant_id = ANY (%(tenants)s) FOR UPDATE",
)


def read_tenants(conn: Connection, tenant_ids: Sequence[int], *, lock: bool = False) -> dict[int, Tenant]:
    """Reads all that the shard holds of the tenants.

    Args:
        lock: first wait for every transaction that is still writing to them (an insert locks its parent row against
            FOR UPDATE), so that a COMMIT whose client is gone is decided. Only in READ COMMITTED.
    """
    values = {"tenants": list(tenant_ids)}
    for query in LOCK_PARENTS if lock else ():
        conn.execute(query, values)
    tenants = {tenant_id: Tenant(tenant_id) for tenant_id in tenant_ids}
    for table, statement in READ_TENANT.items():
        for key, known in map(_known, conn.execute(statement.text, values)):
            tenants[key[0]].rows[table][key] = known
    return tenants


def _known(row: Sequence[Any]) -> tuple[Key, Known]:
    key, image, version, *extra = row
    return tuple(map(int, key.split(","))), Known(image, version, *extra)


def _keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in {"tenant", "customer", "order", "line", "version"}}


# --- single statements ------------------------------------------------------------------------------------------------

_INSERT_ORDER = _statement(
    ORDERS,
    "INSERT INTO orders AS t (tenant_id, customer_id, amount, note, attributes, version)"
    ' VALUES (%(tenant)s, %(customer)s, %(amount)s, %(note)s, \'{{"by": "writer"}}\', %(new_version)s) RETURNING {}',
)
_CHANGE_ORDER = _statement(
    ORDERS,
    "UPDATE orders t SET status = %(status)s, amount = %(amount)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND version = %(version)s RETURNING {}",
)
_RENAME_TENANT = _statement(
    TENANTS,
    "UPDATE tenants t SET name = %(name)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND version = %(version)s RETURNING {}",
)
_UPSERT_ITEM = _statement(
    ITEMS,
    "INSERT INTO order_items AS t (tenant_id, order_id, line, sku, quantity, price, version)"
    " VALUES (%(tenant)s, %(order)s, %(line)s, 'sku-up', 1, %(price)s, %(new_version)s)"
    " ON CONFLICT (tenant_id, order_id, line)"
    " DO UPDATE SET quantity = t.quantity + 1, version = excluded.version WHERE t.version = %(version)s RETURNING {}",
)
_UPSERT_CUSTOMER = _statement(
    CUSTOMERS,
    "INSERT INTO customers AS t (tenant_id, email, name, version)"
    " VALUES (%(tenant)s, %(email)s, %(name)s, %(new_version)s)"
    " ON CONFLICT (tenant_id, email)"
    " DO UPDATE SET name = excluded.name, version = excluded.version WHERE t.version = %(version)s RETURNING {}",
)
_DELETE_ORDER = _statement(
    ORDERS,
    "DELETE FROM orders t WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND version = %(version)s RETURNING {}",
)
_DELETE_CUSTOMER = _statement(
    CUSTOMERS,
    "DELETE FROM customers t"
    " WHERE tenant_id = %(tenant)s AND customer_id = %(customer)s AND version = %(version)s RETURNING {}",
)


def place_order(a: Attempt) -> None:
    """An insert whose key comes from the identity."""
    _insert_order(a)


def _insert_order(a: Attempt) -> Key:
    customer, _ = a.pick(CUSTOMERS)
    note = a.dice.choice((None, "quick", "with\nnewline", 'a "quoted" one'))
    (order,) = a.write(_INSERT_ORDER, customer=customer[1], amount=a.money(), note=note)
    return order


def change_order(a: Attempt) -> None:
    order, known = a.pick(ORDERS)
    _change(a, order, known.version)


def _change(a: Attempt, order: Key, version: int) -> None:
    status = a.dice.choice(("open", "paid", "sent", "returned"))
    a.write(_CHANGE_ORDER, order=order[1], version=version, status=status, amount=a.money())


def rename_tenant(a: Attempt) -> None:
    _, known = a.pick(TENANTS)
    a.write(_RENAME_TENANT, version=known.version, name=f"Tenant {a.tenant.id} v{a.version}")


def upsert_item(a: Attempt) -> None:
    """Half of the time the line is there already."""
    order, _ = a.pick(ORDERS)
    line = a.dice.randrange(1, 5)
    known = a.tenant.rows[ITEMS].get((*order, line))
    a.write(_UPSERT_ITEM, order=order[1], line=line, price=a.money(), version=known.version if known else 0)


def upsert_customer(a: Attempt) -> None:
    """Half of the time the e-mail is there already."""
    email, version = f"w{a.version}@t{a.tenant.id}.example", 0
    if a.dice.random() < 0.5:
        _, known = a.pick(CUSTOMERS)
        email, version = known.extra, known.version
    a.write(_UPSERT_CUSTOMER, email=email, name=f"Customer v{a.version}", version=version)


def cancel_order(a: Attempt) -> None:
    """Takes the order's items along, by cascade."""
    order, known = a.pick(ORDERS)
    a.write(_DELETE_ORDER, order=order[1], version=known.version)
    a.gone(ORDERS, [order])
    a.gone(ITEMS, a.tenant.items_of(order))


def remove_customer(a: Attempt) -> None:
    """Takes orders and their items along, by cascade."""
    customer, known = a.pick(CUSTOMERS)
    orders = a.tenant.orders_of(customer)
    if len(orders) > CASCADE_MAX or len(a.tenant.rows[CUSTOMERS]) < 3:
        raise Skip
    a.write(_DELETE_CUSTOMER, customer=customer[1], version=known.version)
    a.gone(CUSTOMERS, [customer])
    a.gone(ORDERS, orders)
    for order in orders:
        a.gone(ITEMS, a.tenant.items_of(order))


_DELETE_ITEM = _statement(
    ITEMS,
    "DELETE FROM order_items t WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND line = %(line)s"
    " AND version = %(version)s RETURNING {}",
)


def remove_item(a: Attempt) -> None:
    item, known = a.pick(ITEMS)
    a.write(_DELETE_ITEM, order=item[1], line=item[2], version=known.version)
    a.gone(ITEMS, [item])


# --- several statements -----------------------------------------------------------------------------------------------

_INSERT_ITEMS = _statement(
    ITEMS,
    "INSERT INTO order_items AS t (tenant_id, order_id, line, sku, quantity, price, version)"
    " SELECT %(tenant)s, %(order)s, line, 'sku-' || line, line, 9.99, %(new_version)s"
    " FROM generate_series(1, %(lines)s::int) line RETURNING {}",
)
_INSERT_ORDER_AGAIN = _statement(
    ORDERS,
    "INSERT INTO orders AS t (tenant_id, order_id, customer_id, amount, note, version)"
    " VALUES (%(tenant)s, %(order)s, %(customer)s, %(amount)s, 'again', %(new_version)s) RETURNING {}",
)
_INSERT_ITEM_AGAIN = _statement(
    ITEMS,
    "INSERT INTO order_items AS t (tenant_id, order_id, line, sku, quantity, price, version)"
    " VALUES (%(tenant)s, %(order)s, %(line)s, 'sku-again', 7, 0.50, %(new_version)s) RETURNING {}",
)
_ITEMS_OF_ORDERS = _statement(
    ITEMS, "SELECT {} FROM order_items t WHERE tenant_id = %(of_tenant)s AND order_id = ANY (%(orders)s)"
)
_ORDERS_OF_TENANT = _statement(ORDERS, "SELECT {} FROM orders t WHERE tenant_id = %(tenant)s")
_SET_EMAIL = _statement(
    CUSTOMERS,
    "UPDATE customers t SET email = %(email)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND customer_id = %(customer)s AND version = %(version)s RETURNING {}",
)
_COPY_ITEMS = "COPY order_items (tenant_id, order_id, line, sku, quantity, price, version) FROM STDIN"


def place_order_with_items(a: Attempt) -> None:
    order = _insert_order(a)
    lines = a.dice.randrange(1, 5)
    a.write(_INSERT_ITEMS, lines, order=order[1], lines=lines)


def copy_items(a: Attempt) -> None:
    """A new order whose items come by COPY."""
    order = _insert_order(a)
    with a.conn.cursor() as cursor, cursor.copy(_COPY_ITEMS) as copy:
        for line in (1, 2, 3):
            copy.write_row((*order, line, f"sku-copy-{line}", line, "1.25", a.version))
    a.write(_ITEMS_OF_ORDERS, 3, of_tenant=order[0], orders=[order[1]])


def change_mind(a: Attempt) -> None:
    """Savepoints: one is rolled back, the same row is written again, another one is kept."""
    order, known = a.pick(ORDERS)
    with a.conn.transaction() as savepoint:
        undone = Attempt(a.conn, a.tenant, None, a.dice, a.version)
        _change(undone, order, known.version)
        _insert_order(undone)
        raise psycopg.Rollback(savepoint)
    with a.conn.transaction():
        _change(a, order, known.version)
    with a.conn.transaction() as savepoint:
        a.conn.execute("DELETE FROM order_items WHERE tenant_id = %s AND order_id = %s", order)
        raise psycopg.Rollback(savepoint)


def replace_item(a: Attempt) -> None:
    """Deletes a row and inserts its key again, in one transaction."""
    item, known = a.pick(ITEMS)
    a.write(_DELETE_ITEM, order=item[1], line=item[2], version=known.version)
    a.write(_INSERT_ITEM_AGAIN, order=item[1], line=item[2])


def revive_order(a: Attempt) -> None:
    """Inserts the key of an order that was deleted by an earlier transaction."""
    graves = [key for key in a.tenant.graves if key not in a.tenant.rows[ORDERS]]
    if not graves:
        raise Skip
    customer, _ = a.pick(CUSTOMERS)
    a.write(_INSERT_ORDER_AGAIN, order=a.dice.choice(graves)[1], customer=customer[1], amount=a.money())


def swap_emails(a: Attempt) -> None:
    """A unique value passes from one row to another and back: three updates of two rows."""
    (one, first), (two, second) = a.pick(CUSTOMERS), a.pick(CUSTOMERS)
    if one == two:
        raise Skip
    aside = f"swap{a.version}@t{a.tenant.id}.example"
    a.write(_SET_EMAIL, customer=one[1], version=first.version, email=aside)
    a.write(_SET_EMAIL, customer=two[1], version=second.version, email=first.extra)
    a.write(_SET_EMAIL, customer=one[1], version=a.version, email=second.extra)


def review_orders(a: Attempt) -> None:
    """Reads all orders of the tenant, whole, then writes one: what SERIALIZABLE is for."""
    a.read(_ORDERS_OF_TENANT, a.tenant.rows[ORDERS])
    change_order(a)


# --- keys that change -------------------------------------------------------------------------------------------------

_RENUMBER_ORDER = _statement(
    ORDERS,
    "UPDATE orders t"
    " SET order_id = nextval(pg_get_serial_sequence('orders', 'order_id')), version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND version = %(version)s RETURNING {}",
)
_RENUMBER_LINE = _statement(
    ITEMS,
    "UPDATE order_items t SET line = %(new_line)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND line = %(line)s AND version = %(version)s RETURNING {}",
)
_MOVE_ORDER = _statement(
    ORDERS,
    "UPDATE orders t SET tenant_id = %(to)s, customer_id = %(customer)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND order_id = %(order)s AND version = %(version)s RETURNING {}",
)
_MOVE_CUSTOMER = _statement(
    CUSTOMERS,
    "UPDATE customers t SET tenant_id = %(to)s, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s AND customer_id = %(customer)s AND version = %(version)s RETURNING {}",
)
_ORDERS_BY_ID = _statement(
    ORDERS, "SELECT {} FROM orders t WHERE tenant_id = %(of_tenant)s AND order_id = ANY (%(orders)s)"
)


def renumber_order(a: Attempt) -> None:
    """Another primary key for the order, and by cascade for its items."""
    order, known = a.pick(ORDERS)
    items = a.tenant.items_of(order)
    a.gone(ORDERS, [order])
    a.gone(ITEMS, items)
    (renumbered,) = a.write(_RENUMBER_ORDER, order=order[1], version=known.version)
    a.write(_ITEMS_OF_ORDERS, len(items), of_tenant=a.tenant.id, orders=[renumbered[1]])


def renumber_line(a: Attempt) -> None:
    item, known = a.pick(ITEMS)
    new_line = 1 + max(key[2] for key in a.tenant.items_of(item[:2]))
    a.gone(ITEMS, [item])
    a.write(_RENUMBER_LINE, order=item[1], line=item[2], version=known.version, new_line=new_line)


def move_order(a: Attempt) -> None:
    """The shard key of a row changes: into, out of, or within a moving range. Its items follow by cascade."""
    other = _other(a)
    order, known = a.pick(ORDERS)
    customer, _ = a.pick(CUSTOMERS, other)
    if (other.id, order[1]) in other.rows[ORDERS]:
        raise Skip
    items = a.tenant.items_of(order)
    a.gone(ORDERS, [order])
    a.gone(ITEMS, items)
    a.write(_MOVE_ORDER, order=order[1], version=known.version, to=other.id, customer=customer[1])
    a.write(_ITEMS_OF_ORDERS, len(items), of_tenant=other.id, orders=[order[1]])


def move_customer(a: Attempt) -> None:
    """The same for a customer: two levels of cascade."""
    other = _other(a)
    customer, known = a.pick(CUSTOMERS)
    orders = a.tenant.orders_of(customer)
    arriving = {(other.id, order[1]) for order in orders}
    emails = {row.extra for row in other.rows[CUSTOMERS].values()}
    if (
        len(orders) > CASCADE_MAX
        or len(a.tenant.rows[CUSTOMERS]) < 3
        or (other.id, customer[1]) in other.rows[CUSTOMERS]
        or known.extra in emails
        or arriving & other.rows[ORDERS].keys()
    ):
        raise Skip
    items = [item for order in orders for item in a.tenant.items_of(order)]
    order_ids = [order[1] for order in orders]
    a.gone(CUSTOMERS, [customer])
    a.gone(ORDERS, orders)
    a.gone(ITEMS, items)
    a.write(_MOVE_CUSTOMER, customer=customer[1], version=known.version, to=other.id)
    a.write(_ORDERS_BY_ID, len(orders), of_tenant=other.id, orders=order_ids)
    a.write(_ITEMS_OF_ORDERS, len(items), of_tenant=other.id, orders=order_ids)


def _other(a: Attempt) -> Tenant:
    if a.other is None:
        raise Skip
    return a.other


# --- the whole tenant -------------------------------------------------------------------------------------------------

_BULK_ORDERS = _statement(
    ORDERS,
    "UPDATE orders t SET status = 'bulk', version = %(new_version)s WHERE tenant_id = %(tenant)s RETURNING {}",
)
_BULK_ITEMS = _statement(
    ITEMS,
    "UPDATE order_items t SET quantity = quantity + 1, version = %(new_version)s"
    " WHERE tenant_id = %(tenant)s RETURNING {}",
)


_ITEMS_OF_TENANT = _statement(ITEMS, "SELECT {} FROM order_items t WHERE tenant_id = %(tenant)s")


def mark_all_orders(a: Attempt) -> None:
    """Compares before it overwrites: a bulk update would hide whatever went wrong."""
    a.read(_ORDERS_OF_TENANT, a.tenant.rows[ORDERS])
    a.write(_BULK_ORDERS, len(a.tenant.rows[ORDERS]))


def raise_all_quantities(a: Attempt) -> None:
    a.read(_ITEMS_OF_TENANT, a.tenant.rows[ITEMS])
    a.write(_BULK_ITEMS, len(a.tenant.rows[ITEMS]))


MIX: Final[Mapping[Operation, float]] = {
    place_order: 14,
    change_order: 30,
    rename_tenant: 3,
    upsert_item: 10,
    upsert_customer: 4,
    cancel_order: 10,
    remove_customer: 1.5,
    place_order_with_items: 6,
    copy_items: 2,
    change_mind: 5,
    replace_item: 4,
    revive_order: 4,
    swap_emails: 3,
    review_orders: 1,
    renumber_order: 3,
    renumber_line: 3,
    move_order: 3,
    move_customer: 0.5,
    mark_all_orders: 0.25,
    raise_all_quantities: 0.25,
}
"""Operation → weight. Inserts and deletes are about even, so that the shop keeps its size."""

SINGLES: Final[Mapping[Operation, float]] = {
    change_order: 6,
    rename_tenant: 3,
    upsert_item: 5,
    remove_item: 1,
    revive_order: 1,
}
"""The same for single statements outside a transaction: those that know their row's key beforehand."""
LATE: Final = frozenset({review_orders, mark_all_orders, raise_all_quantities, change_mind})
"""Operations that stand in a transaction without a write of theirs, because the first statement reads, or the first
savepoint was rolled back: the next write may meet a fence that was closed meanwhile."""
