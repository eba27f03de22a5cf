"""Diagnosis: what is stuck, left over or inconsistent, and the command that mends it. Changes nothing.

Three records have to agree: the catalog (state, attempts, routes), each shard's fence row, and what writers meet there
(state sequence, triggers). While a coordinator is at a move they change one after the other, so a shard's word is held
against the catalog only where nobody is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
from psycopg import sql

from shardmove.catalog.store import Catalog
from shardmove.config import Config
from shardmove.coordinator.attending import holder_is_dead
from shardmove.coordinator.status import status
from shardmove.domain.errors import ServerChanged, ShardmoveError
from shardmove.domain.moves import MIRRORED, Move, Outcome, Standing, State
from shardmove.domain.routes import RouteTable
from shardmove.postgres.connect import Connection, connect, explain
from shardmove.postgres.introspect import table_oid
from shardmove.protocol import capture, drift, fence, kept, objects, triggers

APPLICATION_NAME = "shardmove diagnose"
DRIFT_LOOKED_AT = MIRRORED - {State.COPYING}
UNDER_WAY: Mapping[State, str] = {
    State.INITIALIZING: "run",
    State.COPYING: "run",
    State.VERIFYING: "run",
    State.CLEANING: "complete",
    State.ROLLING_BACK: "rollback",
}
"""States that a move only passes through, and the verb that takes it on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that needs a hand. `mend`: the command, or what else to do."""

    subject: str
    problem: str
    mend: str


def diagnose(config: Config, catalog: Catalog, moves: Sequence[Move] | None = None) -> list[Finding]:
    """Looks at the given moves, or at everything: every unfinished move and every shard. No finding: all is well."""
    everything = moves is None
    looked_at = [move for move in (catalog.moves() if moves is None else moves) if not move.state.is_final]
    found: list[Finding] = []
    for move in looked_at:
        found += _in_catalog(config, catalog, move)
    for shard in sorted(_shards(config, looked_at, everything)):
        found += _on_shard(config, catalog, shard, looked_at, everything)
    if everything:
        found += _routers(catalog)
    return found


def _shards(config: Config, moves: Sequence[Move], everything: bool) -> set[str]:
    of_moves = {shard for move in moves for shard in (move.source, move.target)}
    return of_moves | set(config.shards) if everything else of_moves


# --- what the catalog says


def _in_catalog(config: Config, catalog: Catalog, move: Move) -> Iterator[Finding]:
    subject = f"move {move.id}"
    is_left = holder_is_dead(catalog, move, config.limits.lease_ttl_s)
    age_s = (datetime.now(UTC) - move.state_since).total_seconds()
    verb = UNDER_WAY.get(move.state)
    if move.error is not None:
        yield Finding(subject, f"stopped while {move.state}: {move.error}", f"shardmove {verb or 'run'} {move.id}")
    elif move.paused:
        yield Finding(subject, f"is paused while {move.state}", f"shardmove resume {move.id}")
    elif verb is not None and is_left:
        yield Finding(
            subject, f"has been {move.state} for {age_s:.0f} s, and nobody is at it", f"shardmove {verb} {move.id}"
        )
    yield from _attempt(catalog, move, is_left)
    yield from _journal(config, catalog, move)


def _attempt(catalog: Catalog, move: Move, is_left: bool) -> Iterator[Finding]:
    if not is_left or move.last_attempt == 0:
        return
    attempt = catalog.attempt(move.id, move.last_attempt)
    if attempt.outcome is Outcome.OPEN:
        yield Finding(
            f"move {move.id}",
            f"the cutover attempt {attempt.number} is open and its coordinator is gone: writes to the range may wait",
            "shardmove serve",
        )


def _journal(config: Config, catalog: Catalog, move: Move) -> Iterator[Finding]:
    figures = status(config, catalog, move)
    if figures["unattended"] and move.state not in UNDER_WAY:
        yield Finding(f"move {move.id}", f"is {move.state} and unattended: its journal grows", "shardmove serve")
    if (figures["journal_backlog"] or 0) > config.limits.journal_rows_warning:
        yield Finding(
            f"move {move.id}", f"{figures['journal_backlog']} changes wait in the journal", f"shardmove run {move.id}"
        )


def _routers(catalog: Catalog) -> Iterator[Finding]:
    """Those that are silent, and those that live and have not gone over to an epoch that is not quite new."""
    known = catalog.routers()
    lagging = {each.id for each in catalog.lagging_routers()}
    for each in known:
        if not each.is_live:
            yield Finding(
                f"router {each}",
                f"has been silent for {each.silent_s:.0f} s, and did not take its leave",
                "start it again, or look at its log; it is forgotten after ten minutes",
            )
        elif each.id in lagging:
            yield Finding(
                f"router {each}",
                f"still acts by epoch {each.acknowledged}: cutovers do not wait for it, changes of phase do in vain",
                "look at SHOW CLIENTS for transactions that do not end; restart it",
            )


# --- what a shard says


def _on_shard(
    config: Config, catalog: Catalog, shard: str, moves: Sequence[Move], everything: bool
) -> Iterator[Finding]:
    subject = f"shard {shard}"
    try:
        with connect(config.shard_dsn(shard), application_name=APPLICATION_NAME) as connection:
            yield from _Shard(config, catalog, shard, connection).findings(moves, everything)
    except ShardmoveError as error:
        yield Finding(subject, error.message, error.hint or "start the server, or mend [shards]")
    except psycopg.Error as error:
        yield Finding(subject, f"could not be looked at: {explain(error)}", f"look at the server's log of {shard}")


@dataclass(frozen=True, slots=True)
class _Shard:
    config: Config
    catalog: Catalog
    name: str
    connection: Connection

    @property
    def subject(self) -> str:
        return f"shard {self.name}"

    def findings(self, moves: Sequence[Move], everything: bool) -> Iterator[Finding]:
        here = [move for move in moves if self.name in (move.source, move.target)]
        if not objects.has_schema(self.connection):
            yield from self._missing([move for move in here if move.state in MIRRORED])
            return
        objects.check_schema(self.connection, self.catalog.cluster_id())
        for move in here:
            yield from self._move(move)
        if everything:
            yield from self._left_over()
            yield from self._kept_disabled()
            yield from self._kept_missing()
            yield from self._kept(self.catalog.routes())

    def _missing(self, moves: Sequence[Move]) -> Iterator[Finding]:
        for move in moves:
            yield Finding(
                self.subject,
                f"the objects of move {move.id} are missing, although it is {move.state}: changes are not journalled",
                f"shardmove rollback {move.id}",
            )

    # --- a move's part here

    def _move(self, move: Move) -> Iterator[Finding]:
        row = fence.read(self.connection, move.id)
        if row is None:
            yield from self._missing([move] if move.state in MIRRORED else [])
            return
        yield from self._identity(move)
        if move.state in MIRRORED:
            yield from self._armed(move)
        if holder_is_dead(self.catalog, move, self.config.limits.lease_ttl_s):
            yield from self._standing(move, row)

    def _identity(self, move: Move) -> Iterator[Finding]:
        try:
            drift.check_identity(self.connection, self.name, move.identities)
        except ServerChanged as error:
            yield Finding(self.subject, error.message, f"shardmove run {move.id}")

    def _armed(self, move: Move) -> Iterator[Finding]:
        tables = objects.load_tables(self.connection, move.id)
        gone = [str(table.name) for table in tables if table_oid(self.connection, table.name) is None]
        if gone:
            yield Finding(
                self.subject,
                f"tables of move {move.id} are not there any more: {', '.join(gone)}",
                "give them their names back",
            )
            return
        bare = [str(table.name) for table in tables if not triggers.is_armed(self.connection, move.id, table)]
        if bare:
            yield Finding(
                self.subject,
                f"triggers of move {move.id} are missing or disabled on {', '.join(bare)}: changes were not journalled",
                f"shardmove run {move.id}",
            )
        elif move.state in DRIFT_LOOKED_AT and drift.is_drifted(self.connection, move.id, tables):
            yield Finding(
                self.subject,
                f"a table of move {move.id} was changed by DDL since it was compared",
                f"shardmove run {move.id}",
            )

    def _standing(self, move: Move, row: fence.FenceRow) -> Iterator[Finding]:
        """The shard's record against the catalog's, and against what writers meet."""
        writers_meet = fence.state(self.connection, move.id)
        if row.is_open != (writers_meet == capture.OPEN):
            yield Finding(
                self.subject,
                f"the fence of move {move.id} is {_opened(row.is_open)} by its row, and writers find it"
                f" {_opened(not row.is_open)}",
                "shardmove serve",
            )
        if move.state not in MIRRORED:
            return
        is_owner = self.name == move.giver(move.flow)
        expected = Standing.OWNER if is_owner else Standing.MIRROR
        if (row.standing, row.is_open) != (expected, is_owner):
            yield Finding(
                self.subject,
                f"is {expected} and {_opened(is_owner)} in move {move.id} by the catalog, {row.standing} and"
                f" {_opened(row.is_open)} by its own record",
                "shardmove serve",
            )

    # --- what no move accounts for

    def _left_over(self) -> Iterator[Finding]:
        unfinished = {move.id for move in self.catalog.moves(unfinished_only=True)}
        rows = self.connection.execute("SELECT move_id FROM shardmove.fence ORDER BY move_id").fetchall()
        known = {row[0] for row in rows}
        for move_id in sorted(known - unfinished):
            yield Finding(
                self.subject,
                f"a fence of move {move_id} is left over: the catalog has no such unfinished move",
                "shardmove uninstall, once no move is unfinished",
            )
        for kind, name in _strays(self.connection, known):
            yield Finding(
                self.subject, f"the {kind} {name} belongs to no move", "shardmove uninstall, once no move is unfinished"
            )

        if objects.makers(self.connection) - unfinished:
            yield Finding(
                self.subject,
                "tables that a move made lack indexes and foreign keys",
                "run what is in shardmove.later there, in the order of its numbers, then delete its rows",
            )

    def _kept_disabled(self) -> Iterator[Finding]:
        """A kept fence that somebody switched off, on a table or on a partition alone, refuses nothing."""
        for trigger, table in self.connection.execute(_KEPT_DISABLED).fetchall():
            yield Finding(
                self.subject,
                f"the kept fence {trigger} on {table} is disabled: stray writes to ranges that were given away pass",
                f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}",
            )

    def _kept_missing(self) -> Iterator[Finding]:
        """A table that came to a keyspace later knows nothing of ranges that were given away before."""
        for keyspace in self.catalog.keyspaces().values():
            bare = [str(table.name) for table in kept.bare_tables(self.connection, keyspace)]
            if bare:
                yield Finding(
                    self.subject,
                    f"{', '.join(bare)} of {keyspace.name} would take writes to ranges that were given away",
                    "shardmove apply",
                )

    def _kept(self, table: RouteTable) -> Iterator[Finding]:
        """A kept fence refuses writes for ever: never on the shard that the routes name."""
        for name, routes in table.keyspaces.items():
            given = kept.kept_ranges(self.connection, self.catalog.keyspace(name))
            for route in routes.routes:
                common = [str(r) for each in given if (r := each.intersection(route.range)) is not None]
                if route.shard == self.name and route.move_id is None and common:
                    yield Finding(
                        self.subject,
                        f"refuses writes to {', '.join(common)} of {name}, although it owns them",
                        "shardmove uninstall, once no move is unfinished",
                    )


def _opened(is_open: bool) -> str:
    return "open" if is_open else "closed"


_KEPT_DISABLED = """
    SELECT t.tgname, t.tgrelid::regclass::text FROM pg_catalog.pg_trigger t
    WHERE pg_catalog.starts_with(t.tgname, 'shardmove_kept_') AND t.tgenabled <> 'A' ORDER BY 2, 1
