"""How a command ends: one table from classes of errors to exit codes, and the words on standard error."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import psycopg
import typer

from shardmove.domain.errors import ConfigurationError, DifferencesFound, Interrupted, Refused, ShardmoveError
from shardmove.postgres.connect import explain


class Exit(IntEnum):
    """What a command's exit code says."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DIFFERENCES = 3
    REFUSED = 4
    INTERRUPTED = 5


EXITS: Sequence[tuple[type[BaseException], Exit]] = (
    (ConfigurationError, Exit.USAGE),
    (DifferencesFound, Exit.DIFFERENCES),
    (Refused, Exit.REFUSED),
    (Interrupted, Exit.INTERRUPTED),
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (Exception, Exit.FAILED),
)
"""The first class that fits decides. Usage errors of the parser exit with 2 by themselves."""


def exit_code(error: BaseException) -> Exit:
    """How a command ends that met this error."""
    return next(code for kind, code in EXITS if isinstance(error, kind))


@contextmanager
def reported(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turns whatever ends a command early into words on standard error and its exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        _tell(error, as_json)
        raise typer.Exit(exit_code(error)) from None


def _tell(error: BaseException, as_json: bool) -> None:
    message, hint = _words(error)
    if as_json:
        line = json.dumps({"error": message, "hint": hint, "exit": exit_code(error)}, ensure_ascii=False)
        print(line, file=sys.stderr)
        return
    print(f"shardmove: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)


def _words(error: BaseException) -> tuple[str, str | None]:
    """One line of what happened, and what to do. Of a server's error: never its detail, which may carry row values."""
    match error:
        case ShardmoveError():
            return error.message, error.hint
        case psycopg.Error():
            return f"a server said: {explain(error)}", None
        case KeyboardInterrupt():
            return "interrupted", None
        case _:
            return f"unexpected {type(error).__name__}: {error}", "this is a bug of shardmove; --debug shows where"
