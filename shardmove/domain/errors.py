"""The one tree of errors.

    ShardmoveError
    ├── ConfigurationError      the configuration or a command's words are wrong           exit 2
    │   └── NotFound            a name or id that nobody knows
    ├── Refused                 a check or a gate said no; nothing was changed             exit 4
    │   ├── IllegalTransition   the move's state does not allow the step
    │   ├── LeaseHeld           another coordinator holds the move
    │   └── CutoverGaveUp       the attempts are used up; the move stays where it was
    ├── DifferencesFound        a comparison found rows that are not equal                 exit 3
    ├── Interrupted             somebody asked us to stop; the same command goes on        exit 5
    └── Failed                  a step could not go on; state and reason are kept          exit 1
        ├── LeaseLost           the lease's number moved on: this process is dead to us
        ├── AttemptDecided      the attempt was flipped or abandoned by somebody else
        ├── EpochConflict       the route table changed between reading and publishing it
        ├── SchemaDrift         DDL on a moving table since the last look
        ├── ServerChanged       a shard is no longer the server that the move began with
        ├── MirrorRefused       the receiving side is not mirrored from the giving one
        ├── BatchMismatch       what the target read back is not what the source sent
        ├── WorkerDied          a worker process ended while it had a task
        └── Unreachable         a server does not answer

Every error carries a message that says what happened, and may carry a hint that says what to do.
All of them survive a pickle round trip: they cross process borders in the worker pool.
"""

from __future__ import annotations


class ShardmoveError(Exception):
    """Base of every error that shardmove raises on purpose.

    Attributes:
        message: what happened, naming the move, the range and the step where there is one.
        hint: what to do about it, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[ShardmoveError], message: str, hint: str | None) -> ShardmoveError:
    return cls(message, hint=hint)


class ConfigurationError(ShardmoveError):
    """The configuration, or the words of a command, cannot be right."""


class NotFound(ConfigurationError):
    """A shard, keyspace, plan or move of that name does not exist."""


class Refused(ShardmoveError):
    """A check or a gate said no. Everything is as it was."""


class IllegalTransition(Refused):
    """The transition table has no such edge. Nothing was changed."""


class LeaseHeld(Refused):
    """Another coordinator holds this move's lease and is alive."""


class CutoverGaveUp(Refused):
    """Every attempt of a cutover was abandoned; the owner is who it was, its fence is open."""


class DifferencesFound(ShardmoveError):
    """A comparison of both sides found rows that are not equal."""


class Interrupted(ShardmoveError):
    """Somebody asked the step to stop. The same command goes on from there."""


class Failed(ShardmoveError):
    """A step could not go on. The move keeps its state; the same command tries again."""


class LeaseLost(Failed):
    """The lease's number is not ours any more. Nothing was changed by the statement that found out."""


class AttemptDecided(Failed):
    """The cutover attempt is not open any more. Nothing was changed by the statement that found out."""


class EpochConflict(Failed):
    """The route table's epoch moved on between reading and publishing. Nothing was published."""


class SchemaDrift(Failed):
    """A moving table was changed by DDL since the move looked last. The mirror stops until it was compared anew."""


class ServerChanged(Failed):
    """A shard answers with another system identifier or timeline than the move began with."""


class MirrorRefused(Failed):
    """The receiving side's own record does not say: closed, and mirrored from the giving side."""


class BatchMismatch(Failed):
    """The rows that the target read back are not the rows that the source sent. The transaction was rolled back."""


class WorkerDied(Failed):
    """A worker process ended while it had a task. The task's transactions were rolled back by the servers."""


class Unreachable(Failed):
    """A server does not answer, or refuses the connection."""
