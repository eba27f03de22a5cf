"""What the processes of one router tell each other: a private socket each, a question and an answer in one line each.

The directory is readable for the router's own user only; whoever may connect is believed. A process that does not
answer in time is left out: it may have died just now, and its successor has nothing to say yet.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

ANSWER_S: Final = 5.0
PREFIX: Final = "shardmove-router-"
STALE_S: Final = 60.0
"""A directory younger than this may be about to be locked."""
LINE_BYTES_MAX: Final = 64 * 1024 * 1024  # SHOW CLIENTS of many thousands

Words: TypeAlias = Mapping[str, Any]


@contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory for the sockets of a router's processes, removed at the end.

    It is locked for as long as one of them lives, children by inheritance: what is not locked was left by a router
    that was killed, and is removed by the next one that starts.
    """
    _remove_stale(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone by now
            if time.time() - path.stat().st_mtime < STALE_S:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


class Peers:
    """This process among its siblings. `directory` is None where there are none."""

    def __init__(self, directory: Path | None, process: int, processes: int) -> None:
        self.process = process
        self.others = [each for each in range(processes) if each != process] if directory is not None else []
        self._directory = directory
        self._server: asyncio.Server | None = None
        self._answer: Callable[[Words], Awaitable[Words]] | None = None

    async def start(self, answer: Callable[[Words], Awaitable[Words]]) -> None:
        """Answers questions from now on, until `stop`."""
        self._answer = answer
        if self._directory is None:
            return
        path = self._path(self.process)
        path.unlink(missing_ok=True)  # of a former process with this number, which has died
        self._server = await asyncio.start_unix_server(self._serve, path, limit=LINE_BYTES_MAX)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path(self.process).unlink(missing_ok=True)
            with suppress(OSError):  # the last one; where the parent has died, nobody else would
                self._path(self.process).parent.rmdir()

    async def ask(self, process: int, question: Words) -> Words | None:
        """The answer of another process, or None where there is none."""
        with suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(ANSWER_S):
                return await self._ask(process, question)
        return None

    async def ask_others(self, question: Words) -> dict[int, Words | None]:
        """The same, of every other process."""
        answers = await asyncio.gather(*(self.ask(each, question) for each in self.others))
        return dict(zip(self.others, answers, strict=True))

    async def _ask(self, process: int, question: Words) -> Words:
        reader, writer = await asyncio.open_unix_connection(self._path(process), limit=LINE_BYTES_MAX)
        try:
            writer.write(json.dumps(question).encode() + b"\n")
            answer: Words = json.loads(await reader.readuntil())
            return answer
        finally:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._answer is not None
        try:
            with suppress(OSError, ValueError, asyncio.IncompleteReadError):
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._answer(json.loads(await reader.readuntil()))
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()

    def _path(self, process: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{process}.peer"
