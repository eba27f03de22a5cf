"""One run of the bank: clients, moves and strikes at once, then the verdict."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from shardmove.demo import ledger
from shardmove.demo.ledger import Outcome, Write
from tests.bank.clients import Client, Told
from tests.bank.ground import Ground
from tests.bank.mover import Mover
from tests.bank.strikes import Strikes
from tests.bank.verdict import Verdict, judge
from tests.support.router import Router

CLIENTS: Final = 16
MOVER_BOUND_S: Final = 400.0
CLIENT_BOUND_S: Final = 400.0
DETAILS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Played:
    """What a run did and found. `ok`: nothing wrong was told to a client, nothing is wrong in the accounts."""

    seed: int
    seconds: float
    told: Told
    verdict: Verdict
    moves: Mapping[str, int]
    stalls_ms: Sequence[float]
    strikes: int
    writes: Sequence[Write]
    failures: Sequence[str]

    @property
    def ok(self) -> bool:
        return not (self.failures or self.told.wrong) and self.verdict.ok

    @property
    def acknowledged(self) -> int:
        return sum(write.outcome is Outcome.ACKNOWLEDGED for write in self.writes)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.seconds:.0f} s, {self.strikes} routers killed", *self._operations()]
        lines.append("moves: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.moves.items())))
        if self.stalls_ms:
            lines.append(
                f"stall of a cutover: median {median(self.stalls_ms):.0f} ms, max {max(self.stalls_ms):.0f} ms"
            )
        lines += [f"FAILED: {failure}" for failure in self.failures]
        lines += [f"WRONG ({len(self.told.wrong)}): {each}" for each in self.told.wrong[:DETAILS_MAX]]
        return "\n".join([*lines, str(self.verdict)])

    def _operations(self) -> Iterator[str]:
        heads = ("done", "unknown", "failed", "40001", "lost", "p50 ms", "p99 ms", "max ms")
        yield " " * 22 + "".join(f"{head:>9}" for head in heads)
        for name in sorted({name for name, _ in self.told.counts}):
            counts = [self.told.counts[name, what] for what in (*_OUTCOMES, "40001", "connection lost")]
            took = sorted((write.ended - write.started) * 1000 for write in self.writes if write.operation == name)
            times = [took[int((len(took) - 1) * share)] for share in (0.5, 0.99, 1.0)] if took else []
            yield f"{name:22}" + "".join(f"{count:9}" for count in counts) + "".join(f"{t:9.1f}" for t in times)


_OUTCOMES: Final = tuple(outcome.value for outcome in (Outcome.ACKNOWLEDGED, Outcome.UNKNOWN, Outcome.FAILED))


def play(
    ground: Ground,
    routers: Sequence[Router],
    directory: Path,
    *,
    seed: int,
    seconds: float,
    clients: int = CLIENTS,
    rate: float = 25.0,
    strike_every_s: float = 6.0,
    moves: bool = True,
) -> Played:
    """Runs it all for about so long; the plan under way at the end is finished, as are the clients' transactions.

    `rate`: operations a second of each client, at most.
    """
    directory.mkdir(parents=True)
    ledger.write_baseline(directory, {"transfers": {}})
    told = Told()
    began = time.monotonic()
    mover = Mover(ground, seed)
    strikes = Strikes(routers, seed, strike_every_s)
    crowd = [Client(index, routers, directory, told, seed=seed, rate=rate) for index in range(clients)]
    with _ended(crowd, CLIENT_BOUND_S, told), _ended([strikes], MOVER_BOUND_S, told):
        for client in crowd:
            client.start()
        with _ended([mover] if moves else [], MOVER_BOUND_S, told):
            if moves:
                mover.start()
            strikes.start()
            _watch(began + seconds, lambda: mover.failed or strikes.failed)
    return Played(
        seed=seed,
        seconds=time.monotonic() - began,
        told=told,
        verdict=judge(ground, directory),
        moves=mover.done,
        stalls_ms=mover.stalls_ms,
        strikes=strikes.count,
        writes=ledger.read_writes(directory),
        failures=[f"{what.name}: {what.failed!r}" for what in (mover, strikes) if what.failed is not None],
    )


def _watch(until: float, failed: Callable[[], object]) -> None:
    while time.monotonic() < until and not failed():
        time.sleep(0.1)


@contextmanager
def _ended(threads: Sequence[Client | Mover | Strikes], bound_s: float, told: Told) -> Iterator[None]:
    """Whatever the block does: they are told to stop, and awaited. Those that never started are none of ours."""
    try:
        yield
    finally:
        for thread in threads:
            thread.stop()
        deadline = time.monotonic() + bound_s
        for thread in threads:
            if thread.ident is not None:
                _join(thread, deadline, told)


def _join(thread: threading.Thread, deadline: float, told: Told) -> None:
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        told.note(f"{thread.name} did not end")
