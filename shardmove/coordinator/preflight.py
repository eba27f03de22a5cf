"""What must hold before a move begins, and before a cutover.

`checklist` is what `shardmove preflight` prints; the same checks guard the steps themselves, so that nobody needs to
have run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from shardmove.coordinator.checks.data import DATA
from shardmove.coordinator.checks.privileges import PRIVILEGES
from shardmove.coordinator.checks.schema import SCHEMA, schema_difference
from shardmove.coordinator.checks.servers import ANSWERS, SERVERS
from shardmove.coordinator.checks.site import Check, Checks, Note, Problem, Site
from shardmove.coordinator.checks.surroundings import SURROUNDINGS
from shardmove.coordinator.hold import Hold
from shardmove.domain.errors import Refused, ShardmoveError
from shardmove.domain.moves import Direction, Move, Standing, State
from shardmove.postgres import effects
from shardmove.postgres.connect import Connection, explain, is_unreachable
from shardmove.postgres.introspect import Table
from shardmove.protocol import drift, fence, kept, ownership, parts, triggers
from shardmove.protocol.replica import become_replica

CHECKS: Checks = (*SERVERS, *SURROUNDINGS, *PRIVILEGES, *SCHEMA, *DATA)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the checklist."""

    check: str
    problem: Problem | None

    @property
    def passed(self) -> bool:
        return self.problem is None or isinstance(self.problem, Note)


def checklist(site: Site) -> list[Line]:
    """Every check of a move that has not begun, in order; none hides another. Changes nothing."""
    lines = []
    for each in CHECKS:
        lines.append(look(each, site))
        if each[0] == ANSWERS and not lines[-1].passed:
            break  # nobody can be asked the others
    return lines


def look(line: tuple[str, Check], site: Site) -> Line:
    """One line of the checklist. Raises where the connection is lost; every other failure is the line's problem."""
    text, check = line
    return Line(text, _guarded(check, site))


def _guarded(check: Check, site: Site) -> Problem | None:
    try:
        return check(site)
    except ShardmoveError as error:
        return Problem(error.message, error.hint)
    except psycopg.Error as error:
        if is_unreachable(error):
            raise
        rights = "`shardmove grants --role R` prints the rights that a role lacks"
        hint = rights if isinstance(error, psycopg.errors.InsufficientPrivilege) else None
        return Problem(f"it could not be checked: {explain(error)}", hint)


def require(site: Site) -> None:
    """Raises Refused with the first problem, and the number of the others."""
    problems = [line.problem for line in checklist(site) if line.problem is not None and not line.passed]
    if problems:
        more = f" (and {len(problems) - 1} more: `shardmove preflight {site.move.id}`)" if len(problems) > 1 else ""
        raise Refused(f"move {site.move.id}: {problems[0].message}{more}", hint=problems[0].hint)


# --- before a step


def require_state(move: Move, wanted: State, what: str) -> None:
    """Raises Refused, with the command that leads to the state, unless the move is in it."""
    if move.state is wanted:
        return
    hints = {
        State.READY: f"`shardmove run {move.id}` brings it to ready",
        State.SWITCHED: f"`shardmove cutover {move.id}` switches it",
    }
    raise Refused(f"move {move.id} is {move.state}; to {what} it has to be {wanted}", hint=hints.get(wanted))


def require_unpaused(move: Move) -> None:
    """Raises Refused where somebody paused the move; of one that is at its end the state says more."""
    if move.paused and not move.state.is_final:
        raise Refused(f"move {move.id} is paused", hint=f"`shardmove resume {move.id}`")


_RUN = "`shardmove run {}` mends and compares what can be"


def require_cutover(hold: Hold, direction: Direction) -> None:
    """All preconditions of a cutover (DESIGN §4.7, 1). Looks only.

    Raises:
        Refused: says which does not hold.
        SchemaDrift, ServerChanged: as the checks behind them.
        LockNotAvailable: DDL on a moving table is under way.
    """
    move = hold.move
    giver_name, receiver_name = move.giver(direction), move.receiver(direction)
    giver, receiver = hold.connection(giver_name), hold.connection(receiver_name)
    ours, theirs = fence.read(giver, move.id), fence.read(receiver, move.id)
    if ours is None or theirs is None:
        raise Refused(f"move {move.id}: its objects are missing on a shard", hint="`shardmove diagnose` lists them")
    if ours.standing != Standing.OWNER or not ours.is_open:
        raise Refused(f"move {move.id}: {giver_name} does not own the range by its own record")
    if theirs.standing != Standing.MIRROR or not theirs.is_whole:
        raise Refused(f"move {move.id}: {receiver_name} is not a whole mirror of {giver_name}")
    for name, connection in ((giver_name, giver), (receiver_name, receiver)):
        drift.check_identity(connection, name, move.identities)
        drift.check_fingerprint(connection, move.id, hold.tables, name)
        for table in hold.tables:
            if not triggers.is_armed(connection, move.id, table):
                raise Refused(
                    f"move {move.id}: {table.name} on {name} has lost its triggers", hint=_RUN.format(move.id)
                )
    ownership.check_catalog(hold.catalog, move)
    refused = kept.refused(receiver, move)
    if refused:
        raise Refused(
            f"move {move.id}: {receiver_name} still refuses {', '.join(str(range_) for range_ in refused)} for good",
            hint="`shardmove diagnose`",
        )
    if hold.catalog.stats(move.id).get("drifted"):
        raise Refused(
            f"move {move.id}: the schema changed, and not everything was compared since",
            hint=_RUN.format(move.id),
        )
    site = Site(move, hold.source, hold.target)
    problem = schema_difference(site)
    if problem is not None:
        raise Refused(f"move {move.id}: {problem.message}", hint=problem.hint)
    try_way_back(
        move,
        hold.tables,
        giver=giver,
        receiver=receiver,
        lock_timeout_ms=hold.config.limits.ddl_lock_timeout_ms,
    )


def try_way_back(
    move: Move, tables: Sequence[Table], *, giver: Connection, receiver: Connection, lock_timeout_ms: int
) -> None:
    """The permissions of the mirror in the other direction suffice: tried, and rolled back.

    Raises psycopg.Error; LockNotAvailable where DDL is under way. Changes nothing.
    """
    with effects.trying(giver):
        giver.execute("SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{lock_timeout_ms}ms",))
        become_replica(giver, move.id, tables)
        for table in tables:
            giver.execute(sql.SQL("DELETE FROM {} WHERE false").format(table.rows))
            giver.execute(sql.SQL("SELECT FROM {} WHERE false").format(table.rows))
    with effects.trying(receiver):
        for ordinal, _ in enumerate(tables, 1):
            receiver.execute(sql.SQL("DELETE FROM {} WHERE false").format(parts.journal(move.id, ordinal)))
