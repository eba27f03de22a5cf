"""Progress on standard error: a live table on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardmove.coordinator.progress import Progress, TableProgress
from shardmove.domain.moves import Move, State

LOG_EVERY_S = 5.0
BAR_WIDTH = 24


@dataclass(slots=True)
class LoggedProgress(Progress):
    """Progress that logs: a state and a step at INFO, a batch at DEBUG."""

    log: Any = field(default_factory=structlog.get_logger)

    def step(self, text: str) -> None:
        self.log.info("step", text=text)
        Progress.step(self, text)

    def state(self, state: State) -> None:
        self.log.info("state_changed", state=str(state))
        Progress.state(self, state)

    def batch(self, name: str, *, rows: int, size_bytes: int) -> None:
        Progress.batch(self, name, rows=rows, size_bytes=size_bytes)
        self.log.debug("batch", table=name, rows=rows, size_bytes=size_bytes)


@contextmanager
def watched(move: Move) -> Iterator[Progress]:
    """Shows the move's progress while the block lasts."""
    progress = LoggedProgress(log=structlog.get_logger("shardmove").bind(move=move.id))
    view = View(move, progress)
    show = view.live() if sys.stderr.isatty() else view.logged()
    with show:
        yield progress


def collected(tell: Callable[[Move, str], None]) -> Callable[[Move], Any]:
    """For a dry run: nothing is shown, each step is told."""

    @contextmanager
    def watch(move: Move) -> Iterator[Progress]:
        yield Progress(on_step=lambda text: tell(move, text))

    return watch


class View:
    """One move's progress, as a table or as log lines."""

    def __init__(self, move: Move, progress: LoggedProgress) -> None:
        self._move = move
        self._progress = progress
        self._state = move.state
        progress.on_state = self._enter

    def _enter(self, state: State) -> None:
        self._state = state

    @contextmanager
    def live(self) -> Iterator[None]:
        """A table that follows the counters; steps scroll by above it."""
        console = Console(stderr=True, highlight=False)
        self._progress.on_step = lambda text: console.print(f"  {text}", markup=False)
        with Live(get_renderable=self.table, console=console, refresh_per_second=4, vertical_overflow="visible"):
            yield

    @contextmanager
    def logged(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._log_until, args=(done,), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _log_until(self, done: threading.Event) -> None:
        while not done.wait(LOG_EVERY_S):
            self._progress.log.info("progress", state=str(self._state), **self._progress.totals())

    def table(self) -> Table:
        """A line a table: rows, bytes, rate and ETA; the mirror's lag in the head."""
        move, progress = self._move, self._progress
        title = f"{move.id}  {move.ranges_text}  {move.source} → {move.target}  [bold]{self._state}[/bold]"
        caption = f"mirrored {progress.mirrored_rows:,} rows, lag {progress.mirror_lag_s:.1f} s"
        table = Table(title=title, caption=caption, box=None, title_justify="left", caption_justify="left")
        if not progress.tables:
            table.caption = None
            return table
        for head in ("table", "", "rows", "size", "rows/s", "ETA", "verified"):
            table.add_column(head, justify="left" if head in ("table", "") else "right")
        elapsed_s = max(time.monotonic() - progress.started, 1e-3)
        for entry in list(progress.tables.values()):
            table.add_row(*self._row(entry, elapsed_s))
        return table

    def _row(self, entry: TableProgress, elapsed_s: float) -> tuple[Any, ...]:
        rate = (entry.rows_copied - entry.rows_before) / elapsed_s
        is_copying = self._state is State.COPYING
        total = max(entry.rows_estimate, entry.rows_copied, 1) if is_copying else max(entry.rows_copied, 1)
        left = max(0, entry.rows_estimate - entry.rows_copied)
        return (
            Text(entry.name),
            ProgressBar(total=total, completed=entry.rows_copied, width=BAR_WIDTH),
            f"{entry.rows_copied:,}",
            decimal(entry.bytes_copied),
            f"{rate:,.0f}" if is_copying else "",
            duration(left / rate) if is_copying and rate > 0 else "",
            f"{entry.rows_verified:,}" if entry.rows_verified else "",
        )


def duration(seconds: float | None) -> str:
    """`47 s`, `3 min 20 s`, `5 h 10 min`; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
