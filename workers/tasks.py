"""What a task is, and how any executor runs one: a picklable value that works on a worker's connections.

Every task is safe to repeat, as often as wanted: executors run a task again when its worker died.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import psycopg

from shardmove.domain.errors import Failed
from shardmove.postgres.connect import explain, translated
from workers.connections import Connections

Result = TypeVar("Result", covariant=True)


class Task(Protocol[Result]):
    """One piece of work. Its transactions are committed or rolled back when `run` returns or raises."""

    def run(self, connections: Connections) -> Result: ...


def run(task: Task[Result], connections: Connections) -> Result:
    """Runs one task; what a server said becomes an error of ours, so that it survives the way to the coordinator.

    Raises:
        ShardmoveError: as the task does; SchemaDrift, Unreachable or Failed for an error of psycopg.
    """
    try:
        with translated(type(task).__name__):
            return task.run(connections)
    except psycopg.Error as error:
        raise Failed(f"{type(task).__name__}: {explain(error)}") from error
