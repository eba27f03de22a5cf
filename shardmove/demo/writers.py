"""The shop's clients: a fleet of writers under load, each keeping its ledger.

    fleet = WriterFleet(ledger_dir, catalog_dsn, shard_dsns, tenants=range(0, 400), processes=4, rate=250)
    fleet.start()
    copying = fleet.mark("copy")
    …
    summary = fleet.stop()

They write through a router where one is given (`router_dsn`), else with `ShardClient`.

The tenants are dealt out: no two writers ever write the same one, so each knows the final value of every row of its
own. Writers are processes of their own, or threads of this one (`processes=0`: for short tests). A process ends when
its standard input does: whoever started it cannot leave it behind, however it dies.

Fleet and writers talk through one shared page (`Board`): a command, and a few counters a writer.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg import IsolationLevel

from router.client import OutcomeUnknown, ShardClient
from shardmove.demo import ledger, measure, operations
from shardmove.demo.check import take_baseline
from shardmove.demo.clients import Client, DirectClient, NotTogether, RouterClient
from shardmove.demo.ledger import Ledger, Outcome, Write
from shardmove.demo.operations import MIX, SINGLES, Attempt, Change, Key, Operation, Skip, Surprise, Tenant
from shardmove.demo.shop import KEYSPACE, Table
from shardmove.domain.errors import Failed, ShardmoveError, Unreachable

T = TypeVar("T")
ISOLATION_LEVELS: Final = (
    IsolationLevel.READ_COMMITTED,
    IsolationLevel.READ_COMMITTED,
    IsolationLevel.REPEATABLE_READ,
    IsolationLevel.SERIALIZABLE,
)
BEHIND_MAX_S: Final = 1.0  # a writer that fell further behind its schedule gives up what it owes
PAUSED_POLL_S: Final = 0.005
SLEEP_MAX_S: Final = 0.02  # how late a sleeping writer sees a command
START_BOUND_S: Final = 60.0
ERRORS_KEPT: Final = 20


class Command(IntEnum):
    RUN = 0
    PAUSE = 1
    STOP = 2


class State(IntEnum):
    STARTING = 0
    RUNNING = 1
    PAUSED = 2
    STOPPED = 3
    BROKEN = 4


class Board:
    """One shared page: a command for all, and for each writer its state and three counters, all 64-bit words.

    Each word has one author, so nothing needs a lock.
    """

    _WORDS = 8  # a cache line each: the command, then the writers

    def __init__(self, path: Path, writers: int | None = None) -> None:
        """Opens the page; creates it for so many writers where a number is given."""
        if writers is not None:
            path.write_bytes(bytes(8 * self._WORDS * (writers + 1)))
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    @property
    def command(self) -> Command:
        return Command(self._words[0])

    @command.setter
    def command(self, command: Command) -> None:
        self._words[0] = command

    def state(self, writer: int) -> State:
        return State(self._words[self._at(writer)])

    def set_state(self, writer: int, state: State) -> None:
        self._words[self._at(writer)] = state

    def count(self, writer: int, outcome: Outcome) -> None:
        self._words[self._at(writer) + 1 + _OUTCOMES.index(outcome)] += 1

    def total(self, outcome: Outcome) -> int:
        offset = 1 + _OUTCOMES.index(outcome)
        return sum(self._words[at + offset] for at in range(self._WORDS, len(self._words), self._WORDS))

    def _at(self, writer: int) -> int:
        return self._WORDS * (writer + 1)


_OUTCOMES: Final = tuple(Outcome)


@dataclass(frozen=True, slots=True)
class WriterConfig:
    """All that one writer needs to know. It crosses process borders as JSON."""

    ledger_dir: str
    generation: int
    index: int
    name: str
    catalog_dsn: str
    shard_dsns: Mapping[str, str]
    keyspace: str
    tenants: Sequence[int]
    focus: Sequence[int]
    focus_share: float
    rate: float
    seed: int
    deadline_s: float
    operations: Mapping[str, float]
    singles: Mapping[str, float]
    singles_share: float
    router_dsn: str | None

    @property
    def board_path(self) -> Path:
        return board_path(Path(self.ledger_dir), self.generation)

    def client(self) -> Client:
        name = f"shop writer {self.name}"
        if self.router_dsn is not None:
            return RouterClient(self.router_dsn, application_name=name, deadline_s=self.deadline_s)
        return DirectClient(
            self.catalog_dsn,
            self.shard_dsns,
            keyspace=self.keyspace,
            application_name=name,
            deadline_s=self.deadline_s,
        )


def _mix(by_name: Mapping[str, float]) -> tuple[list[Operation], list[float]]:
    """Operations and their weights, for `random.choices`."""
    return [getattr(operations, name) for name in by_name], list(by_name.values())


def _patiently(work: Callable[[], T], bound_s: float) -> T:
    """Tries again while a server that is slow lets nobody in, as clients do with transactions."""
    deadline = time.monotonic() + bound_s
    while True:
        try:
            return work()
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def board_path(ledger_dir: Path, generation: int) -> Path:
    return ledger_dir / f"board-{generation:04}"


class Writer:
    """One client of the shop: paced, open loop, one transaction at a time."""

    def __init__(self, config: WriterConfig, board: Board, is_orphaned: Callable[[], bool]) -> None:
        self._config = config
        self._board = board
        self._is_orphaned = is_orphaned
        self._dice = random.Random(f"{config.seed}/{config.generation}/{config.index}")
        self._operations = _mix(config.operations)
        self._singles = _mix(config.singles)
        self._tenants: dict[int, Tenant] = {}
        self._number = 0
        self._due = 0.0
        self._ledger = Ledger(ledger.new_ledger_path(Path(config.ledger_dir), config.generation, config.name))
        self._client = config.client()

    def run(self) -> None:
        """Writes until told to stop, then returns. What went wrong is in the ledger, and in the board's state."""
        ended = State.BROKEN
        try:
            self._client.connect()
            _patiently(self._read_tenants, self._config.deadline_s)
            self._write_until_told()
            ended = State.STOPPED
        finally:
            self._client.close()
            self._ledger.close()
            self._board.set_state(self._config.index, ended)

    def _read_tenants(self) -> None:
        for tenants in self._client.groups(self._config.tenants):
            read = partial(operations.read_tenants, tenant_ids=tenants)
            self._tenants |= self._client.alone(tenants[0], read)

    def _write_until_told(self) -> None:
        self._due = time.monotonic() + self._dice.random() / self._config.rate
        while self._tenants and not self._is_orphaned():
            match self._board.command:
                case Command.STOP:
                    return
                case Command.PAUSE:
                    self._board.set_state(self._config.index, State.PAUSED)
                    time.sleep(PAUSED_POLL_S)
                    self._due = time.monotonic()
                case Command.RUN:
                    self._board.set_state(self._config.index, State.RUNNING)
                    if self._is_due() and self._write_something():
                        self._due += 1 / self._config.rate

    def _is_due(self) -> bool:
        """Sleeps towards the next write's time, a little at once. The schedule does not wait for slow answers."""
        now = time.monotonic()
        if now < self._due:
            time.sleep(min(self._due - now, SLEEP_MAX_S))
            return time.monotonic() >= self._due
        self._due = max(self._due, now - BEHIND_MAX_S)
        return True

    def _write_something(self) -> bool:
        """A transaction, or a single statement. Returns whether the operation applied."""
        self._number += 1
        share = self._config.singles_share
        return self._write_alone() if share and self._dice.random() < share else self._write()

    def _write(self) -> bool:
        """Runs one operation of the mix as a transaction."""
        (operation,) = self._dice.choices(*self._operations)
        isolation = self._dice.choice(ISOLATION_LEVELS)
        tenant, other = self._choose_tenant(), self._choose_tenant()
        seed = self._dice.getrandbits(64)
        changes: list[Change] = []  # of the latest attempt

        def work(conn: psycopg.Connection[Any]) -> None:
            changes[:] = self._attempt(conn, operation, tenant, other, seed)
            self._ledger.intend(self._number, [_entry(change) for change in changes])

        conclude = partial(self._conclude, tenant, operation, isolation)
        try:
            self._client.transaction(tenant.id, work, isolation=isolation)
        except (Skip, NotTogether):
            return False
        except OutcomeUnknown as error:
            conclude(Outcome.UNKNOWN, error)
            self._find_out(changes)
        except (Surprise, ShardmoveError, psycopg.Error) as error:
            conclude(Outcome.FAILED, error)
            if isinstance(error, Surprise):
                self._set_aside([tenant, other])
        else:
            conclude(Outcome.ACKNOWLEDGED)
            self._learn(changes)
        return True

    def _write_alone(self) -> bool:
        """Runs one operation as a statement of its own: it is not tried again, and any error is a failure."""
        (operation,) = self._dice.choices(*self._singles)
        tenant = self._choose_tenant()
        seed = self._dice.getrandbits(64)
        rows: list[tuple[Table, Key]] = []

        def announce(table: Table, key: Key) -> None:
            rows.append((table, key))
            self._ledger.intend(self._number, [(table.name, _text(key), ledger.ANYTHING)])

        def work(conn: psycopg.Connection[Any]) -> list[Change]:
            return self._attempt(conn, operation, tenant, tenant, seed, announce)

        conclude = partial(self._conclude, tenant, operation, IsolationLevel.READ_COMMITTED, is_single=True)
        try:
            changes = self._client.alone(tenant.id, work)
        except Skip:
            return False
        except OutcomeUnknown as error:
            conclude(Outcome.UNKNOWN, error)
            self._look_at(tenant, rows)
        except (Surprise, ShardmoveError, psycopg.Error) as error:
            conclude(Outcome.FAILED, error)
            if isinstance(error, Surprise):
                self._set_aside([tenant])
        else:
            self._ledger.intend(self._number, [_entry(change) for change in changes])
            conclude(Outcome.ACKNOWLEDGED)
            self._learn(changes)
        return True

    def _attempt(
        self,
        conn: psycopg.Connection[Any],
        operation: Operation,
        tenant: Tenant,
        other: Tenant,
        seed: int,
        announce: Callable[[Table, Key], None] | None = None,
    ) -> list[Change]:
        """Tenants may be on two shards by now: then only one of them takes part, at this attempt."""
        is_together = tenant is not other and self._client.are_together(tenant.id, other.id)
        version = 1 + self._number + (self._config.generation * 1000 + self._config.index) * 10_000_000_000
        dice = random.Random(seed)
        attempt = Attempt(conn, tenant, other if is_together else None, dice, version, announce=announce)
        operation(attempt)
        return [(table, key, known) for (table, key), known in attempt.changes.items()]

    def _choose_tenant(self) -> Tenant:
        config = self._config
        if config.focus and self._dice.random() < config.focus_share:
            tenant = self._tenants.get(self._dice.choice(config.focus))
            if tenant is not None:
                return tenant
        return self._dice.choice(list(self._tenants.values()))

    def _conclude(
        self,
        tenant: Tenant,
        operation: Operation,
        isolation: IsolationLevel,
        outcome: Outcome,
        error: Exception | None = None,
        *,
        is_single: bool = False,
    ) -> None:
        ended = time.monotonic()  # first of all: what we do with the answer is not the database's latency
        trace = self._client.last
        self._ledger.conclude(
            Write(
                number=self._number,
                outcome=outcome,
                writer=self._config.name,
                tenant=tenant.id,
                operation=operation.__name__,
                isolation=isolation.name,
                started=trace.started,
                ended=ended,
                shard=trace.shard,
                attempts=trace.attempts,
                disturbed_at=trace.disturbed_at,
                error=None if error is None else f"{type(error).__name__}: {error}",
                is_single=is_single,
                fenced=trace.fenced,
                collided=trace.collided,
            )
        )
        self._board.count(self._config.index, outcome)

    def _learn(self, changes: Sequence[Change]) -> None:
        for table, key, known in changes:
            self._tenants[key[0]].apply(table, key, known)

    def _find_out(self, changes: Sequence[Change]) -> None:
        """After an unknown outcome: reads what became of it. The ledger goes on to allow both.

        It must be wholly there or wholly not; tenants where it is neither, or that cannot be read, are left alone.
        """
        tenants = [self._tenants[tenant_id] for tenant_id in sorted({key[0] for _, key, _ in changes})]
        try:
            found: dict[int, Tenant] = {}
            for tenant in tenants:
                read = partial(operations.read_tenants, tenant_ids=[tenant.id], lock=True)
                found |= self._client.transaction(tenant.id, read, isolation=IsolationLevel.READ_COMMITTED)
        except (ShardmoveError, psycopg.Error):
            self._set_aside(tenants)
            return
        if all(found[key[0]].rows[table].get(key) == known for table, key, known in changes):
            self._learn(changes)
        elif any(
            found[key[0]].rows[table].get(key) != self._tenants[key[0]].rows[table].get(key)
            for table, key, _ in changes
        ):
            self._set_aside(tenants)

    def _look_at(self, tenant: Tenant, rows: Sequence[tuple[Table, Key]]) -> None:
        """The same after a single statement, which is all or nothing by itself."""
        read = partial(operations.read_tenants, tenant_ids=[tenant.id], lock=True)
        try:
            found = self._client.transaction(tenant.id, read, isolation=IsolationLevel.READ_COMMITTED)
        except (ShardmoveError, psycopg.Error):
            self._set_aside([tenant])
            return
        self._learn([(table, key, found[tenant.id].rows[table].get(key)) for table, key in rows])

    def _set_aside(self, tenants: Sequence[Tenant]) -> None:
        """Leaves tenants as they are from now on: the checker must find the damage, and errors must not flood."""
        for tenant in tenants:
            self._tenants.pop(tenant.id, None)


