"""The state `verifying`, and every later full comparison of a move."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import errors, sql

from shardmove.coordinator import references
from shardmove.coordinator.copying import copy_missing, mirror_beside
from shardmove.coordinator.drifting import accept_drift, is_drifted
from shardmove.coordinator.hold import Hold, settle_newest
from shardmove.domain import points
from shardmove.domain.errors import DifferencesFound, Failed, ServerChanged
from shardmove.domain.moves import CATALOG, MIRRORED, Attempt, Direction, Outcome, Standing, State
from shardmove.domain.points import Effect
from shardmove.postgres import effects
from shardmove.postgres.identity import identity
from shardmove.postgres.introspect import Table
from shardmove.protocol import fence, parts
from shardmove.verify.comparison import Sides, TableComparison, compare

COLLISIONS = (errors.UniqueViolation, errors.ExclusionViolation)
BLOCKED_MAX = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found, all tables. `repaired`: keys that were marked dirty and carried anew before."""

    tables: Sequence[TableComparison]
    elapsed_s: float
    repaired: int = 0

    @property
    def rows(self) -> int:
        """Rows of the range on the owner; those of reference tables do not count."""
        return sum(table.rows_owner for table in self.tables if table.table.keyset)

    @property
    def equal(self) -> bool:
        return all(table.equal for table in self.tables)


def verify(hold: Hold) -> None:
    """`verifying` → `ready`: reads both sides again in full, and goes on only where they are equal (I5).

    A schema that changed since the move looked last is looked at anew: where it is equal on both sides and the triggers
    are armed, what the change did to the rows is compared, mended through the journal, and compared again.

    Raises:
        DifferencesFound: rows differ, and no DDL explains it. The move stays `verifying`.
        Refused: the schema is not equal on both sides any more.
    """
    accept_drift(hold)
    verdict = compare_in_full(hold, repair=bool(hold.catalog.stats(hold.move.id).get("drifted")))
    require_equal(hold, verdict)
    points.reach("verifying.after_comparison")
    hold.catalog.set_stats(
        hold.move.id,
        {"rows_verified": verdict.rows, "drifted": False},
        hold.lease.number,
    )
    hold.transition(State.READY, rows=verdict.rows, repaired=verdict.repaired)


def require_equal(hold: Hold, verdict: Verdict) -> None:
    """Raises DifferencesFound that counts what differs, per table."""
    references.require(hold, [each for each in verdict.tables if not each.table.keyset])
    if verdict.equal:
        return
    worst = "; ".join(
        f"{each.table.name}: {each.counts['missing']} missing, {each.counts['extra']} extra,"
        f" {each.counts['different']} different"
        for each in verdict.tables
        if not each.equal
    )
    raise DifferencesFound(
        f"move {hold.move.id}: the two sides differ: {worst}",
        hint=f"did somebody write behind the fence? `shardmove verify {hold.move.id} --repair` mends it",
    )


def compare_in_full(hold: Hold, *, repair: bool = False) -> Verdict:
    """Compares both sides under live writes, with the mirror running beside.

    With `repair`, keys that differ are marked dirty in the journal and carried anew, then everything is compared again:
    a repair is not a verification.

    Raises:
        DifferencesFound: rows that only the receiver has keep the mirror from carrying, and were not to be repaired.
        whatever `compare` raises.
    """
    repaired, found_before, times_blocked = 0, None, 0
    while True:
        try:
            verdict = _once(hold, repaired)
        except (psycopg.Error, Failed) as error:
            collision = next((each for each in (error, error.__cause__) if isinstance(each, COLLISIONS)), None)
            if collision is None:
                raise
            times_blocked += 1
            if not repair or times_blocked > BLOCKED_MAX:
                raise _blocked(hold, collision) from error
            repaired += mark_stale(hold)
            continue
        found = sum(table.found for table in verdict.tables)
        is_hopeless = found_before is not None and found >= found_before
        if verdict.equal or not repair or is_hopeless:
            return verdict
        found_before = found
        repaired += mark_dirty(hold, verdict.tables)


