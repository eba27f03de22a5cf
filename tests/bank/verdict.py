"""The accounts, read from the shards by plain SQL, held against what the clients were told. No code of routers.

lost         a transfer that was acknowledged, or a touch, is not there
unexpected   a transfer that failed is there, or one that nobody made; a touch more than was sent
different    a balance that does not follow from the transfers, a tenant whose sum changed, a row that is another
stray        a row on a shard that does not own it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardmove.demo import ledger
from shardmove.demo.ledger import Outcome
from tests.bank.ground import ACCOUNTS, OPENING, SHARDS, TENANTS, Ground

DETAILS_MAX: Final = 20

_TRANSFERS: Final = "SELECT tenant_id, id, giver, receiver, amount FROM transfers"
_ACCOUNTS: Final = "SELECT tenant_id, id, balance, touches FROM accounts"


@dataclass(slots=True)
class Verdict:
    """`ok` where nothing of the four was found."""

    transfers: int = 0
    found: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.found

    def note(self, kind: str, detail: str) -> None:
        self.found[kind] += 1
        if len(self.details) < DETAILS_MAX:
            self.details.append(f"{kind}: {detail}")

    def __str__(self) -> str:
        found = ", ".join(f"{self.found[kind]} {kind}" for kind in ("lost", "unexpected", "different", "stray"))
        return "\n  ".join([f"{self.transfers} transfers read back: {found}", *self.details])


def judge(ground: Ground, ledgers: Path) -> Verdict:
    """Clients must have stopped and every move have ended."""
    verdict, owners = Verdict(), ground.owners()
    book = ledger.read(ledgers)
    expected = book.rows["transfers"]
    balances = {(tenant, account): OPENING for tenant in range(TENANTS) for account in range(ACCOUNTS)}
    for shard in SHARDS:
        for tenant, id_, giver, receiver, amount in ground.fetch(shard, _TRANSFERS):
            if owners.get(tenant) != shard:
                verdict.note("stray", f"transfer {tenant},{id_} on {shard}")
                continue
            verdict.transfers += 1
            balances[tenant, giver] -= amount
            balances[tenant, receiver] += amount
            _compare(expected.pop(f"{tenant},{id_}", None), f"{giver} {receiver} {amount}", f"{tenant},{id_}", verdict)
    for key, state in expected.items():
        if not ledger.allows(state, None):
            verdict.note("lost", f"transfer {key}: {state}")
    _judge_accounts(ground, owners, balances, book, verdict)
    return verdict


def _compare(state: Any, image: str, key: str, verdict: Verdict) -> None:
    if ledger.allows(state, image):
        return
    kind = "unexpected" if state is None or state == frozenset([None]) else "different"
    verdict.note(kind, f"transfer {key}: {image}, by the ledger {state}")


def _judge_accounts(
    ground: Ground,
    owners: Mapping[int, str],
    balances: dict[tuple[int, int], int],
    book: ledger.Book,
    verdict: Verdict,
) -> None:
    touches: Counter[int] = Counter()
    sums: Counter[int] = Counter()
    for shard in SHARDS:
        for tenant, account, balance, touched in ground.fetch(shard, _ACCOUNTS):
            if owners.get(tenant) != shard:
                verdict.note("stray", f"account {tenant},{account} on {shard}")
                continue
            touches[tenant] += touched
            sums[tenant] += balance
            follows = balances.pop((tenant, account), None)
            if balance != follows:
                verdict.note("different", f"account {tenant},{account} on {shard}: {balance}, by transfers {follows}")
    for tenant, account in balances:
        verdict.note("lost", f"account {tenant},{account}")
    for tenant in range(TENANTS):
        if sums[tenant] != ACCOUNTS * OPENING:
            verdict.note("different", f"tenant {tenant}: {sums[tenant]} in all, must be {ACCOUNTS * OPENING}")
        _judge_touches(tenant, touches[tenant], book, verdict)


def _judge_touches(tenant: int, found: int, book: ledger.Book, verdict: Verdict) -> None:
    told = Counter(write.outcome for write in book.writes if write.operation == "touch" and write.tenant == tenant)
    least = told[Outcome.ACKNOWLEDGED]
    most = least + told[Outcome.UNKNOWN]
    if found < least:
        verdict.note("lost", f"tenant {tenant}: {found} touches, {least} were acknowledged")
    elif found > most:
        verdict.note("unexpected", f"tenant {tenant}: {found} touches, at most {most} were sent")
