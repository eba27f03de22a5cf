"""Commands as an operator types them: in this process, or as processes of their own, over a world."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardmove.cli.verbs import app
from tests.support.world import BOUND_S, World
from workers.executors import InlineExecutor


@dataclass(frozen=True, slots=True)
class Said:
    """What a command printed, and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """Standard output, which is JSON and nothing else."""
        assert self.stdout, self.stderr
        return json.loads(self.stdout)


Shell = Callable[..., Said]


@pytest.fixture
def threads_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process run the workers' tasks in threads: nothing here is about processes, and they start at
    once."""
    monkeypatch.setattr("workers.pool.ProcessExecutor", InlineExecutor)


@pytest.fixture
def shell(world: World, threads_for_workers: None) -> Shell:
    """`shell("run", "m1", "--json")`: runs a command in this process, with the world's configuration."""
    path = world.write_config()
    return lambda *words, config=path: invoked(config, *words)


def invoked(config: Path, *words: str) -> Said:
    """Runs a command in this process, with that configuration."""
    result = CliRunner().invoke(app, words, env={"SHARDMOVE_CONFIG": str(config)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "--debug" in words or "Traceback" not in result.stderr
    return Said(result.exit_code, result.stdout, result.stderr)


@dataclass(frozen=True, slots=True)
class Running:
    """A command as a process of its own."""

    process: subprocess.Popen[str]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def read_until(self, text: str) -> None:
        """Reads standard error up to the first line that has the text in it."""
        assert self.process.stderr is not None
        assert any(text in line for line in self.process.stderr), f"{text!r} was never said"

    def end(self) -> Said:
        stdout, stderr = self.process.communicate(timeout=BOUND_S)
        assert "Traceback" not in stderr
        return Said(self.process.returncode, stdout, stderr)


@pytest.fixture
def start(world: World) -> Iterator[Callable[..., Running]]:
    """`start("run", "m1")`: begins a command as a process of its own; it does not outlive the test."""
    environment = {**os.environ, "SHARDMOVE_CONFIG": str(world.write_config())}
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> Running:
        process = subprocess.Popen(
            [sys.executable, "-m", "shardmove", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        return Running(process)

    yield begin
    for process in started:
        process.kill()
        process.communicate()


Start = Callable[..., Running]
