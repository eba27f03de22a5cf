"""What a running step tells: counters that a display may read at any time, and callbacks for what is worth a line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardmove.domain.moves import State


@dataclass(slots=True)
class TableProgress:
    """Counters of one table. `rows_estimate` comes from the server's statistics: rough."""

    name: str
    rows_estimate: int = 0
    rows_copied: int = 0
    bytes_copied: int = 0
    batches_done: int = 0
    rows_verified: int = 0
    rows_before: int = 0
    """Copied by earlier runs: they do not count for the rate."""


@dataclass(slots=True)
class Progress:
    """Counters of one run of a move. Written by the coordinator's threads, read by displays."""

    on_step: Callable[[str], None] = lambda _text: None
    on_state: Callable[[State], None] = lambda _state: None
    tables: dict[str, TableProgress] = field(default_factory=dict)
    mirrored_rows: int = 0
    mirror_lag_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, text: str) -> None:
        """A step of the protocol, in words."""
        self.on_step(text)

    def state(self, state: State) -> None:
        self.on_state(state)

    def table(self, name: str) -> TableProgress:
        with self._lock:
            return self.tables.setdefault(name, TableProgress(name))

    def batch(self, name: str, *, rows: int, size_bytes: int) -> None:
        entry = self.table(name)
        with self._lock:
            entry.rows_copied += rows
            entry.bytes_copied += size_bytes
            entry.batches_done += 1

    def totals(self) -> dict[str, object]:
        """The counters as `status` shows them."""
        with self._lock:
            tables = list(self.tables.values())
            copied = sum(each.rows_copied - each.rows_before for each in tables)
            return {
                "rate_rows_s": round(copied / max(time.monotonic() - self.started, 1e-3), 1),
                "rows_estimate": sum(each.rows_estimate for each in tables),
                "rows_copied": sum(each.rows_copied for each in tables),
                "bytes_copied": sum(each.bytes_copied for each in tables),
                "batches_done": sum(each.batches_done for each in tables),
                "mirrored_rows": self.mirrored_rows,
                "mirror_lag_s": round(self.mirror_lag_s, 3),
            }
