"""psql and pgbench through the router: programs that nobody can adapt to it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from shardmove.domain.errors import ConfigurationError
from shardmove.postgres.binaries import wheel_programs
from tests.support.routed import SPLIT_AT, Routed
from tests.support.router import Router
from tests.support.servers import OLD_INSTALLED

BOUND_S: Final = 120
TENANTS: Final = 200
TRANSACTIONS: Final = 40
CLIENTS: Final = 4


def programs_of(release: str) -> Path | None:
    if release == "wheel":
        try:
            return wheel_programs()
        except ConfigurationError:
            return None
    return OLD_INSTALLED if OLD_INSTALLED.exists() else None


@pytest.fixture(params=["wheel", "installed"])
def programs(request: pytest.FixtureRequest) -> Path:
    """Client programs of two releases: they do not greet in the same way, nor ask the same of the system's tables."""
    found = programs_of(request.param)
    if found is None or not all(shutil.which(name, path=found) for name in ("psql", "pgbench")):
        pytest.skip(f"there are no client programs of the {request.param} release")
    return found


Psql = Callable[..., str]


@pytest.fixture
def router(routed: Routed) -> Router:
    return routed.router()


@pytest.fixture
def psql(programs: Path, routed: Routed, router: Router) -> Psql:
    """`psql("SELECT 1")`: what it prints, through the router; with `around=True`, directly from the home shard."""

    def run(*commands: str, around: bool = False) -> str:
        ended = subprocess.run(
            psql_command(programs, routed, router, around=around),
            input="\n".join(commands) + "\n",
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert not ended.stderr, ended.stderr
        return ended.stdout

    return run


def psql_command(programs: Path, routed: Routed, router: Router, *, around: bool = False) -> list[str]:
    dsn = routed.dsns["s1"] if around else router.dsn(routed.dbname)
    return [str(programs / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-P", "pager=off", "-d", dsn]


# --- meta-commands

DESCRIBING: Final = (
    *("\\d", "\\d items", "\\d+ items", "\\d noted", "\\dt", "\\dt+", "\\di", "\\dv", "\\ds", "\\df", "\\dn", "\\dn+"),
    *("\\du", "\\dx", "\\dT", "\\do", "\\dc", "\\db", "\\dp", "\\dconfig", "\\sf+ pg_catalog.now()"),
)


def test_describing_commands_say_what_they_say_directly(psql: Psql) -> None:
    commands = [
        f"\\echo ===== {command}\n{command}".replace("\\echo ===== \\", "\\echo ===== ") for command in DESCRIBING
    ]
    assert psql(*commands) == psql(*commands, around=True)


# --- COPY


def rows_of(tenants: range) -> list[str]:
    return [f"{tenant}\t{id_}\tnote {tenant} {id_}\t0" for tenant in tenants for id_ in range(3)]


@pytest.mark.parametrize("shard", ["s1", "s2"])
def test_copy_in_goes_to_the_shard_of_its_rows_and_copy_out_gives_them_back(
    psql: Psql, routed: Routed, tmp_path: Path, shard: str
) -> None:
    tenants = range(SPLIT_AT) if shard == "s1" else range(SPLIT_AT, TENANTS)
    (tmp_path / "in").write_text("\n".join(rows_of(tenants)) + "\n", encoding="utf-8")
    psql(f"\\copy items (tenant_id, id, note, amount) FROM '{tmp_path / 'in'}'")
    assert counted(routed) == {"s1": 0, "s2": 0, shard: 3 * len(tenants)}
    for tenant in (tenants[0], tenants[-1]):
        psql(f"\\copy (SELECT * FROM items WHERE tenant_id = {tenant} ORDER BY id) TO '{tmp_path / 'out'}'")
        assert (tmp_path / "out").read_text(encoding="utf-8").splitlines() == rows_of(range(tenant, tenant + 1))


def test_copy_in_as_csv_with_a_header_and_quoted_line_ends(psql: Psql, routed: Routed, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('id,note,tenant_id\n1,"a\nb, ""c""",150\n2,,150\n3,\\.x,151\n', encoding="utf-8")
    psql(f"\\copy items (id, note, tenant_id) FROM '{source}' WITH (FORMAT csv, HEADER)")
    assert routed.execute("s2", "SELECT tenant_id, id, note FROM items ORDER BY id") == [
        (150, 1, 'a\nb, "c"'),
        (150, 2, None),
        (151, 3, "\\.x"),
    ]
    assert counted(routed)["s1"] == 0


def test_copy_from_the_script_itself(psql: Psql, routed: Routed) -> None:
    said = psql("COPY items (tenant_id, id) FROM stdin;", "101\t1", "102\t1", "\\.", "SELECT 'goes on';")
    assert "goes on" in said
    assert counted(routed) == {"s1": 0, "s2": 2}


@pytest.mark.parametrize("tenants", [(1, 101), (101, 1), (*[5] * 20_000, 101)], ids=["home first", "home last", "late"])
def test_copy_in_of_rows_of_two_shards_fails_whole(
    programs: Path, routed: Routed, router: Router, tenants: Sequence[int]
) -> None:
    rows = [f"{tenant}\t{id_}" for id_, tenant in enumerate(tenants)]
    ended = subprocess.run(
        psql_command(programs, routed, router),
        input="\n".join(["COPY items (tenant_id, id) FROM stdin;", *rows, "\\.", ""]),
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert ended.returncode == 3
    assert "belong to s1 and s2" in ended.stderr or "belong to s2 and s1" in ended.stderr
    assert counted(routed) == {"s1": 0, "s2": 0}


def counted(routed: Routed) -> dict[str, int]:
    return {shard: routed.execute(shard, "SELECT count(*) FROM items")[0][0] for shard in ("s1", "s2")}


# --- what is typed meanwhile


def test_watch_repeats_until_it_is_interrupted(programs: Path, routed: Routed, router: Router) -> None:
    routed.execute("s2", "INSERT INTO items (tenant_id, id) VALUES (150, 77)")
    command = [*psql_command(programs, routed, router), "-A", "-t"]
    script = routed.directory / "watch.sql"
    script.write_text("SELECT 'seen', id FROM items WHERE tenant_id = 150 \\watch 0.05\n", encoding="utf-8")
    with subprocess.Popen(
        [*command, "-f", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            assert "ERROR" not in line, line
            seen += line.startswith("seen|77")
            if seen == 3:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=BOUND_S)
    assert seen == 3


def test_interrupting_psql_cancels_the_statement(programs: Path, routed: Routed, router: Router) -> None:
    sleeping = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(%' AND state = 'active'"
        " AND datname = current_database()"
    )
    with subprocess.Popen(
        [*psql_command(programs, routed, router), "-c", "SELECT pg_sleep(100)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        await_rows(routed, sleeping, 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=BOUND_S)
    assert "canceling statement due to user request" in said
    await_rows(routed, sleeping, 0)


def await_rows(routed: Routed, statement: str, count: int) -> None:
    deadline = time.monotonic() + BOUND_S
    while (found := routed.execute("s1", statement)) != [(count,)]:
        assert time.monotonic() < deadline, f"{statement}: {found}"
        time.sleep(0.02)


# --- pgbench

READING: Final = f"\\set id random(0, {TENANTS - 1})\nSELECT amount FROM items WHERE tenant_id = :id;\n"
WRITING: Final = f"""\\set id random(0, {TENANTS - 1})
BEGIN;
UPDATE items SET amount = amount + 1 WHERE tenant_id = :id AND id = 1;
SELECT amount FROM items WHERE tenant_id = :id AND id = 1;
END;
"""


@pytest.mark.parametrize("pooling", ["session", "transaction"])
@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
def test_pgbench(programs: Path, routed: Routed, mode: str, pooling: str) -> None:
    for shard, tenants in (("s1", f"0, {SPLIT_AT - 1}"), ("s2", f"{SPLIT_AT}, {TENANTS - 1}")):
        routed.execute(shard, f"INSERT INTO items (tenant_id, id) SELECT i, 1 FROM generate_series({tenants}) i")
    for name, script in (("reading", READING), ("writing", WRITING)):
        (routed.directory / f"{name}.sql").write_text(script, encoding="utf-8")
    router = routed.router(pooling=pooling)
    for name in ("reading", "writing"):
        said = run_pgbench(programs, routed, router, mode, name)
        assert f"actually processed: {CLIENTS * TRANSACTIONS}/{CLIENTS * TRANSACTIONS}" in said, said
    written = [routed.execute(shard, "SELECT sum(amount) FROM items")[0][0] for shard in ("s1", "s2")]
    assert sum(written) == CLIENTS * TRANSACTIONS
    assert all(written)


def run_pgbench(programs: Path, routed: Routed, router: Router, mode: str, script: str) -> str:
    ended = subprocess.run(
        [
            *(str(programs / "pgbench"), "-n", "-M", mode, "-f", str(routed.directory / f"{script}.sql")),
            *("-c", str(CLIENTS), "-j", "1", "-t", str(TRANSACTIONS), routed.dbname),
        ],
        env={**os.environ, **router.environment(routed.dbname)},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not re.search("error|FATAL", ended.stderr), ended.stderr
    return ended.stdout
