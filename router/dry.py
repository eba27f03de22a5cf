"""Where a statement would go: what the router would decide, without a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.statements import Plans, Tables, decide
from shardmove.config import Config
from shardmove.domain.routes import RouteTable


@dataclass(frozen=True, slots=True)
class _View:
    routes: RouteTable
    tables: Tables
    home: str
    shards: Sequence[str]


def routed(config: Config, routes: RouteTable, sql: str) -> dict[str, Any]:
    """`action`, `shards` (none: any will do), `routes` (those that its keys met), `is_write`, `refusal`.

    Parameters have no values here: a statement whose key is one is refused.
    """
    tables = Tables(config.keyspaces)
    view = _View(routes, tables, config.router.home or next(iter(config.shards)), tuple(config.shards))
    decision = decide(Plans(tables).of(sql.encode()), None, view)
    refusal = decision.refusal
    return {
        "action": decision.action.name.lower(),
        "shards": list(decision.shards),
        "routes": [
            {"range": str(route.range), "shard": route.shard, "held": route.held, "move": route.move_id}
            for route in decision.routes
        ],
        "is_write": decision.is_write or decision.locks_rows,
        "refusal": None
        if refusal is None
        else {"sqlstate": refusal.sqlstate, "message": refusal.message, "hint": refusal.hint},
    }
