"""Giving a client's unit a connection to the shard it needs, in a state that the client would recognise.

Waiting happens here: while a range is held (DESIGN §4.7), while the routes are older than they may be (I9), while the
router is paused, in the line of a pool. Routes may change meanwhile, so a unit is asked anew where it goes after each
wait, and it begins only if nothing changed since: who acknowledged an epoch begins nothing by an older one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from router.opening import NoServer
from router.server import Server, ServerError, ServerLost
from router.statements.lexer import as_literal
from router.units import ANYWHERE, Kind, Need, Refusal, Unit
from router.variables import IDENTITY
from shardmove.domain.errors import ShardmoveError
from shardmove.wire import messages
from shardmove.wire.messages import IDLE, IN_TRANSACTION
from shardmove.wire.streams import Owed

if TYPE_CHECKING:
    from router.pool import Pool
    from router.session import Session

RETRY_PAUSES_S = (0.001, 0.002, 0.004, 0.008, 0.016)
HELD_POLL_S = 0.05
UNSAFE_ENCODINGS = frozenset(
    {"SJIS", "MSKANJI", "SHIFTJIS", "WIN932", "WINDOWS932", "BIG5", "WIN950", "WINDOWS950", "GBK", "WIN936"}
    | {"WINDOWS936", "UHC", "WIN949", "WINDOWS949", "GB18030", "JOHAB", "SHIFT_JIS_2004", "SHIFT_JIS"}
)
"""In these a byte of a longer character may look like a quote or a backslash."""
OPEN_PATIENCE_S = 1.0
SPOILT_MAX = 5
WELCOMES_MAX = 1_000


class Refused(Exception):
    """The unit cannot be placed. Nothing of it was sent."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Spoilt(Exception):
    """What another client set on the connection cannot be undone by this one: nobody can have it any more."""


class Over(Exception):
    """The unit failed where it was, and the client knows: what is left of it is dropped, up to its Sync."""


class Failed(Exception):
    """As Refused, by an error of a server's."""

    def __init__(self, frame: bytes) -> None:
        super().__init__("a server refused")
        self.frame = frame


def must_wait(session: Session, need: Need) -> bool:
    """Whether it may not begin now: its range is held, or the routes are too old to send anything to a moving range.

    After a longer while they are too old for any range, also one that they know of no move of: it may have moved, and
    its old rows may be erased (`[router] stale_after_s`).

    What has begun goes on: a transaction that wrote is waited for by whoever closes the range, not the other way round.
    """
    router = session.router
    if session.firm and session.server is not None:
        return False
    if router.is_paused and session.server is None:
        return True
    is_moving = False
    for route in need.routes:
        if route.held and (need.is_write or session.status == IN_TRANSACTION):
            return True
        is_moving = is_moving or route.move_id is not None
    if is_moving:
        return not router.is_fresh()
    return bool(need.routes) and router.is_stale()


def at_once(session: Session, unit: Unit, need: Need) -> Server | None:
    """A connection that is there and ready for this client, attached; None where something has to be waited for."""
    if (need.routes or session.router.is_paused) and must_wait(session, need):
        return None
    replay = session.replay
    if replay and (len(replay) > 1 or replay[0] != b"BEGIN"):
        return None
    shard = need.shard or default_shard(session)
    server = session.servers.get(shard)
    if server is None:
        pool = session.router.pool(shard, session.login)
        server = pool.take()
        if server is None:
            return None
        if server.applied != session.variables.wanted:
            pool.give_back(server)
            return None
    elif server.applied != session.variables.wanted or server.is_closed:
        return None
    session.attach(server)
    if replay:  # a plain BEGIN cannot fail where the statement behind it could succeed: no need to wait for it
        server.run(replay[0])
    return server


def default_shard(session: Session) -> str:
    """Where a statement goes that any shard could answer."""
    last = session.last_shard
    return last if last is not None and last in session.router.shards else session.router.home


