"""What all greetings of a process share: settings, certificate, verifiers, who is let in, and who takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from router.cancel import BackendKey, CancelKeys, Client, cancel, client_of, process_of
from router.greeting import ClientLogin, Greeting, Refusal
from router.metrics import Stats
from router.peers import Peers
from router.tls import server_context
from shardmove.config import RouterSettings
from shardmove.wire.scram import Verifier

ADMIN_DATABASE: Final = "shardmove"
GREETINGS_MIN: Final = 100
"""So many connections may be in their greeting at the same time, or `clients_max` where that is more."""

MakeSession: TypeAlias = Callable[[asyncio.Transport, ClientLogin, bytes, BackendKey], asyncio.BaseProtocol]
"""Transport, login, what the client sent behind its startup packet, and the key to tell it."""


class Door:
    """What all greetings of a process share: settings, certificate, verifiers, and who takes over."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        stats: Stats,
        clients: Mapping[int, Client],
        peers: Peers,
        mock_secret: bytes,
        session: MakeSession,
        console: MakeSession,
    ) -> None:
        """`clients`: by number, kept by whoever makes the sessions. `mock_secret`: the same in all processes, see
        `scram.mock_verifier`. Raises what `adopt` raises."""
        self.stats = stats
        self.clients = clients
        self.keys = CancelKeys(peers.process)
        self.peers = peers
        self.mock_secret = mock_secret
        self.session = session
        self.console = console
        self.greetings: set[Greeting] = set()
        self.is_closed = False
        self.adopt(settings)

    def adopt(self, settings: RouterSettings) -> None:
        """Other settings, for clients that come from now on; the certificate is read anew.

        Raises:
            ConfigurationError: the certificate cannot be used. Everything is as before.
        """
        certificate, key = settings.tls_certificate, settings.tls_key
        context = None if certificate is None or key is None else server_context(certificate, key)
        verifiers = {user: Verifier.parse(text) for user, text in settings.users.items()}
        self.settings, self.context, self.verifiers = settings, context, verifiers

    def greeter(self, *, is_local: bool) -> Callable[[], Greeting]:
        """The protocol factory of a listener."""
        return lambda: Greeting(self, is_local=is_local)

    def close(self) -> None:
        """Ends every greeting: nobody who is not known by now will be."""
        self.is_closed = True
        for each in list(self.greetings):
            each.refuse(Refusal("57P03", "the router is shutting down"))

    @property
    def is_crowded(self) -> bool:
        return len(self.greetings) > max(GREETINGS_MIN, self.settings.clients_max)

    def admit(self, login: ClientLogin) -> MakeSession:
        """Who takes over. Raises Refusal."""
        settings = self.settings
        if self.is_closed:
            raise Refusal("57P03", "the router is shutting down")
        if login.database == ADMIN_DATABASE:
            if login.user not in settings.admins:
                raise Refusal(
                    "42501",
                    f'permission denied for database "{ADMIN_DATABASE}"',
                    hint=f"It is the router's own console, for the users in [router] admins; {login.user} is none.",
                )
            return self.console
        if settings.database and login.database != settings.database:
            raise Refusal(
                "3D000",
                f'database "{login.database}" does not exist',
                hint=f'This router serves "{settings.database}".',
            )
        if login.parameters.get("replication", "off").lower() not in ("off", "false", "no", "0", ""):
            raise Refusal("0A000", "replication is not routed", hint="Connect to the shard itself.")
        if len(self.clients) >= settings.clients_max:
            raise Refusal(
                "53300", "sorry, too many clients already", hint=f"[router] clients_max is {settings.clients_max}."
            )
        return self.session

    async def cancel(self, pid: int, secret: bytes) -> None:
        """Passes a request on to whom it belongs. Says nothing about the outcome, to nobody."""
        if process_of(pid) in self.peers.others:
            await self.peers.ask(process_of(pid), {"cancel": pid, "secret": secret.hex()})
        else:
            await self.cancel_here(pid, secret)

    async def cancel_here(self, pid: int, secret: bytes) -> None:
        client = client_of(self.clients, pid, secret)
        if client is not None:
            self.stats.cancels += 1
            await cancel(client)
