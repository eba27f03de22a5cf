"""The demo: a shop's shard is split under load, on servers of its own, by the commands that an operator types.

    servers        a catalog, s1 with every tenant, s2 empty; fsync on
    router         one address for both shards, a process of its own; the writers know nothing else
    writers        processes with a plain driver: single statements, and transactions in three isolation levels; nearly
                   all of them write to the tenants that move
    commands       apply, plan, preflight, run, cutover, revert, cutover, …, verify, complete; `serve` beside them
    verdict        the clients' own ledger against every row of both shards, by plain SQL

What it promises is in `Result.ok`: nothing lost, nothing different, no error that a client saw. A transaction may be
told to try again by PostgreSQL itself, as ever above READ COMMITTED; by a cutover only where it did not begin with a
write to the moving range, or took that write back. A single statement gets no error at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import psycopg
from rich.console import Console

from shardmove.catalog.store import Catalog
from shardmove.demo import check, pages, shop
from shardmove.demo.front import MAKE_ROLE, Front
from shardmove.demo.measure import Behaviour, Stall, Window, behaviour, percentile
from shardmove.demo.operations import LATE, MIX, change_order, rename_tenant, upsert_item
from shardmove.demo.writers import Summary, WriterFleet
from shardmove.domain.errors import DifferencesFound, Failed
from shardmove.domain.keys import KeyRange
from shardmove.postgres.embedded import Cluster

SOURCE: Final = "s1"
TARGET: Final = "s2"
TENANTS: Final = range(1, 401)
SPLIT_AT: Final = 201
STAYING, MOVING = KeyRange(None, SPLIT_AT), KeyRange(SPLIT_AT, None)

PROCESSES: Final = 8
RATE_S: Final = 90.0
"""Writes a second that each writer process begins."""
SINGLES_SHARE: Final = 0.6
"""Of them so many are single statements, the others transactions."""
FOCUS_SHARE: Final = 0.95
LIGHT_MIX: Final = {**MIX, rename_tenant: 60, upsert_item: 40, change_order: 60}
"""Every operation, and many small ones: the clients share two cores with three servers and the move."""
WRITES_S_MIN: Final = 500.0
"""Acknowledged writes a second into the moving range that every step is to bear."""
ROUNDS: Final = 2
"""How often the range is cut over; between two of them it is reverted."""
REST_S: Final = 1.5
"""How long the mirror is watched alone before each cutover."""

ASKED: Final = (
    f"EXPLAIN (COSTS OFF) SELECT * FROM orders WHERE tenant_id = {SPLIT_AT} AND order_id = 1",
    f"SELECT tenant_id, name FROM tenants WHERE tenant_id IN ({SPLIT_AT - 1}, {SPLIT_AT}) ORDER BY tenant_id DESC",
    f"UPDATE tenants SET tenant_id = {SPLIT_AT} WHERE tenant_id = {SPLIT_AT - 1}",
)
"""Asked of the router when the tenants are on two shards: where a statement goes, one to both, and one to none."""


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch of the protocol, in `time.monotonic()`."""

    name: str
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Cutover:
    """A change of the owner: when the range was held for it, and when the owner changed, by the catalog's events.

    On the clock of `time.monotonic()`; of several attempts, `held` is that of the first one.
    """

    step: Step
    new_owner: str
    held: float
    flipped: float


@dataclass(slots=True)
class Result:
    """What the demo measured, and the checker's report. `routed`: the router's own counters."""

    tables: Sequence[Mapping[str, Any]]
    steps: Sequence[tuple[Step, Window]]
    stalls: Sequence[tuple[Cutover, Stall | None]]
    clients: Behaviour
    routed: Mapping[str, int]
    report: check.Report
    errors: Sequence[str]
    elapsed_s: float

    @property
    def ok(self) -> bool:
        is_unnoticed = not self.clients.single_errors and not self.clients.fenced_first
        return self.report.ok and is_unnoticed and not self.report.failed and not self.errors

    @property
    def slow_steps(self) -> list[str]:
        """Steps in which fewer writes came through than every step is to bear."""
        return [step.name for step, window in self.steps if window.rate_s < WRITES_S_MIN]

    def stall_ms(self, percent: float) -> float:
        """Over the cutovers."""
        return percentile(sorted(stall.stall_ms for _, stall in self.stalls if stall is not None), percent)

    def document(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "ok": self.ok,
            "tables": [
                {"table": t["table"], "moved": t["rows_source"], "verified": t["rows_target"]} for t in self.tables
            ],
            "steps": [
                {
                    "step": step.name,
                    "seconds": window.seconds,
                    "acknowledged": window.acknowledged,
                    "rate_s": window.rate_s,
                    "by_isolation": dict(window.by_isolation),
                }
                for step, window in self.steps
            ],
            "stall_ms": {"p50": self.stall_ms(50), "p99": self.stall_ms(99), "max": self.stall_ms(100)},
            "cutovers_ms": [None if stall is None else stall.stall_ms for _, stall in self.stalls],
            "clients": asdict(self.clients),
            "router": {name: self.routed[name] for name in COUNTERS},
            "check": {name: value for name, value in asdict(self.report).items() if name != "details"},
            "errors": list(self.errors),
            "elapsed_s": self.elapsed_s,
        }