async def attach(session: Session, unit: Unit) -> None:
    """Makes `session.server` the connection that the unit needs. Raises Refused, NoServer, ServerError, ServerLost.

    A read that the target of a move has no connection for goes to the source.
    """
    began = time.monotonic()
    while True:
        router = session.router
        if session.server is not None and unit.failed:
            unit.need = ANYWHERE  # it stays, and is dropped
            return
        need = unit.need = session.asked_again(unit)
        if need.refusal is not None:
            raise Refused(need.refusal)
        if must_wait(session, need):
            await wait(session, unit, need, began)
            continue
        server = session.server
        if server is not None and need.shard not in (None, server.shard):
            if session.firm or unit.is_bound:
                raise Refused(wrong_shard(server.shard, need))
            await leave(session, unit)
            continue
        if server is None:
            view = router.view
            try:
                async with asyncio.timeout(session.limits.target_patience_s if need.is_at_target else None):
                    await _take(session, need)
            except (NoServer, ServerLost, TimeoutError) as error:
                if not need.is_at_target:
                    raise
                router.give_up_target(need, str(error) or "no connection in time")
                unit.stays_at_source = True
                drop(session)
                continue
            if router.is_paused or must_wait(session, need):  # the line was long: others may have use for it
                await leave(session, unit)
                continue
            if router.view is not view:
                continue
        return


def drop(session: Session) -> None:
    """Closes the connection, if there is one: it is slow, or in no known state."""
    server = session.server
    if server is not None:
        session.lose(server)
        server.holder = None
        server.abort()
        session.router.forget(server)


async def _take(session: Session, need: Need) -> None:
    """Attaches a connection to the shard, or to any one, and says what the client has said before."""
    router = session.router
    shards = [need.shard] if need.shard is not None else [default_shard(session), *router.shards]
    for number, shard in enumerate(dict.fromkeys(shards), start=1):
        try:
            await _take_at(session, shard)
        except NoServer:
            if number == len(set(shards)):
                raise
            continue
        return


async def _take_at(session: Session, shard: str) -> None:
    router = session.router
    for _ in range(SPOILT_MAX):
        server = session.servers.get(shard)
        if server is not None and server.is_closed:  # its end has not come yet, only its last words
            session.lose(server)
            router.forget(server)
            _tell_lost(session, server.holds_state)
            server = None
        if server is None:
            began = time.monotonic()
            server = await router.pool(shard, session.login).acquire()
            router.stats.wait_seconds.observe(time.monotonic() - began)
        session.attach(server)
        held_state = server.holds_state
        try:
            await prepare(session, server)
        except Spoilt:
            session.lose(server)
            router.forget(server)
            _tell_lost(session, held_state)
            continue
        except ServerError:
            session.lose(server)
            router.take_back(server, is_shared=not session.keeps_servers)
            _tell_lost(session, held_state)
            raise
        except asyncio.CancelledError:
            if session.server is server:  # else the client has left, and the connection may be another's by now
                session.lose(server)  # what it was told last is on its way: its state is not known
                router.forget(server)
                _tell_lost(session, held_state)
            raise
        return
    raise NoServer(f"the connections to shard {shard} cannot be brought back to their own settings")


def _tell_lost(session: Session, held_state: bool) -> None:
    """A lock, a temporary table, what it listened to: the client would go on without, and not know."""
    if held_state:
        session.fatal("08006", "a connection was lost", hint="what the session kept in that connection is gone")


async def prepare(session: Session, server: Server) -> None:
    """The session's settings, then the transaction as far as it has come. Raises Spoilt, ServerError, ServerLost."""
    wanted = dict(session.variables.wanted)
    undone, done = _steps(server.applied, wanted)
    held_state, server.holds_state = server.holds_state, True  # until it is booked: the client may leave at any moment
    steps = [server.run(b";".join(each)) for each in (undone, done) if each]  # one way, not two
    results = await asyncio.gather(*steps, return_exceptions=True)
    if undone:
        if isinstance(results[0], ServerError):
            raise Spoilt from results[0]
        kept = {name: text for name, text in server.applied.items() if name in wanted and name not in IDENTITY}
        server.applied = kept
    for result in results:
        if isinstance(result, BaseException):
            raise result
    server.applied, server.holds_state = wanted, held_state
    for each in session.replay:
        await server.run(each)


