"""What each suite needs: its release of the driver in an environment of its own, and the address of the server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PYTEST: Final = ("pytest>=8.4", "pytest-timeout>=2.4")
TEST_BOUND_S: Final = 60
RECORDER: Final = Path(__file__).with_name("recorder.py")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a suite finds its server."""

    host: str
    port: int
    user: str
    dbname: str

    @property
    def environment(self) -> dict[str, str]:
        return {"PGHOST": self.host, "PGPORT": str(self.port), "PGUSER": self.user, "PGDATABASE": self.dbname}


@dataclass(frozen=True, slots=True)
class Suite:
    """Attributes:
    version: finds the release in the source tree.
    requirements: of the environment, given the release.
    options: of pytest, given the address.
    """

    name: str
    version: Callable[[Path], str]
    requirements: Callable[[str], Sequence[str]]
    options: Callable[[Address], Sequence[str]]
    environment: Callable[[Address], Mapping[str, str]]


def _psycopg_version(source: Path) -> str:
    return _first(source / "psycopg" / "pyproject.toml", r'^version\s*=\s*"([^"]+)"')


def _asyncpg_version(source: Path) -> str:
    return _first(source / "asyncpg" / "_version.py", r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)['\"]")


def _first(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{path} names no version"
    return found[1]


PSYCOPG: Final = Suite(
    name="psycopg",
    version=_psycopg_version,
    requirements=lambda release: (f"psycopg[binary,pool]=={release}", "anyio>=4", "pproxy>=2.7", "dnspython"),
    options=lambda address: (
        *("-m", "not slow and not subprocess", "--ignore", "tests/pool", "--ignore", "tests/crdb"),
        *("--test-dsn", " ".join(f"{k}={v}" for k, v in _words(address).items())),
    ),
    environment=lambda address: {},
)
ASYNCPG: Final = Suite(
    name="asyncpg",
    version=_asyncpg_version,
    requirements=lambda release: (f"asyncpg=={release}", "uvloop", "distro"),
    options=lambda address: (),
    environment=lambda address: address.environment,
)
SUITES: Final = {suite.name: suite for suite in (PSYCOPG, ASYNCPG)}


def _words(address: Address) -> dict[str, str]:
    return {"host": address.host, "port": str(address.port), "user": address.user, "dbname": address.dbname}


@dataclass(frozen=True, slots=True)
class Place:
    """A suite ready to be run: its tests copied away from the sources, which the installed driver must not see."""

    suite: Suite
    release: str
    directory: Path
    python: Path
    pattern: str  # of the tests that are run

    def command(self, address: Address) -> list[str]:
        timeouts = (f"--timeout={TEST_BOUND_S}", "-o", "timeout_method=signal")
        return [
            *(str(self.python), "-m", "pytest", "-q", "-p", "recorder", "-o", "addopts=", *timeouts),
            *self.suite.options(address),
            "tests",
        ]

    def environment(self, address: Address) -> dict[str, str]:
        """Ours, without what the libraries under test would read in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PYTEST", "PYTHON"))}
        path = f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}"  # suites start programs of their environment
        ours = {"PATH": path, "PYTHONPATH": str(self.directory / "plugin"), "CONFORMANCE_PATTERN": self.pattern}
        return {**kept, **ours, **self.suite.environment(address)}


def prepare(suite: Suite, source: Path, directory: Path, pattern: str) -> Place:
    """Copies the suite and installs its driver. Safe to repeat: an environment that is there is used again."""
    release = suite.version(source)
    place = directory / f"{suite.name}-{release}"
    environment = place / "venv"
    for name in ("tests", "plugin"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(source / "tests", place / "tests")
    (place / "plugin").mkdir(parents=True)
    shutil.copy(RECORDER, place / "plugin")
    shutil.copy(source / "pyproject.toml", place)
    python = environment / "bin" / "python"
    if not (environment / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *PYTEST, *suite.requirements(release)], check=True)
        (environment / "installed").touch()
    return Place(suite, release, place, python, pattern)