COUNTERS: Final = ("statements", "routed", "held_total", "retried", "refused")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


Typist: TypeAlias = Callable[[Sequence[str]], Done]
"""Runs the words behind `shardmove`. In this process: on two cores, starting Python for each command would be most of
what is measured."""


def tell(console: Console, typist: Typist, *, rows: int) -> Result:
    """Plays the whole story, and prints it as it happens.

    Raises:
        DifferencesFound: the ledger and the shards disagree, or a client saw an error; printed before.
        Failed: a command of the story ended as it should not.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardmove-demo-")))
        pages.say(console, "three PostgreSQL servers, fsync on: a catalog, s1, s2")
        cluster = stack.enter_context(Cluster(["catalog", SOURCE, TARGET]))
        stage = Stage(console, typist, directory, cluster)
        stage.open_the_shop(rows)
        result = stage.play(started)
    pages.show(console, result)
    if not result.ok:
        raise DifferencesFound("the demo found damage: see above", hint="this is a bug of shardmove; please report it")
    return result


@dataclass(slots=True)
class Stage:
    """Everything that the story needs: servers, writers, and the commands with their times."""

    console: Console
    typist: Typist
    directory: Path
    cluster: Cluster
    steps: list[Step] = field(default_factory=list)
    cutovers: list[Cutover] = field(default_factory=list)
    front: Front = field(init=False)

    def __post_init__(self) -> None:
        self.front = Front(self.config_file, self.directory / "router.log")

    @property
    def shards(self) -> dict[str, str]:
        return {name: self.cluster[name].dsn for name in (SOURCE, TARGET)}

    @property
    def catalog_dsn(self) -> str:
        return self.cluster["catalog"].dsn

    @property
    def config_file(self) -> Path:
        return self.directory / "cluster.toml"

    # --- before the curtain

    def open_the_shop(self, rows: int) -> None:
        """Makes the shop on both shards, fills it on the source, and writes the configuration."""
        for dsn in self.shards.values():
            with psycopg.connect(dsn, autocommit=True) as connection:
                shop.create(connection)
                for statement in MAKE_ROLE:
                    connection.execute(statement)
        with psycopg.connect(self.shards[SOURCE], autocommit=True) as connection:
            loaded = shop.load(connection, TENANTS, rows=rows)
        pages.say(self.console, f"a shop of {loaded:,} rows, {len(TENANTS)} tenants, all of them on {SOURCE}")
        text = pages.configuration(self.catalog_dsn, self.shards) + self.front.section
        self.config_file.write_text(text, encoding="utf-8")

    # --- the play

    def play(self, started: float) -> Result:
        """From `apply` to the check of every row."""
        self.command("apply")
        with self.serving(), self.routing(), self.fleet() as fleet:
            pages.say(self.console, f"{PROCESSES} writer processes, all isolation levels, most writes where it moves")
            move_id = self.split()
            self.swing(move_id)
            tables = self.verify(move_id)
            self.timed("complete", "complete", move_id)
            fleet.pause()
            self.ask()
            routed = self.front.stats()
        pages.say(self.console, "the writers have stopped; every row of both shards against the clients' ledger")
        report = check.check(
            self.directory / "ledger",
            self.shards,
            {SOURCE: [STAYING], TARGET: [MOVING]},
            absent_on={SOURCE: [MOVING], TARGET: [STAYING]},
        )
        return self.result(fleet.summary(), tables, routed, report, started)

    def fleet(self) -> WriterFleet:
        return WriterFleet(
            self.directory / "ledger",
            self.catalog_dsn,
            self.shards,
            tenants=TENANTS,
            processes=PROCESSES,
            rate=RATE_S,
            focus=TENANTS[SPLIT_AT - TENANTS.start :],
            focus_share=FOCUS_SHARE,
            operations=LIGHT_MIX,
            router_dsn=self.front.dsn,
            singles_share=SINGLES_SHARE,
        )

    def split(self) -> str:
        """Plans the split and runs it until the target is copied, mirrored and verified."""
        self.command("plan", "split", shop.KEYSPACE, "--at", str(SPLIT_AT), "--to", TARGET)
        with Catalog.connect(self.catalog_dsn) as catalog:
            (move_id,) = (move.id for move in catalog.moves())
        self.command("preflight", move_id)
        began = time.monotonic()
        self.command("run", move_id)
        self.steps += self.states(move_id, began)
        return move_id

    def states(self, move_id: str, began: float) -> Iterator[Step]:
        """What the run went through, by the catalog's own events."""
        to_monotonic = time.monotonic() - time.time()
        names = {"copying": "initialize", "verifying": "copy", "ready": "verify"}
        since = began
        with Catalog.connect(self.catalog_dsn) as catalog:
            changes = [each for each in catalog.events(move_id) if each.detail.get("after") in names]
        for each in changes:
            until = each.at.timestamp() + to_monotonic
            yield Step(names[each.detail["after"]], since, until)
            since = until

    def swing(self, move_id: str) -> None:
        """Cuts over, reverts, and cuts over again; before each the mirror is watched alone for a while."""
        for number in range(1, 2 * ROUNDS):
            is_forward = number % 2 == 1
            self.rest("ready, mirrored" if is_forward else "switched, mirrored back")
            verb, owner = ("cutover", TARGET) if is_forward else ("revert", SOURCE)
            self.cutovers.append(self.seen(move_id, self.timed(verb, verb, move_id), owner))
        self.rest("switched, mirrored back")

    def seen(self, move_id: str, step: Step, owner: str) -> Cutover:
        """The cutover that the step was, as the catalog tells it."""
        to_monotonic = time.monotonic() - time.time()
        times: dict[str, list[float]] = {"attempt_opened": [], "attempt_flipped": []}
        with Catalog.connect(self.catalog_dsn) as catalog:
            for each in catalog.events(move_id):
                at = each.at.timestamp() + to_monotonic
                if each.kind in times and step.since <= at <= step.until:
                    times[each.kind].append(at)
        return Cutover(step, owner, min(times["attempt_opened"]), max(times["attempt_flipped"]))

    def ask(self) -> None:
        """Shows where statements go."""
        for statement in ASKED:
            pages.asked(self.console, statement)
            pages.printed(self.console, "\n".join(self.front.ask(statement)))

    def verify(self, move_id: str) -> Sequence[Mapping[str, Any]]:
        """Rows of each table, read on both sides once more."""
        began = time.monotonic()
        verdict = json.loads(self.type("verify", move_id, "--json"))
        self.steps.append(Step("verify once more", began, time.monotonic()))
        pages.printed(self.console, "equal" if verdict["equal"] else "the two sides differ")
        tables: Sequence[Mapping[str, Any]] = verdict["tables"]
        return tables

    def result(
        self,
        summary: Summary,
        tables: Sequence[Mapping[str, Any]],
        routed: Mapping[str, int],
        report: check.Report,
        started: float,
    ) -> Result:
        def moves(tenant: int) -> bool:
            return tenant in MOVING

        late = {operation.__name__ for operation in LATE}
        disturbed = [
            f"{w.operation} of tenant {w.tenant} was told by a cutover to try again"
            for w in summary.writes
            if w.fenced and moves(w.tenant) and w.operation not in late
        ]
        return Result(
            tables=tables,
            steps=[(step, summary.window(step.since, step.until, within=moves)) for step in self.steps],
            stalls=[(each, summary.stall_around(each.held, each.flipped, within=moves)) for each in self.cutovers],
            clients=behaviour(summary.writes, within=moves, late=late),
            routed=routed,
            report=report,
            errors=[*summary.errors, *disturbed],
            elapsed_s=time.monotonic() - started,
        )

    # --- commands

    def command(self, *words: str) -> None:
        """Types a command, and shows what it prints. Raises Failed where it does not end with 0."""
        pages.printed(self.console, self.type(*words))

    def type(self, *words: str) -> str:
        """The same, and returns what it would show."""
        pages.typed(self.console, words)
        done = self.typist([*words, "-c", str(self.config_file)])
        if done.exit_code:
            pages.printed(self.console, done.stdout)
            raise Failed(f"shardmove {' '.join(words)} ended with {done.exit_code}: {done.stderr.strip()}")
        return done.stdout

    def timed(self, name: str, *words: str) -> Step:
        """A command that is a step of its own."""
        began = time.monotonic()
        self.command(*words)
        self.steps.append(Step(name, began, time.monotonic()))
        return self.steps[-1]

    def rest(self, name: str) -> None:
        """Lets the writers write while nothing but the mirror runs."""
        began = time.monotonic()
        time.sleep(REST_S)
        self.steps.append(Step(name, began, time.monotonic()))

    @contextmanager
    def routing(self) -> Iterator[None]:
        """`shardmove router serve` in the background: the one address of the shop's programs."""
        pages.typed(self.console, ("router", "serve", "&"))
        with self.front:
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """`shardmove serve` in the background: it mirrors whenever no other command does."""
        pages.typed(self.console, ("serve", "&"))
        log = (self.directory / "serve.log").open("wb")
        command = [sys.executable, "-m", "shardmove", "serve", "--until-eof", "-c", str(self.config_file)]
        with (
            log,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True) as process,
        ):
            try:
                yield
            finally:
                process.terminate()
