"""The commands of the router's console, as words: what each answers with, and whom it concerns."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Final, TypeAlias

from router.greeting import Refusal

Rows: TypeAlias = list[list[str | None]]

IGNORED: Final = frozenset({"SET", "RESET", "DISCARD", "DEALLOCATE"})
"""What drivers say by themselves, with no meaning here."""
TRANSACTION: Final = {
    "BEGIN": b"T",
    "START": b"T",
    "COMMIT": b"I",
    "END": b"I",
    "ROLLBACK": b"I",
    "ABORT": b"I",
}
"""Drivers wrap what they send. The status that ReadyForQuery has from then on."""


class Scope(Enum):
    HERE = "this process"
    ALL = "every process"
    OWNER = "the process of the client"


@dataclass(frozen=True, slots=True)
class Command:
    """`columns` are those of the answer; none: it only has a tag."""

    words: str
    columns: tuple[str, ...]
    scope: Scope
    meaning: str


@dataclass(frozen=True, slots=True)
class Answer:
    """`status`: of the transaction from now on, where the statement was about one."""

    columns: tuple[str, ...]
    rows: Rows
    tag: str
    status: bytes | None = None


_PROCESS = "process"
COMMANDS: Final = {
    command.words: command
    for command in (
        Command("SHOW ROUTES", ("keyspace", "range", "shard", "held", "move"), Scope.HERE, "the route table in use"),
        Command(
            "SHOW MOVES",
            ("move", "keyspace", "ranges", "source", "target", "state", "phase", "read_share"),
            Scope.HERE,
            "moves that are not finished",
        ),
        Command(
            "SHOW POOLS",
            (_PROCESS, "shard", "user", "idle", "busy", "waiting", "trouble"),
            Scope.ALL,
            "connections to the shards, by shard and user",
        ),
        Command(
            "SHOW CLIENTS",
            (_PROCESS, "pid", "user", "database", "address", "state", "seconds", "shard", "prepared"),
            Scope.ALL,
            "clients, what each does and for how long, and its prepared statements",
        ),
        Command(
            "SHOW SERVERS",
            (_PROCESS, "shard", "user", "pid", "address", "state", "seconds", "client"),
            Scope.ALL,
            "connections to the shards, one by one",
        ),
        Command("SHOW STATS", (_PROCESS, "name", "value"), Scope.ALL, "counters since the start"),
        Command(
            "SHOW HOLDS",
            (_PROCESS, "pid", "user", "address", "seconds", "shard"),
            Scope.ALL,
            "clients whose statements are held by a cutover",
        ),
        Command(
            "SHOW DIFFERENCES",
            ("move", "at", "router", "table", "key"),
            Scope.HERE,
            "reads that two shards answered differently, from the catalog",
        ),
        Command("SHOW CONFIG", ("setting", "value", "changed_by"), Scope.HERE, "settings, without secrets"),
        Command("SHOW VERSION", ("version",), Scope.HERE, "the release"),
        Command("SHOW HELP", ("command", "meaning"), Scope.HERE, "this list"),
        Command("RELOAD", (), Scope.ALL, "read the configuration and the certificate again"),
        Command("PAUSE", (), Scope.ALL, "let transactions end, and hold back new ones"),
        Command("RESUME", (), Scope.ALL, "end a pause"),
        Command("KILL", (), Scope.OWNER, "KILL pid: end a client's connection"),
        Command("KILL CANCEL", (), Scope.OWNER, "KILL CANCEL pid: cancel what a client runs"),
    )
}


def understood(text: str) -> tuple[Command, int] | Answer:
    """What a statement asks for, and the number it names (0: none); or the answer where nothing has to be done.

    Raises:
        Refusal: 42601, with the command that was probably meant.
    """
    words = text.strip().rstrip(";").upper().split()
    if not words:
        return Answer((), [], "")
    if words[0] in TRANSACTION:
        return Answer((), [], words[0], TRANSACTION[words[0]])
    if words[0] in IGNORED:
        return Answer((), [], words[0])
    named = [word for word in words if not word.isdigit()]
    numbers = [int(word) for word in words if word.isdigit()]
    asked = "SHOW HELP" if named == ["HELP"] else " ".join(named)
    command = COMMANDS.get(asked)
    if command is None:
        raise _unknown(asked)
    if len(numbers) != (command.scope is Scope.OWNER) or (numbers and words[-1] != str(numbers[0])):
        raise Refusal("42601", f"{command.words} takes {'one pid' if command.scope is Scope.OWNER else 'nothing'}")
    return command, numbers[0] if numbers else 0


def _unknown(words: str) -> Refusal:
    close = get_close_matches(words, COMMANDS, 1)
    hint = f"Did you mean {close[0]}? SHOW HELP lists all commands." if close else "SHOW HELP lists all commands."
    return Refusal("42601", "the router's console does not know this command", hint=hint)
