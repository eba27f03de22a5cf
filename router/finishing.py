"""The end of a unit: what it leaves in the session, and the connection that is free where no transaction is open."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from router.statements import Action
from router.units import Change, surviving
from shardmove.wire.messages import FAILED, IDLE, IN_TRANSACTION

if TYPE_CHECKING:
    from router.session import Session
    from router.units import Unit

_SETTINGS = frozenset({"set", "reset", "discard"})
_ENDS = frozenset({"commit", "rollback"})


def finish(session: Session, unit: Unit, status: int) -> None:
    """What the unit leaves in the session."""
    _note_changes(session, unit, status)
    session.is_hinted = session.is_hinted or unit.is_hinted
    session.status = status
    session.unit = None
    session.router.stats.query_seconds.observe(time.monotonic() - unit.began)
    if session.watch is not None:
        session.watch.cancel()
        session.watch = None
    if any(need.decision is not None and need.decision.action is Action.DDL for need in unit.needs):
        session.router.columns.forget()
    if not unit.failed:
        _note_replay(session, unit, status)
        if status == IDLE and session.router.is_comparing:
            session.router.comparing.after(session, unit)
    if status != IDLE:
        return
    session.router.stats.transactions += 1
    changes, session.changes = session.changes, []
    for change in surviving(changes):
        _apply(session, change)
    if session.touched:
        session.router.wake(session.touched)
        session.touched = set()
    session.firm = session.is_hinted = False
    session.replay = []
    session.prepared.portals.clear()
    session.detach()


def _note_changes(session: Session, unit: Unit, status: int) -> None:
    """What of the unit came through: before the last commit where it failed; a COMMIT may have been a rollback."""
    changes = [change for need in unit.needs for change in need.changes]
    _mark(session, unit, changes, status)
    commits, session.replies.commits = session.replies.commits, 0
    marks = [at for at, change in enumerate(changes) if change.what == "commit"]
    if unit.failed:
        session.changes += changes[: marks[min(commits, len(marks)) - 1] + 1] if commits and marks else []
        if status == IDLE:
            session.changes.append(Change("rollback"))
        return
    if session.status == FAILED != status and not (changes and changes[0].what == "rollback to"):
        session.changes.append(Change("rollback"))
    for at in marks[: max(0, len(marks) - commits)]:
        changes[at] = Change("rollback")
    session.changes += changes


def _mark(session: Session, unit: Unit, changes: list[Change], status: int) -> None:
    """Whether the connection holds something of the client's that we do not know, or cannot say again elsewhere."""
    server = session.server
    if server is None:
        return
    is_mixed = not session.keeps_servers and _is_mixed(session, unit, changes, status)
    if is_mixed or any(need.leaves_state for need in unit.needs):
        server.holds_state = True
    elif not unit.failed and any(change.what == "discard" for change in changes):
        server.holds_state = False


def _is_mixed(session: Session, unit: Unit, changes: list[Change], status: int) -> bool:
    """Settings and ends of transactions among several statements: which of them count is not left to our books."""
    is_one = len(unit.needs) <= 1 and (unit.ask is None or len(unit.ask[0].plan.parts) <= 1)
    if session.status == FAILED and not is_one:
        return True
    if is_one and status == IDLE:
        return False
    ends = any(change.what in _ENDS for change in changes)
    return ends and any(change.what in _SETTINGS for change in (*session.changes, *changes))


def _note_replay(session: Session, unit: Unit, status: int) -> None:
    for need in unit.needs:
        if need.replayed is not None and status == IN_TRANSACTION and not session.firm:
            session.replay.append(need.replayed)


def _apply(session: Session, change: Change) -> None:
    server = session.server
    match change.what:
        case "set":
            session.variables.set(change, server)
        case "reset":
            session.variables.reset(change.name, server)
        case "deallocate":
            session.prepared.deallocate(change.name.encode(), server)
        case "discard":
            session.variables.reset("", server, keeps_identity=False)
            session.prepared.deallocate(b"", server)
            session.cursors.clear()
            _leave_others(session)
        case "hold" if server is not None:
            session.cursors[change.name] = server.shard
        case "close" if change.name:
            session.cursors.pop(change.name, None)
        case "close":
            session.cursors.clear()
        case "pin" if server is not None:
            session.servers[server.shard] = server  # what it did there lives in that one connection


def _leave_others(session: Session) -> None:
    """DISCARD ALL is for every connection that the client has."""
    for shard, server in list(session.servers.items()):
        if server is not session.server:
            del session.servers[shard]
            session.router.take_back(server, is_shared=False)
