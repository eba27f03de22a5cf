"""From a decision about SQL to what the session has to do: the one place where both vocabularies meet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from router import placing
from router.statements import Action, Arguments, Decision, Facts, Part, Planned, decide
from router.units import ANYWHERE, Change, Kind, Need, Refusal
from shardmove.wire import messages
from shardmove.wire.messages import IDLE

if TYPE_CHECKING:
    from router.service import Known
    from router.session import Session

_LIVES_IN_CONNECTION = re.compile(
    rb"pg_(try_)?advisory_lock|\bpg_temp(_\d+)?\b|\bwith\s+hold\b"
    rb"|\b(create|global|local|replace|into)(?>\s|/\*.*?\*/|--[^\n]*\n)++temp(orary)?\b",  # elsewhere it is a name
    re.IGNORECASE | re.DOTALL,
)
"""What a session keeps in its connection to the server, whatever the transaction does."""
_PIN = (Change("pin"),)
UNDEFINED_PARAMETER = "42P02"


def ask(known: Known, planned: Planned, arguments: Arguments | None, session: Session) -> Need:
    """What the statement needs, by these routes. Never raises for what a client sent."""
    decision = decide(planned, arguments, known, facts(session, planned))
    refusal = decision.refusal
    if refusal is not None:
        if refusal.sqlstate == UNDEFINED_PARAMETER:
            return ANYWHERE  # every server refuses it, in its own words
        return Need(Kind.FREE, refusal=refusal)
    is_opaque = planned.plan.is_opaque
    if decision.action is Action.KEYED and decision.part is not None and not (is_opaque or decision.is_hinted):
        return _keyed(known, planned, decision, session)
    need = _BY_ACTION[decision.action](known, planned, decision, session)
    if need.is_write and (is_opaque or decision.is_hinted or decision.action is Action.HOME):
        need = need._replace(is_blind=True)
    if len(planned.plan.parts) > 1:
        need = _script(known, planned, need, session)
    if _LIVES_IN_CONNECTION.search(planned.text):
        return need._replace(changes=need.changes + _PIN, leaves_state=True)
    return need._replace(leaves_state=True) if is_opaque else need


def facts(session: Session, planned: Planned) -> Facts:
    """What says how keys are read, as far as it is known where the statement stands."""
    unit = session.unit
    has_changes = unit is not None and unit.has_changes
    if not has_changes and not session.is_hinted and len(planned.plan.parts) == 1:
        return session.variables.facts
    of_unit = [change for need in unit.needs for change in need.changes] if unit is not None else []
    return _settled(_hinted(session, of_unit), session, of_unit, planned.plan.parts)


def _hinted(session: Session, of_unit: Sequence[Change]) -> Facts:
    """Hints that the transaction has set count at once, and end with it."""
    if session.is_hinted or (session.unit is not None and session.unit.is_hinted):
        return session.variables.facts_within([*session.changes, *of_unit])
    return session.variables.facts


def _settled(known: Facts, session: Session, of_unit: Sequence[Change], parts: Sequence[Part]) -> Facts:
    """A server tells of its settings at the unit's end: what changes within the unit is not known until then."""
    is_script = len(parts) > 1
    changes = [*of_unit]
    if any(change.what in _TAKING_BACK for change in of_unit) or (is_script and any(map(_takes_back, parts))):
        changes += session.changes
    if any(map(_reads, changes)) or (is_script and any(map(_sets_reading, parts))):
        return replace(known, time_zone=None, is_utf8=False)
    if is_script and any(part.is_opaque for part in parts[:-1]):
        return replace(known, time_zone=None)
    return known


_SETTING = frozenset({"set", "set local", "reset", "discard"})
_TAKING_BACK = frozenset({"commit", "rollback", "rollback to"})
_READING = frozenset({"timezone", "client_encoding", "", "all"})
"""The settings that say how a key is read. No name is for all of them."""


def _reads(change: Change) -> bool:
    return change.what in _SETTING and change.name in _READING


def _sets_reading(part: Part) -> bool:
    return part.action in (Action.SET, Action.RESET, Action.DISCARD) and part.name.lower() in _READING


