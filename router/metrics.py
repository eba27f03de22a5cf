"""What the router counts, and its page for Prometheus.

The traffic path adds to plain integers; everything else happens when somebody reads. The page is served by a thread of
its own: it reads while the loop writes, and sees each number as it is at that moment, not all of them at one moment.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from shardmove.config import Address

if TYPE_CHECKING:
    from router.service import Router

BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
PREFIX: Final = "shardmove_router"


class Histogram:
    """Counts of durations by upper bound. `counts` has one element more than BOUNDS_S: what is above them all."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of an upper bound and how many were at or below it."""
        total, pairs = 0, []
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs


class Stats:
    """Numbers of one process since its start. All only grow, but `held_now`."""

    COUNTERS: Final = {
        "clients": "clients that logged in",
        "queries": "messages that asked for something: simple queries, and executions",
        "transactions": "transactions that ended",
        "parsed": "statement texts that were read, by a plan from the cache or by a new one",
        "routed": "statements that went to one shard",
        "statements": "statements of clients",
        "refused": "statements that the router refused",
        "held_total": "statements that were held during a cutover",
        "retried": "statements that were sent again after a fence refused them",
        "scattered": "reads that went to several shards",
        "bytes_in": "bytes from clients",
        "bytes_out": "bytes to clients",
        "errors": "errors that clients were sent",
        "mirrored": "catch-ups that writes asked for",
        "compared": "reads that were compared with the other side",
        "differences": "comparisons that found a difference",
        "not_compared": "comparisons that were left out, or came to nothing",
        "plan_hits": "plans found in the cache",
        "plan_misses": "plans that had to be made",
        "logins_refused": "logins that failed",
        "cancels": "cancel requests that named a client",
    }
    HISTOGRAMS: Final = {
        "query_seconds": "from a statement's arrival to the end of its answer",
        "hold_seconds": "how long statements were held",
        "wait_seconds": "how long clients waited for a server connection",
    }

    __slots__ = (*COUNTERS, *HISTOGRAMS, "held_now")

    clients: int
    queries: int
    transactions: int
    parsed: int
    routed: int
    statements: int
    refused: int
    held_total: int
    retried: int
    scattered: int
    bytes_in: int
    bytes_out: int
    errors: int
    mirrored: int
    compared: int
    differences: int
    not_compared: int
    plan_hits: int
    plan_misses: int
    logins_refused: int
    cancels: int
    query_seconds: Histogram
    hold_seconds: Histogram
    wait_seconds: Histogram
    held_now: int

    def __init__(self) -> None:
        for name in self.COUNTERS:
            setattr(self, name, 0)
        for name in self.HISTOGRAMS:
            setattr(self, name, Histogram())
        self.held_now = 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Names and values of all plain numbers."""
        yield from ((name, getattr(self, name)) for name in self.COUNTERS)
        yield "held_now", self.held_now


class RouterCollector(Collector):
    """Turns a router's state into metrics whenever the page is read."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def collect(self) -> Iterator[Metric]:
        stats = self.router.tally()
        for name, meaning in Stats.COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name.removesuffix('_total')}", meaning, getattr(stats, name))
        for name, meaning in Stats.HISTOGRAMS.items():
            histogram = getattr(stats, name)
            yield HistogramMetricFamily(f"{PREFIX}_{name}", meaning, histogram.cumulative(), histogram.sum)
        yield GaugeMetricFamily(f"{PREFIX}_held", "statements that are held now", stats.held_now)
        yield GaugeMetricFamily(f"{PREFIX}_clients_now", "clients that are connected", len(self.router.sessions))
        yield self._servers()
        yield from self._view()

    def _servers(self) -> Metric:
        servers = GaugeMetricFamily(
            f"{PREFIX}_servers", "server connections by state, and clients that wait for one", labels=["shard", "state"]
        )
        counts: Counter[tuple[str, str]] = Counter()
        for (shard, _user), pool in list(self.router.pools.items()):  # one step: the loop may add one meanwhile
            idle = len(pool.idle)
            counts.update(
                {(shard, "idle"): idle, (shard, "busy"): len(pool.servers) - idle, (shard, "waiting"): pool.waiting}
            )
        for labels, count in counts.items():
            servers.add_metric(labels, count)
        return servers

    def _view(self) -> Iterator[Metric]:
        view = self.router.view
        if view is None:
            return
        yield GaugeMetricFamily(f"{PREFIX}_epoch", "epoch of the route table in use", view.epoch)
        age = time.monotonic() - view.confirmed_at
        yield GaugeMetricFamily(f"{PREFIX}_confirmed_seconds", "since the catalog confirmed the route table", age)
        phases = GaugeMetricFamily(f"{PREFIX}_move_phase", "traffic phase of each move", labels=["move"])
        for move in view.moves.values():
            phases.add_metric([move.id], move.phase)
        yield phases


@contextmanager
def exposed(router: Router, address: Address | None, process: int) -> Iterator[Address | None]:
    """Serves the page while the block runs: at the address's port, plus the process's number where it is not 0."""
    if address is None:
        yield None
        return
    registry = CollectorRegistry()
    registry.register(RouterCollector(router))
    port = address.port + process if address.port else 0
    server, thread = start_http_server(port, address.host, registry)
    try:
        yield Address(address.host, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
