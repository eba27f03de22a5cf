"""What the ledger's writes tell about time: throughput of a window, and the stall of a cutover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardmove.demo.ledger import Outcome, Write


@dataclass(frozen=True, slots=True)
class Window:
    """The acknowledged writes of a stretch of time, counted by the moment of their acknowledgement."""

    seconds: float
    acknowledged: int
    by_isolation: Mapping[str, int]
    by_writer: Mapping[str, int]
    p50_ms: float
    p99_ms: float
    max_ms: float

    @property
    def rate_s(self) -> float:
        return self.acknowledged / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Stall:
    """The write stall of one cutover.

    Attributes:
        stall_ms: the longest time from invocation to acknowledgement, retries included, of any write to the range
            that overlaps the interval from `begins` to `ends`.
        begins: first hold or refusal that a writer met; where none did, the old owner's last acknowledgement. Behind a
            router, which tells neither: when the range was held in the catalog.
        ends: first acknowledgement by the new owner.
        disturbed: how many writes met a hold or a refusal; behind a router, how many were under way meanwhile.
    """

    stall_ms: float
    begins: float
    ends: float
    disturbed: int


def everything(_tenant: int) -> bool:
    return True


def window(
    writes: Iterable[Write], since: float, until: float, *, within: Callable[[int], bool] = everything
) -> Window:
    """Throughput and latency between two moments of `time.monotonic()`, of the tenants that `within` accepts."""
    chosen = [w for w in _acknowledged(writes, within) if since <= w.ended < until]
    took_ms = sorted((w.ended - w.started) * 1000 for w in chosen)
    return Window(
        seconds=until - since,
        acknowledged=len(chosen),
        by_isolation=Counter(w.isolation for w in chosen),
        by_writer=Counter(w.writer for w in chosen),
        p50_ms=percentile(took_ms, 50),
        p99_ms=percentile(took_ms, 99),
        max_ms=percentile(took_ms, 100),
    )


def stall(
    writes: Iterable[Write],
    since: float,
    until: float,
    *,
    new_owner: str,
    within: Callable[[int], bool] = everything,
) -> Stall | None:
    """The stall of the one cutover (or revert) that began after `since` and was over before `until`.

    `within` accepts the tenants of the moving range. Abandoned attempts inside the window belong to it: the interval
    begins with the first hold of the first of them. None where the new owner acknowledged nothing in the window.
    """
    around = [w for w in writes if within(w.tenant) and w.ended >= since and w.started <= until]
    acknowledged = list(_acknowledged(around, within))
    ends = min((w.ended for w in acknowledged if w.shard == new_owner and w.ended >= since), default=None)
    if ends is None:
        return None
    met = [w.disturbed_at for w in around if w.disturbed_at is not None and since <= w.disturbed_at <= until]
    old_owner_last = max((w.ended for w in acknowledged if w.shard != new_owner and w.ended <= ends), default=ends)
    begins = min(met, default=old_owner_last)
    took = [w.ended - w.started for w in acknowledged if w.started <= max(begins, ends) and w.ended >= begins]
    return Stall(max(took, default=0.0) * 1000, begins, ends, len(met))


def stall_around(
    writes: Iterable[Write], opened: float, flipped: float, *, within: Callable[[int], bool] = everything
) -> Stall | None:
    """The stall of a cutover for clients that do not know which shard answered them.

    The catalog says when the range was held (`opened`, of the first attempt) and when the owner changed (`flipped`).
    Both fences are closed at the flip, so whatever is acknowledged later is the new owner's. None where nothing is.
    """
    acknowledged = [w for w in _acknowledged(writes, within) if w.ended >= opened]
    ends = min((w.ended for w in acknowledged if w.ended >= flipped), default=None)
    if ends is None:
        return None
    took = [w.ended - w.started for w in acknowledged if w.started <= ends]
    return Stall(max(took) * 1000, opened, ends, len(took))


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the clients of a router were told, by kind of write.

    Attributes:
        singles, transactions: how many were acknowledged.
        single_errors: errors of single statements, of any kind.
        collided: attempts of transactions that a serialization failure or a deadlock among the writers ended.
        fenced: attempts of transactions that a cutover ended, where another attempt is the answer: the transaction had
            begun with a read, or elsewhere.
        fenced_first: the same where its first statement wrote to the moving range, and stayed. None may.
    """

    singles: int
    single_errors: int
    transactions: int
    collided: int
    fenced: int
    fenced_first: int


def behaviour(
    writes: Sequence[Write], *, within: Callable[[int], bool] = everything, late: Container[str] = ()
) -> Behaviour:
    """`within`: the tenants of the moving range; `late`: operations that do not begin with a write, or take it back."""
    blocks = [w for w in writes if not w.is_single]
    fenced = Counter[bool]()
    for write in blocks:
        fenced[within(write.tenant) and write.operation not in late] += write.fenced
    return Behaviour(
        singles=sum(w.is_single and w.outcome is Outcome.ACKNOWLEDGED for w in writes),
        single_errors=sum(w.is_single and w.outcome is Outcome.FAILED for w in writes),
        transactions=sum(w.outcome is Outcome.ACKNOWLEDGED for w in blocks),
        collided=sum(w.collided for w in blocks),
        fenced=fenced[False],
        fenced_first=fenced[True],
    )


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the values do not exceed; 0.0 for no values."""
    if not ascending:
        return 0.0
    rank = -(-len(ascending) * percent // 100)
    return ascending[max(0, int(rank) - 1)]


def _acknowledged(writes: Iterable[Write], within: Callable[[int], bool]) -> Iterable[Write]:
    return (w for w in writes if w.outcome is Outcome.ACKNOWLEDGED and within(w.tenant))