def _takes_back(part: Part) -> bool:
    return part.action in (Action.COMMIT, Action.ROLLBACK, Action.SAVEPOINT)


def _keyed(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    shards, routes = decision.shards, decision.routes
    if not shards:
        return ANYWHERE  # no key at all, as in `key = NULL`: every server says the same
    is_write = decision.is_write or decision.locks_rows
    shard = shards[0]
    is_plain = not is_write and not decision.is_hinted and decision.part is not None
    if is_plain and len(routes) == 1 and routes[0].move_id is not None and session.status == IDLE:
        move = known.moves.get(routes[0].move_id)
        is_chosen = move is not None and move.phase == 4 and session.lot < move.read_share
        if move is not None and is_chosen and _may_read_at_target(session):
            return Need(Kind.ROUTED, move.target, routes, decision=decision, is_at_target=True)
    return Need(Kind.ROUTED, shard, routes, is_write, decision=decision)


def _may_read_at_target(session: Session) -> bool:
    """What comes before or behind it in the same unit is the owner's, a write for one."""
    unit = session.unit
    return unit is not None and unit.is_alone and not unit.stays_at_source


Answer = Callable[["Known", Planned, Decision, "Session"], Need]


def _at_home(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    return Need(Kind.ROUTED, known.home, decision.routes, decision.is_write or decision.locks_rows)


def _free(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    return ANYWHERE


def _where_it_is(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    """Cursors: they are where the transaction is, or was when they were declared."""
    name = decision.part.name if decision.part is not None else ""
    shard = session.shard or session.cursors.get(name) or placing.default_shard(session)
    changes = (Change("close", name),) if decision.action is Action.CLOSE else ()
    return Need(Kind.ROUTED, shard, is_write=decision.is_write, changes=changes)


def _placed(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    """One shard where the decision names one; any where it names none."""
    if len(decision.shards) > 1:
        return _refused("0A000", "the statement reads several shards at once", "name a key in it")
    is_write = decision.is_write or decision.locks_rows
    if not decision.shards:
        return ANYWHERE
    return Need(Kind.ROUTED, decision.shards[0], decision.routes, is_write, decision=decision)


def _script(known: Known, planned: Planned, need: Need, session: Session) -> Need:
    """Several statements in one query: what they change in the session, each for itself.

    A script that begins or ends transactions, or has settings in it, cannot be said again elsewhere.
    """
    parts = [part for part in planned.plan.parts if part.action in _CHANGING]
    if need.refusal is not None or not parts:
        return need
    hints = [part for part in parts if part.name.startswith("shardmove.")]
    if hints and len(hints) < len(planned.plan.parts):
        return _refused("0A000", f"{hints[0].name} beside other statements is not routed", "send it by itself")
    each = [
        _BY_ACTION[part.action](known, planned, Decision(part.action, part=part, value=part.value), session)
        for part in parts
    ]
    for one in each:
        if one.refusal is not None:
            return one
    changes = tuple(change for one in each for change in one.changes)
    if need.kind is Kind.FREE:
        need = Need(Kind.ROUTED, session.shard or placing.default_shard(session))
    leaves_state = need.leaves_state or any(one.leaves_state for one in each)
    return need._replace(changes=need.changes + changes, leaves_state=leaves_state)


def _explained(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    """The server explains what it would do; a notice before it says which server, and why that one."""
    shards = ", ".join(decision.shards) or "any"
    ranges = ", ".join(f"{route.range}" for route in decision.routes)
    text = f"route: shard {shards}{f', key range {ranges}' if ranges else ''}, epoch {known.epoch}"
    notice = messages.notice_response("00000", f"shardmove: {text}", severity="INFO")
    shard = decision.shards[0] if decision.shards else None
    kind = Kind.FREE if shard is None else Kind.ROUTED
    return Need(kind, shard, decision.routes, decision.is_write, notice=notice)


def _scattered(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    if session.status != IDLE:
        return _refused(
            "0A000",
            f"a statement in a transaction block reads one shard, and this one reads {', '.join(decision.shards)}",
            "run it outside the transaction, or name a key in it",
        )
    return Need(Kind.SCATTER, None, decision.routes, decision=decision)


def _everywhere(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    if len(decision.shards) == 1:
        return Need(Kind.ROUTED, decision.shards[0], decision.routes, is_write=True, decision=decision)
    if session.status != IDLE:
        return _refused(
            "0A000",
            "a statement for every shard cannot be a part of a transaction block",
            "run it outside; it is one transaction on each shard, one shard after the other",
        )
    return Need(Kind.EVERYWHERE, None, decision.routes, is_write=True, decision=decision)


def _ddl(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    moves = sorted({r.move_id for routes in known.routes.keyspaces.values() for r in routes.routes if r.move_id})
    if moves:
        return _refused(
            "55006",
            f"move {', '.join(moves)} is under way: its tables must not change",
            "wait until it is completed or rolled back",
        )
    return _everywhere(known, planned, decision, session)


def _begin(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    if session.status != IDLE:
        return ANYWHERE  # a warning of the server's
    part = _part(decision)
    text = planned.statement(part)
    is_plain = part.isolation is None and part.is_read_only is None and part.is_deferrable is None
    tag = b"START TRANSACTION" if text[:5].upper() == b"START" else b"BEGIN"
    return Need(Kind.BEGIN, replayed=b"BEGIN" if is_plain else text, tag=tag)


def _end(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    tag = b"COMMIT" if decision.action is Action.COMMIT else b"ROLLBACK"
    changes = (Change(tag.decode().lower()),)
    if _part(decision).is_chained:
        return Need(Kind.FREE, changes=changes)
    return Need(Kind.END, tag=tag, changes=changes)


def _replayed(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    changes = (Change(part.kind.lower(), part.name),) if decision.action is Action.SAVEPOINT else ()
    return Need(Kind.FREE, replayed=planned.statement(part), changes=changes)


def _set(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    text = planned.statement(part)
    if part.kind == _CHARACTERISTICS:
        return Need(Kind.FREE, replayed=text, changes=_characteristics(part))
    if part.is_query:
        if decision.value is None:
            return Need(Kind.FREE, replayed=text, changes=_told(part), leaves_state=True)
        if (refusal := placing.unsafe(part.name, decision.value)) is not None:
            return Need(Kind.FREE, refusal=refusal)
        text = placing.set_config(part.name, decision.value, is_local=part.is_local)
    if part.is_local and not part.name.startswith("shardmove."):
        return Need(Kind.FREE, replayed=text, changes=_told(part))
    change = Change("set local" if part.is_local else "set", part.name.lower(), text, decision.value)
    return Need(Kind.FREE, replayed=text, changes=(change,))


def _told(part: Part) -> tuple[Change, ...]:
    """Of a setting that the server tells of, and that is not kept here: only that it changes."""
    name = part.name.lower()
    return (Change("set local", name),) if name in _READING else ()


_CHARACTERISTICS = "SESSION CHARACTERISTICS"


def _characteristics(part: Part) -> tuple[Change, ...]:
    """SET SESSION CHARACTERISTICS AS TRANSACTION …, as the settings that it sets."""
    values = {
        "isolation": part.isolation,
        "read_only": None if part.is_read_only is None else str(part.is_read_only),
        "deferrable": None if part.is_deferrable is None else str(part.is_deferrable),
    }
    named = [(f"default_transaction_{name}", value) for name, value in values.items() if value is not None]
    return tuple(Change("set", name, placing.set_config(name, value), value) for name, value in named)


def _reset(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    return Need(
        Kind.FREE,
        replayed=planned.statement(part),
        changes=(Change("reset", "" if _is_all(part) else part.name.lower()),),
    )


def _hint(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    if part.value is None:
        return _reset(known, planned, decision, session)
    text = placing.set_config(part.name, part.value, is_local=part.is_local)
    change = Change("set local" if part.is_local else "set", part.name.lower(), text, part.value)
    return Need(Kind.FREE, replayed=text, changes=(change,))


def _discard(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    changes = (Change("discard"),) if part.kind == "ALL" else ()
    return Need(Kind.FREE, changes=changes)


def _prepare(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = _part(decision)
    inner = part.inner
    if len(known.shards) > 1 and inner is not None and (inner.keyspaces or inner.action is Action.REFERENCE_WRITE):
        what = "on split tables" if inner.keyspaces else "for every shard"
        return _refused(
            "0A000",
            f"PREPARE of a statement {what} is not routed",
            "use your driver's prepared statements: they are routed each time they are executed",
        )
    return Need(Kind.ROUTED, known.home, changes=_PIN, leaves_state=True)


def _deallocate(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    name = _part(decision).name
    there = [shard for shard, server in session.servers.items() if name.encode() in server.statements]
    shard = session.shard or (there[0] if there else known.home)
    tag = b"" if session.keeps_servers or name.encode() not in session.prepared.statements else b"DEALLOCATE"
    return Need(Kind.FREE, shard, changes=(Change("deallocate", name),), tag=tag)


def _listen(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    return Need(Kind.ROUTED, known.home, changes=_PIN, leaves_state=True)


def _declare(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    is_placed = bool(decision.shards)
    need = (_placed if is_placed else _where_it_is)(known, planned, decision, session)
    part = _part(decision)
    return need._replace(changes=(Change("hold", part.name),)) if part.kind == "HOLD" else need


def _copy_in(known: Known, planned: Planned, decision: Decision, session: Session) -> Need:
    part = decision.part
    if part is not None and part.copy is not None and not decision.shards:
        if len(known.shards) == 1:
            return Need(Kind.ROUTED, known.shards[0], is_write=True)
        return Need(Kind.COPY_IN, None, is_write=True, decision=decision)
    if len(decision.shards) > 1:
        return _refused("0A000", "COPY into a reference table is not routed", "copy into it on every shard directly")
    return _placed(known, planned, decision, session)


def _is_all(part: Part) -> bool:
    return part.name.lower() in ("", "all")


def _part(decision: Decision) -> Part:
    assert decision.part is not None
    return decision.part


def _refused(sqlstate: str, message: str, hint: str) -> Need:
    return Need(Kind.FREE, refusal=Refusal(sqlstate, message, hint))


_CHANGING = frozenset(
    {
        Action.BEGIN,
        Action.COMMIT,
        Action.ROLLBACK,
        Action.SAVEPOINT,
        Action.SET_TRANSACTION,
        Action.SET,
        Action.RESET,
        Action.DISCARD,
        Action.DEALLOCATE,
        Action.LISTEN,
        Action.PREPARE,
        Action.KEY_HINT,
    }
)
_BY_ACTION: Mapping[Action, Answer] = {
    Action.KEYED: _keyed,
    Action.SCATTER: _scattered,
    Action.REFERENCE_READ: _free,
    Action.REFERENCE_WRITE: _everywhere,
    Action.HOME: _at_home,
    Action.FREE: _free,
    Action.DDL: _ddl,
    Action.EMPTY: _free,
    Action.BEGIN: _begin,
    Action.COMMIT: _end,
    Action.ROLLBACK: _end,
    Action.SAVEPOINT: _replayed,
    Action.SET_TRANSACTION: _replayed,
    Action.SET: _set,
    Action.RESET: _reset,
    Action.SHOW: _free,
    Action.DISCARD: _discard,
    Action.PREPARE: _prepare,
    Action.EXECUTE: _at_home,
    Action.DEALLOCATE: _deallocate,
    Action.LISTEN: _listen,
    Action.UNLISTEN: _at_home,
    Action.NOTIFY: _at_home,
    Action.DECLARE: _declare,
    Action.FETCH: _where_it_is,
    Action.MOVE: _where_it_is,
    Action.CLOSE: _where_it_is,
    Action.COPY_IN: _copy_in,
    Action.COPY_OUT: _placed,
    Action.PREPARED_TRANSACTION: _at_home,
    Action.KEY_HINT: _hint,
    Action.SHOW_HINT: _free,
    Action.EXPLAIN: _explained,
}