"""

_STRAYS = sql.SQL("""
    SELECT 'trigger', t.tgname || ' on ' || t.tgrelid::regclass::text,
           pg_catalog.substring(t.tgname, '^shardmove_(m[0-9]+)_')
    FROM pg_catalog.pg_trigger t WHERE pg_catalog.starts_with(t.tgname, 'shardmove_') AND t.tgparentid = 0
      AND NOT t.tgisinternal AND NOT pg_catalog.starts_with(t.tgname, 'shardmove_kept_')
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, c.oid::regclass::text,
           pg_catalog.substring(c.relname, '^(?:state|journal)_(m[0-9]+)')
    FROM pg_catalog.pg_class c WHERE c.relnamespace = 'shardmove'::regnamespace AND c.relkind IN ('r', 'S')
      AND c.relname ~ '^(state|journal)_'
    UNION ALL
    SELECT 'function', p.oid::regproc::text, pg_catalog.substring(p.proname, '^capture_(m[0-9]+)_')
    FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'shardmove'::regnamespace AND p.proname ~ '^capture_'
    ORDER BY 1, 2
""")


def _strays(connection: Connection, known: set[str]) -> list[tuple[str, str]]:
    """Kind and name of our objects here that no fence row accounts for."""
    rows = connection.execute(_STRAYS).fetchall()
    return [(kind, name) for kind, name, move_id in rows if move_id not in known]
