"""The client's messages, one after the other: what each adds to the unit under way, and where it sends it.

Everything on the way of an ordinary statement happens in here, and in what it calls: no task, no await.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router import copying, dispatching, refusing
from router.dispatching import proceed
from router.prepared import GONE, GONE_TEXT, may_end
from router.statements import Action, Arguments
from router.units import FLOATING, Item, Kind, Need, Portal, Refusal, Statement
from shardmove.wire import messages
from shardmove.wire.messages import FAILED, IDLE, IN_TRANSACTION, ProtocolViolation
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from router.session import Session
    from router.statements import Planned
    from router.units import Unit

ENDS = frozenset({Action.COMMIT, Action.ROLLBACK})
_TOO_MUCH = "what was sent for several shards without a Sync is longer than [router] message_bytes_max"


def take_in(session: Session, data: bytes) -> None:
    """Handles whole messages as long as nothing has to be waited for; the rest waits."""
    at, size, missing = 0, len(data), 5
    inbox = session.inbox
    try:
        while not session.is_blocked and not session.is_closing and size - at >= 5:
            end = at + 1 + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > size or end < at + 5:
                missing = inbox.checked_length(data[at], end - at - 1)
                break
            handler = _HANDLERS.get(data[at])
            if handler is None:
                raise ProtocolViolation(f"there is no message {chr(data[at])!r}")
            if session.is_copying and data[at] not in _IN_COPY:
                handler = copying.pass_on  # a statement where rows were due: the server fails the COPY, and drops it
            elif handler is _on_copy and not session.is_copying and _may_begin_copy(session):
                break
            inbox.taken, inbox.at = data, end
            handler(session, data[at:end])
            if inbox.is_put_back:
                inbox.is_put_back = False
                break
            at = end
        inbox.taken = b""
        _send_begun(session)
    except ProtocolViolation as error:
        session.fatal(error.sqlstate, error.message, hint=error.hint, hears_out=True)
        return
    if at < size:
        inbox.keep(data[at:] if at else data, missing)
        if session.is_blocked and inbox.is_full:
            session.set_reading(False)


def _send_begun(session: Session) -> None:
    """What came in one piece goes out in one piece."""
    unit = session.unit
    if unit is not None and unit.waiting and not unit.is_begun and not session.is_blocked and not session.is_closing:
        _bound(session, unit)
    if unit is not None and unit.is_begun and unit.waiting and session.server is not None and not session.is_blocked:
        session.send_waiting(unit)


def _bound(session: Session, unit: Unit) -> None:
    """What waits for a key to say where it goes is not to grow without one: it goes anywhere."""
    limits = session.limits
    is_parsed_last = unit.waiting[-1].owed is Owed.PARSE  # its Bind is likely to say the key
    bound = limits.message_bytes_max if unit.is_gathering or is_parsed_last else limits.buffer_bytes
    if sum(len(item.frame) for item in unit.waiting) <= bound:
        return
    if unit.is_gathering:
        refusing.refuse(session, unit, Refusal("54000", _TOO_MUCH, "send a Sync after each statement"))
    else:
        proceed(session, unit, unit.need)


def _ignores(session: Session) -> bool:
    """After an error everything up to the next Sync counts for nothing, a simple query too."""
    return session.is_skipping or (session.unit is not None and session.unit.failed)


def _on_query(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    planned = session.router.plan(messages.decode_query(frame[5:]))
    if planned.wants and _learns_first(session, planned):
        return
    session.router.stats.queries += 1
    unit = session.open_unit()
    if planned.added:
        unit.added = planned.added
        frame = messages.query(planned.text)
    unit.ask, unit.is_simple = (planned, None), True
    unit.is_alone = not unit.is_begun and not unit.waiting and len(planned.plan.parts) == 1
    if planned.plan.may_commit:
        unit.forbid_retry()
    need = unit.need = session.decide(unit)
    unit.add(need)
    unit.is_complete = True
    if session.server is None and not unit.is_begun and not unit.waiting and _answer_alone(session, need):
        session.unit = None
        return
    if need.kind is Kind.FREE and need.tag:
        unit.waiting.append(GONE)
        frame = messages.query(GONE_TEXT)
    unit.waiting.append(Item(Owed.QUERY, frame))
    session.prepared.statements.pop(b"", None)
    proceed(session, unit, need)


def _answer_alone(session: Session, need: Need) -> bool:
    """BEGIN, and the end of a transaction that no shard has seen yet."""
    if need.kind is Kind.BEGIN and session.status == IDLE and need.replayed is not None:
        session.replay = [need.replayed]
        session.say(messages.command_complete(need.tag), IN_TRANSACTION)
        return True
    if need.kind is Kind.END and session.status == IN_TRANSACTION:
        session.replay = []
        session.say(messages.command_complete(need.tag), IDLE)
        return True
    if need.kind is Kind.FREE and need.tag:  # DEALLOCATE of a name that only we know
        session.prepared.statements.pop(need.changes[0].name.encode(), None)
        session.say(messages.command_complete(need.tag), session.status)
        return True
    return False


def _on_parse(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    name, text, oids = messages.decode_parse(frame[5:])
    unit, statements = session.open_unit(), session.prepared.statements
    before = statements.get(name)
    if before is not None and name and _fails_there(session, unit, before, text):
        unit.parsed.append((name, before))
        unit.waiting.append(Item(Owed.PARSE, frame))
        return
    if before is not None and name:
        unit.waiting.append(Item(Owed.POISON, frame))
        refusing.fail_in_place(session, unit, Refusal("42P05", f'prepared statement "{_text(name)}" already exists'))
        return
    statement = session.router.statement(name, text, oids)
    if (planned := statement.planned).wants and _learns_first(session, planned):
        return
    if planned.added:
        unit.added = planned.added
        frame = messages.parse(name, statement.text, oids)
    if not session.keeps_servers and _deallocates(session, statement):
        gone = session.router.statement(name, GONE_TEXT, oids)
        statement = Statement(name, GONE_TEXT, oids, statement.planned, gone.alias)
        frame = messages.parse(name, GONE_TEXT, oids)
    statements[name] = statement
    unit.parsed.append((name, before))
    unit.waiting.append(Item(Owed.PARSE, frame, statement))


def _learns_first(session: Session, planned: Planned) -> bool:
    """The message is looked at once more when the columns are known that it does not name."""
    router = session.router
    if not router.columns.may_ask(planned.wants):
        return False
    router.plans.misses -= 1
    session.inbox.is_put_back = True
    session.spawn(router.columns.learn(session, planned.wants))
    return True


def _fails_there(session: Session, unit: Unit, known: Statement, text: bytes) -> bool:
    """The server refuses a Parse of this known name by itself: for the name, or for something before that."""
    if session.server is None:
        return False
    if session.keeps_servers:
        return session.server.statements.get(known.name) is known
    return session.status == FAILED and not unit.has_ended and not may_end(session.router.plan(text))


def _deallocates(session: Session, statement: Statement) -> bool:
    """A name that has another one on connections which several clients share."""
    part = statement.planned.plan.parts[0]
    return part.action is Action.DEALLOCATE and part.name.encode() in session.prepared.statements


def _on_bind(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    bind = messages.decode_bind(frame[5:])
    unit, prepared = session.open_unit(), session.prepared
    statement = prepared.statements.get(bind.statement)
    if unit.is_gathering:
        unit.waiting.append(Item(Owed.BIND, frame, statement))  # refused when the unit is answered
        return
    if statement is None:
        prepared.portals.pop(bind.portal, None)
        unit.waiting.append(Item(Owed.BIND, frame))
        return
    asked, planned = unit.ask, statement.planned
    unit.added = unit.added or planned.added
    unit.ask = (planned, Arguments(bind.formats, bind.values, statement.types))
    unit.is_alone = bool(session.router.known.moves) and _is_alone(session, unit)
    need = session.decide(unit)
    if planned.plan.may_commit:
        unit.forbid_retry()
        unit.has_ended = unit.has_ended or planned.plan.parts[0].action in ENDS
    prepared.portals[bind.portal] = Portal(statement, need)
    unit.waiting.append(Item(Owed.BIND, frame, statement))
    if need.kind in FLOATING and need.shard is None and need.refusal is None:
        if unit.is_bound:
            unit.ask = asked
        return
    unit.need = need
    proceed(session, unit, need)


def _is_alone(session: Session, unit: Unit) -> bool:
    """What is bound now is the only statement of its unit."""
    is_first = not unit.is_begun and all(item.owed in _BEFORE_BIND for item in unit.waiting)
    return is_first and session.inbox.ends_unit


def _on_describe(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    kind, name = messages.decode_describe(frame[5:])
    unit = session.open_unit()
    if kind == b"S":
        unit.waiting.append(Item(Owed.DESCRIBE_STATEMENT, frame, session.prepared.statements.get(name)))
    else:
        unit.waiting.append(Item(Owed.DESCRIBE_PORTAL, frame))


def _on_execute(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    session.router.stats.queries += 1
    portal, _ = messages.decode_execute(frame[5:])
    unit = session.open_unit()
    if (known := session.prepared.portals.get(portal)) is not None:
        unit.add(known.need)
        if known.need.tag and known.need.kind is Kind.FREE:
            unit.waiting.append(GONE)
    unit.waiting.append(Item(Owed.EXECUTE, frame))


def _on_close(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    kind, name = messages.decode_close(frame[5:])
    unit = session.open_unit()
    statement = None
    if kind == b"S":
        statement = session.prepared.statements.pop(name, None)
        unit.parsed.append((name, statement))
    else:
        session.prepared.portals.pop(name, None)
        # No change: it takes its place among those that are.
        unit.parsed.append((b"", session.prepared.statements.get(b"")))
    unit.waiting.append(Item(Owed.CLOSE, frame, statement))


def _on_flush(session: Session, frame: bytes) -> None:
    unit = session.unit
    if _ignores(session) or session.is_copying or unit is None:
        return
    unit.waiting.append(Item(None, frame))
    if unit.is_gathering:
        session.spawn(dispatching.carry_out(session, unit, unit.need))
        return
    if not unit.is_begun:
        proceed(session, unit, unit.need)
    session.replies.answer_now()


def _on_sync(session: Session, frame: bytes) -> None:
    if session.is_copying:
        session.is_sync_last = True  # ignored in copy-in mode, by the server too, unless it failed meanwhile
        return
    if session.is_skipping:
        session.is_skipping = False
        session.unit = None
        session.say(b"", session.status)
        return
    unit = session.unit
    if unit is None and session.server is None:
        session.say(b"", session.status)
        return
    if unit is None:  # a simple query may have left a transaction of the messages before it: its server ends it
        unit = session.open_unit()
        unit.is_begun = True
        unit.forbid_retry()
    unit.waiting.append(Item(Owed.SYNC, frame))
    unit.is_complete = True
    if session.touched and session.replies.kept is None and unit.is_begun:
        session.replies.hold_back()
    if unit.is_begun:
        session.is_blocked = True
        session.send_waiting(unit)
    else:
        proceed(session, unit, unit.need)


def _on_call(session: Session, frame: bytes) -> None:
    if _ignores(session):
        return
    unit = session.open_unit()
    unit.need = Need(Kind.ROUTED, shard=session.router.home, is_write=True, is_blind=True, leaves_state=True)
    unit.needs.append(unit.need)
    unit.waiting.append(Item(Owed.CALL, frame))
    unit.is_complete = unit.is_simple = True
    proceed(session, unit, unit.need)


def _on_copy(session: Session, frame: bytes) -> None:
    """CopyData, CopyDone, CopyFail. After an error they come late, and are nobody's: dropped, as by the server."""
    if not session.is_copying:
        return
    session.is_sync_last = False
    if session.copy is not None:
        session.copy.feed(frame)
    else:
        copying.pass_on(session, frame)


