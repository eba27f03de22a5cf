"""Keys with which clients cancel: the router's own, never a server's.

A client is told a process number and a secret. With them it may ask, on a connection of its own, that its running query
be cancelled; the request may arrive at any process of the router, so the number says which one it belongs to. The
secret is compared in constant time, and the one who asks is told nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

PROCESSES_MAX: Final = 256
CANCEL_S: Final = 10.0
"""How long whoever asked to cancel is kept waiting for the outcome."""
_NUMBER_BITS: Final = 22  # with the process above it, a number stays positive in 32 bits
_NUMBERS: Final = (1 << _NUMBER_BITS) - 1


class Client(Protocol):
    """A session, as far as it can be cancelled."""

    @property
    def secret(self) -> bytes: ...

    def cancel(self) -> Awaitable[None] | None:
        """Cancels what runs, if anything does. Where there is something to wait for, it is over once the server cannot
        receive this request any more: whoever asked is let go then, and whatever it sends next is safe from it."""
        ...


SomeClient = TypeVar("SomeClient", bound=Client)


@dataclass(frozen=True, slots=True)
class BackendKey:
    """What BackendKeyData tells a client."""

    pid: int
    secret: bytes = field(repr=False)


def process_of(pid: int) -> int:
    """Which process of the router a client's number belongs to."""
    return pid >> _NUMBER_BITS


def client_of(clients: Mapping[int, SomeClient], pid: int, secret: bytes) -> SomeClient | None:
    """The session whose key this is."""
    client = clients.get(pid)
    return client if client is not None and hmac.compare_digest(client.secret, secret) else None


async def cancel(client: Client) -> None:
    """Returns once the request can do no more harm, or after CANCEL_S."""
    outcome = client.cancel()
    if outcome is not None:
        with suppress(TimeoutError):
            await asyncio.wait_for(outcome, CANCEL_S)


class CancelKeys:
    """Makes the keys of one process."""

    def __init__(self, process: int = 0) -> None:
        assert 0 <= process < PROCESSES_MAX
        self._base = process << _NUMBER_BITS
        self._last = 0

    def new(self, clients: Mapping[int, Client], protocol: int) -> BackendKey:
        """`protocol`: the minor version. The secret has 4 bytes in 3.0, and 32 in 3.2.

        Numbers are given out in turn: that of a session that has just ended means nobody for a long while.
        """
        assert len(clients) < _NUMBERS
        while True:
            self._last = self._last % _NUMBERS + 1
            if (pid := self._base | self._last) not in clients:
                return BackendKey(pid, secrets.token_bytes(32 if protocol >= 2 else 4))
