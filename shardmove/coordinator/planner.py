"""Plans: which moves make a split, a move or a merge of ranges, isolate a key, or drain a shard.

Planning reads the route table and the shards' statistics, and changes nothing but the catalog: a plan, and its moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from shardmove.catalog.moves import NewMove, Plan
from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator.estimating import Statistics
from shardmove.domain.errors import ConfigurationError, Refused, ShardmoveError
from shardmove.domain.keys import Key, KeyRange, key_text
from shardmove.domain.moves import Keyspace
from shardmove.domain.routes import Route


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

    Args:
        at: the first key of each piece that moves; in the hash scheme, the first hash.
        to: where the piece that begins at the point of the same place goes.

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
    least = catalog.keyspace(keyspace).bound_type.least
    if least in at:
        raise ConfigurationError(f"no key is below {least}: it cuts nothing in two")
    points, targets = zip(*sorted(zip(at, to, strict=True), key=lambda pair: pair[0]), strict=True)
    route = catalog.routes()[keyspace].at(points[0])
    whole = route.range if within is None else route.range.intersection(within)
    if whole is None or (within is not None and whole != within):
        raise ConfigurationError(f"the range {within} is not within one route; {points[0]} lies in {route.range}")
    moves = []
    for piece, target in zip(whole.pieces(points)[1:], targets, strict=True):
        config.shard_dsn(target)
        if target == route.shard:
            raise ConfigurationError(f"the piece {piece} is on {target} already", hint="name another target")
        moves.append(NewMove(keyspace, (piece,), route.shard, target))
    words = ", ".join(map(key_text, points))
    return catalog.create_plan("split", f"split {keyspace} {whole} of {route.shard} at {words}", moves)


def move(config: Config, catalog: Catalog, keyspace: str, *, range_: KeyRange, to: str) -> Plan:
    """Plans to carry every key of the range that is not on the target already to it: one move for each shard that
    owns a part of it.

    Raises:
        Refused: there is nothing to carry, or a part is already moving. Nothing was planned.
    """
    return _gather(config, catalog, "move", f"move {keyspace} {range_} to {to}", keyspace, range_, to)


def merge(config: Config, catalog: Catalog, keyspace: str, *, range_: KeyRange, to: str) -> Plan:
    """As `move`, for neighbouring routes: once the plan is completed they are one. Raises what `move` raises."""
    return _gather(config, catalog, "merge", f"merge {keyspace} {range_} on {to}", keyspace, range_, to)


def isolate(config: Config, catalog: Catalog, keyspace: str, *, key: Key, to: str) -> Plan:
    """Plans to carry one key alone; in the hash scheme all keys of the same hash, which are hardly ever two.

    Raises Refused where the key is on the target already, or is moving. Nothing was planned.
    """
    range_ = _only(catalog.keyspace(keyspace), key)
    return _gather(config, catalog, "isolate", f"isolate {key_text(key)} of {keyspace} on {to}", keyspace, range_, to)


def drain(config: Config, catalog: Catalog, shard: str, *, to: Sequence[str]) -> Plan:
    """Plans to empty a shard: its routes of all keyspaces are dealt out, the largest first, each whole to the target
    that was given least. Once the plan is completed the shard owns nothing, and the configuration may drop it.

    A shard whose statistics cannot be had is dealt out by the number of its routes.

    Raises:
        ConfigurationError: the targets are not other shards, each named once.
        Refused: the shard owns nothing, or a route of it is already moving. Nothing was planned.
    """
    for name in (shard, *to):
        config.shard_dsn(name)
    if shard in to or len(set(to)) != len(to):
        raise ConfigurationError(f"{', '.join(to)}: name other shards than {shard}, each once")
    owned = [
        (catalog.keyspace(name), route)
        for name, routes in catalog.routes().keyspaces.items()
        for route in routes.routes
        if route.shard == shard
    ]
    if not owned:
        raise Refused(f"{shard} owns nothing", hint="the configuration may drop it")
    moves = _dealt(owned, _weights(config, owned), shard, to)
    return catalog.create_plan("drain", f"drain {shard} to {', '.join(to)}", moves)


def _gather(
    config: Config, catalog: Catalog, kind: str, description: str, keyspace: str, range_: KeyRange, to: str
) -> Plan:
    """One move for each shard that owns a part of the range, and is not the target."""
    config.shard_dsn(to)
    by_source: dict[str, list[KeyRange]] = {}
    for route in catalog.routes()[keyspace].within(range_):
        if route.shard != to:
            by_source.setdefault(route.shard, []).append(route.range)
    if not by_source:
        raise Refused(f"every key of {range_} is on {to} already", hint="`shardmove routes` shows what is where")
    moves = [NewMove(keyspace, tuple(ranges), source, to) for source, ranges in by_source.items()]
    return catalog.create_plan(kind, description, moves)


def _only(keyspace: Keyspace, key: Key) -> KeyRange:
    """The range of this key alone: open where there is no key on that side."""
    type_, place = keyspace.bound_type, keyspace.place(key)
    return KeyRange(None if place == type_.least else place, type_.successor(place))


def _weights(config: Config, owned: Iterable[tuple[Keyspace, Route]]) -> list[int]:
    """Bytes of each route, at least 1; 1 each where one of them cannot be told."""
    try:
        with Statistics(config) as statistics:
            sizes = [statistics.size(keyspace, (route.range,), route.shard) for keyspace, route in owned]
    except ShardmoveError:
        return [1 for _ in owned]
    return [max(1, size.size_bytes) for size in sizes]


def _dealt(
    owned: Sequence[tuple[Keyspace, Route]], weights: Sequence[int], source: str, targets: Sequence[str]
) -> list[NewMove]:
    """A move for each keyspace and target that something of it goes to, in the order of keyspaces and targets."""
    given = dict.fromkeys(targets, 0)
    dealt: list[tuple[str, int, KeyRange]] = []
    for weight, (keyspace, route) in sorted(zip(weights, owned, strict=True), key=lambda pair: -pair[0]):
        target = min(targets, key=lambda name: given[name])
        given[target] += weight
        dealt.append((keyspace.name, targets.index(target), route.range))
    dealt.sort(key=lambda piece: (piece[:2], piece[2].position))
    return [
        NewMove(keyspace, tuple(range_ for *_, range_ in pieces), source, targets[number])
        for (keyspace, number), pieces in groupby(dealt, key=lambda piece: piece[:2])
    ]
