"""A story: steps in any order over a place, and what must be true after each.

    story = Story(place)
    story.do("plan()")
    story.do("run(goal='ready', at='batch.before', act='die')")
    story.do("write(op='update', tenant=150, id=1, n=2, client='A')")

Every step is a call with small literal arguments, so a story is a script that can be read, cut down and told again.
A step whose time has not come (a second plan, a commit of nobody) does nothing. A step fails the story where the engine
answers what the protocol does not allow, hangs, or leaves behind what must not be.
"""

from __future__ import annotations

import ast
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import psycopg

from shardmove.catalog.store import Catalog
from shardmove.coordinator import ending, planner
from shardmove.coordinator.attending import Attendant
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import Hold, hold
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import recorded, run
from shardmove.domain.errors import MirrorRefused, SchemaDrift, ShardmoveError
from shardmove.domain.moves import MIRRORED, Direction, Move, State
from shardmove.postgres.connect import is_unreachable
from shardmove.protocol.catch_up import Mirror
from tests.machine import oracle
from tests.machine.allowed import Allowed
from tests.machine.application import PROBED, Application, Finding, execute
from tests.machine.oracle import RESIDENTS
from tests.machine.parties import POINTS, Fault, Killed, Party
from tests.machine.place import HURRIED, KEYSPACE, SHARDS, UNHURRIED, AtOnce, Place

ACTS: Final = (
    "die",
    "write",
    "storm",
    "cut s1",
    "cut s2",
    "cut cat",
    "crash s1",
    "crash s2",
    "begin",
    "commit",
    "drift",
    "sleep",
)
"""What may happen to a verb at a control point."""
HARMLESS: Final = frozenset({"write", "storm", "begin", "commit"})
"""These are the application's own doing: the verb has no excuse."""
CHANGING: Final = """
    SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
    WHERE l.granted AND l.mode IN ('ShareRowExclusiveLock', 'AccessExclusiveLock')
      AND a.datname = current_database() AND a.application_name LIKE 'shardmove m%'
      AND a.state LIKE 'idle in transaction%' AND c.relnamespace = 'public'::regnamespace
"""
ENDED_S: Final = 60.0
STORM_MAX: Final = 40
"""Writes in one storm: longer ones find no more."""


class Counting(Progress):
    """Asks the run to stop after so many batches."""

    def __init__(self, batches: int, stop: threading.Event) -> None:
        super().__init__()
        self.left = batches
        self.stop = stop

    def batch(self, name: str, *, rows: int, size_bytes: int) -> None:
        super().batch(name, rows=rows, size_bytes=size_bytes)
        self.left -= 1
        if self.left <= 0:
            self.stop.set()


