"""What happened, in order: the events that transitions write, and those that somebody records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import Jsonb

from shardmove.catalog.session import Session, translated
from shardmove.domain.points import Effect


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the history. Ids ascend in the order in which events became visible."""

    id: int
    at: datetime
    kind: str
    move_id: str | None
    plan_id: str | None
    detail: dict[str, Any]


class Events(Session):
    def record(self, kind: str, move_id: str | None = None, plan_id: str | None = None, **detail: object) -> int:
        """Adds an event and returns its id. Not safe to repeat: a second call is a second event."""
        query = "SELECT shardmove_catalog.add_event(%s, %s, %s, %s)"
        return int(self._changed(Effect.RECORD_EVENT, query, (kind, move_id, plan_id, Jsonb(detail))))

    def events(self, move_id: str | None = None, after_id: int = 0, limit: int = 1000) -> list[Event]:
        """Events above `after_id`, ascending; of one move, or of all."""
        rows = self._rows(
            """SELECT id, at, kind, move_id, plan_id, detail FROM shardmove_catalog.event
               WHERE id > %(after)s AND (%(move)s::text IS NULL OR move_id = %(move)s) ORDER BY id LIMIT %(limit)s""",
            {"after": after_id, "move": move_id, "limit": limit},
        )
        return [Event(*row) for row in rows]

    def follow(self, move_id: str | None = None, after_id: int = 0, *, poll_s: float = 5.0) -> Iterator[Event]:
        """Every event above `after_id`, then each new one as it is committed; never ends by itself.

        Uses a connection of its own, which is closed with the generator. Raises Unreachable where that one breaks: go
        on with the last id. Looks every `poll_s` seconds even if no notification came.
        """
        with Events(self._dsn, application_name=f"{self._application_name} follow", reconnects=False) as own:
            own._rows("LISTEN shardmove_events")
            while True:
                batch = own.events(move_id, after_id)
                for event in batch:
                    after_id = event.id
                    yield event
                if not batch:
                    own._wait_for_notification(poll_s)

    def _wait_for_notification(self, timeout_s: float) -> None:
        with translated(self._connection):
            for _ in self._connection.notifies(timeout=timeout_s, stop_after=1):
                pass
