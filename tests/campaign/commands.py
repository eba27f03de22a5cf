"""Commands as processes, forked by a zygote."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from tests.campaign import zygote

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 90.0
"""The zygote imports everything before the first command."""
GOODBYE_S: Final = 30.0
CODES: Final = (0, 1, 4, 5)
"""How a command may end that was not killed, nor asked something impossible."""


class Command:
    """A command that runs, or has ended: `code` is its exit code then, or -9 where it was killed."""

    def __init__(self, words: Sequence[str], pid: int, out: Path, err: Path) -> None:
        self.words = tuple(words)
        self.pid = pid
        self.out = out
        self.err = err
        self.code: int | None = None
        self.ended = threading.Event()

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Where it does not end in time: where its threads are goes to its standard error."""
        if not self.ended.wait(timeout_s):
            self.signal(signal.SIGUSR1)
            time.sleep(0.3)
            self.signal(signal.SIGKILL)
            self.signal(signal.SIGCONT)
            self.ended.wait(GOODBYE_S)
            raise TimeoutError(f"`{self}` had not ended after {timeout_s:g} s")
        assert self.code is not None
        return self.code

    def signal(self, number: signal.Signals) -> None:
        if not self.ended.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it however it stands. Safe to repeat."""
        self.signal(signal.SIGKILL)
        self.ended.wait(GOODBYE_S)

    @property
    def said(self) -> str:
        """Its standard error so far."""
        try:
            return self.err.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # it has only just begun
            return ""

    def __str__(self) -> str:
        return " ".join(self.words)


class Zygote:
    """The process that commands are forked from. A context manager: at its end they are killed."""

    def __init__(self) -> None:
        self._commands: dict[int, Command] = {}
        self._early: dict[int, int] = {}
        self._pids: queue.Queue[int | None] = queue.Queue()
        self._lock = threading.Lock()
        self._guard = threading.Lock()
        """Of what is known of commands: one may end before it has been noted that it began."""
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", zygote.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(GOODBYE_S)
        self._listener.join(GOODBYE_S)
        self._process.stdout.close()

    def start(self, words: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Command:
        """`shardmove …`; its output goes to new files of the directory."""
        assert self._process.stdin is not None
        base = f"{next(self._numbers):03}-{words[0]}"
        out, err = directory / f"{base}.out", directory / f"{base}.err"
        request: dict[str, Any] = {"argv": list(words), "env": dict(environment), "out": str(out), "err": str(err)}
        with self._lock:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            pid = self._pids.get(timeout=START_S)
            assert pid is not None, "the zygote has ended"
            command = Command(words, pid, out, err)
            with self._guard:
                self._commands[pid] = command
                if pid in self._early:
                    self._end(command, self._early.pop(pid))
        return command

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            if "pid" in news:
                self._pids.put(news["pid"])
                continue
            with self._guard:
                command = self._commands.pop(news["ended"], None)
                if command is None:
                    self._early[news["ended"]] = news["status"]
                else:
                    self._end(command, news["status"])
        self._pids.put(None)

    def _end(self, command: Command, status: int) -> None:
        command.code = status
        command.ended.set()
