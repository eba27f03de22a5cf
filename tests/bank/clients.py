"""A client of the bank: what it does, what it is told, and what it writes down.

What it may be told (DESIGN §4.7), and nothing else:

    40001                in a transaction whose first write comes after another statement of it, or which asked for
                         REPEATABLE READ; it is tried again
    a lost connection    to a router that was struck meanwhile; whether a COMMIT or a single statement in flight took
                         effect is unknown then, and so it is written down
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardmove.demo import ledger
from shardmove.demo.ledger import Ledger, Outcome, Write
from tests.bank.ground import ACCOUNTS, OPENING, TENANTS
from tests.bank.sessions import WAYS, Lost, Refusal, Session
from tests.support.router import Router

SERIALIZATION_FAILURE: Final = "40001"
RECONNECT_BOUND_S: Final = 120.0
PATIENCE_S: Final = 180.0
"""How long one operation may take, attempts included, before the client calls it failed."""

GIVE: Final = "UPDATE accounts SET balance = balance + $3 WHERE tenant_id = $1 AND id = $2"
ENTER: Final = "INSERT INTO transfers (tenant_id, id, giver, receiver, amount) VALUES ($1, $2, $3, $4, $5)"
LOOK: Final = "SELECT balance FROM accounts WHERE id = $2 AND tenant_id = $1"
TOUCH: Final = "UPDATE accounts SET touches = touches + 1 WHERE tenant_id = $1 AND id = $2"
SUM: Final = "SELECT sum(balance)::bigint, count(*)::bigint FROM accounts WHERE tenant_id = $1"
RECALL: Final = "SELECT giver, receiver, amount FROM transfers WHERE tenant_id = $1 AND id = $2"


class Wrong(Exception):
    """The database answered, and the answer cannot be."""


@dataclass(slots=True)
class Told:
    """What all clients were told so far. Counters by (operation, what)."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, operation: str, what: str) -> None:
        with self._lock:
            self.counts[operation, what] += 1

    def note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(f"{time.monotonic():.3f} {what}")


@dataclass(slots=True)
class Task:
    """One operation of a client: what it is about, and how far it came."""

    number: int
    name: str
    tenant: int
    id: str
    accounts: tuple[int, int]
    amount: int
    isolation: str = "read committed"
    in_flight: bool = False  # a COMMIT, or a statement that is a transaction by itself

    @property
    def image(self) -> str:
        return f"{self.accounts[0]} {self.accounts[1]} {self.amount}"


