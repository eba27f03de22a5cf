"""How a move ends: completed, or rolled back. Both erase one side, and take our objects off.

I6: a row is erased on a side only while that side's own record says that the range was given away or never taken over,
and mirroring into it has ended. `fence.retire` establishes that, and each erasing transaction checks it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime

from shardmove.coordinator import creating, preflight
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold
from shardmove.coordinator.phases import DUAL_WRITE, TARGET_READ
from shardmove.coordinator.steps import Step, StepRunner, perform, pretend
from shardmove.domain import points
from shardmove.domain.errors import Refused
from shardmove.domain.keys import KeyRange
from shardmove.domain.moves import Direction, Outcome, State
from shardmove.domain.routes import Routes
from shardmove.postgres.connect import Connection
from shardmove.postgres.introspect import Table
from shardmove.postgres.sql import Interval
from shardmove.protocol import fence, kept, objects, ownership, parts
from workers.erase import EraseBatch

# --- complete


def complete(hold: Hold, *, dry_run: bool = False) -> None:
    """Ends a switched move for good: mirroring back ends, the range is erased on the source, its fence stays.

    Safe to repeat; a repeat goes on where it stopped.

    Raises:
        Refused: the move is not switched; or a router that is alive may still read from the source.
        ServerChanged: the catalog is another server, and may have forgotten that the range went back.
        Failed: a table could not be locked, a shard does not answer: the move stays `cleaning`; run it again.
    """
    if hold.move.state is State.COMPLETED:
        return
    if hold.move.state is not State.CLEANING:
        preflight.require_state(hold.move, State.SWITCHED, "complete")
        ownership.check_catalog(hold.catalog, hold.move)
    _runner(hold, dry_run)(_completion(hold))


def _completion(hold: Hold) -> list[Step]:
    source, target, ranges = hold.move.source, hold.move.target, hold.move.ranges_text
    return [
        Step("every client has heard of the cutover", lambda: _grace(hold)),
        Step("carry what is still on its way back", lambda: _last_catch_up(hold)),
        Step("from here there is no way back", lambda: _enter(hold, State.CLEANING)),
        Step(f"end mirroring into {source}", lambda: _retire_source(hold)),
        Step(f"erase {ranges} on {source}", lambda: _erase_range(hold)),
        Step(
            f"keep refusing writes to {ranges} on {source}",
            lambda: _keep(hold, hold.source, hold.move.ranges),
        ),
        Step(f"remove our objects from {source}", lambda: remove(hold, source)),
        Step(f"remove our objects from {target}", lambda: remove(hold, target)),
        Step("the move is completed", lambda: hold.transition(State.COMPLETED, routes=lambda r: unmarked(hold, r))),
    ]


def _enter(hold: Hold, state: State) -> None:
    if hold.move.state is not state:
        hold.transition(state)


def _grace(hold: Hold) -> None:
    """Clients with an old route table find the source's rows, and its fence, for a while after the cutover."""
    if hold.move.state is State.SWITCHED:
        switched_for_s = (datetime.now(UTC) - hold.move.state_since).total_seconds()
        hold.stop.wait(max(0.0, hold.config.limits.keep_source_s - switched_for_s))
        hold.check()
    epoch = hold.await_routers(f"erasing the range on {hold.move.source}")
    hold.await_silent_routers(epoch)


def _last_catch_up(hold: Hold) -> None:
    if hold.move.state is State.SWITCHED:
        with hold.mirror(Direction.BACK) as mirror:
            mirror.work_off(hold.config.limits.mirror_rows, check=hold.check)


def _retire_source(hold: Hold) -> None:
    if fence.read(hold.source, hold.move.id) is not None:  # else it was erased and cleaned before
        fence.retire(hold.source, hold.move.id, lease_number=hold.lease.number)


def _erase_range(hold: Hold) -> None:
    """Erases the whole range on the source, children first, interval by interval."""
    if fence.read(hold.source, hold.move.id) is None:
        return
    for ordinal, table in reversed(list(enumerate(hold.tables, 1))):
        _erase(hold, hold.move.source, [(ordinal, table, (None, None))], drop_record=False)
    points.reach("ending.after_erase")


