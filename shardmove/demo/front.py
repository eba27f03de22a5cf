"""The router of the demo: a process of its own, its users, and what can be asked of it.

    with Front(config_file, log_file) as front:
        psycopg.connect(front.dsn)          as the shop, an ordinary role
        front.stats()                       as the operator, in the router's own console

Passwords are made anew each time; the configuration holds verifiers of them, as it does everywhere.
"""

from __future__ import annotations

import json
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import psycopg
from psycopg.conninfo import make_conninfo

from shardmove.config import Address
from shardmove.domain.errors import Failed
from shardmove.wire.scram import Verifier

CLIENT: Final = "shop"
OPERATOR: Final = "operator"
CONSOLE: Final = "shardmove"
START_BOUND_S: Final = 30.0
STOP_BOUND_S: Final = 20.0
MAKE_ROLE: Final = (
    "CREATE ROLE shop LOGIN",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO shop",
    "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO shop",
)
"""On each shard: what the application needs by itself, and nothing for our sake."""


class Front:
    """A context manager: the router serves clients while it is entered, and ends with this process, however it ends."""

    def __init__(self, config_file: Path, log_file: Path) -> None:
        self._config_file = config_file
        self._log_file = log_file
        self._passwords = {user: secrets.token_urlsafe(12) for user in (CLIENT, OPERATOR)}
        self._process: subprocess.Popen[bytes] | None = None
        self._address = Address("127.0.0.1", 0)

    @property
    def section(self) -> str:
        """[router] of the configuration: a free port, two users."""
        users = [f"{user} = {json.dumps(str(Verifier.make(word)))}" for user, word in self._passwords.items()]
        lines = ["[router]", 'listen = "127.0.0.1:0"', f"admins = {json.dumps([OPERATOR])}", "[router.users]", *users]
        return "\n".join(lines) + "\n"

    @property
    def dsn(self) -> str:
        """What the shop's programs are given: one address."""
        return self._dsn(CLIENT, "shop")

    def stats(self) -> dict[str, int]:
        """`SHOW STATS` of the router's console: counters since its start."""
        with psycopg.connect(self._dsn(OPERATOR, CONSOLE), autocommit=True) as connection:
            cursor = psycopg.ClientCursor(connection)
            rows = cursor.execute("SHOW STATS").fetchall()
            columns = [column.name for column in cursor.description or ()]
        name, value = columns.index("name"), columns.index("value")
        return {row[name]: int(float(row[value])) for row in rows}

    def ask(self, statement: str) -> Sequence[str]:
        """A statement of the shop's, and what psql would show of the answer: notices, rows, or the error."""
        said: list[str] = []

        def note(notice: psycopg.errors.Diagnostic) -> None:
            said.append(f"{notice.severity}:  {notice.message_primary}")

        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.add_notice_handler(note)
            try:
                rows: list[tuple[Any, ...]] = connection.execute(statement.encode()).fetchall()
            except psycopg.Error as error:
                hint = error.diag.message_hint
                return [f"ERROR:  {error.diag.message_primary}", *([f"HINT:  {hint}"] if hint else [])]
        return [*said, *(" | ".join(map(str, row)) for row in rows)]

    def _dsn(self, user: str, database: str) -> str:
        return make_conninfo(
            host=self._address.host,
            port=self._address.port,
            user=user,
            password=self._passwords[user],
            dbname=database,
        )

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "shardmove", "router", "serve", "--json", "--until-eof"]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "-c", str(self._config_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the whole process group; we end it when its clients have gone
            )
        try:
            self._address = self._await_ready(self._process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _await_ready(self, process: subprocess.Popen[bytes]) -> Address:
        """It says where it listens, in one line, as soon as it serves clients."""
        assert process.stdout is not None
        deadline, said = time.monotonic() + START_BOUND_S, b""
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            more = process.stdout.read1() if readable else b""  # type: ignore[attr-defined]
            if not more:
                why = self._log_file.read_text(encoding="utf-8", errors="replace").strip()
                raise Failed(f"the router did not start: {why or f'no answer in {START_BOUND_S:g} s'}")
            said += more
        return Address.parse(json.loads(said)["addresses"][0])

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.communicate(timeout=STOP_BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
