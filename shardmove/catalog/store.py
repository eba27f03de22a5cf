"""The catalog: the one way in for everybody above."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from shardmove.catalog import upgrade
from shardmove.catalog.routers import Routers
from shardmove.catalog.session import connect, translated
from shardmove.domain.errors import Refused
from shardmove.domain.moves import ServerIdentity
from shardmove.domain.points import Effect
from shardmove.postgres.identity import identity


class Catalog(Routers):
    """Routes, plans, moves, leases, attempts and events of one cluster, over one connection. Not thread-safe.

    What it offers is built floor by floor: `Events`, `RouteTables`, `Shape`, `Moves`, `Attempts`, `Leases`, `Routers`.
    Each effect is one transaction. Errors are the house's own; after Unreachable the next call connects anew.
    """

    @classmethod
    def connect(cls, dsn: str, *, application_name: str = "shardmove", routes_file: Path | None = None) -> Self:
        """Opens a catalog that is there and of this release.

        Raises Unreachable, Refused (a newer release made it), ConfigurationError (missing, or an older one made it).
        """
        catalog = cls(dsn, application_name=application_name)
        catalog.routes_file = routes_file
        return catalog

    @classmethod
    def install(cls, dsn: str, *, application_name: str = "shardmove", routes_file: Path | None = None) -> Self:
        """Creates or upgrades the catalog, then opens it. Safe to repeat. Raises what `upgrade` and `connect` raise."""
        with connect(dsn, application_name=application_name) as connection, translated(connection):
            upgrade.upgrade(connection)
        return cls.connect(dsn, application_name=application_name, routes_file=routes_file)

    def identity(self) -> ServerIdentity:
        """Which history of which server the catalog lives on."""
        connection = self._connected()
        with translated(connection):
            return identity(connection)

    def uninstall(self) -> None:
        """Drops the schema and closes. Raises Refused, and drops nothing, while a move is unfinished."""
        with self._transaction(Effect.UNINSTALL_CATALOG):
            self._rows("LOCK TABLE shardmove_catalog.move IN ACCESS EXCLUSIVE MODE")
            unfinished = [move.id for move in self.moves(unfinished_only=True)]
            if unfinished:
                raise Refused(
                    f"the catalog is needed by unfinished moves: {', '.join(unfinished)}",
                    hint="complete them or roll them back first",
                )
            self._rows("DROP SCHEMA shardmove_catalog CASCADE")
        self.close()
