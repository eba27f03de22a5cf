"""Plans: which moves make a split or a move of a range."""

from __future__ import annotations

from collections.abc import Sequence

from shardmove.catalog.moves import NewMove, Plan
from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.domain.errors import ConfigurationError, Refused
from shardmove.domain.keys import Key, KeyRange
from shardmove.domain.routes import Route, Routes


def split(
    config: Config,
    catalog: Catalog,
    keyspace: str,
    *,
    at: Sequence[Key],
    to: Sequence[str],
    within: KeyRange | None = None,
) -> Plan:
    """Plans a split of one route, or of a part of it, at n points: the first piece stays, the others go to n targets.

    Raises:
        ConfigurationError: the points are not inside one route (or the given range), or points and targets do not
            count the same. Nothing was planned.
        Refused: a piece is already moving.
    """
    if len(at) != len(to):
        raise ConfigurationError(
            f"a split at {len(at)} points makes {len(at)} pieces that move, and {len(to)} targets are named",
            hint="name one target for each point: --at X,Y --to s2,s3",
        )
    routes = catalog.routes()[keyspace]
    route = routes.at(at[0])
    whole = route.range if within is None else route.range.intersection(within)
    if whole is None or (within is not None and whole != within):
        raise ConfigurationError(f"the range {within} is not within one route; {at[0]} lies in {route.range}")
    moves = []
    for piece, target in zip(whole.pieces(at)[1:], to, strict=True):
        config.shard_dsn(target)
        if target == route.shard:
            raise ConfigurationError(f"the piece {piece} is on {target} already", hint="name another target")
        moves.append(NewMove(keyspace, (piece,), route.shard, target))
    points = ", ".join(str(point) for point in sorted(at))
    return catalog.create_plan("split", f"split {keyspace} {whole} of {route.shard} at {points}", moves)


def move(config: Config, catalog: Catalog, keyspace: str, *, range_: KeyRange, to: str) -> Plan:
    """Plans to carry every key of the range that is not on the target already to it: one move for each shard that
    owns a part of it.

    Raises:
        Refused: there is nothing to carry, or a part is already moving. Nothing was planned.
    """
    config.shard_dsn(to)
    routes = catalog.routes()[keyspace]
    by_source: dict[str, list[KeyRange]] = {}
    for route in _owned_by_others(routes, range_, to):
        by_source.setdefault(route.shard, []).append(route.range)
    if not by_source:
        raise Refused(f"every key of {range_} is on {to} already", hint="`shardmove routes` shows what is where")
    moves = [NewMove(keyspace, tuple(ranges), source, to) for source, ranges in by_source.items()]
    return catalog.create_plan("move", f"move {keyspace} {range_} to {to}", moves)


def _owned_by_others(routes: Routes, range_: KeyRange, target: str) -> list[Route]:
    return [route for route in routes.within(range_) if route.shard != target]
