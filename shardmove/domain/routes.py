"""The route table: which shard owns which key range. A value, numbered by its epoch.

I7: the ranges of a keyspace cover the key space with no gap and no overlap. It is asserted whenever a table is made,
and once more by the catalog's own constraint when one is published.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from shardmove.domain.errors import ConfigurationError, NotFound
from shardmove.domain.keys import Key, KeyRange


@dataclass(frozen=True, slots=True)
class Route:
    """One owner of one key range. `move_id` names the unfinished move that carries it; `held`: its writes wait."""

    range: KeyRange
    shard: str
    move_id: str | None = None
    held: bool = False


@dataclass(frozen=True, slots=True)
class Routes:
    """The routes of one keyspace: ascending, no gap, no overlap."""

    keyspace: str
    routes: tuple[Route, ...]
    _edges: tuple[Key, ...] = field(init=False, repr=False, compare=False)
    """The lower ends of all routes but the first, which has none: `at` is asked once per statement."""

    def __post_init__(self) -> None:
        if not self.routes:
            raise ConfigurationError(f"the keyspace {self.keyspace} has no routes")
        edge: Key | None = None
        for position, route in enumerate(self.routes):
            starts_where_the_last_ended = route.range.lower == edge and (position == 0) == (edge is None)
            if not starts_where_the_last_ended:
                raise ConfigurationError(
                    f"the routes of {self.keyspace} leave a gap or overlap at {'' if edge is None else edge}: "
                    f"the next range is {route.range}"
                )
            edge = route.range.upper
            if edge is None and position != len(self.routes) - 1:
                raise ConfigurationError(f"the routes of {self.keyspace} overlap after {route.range}")
        if edge is not None:
            raise ConfigurationError(f"the routes of {self.keyspace} do not cover the keys from {edge} on")
        lowers = (route.range.lower for route in self.routes[1:])
        object.__setattr__(self, "_edges", tuple(lower for lower in lowers if lower is not None))

    @classmethod
    def of(cls, keyspace: str, routes: Iterable[Route]) -> Routes:
        """Sorts, and joins neighbours that say the same. Raises ConfigurationError where I7 does not hold."""
        joined: list[Route] = []
        for route in sorted(routes, key=lambda r: r.range.position):
            last = joined[-1] if joined else None
            if last and last.range.upper == route.range.lower is not None and _same_owner(last, route):
                joined[-1] = replace(last, range=KeyRange(last.range.lower, route.range.upper))
            else:
                joined.append(route)
        return cls(keyspace, tuple(joined))

    def at(self, key: Key) -> Route:
        """The one route that the key belongs to."""
        return self.routes[bisect_right(self._edges, key)]

    def within(self, range_: KeyRange) -> tuple[Route, ...]:
        """The routes that share keys with the range, cut down to it, ascending."""
        cut = ((route, route.range.intersection(range_)) for route in self.routes)
        return tuple(replace(route, range=common) for route, common in cut if common is not None)

    def assign(
        self, ranges: Iterable[KeyRange], *, shard: str, move_id: str | None = None, held: bool = False
    ) -> Routes:
        """The same table with new owners for the ranges; all other keys keep theirs."""
        table = self
        for range_ in ranges:
            kept = [replace(r, range=piece) for r in table.routes for piece in r.range.difference(range_)]
            table = Routes.of(self.keyspace, [*kept, Route(range_, shard, move_id, held)])
        return table


def _same_owner(one: Route, other: Route) -> bool:
    return (one.shard, one.move_id, one.held) == (other.shard, other.move_id, other.held)


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Every keyspace's routes as of one epoch."""

    epoch: int
    keyspaces: Mapping[str, Routes]

    def __getitem__(self, keyspace: str) -> Routes:
        try:
            return self.keyspaces[keyspace]
        except KeyError:
            raise NotFound(f"there is no keyspace {keyspace}", hint="`shardmove routes` lists them") from None

    def following(self, routes: Routes) -> RouteTable:
        """The table of the next epoch, with one keyspace's routes replaced."""
        return RouteTable(self.epoch + 1, {**self.keyspaces, routes.keyspace: routes})
