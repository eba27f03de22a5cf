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
from typing import Any, Final, TypeVar

from shardmove.domain.errors import ConfigurationError, NotFound
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.routes import Route, Routes
from shardmove.wire.scram import Verifier

DEFAULT_PATH = "cluster.toml"
DEFAULT_PORT = 6432
LATE_ROUTERS = ("go_on", "give_up")
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
    router_grace_ms: float = 50.0
    """How long a cutover waits for the routers to acknowledge the hold, before the fence is closed."""
    late_routers: str = "go_on"
    """What a cutover does about a router that did not: go_on, or give_up the attempt."""
    phase_min_s: float = 30.0
    """How long a move stays in phase 3, and in phase 4, before the next one."""
    phase_lag_ms: float = 250.0
    """Reads of the target begin only after a catch-up pass that was shorter than this."""
    phase_compared_min: int = 1_000
    """Reads of phase 3 that have to be compared before reads of the target begin."""
    phase_differences_max: float = 0.000_001
    """The part of the compared reads that may have differed."""
    phase_mirror_errors_max: float = 0.01
    """The part of the routers' catch-ups that may have failed, in the phase that is to be left."""

    def __post_init__(self) -> None:
        if self.late_routers not in LATE_ROUTERS:
            raise ConfigurationError(
                f"[limits] late_routers {self.late_routers!r} is unknown", hint=f"known are: {', '.join(LATE_ROUTERS)}"
            )
        for each in fields(self):
            if each.type in ("int", "float"):
                _require_positive(getattr(self, each.name), f"[limits] {each.name}", whole=False)


class Pooling(StrEnum):
    """For how long a client of the router keeps a server connection."""

    SESSION = "session"
    TRANSACTION = "transaction"


class Authentication(StrEnum):
    """How the router makes sure of who its clients are."""

    SCRAM = "scram"
    TRUST = "trust"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener waits: a TCP host and port, or the port of a Unix socket in a directory."""

    host: str
    port: int

    @property
    def is_local(self) -> bool:
        """True for a Unix socket: the host is its directory."""
        return self.host.startswith("/")

    @property
    def socket_path(self) -> Path:
        return Path(self.host) / f".s.PGSQL.{self.port}"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`host:port`, `[::1]:port`, `/directory` or `/directory:port`. Raises ConfigurationError."""
        host, colon, port = text.strip().rpartition(":")
        if text.strip().startswith("/") and not colon:
            return cls(text.strip(), DEFAULT_PORT)
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ConfigurationError(f"{text!r} is not an address", hint="write host:port, or /directory")
        return cls(host.removeprefix("[").removesuffix("]"), int(port))