class Client(threading.Thread):
    """One client. It changes to the other router whenever it loses a connection, and now and then by itself."""

    def __init__(
        self, index: int, routers: Sequence[Router], directory: Path, told: Told, *, seed: int, rate: float
    ) -> None:
        super().__init__(name=f"client-{index}", daemon=True)
        self._random = random.Random(f"{seed} {index}")
        self._routers = routers
        self._at = index % len(routers)
        self._way = WAYS[index // len(routers) % len(WAYS)]
        self._told = told
        self._pause_s = 1.0 / rate
        self._ledger = Ledger(ledger.new_ledger_path(directory, 1, self.name))
        self._numbers = 0
        self._last: Task | None = None
        self._session: Session | None = None
        self._incarnation = 0
        self._enough = threading.Event()
        self._operations: dict[Callable[[Session, Task], None], float] = {
            self._transfer: 4,
            self._transfer_after_a_look: 2,
            self._post: 1,
            self._touch: 2,
            self._sum: 1,
            self._recall: 1,
        }

    def stop(self) -> None:
        self._enough.set()

    def run(self) -> None:
        try:
            while not self._enough.wait(self._pause_s * self._random.uniform(0.2, 1.8)):
                self._one()
        except BaseException as error:  # the run must not look well because a client stopped early
            self._told.note(f"{self.name} ended: {error!r}")
            raise
        finally:
            self._leave()
            self._ledger.close()

    # --- one operation, tried until it is settled

    def _one(self) -> None:
        (operate,) = self._random.choices([*self._operations], [*self._operations.values()])
        task = self._task(operate.__name__.strip("_"))
        started, attempts = time.monotonic(), 0
        outcome: Outcome | None = None
        error: str | None = None
        while outcome is None:
            attempts += 1
            try:
                outcome, error = self._attempt(operate, task), None
            except (Refusal, Lost) as told:
                outcome, error = self._judge(task, told), str(told)
            except Wrong as wrong:
                outcome, error = Outcome.FAILED, str(wrong)
                self._leave()  # whatever was open ends with the connection
                self._told.note(f"{self.name} {task.name}: {wrong}")
            if outcome is None and time.monotonic() - started > PATIENCE_S:
                self._told.note(f"{self.name} {task.name}: {attempts} attempts in {PATIENCE_S:g} s; the last: {error}")
                outcome = Outcome.FAILED
        self._told.count(task.name, outcome.value)
        if task.name in WRITING:
            self._conclude(task, outcome, started, attempts, error)

    def _attempt(self, operate: Callable[[Session, Task], None], task: Task) -> Outcome:
        task.in_flight = False
        operate(self._connected(), task)
        return Outcome.ACKNOWLEDGED

    def _judge(self, task: Task, told: Refusal | Lost) -> Outcome | None:
        """How an attempt that failed is to be written down; None: it may be tried again."""
        if isinstance(told, Lost):
            self._blame(task, told)
            self._leave()
            return Outcome.UNKNOWN if task.in_flight else None
        if told.sqlstate == SERIALIZATION_FAILURE and task.name == "transfer_after_a_look":
            self._told.count(task.name, SERIALIZATION_FAILURE)
            return None if self._rolled_back(task) else Outcome.FAILED
        self._told.note(f"{self.name} {task.name} of tenant {task.tenant}: {told}")
        self._leave()
        return Outcome.FAILED

    def _rolled_back(self, task: Task) -> bool:
        """Whether the transaction is out of the way, so that it may be tried again."""
        assert self._session is not None
        try:
            self._session.execute("ROLLBACK")
        except Lost as lost:
            self._blame(task, lost)
            self._leave()
        except Refusal as refusal:
            self._told.note(f"{self.name} {task.name}: ROLLBACK: {refusal}")
            self._leave()
            return False
        return True

    def _blame(self, task: Task, lost: Lost) -> None:
        """A lost connection is the strike's doing only if the router was struck since it was opened."""
        router = self._routers[self._at]
        if self._incarnation % 2 and router.incarnation == self._incarnation:
            self._told.note(f"{self.name} {task.name}: {router.name} was not struck, and yet: {lost}")
        else:
            self._told.count(task.name, "connection lost")

    # --- the connection

    def _connected(self) -> Session:
        if self._session is not None and self._random.random() < 0.002:
            self._leave()
        deadline = time.monotonic() + RECONNECT_BOUND_S
        while self._session is None:
            self._at = (self._at + 1) % len(self._routers)
            router = self._routers[self._at]
            self._incarnation = router.incarnation
            try:
                self._session = self._way(router.dsn())
            except Lost:
                if self._incarnation % 2 and router.incarnation == self._incarnation:
                    raise
                if time.monotonic() > deadline:
                    raise
                self._enough.wait(0.05)
        return self._session

    def _leave(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    # --- what it does

    def _task(self, name: str) -> Task:
        self._numbers += 1
        giver, receiver = self._random.sample(range(ACCOUNTS), 2)
        return Task(
            number=self._numbers,
            name=name,
            tenant=self._random.randrange(TENANTS),
            id=f"{self.name}-{self._numbers}",
            accounts=(giver, receiver),
            amount=self._random.randint(1, 100),
        )

    def _transfer(self, session: Session, task: Task) -> None:
        """Its first statement after BEGIN is a write: it is held, or goes through, and is never refused."""
        session.execute("BEGIN")
        self._give(session, task)
        self._commit(session, task)

    def _transfer_after_a_look(self, session: Session, task: Task) -> None:
        task.isolation = self._random.choice(("read committed", "repeatable read"))
        session.execute(f"BEGIN ISOLATION LEVEL {task.isolation.upper()}")
        if len(session.execute(LOOK, task.tenant, task.accounts[0])) != 1:
            raise Wrong(f"tenant {task.tenant} has no account {task.accounts[0]}")
        if session.execute("SHOW transaction_isolation") != [(task.isolation,)]:
            raise Wrong(f"the transaction is not {task.isolation}, as it was asked to be")
        self._give(session, task)
        self._commit(session, task)

    def _give(self, session: Session, task: Task) -> None:
        """In the order of the accounts: two transfers never wait for each other."""
        giver, receiver = task.accounts
        for account, amount in sorted([(giver, -task.amount), (receiver, task.amount)]):
            session.execute(GIVE, task.tenant, account, amount)
        session.execute(ENTER, task.tenant, task.id, giver, receiver, task.amount)

    def _commit(self, session: Session, task: Task) -> None:
        self._intend(task)
        session.execute("COMMIT")
        self._last = task

    def _post(self, session: Session, task: Task) -> None:
        """A transfer from an account to itself: one INSERT, a transaction by itself."""
        task.accounts = (task.accounts[0], task.accounts[0])
        self._intend(task)
        session.execute(ENTER, task.tenant, task.id, *task.accounts, task.amount)
        self._last = task

    def _touch(self, session: Session, task: Task) -> None:
        """Counted exactly: a statement that was executed twice shows."""
        task.in_flight = True
        session.execute(TOUCH, task.tenant, task.accounts[0])

    def _sum(self, session: Session, task: Task) -> None:
        found = session.execute(SUM, task.tenant)
        if found != [(ACCOUNTS * OPENING, ACCOUNTS)]:
            raise Wrong(f"tenant {task.tenant} has {found}, must be {(ACCOUNTS * OPENING, ACCOUNTS)}")

    def _recall(self, session: Session, task: Task) -> None:
        """Its own latest transfer is there, whichever shard has it by now."""
        if self._last is None:
            return
        found = session.execute(RECALL, self._last.tenant, self._last.id)
        if found != [(*self._last.accounts, self._last.amount)]:
            raise Wrong(f"transfer {self._last.id} of tenant {self._last.tenant}: {found}, must be {self._last.image}")

    # --- its ledger

    def _intend(self, task: Task) -> None:
        self._ledger.intend(task.number, [("transfers", f"{task.tenant},{task.id}", task.image)])
        task.in_flight = True

    def _conclude(self, task: Task, outcome: Outcome, started: float, attempts: int, error: str | None) -> None:
        self._ledger.conclude(
            Write(
                number=task.number,
                outcome=outcome,
                writer=self.name,
                tenant=task.tenant,
                operation=task.name,
                isolation=task.isolation,
                started=started,
                ended=time.monotonic(),
                shard=None,
                attempts=attempts,
                error=error,
            )
        )


WRITING: Final = ("transfer", "transfer_after_a_look", "post", "touch")