def _entry(change: Change) -> tuple[str, str, ledger.Image]:
    table, key, known = change
    return table.name, _text(key), None if known is None else known.image


def _text(key: Key) -> str:
    return ",".join(map(str, key))


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a run. `at` is `time.monotonic()`, as every time of the ledger is."""

    name: str
    at: float
    acknowledged: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What the writers were told, from the first to the last write of the fleet's directory."""

    acknowledged: int
    unknown: int
    failed: int
    errors: tuple[str, ...]
    marks: tuple[Mark, ...]
    writes: Sequence[Write] = field(repr=False)

    def window(
        self, since: float, until: float, *, within: Callable[[int], bool] = measure.everything
    ) -> measure.Window:
        """See `measure.window`."""
        return measure.window(self.writes, since, until, within=within)

    def stall(
        self,
        since: float,
        until: float,
        *,
        new_owner: str,
        within: Callable[[int], bool] = measure.everything,
    ) -> measure.Stall | None:
        """See `measure.stall`."""
        return measure.stall(self.writes, since, until, new_owner=new_owner, within=within)

    def stall_around(
        self, opened: float, flipped: float, *, within: Callable[[int], bool] = measure.everything
    ) -> measure.Stall | None:
        """See `measure.stall_around`."""
        return measure.stall_around(self.writes, opened, flipped, within=within)


