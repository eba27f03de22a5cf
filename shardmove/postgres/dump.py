"""pg_dump and pg_restore: a database's schema as an archive, its table of contents, and the SQL of chosen entries.

PostgreSQL's own tools know every kind of object and every version; what is ours is only the choice among the entries.
The choice goes by the object ids that the table of contents carries, never by names: the listing does not quote them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmove.domain.errors import ConfigurationError, Failed, Refused
from shardmove.postgres.binaries import ENVIRONMENT_VARIABLE, wheel_programs
from shardmove.postgres.connect import CONNECT_TIMEOUT_S, UNACKNOWLEDGED_MS

Object: TypeAlias = tuple[int, int]
"""What the server knows an object by: the oid of its catalog, and its own. The catalog is 0 where it has none."""

_NEEDED: Final = ("pg_dump", "pg_restore")
_LOCK_WAIT_MS: Final = 10_000
_IGNORED: Final = ("--no-tablespaces", "--no-publications", "--no-subscriptions", "--no-security-labels")
_ACCESS_METHODS_FROM: Final = 15  # the first version with --no-table-access-method
_NAMES_PER_PATTERN: Final = 500  # one argument of a process holds 128 kB

_PINNED: Final = "-c standard_conforming_strings=on -c quote_all_identifiers=off"
"""pg_dump pins the rest itself; these two it takes over from the server."""

_SECRET_VARIABLES: Final = {"password": "PGPASSWORD"}
_SECRETS: Final = {*_SECRET_VARIABLES, "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table of contents. An entry comes after those that it depends on.

    Attributes:
        depends_on: ids of entries; ids of objects that are not in the archive are left out.
    """

    id: int
    object: Object
    depends_on: frozenset[int]


