"""Encryption at both ends: what clients of the router meet, and that the router meets shards as libpq does."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from router.tls import Host, Resolved, client_context, resolve, server_context
from shardmove.config import RouterSettings
from shardmove.domain.errors import ConfigurationError
from shardmove.wire import messages
from shardmove.wire.startup import Event, Startup
from tests.support.certificates import Authority, Pair, make_authority
from tests.support.door import LOOPS, PASSWORD, USERS, House, RawClient, eventually, opened, startup
from tests.support.router import USER, Routers
from tests.support.servers import OLD_INSTALLED
from tests.support.world import World


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("localhost", "DNS:localhost", "IP:127.0.0.1")


@pytest.fixture(params=list(LOOPS))
def house(request: pytest.FixtureRequest, short_path: Path, pair: Pair) -> Iterator[House]:
    with opened(short_path, loop=request.param, tls_certificate=pair.certificate, tls_key=pair.key) as house:
        yield house


def verified(house: House, authority: Authority, **changes: object) -> dict[str, Any]:
    return house.dsn(host="localhost", sslmode="verify-full", sslrootcert=str(authority.root), **changes)


# --- the clients' end


@pytest.mark.parametrize("negotiation", ["postgres", "direct"])
def test_libpq_verifies_the_router(house: House, authority: Authority, negotiation: str) -> None:
    words = verified(house, authority, sslnegotiation=negotiation)
    for _ in range(2):
        with psycopg.connect(**words) as connection:
            assert connection.pgconn.ssl_in_use
            assert connection.execute("SELECT 1").fetchone() == (1,)
    house.wait_until_empty()


def test_psql_verifies_the_router(house: House, authority: Authority) -> None:
    words = f"host=localhost port={house.port} user=joe dbname=shop sslmode=verify-full sslrootcert={authority.root}"
    done = subprocess.run(
        [str(psql()), "-XAtc", "SELECT 1", words],
        env={"PGPASSWORD": PASSWORD, "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def psql() -> Path:
    """The wheel's own was built without TLS."""
    found = shutil.which("psql", path=f"{os.environ['PATH']}:{OLD_INSTALLED}")
    return Path(found) if found else pytest.skip("there is no psql that knows TLS")


def test_asyncpg_verifies_the_router(house: House, authority: Authority) -> None:
    async def ask() -> None:
        connection = await asyncpg.connect(
            host="localhost",
            port=house.port,
            user="joe",
            password=PASSWORD,
            database="shop",
            ssl=ssl.create_default_context(cafile=str(authority.root)),
        )
        await connection.close()

    asyncio.run(ask())
    house.wait_until_empty()


def test_an_encrypted_cancel_request_is_heard(house: House, authority: Authority) -> None:
    with psycopg.connect(**verified(house, authority)) as connection:
        session = house.clients[connection.info.backend_pid]
        connection.cancel_safe(timeout=10)
        assert session.cancelled == 1


@pytest.mark.parametrize("behind", [startup(), b"\x16\x03\x01", b"\0"], ids=["startup", "a handshake", "a byte"])
def test_bytes_behind_the_request_for_tls_are_a_violation(house: House, behind: bytes) -> None:
    client = RawClient(house.connected())
    client.say(messages.SSL_REQUEST + behind)
    assert client.error()["C"] == "08P01"
    house.wait_until_empty()
    assert not house.logins


def test_bytes_between_the_answer_and_the_handshake_are_not_heard(house: House) -> None:
    client = RawClient(house.connected())
    client.say(messages.SSL_REQUEST)
    client.say(startup())  # it may arrive before the answer was sent, or after it
    with pytest.raises((ConnectionError, messages.ProtocolViolation, AssertionError)):
        client.log_in("joe", PASSWORD)
    client.sock.close()
    house.wait_until_empty()
    assert not house.logins


