"""Control points: named places in the protocol where a test may stop, kill or interleave.

There is one before and one after every `Effect`, which is whatever the engine changes outside its own memory: a commit,
or a call that no transaction undoes. Commits are in `postgres/effects.py` only, such calls within `around`, so none is
without its points. Between them are those of `PLACES`, where interleavings matter but nothing has been committed.

The product calls `reach(name)` at each; nothing happens unless somebody armed the name in this process
(`faults.py` arms whole processes from outside).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeAlias

Hook: TypeAlias = Callable[[str], None]


class Effect(StrEnum):
    """Everything that the engine changes outside its own memory, by the name that its two points begin with."""

    # in the catalog
    UPGRADE_CATALOG = "upgrade_catalog"
    APPLY = "apply"
    PUBLISH = "publish"
    PLAN = "plan"
    TAKE_LEASE = "take_lease"
    BEAT = "beat"
    GIVE_BACK = "give_back"
    END_HOLDER = "end_holder"
    TRANSITION = "transition"
    OPEN_ATTEMPT = "open_attempt"
    FLIP = "flip"
    ABANDON = "abandon"
    RECORD_STALL = "record_stall"
    RECORD_EVENT = "record_event"
    SET_PAUSED = "set_paused"
    SET_ERROR = "set_error"
    SET_IDENTITIES = "set_identities"
    SET_STATS = "set_stats"
    SET_ATTENDED = "set_attended"
    BEAT_ROUTER = "beat_router"
    ACKNOWLEDGE = "acknowledge"
    FORGET_ROUTER = "forget_router"
    SET_PHASE = "set_phase"
    FALL_BACK = "fall_back"
    REPORT_TRAFFIC = "report_traffic"
    RECORD_DIFFERENCE = "record_difference"
    UNINSTALL_CATALOG = "uninstall_catalog"
    EXPORT_ROUTES = "export_routes"

    # on a shard: the move's objects
    INSTALL_SCHEMA = "install_schema"
    RAISE_NUMBER = "raise_number"
    END_SESSIONS = "end_sessions"
    CREATE_TABLES = "create_tables"
    CREATE_LATER = "create_later"
    FILL_REFERENCE = "fill_reference"
    INSTALL = "install"
    ARM = "arm"
    RECORD_FINGERPRINT = "record_fingerprint"
    ACCEPT_DRIFT = "accept_drift"
    SET_SEQUENCE = "set_sequence"
    DISARM = "disarm"
    DROP_TRIGGERS = "drop_triggers"
    REMOVE = "remove"
    KEEP_FENCE = "keep_fence"
    RECORD_KEPT = "record_kept"
    UNINSTALL_TABLE = "uninstall_table"
    UNINSTALL_SHARD = "uninstall_shard"

    # on a shard: rows, and who owns them
    BATCH = "batch"
    MARK_WHOLE = "mark_whole"
    MAKE_DURABLE = "make_durable"
    CATCH_UP_RECEIVER = "catch_up.receiver"
    CATCH_UP_GIVER = "catch_up.giver"
    MARK_DIRTY = "mark_dirty"
    CLOSE = "close"
    OPEN = "open"
    SET_STATE = "set_state"
    GIVE_AWAY = "give_away"
    RETIRE = "retire"
    ERASE = "erase"

    @property
    def before(self) -> str:
        """The point where all but the effect is done."""
        return f"{self}.before"

    @property
    def after(self) -> str:
        """The point where the effect is there, and nobody has been told."""
        return f"{self}.after"


PLACES = (
    "initializing.before_objects",
    "ending.before_keep",
    "ending.after_erase",
    "batch.before_compare",
    "catch_up.after_receiver_lock",
    "catch_up.after_giver_snapshot",
    "catch_up.before_compare",
    "catch_up.after_pass",
    "close.after_lock",
    "copying.after_batch",
    "cutover.after_guards",
    "cutover.after_hold",
    "cutover.after_empty",
    "keep_fence.before_tables",
    "pairs.between_snapshots",
    "phase.before_readers",
    "verifying.after_comparison",
)
"""The points that are no effect's own."""

_armed: dict[str, Hook] = {}
_everywhere: list[Hook] = []


def reach(name: str) -> None:
    """Runs what is armed at the point, if anything. What the hook raises goes through the step."""
    for everywhere in _everywhere:
        everywhere(name)
    hook = _armed.get(name)
    if hook is not None:
        hook(name)


@contextmanager
def around(effect: Effect) -> Iterator[None]:
    """Both points of an effect that is one call."""
    reach(effect.before)
    yield
    reach(effect.after)


def arm(name: str, hook: Hook) -> None:
    """Calls the hook with the point's name each time the point is reached in this process."""
    _armed[name] = hook


def arm_all(hook: Hook) -> None:
    """Calls the hook with the name of each point that is reached in this process, for as long as it lives."""
    _everywhere.append(hook)


def disarm(name: str) -> None:
    _armed.pop(name, None)


@contextmanager
def armed(name: str, hook: Hook) -> Iterator[None]:
    """Armed within the block only."""
    arm(name, hook)
    try:
        yield
    finally:
        disarm(name)
