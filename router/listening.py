"""The sockets that clients come to.

Of a TCP address each process has a socket of its own (SO_REUSEPORT): the kernel deals connections out evenly, and what
waits at a process that dies is all that is lost. Whoever binds first keeps the port for the others, without listening
there. A Unix socket exists once, and is shared.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from socket import socket as Socket
from typing import Any, Final

from shardmove.config import Address
from shardmove.domain.errors import ConfigurationError

BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """A bound address. With `is_shared`, `keeper` only keeps the port; else it listens."""

    address: Address
    is_shared: bool
    keeper: Socket

    def listener(self) -> Socket:
        """A socket of this process's own that listens there. To be called once in a process."""
        if not self.is_shared:
            return self.keeper
        with self.keeper:  # a child that outlives its parent must not keep the port from the next one
            listener = _bound(self.keeper.family, self.keeper.getsockname(), is_shared=True)
        listener.listen(BACKLOG)
        return listener


@contextmanager
def bound(addresses: Sequence[Address], *, is_shared: bool) -> Iterator[list[Place]]:
    """Binds all of them, for as long as the block runs; port 0 becomes a free one.

    Args:
        is_shared: several processes will listen there.

    Raises:
        ConfigurationError: one is taken, or not of this machine. Nothing stays bound.
    """
    with ExitStack() as stack:
        places: list[Place] = []
        for address in addresses:
            try:
                found = [_local(address, stack)] if address.is_local else _tcp(address, is_shared, stack)
            except OSError as error:
                raise ConfigurationError(f"[router] listen: {address} cannot be used: {error.strerror}") from None
            places += found
        yield places


def _tcp(address: Address, is_shared: bool, stack: ExitStack) -> list[Place]:
    """A name may stand for several addresses; they get the same port."""
    host = None if address.host == "*" else address.host
    infos = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    port, places = address.port, []
    for family, _, _, _, (ip, _, *rest) in dict.fromkeys(infos):
        name = (ip, port, *rest)
        if is_shared:  # another router would share with us, and get half of our clients: see that there is none
            with _bound(family, name, is_shared=False) as probe:
                name = probe.getsockname()
        keeper = stack.enter_context(_bound(family, name, is_shared=is_shared))
        if not is_shared:
            keeper.listen(BACKLOG)
        port = keeper.getsockname()[1]
        places.append(Place(Address(str(ip), port), is_shared, keeper))
    return places


def _bound(family: int, name: Any, *, is_shared: bool) -> Socket:
    made = Socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setblocking(False)
        made.bind(name)
    except BaseException:
        made.close()
        raise
    return made


def _local(address: Address, stack: ExitStack) -> Place:
    """Everybody may connect, as with PostgreSQL's own: who is let in is for the authentication."""
    path = address.socket_path
    _remove_stale(address)
    made = stack.enter_context(Socket(socket.AF_UNIX, socket.SOCK_STREAM))
    made.setblocking(False)
    made.bind(str(path))
    stack.callback(path.unlink, missing_ok=True)
    path.chmod(0o777)
    made.listen(BACKLOG)
    return Place(address, False, made)


def _remove_stale(address: Address) -> None:
    """Removes the socket of a process that died. Raises OSError where one is alive."""
    path = address.socket_path
    with Socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
    raise OSError(0, "another process listens there")
