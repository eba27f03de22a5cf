"""Two-phase writes that somebody left half done, and how they end.

A write is prepared on every shard under one name, which says who decides: `shardmove:ROUTER:NUMBER:DECIDER`. Each of
the writing router's sessions holds an advisory lock of that name on its shard: all of them from before the first
PREPARE, until it ends. Only by these sessions does it prepare and commit. So whoever holds the locks on *all* shards
knows that nothing of the writer's is on its way any more, and the name's fate is his alone:

    prepared on the decider             never decided: rolled back on the others first, on the decider last
    prepared, but not on the decider    its commit there was the decision: committed
    prepared nowhere                    it is over

In that order a rollback that stops in the middle never looks like a decision. Whether the writer is dead is no question
here: one that was stopped, and wakes up late, holds its locks still, or has lost its sessions.

Every router looks every few seconds, from a thread, by the shards' own connection strings: their user has to be a
superuser, the writer's user, or a member of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final, NamedTuple

import psycopg
from psycopg import sql

from router.statements.lexer import as_literal
from shardmove.config import Config
from shardmove.domain import points
from shardmove.domain.errors import ShardmoveError
from shardmove.postgres.connect import Connection, connect, explain

log = logging.getLogger("shardmove.router.recovering")

PREFIX: Final = "shardmove:"
_GID: Final = re.compile(r"shardmove:[0-9a-f]{32}:[0-9]+:(?P<decider>.+)", re.DOTALL)
GID_BYTES_MAX: Final = 199


class Outcome(Enum):
    COMMITTED = auto()
    ROLLED_BACK = auto()
    UNKNOWN = auto()
    """It is over, and somebody else ended it."""
    BUSY = auto()
    """Somebody else may be ending it, or a shard does not answer: to be asked again."""


class _Prepared(NamedTuple):
    shard: str
    gid: str
    owner: str


def gid_of(router_id: str, number: int, decider: str) -> str:
    return f"{PREFIX}{router_id}:{number}:{decider}"


def quoted(gid: str) -> bytes:
    """A shard's name in it may hold anything."""
    return as_literal(gid).encode()


def lock_statement(gid: str) -> bytes:
    return b"SELECT pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended(" + quoted(gid) + b", 0))"


def unlock_statement(gid: str) -> bytes:
    return b"SELECT pg_catalog.pg_advisory_unlock(pg_catalog.hashtextextended(" + quoted(gid) + b", 0))"


class Recovery:
    """Connections to the shards, opened when there is a first reason. One thread at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._connections: dict[str, Connection] = {}
        self._told: set[str] = set()

    def run(self) -> int:
        """Ends what can be ended; how much that was. What a shard says against it is told once, in the log."""
        found: dict[str, str] = {}
        for shard in self._config.shards:
            with self._told_of(shard):
                found |= {each.gid: each.owner for each in self._prepared(shard)}
        ended = 0
        for gid in sorted(found):
            with self._told_of(gid):
                outcome = self.end(gid)
                if outcome in (Outcome.COMMITTED, Outcome.ROLLED_BACK):
                    log.warning("a write that was left half done is %s: %s", outcome.name.lower(), gid)
                    ended += 1
        return ended

    def end(self, gid: str) -> Outcome:
        """Ends it, where nobody else is at it. Raises ShardmoveError and psycopg.Error; to be tried again then."""
        named = _GID.fullmatch(gid)
        decider = named["decider"] if named is not None else ""
        if decider not in self._config.shards:
            log.warning("a prepared transaction names a shard that there is not: %s", gid)
            return Outcome.BUSY
        with self._locked(gid) as is_ours:
            if not is_ours:
                return Outcome.BUSY
            there = [each for shard in self._config.shards for each in self._prepared(shard, gid)]
            if not there:
                return Outcome.UNKNOWN
            is_open = any(each.shard == decider for each in there)
            verb = sql.SQL("ROLLBACK" if is_open else "COMMIT")
            for each in sorted(there, key=lambda each: each.shard == decider):
                self._finish(each, verb)
                points.reach("recovering.after_one")
            return Outcome.ROLLED_BACK if is_open else Outcome.COMMITTED

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _finish(self, prepared: _Prepared, verb: sql.SQL) -> None:
        """By its owner's rights: of whom our user is a member, or itself a superuser."""
        connection = self._connection(prepared.shard)
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(prepared.owner)))
        try:
            connection.execute(sql.SQL("{} PREPARED {}").format(verb, sql.Literal(prepared.gid)))
        finally:
            connection.execute("RESET ROLE")

    def _prepared(self, shard: str, gid: str | None = None) -> Sequence[_Prepared]:
        rows = self._connection(shard).execute(
            "SELECT gid, owner FROM pg_catalog.pg_prepared_xacts"
            " WHERE database = pg_catalog.current_database()"
            " AND pg_catalog.starts_with(gid, %s) AND gid = coalesce(%s, gid)",
            (PREFIX, gid),
        )
        return [_Prepared(shard, *row) for row in rows]

    @contextmanager
    def _locked(self, gid: str) -> Iterator[bool]:
        """Its locks on all shards, or none."""
        taken: list[Connection] = []
        try:
            for shard in self._config.shards:
                connection = self._connection(shard)
                row = connection.execute(
                    "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended(%s, 0))", (gid,)
                ).fetchone()
                if row is None or not row[0]:
                    break
                taken.append(connection)
            yield len(taken) == len(self._config.shards)
        finally:
            for connection in taken:
                try:
                    connection.execute(
                        "SELECT pg_catalog.pg_advisory_unlock(pg_catalog.hashtextextended(%s, 0))", (gid,)
                    )
                except psycopg.Error:
                    connection.close()

    def _connection(self, shard: str) -> Connection:
        known = self._connections.get(shard)
        if known is None or known.closed or known.broken:
            known = connect(self._config.shard_dsn(shard), application_name="shardmove router")
            self._connections[shard] = known
        return known

    @contextmanager
    def _told_of(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ShardmoveError, psycopg.Error) as error:
            if what not in self._told:
                self._told.add(what)
                said = error.message if isinstance(error, ShardmoveError) else explain(error)
                log.warning("writes that were left half done cannot be ended: %s: %s", what, said)
        else:
            self._told.discard(what)
