"""The configuration: one TOML file (DESIGN §7), read once, a frozen value afterwards.

Secrets come from libpq's own places (environment, passfile, service file); a password written into a dsn works, and is
never printed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from shardmove.domain.errors import ConfigurationError, NotFound
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.routes import Route, Routes

DEFAULT_PATH = "cluster.toml"
Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Limits:
    """Every number that bounds what a move may do to the servers. Units last in the names."""

    workers: int = 2
    """Worker processes that copy, digest and erase."""
    batch_bytes: int = 4_000_000
    """A batch's size aims at this many bytes of COPY stream."""
    batch_rows_max: int = 50_000
    batch_time_s: float = 1.0
    """A batch that takes longer makes the next ones smaller."""
    batch_retries: int = 5
    """How often a batch that met a unique violation is tried again after a catch-up."""
    erase_rows: int = 5_000
    """Rows that one transaction of an erasure deletes at most."""
    mirror_rows: int = 20_000
    """Journal entries that one catch-up takes at most (all, where a unique value is in the way)."""
    snapshot_time_s: float = 10.0
    """A verification takes new snapshots after this long, so that vacuum is not held up."""
    ddl_lock_timeout_ms: int = 200
    """How long CREATE TRIGGER and the like may wait in front of the application, per try."""
    ddl_patience_s: float = 60.0
    """How long a DDL statement of ours is tried again before the step gives up."""
    cutover_lag_ms: float = 250.0
    """A cutover starts only after a catch-up pass that was shorter than this."""
    cutover_grace_s: float = 5.0
    """How long a cutover waits for transactions that already wrote to the range before an attempt is given up."""
    max_stall_ms: int = 500
    """An attempt that would hold up writes for longer gives up."""
    cutover_attempts: int = 10
    keep_source_s: float = 2.0
    """`complete` erases the source no sooner than this after the cutover. A client whose route table is that old finds
    the rows there still, and the fence tells it; where they are gone, its UPDATE touches nothing and says nothing."""
    sequence_margin: int = 100_000
    """How far a receiving shard's sequences are set above the giving one's."""
    journal_rows_warning: int = 5_000_000
    lease_ttl_s: float = 15.0
    """A lease whose holder is silent for this long may be taken over although its connection looks alive."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigurationError(f"[limits] {each.name} must be a number above 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `first_routes` holds the routes that `apply` publishes where a keyspace has none yet."""

    catalog_dsn: str
    shards: Mapping[str, str]
    keyspaces: Mapping[str, Keyspace]
    first_routes: Mapping[str, Routes]
    routes_file: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def shard_dsn(self, name: str) -> str:
        try:
            return self.shards[name]
        except KeyError:
            raise NotFound(
                f"there is no shard {name} in the configuration", hint=f"it has: {', '.join(sorted(self.shards))}"
            ) from None

    def keyspace(self, name: str) -> Keyspace:
        try:
            return self.keyspaces[name]
        except KeyError:
            raise NotFound(
                f"there is no keyspace {name} in the configuration",
                hint=f"it has: {', '.join(sorted(self.keyspaces))}",
            ) from None


def find(path: str | None) -> Path:
    """The configuration file: the one named, else SHARDMOVE_CONFIG, else ./cluster.toml. Raises where it is missing."""
    found = Path(path or os.environ.get("SHARDMOVE_CONFIG") or DEFAULT_PATH)
    if not found.is_file():
        raise ConfigurationError(
            f"there is no configuration file {found}", hint="name one with -c FILE or SHARDMOVE_CONFIG"
        )
    return found


