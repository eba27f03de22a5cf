"""A planned move over any schema, and the lines of its checklist.

def test_…(make_plan: MakePlan) -> None:
    plan = make_plan("CREATE TABLE orders (tenant_id bigint, id bigint, PRIMARY KEY (tenant_id, id))")
    plan.execute("s1", "ALTER TABLE orders …")
    failed = plan.look("the schema is the same")
    assert not failed.passed
    plan.follow(failed)                           # runs the SQL of its advice, as it stands
    assert plan.look("the schema is the same").passed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from shardmove.catalog.store import Catalog
from shardmove.config import Config, parse
from shardmove.coordinator import planner, preflight
from shardmove.coordinator.checks.site import Site
from shardmove.coordinator.preflight import Line
from shardmove.domain.moves import Move
from shardmove.protocol import fence
from tests.support.servers import Databases, connect

ORDERS: Final = "CREATE TABLE orders (tenant_id bigint, id bigint, note text, PRIMARY KEY (tenant_id, id))"

_STATEMENT: Final = re.compile(r"""(?:[^;'"]|'(?:[^']|'')*'|"(?:[^"]|"")*")+;""")
_ADVICE: Final = re.compile(r"on (\w+)(?:, as [^:]+)?: (.+;)")


@dataclass(slots=True)
class Plan:
    """A move that has not begun, from `s1` to `s2`. `user`: who connects from now on; None: the superuser."""

    config: Config
    move: Move
    dsns: dict[str, str]
    user: str | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    def dsn(self, place: str) -> str:
        return self.dsns[place] if self.user is None else make_conninfo(self.dsns[place], user=self.user)

    def site(self, *, dsns: Mapping[str, str] | None = None) -> Site:
        """What the checks look at, over new connections, which end with the test. `dsns` by place: others than ours."""
        given = dict(dsns or {})
        catalog, source, target = (
            self.opened.enter_context(
                connect(given.get(place, self.dsn(place)), application_name=fence.application_name(self.move.id))
            )
            for place in ("cat", "s1", "s2")
        )
        return Site(self.move, source, target, self.config.limits, catalog)

    def look(self, text: str) -> Line:
        """The line of the checklist that has the text in it, over connections that end with the look."""
        held, self.opened = self.opened, ExitStack()
        try:
            with self.opened:
                return line(self.site(), text)
        finally:
            self.opened = held

    def session(self, place: str, *, user: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        """A plain session as superuser, or as another role: autocommit, search_path public; ends with the test."""
        dsn = self.dsns[place] if user is None else make_conninfo(self.dsns[place], user=user)
        connection = psycopg.connect(dsn, autocommit=True, application_name="application")
        self.opened.callback(connection.close)
        return connection

    def execute(self, place: str, statement: str) -> list[tuple[Any, ...]]:
        """As superuser, in autocommit mode; the rows, or [] where it has none."""
        with psycopg.connect(self.dsns[place], autocommit=True, application_name="operator") as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def follow(self, failed: Line) -> None:
        """Runs the SQL of a line's advice to the letter, as superuser: `on s1[, as …]: …;`, a line for each place."""
        assert failed.problem is not None, f"{failed.check}: passes"
        advice = _ADVICE.findall(failed.problem.hint or "")
        assert advice, f"{failed.check}: no SQL in {failed.problem.hint!r}"
        for place, statements in advice:
            with self.session("cat" if place == "catalog" else place) as operator:
                for statement in _STATEMENT.findall(statements):  # one by one, as psql does
                    operator.execute(statement.encode())


def line(site: Site, text: str) -> Line:
    """The one line of the checklist that has the text in it. The other checks are not run."""
    (chosen,) = [each for each in preflight.CHECKS if text in each[0]]
    return preflight.look(chosen, site)


MakePlan: TypeAlias = Callable[..., Plan]


@pytest.fixture
def make_plan(databases: Databases) -> Iterator[MakePlan]:
    """`make_plan(schema, tables={"orders": "tenant_id"}, …)`: see `plan_of`. Everything of it ends with the test."""
    with ExitStack() as stack:

        def make(schema: str = ORDERS, **options: Any) -> Plan:
            plan = plan_of(options.pop("dsns", None) or databases("cat", "s1", "s2"), schema, **options)
            stack.enter_context(plan.opened)
            return plan

        yield make


def plan_of(
    dsns: Mapping[str, str],
    schema: str,
    *,
    tables: Mapping[str, str] | None = None,
    target_schema: str | None = None,
    range_: str = "100:200",
    keyspace: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Plan:
    """Runs the schema on both shards, configures one keyspace, and plans to move the range from s1 to s2.

    Args:
        dsns: of `cat`, `s1` and `s2`.
        tables: table = key column.
        target_schema: what is run on the target instead.
        keyspace: further entries of the keyspace: key_type, scheme, reference_tables.
    """
    for shard, statements in (("s1", schema), ("s2", schema if target_schema is None else target_schema)):
        with psycopg.connect(dsns[shard], autocommit=True) as connection:
            connection.execute(statements.encode())
    config = parse(
        {
            "catalog": {"dsn": dsns["cat"]},
            "shards": {shard: {"dsn": dsns[shard]} for shard in ("s1", "s2")},
            "keyspaces": {
                "shop": {
                    "tables": dict(tables or {"orders": "tenant_id"}),
                    "routes": [{"range": ":", "shard": "s1"}],
                    **(keyspace or {}),
                }
            },
            "limits": dict(limits or {}),
        }
    )
    with Catalog.install(config.catalog_dsn) as catalog:
        catalog.apply(config)
        parsed = config.keyspace("shop").bound_type.parse_range(range_)
        planned = planner.move(config, catalog, "shop", range_=parsed, to="s2")
        return Plan(config, catalog.move(planned.move_ids[0]), dict(dsns))
