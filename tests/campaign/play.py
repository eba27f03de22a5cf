"""One run: a scenario from its plan to its end, with one strike in it, judged from outside."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardmove.demo import check, ledger, shop
from shardmove.demo.ledger import Outcome
from shardmove.demo.writers import WriterFleet
from shardmove.domain.keys import KeyRange
from shardmove.domain.points import Effect
from shardmove.faults import REACHED
from tests.campaign import outside
from tests.campaign.commands import CODES, Command
from tests.campaign.ground import SHARDS, Ground, Place, is_stopped, wake
from tests.campaign.relay import Relay
from tests.campaign.scenarios import MOVE, MOVED_FROM, SCENARIOS, STALE_TENANT, TENANTS, Scenario
from tests.campaign.stale import StaleClient
from tests.campaign.strikes import ATTENDANT, COMMAND, NETWORK, STOPPED_SERVERS, WORKER, Spec

MOVED: Final = KeyRange(MOVED_FROM, None)
BOUND_S: Final = 120.0
"""No command takes as long; what does, hangs. A coordinator tries for a minute to finish what it flipped."""
DONE_BOUND_S: Final = 60.0
WRITES_BOUND_S: Final = 60.0
POLL_S: Final = 0.003
RATE: Final = 40.0
HALF_OPEN_S: Final = 2.2
LATE_S: Final = 0.8
STOPPED_ATTENDANT_S: Final = 2.0
ATTENDED_S: Final = 20.0
"""An attendant only fills the gaps that a command leaves: it is the more sure to come by after it, before the next."""
BUG_WORDS: Final = ("Traceback", "this is a bug of shardmove")
HELD_NOTHING: Final = frozenset(
    (
        Effect.END_HOLDER.before,
        Effect.END_HOLDER.after,
        Effect.TAKE_LEASE.before,
        Effect.GIVE_BACK.before,
        Effect.GIVE_BACK.after,
    )
)
"""Stopped here a command holds no lease yet, or has done all of its work: it may go on, and end well."""


@dataclass(slots=True)
class Result:
    """What one run came to. `hit`: the strike happened; else the rest says nothing."""

    spec: str
    hit: bool = False
    writes: int = 0
    lost: int = 0
    different: int = 0
    left: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    seconds: float = 0.0
    evidence: str = ""

    @property
    def ok(self) -> bool:
        return not (self.lost or self.different or self.left or self.failures)


@dataclass(slots=True)
class Recording:
    """How often each point was reached: by whom, in which step."""

    scenario: str
    counts: dict[tuple[int, str, str], int] = field(default_factory=dict)
    result: Result = field(default_factory=lambda: Result(""))


class NotHit(Exception):
    """The point was not reached this time."""


def play(ground: Ground, spec: Spec, *, twin: str = "", patience_s: float = DONE_BOUND_S) -> Result:
    """Never raises for what the engine does: that is in the result.

    Args:
        twin: the mechanism that commands go without.
        patience_s: for how long a command that fails is tried again.
    """
    return _Run(ground, SCENARIOS[spec.scenario], spec, twin, patience_s).result_of()


def record(ground: Ground, scenario: str) -> Recording:
    """Plays a scenario without any strike, and notes what is reached."""
    run = _Run(ground, SCENARIOS[scenario], None, "", DONE_BOUND_S)
    result = run.result_of()
    return Recording(scenario, dict(run.reached), result)


class _Run:
    def __init__(self, ground: Ground, scenario: Scenario, spec: Spec | None, twin: str, patience_s: float) -> None:
        self.ground = ground
        self.scenario = scenario
        self.spec = spec
        self.twin = twin
        self.patience_s = patience_s
        self.result = Result(str(spec) if spec else f"record {scenario.name}")
        self.reached: Counter[tuple[int, str, str]] = Counter()
        self.story: list[str] = []
        self.fleet: WriterFleet | None = None
        self.stale: StaleClient | None = None
        self.attendant: Command | None = None
        self.sleepers: list[Callable[[], None]] = []
        self.place: Place
        self.began = time.monotonic()

    def result_of(self) -> Result:
        with self.ground.place(self.scenario, twin=self.twin) as self.place:
            try:
                self._play()
            except NotHit:
                self.result.hit = False
            except TimeoutError as error:
                self._fail(f"hangs: {error}")
            except Exception as error:  # the evidence is worth more than a traceback that ends the campaign
                self._fail(f"{type(error).__name__}: {error}")
            self.result.story = self.story
            self.result.seconds = time.monotonic() - self.began
            if not self.result.ok:
                self._keep_evidence()
        return self.result

    # --- the story

    def _play(self) -> None:
        with ExitStack() as stack:
            self._begin_writing(stack)
            if self.scenario.serve:
                self.attendant = self._begin_serving(self.place.faults(ATTENDANT))
            if self.scenario.before:
                self._come_before(*self.scenario.before)
            for step in range(len(self.scenario.steps)):
                self._prepare(step)
                words = self._words(step)
                if self.spec is not None and self.spec.step == step:
                    self._strike(self.spec, words)
                elif self.spec is None:
                    self._record(step, words)
                else:
                    self._until_done(words)
            for wake_up in self.sleepers:
                wake_up()
            self._end_serving()
            self._await_write()
        self._judge()

    def _words(self, step: int) -> list[str]:
        words = self.scenario.words(step)
        return [self.place.move() if word == MOVE else word for word in words]

    def _begin_writing(self, stack: ExitStack) -> None:
        check.take_baseline(self.place.ledger, {"s1": self.place.shards["s1"]}, lambda _: "s1")
        if self.scenario.is_quiet:
            return
        tenants = [tenant for tenant in TENANTS if tenant != STALE_TENANT]
        self.fleet = WriterFleet(
            self.place.ledger,
            self.place.dsns["cat"],
            self.place.shards,
            tenants=tenants,
            focus=[tenant for tenant in tenants if tenant in MOVED],
            processes=0,
            threads=3,
            rate=RATE,
            deadline_s=self.patience_s,
        )
        stack.enter_context(self.fleet)
        self.stale = stack.enter_context(StaleClient(self.place.ledger, self.place.shards, STALE_TENANT))

    def _come_before(self, words: str, point: str, order: str) -> None:
        """The strike that belongs to the scenario."""
        faults = self.place.faults("before")
        _order(faults, point, "pause" if order == "kill" else order)
        command = self._start(words.replace(MOVE, self.place.move()).split(), faults=faults)
        pid = self._await_taken(faults, point, command, stops=order != "error")
        assert pid is not None, f"{point} was not reached"
        if order == "kill":
            command.signal(signal.SIGKILL)
        if order == "pause":
            self.place.will_wake(pid)
            self.sleepers.append(lambda: self._wake_zombie(command, pid, point))
            self._await_silence()
        else:
            self._end_of(command, codes=(-9,) if order == "kill" else CODES)

    def _await_silence(self) -> None:
        """Until whoever holds the move may be taken for dead."""
        query = "SELECT FROM shardmove_catalog.lease WHERE clock_timestamp() - beat_at > make_interval(secs => %s)"
        ttl_s = self.place.config.limits.lease_ttl_s + 0.05
        with outside.session(self.place.dsns["cat"]) as connection:
            while connection.execute(query, (ttl_s,)).fetchone() is None:
                time.sleep(0.02)

    def _prepare(self, step: int) -> None:
        if self.scenario.alters == step:
            for shard in SHARDS:
                self._execute(shard, "ALTER TABLE order_items ADD CONSTRAINT later CHECK (quantity > -1000000)")
        if self.scenario.damages == step:
            self._execute("s2", _DAMAGE.format(self.place.move(), MOVED_FROM))

    def _execute(self, shard: str, statement: str) -> None:
        with outside.session(self.place.dsns[shard]) as connection:
            connection.execute(statement.encode())

    def _record(self, step: int, words: Sequence[str]) -> None:
        places = {COMMAND: self.place.faults(COMMAND)}
        if self.scenario.serve:
            places[ATTENDANT] = self.place.faults(ATTENDANT)
        for directory in places.values():
            (directory / REACHED).write_text("")
        command = self._start(words, faults=places[COMMAND])
        code = self._end_of(command)
        if code != 0:
            self._fail(f"`{command}` ended with {code}, and nobody had struck")
        for who, directory in places.items():
            whole, _, _ = (directory / REACHED).read_text().rpartition("\n")  # an attendant may be at its next line
            for line in whole.splitlines():
                _, role, point = line.split()
                self.reached[step, ATTENDANT if who == ATTENDANT else role, point] += 1

    # --- commands

    def _start(self, words: Sequence[str], *, faults: Path | None = None, config: Path | None = None) -> Command:
        command = self.place.start(words, faults=faults, config=config)
        self._tell(f"`{command}` begins as process {command.pid}")
        return command

    def _end_of(self, command: Command, *, codes: Sequence[int] = CODES) -> int:
        code = command.wait(BOUND_S)
        self._tell(f"`{command}` (process {command.pid}) ended with {code}")
        said = command.said
        if code not in codes:
            self._fail(f"`{command}` ended with {code}: {_last_line(said)}")
        for words in BUG_WORDS:
            if words in said:
                line = next((line for line in said.splitlines() if words in line), words)
                self._fail(f"`{command}` ({command.err.name}): {line} {_last_line(said)}")
                break
        return code

    def _until_done(self, words: Sequence[str]) -> None:
        """The same command, until it says that it is done."""
        deadline = time.monotonic() + self.patience_s
        tries = 0
        while True:
            command = self._start(words)
            code = self._end_of(command, codes=(*CODES, 2))
            tries += 1
            if code == 0 or self._is_done_already(words, code):
                return
            if " is held by " not in command.said:
                self._note(f"`{command}` ended with {code} on its own: {_last_line(command.said)}")
            if code not in CODES:
                self._fail(f"`{command}` ended with {code}: {_last_line(command.said)}")
                return
            if time.monotonic() > deadline:
                self._fail(f"`{command}` does not come to its end in {tries} tries: {_last_line(command.said)}")
                return
            time.sleep(0.2)

    def _is_done_already(self, words: Sequence[str], code: int) -> bool:
        """What was done, and cannot be done again: the plan is there, or the catalog is not."""
        if words[0] == "plan" and code == 4:
            with outside.session(self.place.dsns["cat"]) as connection:
                return connection.execute("SELECT FROM shardmove_catalog.move").fetchone() is not None
        if words[0] == "uninstall" and code == 2:
            return "schema shardmove_catalog" not in outside.objects(self.place.dsns["cat"])
        return False

    # --- the attendant

    def _begin_serving(self, faults: Path | None = None) -> Command:
        command = self._start(["serve"], faults=faults)
        while "attending" not in command.said and not command.ended.wait(0.01):
            pass
        return command

    def _end_serving(self) -> None:
        if self.attendant is not None and not self.attendant.ended.is_set():
            self.attendant.signal(signal.SIGTERM)
            self._end_of(self.attendant, codes=(0,))
        elif self.attendant is not None:
            self._end_of(self.attendant, codes=(-9,))

    def _serve_alone(self) -> None:
        """Until nothing is half done: no attempt is open, and the range is written to."""
        serving = self._begin_serving()
        deadline = time.monotonic() + min(WRITES_BOUND_S, self.patience_s)
        while time.monotonic() < deadline:
            with outside.session(self.place.dsns["cat"]) as connection:
                query = "SELECT FROM shardmove_catalog.attempt WHERE outcome = 'open'"
                if connection.execute(query).fetchone() is None:
                    break
            time.sleep(0.02)
        else:
            self._fail("an attendant alone does not decide the attempt")
        self._await_write()
        serving.signal(signal.SIGTERM)
        self._end_of(serving, codes=(0,))

    # --- the strike

    def _strike(self, spec: Spec, words: Sequence[str]) -> None:
        relay = self.place.relay() if spec.victim in NETWORK else None
        config = self.place.config_through(relay) if relay is not None else None
        faults = self.place.faults(spec.role if spec.role == ATTENDANT else COMMAND)
        order = "error" if spec.victim == "error" else "pause"
        _order(faults, spec.point, order if spec.nth == 1 else "pause")
        command = self._start(words, faults=self.place.faults(COMMAND), config=config)
        pid = self._reach_nth(spec, faults, command, order)
        self.result.hit = True
        self._tell(f"{spec.victim} at {spec.point}, reached by process {pid}")
        self._act(spec, command, pid, relay)
        if spec.victim == "paused":
            zombie = lambda: self._wake_zombie(command, pid, spec.point)  # noqa: E731
            self._aftermath(spec, words)
            if spec.late:
                self.sleepers.append(zombie)
            else:
                zombie()
            return
        codes: Sequence[int] = CODES
        if spec.victim == "coordinator":
            codes = (-9,)
        elif spec.victim == "worker":
            codes = (0,)
        self._end_of(command, codes=codes)
        self._aftermath(spec, words)

    def _reach_nth(self, spec: Spec, faults: Path, command: Command, order: str) -> int:
        """Lets the point be passed until it is reached for the nth time. Raises NotHit where it is not."""
        passed = 0
        while True:
            is_last = passed + 1 == spec.nth
            stops = not (is_last and order == "error")
            comes_later = spec.role == ATTENDANT and spec.step + 1 < len(self.scenario.steps)
            pid = self._await_taken(faults, spec.point, command, stops=stops, after_s=ATTENDED_S if comes_later else 0)
            if pid is None:
                with suppress(FileNotFoundError):
                    (faults / spec.point).unlink()
                self._end_of(command)
                raise NotHit
            is_other = spec.role in (COMMAND, WORKER) and (pid == command.pid) != (spec.role == COMMAND)
            if is_other and stops:
                _order(faults, spec.point, "pause")
                wake(pid)
                continue
            passed += 1
            if passed == spec.nth:
                return pid
            _order(faults, spec.point, order if passed + 1 == spec.nth else "pause")
            wake(pid)

    def _await_taken(
        self, faults: Path, point: str, command: Command, *, stops: bool, after_s: float = 0.0
    ) -> int | None:
        """The process that took the order, once it stands still; None where it did not come by.

        Args:
            after_s: for how long after the command's end it may still come.
        """
        deadline = time.monotonic() + BOUND_S
        last_chance: float | None = None
        while True:
            if last_chance is None and command.ended.is_set():
                last_chance = time.monotonic() + after_s
            has_ended = last_chance is not None and time.monotonic() >= last_chance
            for path in faults.glob(f"{point}.taken.*"):
                pid = int(path.name.rpartition(".")[2])
                try:
                    if stops and not is_stopped(pid):
                        continue
                except ProcessLookupError:
                    if not has_ended:
                        continue
                path.unlink()
                self.place.will_wake(pid)
                return pid
            if has_ended:
                return None
            if time.monotonic() > deadline and last_chance is None:
                raise TimeoutError(f"`{command}` neither reached {point} nor ended")
            time.sleep(POLL_S)

    def _act(self, spec: Spec, command: Command, pid: int, relay: Relay | None) -> None:
        match spec.victim:
            case "coordinator":
                command.signal(signal.SIGKILL)
                if spec.role == WORKER and not spec.late:
                    wake(pid)
                elif spec.role == WORKER:
                    self.sleepers.append(lambda: wake(pid))
            case "worker" | "attendant":
                os.kill(pid, signal.SIGKILL)
                wake(pid)
            case "attendant-paused":
                command.ended.wait(STOPPED_ATTENDANT_S)
                wake(pid)
            case "source" | "target" | "catalog":
                server = self.ground.servers[STOPPED_SERVERS[spec.victim]]
                server.stop("immediate")
                if spec.late:
                    wake(pid)
                    command.ended.wait(LATE_S)
                server.start()
                wake(pid)
            case "cut":
                assert relay is not None
                self._tell(f"{relay.cut(spec.server)} connections to {spec.server} are cut")
                wake(pid)
            case "half-open":
                assert relay is not None
                self._tell(f"{relay.freeze(spec.server)} connections to {spec.server} hang")
                wake(pid)
                command.ended.wait(HALF_OPEN_S)
                relay.cut_frozen()
            case "error" | "paused":
                pass
            case other:
                raise AssertionError(other)

    def _aftermath(self, spec: Spec, words: Sequence[str]) -> None:
        if spec.aftermath == "race":
            for command in [self._start(words), self._start(words)]:
                self._end_of(command)
        if spec.aftermath == "serve":
            self._serve_alone()
        self._until_done(words)
        if spec.aftermath == "twice" and words[0] not in ("plan", "uninstall"):
            before = self._signature()
            self._until_done(words)
            for each in outside.changed(before, self._signature()):
                self._fail(f"`{' '.join(words)}` once more: {each}")

    def _wake_zombie(self, command: Command, pid: int, point: str) -> None:
        before = self._signature()
        self._tell(f"process {pid} goes on")
        wake(pid)
        # where all of ours was removed meanwhile, there is no catalog to go on with
        code = self._end_of(command, codes=(*CODES, 2) if self.scenario.is_removed else CODES)
        if code == 0 and point not in HELD_NOTHING:
            self._note(f"`{command}` ended with 0 after it was overtaken at {point}")
        for each in outside.changed(before, self._signature()):
            self._fail(f"`{command}`, overtaken at {point}: {each}")

    def _signature(self) -> dict[str, object]:
        return outside.signature(self.place.dsns["cat"], self.place.shards)

    # --- the verdict

    def _await_write(self) -> None:
        """Returns when a write to the range, begun from now on, was acknowledged."""
        if self.fleet is None:
            return
        since = time.monotonic()
        while not any(
            write.started > since and write.tenant in MOVED and write.outcome is Outcome.ACKNOWLEDGED
            for write in ledger.read_writes(self.place.ledger)
        ):
            if time.monotonic() > since + min(WRITES_BOUND_S, self.patience_s):
                self._fail(f"nobody can write to the range any more (writers that broke off: {self.fleet.broken})")
                return
            time.sleep(0.02)

    def _judge(self) -> None:
        """Nobody writes any more, and nothing of ours runs."""
        owner = {"completed": "s2", "rolled_back": "s1"}[self.scenario.ends]
        other = {"s1": "s2", "s2": "s1"}[owner]
        self._judge_rows(owner, other)
        if self.scenario.is_removed:
            gave_away = None
            if "schema shardmove_catalog" in outside.objects(self.place.dsns["cat"]):
                self.result.left.append("cat: left over: schema shardmove_catalog")
        else:
            gave_away = self._gave_away(owner, other)
            self.result.left += outside.left_in_catalog(self.place.dsns["cat"], [self.scenario.ends])
        altered = {"constraint later on public.order_items"} if self.scenario.alters is not None else set()
        for shard in SHARDS:
            before = self.ground.before[shard] | altered
            if gave_away is None:
                now = outside.objects(self.place.dsns[shard])
                self.result.left += [f"{shard}: {each}" for each in sorted(now ^ before)]
                continue
            left = outside.left_on_shard(
                self.place.dsns[shard], before, gave_away=shard in gave_away, tables=tuple(shop.KEY_COLUMNS)
            )
            self.result.left += [f"{shard}: {each}" for each in left]
        self.result.left += outside.left_in_memory(self.place.dsns)

    def _gave_away(self, owner: str, other: str) -> set[str]:
        """The shards that owned the range and do not any more."""
        with outside.session(self.place.dsns["cat"]) as connection:
            row = connection.execute("SELECT FROM shardmove_catalog.attempt WHERE outcome = 'flipped'").fetchone()
            routes = connection.execute("SELECT shard FROM shardmove_catalog.current_routes WHERE upper IS NULL")
            (named,) = routes.fetchone() or ("",)
        if named != owner:
            self._fail(f"the route table names {named} as the owner, and it is {owner}")
        return {other} if row is not None else set()

    def _judge_rows(self, owner: str, other: str) -> None:
        report = check.check(
            self.place.ledger,
            self.place.shards,
            lambda tenant: owner if tenant in MOVED else "s1",
            absent_on={other: [MOVED]} if other != "s1" or owner != "s1" else None,
        )
        self.result.writes = report.acknowledged
        self.result.lost = report.lost
        self.result.different = report.different + report.unexpected
        for line in report.details:
            self._tell(line)
        if self.fleet is not None:
            self.result.failures += [f"a client: {error}" for error in self.fleet.summary().errors]
        if self.stale is not None:
            self.result.failures += [f"a stale client: {error}" for error in self.stale.trouble]

    # --- what is told

    def _tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:7.3f}  {text}")

    def _note(self, text: str) -> None:
        self._tell(text)
        self.result.notes.append(text)

    def _fail(self, text: str) -> None:
        self._tell(text)
        self.result.failures.append(text)

    def _keep_evidence(self) -> None:
        """The story, and what the servers say, beside the outputs of the commands."""
        directory = self.place.directory
        lines = [str(self.result.spec), *self.story, "", *self.result.failures, *self.result.left, ""]
        with suppress(Exception), outside.session(self.place.dsns["cat"]) as connection:
            for query in ("move", "attempt", "lease", "event"):
                rows = connection.execute(f"SELECT t::text FROM shardmove_catalog.{query} t".encode()).fetchall()
                lines += [query, *(row[0] for row in rows), ""]
        for shard, dsn in self.place.shards.items():
            with suppress(Exception), outside.session(dsn) as connection:
                rows = connection.execute("SELECT t::text FROM shardmove.fence t").fetchall()
                lines += [f"fence of {shard}", *(row[0] for row in rows)]
        for server in self.ground.servers:
            with suppress(FileNotFoundError):
                tail = server.log.read_text(encoding="utf-8", errors="replace")[-6000:]
                (directory / f"server-{server.name}.log").write_text(tail, encoding="utf-8")
        (directory / "story.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.result.evidence = self.ground.keep(directory)


_DAMAGE: Final = """
    SELECT set_config('shardmove.mirror', '{}', false);
    UPDATE customers SET name = 'damaged behind the fence' WHERE tenant_id = {}
"""


def _order(faults: Path, point: str, what: str) -> None:
    unfinished = faults / f".{point}"
    unfinished.write_text(what, encoding="utf-8")
    unfinished.rename(faults / point)


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip() and not line.strip().startswith("hint:")]
    return lines[-1] if lines else "(silence)"
