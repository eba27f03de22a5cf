"""What `--json` prints, as plain dictionaries: one function a document. The tables for people are made of the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shardmove.catalog.events import Event
from shardmove.catalog.moves import Plan
from shardmove.catalog.routers import RouterRecord
from shardmove.coordinator.diagnose import Finding
from shardmove.coordinator.estimating import Estimate, Rate, Size
from shardmove.coordinator.preflight import Line
from shardmove.coordinator.shards import Answer, Grants
from shardmove.coordinator.uninstalling import Item
from shardmove.coordinator.verifying import Verdict
from shardmove.domain.keys import Key
from shardmove.domain.moves import Direction, Move
from shardmove.domain.routes import Route, Routes, RouteTable
from shardmove.verify.comparison import TableComparison

Document = dict[str, Any]


def applied(changes: Sequence[str], answers: Sequence[Answer]) -> Document:
    return {"changes": list(changes), "shards": [_answer(each) for each in answers]}


def shards(answers: Sequence[Answer], table: RouteTable) -> Document:
    def owned(shard: str) -> list[Document]:
        return [
            {"keyspace": name, "range": str(route.range)}
            for name, routes in table.keyspaces.items()
            for route in routes.routes
            if route.shard == shard
        ]

    return {"shards": [{**_answer(each), "ranges": owned(each.shard)} for each in answers]}


def _answer(each: Answer) -> Document:
    return {"name": each.shard, "dsn": each.dsn, "server_version": each.server_version, "error": each.trouble}


def routes(table: RouteTable, chosen: Mapping[str, Sequence[Route]]) -> Document:
    ranges = [
        {"keyspace": name, "range": str(each.range), "shard": each.shard, "move": each.move_id, "held": each.held}
        for name, listed in chosen.items()
        for each in listed
    ]
    return {"epoch": table.epoch, "ranges": ranges}


def at(routes_: Routes, place: Key | None) -> Sequence[Route]:
    """The one route of a place in the key space; all of them for None."""
    return routes_.routes if place is None else [routes_.at(place)]


def plan(made: Plan, found: Sequence[Estimate], rate: Rate) -> Document:
    sizes = [each.size for each in found if each.size is not None]
    total = Size(sum(each.rows for each in sizes), sum(each.size_bytes for each in sizes))
    return {
        "id": made.id,
        "kind": made.kind,
        "description": made.description,
        "moves": [_planned(each, rate) for each in found],
        "estimate": _estimate(total if len(sizes) == len(found) else None, rate),
        "disk_bytes": _disk_bytes(found),
    }


def _planned(found: Estimate, rate: Rate) -> Document:
    move = found.move
    return {
        "id": move.id,
        "keyspace": move.keyspace.name,
        "ranges": [str(range_) for range_ in move.ranges],
        "source": move.source,
        "target": move.target,
        "state": str(move.state),
        "estimate": _estimate(found.size, rate),
        "estimate_error": found.trouble,
    }


def _estimate(size: Size | None, rate: Rate) -> Document | None:
    if size is None:
        return None
    return {
        "rows": size.rows,
        "bytes": size.size_bytes,
        "seconds": round(size.rows / rate.rows_s, 1),
        "rate_rows_s": rate.rows_s,
        "rate_from": rate.origin,
    }


def _disk_bytes(found: Sequence[Estimate]) -> Document:
    """What each target needs; null where one of its moves could not be estimated."""
    needed: dict[str, int | None] = {}
    for each in found:
        before = needed.get(each.move.target, 0)
        needed[each.move.target] = None if before is None or each.size is None else before + each.size.size_bytes
    return needed


def checklists(lists: Mapping[str, Sequence[Line]]) -> Document:
    moves = [
        {"id": move_id, "passed": all(line.passed for line in lines), "checks": [_check(line) for line in lines]}
        for move_id, lines in lists.items()
    ]
    return {"passed": all(move["passed"] for move in moves), "moves": moves}


def _check(line: Line) -> Document:
    found = line.problem
    message = found.message if found else None
    return {
        "check": line.check,
        "passed": line.passed,
        "problem": None if line.passed else message,
        "note": message if line.passed else None,
        "hint": found.hint if found else None,
    }


def statuses(moves: Sequence[Document], routers: Sequence[RouterRecord], epoch: int) -> Document:
    return {"moves": list(moves), "epoch": epoch, "routers": [_router(each) for each in routers]}


def _router(each: RouterRecord) -> Document:
    return {
        "id": each.id,
        "name": each.name,
        "host": each.host,
        "process": each.process_id,
        "epoch": each.acknowledged,
        "silent_s": round(each.silent_s, 3),
        "is_live": each.is_live,
    }


def dry_run(moves: Sequence[Move], steps: Mapping[str, Sequence[str]]) -> Document:
    return {"dry_run": True, "moves": [{"id": move.id, "steps": list(steps.get(move.id, ()))} for move in moves]}


def verdicts(moves: Sequence[Move], found: Sequence[Verdict]) -> Document:
    pairs = list(zip(moves, found, strict=True))
    return {
        "equal": all(verdict.equal for verdict in found),
        "repaired": sum(verdict.repaired for verdict in found),
        "tables": [_compared(move, table) for move, verdict in pairs for table in verdict.tables],
    }


def _compared(move: Move, table: TableComparison) -> Document:
    """The owner is the source until the cutover, and the target from then on."""
    is_forward = move.flow is Direction.FORWARD
    rows, digests = (table.rows_owner, table.rows_other), (table.digest_owner, table.digest_other)
    if not is_forward:
        rows, digests = rows[::-1], digests[::-1]
    kinds = ("missing", "extra") if is_forward else ("extra", "missing")
    keys = {"missing": table.missing, "extra": table.extra}
    missing, extra = (keys[kind] for kind in kinds)
    return {
        "move": move.id,
        "table": str(table.table.name),
        "rows_source": rows[0],
        "rows_target": rows[1],
        "digest_source": digests[0],
        "digest_target": digests[1],
        "missing": table.counts[kinds[0]],
        "extra": table.counts[kinds[1]],
        "different": table.counts["different"],
        "keys": {
            "missing": [list(key) for key in missing],
            "extra": [list(key) for key in extra],
            "different": [list(key) for key in table.different],
        },
    }


def event(each: Event) -> Document:
    return {
        "id": each.id,
        "at": each.at.isoformat(),
        "kind": each.kind,
        "move": each.move_id,
        "plan": each.plan_id,
        "detail": each.detail,
    }


def findings(found: Sequence[Finding]) -> Document:
    return {"findings": [asdict(each) for each in found]}


def objects(items: Sequence[Item], *, is_dry_run: bool) -> Document:
    return {"dry_run": is_dry_run, "objects": [asdict(each) for each in items]}


def grants(role: str, found: Sequence[Grants]) -> Document:
    listed = [
        {"place": each.place, "role_exists": each.role_exists, "statements": list(each.statements)} for each in found
    ]
    return {"role": role, "grants": listed}
