"""Plans and moves, their states, and the marks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb

from shardmove.catalog.routes import as_json
from shardmove.catalog.shape import Shape, as_keyspace, close_to
from shardmove.domain.errors import ConfigurationError, IllegalTransition, NotFound
from shardmove.domain.keys import KeyRange, ascending
from shardmove.domain.moves import Move, ServerIdentity, State, check_transition
from shardmove.domain.points import Effect
from shardmove.domain.routes import Routes


@dataclass(frozen=True, slots=True)
class NewMove:
    """A move to be made: which ranges of a keyspace go from where to where."""

    keyspace: str
    ranges: tuple[KeyRange, ...]
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One or several moves that belong together. `move_ids` are in the order in which they were planned."""

    id: str
    kind: str
    description: str
    created_at: datetime
    move_ids: tuple[str, ...]


_PLANS: LiteralString = """
    SELECT p.id, p.kind, p.description, p.created_at, array_agg(m.id ORDER BY m.ordinal)
    FROM shardmove_catalog.plan p JOIN shardmove_catalog.move m ON m.plan_id = p.id
    GROUP BY p.id ORDER BY p.created_at, p.id
"""

_MOVES: LiteralString = """
    SELECT m.id, m.plan_id, m.source, m.target, m.state, m.state_since, m.lease_number, m.last_attempt, m.paused,
           m.error, m.identities, k.name, k.key_type, k.scheme, k.reference_tables,
           coalesce((SELECT jsonb_object_agg(t.table_name, t.key_column) FROM shardmove_catalog.keyspace_table t
                     WHERE t.keyspace = k.name), '{}'),
           (SELECT jsonb_agg(jsonb_build_array(r.lower, r.upper)) FROM shardmove_catalog.move_range r
            WHERE r.move_id = m.id)
    FROM shardmove_catalog.move m JOIN shardmove_catalog.keyspace k ON k.name = m.keyspace
    WHERE (%(move)s::text IS NULL OR m.id = %(move)s) AND (%(plan)s::text IS NULL OR m.plan_id = %(plan)s)
      AND NOT (%(unfinished)s AND m.is_finished)
    ORDER BY m.created_at, m.ordinal
"""

_OWNERSHIP = frozenset({State.READY, State.SWITCHED})


