"""What is on the servers, told by their own catalogs and by plain SQL."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg

_OBJECTS: Final = """
    SELECT 'schema ' || nspname FROM pg_namespace WHERE oid > 16383
    UNION ALL SELECT 'relation ' || c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid > 16383 AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
          AND n.nspname NOT LIKE 'pg\\_toast%' AND n.nspname NOT LIKE 'pg\\_temp%'
    UNION ALL SELECT 'function ' || oid::regprocedure::text FROM pg_proc WHERE oid > 16383
    UNION ALL SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'constraint ' || conname || ' on ' || conrelid::regclass FROM pg_constraint
        WHERE conrelid > 16383 AND contype <> 'n' AND connamespace IS DISTINCT FROM to_regnamespace('shardmove')
    UNION ALL SELECT 'index ' || c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid > 16383 AND c.relkind = 'i' AND n.nspname NOT IN ('shardmove', 'pg_toast')
"""
_ROWS: Final = ("fence", "moving_table", "batch", "later")
"""Tables of ours on a shard that are empty between moves."""

STAYS: Final = frozenset(
    """
    schema shardmove
    relation shardmove.about
    relation shardmove.lease
    relation shardmove.fence
    relation shardmove.moving_table
    relation shardmove.batch
    relation shardmove.batch_number_seq
    relation shardmove.kept
    relation shardmove.later
    function shardmove.refuse_kept()
    function shardmove.refuse_truncate()
    """.strip()
    .replace("    ", "")
    .split("\n")
)
"""What docs/objects.md says stays on a shard until `uninstall`."""

_SIGNATURE_OF_CATALOG: Final = {
    "move": "SELECT id, state, last_attempt, paused, error FROM shardmove_catalog.move ORDER BY id",
    "attempt": "SELECT move_id, number, outcome, direction FROM shardmove_catalog.attempt ORDER BY 1, 2",
    "epoch": "SELECT epoch FROM shardmove_catalog.cluster",
    "event": "SELECT id, kind, move_id, detail::text FROM shardmove_catalog.event ORDER BY id",
}


def session(dsn: str) -> psycopg.Connection[Any]:
    return psycopg.connect(dsn, autocommit=True, application_name="onlooker", connect_timeout=10)


def objects(dsn: str) -> set[str]:
    """Every schema, relation, function, trigger, constraint and index that is not the system's own."""
    with session(dsn) as connection:
        connection.execute("SET search_path = ''")
        return {row[0] for row in connection.execute(_OBJECTS).fetchall()}


def left_on_shard(dsn: str, before: set[str], *, gave_away: bool, tables: Sequence[str]) -> list[str]:
    """What is there, or is not, that should not be so after a move's end.

    `gave_away`: this shard owned the range and does not any more, so it keeps refusing it.
    """
    now = objects(dsn)
    kept = {f"trigger shardmove_kept_{event} on public.{t}" for t in tables for event in ("insert", "update", "delete")}
    left = [f"left over: {each}" for each in sorted(now - before - STAYS - kept)]
    left += [f"missing: {each}" for each in sorted(before - now)]
    if gave_away:
        left += [f"missing: {each}" for each in sorted(kept - now)]
    else:
        left += [f"left over: {each}" for each in sorted(kept & now)]
    if "schema shardmove" not in now:
        return left
    with session(dsn) as connection:
        for name in _ROWS:
            (count,) = connection.execute(f"SELECT count(*) FROM shardmove.{name}".encode()).fetchone() or (0,)
            left += [f"left over: {count} rows of shardmove.{name}"] if count else []
        (count,) = connection.execute("SELECT count(*) FROM shardmove.kept").fetchone() or (0,)
        if (count > 0) != gave_away:
            left.append(f"{count} rows of shardmove.kept, and it {'gave' if gave_away else 'never gave'} a range away")
    return left


def left_in_catalog(dsn: str, final: Sequence[str]) -> list[str]:
    """Moves that have not ended, open attempts, marks on routes, holders whose session is there.

    Of one who died last of all the name stays: the next command finds an ended move, and takes no lease.
    """
    left: list[str] = []
    with session(dsn) as connection:
        for move, state, error in connection.execute("SELECT id, state, error FROM shardmove_catalog.move").fetchall():
            left += [] if state in final else [f"move {move} is {state}"]
            left += [f"move {move} keeps an error: {error}"] if error else []
        for move, number in connection.execute(
            "SELECT move_id, number FROM shardmove_catalog.attempt WHERE outcome = 'open'"
        ).fetchall():
            left.append(f"attempt {number} of {move} is open")
        for shard, move, held in connection.execute(
            "SELECT shard, move_id, held FROM shardmove_catalog.current_routes WHERE move_id IS NOT NULL OR held"
        ).fetchall():
            left.append(f"a route of {shard} is marked: move {move}, held {held}")
        for move, holder in connection.execute(
            "SELECT move_id, holder FROM shardmove_catalog.lease AS l WHERE holder IS NOT NULL AND EXISTS (SELECT"
            " FROM pg_stat_activity AS a WHERE a.pid = l.backend_pid AND a.backend_start = l.backend_start)"
        ).fetchall():
            left.append(f"{move} is still held by {holder}")
    return left


def left_in_memory(dsns: Mapping[str, str], *, timeout_s: float = 30.0) -> list[str]:
    """Sessions of ours, advisory locks and prepared transactions; those of a dead process are given time to end."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [f"{place}: {each}" for place, dsn in dsns.items() for each in _in_memory(dsn)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _in_memory(dsn: str) -> list[str]:
    with session(dsn) as connection:
        sessions = connection.execute(
            "SELECT 'session ' || pid || ' of ' || application_name || ': ' || coalesce(state, '') || ' '"
            " || left(coalesce(query, ''), 100)"
            " FROM pg_stat_activity WHERE datname = current_database() AND starts_with(application_name, 'shardmove')"
            " UNION ALL SELECT 'advisory lock of ' || pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE locktype = 'advisory' AND d.datname = current_database()"
            " UNION ALL SELECT 'prepared ' || gid FROM pg_prepared_xacts WHERE database = current_database()"
        ).fetchall()
    return [row[0] for row in sessions]


def signature(catalog: str, shards: Mapping[str, str]) -> dict[str, object]:
    """All that a command may change: the catalog's rows, but for the lease; our objects and records on the shards."""
    seen: dict[str, object] = {}
    seen["objects of the catalog"] = ours = sorted(objects(catalog))
    if "schema shardmove_catalog" not in ours:
        return seen
    with session(catalog) as connection:
        for what, query in _SIGNATURE_OF_CATALOG.items():
            seen[what] = connection.execute(query.encode()).fetchall()
    for shard, dsn in shards.items():
        seen[f"objects of {shard}"] = here = sorted(objects(dsn))
        if "schema shardmove" in here:
            with session(dsn) as connection:
                for name in ("moving_table", "batch", "later", "kept"):
                    rows = connection.execute(f"SELECT t::text FROM shardmove.{name} t ORDER BY 1".encode()).fetchall()
                    seen[f"{shard} {name}"] = rows
                fence = "SELECT move_id, standing, is_open, is_whole, attempt FROM shardmove.fence ORDER BY 1"
                seen[f"{shard} fence"] = connection.execute(fence).fetchall()
    return seen


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """What is another one, in words: what is there no more, and what is new."""
    return [
        f"changed: {key}: {_only(before.get(key), after.get(key))} became {_only(after.get(key), before.get(key))}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def _only(these: object, those: object) -> list[object]:
    known = those if isinstance(those, list) else []
    return [each for each in these if each not in known] if isinstance(these, list) else []
