"""The application's side of a story: its statements, the transactions that it keeps open, and its DDL.

What a statement may answer is known exactly, from the acknowledged rows alone, wherever the shard owns the rows that
it touches; where it does not, the statement is refused, or touches nothing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import psycopg

from shardmove.domain.moves import State
from tests.machine import oracle
from tests.machine.oracle import RESIDENTS, TENANTS, Ledger, Operation, Rejected, Rows
from tests.machine.place import KEYSPACE, SHARDS, Place, Session
from tests.support.engine import until

LEVELS: Final = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
CLIENTS: Final = ("A", "B")
PROBED: Final = 150
"""The tenant of the range that is tried, and written to in the middle of things."""
UNARMED: Final = frozenset({State.PENDING, State.INITIALIZING, State.ROLLING_BACK, State.ROLLED_BACK})


class Finding(AssertionError):
    """Something that must not be."""


@dataclass(slots=True)
class Client:
    """A transaction of the application that is open."""

    shard: str
    session: Session
    level: str
    base: Rows | None
    """What its snapshot shows; None where each statement takes a new one."""
    began: int
    changes: dict[oracle.RowKey, Any] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    """Tenants whose rows it wrote to, also where they are what they were."""
    wrote_to_range: bool = False
    certain: bool = True
    """Its snapshot is of the owner's rows; a mirror's come and go as the engine likes."""


class Application:
    """The acknowledged rows, the open transactions, and the steps that change them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.ledger = Ledger()
        self.clients: dict[str, Client] = {}
        self.owned = {"s1"}
        """Who ever owned the range: they refuse it for ever when they do not any more."""
        self.extra: dict[str, bool] = dict.fromkeys(SHARDS, False)
        self.drift = "none"
        """DDL that the move has not compared yet: none, open, or perhaps (a verb that failed may have)."""

    @property
    def state(self) -> State | None:
        raise NotImplementedError

    @property
    def is_at_rest(self) -> bool:
        """Nobody is in the middle of anything, and what somebody left there is settled."""
        raise NotImplementedError

    @property
    def owner(self) -> str:
        return self.place.catalog.routes()[KEYSPACE].at(PROBED).shard

    def owner_of(self, tenant: int) -> str:
        return RESIDENTS.get(tenant) or self.owner

    def has_writers_on(self, shard: str) -> bool:
        """A transaction that wrote to the range is open there."""
        return any(client.wrote_to_range for client in self.clients.values() if client.shard == shard)

    def accepting(self) -> list[str]:
        """Every shard that lets an application write to the range, the owner first."""
        shards = sorted(SHARDS, key=lambda shard: shard != self.owner)
        return [shard for shard in shards if self.knows_the_range(shard) and _accepts(self.place, shard)]

    def knows_the_range(self, shard: str) -> bool:
        """A shard that never had a part in a move of the range knows nothing of it, and accepts everything."""
        return shard in self.owned or shard == self.owner or self._is_armed()

    def _is_armed(self) -> bool:
        return self.state is not None and self.state not in UNARMED

    # --- steps

    def write(self, op: str, tenant: int, id: int = 1, n: int = 1, client: str | None = None) -> str:
        """In a client's open transaction, or in one of its own, on the shard that the route table names."""
        known = self.clients.get(client or "")
        if client is not None and known is None:
            return "-"
        shard = known.shard if known else self.owner_of(tenant)
        if op == "set_extra":
            if not all(self.extra.values()):
                return "-"
            operation = oracle.set_extra(tenant, id, n)
        else:
            operation = oracle.operation(op, tenant, id, n, shard)
        if any(RESIDENTS.get(each, shard) != shard for each in operation.tenants):
            return "-"
        in_range = any(oracle.moves(each) for each in operation.tenants)
        if in_range and shard != self.owner and not self.knows_the_range(shard):
            return "-"
        return self.send(operation, shard, known, in_range)

    def send(
        self, operation: Operation, shard: str, client: Client | None, in_range: bool, *, judged: bool = True
    ) -> str:
        view = self._view(client)
        before = dict(view)
        expected: str | int
        try:
            expected = operation.effect(view)
        except Rejected as rejection:
            expected = str(rejection)
        session = client.session if client else self.place.session(shard)
        answer = execute(session, operation.statements)
        is_stranger = in_range and shard != self.owner
        if judged:
            self._judge_answer(operation, answer, expected, client, is_stranger)
        if isinstance(answer, int) and answer > 0:
            changes = oracle.difference(before, view)
            if client is None:
                self.ledger.commit(changes, operation.tenants)
            else:
                client.changes.update(changes)
                client.touched.update(operation.tenants)
                client.wrote_to_range = client.wrote_to_range or in_range
        return str(answer)

    def _view(self, client: Client | None) -> Rows:
        if client is None:
            return dict(self.ledger.rows)
        if client.base is None:
            return oracle.overlaid(self.ledger.rows, client.changes)
        return oracle.overlaid(client.base, client.changes)

    def _judge_answer(
        self, operation: Operation, answer: int | str, expected: int | str, client: Client | None, is_stranger: bool
    ) -> None:
        """What a statement may answer; all else is a finding."""
        allowed: set[int | str] = {expected}
        if is_stranger:
            allowed = {"fenced", 0, oracle.UNIQUE}
        elif not self.is_at_rest:
            allowed |= {"fenced", "locked"}
        if any(other is not client and other.touched for other in self.clients.values()):
            allowed |= {"locked", oracle.UNIQUE}
        if client is not None and client.base is not None:
            stale = any(self.ledger.changed.get(tenant, 0) > client.began for tenant in operation.tenants)
            if stale or not client.certain:
                allowed |= {"40001", oracle.UNIQUE, oracle.FOREIGN_KEY}
        if answer not in allowed:
            where = f"in the transaction on {client.shard} ({client.level})" if client else "alone"
            statements, known = "; ".join(operation.statements), sorted(map(str, allowed))
            raise Finding(f"{statements} ({where}) answered {answer}; allowed are {known}")

    def begin(self, client: str, shard: str, level: str = "READ COMMITTED") -> str:
        """A transaction that stays open, with all of its snapshot taken now where the level has one."""
        is_second = level == "SERIALIZABLE" and any(c.level == level for c in self.clients.values())
        if client in self.clients or is_second:  # two of them may be refused for each other's sake
            return "-"
        session = self.place.new_session(shard, f"client {client}")
        session.execute(f"BEGIN ISOLATION LEVEL {level}".encode())
        base = None if level == "READ COMMITTED" else self.place.rows(shard, session)
        certain = shard == self.owner and self.is_at_rest
        self.clients[client] = Client(shard, session, level, base, self.ledger.now, certain=certain)
        return "open"

    def commit(self, client: str) -> str:
        if client not in self.clients:
            return "-"
        known = self.clients.pop(client)
        with known.session:
            try:
                known.session.execute("COMMIT")
            except psycopg.Error as error:
                raise Finding(f"COMMIT of client {client} answered {error!r}") from error
        self.ledger.commit(known.changes, known.touched)
        return f"{len(known.changes)} rows"

    def abort(self, client: str) -> str:
        if client not in self.clients:
            return "-"
        session = self.clients.pop(client).session
        with suppress(psycopg.Error):  # not by closing alone: what it has locked would stay so for a moment
            session.execute("ROLLBACK")
        session.close()
        return "aborted"

    def ddl(self, on: str, add: bool) -> str:
        """A column comes or goes, on one shard or on both; with transactions open nobody would do it."""
        shards = [shard for shard in SHARDS if on in (shard, "both") and self.extra[shard] is not add]
        if self.clients or not self.is_at_rest or not shards:
            return "-"
        for shard in shards:
            until(partial(self._is_altered, shard, add), f"nobody is at it, and orders stay locked on {shard}")
        return f"{'added' if add else 'dropped'} on {', '.join(shards)}"

    def _is_altered(self, shard: str, add: bool) -> bool:
        """A session that was closed, or an ANALYZE of the server's own, may hold the table for a moment longer."""
        with suppress(psycopg.errors.LockNotAvailable):
            self.alter(shard, add)
        return self.extra[shard] is add

    def alter(self, shard: str, add: bool) -> None:
        if self.extra[shard] is add:
            return
        session = self.place.session(shard)
        session.execute("ALTER TABLE orders ADD COLUMN extra text" if add else "ALTER TABLE orders DROP COLUMN extra")
        self.extra[shard] = add
        if self._is_armed():
            self.drift = "open"
        if not add:
            gone = {
                key: (value[0], None)
                for key, value in self.ledger.rows.items()
                if key[0] == "orders" and self.owner_of(key[1]) == shard and value[1] is not None
            }
            self.ledger.commit(gone, TENANTS)


def _is_fence(error: psycopg.Error) -> bool:
    return (error.diag.message_primary or "").startswith("shardmove")


def execute(session: Session, statements: tuple[str, ...]) -> int | str:
    """How many rows were touched, all statements together; or why nothing was: "fenced", "locked" or the SQLSTATE.

    In an open transaction within a savepoint, so that it goes on after a refusal.
    """
    try:
        with session.transaction():
            return sum(session.execute(statement.encode()).rowcount for statement in statements)
    except psycopg.errors.LockNotAvailable:
        return "locked"
    except psycopg.Error as error:
        if error.sqlstate == "40001" and _is_fence(error):
            return "fenced"
        return error.sqlstate or f"{error!r}"


def _accepts(place: Place, shard: str) -> bool:
    """The shard lets an application write to the range. Tried, and rolled back."""
    session = place.session(shard)
    try:
        with session.transaction(force_rollback=True):
            session.execute(f"INSERT INTO orders (tenant, id, note) VALUES ({PROBED}, 99, 'a try')".encode())
    except psycopg.errors.SerializationFailure:
        return False
    except psycopg.errors.LockNotAvailable:
        return False
    return True
