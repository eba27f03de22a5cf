"""A client of the router's own console: the database `shardmove`.

Speaks enough of both protocols for psql and for the drivers' default settings. Statements are answered one after the
other, in the order in which they came. Values are text, and text is the same in both formats of the protocol.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import structlog

from router.cancel import BackendKey
from router.commands import COMMANDS, Answer, understood
from router.console import Console
from router.greeting import ClientLogin, Refusal
from shardmove import __version__
from shardmove.wire import messages
from shardmove.wire.messages import Column, Frames, ProtocolViolation

MESSAGE_BYTES_MAX: Final = 65_536
FRAMES_MAX: Final = 100
"""So many messages may wait; the client is not read meanwhile."""
TEXT_OID: Final = 25

_PARAMETERS: Final = {
    "server_version": f"14.0 (shardmove {__version__})",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "is_superuser": "off",
}
_log = structlog.get_logger("shardmove.router")


class AdminSession(asyncio.Protocol):
    """One client, from its authentication on. Takes no part in the count of clients: the console works when all else
    is full."""

    def __init__(
        self, console: Console, transport: asyncio.Transport, login: ClientLogin, leftover: bytes, key: BackendKey
    ) -> None:
        self.login = login
        self._console = console
        self._transport = transport
        self._frames = Frames(MESSAGE_BYTES_MAX)
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._status = b"I"
        self._is_skipping = False
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, tuple[str, int]] = {}
        console.sessions.add(self)
        _log.info("console opened", user=login.user)
        self._greet(key)
        if leftover:
            self.data_received(leftover)

    def close(self) -> None:
        """The router is shutting down."""
        self._transport.write(
            messages.error_response("57P01", "terminating connection due to administrator command", severity="FATAL")
        )
        self._transport.close()

    def _greet(self, key: BackendKey) -> None:
        # Nothing here runs for long: the key cancels nothing.
        parameters = {**_PARAMETERS, "session_authorization": self.login.user}
        frames = [messages.parameter_status(name, value) for name, value in parameters.items()]
        frames.append(messages.backend_key_data(key.pid, key.secret))
        self._transport.write(b"".join(frames) + messages.ready_for_query(b"I"))

    # --- what the loop calls

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        self._cut()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.clear()
        self._console.sessions.discard(self)

    # --- one message after the other

    def _cut(self) -> None:
        try:
            self._waiting.extend(self._frames)
        except ProtocolViolation as error:
            self._transport.write(messages.error_response(error.sqlstate, error.message, severity="FATAL"))
            self._transport.close()
            return
        if len(self._waiting) > FRAMES_MAX:
            self._transport.pause_reading()
        if self._waiting and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._waiting and not self._transport.is_closing():
                kind, frame = self._waiting.popleft()
                await self._answer(bytes((kind,)), frame[5:])
        finally:
            self._task = None
        if not self._transport.is_closing():
            self._transport.resume_reading()

    async def _answer(self, kind: bytes, body: bytes) -> None:
        if kind == b"X":
            self._transport.close()
        elif kind == b"S":
            self._is_skipping = False
            self._say(messages.ready_for_query(self._status))
        elif kind == b"Q":
            self._is_skipping = False
            await self._simple(body)
        elif not self._is_skipping:
            try:
                await self._extended(kind, body)
            except (Refusal, ProtocolViolation) as error:
                self._is_skipping = True
                self._say(_error(error))

    async def _simple(self, body: bytes) -> None:
        try:
            text = messages.decode_query(body).decode("utf-8", "replace")
            for statement in [each for each in text.split(";") if each.strip()] or [""]:
                answer = await self._run(statement)
                described = _described(answer.columns) if answer.columns else b""
                self._say(described + _body(answer))
        except (Refusal, ProtocolViolation) as error:
            self._say(_error(error))
        self._say(messages.ready_for_query(self._status))

    async def _extended(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"P":
                parse = messages.decode_parse(body)
                text = parse.text.decode("utf-8", "replace")
                understood(text)
                self._statements[parse.name] = text
                self._say(messages.PARSE_COMPLETE)
            case b"B":
                self._bind(messages.decode_bind(body))
            case b"D":
                self._describe(*messages.decode_describe(body))
            case b"E":
                portal, _ = messages.decode_execute(body)
                self._say(_body(await self._run(self._portal(portal)[0])))
            case b"C":
                named, name = messages.decode_close(body)
                (self._statements if named == b"S" else self._portals).pop(name, None)
                self._say(messages.CLOSE_COMPLETE)
            case b"H":
                pass  # whatever is said is sent at once
            case _:
                raise ProtocolViolation(f"the console does not know messages of the kind {kind!r}")

    def _bind(self, bind: messages.Bind) -> None:
        if bind.values:
            raise Refusal("08P01", "the console's commands take no parameters")
        text = self._statement(bind.statement)
        is_binary = bool(bind.result_formats and bind.result_formats[0])
        self._portals[bind.portal] = text, int(is_binary)
        self._say(messages.BIND_COMPLETE)

    def _describe(self, kind: bytes, name: bytes) -> None:
        text, format_code = (self._statement(name), 0) if kind == b"S" else self._portal(name)
        asked = understood(text)
        columns = () if isinstance(asked, Answer) else asked[0].columns
        parameters = messages.parameter_description(()) if kind == b"S" else b""
        self._say(parameters + (_described(columns, format_code) if columns else messages.NO_DATA))

    async def _run(self, text: str) -> Answer:
        answer = await self._console.run(text)
        if answer.status is not None:
            self._status = answer.status
        if answer.tag in COMMANDS:
            _log.info("console command", command=answer.tag, user=self.login.user)
        return answer

    def _statement(self, name: bytes) -> str:
        try:
            return self._statements[name]
        except KeyError:
            raise Refusal("26000", "there is no such prepared statement") from None

    def _portal(self, name: bytes) -> tuple[str, int]:
        try:
            return self._portals[name]
        except KeyError:
            raise Refusal("34000", "there is no such portal") from None

    def _say(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


def _described(columns: tuple[str, ...], format_code: int = 0) -> bytes:
    return messages.row_description([Column(name.encode(), 0, 0, TEXT_OID, -1, -1, format_code) for name in columns])


def _body(answer: Answer) -> bytes:
    if not answer.tag:
        return messages.EMPTY_QUERY
    rows = [messages.data_row([None if each is None else each.encode() for each in row]) for row in answer.rows]
    return b"".join(rows) + messages.command_complete(answer.tag)


def _error(error: Refusal | ProtocolViolation) -> bytes:
    return messages.error_response(error.sqlstate, error.message, hint=error.hint)
