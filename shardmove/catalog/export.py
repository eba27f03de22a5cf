"""The route table as a file, for programs that read files.

Readers see a whole table or the one before it, never a part, and never an older epoch after a newer one. A file is a
cache like any other: the shards' fences decide, so nothing is unsafe where one is late or missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from shardmove.domain import points
from shardmove.domain.points import Effect
from shardmove.domain.routes import RouteTable

PATIENCE_S = 0.5
"""So long is another writer of the file waited for, perhaps with a cutover behind us: writing takes milliseconds."""
POLL_S = 0.002


def export_routes(
    table: RouteTable, path: Path, *, cluster_id: str | None = None, patience_s: float = PATIENCE_S
) -> bool:
    """Writes the table unless the file has this epoch or a newer one; says whether it wrote.

    Shape: `{"epoch": 7, "ranges": [{"keyspace", "range": "L:U", "shard", "move", "held"}]}`, and `cluster` where the id
    is given. A file of another cluster, or one that cannot be read as JSON, is replaced whatever its epoch.

    Raises OSError; the file is then as it was. TimeoutError where another process is at it, and perhaps stopped: who
    writes looks for a newer epoch afterwards. Safe to repeat, and from several processes at once.
    """
    with _locked(path, patience_s):
        if _epoch_in(path, cluster_id) >= table.epoch:
            return False
        _replace(path, json.dumps(_document(table, cluster_id), indent=2) + "\n")
        return True


def _document(table: RouteTable, cluster_id: str | None) -> dict[str, object]:
    ranges = [
        {
            "keyspace": name,
            "range": str(route.range),
            "shard": route.shard,
            "move": route.move_id,
            "held": route.held,
        }
        for name, routes in sorted(table.keyspaces.items())
        for route in routes.routes
    ]
    identity = {} if cluster_id is None else {"cluster": cluster_id}
    return {**identity, "epoch": table.epoch, "ranges": ranges}


@contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[None]:
    # The lock is a file of its own: the one that is replaced cannot be it.
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        deadline = time.monotonic() + patience_s
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has been writing it for {patience_s:g} s")
            time.sleep(POLL_S)
        yield


def _try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _epoch_in(path: Path, cluster_id: str | None) -> int:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        epoch, found_id = int(document["epoch"]), document.get("cluster")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return -1
    return epoch if cluster_id is None or found_id is None or found_id == cluster_id else -1


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with points.around(Effect.EXPORT_ROUTES):
            os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
