"""How the router reaches a shard, and how both ends are encrypted: as libpq would, because libpq is asked.

`resolve` lets libpq read the connection string, service file, environment and passfile. It asks for a connection with
one option that libpq refuses after it has resolved all others, and before it looks up or connects to any host.

What `sslmode` means (PostgreSQL manual, SSL Support of libpq):

    sslmode      tried, in order     chain is checked                        host name is checked
    disable      plain               -                                       -
    allow        plain, TLS          where a root certificate is there       no
    prefer       TLS, plain          where a root certificate is there       no
    require      TLS                 where a root certificate is there       no
    verify-ca    TLS                 always                                  no
    verify-full  TLS                 always                                  yes

A root certificate that is there checks the chain in every mode: so says libpq. Unix sockets are never encrypted.
One difference: an address in the place of a host name is looked for in the certificate's addresses only.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg
from psycopg import conninfo, pq

from shardmove.domain.errors import ConfigurationError
from shardmove.postgres.connect import safe_dsn

ALPN: Final = "postgresql"
_PROBE: Final = "gssencmode"  # of no use to us, and looked at by libpq after hosts, user and passwords
_NO_SUCH: Final = "resolve-only"
_PROMISES: Final = {"channel_binding": "prefer", "require_auth": "scram-sha-256"}
"""Options that ask for more security than there is here, and the value that asks for nothing more. To go on without
a word would break what the connection string promises."""
_VERSIONS: Final = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}


@dataclass(frozen=True, slots=True)
class Host:
    """One server of a connection string. `host` is a name, an address or a socket's directory."""

    host: str
    hostaddr: str
    port: int
    password: str | None = field(repr=False)

    @property
    def is_local(self) -> bool:
        """True for a Unix socket; a name that begins with @ is one in the abstract namespace."""
        return not self.hostaddr and self.host.startswith(("/", "@"))

    @property
    def socket_path(self) -> str:
        path = f"{self.host}/.s.PGSQL.{self.port}"
        return "\0" + path[1:] if path.startswith("@") else path

    @property
    def address(self) -> str:
        """What to connect to; `host` is what a certificate has to name."""
        return self.hostaddr or self.host


@dataclass(frozen=True, slots=True)
class Resolved:
    """A connection string with all that libpq would add to it. `parameters` are libpq's, without the password."""

    hosts: tuple[Host, ...]
    database: str
    user: str
    parameters: Mapping[str, str]

    @property
    def password(self) -> str | None:
        return self.hosts[0].password

    @property
    def sslmode(self) -> str:
        return self.parameters["sslmode"]

    @property
    def requires_tls(self) -> bool:
        """False where a server without TLS will do; Unix sockets aside."""
        return self.sslmode not in ("disable", "allow", "prefer")

    @property
    def options(self) -> str:
        return self.parameters.get("options", "")

    @property
    def target_session_attrs(self) -> str:
        """Which of several hosts will do: any, read-write, primary, …"""
        return self.parameters.get("target_session_attrs", "any")

    @property
    def connect_timeout_s(self) -> float | None:
        """None where the connection string leaves it open. libpq's own floor of 2 s is not repeated here."""
        seconds = int(self.parameters.get("connect_timeout", "0"))
        return float(seconds) if seconds > 0 else None

    def attempts(self, host: Host) -> tuple[bool, ...]:
        """Whether to ask for TLS: at first, and, where a second element is there, in a second try."""
        if host.is_local or self.sslmode == "disable":
            return (False,)
        return {"allow": (False, True), "prefer": (True, False)}.get(self.sslmode, (True,))


def resolve(dsn: str, user: str | None = None) -> Resolved:
    """What libpq makes of a connection string. Opens no connection, asks no name server; reads files: not in a loop.

    A `user` other than the connection string's own never gets the password that stands in there, or in PGPASSWORD:
    it is somebody else's. Only the passfile is asked then.

    Raises:
        ConfigurationError: libpq does not understand it. The message shows no password.
    """
    own = _probe(dsn, {})
    other = {} if user is None or user == _text(own.user) else {"user": user, "password": ""}
    probe = _probe(dsn, other) if other else own
    values = {option.keyword.decode(): option.val.decode() for option in probe.info if option.val is not None}
    values.pop("password", None)
    values.pop(_PROBE)
    for name, promise in _PROMISES.items():
        if values.get(name, promise) not in ("", promise) and values[name] != "disable":
            raise ConfigurationError(
                f"{safe_dsn(dsn)}: the router cannot keep {name}={values[name]}", hint=f"leave {name} out"
            )
    names = _split(values.get("host")) or [""] * max(1, len(_split(values.get("hostaddr"))))
    addresses = _split(values.get("hostaddr")) or [""] * len(names)
    ports = _split(values.get("port")) or [""]
    ports = ports * len(names) if len(ports) == 1 else ports
    hosts = []
    for name, address, port in zip(names, addresses, ports, strict=True):
        one = _probe(dsn, other | {"host": name, "hostaddr": address, "port": port})
        reached = "" if address else _text(one.host)  # libpq's own default, where none is named
        hosts.append(Host(name or reached, address, int(_text(one.port)), _text(one.password) or None))
    return Resolved(tuple(hosts), _text(probe.db), _text(probe.user), values)


