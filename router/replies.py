"""What a client's connections say back, on its way to the client: told at once, kept back, replaced, or dropped.

Replies are kept back as long as there may be a second try (`router/retrying.py`), and where a commit is told only once
the other side of a move has it (phase 4). An error may be the answer to a message that the router sent to make the
server fail: then the client is told the refusal instead (`router/refusing.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from router import columns, finishing, retrying
from shardmove.wire import messages
from shardmove.wire.messages import IDLE, ProtocolViolation

if TYPE_CHECKING:
    from router.server import Server
    from router.session import Session
    from router.units import Unit

UNKNOWN = "whether what was under way was committed is not known"
_ROWS = b"TDd"


class Replies:
    """The holder of a session's connections.

    Attributes:
        kept: replies that are kept back; None where they go on at once.
        is_muted: replies are not for the client: what is under way is tried again.
        is_acknowledging: a commit is done, and the other side of a move does not have it yet (phase 4).
        is_before_copy: the client sent rows before a server asked for them.
        poisons: what the client is told for messages that were sent to fail, in order.
        replacement: what it is told for the next error.
        commits: how many transactions the unit under way has committed.
    """

    def __init__(self, session: Session) -> None:
        self.pid = session.pid
        self.kept: list[bytes] | None = None
        self.is_muted = False
        self.is_acknowledging = False
        self.is_before_copy = False
        self.poisons: list[bytes] = []
        self.replacement: bytes | None = None
        self.commits = 0
        self._session = session
        self._stats = session.router.stats
        self._transport = session.transport
        self._kept_bytes = 0
        self._has_committed = False
        self._is_due = False  # a commit was met that is told late
        self._ended: int | None = None  # with this status, while a commit is acknowledged
        self._completed_at: int | None = None
        self._is_told = False
        self._aside: list[bytes] = []  # a notification of another connection, while a large row passes in pieces

    # --- rows, and whatever else goes on as it is

    def on_replies(self, server: Server, data: bytes) -> None:
        if self.is_before_copy and server.replies.is_empty:
            self.is_before_copy = False
            asyncio.get_running_loop().call_soon(self._resume_failed, self._session.unit)
        if self.is_muted or self._session.is_closing:
            return
        if server is not (under_way := self._session.server) and under_way is not None and under_way.is_passing:
            self._aside.append(data)
            return
        if self.kept is not None:
            self._keep(data)
            return
        self._stats.bytes_out += len(data)
        self._transport.write(data)
        if self._aside and not server.is_passing:
            aside, self._aside = self._aside, []
            self._session.tell(b"".join(aside))

    def _keep(self, data: bytes) -> None:
        assert self.kept is not None
        session = self._session
        self.kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes <= session.limits.buffer_bytes:
            return
        if self._is_due or self.is_acknowledging:
            if session.server is not None:
                session.server.set_reading(False)
        elif not session.router.acknowledges_late(session.touched):
            self.let_go()
        elif self._completed_at in (None, len(self.kept) - 1) or data[0] in _ROWS:
            self._let_precede()

    def _let_precede(self) -> None:
        """What comes before the word of a commit goes to the client: what is kept back does not grow with the rows.

        That word is the last completion, or ReadyForQuery. One that rows follow is none; a COMMIT's own has been met.
        """
        assert self.kept is not None
        *before, last = self.kept
        self._session.tell(b"".join(before))
        self._completed_at = 0 if self._completed_at == len(before) else None
        self.kept, self._kept_bytes = [last], len(last)
        if self._session.unit is not None:
            self._session.unit.sent = None  # a second try would say it again

    def hold_back(self) -> None:
        """Replies wait until it is clear that there will be no second try."""
        self.kept = []
        self._kept_bytes = 0
        self._completed_at = None

    def let_go(self) -> None:
        """Replies that were kept back go to the client, unless the word of a commit is among them that is told late."""
        if self._is_due or self.is_acknowledging:
            return
        kept, self.kept = self.kept, None
        if kept:
            self._session.tell(b"".join(kept))

    def answer_now(self) -> None:
        """The client waits for what is there before it says more: a second try is not possible any more."""
        self.let_go()
        session = self._session
        if session.unit is not None and session.copy is None:
            unit = session.unit
            unit.is_bound = unit.is_bound or unit.has_ended
            unit.sent = None if unit.is_bound or unit.is_once else []

    def renumbered(self, server: Server, frame: bytes) -> bytes:
        """A notification with the number that clients know its sender by."""
        told = messages.decode_notification(frame[5:])
        pid = self._session.router.client_number(server.shard, told.pid)
        return frame if pid is None else messages.notification_response(pid, told.channel, told.payload)

    def on_types(self, frame: bytes) -> None:
        self._session.prepared.on_types(frame)

    def on_parameter(self, name: bytes, value: bytes) -> None:
        self._session.variables.report(name, value)

    def on_complete(self, frame: bytes) -> None:
        self.commits += frame[5:] == b"COMMIT\0"
        if self.kept is not None and not self._session.touched:
            self.let_go()
        if frame[5:11] == b"COMMIT":
            self._on_commit()
        self._completed_at = None if self.kept is None else len(self.kept)  # it is in the piece that comes next

    def _on_commit(self) -> None:
        """Amid the unit, or at its end. Its word waits until the other side has it, and with it all that follows."""
        session = self._session
        self._has_committed = True
        if not self._is_due and session.router.acknowledges_late(session.touched):
            self._is_due = True
            if self.kept is None:
                self.hold_back()
            asyncio.get_running_loop().call_soon(self._acknowledge_amid, session.unit)

    def _acknowledge_amid(self, unit: Unit | None) -> None:
        """Unless the unit's end has come by now, and begun it."""
        session = self._session
        if not self._is_due or self.is_acknowledging or unit is None or session.unit is not unit or session.is_closing:
            return
        if session.task is None:
            self._begin_acknowledging(unit)
        else:
            session.task.add_done_callback(lambda _: self._acknowledge_amid(unit))

    # --- a server asks for rows

    def on_copy_in(self, server: Server) -> None:
        """The client's rows are due. In the extended protocol the Sync that it sent already counts for nothing."""
        session = self._session
        session.is_copying = True
        session.is_sync_last = False
        self.answer_now()
        if session.unit is not None and not session.unit.is_simple:
            session.unit.is_complete = False
        if session.copy is not None:
            session.copy.on_copy_in()
        asyncio.get_running_loop().call_soon(self._resume_copy)

    def _resume_copy(self) -> None:
        if self._session.is_copying and self._session.task is None:
            self._session.resume()

    # --- errors

    def on_poisoned(self, server: Server) -> bytes:
        error = self.poisons[0]
        if self._session.unit is not None:
            self._fail(server, self._session.unit)
        return error

    def on_error(self, server: Server, frame: bytes) -> bytes:
        session = self._session
        unit = session.unit
        self._stats.errors += 1
        if session.is_copying:
            self._stop_copying(unit)
        self._is_told = b"\0VFATAL\0" in frame
        if self.replacement is not None:
            frame, self.replacement = self.replacement, None
        if unit is None:
            return frame
        if unit.added:
            frame = self._about_columns(unit, frame)
        if self._is_told and retrying.give_up_target(session, unit, "its server ended the connection"):
            self._is_told = False
            return b""
        if session.copy is not None:
            if self.is_muted:
                session.copy.on_error(frame)
                return b""
            session.copy = None
        if self.kept is not None and not self._has_committed and retrying.may_retry(unit, frame):
            self.kept = None
            self.is_muted = True
            return b""
        self._fail(server, unit)
        return frame

    def _about_columns(self, unit: Unit, frame: bytes) -> bytes:
        if messages.error_fields(frame[5:]).get("C") in columns.STALE:
            self._session.router.columns.doubt()
        return columns.told_of(frame, unit.added)

    def _stop_copying(self, unit: Unit | None) -> None:
        """The server failed the COPY. A Sync behind the row which failed it was taken for one in copy-in mode."""
        session = self._session
        session.is_copying = False
        session.is_blocked = session.task is not None or (unit is not None and unit.is_complete)
        if session.is_sync_last and unit is not None:
            session.inbox.put_first(messages.SYNC)
            asyncio.get_running_loop().call_soon(self._resume_failed, unit)

    def _fail(self, server: Server, unit: Unit) -> None:
        """The server met an error, and may ignore what was sent behind it."""
        unit.failed = True
        self.poisons.clear()
        self._session.prepared.described.clear()
        self.let_go()
        self._session.prepared.take_back(unit, server.replies.dropped)
        if server.replies.is_skipping and (unit.is_complete or self.is_before_copy):
            unit.is_complete = unit.is_simple = False  # a simple query or a call behind it is ignored, too
            asyncio.get_running_loop().call_soon(self._resume_failed, unit)

    def _resume_failed(self, unit: Unit | None) -> None:
        session = self._session
        self.is_before_copy = False
        if unit is not None and session.unit is unit and not unit.is_complete and session.task is None:
            session.resume()

    # --- the end

    def on_ready(self, server: Server, status: int) -> None:
        session = self._session
        unit = session.unit
        if unit is None:
            raise ProtocolViolation("ReadyForQuery came for nothing")
        if self.is_muted:
            if session.copy is not None:
                session.copy.on_ready()
            else:
                session.spawn(retrying.retry(session, unit))
            return
        if self.is_acknowledging:
            self._ended = status
            self._is_due = self._is_due or status == IDLE
            return
        is_due = self.kept is not None and (self._is_due or status == IDLE)
        if is_due and session.router.acknowledges_late(session.touched):
            self._ended = status
            self._begin_acknowledging(unit)
            return
        self._finish(unit, status)
        session.resume()

    def _begin_acknowledging(self, unit: Unit) -> None:
        self._is_due = self.is_acknowledging = True
        self._session.spawn(self._acknowledge(unit))

    def _finish(self, unit: Unit, status: int) -> None:
        self._has_committed = self._is_due = False
        self._ended = None
        self.let_go()
        finishing.finish(self._session, unit, status)

    async def _acknowledge(self, unit: Unit) -> bool:
        """A commit is told only once the other side has it (phase 4). The unit may have ended with it, or go on."""
        session, server = self._session, self._session.server
        try:
            while self._is_due:
                self._is_due = False
                await session.router.mirrored(set(session.touched))
        finally:
            self.is_acknowledging = False
        if (is_there := session.server is server) and server is not None:
            server.set_reading(session.writable.is_set())
        if self._ended is not None:
            self._finish(unit, self._ended)
            return True
        self.let_go()
        if not is_there:
            session.fatal("08006", "the connection to the shard was lost", hint=UNKNOWN)
        elif unit.is_complete:
            self.hold_back()
        return not unit.is_complete

    def on_server_lost(self, server: Server, error: Exception) -> None:
        session = self._session
        is_under_way = session.server is server
        session.lose(server)
        session.router.forget(server)
        if not is_under_way:
            if server.holds_state:
                self._end_client(server, error)
            return
        if session.unit is not None and retrying.give_up_target(session, session.unit, str(error)):
            return
        if session.copy is not None:
            session.copy.on_server_lost(error)
        if self._is_told:  # by the server itself
            session.end()
        elif session.task is None or session.status != IDLE:
            session.tell(server.farewell)
            session.fatal("08006", f"{error}", hint=UNKNOWN)

    def _end_client(self, server: Server, error: Exception) -> None:
        """What it had there (a lock, a temporary table, what it listened to) is gone: another connection lacks it."""
        session = self._session
        if not server.farewell:
            session.fatal("08006", f"{error}", hint="what the session kept in that connection is gone")
            return
        session.end(server.farewell)

    def on_server_writable(self, is_writable: bool) -> None:
        session = self._session
        session.set_reading(is_writable and not session.is_blocked and session.writable.is_set())