# --- rollback


def roll_back(hold: Hold, *, dry_run: bool = False) -> None:
    """Gives a move up: the source owns the range, the target holds nothing of it and nothing of ours.

    From `switched` it reverts first, so that rows written after the cutover survive. The source's rows are never
    touched. Safe to repeat; a repeat goes on where it stopped.

    Raises:
        Refused: the move is completed or being completed; the revert was refused; or a router that is alive may still
            read from the target: then the move stays `rolling_back`, or `ready` where it was in phase 4.
        ServerChanged: the catalog is another server, and may have forgotten that the target owns the range.
        Failed: a table could not be locked, a shard does not answer: the move stays `rolling_back`; run it again.
    """
    if hold.move.state is State.ROLLED_BACK:
        return
    if hold.move.state in (State.CLEANING, State.COMPLETED):
        raise Refused(
            f"move {hold.move.id} is {hold.move.state}: its source was given up, there is no way back",
            hint=f"plan a move of {hold.move.ranges_text} back to {hold.move.source}",
        )
    if hold.move.state is not State.ROLLING_BACK:
        ownership.check_catalog(hold.catalog, hold.move)
    if hold.move.state is State.SWITCHED:
        cut_over(hold, Direction.BACK, dry_run=dry_run)
    _runner(hold, dry_run)(_retreat(hold))


def _retreat(hold: Hold) -> list[Step]:
    source, target, ranges = hold.move.source, hold.move.target, hold.move.ranges_text
    return [
        *_ends_reads(hold),
        Step("the move is given up", lambda: _enter(hold, State.ROLLING_BACK)),
        Step(f"wait until no router reads from {target}", lambda: _await_routers(hold)),
        Step(f"end mirroring into {target}", lambda: _retire_target(hold)),
        Step(f"triggers off: remove our objects from {source}", lambda: remove(hold, source)),
        Step(f"erase what was copied of {ranges} on {target}: reverse deletes", lambda: _reverse_deletes(hold)),
        Step(f"keep refusing writes on {target} where it ever owned the range", lambda: _keep_if_owned(hold)),
        Step(f"finish the tables that were made on {target}", lambda: _finish_tables(hold)),
        Step(f"remove our objects from {target}", lambda: remove(hold, target)),
        Step("the move is rolled back", lambda: _roll_back_ends(hold)),
    ]


def _ends_reads(hold: Hold) -> list[Step]:
    """Out of phase 4: commits are mirrored first until every router has heard that nobody reads the target."""
    target = hold.move.target

    def end() -> None:
        hold.catalog.set_phase(hold.move.id, TARGET_READ, DUAL_WRITE, lease_number=hold.lease.number)
        hold.await_routers(f"ending the reads on {target}")

    is_read = hold.move.state is State.READY and hold.catalog.traffic(hold.move.id).phase == TARGET_READ
    return [Step(f"nobody reads from {target} any more", end)] if is_read else []


def _await_routers(hold: Hold) -> None:
    hold.await_routers(f"erasing the range on {hold.move.target}")


def _retire_target(hold: Hold) -> None:
    if objects.has_schema(hold.target) and fence.read(hold.target, hold.move.id) is not None:
        hold.tables = objects.load_tables(hold.target, hold.move.id)
        fence.retire(hold.target, hold.move.id, lease_number=hold.lease.number)


def _finish_tables(hold: Hold) -> None:
    """Tables that this move made stay, as whole as the source's: another move may use them already."""
    if objects.has_schema(hold.target):
        creating.finish(hold)


def _reverse_deletes(hold: Hold) -> None:
    """Erases exactly the batches that the target recorded, the newest first, each with its record."""
    if not objects.has_schema(hold.target) or fence.read(hold.target, hold.move.id) is None:
        return
    _erase(hold, hold.move.target, list(_recorded(hold)), drop_record=True)


