"""A client that reads no routes: it writes to a tenant of its own on one shard and the other, in turn, for ever.

Of what it wrote the owner alone may have acknowledged anything; what was acknowledged goes to the ledger.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import psycopg

from shardmove.demo import ledger, shop
from shardmove.demo.ledger import Ledger, Outcome, Write

PAUSE_S: Final = 0.03
NAME: Final = "stale"


class StaleClient:
    def __init__(self, ledger_dir: Path, shard_dsns: Mapping[str, str], tenant: int) -> None:
        self._shards = dict(shard_dsns)
        self._tenant = tenant
        self._ledger = Ledger(ledger.new_ledger_path(ledger_dir, 9000, NAME))
        self._sessions: dict[str, psycopg.Connection[Any]] = {}
        self._number = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self.acknowledged = 0
        self.refused = 0
        self.trouble: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Safe to repeat."""
        self._stop.set()
        self._thread.join()
        for session in self._sessions.values():
            session.close()

    def _run(self) -> None:
        while not self._stop.wait(PAUSE_S):
            for shard in self._shards:
                with suppress(psycopg.OperationalError, psycopg.InterfaceError):  # a server that is away
                    self._write(shard)
        self._ledger.close()

    def _session(self, shard: str) -> psycopg.Connection[Any]:
        known = self._sessions.get(shard)
        if known is None or known.closed:
            known = psycopg.connect(shop.pinned(self._shards[shard]), autocommit=True, application_name=NAME)
            self._sessions[shard] = known
        return known

    def _write(self, shard: str) -> None:
        session = self._session(shard)
        self._number += 1
        started = time.monotonic()
        try:
            session.execute("BEGIN", prepare=False)
            row = session.execute(
                "UPDATE tenants AS t SET version = %s WHERE tenant_id = %s RETURNING t::text",
                (self._number, self._tenant),
            ).fetchone()
            if row is None:
                session.execute("ROLLBACK", prepare=False)
                return
            self._ledger.intend(self._number, [("tenants", str(self._tenant), row[0])])
        except psycopg.errors.SerializationFailure:
            self.refused += 1
            session.execute("ROLLBACK", prepare=False)
            return
        except psycopg.errors.UndefinedTable:  # the target has none yet
            session.execute("ROLLBACK", prepare=False)
            return
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            self.trouble.append(f"{type(error).__name__}: {error}")
            session.execute("ROLLBACK", prepare=False)
            return
        outcome = Outcome.ACKNOWLEDGED
        try:
            session.execute("COMMIT", prepare=False)
        except psycopg.errors.SerializationFailure:
            outcome = Outcome.FAILED
        except psycopg.Error:
            outcome = Outcome.UNKNOWN
        self.acknowledged += outcome is Outcome.ACKNOWLEDGED
        self._ledger.conclude(
            Write(
                self._number,
                outcome,
                NAME,
                self._tenant,
                "stale",
                "READ_COMMITTED",
                started,
                time.monotonic(),
                shard,
                1,
            )
        )
