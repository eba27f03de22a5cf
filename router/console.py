"""What the router's own console can be asked, and what it answers: tables of text.

A command is carried out in the process that the client happened to reach, in every process, or in the one that a
client's number belongs to; a table from several processes says in its first column which one a row is from.
Passwords and verifiers appear nowhere; neither do values of rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from router.cancel import cancel, process_of
from router.commands import COMMANDS, Answer, Rows, Scope, understood
from router.greeting import Refusal
from router.metrics import Stats
from router.peers import Peers, Words
from shardmove import __version__
from shardmove.catalog.store import Catalog
from shardmove.config import RouterSettings
from shardmove.domain.errors import ShardmoveError

if TYPE_CHECKING:
    from router.admin import AdminSession
    from router.service import Router
    from router.session import Session

FIXED: Final = frozenset({"listen", "processes", "metrics", "home", "pooling", "server_user", "confirm_s"}) | frozenset(
    {"servers_max", "queue_timeout_s", "connect_timeout_s"}  # each pool has its own
)
"""Settings that are read once, when the router starts; RELOAD leaves them as they are."""


def reloaded(old: RouterSettings, new: RouterSettings) -> RouterSettings:
    """The new ones, as far as they can be changed while the router runs."""
    return replace(new, **{name: getattr(old, name) for name in FIXED})


class Console:
    """The commands of one process, and how it asks the others.

    Args:
        reload: adopts what the configuration says now. Raises ShardmoveError, and leaves all as it was.
    """

    def __init__(self, router: Router, peers: Peers, reload: Callable[[], Awaitable[None]]) -> None:
        self.router = router
        self.peers = peers
        self.sessions: set[AdminSession] = set()
        self._reload = reload
        self._tables: Mapping[str, Callable[[], Rows]] = {
            "SHOW ROUTES": self._routes,
            "SHOW MOVES": self._moves,
            "SHOW POOLS": self._pools,
            "SHOW CLIENTS": self._clients,
            "SHOW SERVERS": self._servers,
            "SHOW STATS": self._stats,
            "SHOW HOLDS": self._holds,
            "SHOW CONFIG": self._config,
            "SHOW VERSION": lambda: [[f"shardmove {__version__}"]],
            "SHOW HELP": lambda: [[each.words, each.meaning] for each in COMMANDS.values()],
        }

    async def run(self, text: str) -> Answer:
        """Carries a statement out, wherever it has to be. Raises Refusal."""
        asked = understood(text)
        if isinstance(asked, Answer):
            return asked
        command, number = asked
        match command.scope:
            case Scope.HERE:
                rows = await self.here(command.words, number)
            case Scope.ALL:
                rows = await self.here(command.words, number) + await self._elsewhere(command.words, number)
            case Scope.OWNER:
                rows = await self._at_owner(command.words, number)
        return Answer(command.columns, rows, "SHOW" if command.columns else command.words)

    async def answer(self, question: Words) -> Words:
        """What another process asks for. A refusal is an answer, too."""
        try:
            return {"rows": await self.here(question["run"], question["number"])}
        except Refusal as error:
            return {"refused": [error.sqlstate, error.message, error.hint]}

    async def here(self, words: str, number: int) -> Rows:
        """Carries a command out in this process."""
        if words in self._tables:
            return self._tables[words]()
        match words:
            case "SHOW DIFFERENCES":
                return await self._differences()
            case "RELOAD":
                await self._reload_or_refuse()
            case "PAUSE":
                self.router.pause()
            case "RESUME":
                self.router.resume()
            case "KILL":
                self._session(number).fatal("57P01", "terminating connection due to administrator command")
            case _:
                await cancel(self._session(number))
        return []

    async def _elsewhere(self, words: str, number: int) -> Rows:
        rows: Rows = []
        for process, answer in (await self.peers.ask_others({"run": words, "number": number})).items():
            if answer is not None:
                rows += _rows_of(answer)
            elif not COMMANDS[words].columns:
                raise _silent(process)
        return rows

    async def _at_owner(self, words: str, number: int) -> Rows:
        owner = process_of(number)
        if owner not in self.peers.others:
            return await self.here(words, number)
        answer = await self.peers.ask(owner, {"run": words, "number": number})
        if answer is None:
            raise _silent(owner)
        return _rows_of(answer)

    # --- commands

    async def _reload_or_refuse(self) -> None:
        try:
            await self._reload()
        except ShardmoveError as error:
            raise Refusal("F0000", f"nothing was changed: {error.message}", hint=error.hint) from None

    def _session(self, pid: int) -> Session:
        session = self.router.sessions.get(pid)
        if session is None:
            raise Refusal("22023", f"there is no client with the pid {pid}", hint="SHOW CLIENTS lists them.")
        return session

    # --- tables

    def _routes(self) -> Rows:
        view = self.router.view
        if view is None:
            return []
        return [
            [name, str(route.range), route.shard, _yes(route.held), route.move_id]
            for name, routes in view.routes.keyspaces.items()
            for route in routes.routes
        ]

    def _moves(self) -> Rows:
        view = self.router.view
        moves = [] if view is None else view.moves.values()
        return [
            [
                move.id,
                move.keyspace,
                ", ".join(map(str, move.ranges)),
                move.source,
                move.target,
                str(move.state),
                str(move.phase),
                f"{move.read_share:g}",
            ]
            for move in moves
        ]

    def _pools(self) -> Rows:
        return [
            self._mine(shard, user, len(pool.idle), len(pool.servers) - len(pool.idle), pool.waiting, pool.trouble)
            for (shard, user), pool in sorted(self.router.pools.items())
        ]

    def _clients(self) -> Rows:
        now = time.monotonic()
        return [
            self._mine(
                pid,
                each.user,
                each.database,
                each.address,
                each.state,
                f"{now - _since(each):.1f}",
                each.shard,
                len(each.prepared.statements),
            )
            for pid, each in sorted(self.router.sessions.items())
        ]

    def _holds(self) -> Rows:
        now = time.monotonic()
        return [
            self._mine(pid, each.user, each.address, f"{now - _since(each):.1f}", each.shard)
            for pid, each in sorted(self.router.sessions.items())
            if each.state == "held"
        ]

    def _servers(self) -> Rows:
        now = time.monotonic()
        return [
            self._mine(
                server.shard,
                server.user,
                server.pid,
                server.address,
                "idle" if server in pool.idle else "busy",
                f"{now - server.since:.1f}",
                getattr(server.holder, "pid", None),
            )
            for _, pool in sorted(self.router.pools.items())
            for server in sorted(pool.servers, key=lambda each: each.pid)
        ]

    def _stats(self) -> Rows:
        stats = self.router.tally()
        rows = [self._mine(name, value) for name, value in stats]
        for name in Stats.HISTOGRAMS:
            histogram = getattr(stats, name)
            rows.append(self._mine(f"{name}_count", histogram.count))
            rows.append(self._mine(f"{name}_sum", f"{histogram.sum:.3f}"))
        return rows

    def _config(self) -> Rows:
        settings = self.router.settings
        rows: Rows = [
            [each.name, _shown(getattr(settings, each.name)), "restart" if each.name in FIXED else "RELOAD"]
            for each in fields(RouterSettings)
            if each.name != "users"
        ]
        return [*rows, ["users", ", ".join(sorted(settings.users)), "RELOAD"]]

    async def _differences(self) -> Rows:
        view, config = self.router.view, self.router.config

        def read() -> Rows:
            with Catalog.connect(config.catalog_dsn, application_name="shardmove router console") as catalog:
                found = [each for move in (view.moves if view else ()) for each in catalog.differences(move)]
            return [[each.move_id, each.at.isoformat(), each.router, each.table, each.key] for each in found]

        try:
            return await asyncio.to_thread(read)
        except ShardmoveError as error:
            raise Refusal("08006", error.message, hint=error.hint) from None

    def _mine(self, *values: object) -> list[str | None]:
        return [str(self.peers.process), *(None if value is None else str(value) for value in values)]


def _silent(process: int) -> Refusal:
    return Refusal("55000", f"process {process} of the router did not answer", hint="The others did; run it again.")


def _rows_of(answer: Words) -> Rows:
    if "refused" in answer:
        sqlstate, message, hint = answer["refused"]
        raise Refusal(sqlstate, message, hint=hint)
    rows: Rows = answer["rows"]
    return rows


def _since(session: Session) -> float:
    """The beginning of what the client does; where it does nothing, of the session."""
    return session.since if session.unit is None else session.unit.began


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return _yes(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
