"""The independent checker: the shards, read by plain SQL, compared with the ledger. No code of the engine is used here.

It knows every row that must be there (baseline, overwritten by what was acknowledged) and looks at every row that is
there. Rows of a tenant count on the shard that owns the tenant; what lies elsewhere is the engine's own rest, and is
wrong only where `absent_on` says that nothing may be.

    lost         a row that must be there is not
    different    a row is there with another value, or a derived total does not follow from its rows
    unexpected   a row is there that was deleted, or that no client ever wrote, or in a range that must be empty
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
from psycopg import sql

from shardmove.demo import ledger
from shardmove.demo.ledger import Image, Outcome
from shardmove.demo.shop import WRITTEN_TABLES, Table, pinned
from shardmove.domain.keys import KeyRange

Owner: TypeAlias = Callable[[int], str] | Mapping[str, Iterable[KeyRange]]
"""Which shard owns a tenant: a function, or each shard's ranges."""

DETAILS_MAX = 20

_TOTALS = """
    SELECT coalesce(o.tenant_id, t.tenant_id), o.orders, o.amount, t.orders, t.amount
    FROM (SELECT tenant_id, count(*) AS orders, sum(amount) AS amount FROM orders GROUP BY tenant_id) o
    FULL JOIN tenant_totals t USING (tenant_id)
    WHERE coalesce(o.orders, 0) <> coalesce(t.orders, 0) OR coalesce(o.amount, 0) <> coalesce(t.amount, 0)
"""
_TOTALS_TENANTS = "SELECT tenant_id FROM tenant_totals"


@dataclass(slots=True)
class Report:
    """What the comparison found. `ok` is the verdict."""

    rows_checked: int = 0
    acknowledged: int = 0
    unknown: int = 0
    failed: int = 0
    lost: int = 0
    different: int = 0
    unexpected: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing lost, nothing different, nothing unexpected. Errors that clients saw are another matter: `failed`."""
        return not (self.lost or self.different or self.unexpected)

    def __str__(self) -> str:
        head = (
            f"{self.rows_checked} rows checked, {self.acknowledged} writes acknowledged ({self.unknown} unknown, "
            f"{self.failed} failed): lost {self.lost}, different {self.different}, unexpected {self.unexpected}"
        )
        return "\n  ".join([head, *self.details])

    def note(self, detail: str) -> None:
        if len(self.details) < DETAILS_MAX:
            self.details.append(detail)


def take_baseline(ledger_dir: Path, shard_dsns: Mapping[str, str], owner: Owner) -> int:
    """Writes every row of the shop to the ledger's directory, and returns their number. Before the first write."""
    owner_of = _owner_function(owner)
    rows: ledger.Rows = {table.name: {} for table in WRITTEN_TABLES}
    for shard, dsn in shard_dsns.items():
        with _connect(dsn) as conn:
            for table in WRITTEN_TABLES:
                found = _images(conn, table)
                rows[table.name].update((key, image) for tenant, key, image in found if owner_of(tenant) == shard)
    ledger_dir.mkdir(parents=True, exist_ok=True)
    ledger.write_baseline(ledger_dir, rows)
    return sum(map(len, rows.values()))


def check(
    ledger_dir: Path,
    shard_dsns: Mapping[str, str],
    owner: Owner,
    *,
    absent_on: Mapping[str, Iterable[KeyRange]] | None = None,
) -> Report:
    """Compares every row of every shard with the ledger. The writers must be stopped or paused.

    Args:
        owner: where each tenant's rows must be, now.
        absent_on: per shard, ranges of which no row may be there (after `complete`, after a rollback).
    """
    book = ledger.read(ledger_dir)
    report = Report(
        acknowledged=book.count(Outcome.ACKNOWLEDGED),
        unknown=book.count(Outcome.UNKNOWN) + book.unresolved,
        failed=book.count(Outcome.FAILED),
    )
    owner_of = _owner_function(owner)
    for shard, dsn in shard_dsns.items():
        empty = tuple((absent_on or {}).get(shard, ()))
        with _connect(dsn) as conn:
            _check_shard(conn, shard, owner_of, empty, book.rows, report)
    _count_lost(book.rows, owner_of, report)
    return report