class Story(Application):
    """One story. `tell` prints each step and the state after it."""

    def __init__(self, place: Place, *, tell: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(place)
        self.tell = tell
        self.script: list[str] = []
        self.counts: Counter[str] = Counter()
        self.move_id: str | None = None
        self.known: State | None = None
        """The move's state after the last step."""
        self.is_settled = True
        self.sleeper: Party | None = None
        self.is_blocked = False
        """Where a session of the sleeper's may hold up passes: they would wait for as long as it sleeps."""
        self.found: list[str] = []
        """What was found in the middle of a step, where no exception would come through."""
        self._stormed = 0
        self._writing = threading.Lock()

    # --- telling

    def do(self, line: str) -> str:
        """Runs one step, then checks everything. Returns what came of it. Raises Finding, and Hangs."""
        name, arguments = parsed(line)
        self.script.append(line)
        outcome = "failed"
        try:
            outcome = getattr(self, name)(**arguments)
            self.counts[f"step {name}"] += outcome != "-"
            self.check()
        finally:
            words = self._state_words()
            self.script[-1] = f"{line:<72}# {outcome}; {words}"
            self.tell(self.script[-1])
        self.counts[f"state {words}"] += 1
        self.known = self.state
        return outcome

    def _state_words(self) -> str:
        with suppress(ShardmoveError, psycopg.Error):
            return f"{self.move.state}, {self.owner} owns" if self.move_id else f"no move, {self.owner} owns"
        return "no answer"

    def close(self) -> None:
        if self.sleeper is not None:
            POINTS.fault = None
            self.sleeper.on_wake = lambda: None
            with suppress(AssertionError):
                self.sleeper.wake()
            POINTS.sleepers.clear()
        for client in self.clients.values():
            client.session.close()

    # --- where things stand

    @property
    def move(self) -> Move:
        assert self.move_id is not None
        return self.place.catalog.move(self.move_id)

    @property
    def state(self) -> State | None:
        return None if self.move_id is None else self.move.state

    @property
    def is_at_rest(self) -> bool:
        return self.is_settled and self.sleeper is None

    # --- steps: the engine's verbs

    def plan(self) -> str:
        """A move of the range to the shard that does not own it."""
        if self.state is not None and not self.state.is_final:
            return "-"
        to = "s2" if self.owner == "s1" else "s1"
        range_ = self.place.config.keyspace(KEYSPACE).bound_type.parse_range(oracle.RANGE)
        made = planner.move(self.place.config, self.place.catalog, KEYSPACE, range_=range_, to=to)
        self.move_id = made.move_ids[0]
        self.drift = "none"
        return f"{self.move_id} to {to}"

    def run(self, goal: str = "ready", at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        return self._verb("run", lambda held: run(held, State(goal)), at, act, nth, goal)

    def copy(self, batches: int = 1, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        """Run, until so many batches were copied; then somebody interrupts it."""

        def work(held: Hold) -> None:
            held.progress = Counting(batches, held.stop)
            run(held, State.READY)

        return self._verb("copy", work, at, act, nth, "ready")

    def cut_over(self, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        return self._verb("cut_over", lambda held: _cut_over(held, Direction.FORWARD), at, act, nth)

    def revert(self, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        return self._verb("revert", lambda held: _cut_over(held, Direction.BACK), at, act, nth)

    def complete(self, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        return self._verb("complete", lambda held: _told(held, ending.complete), at, act, nth)

    def roll_back(self, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        return self._verb("roll_back", lambda held: _told(held, ending.roll_back), at, act, nth)

    def _verb(
        self, name: str, work: Callable[[Hold], None], at: str | None, act: str | None, nth: int, goal: str = ""
    ) -> str:
        if self.move_id is None or (act == "sleep" and self.sleeper is not None):
            return "-"
        move_id, before, allowed = self.move_id, self.move, Allowed.of(self, name, goal, act)
        in_a_hurry = act in ("sleep", "begin") or self.sleeper or self.has_writers_on(before.giver(before.flow))
        is_busy = self.clients or self.sleeper or act in ("sleep", "begin")
        config = self.place.configured({**(HURRIED if in_a_hurry else {}), **({} if is_busy else UNHURRIED)})
        has_hold = threading.Event()

        def holding() -> None:
            with (
                Catalog.connect(config.catalog_dsn) as catalog,
                hold(config, catalog, move_id, holder=name, make_executor=AtOnce, progress=Progress()) as held,
            ):
                has_hold.set()
                work(held)

        party = Party(name, holding)
        fault = self._fault(party, at, act, nth)
        error = self._meet(party, fault)
        if party.is_asleep:
            return f"asleep at {party.asleep_at}"
        self.is_blocked = self.is_blocked and not has_hold.is_set()
        excused = bool(fault and fault.happened and act not in HARMLESS)
        self.is_settled = (self.is_settled or has_hold.is_set()) and not (excused and error is not None)
        if error is not None and self.drift == "open":
            self.drift = "perhaps"
        self._judge(name, error, allowed, excused, fault)
        if error is None and name == "run" and self.move.state not in (State.PENDING, State.INITIALIZING):
            self.drift = "none" if not (fault and fault.happened and act == "drift") else self.drift
        where = f" at {fault.happened[0]}" if fault and fault.happened else ""
        return f"{act}{where}: {_words(error)}" if where else _words(error)

    def _judge(
        self, name: str, error: BaseException | None, allowed: Allowed, excused: bool, fault: Fault | None
    ) -> None:
        if isinstance(error, Killed):
            return
        if error is not None and not isinstance(error, ShardmoveError):
            if excused and is_unreachable(error):
                return
            raise Finding(f"{name} ended with {error!r}, which is no error of the engine's") from error
        if excused or self.sleeper is not None:
            return
        if error is None and allowed.must_fail and not (fault and fault.happened):
            raise Finding(f"{name} succeeded, although {allowed.because}")
        if error is not None and not allowed.allows(error):
            raise Finding(f"{name} said {_words(error)}; {allowed.because or 'nothing was in its way'}") from error

    def _meet(self, party: Party, fault: Fault | None) -> BaseException | None:
        """Starts a party, with what befalls it; what it ended with, or None, also where it sleeps."""
        POINTS.party, POINTS.fault, POINTS.seen = party, fault, []
        self._stormed = 0
        try:
            party.start()
        finally:
            POINTS.party = POINTS.fault = None
        if fault is not None and fault.happened and not fault.repeats:
            self.counts[f"point {fault.happened[0]}"] += 1
        if party.is_asleep:
            self.sleeper = party
            self._await_tables()
            # a pass waits for what another party has locked, until a verb takes the move over and ends it
            self.is_blocked = True
            return None
        return party.error

    def _await_tables(self) -> None:
        """A party that sleeps in the middle of a change of triggers is ended by the server, before writers miss it."""
        deadline = time.monotonic() + ENDED_S
        while any(self.place.session(shard).execute(CHANGING).fetchall() for shard in SHARDS):
            if time.monotonic() > deadline:
                raise Finding(f"one that sleeps at {self.sleeper and self.sleeper.asleep_at} keeps a table locked")

    # --- steps: what befalls a party

    def _fault(self, party: Party, at: str | None, act: str | None, nth: int) -> Fault | None:
        if act is None:
            return None
        what, _, server = act.partition(" ")

        def happen(point: str) -> None:
            match what:
                case "die":
                    raise Killed
                case "write" | "storm":
                    self._write_meanwhile(point)
                case "cut":
                    self.place.cut(server)
                case "crash":
                    self._crash(server)
                case "begin":
                    self._begin_meanwhile()
                case "commit":
                    for name in list(self.clients):
                        self.commit(name)
                case "drift":
                    self._drift_meanwhile()
                case "sleep":
                    if self.move_id is not None:
                        self.place.lose_lease(self.move_id)
                    POINTS.sleepers.add(party.thread)
                    party.sleep(point)
                case _:
                    raise AssertionError(act)

        own = what in ("sleep", "commit") or at is None  # what is counted has to be in order
        return Fault(at, happen, nth, repeats=what == "storm", by_any_thread=not own)

    def _write_meanwhile(self, point: str) -> None:
        """An application writes to the range while a party stands at a point, wherever it is let in."""
        with self._writing:  # the party's own thread, and its mirror's
            self._write_at(point)

    def _write_at(self, point: str) -> None:
        self._stormed += 1
        if self._stormed > STORM_MAX:
            return
        accepting = self.accepting()
        if len(accepting) > 1:
            self.found.append(f"at {point} both shards accept writes to the range")
        for shard in accepting:
            row = oracle.upsert(PROBED, oracle.IDS[self._stormed % 3], f"m{self.ledger.now}")
            view = dict(self.ledger.rows)
            row.effect(view)
            answer = execute(self.place.session(shard), row.statements)
            self._stormed += STORM_MAX // 4 if answer == "locked" else 0
            if answer == 1:
                self.ledger.commit(oracle.difference(self.ledger.rows, view), row.tenants)

    def _begin_meanwhile(self) -> None:
        """A transaction writes to the range while a party stands at a point, and stays open."""
        accepting = self.accepting()
        if "H" not in self.clients and accepting:
            self.begin("H", accepting[0])
            row = oracle.upsert(PROBED, 1, "h")
            self.send(row, accepting[0], self.clients["H"], in_range=True, judged=False)

    def _drift_meanwhile(self) -> None:
        with suppress(psycopg.errors.LockNotAvailable):
            for shard in SHARDS:
                self.alter(shard, not self.extra["s1"])

    def _crash(self, server: str) -> None:
        self.place.crash(server)
        for name in [name for name, client in self.clients.items() if client.shard == server]:
            self.clients.pop(name).session.close()

    def cut(self, server: str) -> str:
        """Every session of the engine on a server is ended, those of sleepers."""
        if self.sleeper is None:
            return "-"
        self.place.cut(server)
        return "cut off"

    def crash(self, server: str) -> str:
        self._crash(server)
        return "crashed"

    def wake(self) -> str:
        """The one that sleeps goes on from where it is: late, and perhaps without its sessions."""
        if self.sleeper is None:
            return "-"
        party, self.sleeper, self.is_blocked = self.sleeper, None, False
        try:
            party.wake()
        finally:
            POINTS.sleepers.discard(party.thread)
        error = party.error
        if error is not None and not isinstance(error, ShardmoveError | psycopg.Error):
            raise Finding(f"{party.name}, woken up, ended with {error!r}") from error
        if party.name != "catch_up":
            self.is_settled = False
            if self.drift == "open":
                self.drift = "perhaps"
        return f"{party.name} ends: {_words(error)}"

    def catch_up(self, rows_max: int | None = None, at: str | None = None, act: str | None = None, nth: int = 1) -> str:
        """One pass of somebody's mirror, which needs no lease. It may stop in the middle of it."""
        if self.move_id is None or self.is_blocked or self.move.state not in MIRRORED:
            return "-"
        if act == "sleep" and self.sleeper is not None:
            return "-"
        move = self.move

        def work() -> None:
            with Mirror.open(move, move.flow, None, {s: self.place.dsns[s] for s in SHARDS}) as mirror:
                mirror.catch_up(rows_max=rows_max)

        party = Party("catch_up", work)
        fault = self._fault(party, at, act, nth)
        error = self._meet(party, fault)
        if party.is_asleep:
            return f"asleep at {party.asleep_at}"
        excused = bool(fault and fault.happened and act not in HARMLESS) or self.sleeper is not None
        drifted = isinstance(error, (SchemaDrift, psycopg.errors.UndefinedColumn)) and self.drift != "none"
        unsettled = isinstance(error, MirrorRefused) and not self.is_settled
        if error is not None and not excused and not drifted and not unsettled:
            raise Finding(f"a pass ended with {error!r}") from error
        return _words(error)

    def attend(self) -> str:
        """Somebody without a lease looks after the move: settles what a dead coordinator left, then one pass."""
        if self.move_id is None or self.sleeper is not None:
            return "-"
        config = self.place.config
        attendant = Attendant(config, lambda: Catalog.connect(config.catalog_dsn), self.move_id)

        def work() -> None:
            with Catalog.connect(config.catalog_dsn) as catalog:
                attendant._settle(catalog, catalog.move(self.move_id or ""))
            attendant._close()

        party = Party("attend", work)
        error = self._meet(party, None)
        if error is not None:
            raise Finding(f"an attendant ended with {error!r}") from error
        self.is_settled = True
        return "settled"

    # --- what must be true

    def check(self) -> None:
        """Everything, after a step: of the rows at any time, of the rest as far as somebody has come to settle it."""
        if self.found:
            raise Finding("; ".join(self.found))
        route = self.place.catalog.routes()[KEYSPACE].at(PROBED)
        self.owned.add(route.shard)
        at_rest = self.is_at_rest
        accepting = self.accepting()
        if len(accepting) > 1 or (at_rest and accepting != [route.shard]):
            raise Finding(
                f"{route.shard} owns the range by the route table, and {accepting or 'nobody'} accepts writes"
            )
        for name, client in self.clients.items():
            client.certain = client.certain and client.shard == route.shard
            if client.shard != route.shard and any(oracle.moves(key[1]) for key in client.changes):
                raise Finding(f"{name} wrote to the range on {client.shard}, and may commit; {route.shard} owns it")
        state = self.state
        for shard in SHARDS:
            self._check_rows(shard, route.shard, state)
        if at_rest and self.place.catalog.open_attempts():
            raise Finding("an attempt is open")
        if at_rest and route.held:
            raise Finding("the range is held, and nobody is at it")
        if at_rest and state is not None and state.is_final:
            for shard in SHARDS:
                if left := self._leftovers(shard):
                    raise Finding(f"the move is {state}, and on {shard} there is left {left}")

    def _check_rows(self, shard: str, owner: str, state: State | None) -> None:
        found = self.place.rows(shard)
        expected = self.ledger.of(lambda tenant: RESIDENTS.get(tenant, owner) == shard)
        if shard != owner:
            stray = {key: value for key, value in found.items() if oracle.moves(key[1])}
            if stray and (state is None or state in (State.PENDING, State.COMPLETED, State.ROLLED_BACK)):
                raise Finding(f"the move is {state}, and {shard} holds {stray}")
            found = {key: value for key, value in found.items() if not oracle.moves(key[1])}
        if found != expected:
            wrong = oracle.difference(expected, found)
            raise Finding(
                f"{shard} holds {wrong}; acknowledged was { {key: expected.get(key) for key in wrong} }"
                f" ({owner} owns the range)"
            )

    def _leftovers(self, shard: str) -> list[str]:
        rows = self.place.session(shard).execute(_LEFTOVERS, {"p": f"%{self.move_id}%", "m": self.move_id}).fetchall()
        return [row[0] for row in rows]


_LEFTOVERS: Final = """
    SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE 'shardmove\\_' || %(p)s
    UNION ALL SELECT 'function ' || proname FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE nspname = 'shardmove' AND proname LIKE %(p)s
    UNION ALL SELECT 'relation ' || relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname = 'shardmove' AND relname LIKE %(p)s
"""


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The step of a line of a script, and its arguments. Raises ValueError where it is no call with literals."""
    call = ast.parse(line.partition("#")[0].strip(), mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"not a step: {line}")
    return call.func.id, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}


def _cut_over(held: Hold, direction: Direction) -> None:
    with recorded(held):
        cut_over(held, direction)


def _told(held: Hold, verb: Callable[[Hold], None]) -> None:
    with recorded(held):
        verb(held)


def _words(error: BaseException | None) -> str:
    return "done" if error is None else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