def _may_begin_copy(session: Session) -> bool:
    """Rows came before the server asked for them: whether it will, or drops them, its next replies say."""
    unit, server = session.unit, session.server
    if unit is None or unit.failed or not unit.is_begun or server is None:
        return False
    if not unit.waiting and server.replies.is_empty:
        return False
    unit.waiting.append(Item(None, messages.FLUSH))
    session.send_waiting(unit)
    if server.replies.is_empty:
        return False
    session.is_blocked = session.replies.is_before_copy = True
    return True


def _on_terminate(session: Session, _frame: bytes) -> None:
    session.end()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


_IN_COPY = frozenset(b"dcfSHX")
_BEFORE_BIND = frozenset({Owed.PARSE, Owed.DESCRIBE_STATEMENT, Owed.CLOSE})
_HANDLERS: Mapping[int, Callable[[Session, bytes], None]] = {
    ord("Q"): _on_query,
    ord("P"): _on_parse,
    ord("B"): _on_bind,
    ord("D"): _on_describe,
    ord("E"): _on_execute,
    ord("C"): _on_close,
    ord("H"): _on_flush,
    ord("S"): _on_sync,
    ord("F"): _on_call,
    ord("d"): _on_copy,
    ord("c"): _on_copy,
    ord("f"): _on_copy,
    ord("X"): _on_terminate,
}
