"""The router beside PgBouncer and a bare server: pgbench with a script that reads one row of a split table.

python -m benchmarks.router                      prints the table; the figures go to .benchmarks/router.json
python -m benchmarks.router --seconds 5 --rounds 3 --clients 1 8 32 --modes simple prepared

In a round each path is measured, one after the other, in another order each time; the figures are medians over rounds.

    tps           transactions a second, as pgbench counts them; `of PgBouncer` is the ratio to its
    p50, p99      latency in µs, from pgbench's log; `added`: the difference to the direct path in the same round
    cpu           user and system time of the proxy's processes in µs, a query
    memory        resident, of the proxy's processes, in MB
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

import psutil

from benchmarks.paths import DBNAME, Site, Way, site
from shardmove.postgres.embedded import LOOPBACK, SUPERUSER

MODES: Final = ("simple", "prepared")
CLIENTS: Final = (1, 8, 32)
SECONDS: Final = 5
ROUNDS: Final = 3
ROWS: Final = 50_000
THREADS_MAX: Final = 2  # of pgbench: one alone is the limit before any proxy is
LOGGED: Final = "0.5"  # of the transactions: the log must not be what is measured
Case = tuple[str, int]
"""pgbench's mode, and how many clients."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of pgbench. Times in µs."""

    tps: float
    p50: float
    p99: float
    cpu: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The medians of a path."""

    mode: str
    clients: int
    path: str
    tps: float
    tps_of_pooler: float | None
    p50: float
    p99: float
    added_p50: float
    added_p99: float
    cpu: float
    memory_mb: float


def main() -> int:
    asked = _asked()
    with site(asked.rows, asked.modes) as prepared:
        cases = [(mode, clients) for mode in asked.modes for clients in asked.clients]
        rounds = measure(prepared, cases, rounds=asked.rounds, seconds=asked.seconds)
        notes = [way.note for way in prepared.ways if way.note] or ["PgBouncer is not installed: no figures of it"]
    rows = figures(rounds)
    print("\n".join([table(rows), *notes]), flush=True)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"seconds": asked.seconds, "rounds": asked.rounds, "notes": notes, "figures": list(map(asdict, rows))}
    asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


# --- measuring

Round = Mapping[tuple[Case, str], Sample]


def measure(prepared: Site, cases: Sequence[Case], *, rounds: int, seconds: int) -> list[Round]:
    for way in prepared.ways:  # connections are opened, plans and pages cached
        for mode, clients in cases:
            pgbench(prepared, way, (mode, clients), 1)
    measured = []
    for _ in range(rounds):
        found: dict[tuple[Case, str], Sample] = {}
        for case in cases:
            for way in random.sample(list(prepared.ways), len(prepared.ways)):
                found[case, way.name] = sample(prepared, way, case, seconds)
        measured.append(found)
    return measured


def sample(prepared: Site, way: Way, case: Case, seconds: int) -> Sample:
    processes = way.processes(case[0])
    latencies: list[int] = []
    while not latencies:  # in a short run, while the machine did something else, it may be that nothing was logged
        before = _cpu_s(processes)
        transactions, tps, latencies = pgbench(prepared, way, case, seconds)
        cpu_s = _cpu_s(processes) - before
    return Sample(
        tps=tps,
        p50=_share(latencies, 0.5),
        p99=_share(latencies, 0.99),
        cpu=cpu_s * 1e6 / transactions,
        memory_mb=sum(process.memory_info().rss for process in processes) / 2**20,
    )


def pgbench(prepared: Site, way: Way, case: Case, seconds: int) -> tuple[int, float, list[int]]:
    """Returns transactions, transactions a second without the time to connect, and a part of the latencies."""
    mode, clients = case
    with tempfile.TemporaryDirectory(prefix="pgbench-") as directory:
        command = [
            *(str(prepared.pgbench), "--no-vacuum", "--file", str(prepared.script), "--protocol", mode),
            *("--client", str(clients), "--jobs", str(min(clients, THREADS_MAX)), "--time", str(seconds)),
            *("--log", "--log-prefix", f"{directory}/log", "--sampling-rate", LOGGED),
            *("--host", LOOPBACK, "--port", str(way.ports[mode]), "--username", SUPERUSER, DBNAME),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60)
        assert ended.returncode == 0, f"{way.name}, {mode}, {clients} clients: {ended.stderr}"
        latencies = [int(line.split()[2]) for log in Path(directory).glob("log*") for line in log.open()]
    said = ended.stdout
    transactions = int(_after(said, "number of transactions actually processed: ").split("/")[0])
    assert int(_after(said, "number of failed transactions: ", "0").split()[0]) == 0, said
    return transactions, float(_after(said, "tps = ").split()[0]), latencies


def _after(said: str, head: str, default: str = "") -> str:
    lines = [line.removeprefix(head) for line in said.splitlines() if line.startswith(head)]
    assert lines or default, said
    return lines[0] if lines else default


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def _share(latencies: Sequence[int], share: float) -> float:
    ordered = sorted(latencies)
    return float(ordered[int((len(ordered) - 1) * share)])


# --- telling


def figures(rounds: Sequence[Round]) -> list[Figures]:
    found = []
    for case, name in sorted(rounds[0], key=lambda key: (MODES.index(key[0][0]), key[0][1])):
        own = [each[case, name] for each in rounds]
        direct = [each[case, "direct"] for each in rounds]
        pooler = median(each[case, "PgBouncer"].tps for each in rounds) if (case, "PgBouncer") in rounds[0] else None
        tps = median(each.tps for each in own)
        found.append(
            Figures(
                mode=case[0],
                clients=case[1],
                path=name,
                tps=tps,
                tps_of_pooler=None if pooler is None else tps / pooler,
                p50=median(each.p50 for each in own),
                p99=median(each.p99 for each in own),
                added_p50=median(mine.p50 - bare.p50 for mine, bare in zip(own, direct, strict=True)),
                added_p99=median(mine.p99 - bare.p99 for mine, bare in zip(own, direct, strict=True)),
                cpu=median(each.cpu for each in own),
                memory_mb=max(each.memory_mb for each in own),
            )
        )
    order = ("direct", "PgBouncer", "router ×1", "router ×2")
    return sorted(found, key=lambda row: (MODES.index(row.mode), row.clients, order.index(row.path)))


def table(rows: Sequence[Figures]) -> str:
    heads = ("tps", "of PgBouncer", "p50 µs", "p99 µs", "added p50", "added p99", "cpu µs/query", "memory MB")
    lines = [f"{'':32}" + "".join(f"{head:>14}" for head in heads)]
    for row in rows:
        ratio = "" if row.tps_of_pooler is None else f"{row.tps_of_pooler:.2f}"
        cells = [f"{row.tps:,.0f}", ratio, f"{row.p50:,.0f}", f"{row.p99:,.0f}"]
        if row.path != "direct":
            cells += [f"{row.added_p50:,.0f}", f"{row.added_p99:,.0f}", f"{row.cpu:.1f}", f"{row.memory_mb:.0f}"]
        name = f"{row.mode}, {row.clients} client{'s' if row.clients > 1 else ''}, {row.path}"
        lines.append(f"{name:32}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rounds = int(os.environ.get("SHARDMOVE_BENCH_ROUNDS", ROUNDS))
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each run of pgbench")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--json", type=Path, default=Path(".benchmarks/router.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
