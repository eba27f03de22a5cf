"""Makes the catalog, and brings one that an earlier release made up to date.

`HOOKS` is the ordered list of everything that was ever done to the schema. A hook runs once, in a transaction of its
own that records it too. An online hook may run while moves are under way; an offline one waits until none is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, LiteralString, TypeAlias

import psycopg

from shardmove import __version__
from shardmove.domain.errors import ConfigurationError, Refused
from shardmove.domain.points import Effect
from shardmove.postgres import effects

Connection: TypeAlias = psycopg.Connection[Any]

STOPPED_S = 30
"""So long may a process stand still with the lock of an upgrade."""
PATIENCE: LiteralString = (
    "SELECT set_config('lock_timeout', '5s', false), set_config('idle_session_timeout', '0', false),"
    " set_config('idle_in_transaction_session_timeout', '3s', false)"
)
"""Of every session on the catalog, but during an upgrade: who waits waits for longer than one that is stopped in a
transaction of several statements (`apply`) may live."""
_LOCK: LiteralString = "hashtextextended('shardmove_catalog.upgrade', 0)"


@dataclass(frozen=True, slots=True)
class Hook:
    """One change of the schema.

    Attributes:
        number: its place in the order.
        release: the release that brought it, `x.y.z`.
        online: whether it may run while moves are unfinished.
        function: makes the change; runs inside a transaction.
    """

    number: int
    release: str
    online: bool
    function: Callable[[Connection], None]


def _scripts(*names: str) -> Callable[[Connection], None]:
    def run(connection: Connection) -> None:
        for name in names:
            connection.execute(files("shardmove.catalog").joinpath(name).read_bytes())

    return run


HOOKS: tuple[Hook, ...] = (
    Hook(1, "0.1.0", True, _scripts("schema.sql", "functions.sql")),
    Hook(2, "0.2.0", True, _scripts("schema_2.sql")),
    Hook(3, "0.2.0", True, _scripts("schema_3.sql")),
)


def check(hooks: Sequence[Hook], package_version: str) -> None:
    """Raises ValueError, naming the hook, where the list breaks its rules.

    Numbers ascend strictly and releases weakly; no release is above the package's; a patch release has online hooks.
    """
    newest = _release(package_version)
    for before, hook in zip([None, *hooks], hooks, strict=False):
        release = _release(hook.release)
        if before is not None and hook.number <= before.number:
            raise ValueError(f"hook {hook.number} follows hook {before.number}")
        if before is not None and release < _release(before.release):
            raise ValueError(f"hook {hook.number} is of release {hook.release}, before hook {before.number}'s")
        if release > newest:
            raise ValueError(f"hook {hook.number} is of release {hook.release}, above {package_version}")
        if release[2] != 0 and not hook.online:
            raise ValueError(f"hook {hook.number} is offline, in the patch release {hook.release}")


def _release(text: str) -> tuple[int, int, int]:
    major, minor, patch = (int(part) for part in text.split("."))
    return major, minor, patch


def upgrade(connection: Connection, hooks: Sequence[Hook] = HOOKS) -> list[int]:
    """Runs the hooks that have not run yet, and returns their numbers. Safe to repeat, and to run at the same time.

    `connection` is in autocommit mode.

    Raises:
        Refused: the catalog was made by a newer release, or an offline hook is due while a move is unfinished; the
            hooks before that one have been run.
    """
    with _alone(connection):
        _prepare(connection)
        done = _applied(connection)
        _refuse_newer(done, hooks)
        due = [hook for hook in hooks if hook.number not in done]
        for hook in due:
            _run(connection, hook)
        return [hook.number for hook in due]


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    # Where this process is stopped with the lock, the server ends the session before those that wait give up.
    connection.execute(
        "SELECT set_config('lock_timeout', '60s', false), set_config('idle_session_timeout', %(stopped)s, false),"
        " set_config('idle_in_transaction_session_timeout', %(stopped)s, false)",
        {"stopped": f"{STOPPED_S}s"},
    )
    try:
        connection.execute("SELECT pg_advisory_lock(" + _LOCK + ")")
    except psycopg.errors.LockNotAvailable:
        raise Refused("another process has been upgrading the catalog for a minute") from None
    try:
        yield
    finally:
        if not connection.closed:  # a connection that died has let go of the lock
            connection.execute("SELECT pg_advisory_unlock(" + _LOCK + ")")
            connection.execute(PATIENCE)


def _prepare(connection: Connection) -> None:
    with effects.writing(connection, Effect.UPGRADE_CATALOG):
        connection.execute("CREATE SCHEMA IF NOT EXISTS shardmove_catalog")
        connection.execute(
            """CREATE TABLE IF NOT EXISTS shardmove_catalog.upgrade_hook (
                   number integer PRIMARY KEY,
                   release text NOT NULL,
                   run_by text NOT NULL,
                   run_at timestamptz NOT NULL DEFAULT clock_timestamp())"""
        )


def _run(connection: Connection, hook: Hook) -> None:
    with effects.writing(connection, Effect.UPGRADE_CATALOG):
        if not hook.online:
            _refuse_unfinished(connection, hook)
        hook.function(connection)
        connection.execute(
            "INSERT INTO shardmove_catalog.upgrade_hook (number, release, run_by) VALUES (%s, %s, %s)",
            (hook.number, hook.release, __version__),
        )


def _refuse_unfinished(connection: Connection, hook: Hook) -> None:
    # The lock keeps every step of every move, and every new move, waiting until the hook is done.
    connection.execute("LOCK TABLE shardmove_catalog.move IN ACCESS EXCLUSIVE MODE")
    rows = connection.execute("SELECT id FROM shardmove_catalog.move WHERE NOT is_finished ORDER BY created_at")
    unfinished = [row[0] for row in rows]
    if unfinished:
        raise Refused(
            f"the catalog's upgrade to {hook.release} waits for unfinished moves: {', '.join(unfinished)}",
            hint="complete them or roll them back with the release that runs now",
        )


def _applied(connection: Connection) -> dict[int, str]:
    """Number and release of each hook that has run; empty where there is no catalog."""
    there = connection.execute("SELECT to_regclass('shardmove_catalog.upgrade_hook') IS NOT NULL").fetchone()
    if there is None or not there[0]:
        return {}
    return dict(connection.execute("SELECT number, release FROM shardmove_catalog.upgrade_hook").fetchall())


def _refuse_newer(done: dict[int, str], hooks: Sequence[Hook]) -> None:
    unknown = sorted(set(done) - {hook.number for hook in hooks})
    if unknown:
        raise Refused(
            f"version skew: the catalog was made by release {done[unknown[-1]]}, this one is {__version__}",
            hint=f"use shardmove {done[unknown[-1]]} or newer",
        )


def require_current(connection: Connection, hooks: Sequence[Hook] = HOOKS) -> None:
    """Returns where the catalog is exactly this release's.

    Raises:
        Refused: a newer release made it ("version skew").
        ConfigurationError: it is missing, or an older release made it.
    """
    done = _applied(connection)
    _refuse_newer(done, hooks)
    if not done:
        raise ConfigurationError("there is no catalog in this database", hint="run `shardmove apply`")
    due = [str(hook.number) for hook in hooks if hook.number not in done]
    if due:
        raise ConfigurationError(
            f"the catalog was made by an older release: hook {', '.join(due)} has not run", hint="run `shardmove apply`"
        )