def _probe(dsn: str, changes: Mapping[str, str]) -> pq.abc.PGconn:
    try:
        text = conninfo.make_conninfo(dsn, **{**changes, _PROBE: _NO_SUCH})
    except psycopg.ProgrammingError:
        raise ConfigurationError(f"a connection string cannot be read: {safe_dsn(dsn)}") from None
    probe = pq.PGconn.connect_start(text.encode())
    complaint = _text(probe.error_message).strip()
    if _PROBE not in complaint:
        raise ConfigurationError(f"{safe_dsn(dsn)}: {complaint}")
    return probe


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def _split(value: str | None) -> list[str]:
    return value.split(",") if value else []


def client_context(resolved: Resolved, host: Host) -> ssl.SSLContext | None:
    """The TLS settings for one server of a connection string, or None where it is never encrypted.

    The caller passes `host.host` as the name to check. Reads files; the result can be used for many connections.

    Raises:
        ConfigurationError: a file that libpq would insist on is missing, unreadable, or a key that others can read.
    """
    if not any(resolved.attempts(host)):
        return None
    parameters = resolved.parameters
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = _VERSIONS[parameters.get("ssl_min_protocol_version", "TLSv1.2")]
    if "ssl_max_protocol_version" in parameters:
        context.maximum_version = _VERSIONS[parameters["ssl_max_protocol_version"]]
    context.set_alpn_protocols([ALPN])
    context.check_hostname = resolved.sslmode == "verify-full"
    if context.check_hostname and not host.host:
        raise ConfigurationError("sslmode=verify-full needs a host name, and hostaddr alone is none")
    try:
        context.verify_mode = ssl.CERT_REQUIRED if _load_roots(context, resolved) else ssl.CERT_NONE
        _load_certificate(context, parameters)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the TLS files for {host.host} cannot be used: {_reason(error)}") from None
    return context


def _load_roots(context: ssl.SSLContext, resolved: Resolved) -> bool:
    """True where there are roots to check a chain against."""
    named = resolved.parameters.get("sslrootcert")
    if named == "system":
        context.set_default_verify_paths()
        return True
    roots = _file(named, "root.crt")
    if not roots.exists():
        if resolved.sslmode.startswith("verify-"):
            raise ConfigurationError(
                f"root certificate file {roots} does not exist",
                hint="provide it, or set sslrootcert=system, or choose an sslmode that does not check certificates",
            )
        return False
    context.load_verify_locations(cafile=str(roots))
    _load_revocations(context, resolved.parameters)
    return True


def _load_revocations(context: ssl.SSLContext, parameters: Mapping[str, str]) -> None:
    """A list that is not there is no list, as with libpq."""
    directory, named = parameters.get("sslcrldir"), parameters.get("sslcrl")
    revoked = _file(named, "root.crl") if named or not directory else None
    if revoked is not None and revoked.exists():
        context.load_verify_locations(cafile=str(revoked))
    elif directory and Path(directory).is_dir():
        context.load_verify_locations(capath=directory)
    else:
        return
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN


def _load_certificate(context: ssl.SSLContext, parameters: Mapping[str, str]) -> None:
    """Our own certificate, where there is one."""
    certificate = _file(parameters.get("sslcert"), "postgresql.crt")
    if parameters.get("sslcertmode") == "disable" or not certificate.exists():
        return
    key = _file(parameters.get("sslkey"), "postgresql.key")
    _load_pair(context, certificate, key, parameters.get("sslpassword", ""))


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path, password: str = "") -> None:
    """`password` as a text also keeps OpenSSL from asking for one on the terminal."""
    status = key.stat()
    exposed = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP | (stat.S_IRGRP if status.st_uid else 0)
    if status.st_mode & exposed:
        raise ConfigurationError(
            f"private key file {key} can be read by others", hint=f"chmod 600 {key} (or 640 where root owns it)"
        )
    context.load_cert_chain(certificate, key, password=password)


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What clients of the router meet: at least TLS 1.2. Raises ConfigurationError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([ALPN])
    # A client that could ask for a new handshake again and again would buy our time cheaply.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    try:
        _load_pair(context, certificate, key)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the router's certificate cannot be used: {_reason(error)}") from None
    return context


def _file(named: str | None, default: str) -> Path:
    return Path(named) if named else Path(os.path.expanduser("~")) / ".postgresql" / default


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is not in PEM form"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error)