class Moves(Shape):
    def create_plan(self, kind: str, description: str, moves: Sequence[NewMove]) -> Plan:
        """Makes a plan and its moves, all pending, in one transaction.

        Raises Refused where a range overlaps an unfinished move, or is not its source's; NotFound for a keyspace or
        shard that the catalog does not know. Nothing is made then. Not safe to repeat (the overlap refuses it).
        """
        if not moves or not all(move.ranges for move in moves):
            raise ConfigurationError("a plan needs a move, and a move needs a range")
        for move in moves:
            if move.source == move.target:
                raise ConfigurationError(f"the source and the target of a move are both {move.source}")
        document = [
            {
                "keyspace": move.keyspace,
                "source": move.source,
                "target": move.target,
                "ranges": [range_.ends for range_ in move.ranges],
            }
            for move in moves
        ]
        query = "SELECT shardmove_catalog.create_plan(%s, %s, %s)"
        return self.plan(str(self._changed(Effect.PLAN, query, (kind, description, Jsonb(document)))))

    def plans(self) -> list[Plan]:
        """In the order in which they were made."""
        rows = self._rows(_PLANS)
        return [Plan(id_, kind, text, created_at, tuple(move_ids)) for id_, kind, text, created_at, move_ids in rows]

    def plan(self, plan_id: str) -> Plan:
        """Raises NotFound, with ids that are close."""
        plans = {plan.id: plan for plan in self.plans()}
        if plan_id not in plans:
            raise NotFound(f"there is no plan {plan_id}", hint=close_to(plan_id, plans))
        return plans[plan_id]

    def moves(self, *, unfinished_only: bool = False, plan_id: str | None = None) -> list[Move]:
        """In the order in which they were made; within a plan, in its order."""
        return self._select(None, plan_id, unfinished_only)

    def move(self, move_id: str) -> Move:
        """Raises NotFound, with ids that are close."""
        found = self._select(move_id, None, False)
        if not found:
            raise NotFound(f"there is no move {move_id}", hint=close_to(move_id, self._ids("move")))
        return found[0]

    def resolve(self, any_id: str) -> list[Move]:
        """The moves of a plan, or the one move, by an id of either kind. Raises NotFound, with ids that are close."""
        found = self._select(None, any_id, False) or self._select(any_id, None, False)
        if not found:
            known = [*self._ids("plan"), *self._ids("move")]
            raise NotFound(f"there is no plan or move {any_id}", hint=close_to(any_id, known))
        return found

    def _ids(self, table: str) -> list[str]:
        query: LiteralString = (
            "SELECT id FROM shardmove_catalog.plan ORDER BY created_at DESC"
            if table == "plan"
            else "SELECT id FROM shardmove_catalog.move ORDER BY created_at DESC"
        )
        return [row[0] for row in self._rows(query)]

    def _select(self, move_id: str | None, plan_id: str | None, unfinished_only: bool) -> list[Move]:
        parameters = {"move": move_id, "plan": plan_id, "unfinished": unfinished_only}
        return [_as_move(row) for row in self._rows(_MOVES, parameters)]

    def transition(
        self,
        move_id: str,
        before: State,
        after: State,
        *,
        lease_number: int,
        detail: Mapping[str, object],
        routes: tuple[Routes, int] | None = None,
    ) -> bool:
        """One step of the transition table, its event and, where given, (routes, base epoch) as a new epoch.

        Ready → switched and back are not for it: the owner changes by `flip` only.
        Safe to repeat: a move that is in `after` already, under the same lease, stays as it is, and False is returned.

        Raises LeaseLost, IllegalTransition, EpochConflict (with routes), Refused where a cutover attempt is open;
        nothing is changed then. After Unreachable it may have been done: repeat it.
        """
        check_transition(move_id, before, after)
        if {before, after} == _OWNERSHIP:
            raise IllegalTransition(f"move {move_id} goes from {before} to {after} by a cutover attempt's flip only")
        base, document = (None, None) if routes is None else (routes[1], as_json(routes[0]))
        changed = self._changed(
            Effect.TRANSITION,
            "SELECT shardmove_catalog.transition(%s, %s, %s, %s, %s, %s, %s)",
            (move_id, lease_number, before.value, after.value, Jsonb(dict(detail)), base, document),
        )
        if changed and routes is not None:
            self._published()
        return bool(changed)

    def record_step(self, kind: str, move_id: str, lease_number: int, **detail: object) -> None:
        """Adds an event of a move, as the one who holds it. Raises LeaseLost. A repeat adds another."""
        self._changed(
            Effect.RECORD_EVENT,
            "WITH held AS MATERIALIZED (SELECT shardmove_catalog.lock_move(%s, %s))"
            " SELECT shardmove_catalog.add_event(%s, %s, NULL, %s) FROM held",
            (move_id, lease_number, kind, move_id, Jsonb(detail)),
        )

    def set_paused(self, move_id: str, paused: bool) -> None:
        """A mark that anyone may set; a finished move keeps its own. Safe to repeat; an event where it changed.

        Raises NotFound.
        """
        self._changed(Effect.SET_PAUSED, "SELECT shardmove_catalog.set_paused(%s, %s)", (move_id, paused))

    def set_error(self, move_id: str, error: str | None, lease_number: int) -> None:
        """Why the move cannot go on; None once it can. Every transition clears it too. Raises LeaseLost."""
        self._changed(
            Effect.SET_ERROR, "SELECT shardmove_catalog.set_error(%s, %s, %s)", (move_id, lease_number, error)
        )

    def set_identities(self, move_id: str, identities: Mapping[str, ServerIdentity], lease_number: int) -> None:
        """Which servers the move began with, by shard; replaces what was there. Raises LeaseLost."""
        document = {
            shard: {"system_identifier": identity.system_identifier, "timeline": identity.timeline}
            for shard, identity in identities.items()
        }
        self._changed(
            Effect.SET_IDENTITIES,
            "SELECT shardmove_catalog.set_identities(%s, %s, %s)",
            (move_id, lease_number, Jsonb(document)),
        )

    def set_stats(self, move_id: str, stats: Mapping[str, object], lease_number: int) -> None:
        """Sets the counters that are named; others keep their values. Raises LeaseLost."""
        query = "SELECT shardmove_catalog.set_stats(%s, %s, %s)"
        self._changed(Effect.SET_STATS, query, (move_id, lease_number, Jsonb(dict(stats))))

    def mark_attended(self, move_id: str, at: datetime) -> None:
        """An attendant was here; for `status` alone, so anyone may, without a lease. Safe to repeat."""
        self._changed(
            Effect.SET_ATTENDED,
            "UPDATE shardmove_catalog.move SET stats = stats || jsonb_build_object('attended_at', %s::text)"
            " WHERE id = %s",
            (at.isoformat(), move_id),
        )

    def stats(self, move_id: str) -> dict[str, Any]:
        """The counters of a move, as last set. Raises NotFound."""
        found = self._value("SELECT stats FROM shardmove_catalog.move WHERE id = %s", (move_id,))
        if found is None:
            raise NotFound(f"there is no move {move_id}", hint=close_to(move_id, self._ids("move")))
        return dict(found)


def _as_move(row: TupleRow) -> Move:
    id_, plan_id, source, target, state, since, lease, attempt, paused, error, identities = row[:11]
    name, key_type, scheme, reference_tables, tables, ranges = row[11:]
    keyspace = as_keyspace(name, key_type, scheme, reference_tables, tables)
    return Move(
        id=id_,
        plan_id=plan_id,
        keyspace=keyspace,
        ranges=ascending(keyspace.bound_type.range_of(lower, upper) for lower, upper in ranges),
        source=source,
        target=target,
        state=State(state),
        state_since=since,
        lease_number=lease,
        last_attempt=attempt,
        paused=paused,
        error=error,
        identities={shard: ServerIdentity(**identity) for shard, identity in identities.items()},
    )