def test_the_check_for_bytes_behind_the_request_is_what_keeps_them_out(
    short_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, whoever sits between speaks first inside of the client's encryption."""

    class Gullible(Startup):
        def _encryption(self, code: int, packet: bytes) -> Event:
            injected, self._buffer = self._buffer, b""
            event = super()._encryption(code, packet)
            self._buffer = injected
            return event

    monkeypatch.setattr("router.greeting.Startup", Gullible)
    settings = {"tls_certificate": pair.certificate, "tls_key": pair.key, "authentication": "trust"}
    with opened(short_path, **settings) as house:
        client = RawClient(house.connected())
        client.say(messages.SSL_REQUEST + startup(user="mallory"))
        assert client.sock.recv(1) == b"S"
        with unverified().wrap_socket(client.sock) as sock:
            sock.sendall(startup(user="joe"))
            eventually(lambda: house.logins)
            assert house.logins[0].user == "mallory"


def test_a_second_request_for_tls_is_a_violation(house: House) -> None:
    with handshaken(house) as sock:
        client = RawClient(sock)
        client.say(messages.SSL_REQUEST)
        assert client.error()["C"] == "08P01"


def test_a_login_inside_tls_may_come_byte_by_byte(house: House) -> None:
    with handshaken(house) as sock:
        client = RawClient(sock)
        client.say(startup(), 1)
        client.log_in("joe", PASSWORD, 1)
        client.until_ready()
        client.say(messages.query("SELECT 1"), 1)
        assert b"D" in client.until_ready()


def test_what_comes_with_the_end_of_the_handshake_is_heard(house: House) -> None:
    with handshaken(house) as sock:
        client = RawClient(sock)
        client.say(startup())
        client.log_in("joe", PASSWORD)
        client.until_ready()


def test_a_client_that_leaves_in_the_handshake_leaves_nothing(house: House) -> None:
    for said in (b"", b"\x16\x03\x01\x02\x00", b"no handshake at all"):
        client = RawClient(house.connected())
        client.say(messages.SSL_REQUEST)
        assert client.sock.recv(1) == b"S"
        client.say(said)
        client.sock.close()
    house.wait_until_empty()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_leaves_with_its_first_words_leaves_nothing(short_path: Path, pair: Pair, loop: str) -> None:
    """The end of the handshake, the startup packet and the end of the connection arrive as one."""
    settings = {"tls_certificate": pair.certificate, "tls_key": pair.key, "authentication": "trust"}
    with opened(short_path, loop=loop, **settings) as house:
        for _ in range(50):
            client = RawClient(house.connected())
            client.say(messages.SSL_REQUEST)
            assert client.sock.recv(1) == b"S"
            received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
            inside = unverified().wrap_bio(received, to_send)
            while True:
                try:
                    inside.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.say(to_send.read())
                    received.write(client.sock.recv(65_536))
            inside.write(startup())
            client.say(to_send.read())
            client.sock.close()
        house.wait_until_empty()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_handshake_that_takes_too_long_is_ended(short_path: Path, pair: Pair, loop: str) -> None:
    settings = {"tls_certificate": pair.certificate, "tls_key": pair.key, "login_timeout_s": 0.2}
    with opened(short_path, loop=loop, **settings) as house:
        client = in_the_handshake(house)
        house.wait_until_empty()
        client.sock.close()


def in_the_handshake(house: House) -> RawClient:
    """Where its time is up before it has asked: once more."""
    for _ in range(100):
        client = RawClient(house.connected())
        with suppress(ConnectionError):
            client.say(messages.SSL_REQUEST)
            if client.sock.recv(1) == b"S":
                return client
        client.sock.close()
    raise AssertionError("nobody is asked in")


def test_direct_tls_without_its_protocol_is_refused(house: House) -> None:
    with unverified().wrap_socket(house.connected()) as sock:
        assert RawClient(sock).error()["C"] == "08P01"


def test_old_versions_of_tls_are_refused(house: House) -> None:
    context = unverified()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    client = RawClient(house.connected())
    client.say(messages.SSL_REQUEST)
    client.sock.recv(1)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(client.sock)
    house.wait_until_empty()


def test_tls_can_be_required(short_path: Path, pair: Pair) -> None:
    with opened(short_path, tls_certificate=pair.certificate, tls_key=pair.key, tls_required=True) as house:
        client = RawClient(house.connected())
        client.say(startup())
        fields = client.error()
        assert (fields["C"], fields["H"]) == ("28000", "set sslmode=require")
        psycopg.connect(**house.dsn(sslmode="require")).close()
        psycopg.connect(**house.dsn(host=str(house.directory))).close()


def test_a_renewed_certificate_is_shown_to_new_clients(short_path: Path, tmp_path: Path) -> None:
    old, new = (make_authority(made) for made in (tmp_path / "old", tmp_path / "new") if not made.mkdir())
    pair = old.issue("localhost", "DNS:localhost")
    settings = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    with opened(short_path, **settings) as house:
        with psycopg.connect(**verified(house, old)) as connection:
            new.issue("localhost", "DNS:localhost", into=pair)
            house.call(lambda: house.door.adopt(house.door.settings))
            psycopg.connect(**verified(house, new)).close()
            with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
                psycopg.connect(**verified(house, old))
            assert connection.execute("SELECT 1").fetchone() == (1,)
        pair.certificate.write_text("rubbish")
        with pytest.raises(ConfigurationError):
            house.call(lambda: house.door.adopt(house.door.settings))
        psycopg.connect(**verified(house, new)).close()


def handshaken(house: House) -> ssl.SSLSocket:
    client = RawClient(house.connected())
    client.say(messages.SSL_REQUEST)
    assert client.sock.recv(1) == b"S"
    return unverified().wrap_socket(client.sock)


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.mark.parametrize("trouble", ["missing", "not its own", "readable"])
def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path, authority: Authority, trouble: str) -> None:
    pair = authority.issue("unusable")
    match trouble:
        case "missing":
            pair.key.unlink()
        case "not its own":
            shutil.copy(authority.issue("another").key, pair.key)
        case _:
            pair.key.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can") as refused:
        server_context(pair.certificate, pair.key)
    assert "BEGIN" not in str(refused.value)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ConfigurationError, match="go together"):
        RouterSettings(tls_certificate=Path("a"))
    with pytest.raises(ConfigurationError, match="tls_required needs"):
        RouterSettings(tls_required=True)