def _check_shard(
    conn: psycopg.Connection[Any],
    shard: str,
    owner_of: Callable[[int], str],
    empty: tuple[KeyRange, ...],
    expected: ledger.Rows,
    report: Report,
) -> None:
    """Crosses out every expected row that is found here; one snapshot, so that tables agree with each other."""
    conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    for table in WRITTEN_TABLES:
        rows = expected.setdefault(table.name, {})
        for tenant, key, image in _images(conn, table):
            if owner_of(tenant) == shard:
                report.rows_checked += 1
                _compare(rows.pop(key, None), image, f"{table.name} {key} on {shard}", report)
            elif any(tenant in range_ for range_ in empty):
                report.unexpected += 1
                report.note(f"unexpected: {table.name} {key} on {shard}, where nothing of its range may be")
    _check_totals(conn, shard, owner_of, empty, report)
    conn.execute("COMMIT")


def _compare(state: Any, image: str, where: str, report: Report) -> None:
    if ledger.allows(state, image):
        return
    if state is None or state == frozenset([None]):
        report.unexpected += 1
        report.note(f"unexpected: {where}: {image}")
    else:
        report.different += 1
        report.note(f"different: {where}: {image}, must be {_readable(state)}")


def _check_totals(
    conn: psycopg.Connection[Any],
    shard: str,
    owner_of: Callable[[int], str],
    empty: tuple[KeyRange, ...],
    report: Report,
) -> None:
    for tenant, orders, amount, kept_orders, kept_amount in conn.execute(_TOTALS):
        if owner_of(tenant) == shard:
            report.different += 1
            report.note(
                f"different: tenant_totals {tenant} on {shard}: {kept_orders} orders of {kept_amount},"
                f" must be {orders} of {amount}"
            )
    for (tenant,) in conn.execute(_TOTALS_TENANTS):
        if owner_of(tenant) != shard and any(tenant in range_ for range_ in empty):
            report.unexpected += 1
            report.note(f"unexpected: tenant_totals {tenant} on {shard}, where nothing of its range may be")


def _count_lost(rows: ledger.Rows, owner_of: Callable[[int], str], report: Report) -> None:
    """What is still expected after every shard was read, and must not be absent, is lost."""
    for table, left in rows.items():
        for key, state in left.items():
            if not ledger.allows(state, None):
                report.lost += 1
                report.note(f"lost: {table} {key} on {owner_of(_tenant(key))}: {_readable(state)}")


def _images(conn: psycopg.Connection[Any], table: Table) -> Iterator[tuple[int, str, str]]:
    """Every row of a table as (tenant, key, text of the row)."""
    query = sql.SQL("COPY (SELECT {} FROM {} t) TO STDOUT").format(table.image, table.identifier)
    with conn.cursor() as cursor, cursor.copy(query) as copy:
        for key, image, *_ in copy.rows():
            yield _tenant(key), key, image


def _tenant(key: str) -> int:
    return int(key.partition(",")[0])


def _readable(state: Any) -> str:
    states: Iterable[Image] = state if isinstance(state, frozenset) else [state]
    return " or ".join(sorted("(absent)" if image is None else image for image in states))


def _owner_function(owner: Owner) -> Callable[[int], str]:
    if callable(owner):
        return cache(owner)
    ranges = {shard: tuple(of_shard) for shard, of_shard in owner.items()}

    @cache
    def owner_of(tenant: int) -> str:
        owners = [shard for shard, of_shard in ranges.items() if any(tenant in range_ for range_ in of_shard)]
        if len(owners) != 1:
            raise ValueError(f"tenant {tenant} must have one owner, the ranges name {owners}")
        return owners[0]

    return owner_of


def _connect(dsn: str) -> psycopg.Connection[Any]:
    return psycopg.connect(pinned(dsn), autocommit=True, application_name="shop checker")
