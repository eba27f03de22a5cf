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
from rich.console import Console, Group, RenderableType
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


class Screen:
    """What people see of the moves under way: on a terminal a live table each, one below the other; else log lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._views: list[View] = []
        self._live: Live | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watched(self, move: Move) -> Iterator[Progress]:
        """Shows the move's progress while the block lasts. Of several threads at once, too."""
        progress = LoggedProgress(log=structlog.get_logger("shardmove").bind(move=move.id))
        view = View(move, progress)
        with self._shown(view) if sys.stderr.isatty() else view.logged():
            yield progress

    @contextmanager
    def _shown(self, view: View) -> Iterator[None]:
        """A table that follows the counters; steps, and tables of moves that are through, scroll by above it."""
        view.tell_steps(self._console)
        with self._lock:
            self._views.append(view)
            if self._live is None:
                self._live = Live(
                    get_renderable=lambda: Group(*[each.table() for each in tuple(self._views)]),
                    console=self._console,
                    refresh_per_second=4,
                    vertical_overflow="visible",
                )
                self._live.start()
        try:
            yield
        finally:
            with self._lock:
                self._views.remove(view)
                self._console.print(view.table())
                if self._live is not None and not self._views:
                    self._live.stop()
                    self._live = None


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

    def tell_steps(self, console: Console) -> None:
        """Prints each step, with the move that it is of."""
        self._progress.on_step = lambda text: console.print(f"  {self._move.id}  {text}", markup=False)

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

    def table(self) -> RenderableType:
        """A line a table: rows, bytes, rate and ETA; the mirror's lag at the foot."""
        move, progress = self._move, self._progress
        title = Text.assemble(
            f"{move.id}  {move.ranges_text}  {move.source} → {move.target}  ", (str(self._state), "bold")
        )
        if not progress.tables:
            return title
        caption = f"mirrored {progress.mirrored_rows:,} rows, lag {progress.mirror_lag_s:.1f} s"
        table = Table(title=title, caption=caption, box=None, title_justify="left", caption_justify="left")
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