def _recorded(hold: Hold) -> Iterator[tuple[int, Table, Interval]]:
    rows = hold.target.execute(
        "SELECT ordinal, after, upto FROM shardmove.batch WHERE move_id = %s ORDER BY ordinal DESC, number DESC",
        (hold.move.id,),
    ).fetchall()
    for ordinal, after, upto in rows:
        interval = (None if after is None else tuple(after), None if upto is None else tuple(upto))
        yield ordinal, hold.tables[ordinal - 1], interval


def _keep_if_owned(hold: Hold) -> None:
    """I4 holds for ever among the shards that ever owned the range: a target that did keeps refusing it."""
    row = fence.read(hold.target, hold.move.id) if objects.has_schema(hold.target) else None
    if row is None:
        return
    flipped = any(each.attempt.outcome is Outcome.FLIPPED for each in hold.catalog.attempts(hold.move.id))
    parse = hold.move.keyspace.bound_type.parse_range
    ranges = hold.move.ranges if flipped else tuple(parse(text) for text in row.kept_before)
    if ranges:
        _keep(hold, hold.target, ranges)


def roll_back_without_target(hold: Hold, *, dry_run: bool = False) -> None:
    """Gives a move up whose target is lost for good, while the source still owns the range.

    What the target holds of ours stays there; should it ever answer again, its fence refuses the range, and
    `diagnose` names what is left. Safe to repeat.

    Raises:
        Refused: the target owns the range, or did when the move ended.
    """
    if hold.move.state in (State.SWITCHED, State.CLEANING, State.COMPLETED):
        raise Refused(
            f"move {hold.move.id} is {hold.move.state}: {hold.move.target} owns the range",
            hint=f"restore {hold.move.target}",
        )
    source, target = hold.move.source, hold.move.target
    _runner(hold, dry_run)(
        [
            Step("the move is given up", lambda: _enter(hold, State.ROLLING_BACK)),
            Step(f"triggers off: remove our objects from {source}", lambda: remove(hold, source)),
            Step(f"leave {target} as it is", lambda: _record_loss(hold)),
            Step("the move is rolled back", lambda: _roll_back_ends(hold)),
        ]
    )


def _record_loss(hold: Hold) -> None:
    hold.record("target_lost", shard=hold.move.target)


def _roll_back_ends(hold: Hold) -> None:
    hold.transition(State.ROLLED_BACK, routes=lambda routes: unmarked(hold, routes))


# --- both


def _keep(hold: Hold, connection: Connection, ranges: Sequence[KeyRange]) -> None:
    if not parts.has_ended(connection, hold.move.id):
        points.reach("ending.before_keep")
        kept.keep_fence(connection, hold.move, ranges, hold.tables, hold.patience, lease_number=hold.lease.number)


def _runner(hold: Hold, dry_run: bool) -> StepRunner:
    return (pretend if dry_run else perform)(hold.progress.step)


def _erase(
    hold: Hold,
    shard: str,
    pieces: list[tuple[int, Table, Interval]],
    *,
    drop_record: bool,
) -> None:
    under_way: list[Future[int]] = []
    for ordinal, table, interval in pieces:
        hold.check()
        task = EraseBatch(
            hold.move,
            ordinal,
            table,
            interval,
            hold.lease.number,
            shard,
            hold.config.shard_dsn(shard),
            hold.config.limits.erase_rows,
            drop_record,
        )
        under_way.append(hold.executor.submit(task))
        if len(under_way) > 2 * hold.executor.workers:
            under_way.pop(0).result()
    for future in under_way:
        future.result()


def remove(hold: Hold, shard: str) -> None:
    """Takes the move's objects off a shard, if it has any."""
    connection = hold.connection(shard)
    if objects.has_schema(connection):
        fence.raise_number(connection, hold.move.id, hold.lease.number)  # a move that was never begun has none here
        objects.remove_move(connection, hold.move.id, hold.patience, lease_number=hold.lease.number)


def unmarked(hold: Hold, routes: Routes) -> Routes:
    """The same owners; the ranges are not moving any more."""
    return Routes.of(
        routes.keyspace,
        [replace(r, move_id=None, held=False) if r.move_id == hold.move.id else r for r in routes.routes],
    )
