"""The router of one process: what its sessions share.

The catalog's follower lives in a thread of its own and hands each new view over; from the instant in which the loop has
it, nothing begins by an older one, and the epoch is acknowledged. Connections to the shards are in pools, one for each
shard and user.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import structlog

from router import tls
from router.asking import ask
from router.columns import KnownColumns
from router.comparing import Comparing
from router.epochs import Epochs, MoveFact, View
from router.greeting import ClientLogin
from router.metrics import Stats
from router.mirroring import Mirroring
from router.opening import Credentials, cancel
from router.pool import Pool
from router.recovering import Outcome, Recovery
from router.server import Server, ServerError, ServerLost
from router.statements import Arguments, Planned, Plans, Tables
from router.statements.plans import TEXT_BYTES_MAX
from router.units import Need, Statement
from shardmove.config import Config
from shardmove.domain.errors import ShardmoveError
from shardmove.domain.moves import TableName
from shardmove.domain.routes import RouteTable
from shardmove.wire.messages import IDLE

if TYPE_CHECKING:
    from router.session import Session

HOUSEKEEPING_S = 5.0
MIRROR_PAUSE_S = 0.05
CLEANING_S = 5.0
"""How long a connection may take to forget its client before it is closed instead."""
PLANS_MAX = 10_000
RESOLVING_S = 5.0
"""How long a client waits for the fate of a write that is in doubt."""
RESOLVING_PAUSE_S = 0.1
Result = TypeVar("Result")
log = structlog.get_logger("shardmove.router")


@dataclass(frozen=True, slots=True)
class Known:
    """What statements are decided by: the catalog's view with what the configuration adds."""

    routes: RouteTable
    tables: Tables
    home: str
    shards: Sequence[str]
    moves: Mapping[str, MoveFact]
    epoch: int


def held_moves(view: View) -> set[str]:
    """The moves whose ranges are held just now."""
    routes = (route for each in view.routes.keyspaces.values() for route in each.routes)
    return {route.move_id for route in routes if route.held and route.move_id is not None}