@dataclass(frozen=True, slots=True)
class Tools:
    """A directory that holds pg_dump and pg_restore, and their major version."""

    directory: Path
    version: int

    def dump(self, dsn: str, archive: Path, *, snapshot: str, without: Mapping[str, Sequence[str]]) -> None:
        """Writes the schema as `snapshot` shows it, without our own and without the relations named by schema.

        Takes ACCESS SHARE locks on the tables that are not left out, as long as it runs, and waits for each a bounded
        time.

        Raises:
            Failed: pg_dump ended with an error, which the message holds.
            ConfigurationError: the connection string holds a secret that cannot be handed over in the environment.
        """
        connection, secrets = _connection(dsn)
        own = [f"--exclude-schema={schema}" for schema in ("shardmove", "shardmove_catalog")]
        options = ["--format=custom", "--schema-only", "--encoding=UTF8", "--no-password", f"--snapshot={snapshot}"]
        options += [f"--lock-wait-timeout={_LOCK_WAIT_MS}", f"--file={archive}", *_IGNORED, *own]
        options += [f"--exclude-table={pattern}" for pattern in _patterns(without)]
        self._run("pg_dump", *options, f"--dbname={connection}", environment=secrets)

    def contents(self, archive: Path) -> list[Entry]:
        """Everything in the archive, in an order in which it can be made."""
        return list(_entries(self._run("pg_restore", "--list", "--verbose", str(archive))))

    def statements(self, archive: Path, entries: Iterable[Entry]) -> dict[int, str]:
        """The SQL that makes each of the entries, by the entry's id: one statement or several.

        Bare of comments, settings and whatever else only psql understands. To be run with an empty search_path.
        """
        chosen = archive.with_suffix(".list")
        chosen.write_text("".join(f"{entry.id};\n" for entry in entries))
        ignored = [*_IGNORED, *(["--no-table-access-method"] if self.version >= _ACCESS_METHODS_FROM else [])]
        # Only the verbose text says which entry a statement belongs to.
        return _split(self._run("pg_restore", "--verbose", *ignored, f"--use-list={chosen}", "--file=-", str(archive)))

    def _run(self, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            (str(self.directory / program), *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C", "PG_COLOR": "never", **(environment or {})},
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error:" in line or "DETAIL:" in line]
            raise Failed(
                f"{program} ended with status {done.returncode}: {' '.join(errors) or done.stderr.strip()}",
                hint=f"the program is {self.directory / program}; {ENVIRONMENT_VARIABLE} names another directory",
            )
        return done.stdout


def find_tools(server_version: int) -> Tools:
    """The first tools that can read a server of that version (as `connection.info.server_version` has it).

    Those in the directory that the environment names and no others; else those on the PATH, else those of the wheel.

    Raises:
        Refused: there are none, or only older ones.
        ConfigurationError: the environment names a directory without them.
    """
    needed, older = server_version // 10000, list[str]()
    for directory in _directories():
        version = _version(directory / "pg_dump")
        if version >= needed:
            return Tools(directory, version)
        older.append(f"; {directory / 'pg_dump'} is of PostgreSQL {version}")
    raise Refused(
        f"no pg_dump can read a server of PostgreSQL {needed}{''.join(older)}",
        hint=f"install the client programs of PostgreSQL {needed} or newer, or name their directory by"
        f" {ENVIRONMENT_VARIABLE}",
    )


def _directories() -> Iterator[Path]:
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        directory = Path(named).absolute()
        if not _complete(directory):
            raise ConfigurationError(f"no {' and '.join(_NEEDED)} in {directory}, which {ENVIRONMENT_VARIABLE} names")
        yield directory
        return
    if (found := shutil.which("pg_dump")) and _complete(Path(found).parent):
        yield Path(found).parent.absolute()
    with suppress(ConfigurationError):
        yield wheel_programs()


def _complete(directory: Path) -> bool:
    return all(os.access(directory / program, os.X_OK) for program in _NEEDED)


def _version(program: Path) -> int:
    """The major version that a program says it has; 0 where it does not say."""
    said = subprocess.run((program, "--version"), stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout
    match = re.search(rb"\(PostgreSQL\) (\d+)", said)
    return int(match[1]) if match else 0


def _connection(dsn: str) -> tuple[str, dict[str, str]]:
    """The connection string for a process's arguments, which everybody may read, and the variables with the rest."""
    parts = conninfo_to_dict(dsn)
    secrets = {name: str(parts.pop(name)) for name in _SECRETS & parts.keys()}
    if unspeakable := sorted(secrets.keys() - _SECRET_VARIABLES):
        raise ConfigurationError(
            f"pg_dump cannot be given {', '.join(unspeakable)} in secret", hint="keep it in a service file (service=…)"
        )
    environment = {_SECRET_VARIABLES[name]: value for name, value in secrets.items()}
    if "options" in parts:
        parts["options"] = f"{parts['options']} {_PINNED}"
    environment["PGOPTIONS"] = f"{os.environ.get('PGOPTIONS', '')} {_PINNED}".strip()
    bounds = {"connect_timeout": CONNECT_TIMEOUT_S, "tcp_user_timeout": UNACKNOWLEDGED_MS}
    bounds |= {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return make_conninfo("", **{**parts, "application_name": "shardmove schema", **bounds}), environment


def _patterns(without: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """`"schema".("name"|"name")`: outside the quotes a pattern is a regular expression."""
    for schema, names in without.items():
        for first in range(0, len(names), _NAMES_PER_PATTERN):
            some = names[first : first + _NAMES_PER_PATTERN]
            yield f"{_quoted(schema)}.({'|'.join(_quoted(name) for name in some)})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_ENTRY: Final = re.compile(
    r"^(?P<id>\d+); (?P<catalog>\d+) (?P<oid>\d+) [^\n]*(?:\n;\tdepends on:(?P<depends_on>[ \d]*)$)?", re.MULTILINE
)


def _entries(listing: str) -> Iterator[Entry]:
    for line in _ENTRY.finditer(listing):
        depends_on = frozenset(map(int, (line["depends_on"] or "").split()))
        yield Entry(int(line["id"]), (int(line["catalog"]), int(line["oid"])), depends_on)


_TOKENS: Final = re.compile(
    r"""
    ^--\n -- \ TOC\ entry\ (?P<id>\d+)\ [^\n]*\n (?:--[^\n]*\n)+   # the header of an entry
    | (?P<dropped> --[^\n]* | ^\\[^\n]* )                          # a comment; a line for psql
    | '[^']*' | "[^"]*"                                            # a doubled quote is the end of one and another
    | \$ (?P<tag> (?:[^\W\d]\w*)? ) \$ .*? \$ (?P=tag) \$
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
"""Where one entry ends and the next begins: never inside a literal, whatever somebody wrote into a comment."""


def _split(script: str) -> dict[int, str]:
    kept: list[str] = []  # of the preamble, which is not used
    entries: dict[int, list[str]] = {}
    position = 0
    for token in _TOKENS.finditer(script):
        if token["id"] is None and token["dropped"] is None:
            continue
        kept.append(script[position : token.start()])
        position = token.end()
        if token["id"] is not None:
            kept = entries.setdefault(int(token["id"]), [])
    kept.append(script[position:])
    texts = {entry: "".join(parts).strip() for entry, parts in entries.items()}
    return {entry: text for entry, text in texts.items() if text}