def _once(hold: Hold, repaired: int) -> Verdict:
    started = time.monotonic()
    sides = _sides(hold)
    for table in hold.tables:
        hold.progress.table(str(table.name)).rows_verified = 0

    def on_rows(table: Table, rows: int) -> None:
        hold.progress.table(str(table.name)).rows_verified += rows

    with mirror_beside(hold, sides.direction) as mirror:

        def check() -> None:
            hold.check()
            mirror.check()

        found = compare(sides, hold.executor, hold.config.limits, check=check, on_rows=on_rows)
    found += references.compare(hold)
    return Verdict(found, time.monotonic() - started, repaired)


def _sides(hold: Hold) -> Sides:
    direction = flow_by_records(hold)
    return Sides(hold.move, direction, hold.tables, hold.dsn, lambda: hold.mirror(direction))


def _blocked(hold: Hold, error: psycopg.Error) -> DifferencesFound:
    return DifferencesFound(
        f"move {hold.move.id}: the two sides differ: the mirror cannot write a row for another one that holds the same"
        f" value of {error.diag.constraint_name} in {error.diag.table_name}",
        hint=f"where the giver has lost that other row in a failover, `shardmove verify {hold.move.id} --repair` mends"
        " it; a row that is not of the move has to be removed",
    )


def mark_stale(hold: Hold) -> int:
    """Marks every key that the receiver has, and the giver has not, or has with other values: rows from before a
    failover of the giver, whose unique values may be in the way of what was written since.

    Not a comparison: rows that are on their way are marked, too, which does no harm.
    """
    found = compare(_sides(hold), hold.executor, hold.config.limits, check=hold.check, is_exact=False)
    for table in found:
        table.missing.clear()
    return mark_dirty(hold, found)


def mark_dirty(hold: Hold, tables: Sequence[TableComparison]) -> int:
    """Puts keys into the owner's journal as if their rows had been written: the mirror carries them as they are."""
    owner = hold.connection(hold.move.giver(flow_by_records(hold)))
    marked = 0
    for ordinal, each in enumerate(tables, 1):
        if not each.keys:
            continue
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in each.table.keyset)
        entries = sql.SQL("INSERT INTO {} ({}) {}").format(
            parts.journal(hold.move.id, ordinal), names, each.table.unnested(each.keys)
        )
        with effects.writing(owner, Effect.MARK_DIRTY):
            owner.execute(entries)
        marked += len(each.keys)
    hold.record("repaired", keys=marked)
    return marked


def compare_anew_if_drifted(hold: Hold) -> None:
    """In `ready` and `switched`: after DDL, everything is compared anew before a cutover in either direction.

    After a change of servers, too: first of all, before anything is opened.
    """
    if hold.move.state is State.READY and is_drifted(hold):
        hold.transition(State.VERIFYING)
        verify(hold)
    elif hold.move.state is State.SWITCHED:
        accept_drift(hold)
        if hold.catalog.stats(hold.move.id).get("drifted"):
            require_equal(hold, compare_in_full(hold, repair=True))
            hold.catalog.set_stats(hold.move.id, {"drifted": False}, hold.lease.number)


def accept_servers(hold: Hold) -> None:
    """Goes on with servers that are not those that the move began with, where nothing was lost on the way.

    A failover or a restore may have undone commits on either side, or in the catalog. So the shards' own records are
    asked, both sides are compared in full, and only where they are equal are the new servers recorded, and the
    newest attempt carried out. While rows are being copied the target is brought in line with the source, and the
    comparison follows by itself before `ready`.

    Does nothing where no server changed.

    Raises:
        DifferencesFound: rows differ; nothing was opened. The giver's rows win with `verify --repair`.
        ServerChanged: the shards know of a cutover that the catalog has forgotten, or a shard has forgotten the move.
    """
    recorded = hold.move.identities
    present = {shard: identity(hold.connection(shard)) for shard in (hold.move.source, hold.move.target)}
    present[CATALOG] = hold.catalog.identity()
    if not recorded or all(recorded.get(name) == now for name, now in present.items()):
        return
    _require_objects(hold)
    _require_no_later_attempt(hold)
    disregard_servers(hold)
    _close_again(hold)
    if hold.move.state is State.COPYING:
        mark_stale(hold)
    elif hold.move.state in (State.VERIFYING, State.READY, State.SWITCHED):
        _copy_again(hold)
        require_equal(hold, compare_in_full(hold))
    hold.catalog.set_identities(hold.move.id, present, hold.lease.number)
    hold.record("servers_changed")
    hold.refresh()
    settle_newest(hold)
    if hold.unsettled is not None:
        raise hold.unsettled