class Router:
    """See the module. `start` before the first session, `stop` after the last."""

    def __init__(self, config: Config, *, process: int = 0, name: str = "router") -> None:
        self.config = config
        self.settings = config.router
        self.name = name if config.router.processes == 1 else f"{name}-{process}"
        self.stats = Stats()
        self.sessions: dict[int, Session] = {}
        self.pools: dict[tuple[str, str], Pool] = {}
        self.welcomes: dict[tuple[str, tuple[tuple[str, bytes], ...]], dict[bytes, bytes]] = {}
        self.shards: Sequence[str] = tuple(config.shards)
        self.home = config.router.home or next(iter(config.shards))
        self.is_paused = False
        self.held_bytes = 0
        self.view: View | None = None
        self.known: Known
        self.plans = Plans(Tables({}), size=PLANS_MAX)
        self.columns = KnownColumns(self)
        self.epochs = Epochs(config, name=self.name, on_view=self._on_view)
        self.mirroring = Mirroring(config, self.epochs)
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()
        self._alias_numbers = itertools.count(1)
        self._aliases: dict[tuple[bytes, tuple[int, ...]], bytes] = {}
        self._cleaning: set[asyncio.Task[Any]] = set()
        self.prepares: set[str] = set()
        self._recovery = Recovery(config)
        self._recovering = asyncio.Lock()
        self._housekeeping: asyncio.Task[None] | None = None
        self._late = False
        self.is_comparing = False
        self.comparing = Comparing(self)

    async def start(self) -> None:
        """Returns once the routes are known. Raises what `Epochs.start` raises."""
        await asyncio.to_thread(self.epochs.start)
        while self.view is None:
            await self.next_view(1.0)
        self._housekeeping = self._loop.create_task(self._keep_house())

    async def stop(self, timeout_s: float) -> None:
        """Lets transactions end for so long, then ends the clients; then everything else."""
        deadline = time.monotonic() + timeout_s
        self._end_idle()
        while self.sessions and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            self._end_idle()
        for session in list(self.sessions.values()):
            session.fatal("57P01", "terminating connection due to administrator command")
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        for pool in self.pools.values():
            pool.close()
        await asyncio.to_thread(self._stop_threads)

    def _stop_threads(self) -> None:
        self._recovery.close()
        self.mirroring.stop()
        self.epochs.stop()

    def _end_idle(self) -> None:
        for session in list(self.sessions.values()):
            if session.state == "idle":
                session.fatal("57P01", "terminating connection due to administrator command")

    def adopt(self, config: Config) -> None:
        """Other settings, as far as they can change while clients are here."""
        self.config = config
        self.settings = config.router
        self.welcomes.clear()

    def pause(self) -> None:
        """Nothing begins from now on; what is under way goes on."""
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._announce()

    # --- sessions

    def add_session(self, session: Session) -> None:
        self.stats.clients += 1
        self.sessions[session.pid] = session

    def remove_session(self, session: Session) -> None:
        self.sessions.pop(session.pid, None)

    # --- routes

    def _on_view(self, view: View) -> None:
        self._loop.call_soon_threadsafe(self._adopt_view, view)

    def _adopt_view(self, view: View) -> None:
        """From here on, every decision is by this view; those that wait are made anew."""
        before = self.view
        if before is None or view.keyspaces != before.keyspaces:
            tables = Tables(view.keyspaces, self.columns.by_table)
            self.plans.begin_anew(tables)
        else:
            tables = self.known.tables
        self.view = view
        self.known = Known(view.routes, tables, self.home, self.shards, view.moves, view.epoch)
        self._late = any(self._is_acknowledged_late(move) for move in view.moves.values())
        self.is_comparing = any(move.phase == 3 and move.sample_rate > 0 for move in view.moves.values())
        self.epochs.acknowledge(view.epoch)
        self._announce()
        for move_id in held_moves(view) - (held_moves(before) if before is not None else set()):
            self.mirroring.ensure_open(move_id)  # connects now, so that it need not when statements wait for it

    def _announce(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for each in waiters:
            if not each.done():
                each.set_result(None)

    async def next_view(self, timeout_s: float) -> None:
        """Returns when there is a new view, or after the timeout."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)

    def is_fresh(self) -> bool:
        """Whether the view is confirmed that decisions are made by, and not a newer one that waits for the loop."""
        return self.epochs.is_fresh(time.monotonic()) and self.epochs.view is self.view

    def is_stale(self) -> bool:
        """Whether the view is too old for any range: one that it knows of no move of may be elsewhere by now."""
        is_newest = self.epochs.view is self.view  # else what is confirmed is not what decisions are made by
        return not is_newest or self.epochs.unconfirmed_s(time.monotonic()) > self.settings.stale_s

    def plan(self, text: bytes) -> Planned:
        return self.plans.of(text)

    def plan_anew(self) -> None:
        """Other columns are known."""
        tables = Tables(self.known.tables.keyspaces, self.columns.by_table)
        self.known = replace(self.known, tables=tables)
        self.plans.begin_anew(tables)

    def owner_of(self, table: TableName) -> str:
        """A shard that has the table."""
        for name, keyspace in self.known.tables.keyspaces.items():
            if table in keyspace.tables:
                return self.known.routes[name].routes[0].shard
        return self.home

    def decide(self, planned: Planned, arguments: Arguments | None, session: Session) -> Need:
        self.stats.statements += 1
        return ask(self.known, planned, arguments, session)

    def statement(self, name: bytes, text: bytes, oids: tuple[int, ...]) -> Statement:
        planned = self.plan(text)
        text = planned.text
        identity = (text, oids)
        alias = self._aliases.get(identity)
        if alias is None:
            if len(self._aliases) > PLANS_MAX:
                self._aliases.clear()  # the numbers go on: an old name never means another text
            alias = b"shardmove_%d" % next(self._alias_numbers)
            if len(text) <= TEXT_BYTES_MAX:
                self._aliases[identity] = alias
        return Statement(name, text, oids, planned, alias if name else b"")

    def tally(self) -> Stats:
        """The counters, with those that are counted elsewhere."""
        self.stats.plan_hits = self.plans.hits + self.plans.shape_hits
        self.stats.plan_misses = self.plans.misses
        self.stats.parsed = self.stats.plan_hits + self.stats.plan_misses
        return self.stats

    # --- moves

    def moves_from(self, shard: str | None) -> set[str]:
        """The moves whose ranges the shard owns: of what is written there unseen any may be in one."""
        known = self.known
        if not known.moves:
            return set()
        routes = (route for each in known.routes.keyspaces.values() for route in each.routes if route.shard == shard)
        return {route.move_id for route in routes if route.move_id is not None}

    def wake(self, moves: Iterable[str]) -> None:
        """Something was committed in these moves' ranges: the mirror carries it at once."""
        for move_id in moves:
            self.stats.mirrored += 1
            self.mirroring.wake(move_id)

    def _is_acknowledged_late(self, move: MoveFact) -> bool:
        return move.mirrored_until > time.monotonic()

    def acknowledges_late(self, moves: Iterable[str]) -> bool:
        """A commit in one of these moves' ranges is told to the client only once the other side has it (phase 4)."""
        if not self._late:
            return False
        return any(
            (move := self.known.moves.get(move_id)) is not None and self._is_acknowledged_late(move)
            for move_id in moves
        )

    async def mirrored(self, moves: Iterable[str]) -> None:
        """Returns once what was committed in the moves' ranges is on the other side, or nobody reads there any more.

        Where the other side takes longer than the bound, the range goes back to phase 3. Another router may not have
        heard of that yet, and send reads there still: so it goes on until the routers have, or the time has passed in
        which one that heard of nothing stops by itself (I9). That time has passed here, too, where the catalog has been
        away for so long: then a client is not made to wait for what may never come. (A router that does reach the
        catalog while this one reaches neither catalog nor target may read there without this commit.)
        """
        for move_id in moves:
            while (move := self.known.moves.get(move_id)) is not None and self._is_acknowledged_late(move):
                try:
                    async with asyncio.timeout(self.settings.target_patience_s):
                        await asyncio.wrap_future(self.mirroring.pass_after(move_id))
                    break
                except (ShardmoveError, TimeoutError) as error:
                    await self._fall_back(move, str(error) or "the target took too long")
                    if self.epochs.unconfirmed_s(time.monotonic()) > 1.25 * self.settings.confirm_s:
                        log.warning("a commit was acknowledged before the other side had it", move=move_id)
                        break
                    await self.next_view(MIRROR_PAUSE_S)

    def give_up_target(self, need: Need, reason: str) -> None:
        """A read at a move's target failed, or took too long: the range goes back to phase 3."""
        for route in need.routes:
            move = self.known.moves.get(route.move_id or "")
            if move is not None and move.phase == 4:
                self.in_background(self._fall_back(move, reason))

    async def _fall_back(self, move: MoveFact, reason: str) -> None:
        try:
            async with asyncio.timeout(self.settings.target_patience_s):
                await asyncio.wrap_future(self.epochs.fall_back(move.id, move.phase_number, reason))
        except (ShardmoveError, TimeoutError) as error:
            log.warning("a move could not be put back to phase 3", move=move.id, error=str(error))

    # --- connections

    def pool(self, shard: str, login: ClientLogin) -> Pool:
        user = self.settings.server_user or login.user
        pool = self.pools.get((shard, user))
        if pool is None:
            dsn = self.config.shard_dsn(shard)
            pool = self.pools[shard, user] = Pool(
                shard,
                user,
                lambda: tls.resolve(dsn, user),
                servers_max=self.settings.servers_max,
                queue_timeout_s=self.settings.queue_timeout_s,
                connect_timeout_s=self.settings.connect_timeout_s,
            )
        if login.client_key is not None and not self.settings.server_user:
            pool.credentials = Credentials(login.client_key, login.server_key)
        return pool

    def forget(self, server: Server) -> None:
        """A connection that is gone."""
        pool = self.pools.get((server.shard, server.user))
        if pool is not None:
            pool.discard(server)

    def take_back(self, server: Server, *, is_shared: bool) -> None:
        """A client has done with a connection. One that it kept, or left something in, forgets all of that first."""
        server.holder = None
        server.set_reading(True)
        is_shared = is_shared and not server.holds_state
        if server.cancels:  # a cancel that is on its way must not hit whoever comes next
            server.when_cancelled = lambda: self.take_back(server, is_shared=is_shared)
            return
        pool = self.pools.get((server.shard, server.user))
        if pool is None or not server.replies.is_ended or server.is_closed or server.is_spoilt:
            self.forget(server)
        elif is_shared and server.is_clean:
            pool.give_back(server)
        else:
            self.in_background(self._clean(pool, server, is_shared=is_shared))

    async def _clean(self, pool: Pool, server: Server, *, is_shared: bool) -> None:
        try:
            async with asyncio.timeout(CLEANING_S):
                if server.status != IDLE:
                    await server.run(b"ROLLBACK")
                if not is_shared:
                    server.applied.clear()
                    server.statements.clear()
                    await server.run(b"DISCARD ALL")
                    server.holds_state = False
        except (ServerError, ServerLost, TimeoutError):
            pool.discard(server)
            return
        pool.give_back(server)

    def in_background(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Work that goes on whether a client waits for it or not."""
        task = self._loop.create_task(work)
        self._cleaning.add(task)
        task.add_done_callback(self._forget_work)
        return task

    def _forget_work(self, task: asyncio.Task[Any]) -> None:
        self._cleaning.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it has it; where nobody did it is nobody's

    # --- writes on several shards

    async def resolve(self, gid: str) -> Outcome:
        """How a write whose commit is in doubt has ended, or ends now."""
        outcome = Outcome.BUSY
        deadline = time.monotonic() + RESOLVING_S
        while outcome is Outcome.BUSY and time.monotonic() < deadline:
            try:
                async with self._recovering:
                    outcome = await asyncio.to_thread(self._recovery.end, gid)
            except (ShardmoveError, psycopg.Error):
                outcome = Outcome.BUSY
            if outcome is Outcome.BUSY:
                await asyncio.sleep(RESOLVING_PAUSE_S)
        return outcome

    def recover_soon(self) -> None:
        self.in_background(self._recover())

    async def _recover(self) -> None:
        """Ends what somebody left half done; only where there are tables that are written so."""
        is_needed = any(keyspace.reference_tables for keyspace in self.known.tables.keyspaces.values())
        if is_needed and not self._recovering.locked():  # the next one is soon enough
            async with self._recovering:
                await asyncio.to_thread(self._recovery.run)

    def client_number(self, shard: str, pid: int) -> int | None:
        """The number of the client whose connection to the shard has that process number there."""
        for pool in self.pools.values():
            for server in pool.servers if pool.shard == shard else ():
                if server.pid == pid and server.holder is not None:
                    return server.holder.pid
        return None

    def cancel_at(self, server: Server) -> Awaitable[None]:
        """Asks the shard to cancel what the connection runs."""
        server.cancels += 1  # at once: from now on nobody else gets the connection
        return asyncio.shield(self.in_background(self._cancel(server)))

    async def _cancel(self, server: Server) -> None:
        is_over = False
        try:
            is_over = await cancel(server.host, server.pid, server.secret, timeout_s=self.settings.connect_timeout_s)
        finally:
            server.is_spoilt = server.is_spoilt or not is_over
            server.cancels -= 1
            if not server.cancels and (then := server.when_cancelled) is not None:
                server.when_cancelled = None
                then()

    async def _keep_house(self) -> None:
        while True:
            self.recover_soon()
            await asyncio.sleep(HOUSEKEEPING_S)
            self.columns.refresh()
            for pool in self.pools.values():
                pool.close_older(self.settings.idle_server_s)
