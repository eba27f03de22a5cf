"""A unit that several shards answer: its messages taken apart, its connections, and the client's replies in order.

Every shard gets the same messages of our own making, about an unnamed statement and portal. They are hidden: what the
client is told is put together from one shard's replies, message for message as it asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from router import placing
from router.opening import NoServer
from router.server import Server
from router.units import Item, Refusal, Statement, Unit
from shardmove.wire import messages
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.session import Session

_ENDS: Final = frozenset({Owed.EXECUTE, Owed.QUERY})
_HINT: Final = "send a statement for several shards alone: one Bind and one Execute without a row limit, then Sync"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the client asked of the shards.

    Attributes:
        bind: what follows the two names in its Bind.
        describes_statement: it wants to know the parameters, too.
    """

    items: tuple[Item, ...]
    text: bytes
    oids: tuple[int, ...] = ()
    bind: bytes = b"\0\0\0\0\0\0"
    describes_statement: bool = False

    @property
    def is_simple(self) -> bool:
        return self.items[0].owed is Owed.QUERY

    def opening(self, text: bytes) -> tuple[bytes, list[Owed]]:
        """The messages up to the portal's description."""
        parts = [messages.parse(b"", text, self.oids)]
        owed = [Owed.PARSE]
        if self.describes_statement:
            parts.append(messages.describe(b"S", b""))
            owed.append(Owed.DESCRIBE_STATEMENT)
        parts += [messages.message(b"B", b"\0\0" + self.bind), messages.describe(b"P", b"")]
        owed += [Owed.BIND, Owed.DESCRIBE_PORTAL]
        return b"".join(parts), owed

    def before_rows(self, session: Session, statement: bytes, portal: bytes) -> bytes:
        """The client's replies up to its Execute. `statement`, `portal`: the replies to what describes them."""
        replies = []
        for item in self.items:
            if item.owed in _ENDS:
                break
            replies.append(self._reply(session, item, statement, portal))
        if self.is_simple:
            replies.append(portal)
        return b"".join(replies)

    def behind_rows(self, session: Session) -> bytes:
        owed = [item.owed for item in self.items]
        end = next(at for at, each in enumerate(owed) if each in _ENDS)
        return b"".join(self._reply(session, item, b"", b"") for item in self.items[end + 1 :])

    @staticmethod
    def _reply(session: Session, item: Item, statement: bytes, portal: bytes) -> bytes:
        match item.owed:
            case Owed.PARSE:
                session.on_parsed()
                return messages.PARSE_COMPLETE
            case Owed.BIND:
                return messages.BIND_COMPLETE
            case Owed.DESCRIBE_STATEMENT:
                return statement
            case Owed.DESCRIBE_PORTAL:
                return portal
            case Owed.CLOSE:
                session.on_parsed()
                return messages.CLOSE_COMPLETE
            case _:
                return b""


def rest(unit: Unit) -> bytes | None:
    """The replies to what comes behind a Flush that was answered; None where this is no such rest."""
    owed = [item.owed for item in unit.waiting]
    if not unit.is_answered or any(each not in (Owed.CLOSE, Owed.SYNC, None) for each in owed):
        return None
    return messages.CLOSE_COMPLETE * owed.count(Owed.CLOSE)


def asked(unit: Unit) -> Asked:
    """What waits in the unit. Raises placing.Refused."""
    items = tuple(unit.waiting)
    assert unit.ask is not None
    if unit.is_simple:
        return Asked(items, unit.ask[0].text)
    owed = [item.owed for item in items]
    if owed.count(Owed.BIND) != 1 or owed.count(Owed.EXECUTE) != 1 or unit.is_answered:
        raise placing.Refused(
            Refusal("0A000", "the statement is for several shards, and is not the only one before its Sync", _HINT)
        )
    bound = items[owed.index(Owed.BIND)]
    assert bound.statement is not None
    if any(_is_about_another(item, bound.statement) for item in items[: owed.index(Owed.EXECUTE)]):
        raise placing.Refused(Refusal("0A000", "several statements are prepared before one Sync", _HINT))
    _, rows_max = messages.decode_execute(items[owed.index(Owed.EXECUTE)].frame[5:])
    if rows_max:
        raise placing.Refused(
            Refusal("0A000", "a statement for several shards cannot be read in portions (Execute with a limit)", _HINT)
        )
    return Asked(
        items, bound.statement.text, bound.statement.oids, _behind_names(bound.frame), Owed.DESCRIBE_STATEMENT in owed
    )


def _is_about_another(item: Item, statement: Statement) -> bool:
    return item.owed in (Owed.PARSE, Owed.DESCRIBE_STATEMENT) and item.statement is not statement


def _behind_names(bind: bytes) -> bytes:
    portal_end = bind.index(0, 5)
    return bind[bind.index(0, portal_end + 1) + 1 :]


# --- connections


@dataclass(frozen=True, slots=True)
class Lent:
    """A connection that is this unit's alone for a while. `is_kept`: the client keeps it afterwards."""

    server: Server
    is_kept: bool


async def take(session: Session, shard: str) -> Lent:
    """A connection with the client's settings. Raises NoServer, ServerError, ServerLost; nothing is lent then."""
    server = session.servers.pop(shard, None)
    is_kept = server is not None or session.keeps_servers
    if server is None:
        server = await session.router.pool(shard, session.login).acquire()
    server.holder = session.replies
    server.set_reading(True)
    try:
        await placing.prepare(session, server)
    except placing.Spoilt as error:
        session.router.forget(server)
        raise NoServer(f"a connection to shard {shard} cannot be brought back to its own settings") from error
    except BaseException:
        session.router.take_back(server, is_shared=not is_kept)
        raise
    server.statements.pop(b"", None)
    return Lent(server, is_kept)


def give_back(session: Session, lent: Lent) -> None:
    """The connection is in a known state, or else it is closed."""
    server = lent.server
    if lent.is_kept and not session.is_closing and server.is_clean:
        session.servers[server.shard] = server
        server.set_reading(session.writable.is_set())
    else:
        session.router.take_back(server, is_shared=not lent.is_kept)