def disregard_servers(hold: Hold) -> None:
    """For this hold alone: the servers that answer now are the move's. To compare and mend; nothing is opened by it."""
    present = {shard: identity(hold.connection(shard)) for shard in (hold.move.source, hold.move.target)}
    hold.move = replace(hold.move, identities=present)


def flow_by_records(hold: Hold) -> Direction:
    """The way that rows flow by the shards' own records: into the side that is a mirror.

    It differs from what the state says only between a flip and its being carried out, and after a failover that undid
    the opening of the new owner. Both are mirrors then, and who gave the range away has every row: nobody has written
    to the other one by its own record, and it may lack the last rows that it was sent.
    """
    source, target = (
        fence.read(hold.connection(shard), hold.move.id) for shard in (hold.move.source, hold.move.target)
    )
    if source is None or source.standing != Standing.MIRROR:
        return Direction.FORWARD
    if target is None or target.standing != Standing.MIRROR:
        return Direction.BACK
    flipped = _newest_flip(hold)
    return Direction.BACK if flipped is None else flipped.direction


def _newest_flip(hold: Hold) -> Attempt | None:
    attempts = [record.attempt for record in hold.catalog.attempts(hold.move.id)]
    return next((each for each in reversed(attempts) if each.outcome is Outcome.FLIPPED), None)


def _close_again(hold: Hold) -> None:
    """A former owner that forgot its closing would take writes beside the new one (I4): it follows the catalog again.

    What was written there meanwhile is found by the comparison.
    """
    flipped = _newest_flip(hold)
    if flipped is None:
        return
    connection = hold.connection(hold.move.giver(flipped.direction))
    row = fence.read(connection, hold.move.id)
    if row is None or row.standing != Standing.OWNER or row.attempt > flipped.number:
        return
    if row.attempt < flipped.number:
        fence.close(
            connection,
            hold.move.id,
            attempt=flipped.number,
            lease_number=hold.lease.number,
            lock_timeout_ms=max(1, hold.config.limits.max_stall_ms // 2),
        )
    fence.give_away(connection, hold.move.id, attempt=flipped.number)


def _copy_again(hold: Hold) -> None:
    """A target that lost records of batches lost their rows with them: they are copied as at the first time."""
    row = fence.read(hold.target, hold.move.id)
    if row is not None and not row.is_whole and flow_by_records(hold) is Direction.FORWARD:
        copy_missing(hold)


def _require_objects(hold: Hold) -> None:
    """A server that is older than the move has journalled nothing: no comparison could go on from there."""
    if hold.move.state not in MIRRORED:
        return
    for shard in (hold.move.source, hold.move.target):
        if fence.read(hold.connection(shard), hold.move.id) is None:
            raise ServerChanged(
                f"move {hold.move.id}: {shard} has none of the move's objects: it has lost what came after its plan",
                hint=f"bring its last state back, or `shardmove rollback {hold.move.id}` while {hold.move.source} owns"
                " the range",
            )


def _require_no_later_attempt(hold: Hold) -> None:
    for shard in (hold.move.source, hold.move.target):
        row = fence.read(hold.connection(shard), hold.move.id)
        if row is not None and row.attempt > hold.move.last_attempt:
            raise ServerChanged(
                f"move {hold.move.id}: {shard} has seen attempt {row.attempt}, and the catalog knows only"
                f" {hold.move.last_attempt}: the catalog has lost its last commits",
                hint="nothing was opened; bring the catalog's last state back",
            )