class WriterFleet:
    """The writers of one run.

    Args:
        ledger_dir: where the ledgers go; created. A second fleet in the same directory goes on where the first one
            ended: run the checker in between, since it begins with what the shards hold.
        tenants: whom to write to; dealt out to the writers one by one, so there must be as many as writers.
        processes: writer processes; 0 means threads of this process instead (no start-up, for short tests).
        threads: writers per process.
        rate: write transactions a second and process (with `processes=0`: in total), shared by its threads.
        focus: the tenants of the moving range; this share of the writes goes to them, the rest to any tenant.
        operations: operation → weight, where not the whole mix.
        seed: the same seed, the same choices, as far as timing lets them.
        deadline_s: how long a writer tries one transaction.
        router_dsn: a router's address; without one, the writers are programs with `ShardClient`.
        singles_share: this share of the writes are single statements, of the operations in `singles`.
    """

    def __init__(
        self,
        ledger_dir: Path,
        catalog_dsn: str,
        shard_dsns: Mapping[str, str],
        *,
        tenants: Sequence[int],
        processes: int = 4,
        threads: int = 1,
        rate: float = 250.0,
        focus: Sequence[int] = (),
        focus_share: float = 0.9,
        operations: Mapping[Operation, float] = MIX,
        keyspace: str = KEYSPACE,
        seed: int = 0,
        deadline_s: float = 30.0,
        router_dsn: str | None = None,
        singles: Mapping[Operation, float] = SINGLES,
        singles_share: float = 0.0,
    ) -> None:
        self._dir = ledger_dir
        self._dir.mkdir(parents=True, exist_ok=True)
        self._generation = ledger.next_generation(ledger_dir)
        self._processes = processes
        self._threads = threads
        writers = max(1, processes) * threads
        if len(tenants) < writers:
            raise ValueError(f"{writers} writers need at least as many tenants, not {len(tenants)}")
        focused = frozenset(focus)
        self._configs = [
            WriterConfig(
                ledger_dir=str(ledger_dir),
                generation=self._generation,
                index=index,
                name=f"{index:02}",
                catalog_dsn=catalog_dsn,
                shard_dsns=dict(shard_dsns),
                keyspace=keyspace,
                tenants=list(tenants[index::writers]),
                focus=[tenant for tenant in tenants[index::writers] if tenant in focused],
                focus_share=focus_share,
                rate=rate / threads,
                seed=seed,
                deadline_s=deadline_s,
                operations=_by_name(operations),
                singles=_by_name(singles),
                singles_share=singles_share,
                router_dsn=router_dsn,
            )
            for index in range(writers)
        ]
        self._board = Board(board_path(ledger_dir, self._generation), writers)
        self._running: list[subprocess.Popen[bytes]] = []
        self._running_threads: list[threading.Thread] = []
        self._marks: list[Mark] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when every writer writes. Takes the baseline first, where the directory has none yet."""
        if not ledger.has_baseline(self._dir):
            self._take_baseline()
        if self._processes:
            self._running = [_spawn(self._configs[i :: self._processes]) for i in range(self._processes)]
        else:
            self._running_threads = _start_threads(self._configs, self._board, lambda: False)
        self._await(State.RUNNING)

    def pause(self) -> None:
        """Returns when every write under way has ended, and no writer begins another one."""
        self._board.command = Command.PAUSE
        self._await(State.PAUSED)

    def resume(self) -> None:
        self._board.command = Command.RUN
        self._await(State.RUNNING)

    def stop(self) -> Summary:
        """Ends the writers, each after the write that it is at. Safe to repeat."""
        self._board.command = Command.STOP
        for process in self._running:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        for thread in self._running_threads:
            thread.join()
        return self.summary()

    def kill(self) -> None:
        """Ends the writer processes with SIGKILL, wherever they are: their last intents stay without an outcome."""
        for process in self._running:
            process.kill()
            process.wait()
        for config in self._configs:
            self._board.set_state(config.index, State.STOPPED)

    def mark(self, name: str) -> Mark:
        """Notes this moment under a name."""
        mark = Mark(name, time.monotonic(), self.acknowledged)
        self._marks.append(mark)
        return mark

    @property
    def acknowledged(self) -> int:
        """Acknowledged write transactions so far; up to date at once."""
        return self._board.total(Outcome.ACKNOWLEDGED)

    def await_writes(self, count: int, *, timeout_s: float = 60.0) -> None:
        """Returns when so many more writes were acknowledged. Raises Failed in time, or when a writer broke off."""
        enough, bound = self.acknowledged + count, time.monotonic() + timeout_s
        while self.acknowledged < enough:
            self._mark_dead_processes()
            if self.broken or time.monotonic() > bound:
                got = self.acknowledged - enough + count
                raise Failed(
                    f"{got} of {count} writes were acknowledged; writers that broke off: {self.broken or 'none'}"
                )
            time.sleep(0.005)

    @property
    def failed(self) -> int:
        """Errors that clients saw so far. Zero in a healthy run."""
        return self._board.total(Outcome.FAILED)

    def rate_since(self, mark: Mark) -> float:
        """Acknowledged writes a second from the mark until now."""
        return (self.acknowledged - mark.acknowledged) / max(time.monotonic() - mark.at, 1e-9)

    @property
    def broken(self) -> list[str]:
        """The writers that ended without being told to."""
        return [c.name for c in self._configs if self._board.state(c.index) is State.BROKEN]

    def summary(self) -> Summary:
        """The numbers so far, of every fleet of the directory. Exact when the writers are paused or stopped."""
        writes = ledger.read_writes(self._dir)
        failed = [w for w in writes if w.outcome is Outcome.FAILED]
        errors = [f"writer {name} broke off" for name in self.broken]
        errors += [f"{w.operation} of tenant {w.tenant} on {w.shard or '?'}: {w.error}" for w in failed[:ERRORS_KEPT]]
        return Summary(
            acknowledged=sum(w.outcome is Outcome.ACKNOWLEDGED for w in writes),
            unknown=sum(w.outcome is Outcome.UNKNOWN for w in writes),
            failed=len(failed) + len(self.broken),
            errors=tuple(errors),
            marks=tuple(self._marks),
            writes=writes,
        )

    def _take_baseline(self) -> None:
        config = self._configs[0]
        client = ShardClient(config.catalog_dsn, config.shard_dsns, keyspace=config.keyspace)
        try:
            take_baseline(
                self._dir, config.shard_dsns, lambda key: _patiently(partial(client.shard_of, key), config.deadline_s)
            )
        finally:
            client.close()

    def _await(self, state: State) -> None:
        """Waits until every writer that is still there is in that state."""
        bound = time.monotonic() + START_BOUND_S
        while any(self._board.state(c.index) not in (state, State.STOPPED, State.BROKEN) for c in self._configs):
            self._mark_dead_processes()
            if time.monotonic() > bound:
                raise Failed(f"the writers were not {state.name.lower()} within {START_BOUND_S:g} s")
            time.sleep(0.002)
        if state is State.RUNNING and self.broken:
            raise Failed(f"writers {', '.join(self.broken)} broke off", hint="what they printed tells why")

    def _mark_dead_processes(self) -> None:
        """A killed process cannot say so itself."""
        for position, process in enumerate(self._running):
            if process.poll() not in (None, 0):
                for config in self._configs[position :: self._processes]:
                    self._board.set_state(config.index, State.BROKEN)


def _by_name(mix: Mapping[Operation, float]) -> dict[str, float]:
    return {operation.__name__: weight for operation, weight in mix.items()}


def _start_threads(
    configs: Sequence[WriterConfig], board: Board, is_orphaned: Callable[[], bool]
) -> list[threading.Thread]:
    writers = [Writer(config, board, is_orphaned) for config in configs]
    threads = [threading.Thread(target=writer.run, daemon=True) for writer in writers]
    for thread in threads:
        thread.start()
    return threads


def _spawn(configs: Sequence[WriterConfig]) -> subprocess.Popen[bytes]:
    """Starts a writer process. Its standard input brings the configuration, stays open, and is what it lives by."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Linux shares a busy processor among sessions, and each of the server's is its own
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps([asdict(config) for config in configs]).encode() + b"\n")
    process.stdin.flush()
    return process


def _is_stdin_closed() -> bool:
    """Nothing is ever written after the configuration: readable means that the other end is gone."""
    return bool(select.select([0], [], [], 0)[0])


def main() -> None:
    """A writer process: one or several writers, until the board says stop or standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the fleet decides
    configs = [WriterConfig(**record) for record in json.loads(sys.stdin.buffer.readline())]
    for thread in _start_threads(configs, Board(configs[0].board_path), _is_stdin_closed):
        thread.join()


if __name__ == "__main__":
    main()