def load(path: Path) -> Config:
    """Reads and checks the file. Raises ConfigurationError that names the entry at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None
    try:
        return parse(document, base=path.parent)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}", hint=error.hint) from None


def parse(document: Mapping[str, Any], *, base: Path = Path()) -> Config:
    """Makes a Config from a parsed document. `base` is what a relative routes_file is relative to."""
    _only(document, {"catalog", "shards", "keyspaces", "export", "limits"}, "the file")
    shards = {name: _dsn(entry, f"[shards.{name}]") for name, entry in _section(document, "shards").items()}
    if not shards:
        raise ConfigurationError("no [shards.NAME] is given")
    _refuse_twins(shards)
    keyspaces: dict[str, Keyspace] = {}
    routes: dict[str, Routes] = {}
    for name, entry in _section(document, "keyspaces").items():
        keyspaces[name], routes[name] = _keyspace(name, entry, shards)
    export = _section(document, "export")
    _only(export, {"routes_file"}, "[export]")
    routes_file = export.get("routes_file")
    return Config(
        catalog_dsn=_dsn(document.get("catalog"), "[catalog]"),
        shards=shards,
        keyspaces=keyspaces,
        first_routes=routes,
        routes_file=None if routes_file is None else base / routes_file,
        limits=_limits(_section(document, "limits")),
    )


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = document.get(name, {})
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"[{name}] must be a table")
    return section


def _only(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in entry:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are: {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where} has an unknown entry {name!r}", hint=hint)


def _dsn(entry: object, where: str) -> str:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("dsn"), str):
        raise ConfigurationError(f'{where} needs dsn = "…"')
    _only(entry, {"dsn"}, where)
    return str(entry["dsn"])


def _refuse_twins(shards: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for name, dsn in shards.items():
        if dsn in seen:
            raise ConfigurationError(f"[shards.{seen[dsn]}] and [shards.{name}] have the same dsn: a shard named twice")
        seen[dsn] = name


def _keyspace(name: str, entry: object, shards: Mapping[str, str]) -> tuple[Keyspace, Routes]:
    where = f"[keyspaces.{name}]"
    if not isinstance(entry, Mapping):
        raise ConfigurationError(f"{where} must be a table")
    _only(entry, {"key_type", "scheme", "reference_tables", "tables", "routes"}, where)
    key_type = _one_of(KeyType, entry.get("key_type", "bigint"), "key_type", where)
    scheme = _one_of(Scheme, entry.get("scheme", "range"), "scheme", where)
    tables = entry.get("tables", {})
    if not isinstance(tables, Mapping) or not tables:
        raise ConfigurationError(f"{where} names no tables", hint=f"[keyspaces.{name}.tables] table = key column")
    keyspace = Keyspace(
        name,
        key_type,
        scheme,
        {TableName.parse(table): str(column) for table, column in tables.items()},
        tuple(TableName.parse(table) for table in entry.get("reference_tables", ())),
    )
    return keyspace, _first_routes(keyspace, entry.get("routes"), shards)


def _one_of(kind: type[Choice], text: object, name: str, where: str) -> Choice:
    try:
        return kind(str(text))
    except ValueError:
        known = ", ".join(kind)
        raise ConfigurationError(f"{where} {name} {text!r} is not supported", hint=f"known are: {known}") from None


def _first_routes(keyspace: Keyspace, entries: object, shards: Mapping[str, str]) -> Routes:
    where = f"[[keyspaces.{keyspace.name}.routes]]"
    if not isinstance(entries, list) or not entries:
        raise ConfigurationError(f"{where} is missing", hint=f'{where} range = ":" and shard = "{next(iter(shards))}"')
    routes = []
    for entry in entries:
        _only(entry, {"range", "shard"}, where)
        if entry.get("shard") not in shards:
            raise ConfigurationError(f"{where} names an unknown shard {entry.get('shard')!r}")
        routes.append(Route(keyspace.bound_type.parse_range(str(entry.get("range"))), entry["shard"]))
    return Routes.of(keyspace.name, routes)


def _limits(entry: Mapping[str, Any]) -> Limits:
    _only(entry, {each.name for each in fields(Limits)}, "[limits]")
    return Limits(**entry)
