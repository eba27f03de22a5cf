"""The external ledger: what the database told its clients, kept by them, outside of it.

One file a writer, one JSON line a record, each handed to the operating system before the writer goes on:

    intent        number, rows    before COMMIT is sent: every changed row as it will be (null: deleted)
    acknowledged  number, …       COMMIT was answered with success
    unknown       number, …       the connection was lost while COMMIT was in flight
    failed        number, …       the client got an error; nothing of it may be there

A killed writer therefore leaves an intent without an outcome, which is an unknown outcome and never a lie: its rows may
be as before or as after. A transaction that was tried again has several intents; the last one counts. Writers own
disjoint tenants, so the order within a file is the order in which a row changed.

A single statement is committed before its client can know the row that it made: its first intent says `ANYTHING` of
that row, and the second one, after the answer, what it is.

The *baseline* is every row before the first write, read by plain SQL: rows that no writer ever touches must stay so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeAlias

Image: TypeAlias = str | None
"""A row as PostgreSQL writes it as text under pinned settings; None: there is no such row."""

Rows: TypeAlias = dict[str, dict[str, Any]]
"""Table → primary key as 'tenant,id,…' → an Image, or a frozenset of them where the outcome is unknown."""

ANYTHING = "*"
"""Of a row: whatever it is. No row reads so, since a row's text begins with a parenthesis."""

BASELINE = "baseline.json"
_WRITERS = "writer-*.jsonl"


class Outcome(StrEnum):
    ACKNOWLEDGED = "acknowledged"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Write:
    """One write transaction as its client saw it. Times are `time.monotonic()`, one clock for all of the machine.

    Attributes:
        shard: where the latest attempt ran, and for an acknowledged write, the shard that acknowledged it; None where
            the client cannot know.
        disturbed_at: when it first met a hold or a refusing fence, or None.
        error: what the client was told, where it was not success.
        is_single: one statement outside a transaction, which nobody tries again.
        fenced: attempts that a fence ended.
        collided: attempts that a serialization failure or deadlock of the writers' own ended.
    """

    number: int
    outcome: Outcome
    writer: str
    tenant: int
    operation: str
    isolation: str
    started: float
    ended: float
    shard: str | None
    attempts: int
    disturbed_at: float | None = None
    error: str | None = None
    is_single: bool = False
    fenced: int = 0
    collided: int = 0


_WRITE_FIELDS = tuple(f.name for f in fields(Write))


class Ledger:
    """The file of one writer, open for appending."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def intend(self, number: int, rows: Iterable[tuple[str, str, Image]]) -> None:
        """Records what a transaction will have done. To be called after its last statement, before COMMIT."""
        self._append({"intent": number, "rows": list(rows)})

    def conclude(self, write: Write) -> None:
        """Records how the transaction ended."""
        self._append({name: getattr(write, name) for name in _WRITE_FIELDS})

    def close(self) -> None:
        os.close(self._file)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        while line:  # a full disk or a signal can cut a write short
            line = line[os.write(self._file, line) :]


@dataclass(slots=True)
class Book:
    """All ledgers of a directory, read back on top of the baseline."""

    rows: Rows
    writes: list[Write] = field(default_factory=list)
    unresolved: int = 0  # intents of writers that died before they knew the outcome

    def count(self, outcome: Outcome) -> int:
        return sum(write.outcome is outcome for write in self.writes)


def allows(state: Any, image: Image) -> bool:
    """Whether a row of that state in the ledger may look like this in a shard."""
    if isinstance(state, frozenset):
        return image in state or ANYTHING in state
    return bool(image == state)


def new_ledger_path(directory: Path, generation: int, writer: str) -> Path:
    """Files sort by generation: a later fleet's word counts after an earlier one's."""
    return directory / f"writer-{generation:04}-{writer}.jsonl"


def next_generation(directory: Path) -> int:
    return 1 + max((int(path.name.split("-")[1]) for path in directory.glob(_WRITERS)), default=0)


def write_baseline(directory: Path, rows: Rows) -> None:
    (directory / BASELINE).write_text(json.dumps(rows, ensure_ascii=False))


def has_baseline(directory: Path) -> bool:
    return (directory / BASELINE).exists()


def read(directory: Path) -> Book:
    """Reads the baseline and every ledger. The writers must be stopped or paused."""
    book = Book(json.loads((directory / BASELINE).read_text()))
    for path in sorted(directory.glob(_WRITERS)):
        _read_ledger(path, book)
    return book


def read_writes(directory: Path) -> list[Write]:
    """Every write that was concluded so far, in the order of the files; also while writers are at it."""
    records = (record for path in sorted(directory.glob(_WRITERS)) for record in _records(path))
    return [_write(record) for record in records if "outcome" in record]


def _read_ledger(path: Path, book: Book) -> None:
    intent: list[tuple[str, str, Image]] = []
    for record in _records(path):
        if "intent" in record:
            intent = record["rows"]
            continue
        write = _write(record)
        book.writes.append(write)
        match write.outcome:
            case Outcome.ACKNOWLEDGED:
                _apply(book.rows, intent)
            case Outcome.UNKNOWN:
                _allow(book.rows, intent)
            case Outcome.FAILED:
                pass
        intent = []
    if intent:
        book.unresolved += 1
        _allow(book.rows, intent)


def _apply(rows: Rows, intent: Iterable[tuple[str, str, Image]]) -> None:
    for table, key, image in intent:
        rows.setdefault(table, {})[key] = image


def _allow(rows: Rows, intent: Iterable[tuple[str, str, Image]]) -> None:
    for table, key, image in intent:
        state = rows.setdefault(table, {}).get(key)
        before = state if isinstance(state, frozenset) else frozenset([state])
        rows[table][key] = before | {image}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):  # a killed writer's last line may be cut short: a cut intent was never committed,
                yield json.loads(line)  # and a cut outcome leaves its intent without one


def _write(record: Mapping[str, Any]) -> Write:
    return Write(**{**record, "outcome": Outcome(record["outcome"])})
