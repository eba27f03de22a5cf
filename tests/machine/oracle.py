"""What the application was told, and nothing else: rows as a dict, operations on them, and what each may answer.

    order    ("orders", tenant, id)          → (note, extra)
    item     ("items", tenant, id, line)     → amount

An operation is a list of statements, and a function that does the same to a dict. The function raises what the server
would say. Nothing here reads a database, and nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString, TypeAlias

SCHEMA: Final[LiteralString] = """
    CREATE TABLE orders (tenant bigint, id int, note text, PRIMARY KEY (tenant, id), UNIQUE (tenant, note));
    CREATE TABLE items (
        tenant bigint, id int, line int, amount int NOT NULL, PRIMARY KEY (tenant, id, line),
        FOREIGN KEY (tenant, id) REFERENCES orders ON DELETE CASCADE ON UPDATE CASCADE
    )
"""
KEY_COLUMNS: Final = {"orders": "tenant", "items": "tenant"}

RANGE: Final = "100:200"
RESIDENTS: Final[Mapping[int, str]] = {99: "s1", 200: "s1", 300: "s2"}
"""Tenants that never move, and where they live."""
MOVING: Final = (100, 150, 199)
TENANTS: Final = (*MOVING, *RESIDENTS)
IDS: Final = (1, 2, 3)

RowKey: TypeAlias = tuple[Any, ...]
Rows: TypeAlias = dict[RowKey, Any]


def moves(tenant: int) -> bool:
    return tenant in MOVING


def first_rows() -> Rows:
    rows: Rows = {("orders", tenant, id_): (f"n{id_}", None) for tenant in TENANTS for id_ in (1, 2)}
    rows.update({("items", tenant, 1, 1): 0 for tenant in TENANTS})
    return rows


def first_rows_of(table: str, shard: str) -> list[tuple[Any, ...]]:
    """Those of one table that are on the shard at the beginning, column by column."""
    return [
        (*key[1:], value[0] if table == "orders" else value)
        for key, value in first_rows().items()
        if key[0] == table and RESIDENTS.get(key[1], "s1") == shard
    ]


class Rejected(Exception):
    """A constraint is in the way: what the server would say."""


UNIQUE, FOREIGN_KEY = "23505", "23503"

# --- operations

View: TypeAlias = MutableMapping[RowKey, Any]
Effect: TypeAlias = Callable[[View], int]
"""Changes the view as the statements would; returns how many rows they touch. Raises Rejected."""


@dataclass(frozen=True, slots=True)
class Operation:
    statements: tuple[str, ...]
    effect: Effect
    tenants: tuple[int, ...]
    """Whose rows it may touch."""


def operation(op: str, tenant: int, id_: int, n: int, shard: str) -> Operation:
    """Made of small numbers: `n` is which note, which other id, which line or which other tenant, as the operation
    needs."""
    return OPERATIONS[op](tenant, id_, n, shard)


def _insert(tenant: int, id_: int, n: int, _: str) -> Operation:
    def effect(view: View) -> int:
        if ("orders", tenant, id_) in view:
            raise Rejected(UNIQUE)
        _set_note(view, tenant, id_, f"n{n}")
        return 1

    return Operation((f"INSERT INTO orders (tenant, id, note) VALUES ({tenant}, {id_}, 'n{n}')",), effect, (tenant,))


def _update(tenant: int, id_: int, n: int, _: str) -> Operation:
    def effect(view: View) -> int:
        if ("orders", tenant, id_) not in view:
            return 0
        _set_note(view, tenant, id_, f"n{n}")
        return 1

    return Operation((f"UPDATE orders SET note = 'n{n}' WHERE {_here(tenant, id_)}",), effect, (tenant,))


def _upsert(tenant: int, id_: int, n: int, _: str) -> Operation:
    return upsert(tenant, id_, f"n{n}")


def upsert(tenant: int, id_: int, note: str) -> Operation:
    def effect(view: View) -> int:
        _set_note(view, tenant, id_, note)
        return 1

    statement = (
        f"INSERT INTO orders (tenant, id, note) VALUES ({tenant}, {id_}, '{note}')"
        " ON CONFLICT (tenant, id) DO UPDATE SET note = excluded.note"
    )
    return Operation((statement,), effect, (tenant,))


def _delete(tenant: int, id_: int, _n: int, _: str) -> Operation:
    def effect(view: View) -> int:
        touched = [key for key in view if key[1:3] == (tenant, id_)]
        for key in touched:
            del view[key]
        return int(("orders", tenant, id_) in touched)

    return Operation((f"DELETE FROM orders WHERE {_here(tenant, id_)}",), effect, (tenant,))


def _rekey(tenant: int, id_: int, n: int, shard: str) -> Operation:
    """To the same tenant under another id, or to another tenant, within the range or across its border."""
    targets = [t for t in TENANTS if RESIDENTS.get(t, shard) == shard]
    to_tenant, to_id = targets[n % len(targets)], id_ if targets[n % len(targets)] != tenant else id_ % len(IDS) + 1

    def effect(view: View) -> int:
        if ("orders", tenant, id_) not in view:
            return 0
        if ("orders", to_tenant, to_id) in view:
            raise Rejected(UNIQUE)
        moving = {key: view.pop(key) for key in list(view) if key[1:3] == (tenant, id_)}
        note, extra = moving.pop(("orders", tenant, id_))
        _set_note(view, to_tenant, to_id, note, extra)
        view.update({("items", to_tenant, to_id, key[3]): amount for key, amount in moving.items()})
        return 1

    statement = f"UPDATE orders SET tenant = {to_tenant}, id = {to_id} WHERE {_here(tenant, id_)}"
    return Operation((statement,), effect, (tenant, to_tenant))


def _swap(tenant: int, id_: int, n: int, _: str) -> Operation:
    """Two orders exchange their unique values, in two statements; nothing happens where one of them is missing."""
    other = IDS[n % len(IDS)]
    both = f"tenant = {tenant} AND id IN ({id_}, {other})"
    statements = (
        f"UPDATE orders SET note = '~' || note WHERE {both} AND (SELECT count(*) FROM orders WHERE {both}) = 2",
        f"UPDATE orders o SET note = substr(p.note, 2) FROM orders p WHERE o.tenant = {tenant} AND p.tenant = {tenant}"
        f" AND p.note LIKE '~%' AND (o.id, p.id) IN (({id_}, {other}), ({other}, {id_}))",
    )

    def effect(view: View) -> int:
        mine, theirs = ("orders", tenant, id_), ("orders", tenant, other)
        if id_ == other or mine not in view or theirs not in view:
            return 0
        (note, extra), (other_note, other_extra) = view[mine], view[theirs]
        view[mine], view[theirs] = (other_note, extra), (note, other_extra)
        return 4

    return Operation(statements, effect, (tenant,))


def _add_items(tenant: int, _id: int, n: int, _: str) -> Operation:
    """One statement, many rows: a line for every order of the tenant that lacks it."""

    def effect(view: View) -> int:
        orders = [key for key in view if key[:2] == ("orders", tenant)]
        new = [("items", *key[1:], n) for key in orders if ("items", *key[1:], n) not in view]
        view.update(dict.fromkeys(new, 1))
        return len(new)

    statement = (
        f"INSERT INTO items SELECT tenant, id, {n}, 1 FROM orders WHERE tenant = {tenant} ON CONFLICT DO NOTHING"
    )
    return Operation((statement,), effect, (tenant,))


def _bump(tenant: int, _id: int, n: int, _: str) -> Operation:
    def effect(view: View) -> int:
        items = [key for key in view if key[:2] == ("items", tenant)]
        for key in items:
            view[key] += n + 1
        return len(items)

    return Operation((f"UPDATE items SET amount = amount + {n + 1} WHERE tenant = {tenant}",), effect, (tenant,))


OPERATIONS: Final[Mapping[str, Callable[[int, int, int, str], Operation]]] = {
    "update": _update,
    "insert": _insert,
    "upsert": _upsert,
    "delete": _delete,
    "rekey": _rekey,
    "swap": _swap,
    "add_items": _add_items,
    "bump": _bump,
}


def set_extra(tenant: int, id_: int, n: int) -> Operation:
    """Writes to the column that comes and goes."""

    def effect(view: View) -> int:
        row = view.get(("orders", tenant, id_))
        if row is None:
            return 0
        view["orders", tenant, id_] = (row[0], f"e{n}")
        return 1

    return Operation((f"UPDATE orders SET extra = 'e{n}' WHERE {_here(tenant, id_)}",), effect, (tenant,))


def _here(tenant: int, id_: int) -> str:
    return f"tenant = {tenant} AND id = {id_}"


def _set_note(view: View, tenant: int, id_: int, note: str, extra: str | None = None) -> None:
    for key, value in view.items():
        if key[:2] == ("orders", tenant) and key[2] != id_ and value[0] == note:
            raise Rejected(UNIQUE)
    old = view.get(("orders", tenant, id_))
    view["orders", tenant, id_] = (note, old[1] if old is not None else extra)


# --- transactions


@dataclass(slots=True)
class Ledger:
    """The acknowledged rows, and when each tenant's were changed last."""

    rows: Rows = field(default_factory=first_rows)
    now: int = 0
    changed: dict[int, int] = field(default_factory=dict)

    def commit(self, changes: Mapping[RowKey, Any], tenants: Iterable[int]) -> None:
        """`tenants`: all whose rows were written to, also where they are what they were."""
        self.now += 1
        self.changed.update(dict.fromkeys(tenants, self.now))
        for key, value in changes.items():
            if value is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = value

    def of(self, tenants: Callable[[int], bool]) -> Rows:
        return {key: value for key, value in self.rows.items() if tenants(key[1])}


def overlaid(rows: Mapping[RowKey, Any], changes: Mapping[RowKey, Any]) -> Rows:
    return {key: value for key, value in {**rows, **changes}.items() if value is not None}


def difference(before: Mapping[RowKey, Any], after: Mapping[RowKey, Any]) -> Rows:
    """What changed: the new values, None for rows that are gone."""
    changes = {key: value for key, value in after.items() if before.get(key) != value}
    changes.update({key: None for key in before if key not in after})
    return changes