async def borrow(pool: Pool, settings: Mapping[str, bytes]) -> Server:
    """A connection for the router's own use, with these settings. Raises NoServer, ServerError, ServerLost."""
    server = await pool.acquire()
    try:
        undone, done = _steps(server.applied, settings)
        if undone or done:
            await server.run(b";".join(undone + done))
            server.applied = dict(settings)
    except BaseException:
        pool.discard(server)
        raise
    return server


def _steps(applied: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """What is undone, and what is set then. Who the session is comes first: another role may not change the rest."""
    if applied == wanted:
        return [], []
    names = [name for name in IDENTITY if name in applied]
    names += [name for name in applied if name not in wanted and name not in IDENTITY]
    undone = [b"RESET " + _identifier(name) for name in names]
    done = [text for name, text in wanted.items() if name in IDENTITY or applied.get(name) != text]
    return undone, done


async def leave(session: Session, unit: Unit) -> None:
    """The transaction has had no effect where it is: it ends there, to begin again elsewhere. Raises Over."""
    server = session.server
    assert server is not None
    if session.firm:  # never: what it wrote would be gone, and nobody would be told
        raise Refused(Refusal("XX000", "the router would have lost a part of the transaction"))
    if unit.is_begun:  # messages about statements were answered; the implicit transaction ends, unseen by the client
        try:
            await server.exchange(messages.SYNC, [Owed.SYNC])
        except ServerError as error:  # of a message that was put into the unit, for the client's own
            session.tell(error.frame)
            unit.failed = True
        if unit.failed:
            raise Over
        unit.is_begun = False
        unit.sent, unit.sent_bytes = None if unit.is_once else [], 0
    await _roll_back(session, server)
    session.detach()


async def move_on(session: Session, unit: Unit) -> None:
    """A fence refused the unit: waits until the routes are newer, or the owner is open, for a little while."""
    router = session.router
    need = unit.need
    await _leave_after_refusal(session)
    if time.monotonic() - unit.began > router.settings.hold_timeout_s:
        raise Refused(_held_too_long(session, need))
    pause_s = RETRY_PAUSES_S[min(unit.retries, len(RETRY_PAUSES_S) - 1)]
    unit.retries += 1
    session.is_held = True
    router.stats.held_total += unit.retries == 1
    moves = {route.move_id for route in need.routes if route.move_id is not None}
    await _ensure_open(session, moves)
    await router.next_view(pause_s)
    session.is_held = False


async def _leave_after_refusal(session: Session) -> None:
    server = session.server
    assert server is not None
    await _roll_back(session, server)
    session.firm = False
    session.detach()


async def _roll_back(session: Session, server: Server) -> None:
    if server.status == IDLE:
        return
    try:
        await server.run(b"ROLLBACK")
    except asyncio.CancelledError:
        if (
            session.server is server
        ):  # whether it is done is not known, and the client's transaction is to fail, not to end
            session.lose(server)
            session.router.forget(server)
        raise


async def wait(session: Session, unit: Unit, need: Need, began: float) -> None:
    """Until there are newer routes, or a while has passed. Raises Refused where that is too long, or too many wait."""
    router = session.router
    settings = router.settings
    left_s = began + settings.hold_timeout_s - time.monotonic()
    if left_s <= 0:
        raise Refused(_held_too_long(session, need))
    held_bytes = sum(len(item.frame) for item in unit.waiting)
    router.stats.held_total += not unit.was_held
    if not unit.was_held or router.held_bytes:
        unit.was_held = True
        if (
            router.stats.held_now >= settings.hold_clients_max
            or router.held_bytes + held_bytes > settings.hold_bytes_max
        ):
            raise Refused(
                Refusal(
                    "40001",
                    "shardmove: too many statements wait for a cutover",
                    "try again; [router] hold_clients_max and hold_bytes_max bound them",
                )
            )
    session.is_held = True
    router.stats.held_now += 1
    router.held_bytes += held_bytes
    started = time.monotonic()
    try:
        await router.next_view(min(left_s, HELD_POLL_S))
        owners = {route.move_id for route in need.routes if route.held and route.move_id is not None}
        if owners and not any(route.held for route in session.asked_again(unit).routes):
            await _ensure_open(session, owners)
    finally:
        router.stats.hold_seconds.observe(time.monotonic() - started)
        router.stats.held_now -= 1
        router.held_bytes -= held_bytes
        session.is_held = False


async def _ensure_open(session: Session, moves: set[str]) -> None:
    """The new owner's fence was seen, or made, open. Where that cannot be told the fence itself will say."""
    for move_id in moves:
        try:
            async with asyncio.timeout(OPEN_PATIENCE_S):
                await asyncio.wrap_future(session.router.mirroring.ensure_open(move_id))
        except (ShardmoveError, TimeoutError):
            continue


def wrong_shard(shard: str, need: Need) -> Refusal:
    return Refusal(
        "0A000",
        f"the transaction is on shard {shard}, and this statement's rows are on {need.shard}",
        "a transaction belongs to the shard of its first statement with a key: use one transaction for each",
    )


def _held_too_long(session: Session, need: Need) -> Refusal:
    bound_s = session.limits.hold_timeout_s
    moves = ", ".join(sorted({route.move_id for route in need.routes if route.move_id is not None}))
    why = f"move {moves} has its keys held" if moves else "the router is paused"
    if need.routes and not need.is_held and not session.router.is_fresh():
        why = "the catalog is away, and has not confirmed the routes,"
    return Refusal(
        "40001",
        f"shardmove: {why} for longer than {bound_s:g} s",
        "try again; `shardmove diagnose` says what is stuck. [router] hold_timeout_s bounds the wait",
    )


# --- beginnings


def initial_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """What a startup packet sets, by name. Later ones win, `options` first, as PostgreSQL does it."""
    named = dict(_options(parameters.get("options", "")))
    for name, value in parameters.items():
        if name not in ("options", "replication") and not name.startswith("_pq_."):
            named[name.lower()] = value
    for name, value in named.items():
        if (refusal := unsafe(name, value)) is not None:
            raise Refused(refusal)
    return named


def _options(text: str) -> list[tuple[str, str]]:
    """`-c name=value` and `--name=value`; a backslash takes the next character as it is."""
    words, word, escaped = [], "", False
    for character in text:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif character.isspace():
            words.append(word)
            word = ""
        else:
            word += character
    words = [each for each in [*words, word] if each]
    found = []
    while words:
        first = words.pop(0)
        if first == "-c" and words:
            first = "--" + words.pop(0)
        elif first.startswith("-c"):
            first = "--" + first[2:]
        name, equals, value = first.removeprefix("--").partition("=")
        if not first.startswith("--") or not equals:
            raise Refused(Refusal("22023", f"the router does not know the option {first!r}", "use -c name=value"))
        found.append((name.replace("-", "_").lower(), value))
    return found


def unsafe(name: str, value: str) -> Refusal | None:
    """Settings under which the router would read a statement otherwise than the server does."""
    if name.lower() == "standard_conforming_strings" and value.lower() not in ("on", "true", "yes", "1"):
        return Refusal("0A000", "the router reads statements with standard_conforming_strings on")
    if name.lower() == "client_encoding" and value.upper().replace("-", "_") in UNSAFE_ENCODINGS:
        return Refusal("0A000", f"the router does not read statements in {value}", "use client_encoding UTF8")
    return None


def set_config(name: str, value: str, *, is_local: bool = False) -> bytes:
    """A setting as a statement, whatever its value is."""
    local = "true" if is_local else "false"
    return f"SELECT pg_catalog.set_config({as_literal(name)}, {as_literal(value)}, {local})".encode()


def _identifier(name: str) -> bytes:
    return b".".join(b'"' + part.replace('"', '""').encode() + b'"' for part in name.split("."))


async def welcome(session: Session) -> dict[bytes, bytes]:
    """What the client is told of the server's settings when it begins: asked once for each kind of client."""
    router = session.router
    kind = (session.user, tuple(session.variables.wanted.items()))
    known = router.welcomes.get(kind)
    if known is None:
        await _take(session, Need(Kind.FREE))
        server = session.server
        assert server is not None
        if len(router.welcomes) >= WELCOMES_MAX:
            router.welcomes.clear()
        known = router.welcomes[kind] = dict(server.parameters)
        session.detach()
    return dict(known)