def test_a_router_of_two_processes_serves_users_with_passwords_over_tls(
    world: World, routers: Routers, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = make_authority(tmp_path / "old"), make_authority(tmp_path / "new")
    pair = old.issue("localhost", "DNS:localhost")
    router = routers.start(
        world.write_config(),
        processes=2,
        authentication="scram",
        tls_certificate=str(pair.certificate),
        tls_key=str(pair.key),
        tls_required=True,
        users={USER: USERS["joe"]},
    )
    words = {"host": "localhost", "password": PASSWORD, "sslmode": "verify-full"}

    def count(authority: Authority) -> int:
        with psycopg.connect(router.dsn(sslrootcert=str(authority.root), **words)) as connection:
            return connection.execute(b"SELECT count(*) FROM orders WHERE tenant_id = 1").fetchall()[0][0]

    assert count(old) > 0
    for changes, complaint in (({"password": "wrong"}, "authentication failed"), ({"sslmode": "disable"}, "encrypted")):
        with pytest.raises(psycopg.OperationalError, match=complaint):
            psycopg.connect(router.dsn(**words | {"sslrootcert": str(old.root)} | changes))
    new.issue("localhost", "DNS:localhost", into=pair)
    router.signal(signal.SIGHUP)
    eventually(lambda: router.said.count("reloaded") == 2)
    assert count(new) > 0
    assert PASSWORD not in router.said
    assert "SCRAM-SHA-256$" not in router.said


# --- the shards' end: what libpq makes of a connection string


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, with a service file and a passfile."""
    for name in ("PGPASSWORD", "PGUSER", "PGHOST", "PGPORT", "PGDATABASE", "PGSSLMODE", "PGSSLROOTCERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    service = "[shop]\nhost=one,two\nport=5001,5002\ndbname=shop\nuser=joe\nconnect_timeout=3\n"
    for variable, name, text in (
        ("PGSERVICEFILE", "services", service),
        ("PGPASSFILE", "passwords", "one:5001:shop:joe:first\ntwo:5002:shop:joe:second\n*:*:*:ann:hers\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
        monkeypatch.setenv(variable, str(tmp_path / name))
    return tmp_path


def test_service_file_and_passfile_are_read(places: Path) -> None:
    resolved = resolve("service=shop")
    assert resolved.hosts == (Host("one", "", 5001, "first"), Host("two", "", 5002, "second"))
    assert (resolved.database, resolved.user, resolved.connect_timeout_s) == ("shop", "joe", 3.0)
    assert (resolved.sslmode, resolved.requires_tls) == ("prefer", False)
    assert "first" not in repr(resolved)


def test_another_user_gets_its_own_password_only(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "joes")
    assert resolve("service=shop").password == "joes"
    assert resolve("service=shop", "joe").password == "joes"
    assert resolve("service=shop", "ann").password == "hers"
    assert resolve("service=shop", "eve").password is None
    assert resolve("service=shop password=joes", "eve").password is None
    assert resolve("service=shop password=joes", "joe").password == "joes"
    assert resolve("service=shop", "eve").user == "eve"


def test_uris_addresses_and_sockets_are_understood(places: Path) -> None:
    resolved = resolve("postgresql://joe:p%20w@h1:5001,h2/shop?hostaddr=127.0.0.1,&options=-c%20a%3Db")
    assert [(each.address, each.host, each.port) for each in resolved.hosts] == [
        ("127.0.0.1", "h1", 5001),
        ("h2", "h2", 5432),
    ]
    assert resolved.options == "-c a=b"
    assert resolved.password == "p w"
    local = resolve("host=/tmp port=5009 dbname=x sslmode=require")
    assert local.hosts[0].socket_path == "/tmp/.s.PGSQL.5009"
    assert local.attempts(local.hosts[0]) == (False,)
    assert client_context(local, local.hosts[0]) is None


def test_no_host_is_libpqs_own_default(places: Path) -> None:
    (host,) = resolve("dbname=x").hosts
    assert host.is_local
    assert host.port == 5432


@pytest.mark.parametrize(
    "dsn",
    ["service=nowhere", "sslmode=sometimes password=hidden", "port=1,2 host=a,b,c", "password='hidden", "x=hidden"],
)
def test_what_libpq_refuses_is_refused_without_the_password(places: Path, dsn: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        resolve(dsn)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("promise", ["channel_binding=require", "require_auth=none", "require_auth=!password"])
def test_what_cannot_be_kept_is_not_promised(places: Path, promise: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot keep"):
        resolve(f"host=h {promise}")
    resolve("host=h channel_binding=disable require_auth=scram-sha-256")


def test_resolving_connects_to_nobody(places: Path, house: House) -> None:
    resolve(f"host=127.0.0.1 port={house.port} dbname=shop")
    assert house.door.stats.logins_refused == 0
    assert not house.call(lambda: house.door.greetings)


# --- the shards' end: TLS, beside libpq against the same server

MODES = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]


@pytest.mark.parametrize("root", ["none", "right", "wrong"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
@pytest.mark.parametrize("mode", MODES)
def test_sslmode_means_what_it_means_to_libpq(
    places: Path, short_path: Path, authority: Authority, pair: Pair, mode: str, host: str, root: str
) -> None:
    """The server takes TLS only, so whoever falls back to plain fails, too."""
    if root != "none":
        (places / "other").mkdir()
        given = authority if root == "right" else make_authority(places / "other")
        (places / ".postgresql").mkdir()
        shutil.copy(given.root, places / ".postgresql" / "root.crt")
    with opened(short_path, tls_certificate=pair.certificate, tls_key=pair.key, tls_required=True) as house:
        dsn = f"host={host} hostaddr=127.0.0.1 port={house.port} user=joe dbname=shop sslmode={mode} connect_timeout=60"
        assert ours(resolve(dsn), house) == libpqs(dsn)


def libpqs(dsn: str) -> bool:
    """Whether libpq comes to log in encrypted."""
    try:
        with psycopg.connect(dsn, password=PASSWORD, gssencmode="disable") as connection:
            return bool(connection.pgconn.ssl_in_use)
    except psycopg.OperationalError:
        return False


def ours(resolved: Resolved, house: House) -> bool:
    (host,) = resolved.hosts
    try:
        context = client_context(resolved, host)
    except ConfigurationError:
        return False
    if context is None or True not in resolved.attempts(host):
        return False
    client = RawClient(house.connected())
    client.say(messages.SSL_REQUEST)
    assert client.sock.recv(1) == b"S"
    try:
        with context.wrap_socket(client.sock, server_hostname=host.host) as sock:
            inner = RawClient(sock)
            inner.say(startup())
            inner.log_in("joe", PASSWORD)
            inner.until_ready()
            return True
    except (ssl.SSLError, ssl.CertificateError):
        return False


def test_the_systems_own_roots_need_verify_full(places: Path) -> None:
    assert resolve("host=h sslrootcert=system").sslmode == "verify-full"
    with pytest.raises(ConfigurationError, match="weak"):
        resolve("host=h sslrootcert=system sslmode=require")
    resolved = resolve("host=h sslrootcert=system")
    context = client_context(resolved, resolved.hosts[0])
    assert context is not None
    assert context.check_hostname


def test_verify_full_needs_a_name(places: Path, authority: Authority) -> None:
    resolved = resolve(f"hostaddr=127.0.0.1 sslmode=verify-full sslrootcert={authority.root}")
    with pytest.raises(ConfigurationError, match="host name"):
        client_context(resolved, resolved.hosts[0])


def test_a_revoked_certificate_is_refused(places: Path, short_path: Path) -> None:
    (places / "ca").mkdir()
    authority = make_authority(places / "ca")
    pair = authority.issue("localhost", "DNS:localhost")
    with opened(short_path, tls_certificate=pair.certificate, tls_key=pair.key) as house:
        dsn = f"host=localhost port={house.port} user=joe dbname=shop sslmode=verify-full sslrootcert={authority.root}"
        assert (libpqs(dsn), ours(resolve(dsn), house)) == (True, True)
        dsn += f" sslcrl={authority.revoke(pair)}"
        assert (libpqs(dsn), ours(resolve(dsn), house)) == (False, False)


def test_a_clients_certificate_is_sent(places: Path, authority: Authority, pair: Pair) -> None:
    mine = authority.issue("joe")
    resolved = resolve(f"host=localhost sslmode=require sslcert={mine.certificate} sslkey={mine.key}")
    ours_ = client_context(resolved, resolved.hosts[0])
    assert ours_ is not None
    theirs = server_context(pair.certificate, pair.key)
    theirs.load_verify_locations(authority.root)
    theirs.verify_mode = ssl.CERT_REQUIRED
    assert dict(each[0] for each in certificate_seen(ours_, theirs)["subject"]) == {"commonName": "joe"}
    mine.key.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        client_context(resolved, resolved.hosts[0])


def certificate_seen(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any]:
    """What the server sees of the client, after a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (one, other):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    found: Any = other.getpeercert()
    return found
