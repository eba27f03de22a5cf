"""The documentation stays true: what can be checked cheaply against the code is checked here."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from urllib.parse import unquote

import pytest
import typer

from shardmove.cli import documents
from shardmove.cli.exits import Exit
from shardmove.cli.verbs import app
from shardmove.config import Limits, parse
from shardmove.coordinator import status

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = tuple(
    sorted(
        path
        for pattern in ("*.md", "docs/**/*.md", "compose/**/*.md", "benchmarks/**/*.md")
        for path in ROOT.glob(pattern)
    )
)
FENCED: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MACHINE_PATHS: Final = tuple("/" + first for first in ("home/", "root/", "work/", "Users/", "opt/", "mnt/"))
REGISTRIES: Final = tuple(".".join(host) for host in (("pypi", "org"), ("files", "pythonhosted"), ("test", "pypi")))


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(text) if kind == language]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# --- settings, commands, codes


def test_every_limit_is_documented_with_its_unit_and_default() -> None:
    documented = {cells[0].strip("`"): cells[1:] for cells in rows(page("docs/limits.md")) if len(cells) == 4}
    for each in fields(Limits):
        assert each.name in documented, f"docs/limits.md has no row for {each.name}"
        unit, default, bounds = documented[each.name]
        assert default == str(each.default), each.name
        assert unit, each.name
        assert bounds, each.name
    assert set(documented) - {"setting"} == {each.name for each in fields(Limits)}


def commands() -> list[str]:
    """`apply`, `plan split`, … as the parser knows them."""

    def below(command: Any, path: str) -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path
            return
        for name, each in inner.items():
            yield from below(each, f"{path} {name}".strip())

    return list(below(typer.main.get_command(app), ""))


@pytest.mark.parametrize("command", commands())
def test_every_command_is_named_in_the_readme(command: str) -> None:
    assert re.search(rf"\bshardmove {command}\b", page("README.md"))


def test_no_page_names_a_command_that_does_not_exist() -> None:
    known = {command.split()[0] for command in commands()}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        code = "\n".join([*blocks(text, ""), *re.findall(r"`[^`\n]+`", FENCED.sub("", text))])
        for named in re.findall(r"(?:^|`)shardmove ([a-z]+)\b", code, re.MULTILINE):
            assert named in known, f"{path.name} names `shardmove {named}`"


def test_the_table_of_exit_codes_is_that_of_the_command_line() -> None:
    section = page("README.md").split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    codes = [int(cells[0]) for cells in rows(section) if cells[0].isdigit()]
    assert codes == [code.value for code in Exit]
    epilog = app.info.epilog
    assert isinstance(epilog, str)
    for code, meaning in re.findall(r"(\d) (\w+)", epilog):
        assert re.search(rf"^\| {code} \|.*{meaning}", section, re.MULTILINE), f"{code} {meaning}"


# --- examples


def examples() -> list[tuple[str, str]]:
    in_pages = [(path.name, block) for path in PAGES for block in blocks(path.read_text(encoding="utf-8"), "toml")]
    return in_pages + [(path.name, path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("compose/*.toml"))]


def test_every_example_of_a_configuration_is_one() -> None:
    assert {name for name, _ in examples()} >= {"README.md", "cluster.toml"}
    for name, text in examples():
        config = parse(tomllib.loads(text))
        assert len(config.shards) >= 2, name
        assert config.first_routes, name


def test_the_readmes_python_compiles() -> None:
    assert blocks(page("README.md"), "python")
    for block in blocks(page("README.md"), "python"):
        compile(block, "README.md", "exec")


def keys_returned(module: ModuleType, function: str) -> set[str]:
    """The keys of the dictionary that the function returns, as its source has them."""
    tree = ast.parse(inspect.getsource(getattr(module, function)))
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    (returned,) = [value for value in found if isinstance(value, ast.Dict)]
    return {key.value for key in returned.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def test_the_json_shapes_are_those_that_the_code_prints() -> None:
    _, status_, plan, routes, verify = [json.loads(block) for block in blocks(page("docs/json.md"), "json")]
    assert set(status_["moves"][0]) == keys_returned(status, "status")
    assert set(plan) == keys_returned(documents, "plan")
    assert set(plan["moves"][0]) == keys_returned(documents, "_planned")
    assert set(routes) == keys_returned(documents, "routes")
    assert set(verify) == keys_returned(documents, "verdicts")
    assert set(verify["tables"][0]) == keys_returned(documents, "_compared")


# --- names of the code


def source(path: str) -> str:
    """The text of `protocol/fence.py` or `workers/copy.py`; fails where there is no such file."""
    found = [place for place in (ROOT / "shardmove" / path, ROOT / path) if place.is_file()]
    assert found, f"ARCHITECTURE.md names {path}"
    return found[0].read_text(encoding="utf-8")


def test_every_function_that_the_architecture_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|sql)): ([\w, ]+)`", page("ARCHITECTURE.md"))
    assert len(named) > 20
    for path, names in named:
        text = source(path)
        for name in re.split(r",\s*", names):
            pattern = rf"(?:def|class) {name}\b|FUNCTION shardmove_catalog\.{name}\("
            assert re.search(pattern, text), f"ARCHITECTURE.md names {name} of {path}"


def test_every_file_that_a_page_names_is_there() -> None:
    for path in PAGES:
        for named in re.findall(r"`([\w/]+/[\w.]+\.(?:py|sql|toml|yaml))`", path.read_text(encoding="utf-8")):
            source(named)


def test_every_test_and_control_point_that_the_architecture_names_is_there() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page("ARCHITECTURE.md")))
    missing = {name for name in named if not re.search(rf"\bdef {name}\(", tests)}
    assert not missing
    code = "\n".join(path.read_text(encoding="utf-8") for room in ("shardmove", "workers") for path in sources(room))
    reached = set(re.findall(r'points\.reach\("([\w.]+)"\)', code))
    points = set(re.findall(r"`(\w+\.(?:before|after|between)_\w+)`", page("ARCHITECTURE.md")))
    assert points
    assert points <= reached


def sources(room: str) -> Sequence[Path]:
    return sorted((ROOT / room).rglob("*.py"))


# --- links and places


def slug(heading: str) -> str:
    """The anchor that a heading gets where pages are shown."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def test_relative_links_resolve() -> None:
    for path in PAGES:
        text = FENCED.sub("", path.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name} links to {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {slug(each) for each in headings}, f"{path.name} links to {link}"


def tracked() -> list[Path]:
    """Every text file that is under version control; without git, what lies in the rooms and beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = [*PAGES, *(path for room in ("shardmove", "workers", "router", "tests") for path in sources(room))]
    return [path for path in found if path.is_file()]


def test_no_file_names_a_machines_path_or_a_registry() -> None:
    forbidden = (*MACHINE_PATHS, *REGISTRIES, f"{ROOT}/")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for each in forbidden:
            assert each not in text, f"{path.relative_to(ROOT)} names {each}"
