"""Mechanisms to be taken away from a command and its workers, to see that the campaign sees the damage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final


def take_away(name: str) -> None:
    """Replaces one function of the product in this process."""
    TWINS[name]()


def _closing() -> None:
    """Nobody closes the giver's fence: writers go on there after the last catch-up."""
    from shardmove.protocol import fence

    fence.close = _nothing  # type: ignore[assignment]


def _lease_of_objects() -> None:
    """Who changes our objects does not ask whether its lease is still the newest."""
    from shardmove.protocol import parts

    parts.hold_lease = _nothing  # type: ignore[assignment]


def _one_transaction() -> None:
    """A batch's rows are committed before its record."""
    from workers import copy

    record = copy.record_batch

    def apart(connection: Any, *arguments: Any, **named: Any) -> Any:
        connection.execute("COMMIT")
        connection.execute("BEGIN READ WRITE")
        return record(connection, *arguments, **named)

    copy.record_batch = apart


def _bounded_waits() -> None:
    """An attendant waits in a catch-up for as long as somebody else stands still in one."""
    from shardmove.protocol.catch_up import Mirror

    Mirror.bound_waits = _nothing  # type: ignore[method-assign]


def _nothing(*_: object, **__: object) -> None:
    pass


TWINS: Final[Mapping[str, Callable[[], None]]] = {
    "closing": _closing,
    "lease of objects": _lease_of_objects,
    "one transaction": _one_transaction,
    "bounded waits": _bounded_waits,
}