STALE_AFTER_MAX_S: Final = 400.0


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The [router] section: where it listens, whom it lets in, and what bounds it. Units last in the names."""

    listen: str = f"127.0.0.1:{DEFAULT_PORT}"
    """Addresses, separated by commas: host:port (port 0: a free one), or the directory of a Unix socket."""
    database: str = ""
    """The name of the database that clients must ask for. Empty: whatever they ask for."""
    home: str = ""
    """The shard of all that is in no keyspace. Left out: the first one of the file."""
    pooling: Pooling = Pooling.SESSION
    """A server connection is kept until the client leaves (session), or until its transaction ends (transaction)."""
    processes: int = 1
    """Processes that share the addresses, each with its own connections to the shards."""
    clients_max: int = 1000
    """Clients at the same time, per process; the next one is refused (53300)."""
    servers_max: int = 100
    """Connections to each shard, per process."""
    message_bytes_max: int = 67_108_864
    """The longest message of a client. A longer one ends its connection."""
    buffer_bytes: int = 262_144
    """Bytes that may wait for one side of a client's connection before the other side is not read any more."""
    queue_timeout_s: float = 15.0
    """How long a client waits for a server connection before its statement is refused (53300)."""
    login_timeout_s: float = 15.0
    """How long a client may take from its connection to the end of its authentication."""
    hold_timeout_s: float = 10.0
    """How long a statement is held during a cutover before it is refused (40001: the client may try again)."""
    hold_clients_max: int = 1000
    """Clients whose statements are held at the same time, per process; the next one is refused (40001)."""
    hold_bytes_max: int = 67_108_864
    """Bytes of held statements, per process."""
    confirm_s: float = 3.0
    """A route table that the catalog has not confirmed for so long is not used: statements are held until it is."""
    stale_after_s: float = 60.0
    """For so long a route table that the catalog does not confirm is used for ranges which it says are not moving."""
    target_patience_s: float = 1.0
    """How long a commit may wait for the mirror in phase 4 before the range goes back to phase 3."""
    connect_timeout_s: float = 5.0
    """How long opening a connection to a shard may take, its login included."""
    shutdown_timeout_s: float = 30.0
    """How long transactions may go on after SIGTERM before their connections end (57P01)."""
    idle_server_s: float = 600.0
    """A server connection that nobody used for so long is closed."""
    authentication: Authentication = Authentication.SCRAM
    """`scram` checks passwords against [router.users]; `trust` believes whatever name a client gives."""
    admins: tuple[str, ...] = ()
    """Users that may connect to the database `shardmove`, the router's own console."""
    server_user: str = ""
    """The user that the router logs in as at the shards. Empty: as the client's own."""
    tls_certificate: Path | None = None
    """The certificate (chain) that clients are shown, PEM; relative to the configuration file."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    tls_required: bool = False
    """Refuse TCP clients that do not ask for TLS."""
    metrics: str = ""
    """host:port of the page for Prometheus; with several processes each has its own, on the ports that follow."""
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """[router.users]: the SCRAM-SHA-256 verifier of each user, as `shardmove router verifier` prints it."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type in ("int", "float"):
                _require_positive(getattr(self, each.name), f"[router] {each.name}", whole=each.type == "int")
        if self.stale_after_s > STALE_AFTER_MAX_S:
            raise ConfigurationError(
                f"[router] stale_after_s is {self.stale_after_s:g}, and {STALE_AFTER_MAX_S:g} at most",
                hint="the catalog forgets a router that is silent for ten minutes: by then it must serve nothing",
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigurationError("[router] tls_certificate and tls_key go together: one of them is missing")
        if self.tls_required and self.tls_certificate is None:
            raise ConfigurationError("[router] tls_required needs tls_certificate and tls_key")
        _ = self.addresses, self.metrics_address

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(Address.parse(each) for each in self.listen.split(","))

    @property
    def stale_s(self) -> float:
        return max(self.stale_after_s, self.confirm_s)

    @property
    def metrics_address(self) -> Address | None:
        return Address.parse(self.metrics) if self.metrics else None


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `first_routes` holds the routes that `apply` publishes where a keyspace has none yet."""

    catalog_dsn: str
    shards: Mapping[str, str]
    keyspaces: Mapping[str, Keyspace]
    first_routes: Mapping[str, Routes]
    routes_file: Path | None = None
    limits: Limits = field(default_factory=Limits)
    router: RouterSettings = field(default_factory=RouterSettings)

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
    _only(document, {"catalog", "shards", "keyspaces", "export", "limits", "router"}, "the file")
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
        router=_router(_section(document, "router"), shards, base),
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


def _router(entry: Mapping[str, Any], shards: Mapping[str, str], base: Path) -> RouterSettings:
    _only(entry, {each.name for each in fields(RouterSettings)}, "[router]")
    values: dict[str, Any] = {name: _router_value(name, value, base) for name, value in entry.items()}
    values.setdefault("home", next(iter(shards)))
    settings = RouterSettings(**values)
    if settings.home not in shards:
        raise ConfigurationError(
            f"[router] home names an unknown shard {settings.home!r}", hint=f"known are: {', '.join(sorted(shards))}"
        )
    if settings.authentication == Authentication.SCRAM:
        for admin in settings.admins:
            if admin not in settings.users:
                raise ConfigurationError(f"[router] admins names {admin!r}, who is not in [router.users]")
    return settings


def _router_value(name: str, value: object, base: Path) -> object:
    where = f"[router] {name}"
    match _ROUTER_TYPES[name]:
        case "Pooling":
            return _one_of(Pooling, value, name, "[router]")
        case "Authentication":
            return _one_of(Authentication, value, name, "[router]")
        case "bool":
            return _instance(bool, value, where, "true or false")
        case "str":
            return _instance(str, value, where, "a text")
        case "Path | None":
            return base / _instance(str, value, where, "the name of a file")
        case "tuple[str, ...]":
            names = _instance(list, value, where, "a list of names")
            return tuple(_instance(str, each, where, "a list of names") for each in names)
        case "Mapping[str, str]":
            return _verifiers(value)
        case _:
            return value  # a number: the class itself looks


_ROUTER_TYPES: Mapping[str, str] = {each.name: str(each.type) for each in fields(RouterSettings)}
Value = TypeVar("Value")


def _instance(kind: type[Value], value: object, where: str, expected: str) -> Value:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{where} must be {expected}, not {value!r}")
    return value


def _require_positive(value: Any, where: str, *, whole: bool) -> None:
    is_number = isinstance(value, int) or (isinstance(value, float) and not whole)
    if isinstance(value, bool) or not is_number or not value > 0:
        raise ConfigurationError(f"{where} must be a {'whole ' if whole else ''}number above 0, not {value!r}")


def _verifiers(entry: object) -> Mapping[str, str]:
    """Never quotes what it refuses: it may be a password in the wrong place."""
    if not isinstance(entry, Mapping):
        raise ConfigurationError("[router.users] must be a table")
    for user, verifier in entry.items():
        try:
            Verifier.parse(verifier if isinstance(verifier, str) else "")
        except ValueError:
            raise ConfigurationError(
                f"[router.users] {user} is not a SCRAM-SHA-256 verifier",
                hint="`shardmove router verifier` makes one from a password; a password itself does not belong here",
            ) from None
    return dict(entry)
