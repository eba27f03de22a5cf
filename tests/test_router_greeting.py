"""Who is let in, who is not, and that nothing is left of either."""

from __future__ import annotations

import asyncio
import pickle
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from router.cancel import CancelKeys, process_of
from router.greeting import Refusal
from shardmove.config import Address, RouterSettings, parse
from shardmove.domain.errors import ConfigurationError
from shardmove.wire import messages
from shardmove.wire.scram import ScramClient, Verifier
from tests.support.door import DEADLINE_S, LOOPS, PASSWORD, USERS, House, RawClient, eventually, opened, startup


def test_libpq_logs_in_with_a_password(house: House) -> None:
    with psycopg.connect(**house.dsn()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    house.wait_until_empty()


def test_asyncpg_logs_in_with_a_password(house: House) -> None:
    async def ask() -> int:
        connection = await asyncpg.connect(
            host="127.0.0.1", port=house.port, user="joe", password=PASSWORD, database="shop", ssl=False
        )
        pid = connection.get_server_pid()
        await connection.close()
        return pid

    assert asyncio.run(ask()) > 0


def test_the_session_is_told_who_the_client_is(house: House) -> None:
    with psycopg.connect(**house.dsn(), options="-c work_mem=1MB", application_name="a test"):
        (login,) = house.logins
    assert (login.user, login.database, login.protocol) == ("joe", "shop", 0)
    assert login.parameters == {"options": "-c work_mem=1MB", "application_name": "a test"}
    verifier = Verifier.parse(USERS["joe"])
    assert login.client_key is not None
    assert login.server_key == verifier.server_key
    assert PASSWORD not in repr(login)
    assert repr(login.client_key) not in repr(login)


def test_a_unix_socket_is_a_way_in(house: House) -> None:
    with psycopg.connect(**house.dsn(host=str(house.directory))) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_wrong_password_and_an_unknown_user_end_alike(house: House) -> None:
    told = []
    for user, password in (("joe", "wrong"), ("nobody", PASSWORD)):
        with pytest.raises(psycopg.OperationalError) as refused:
            psycopg.connect(**house.dsn(user=user, password=password))
        told.append(str(refused.value).replace(user, "USER"))
    assert told[0] == told[1]
    assert 'password authentication failed for user "USER"' in told[0]
    house.wait_until_empty()
    assert house.door.stats.logins_refused == 2


def test_an_unknown_user_is_asked_with_the_same_salt_each_time(house: House) -> None:
    salts = []
    for _ in range(2):
        client = RawClient(house.connected())
        client.say(startup(user="nobody"))
        client.expect(b"R")
        client.say(messages.sasl_initial_response(b"SCRAM-SHA-256", ScramClient(password="x").first()))
        _, said = messages.decode_authentication(client.expect(b"R"))
        salts.append([part for part in said.split(b",") if part[:2] in (b"s=", b"i=")])
        client.sock.close()
    assert salts[0] == salts[1]


def test_a_password_is_never_asked_for_in_the_clear(house: House) -> None:
    client = RawClient(house.connected())
    client.say(startup())
    assert messages.decode_authentication(client.expect(b"R")) == (10, b"SCRAM-SHA-256\0\0")
    client.say(messages.password_message(PASSWORD))
    assert client.error()["C"] == "08P01"


def test_trust_believes_any_name(short_path: Path) -> None:
    with (
        opened(short_path, authentication="trust", users={}) as house,
        psycopg.connect(**house.dsn(user="whoever")) as connection,
    ):
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert house.logins[0].client_key is None


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_a_login_may_come_in_any_pieces(house: House, piece: int) -> None:
    client = RawClient(house.connected())
    client.say(messages.GSS_REQUEST, piece)
    assert client.sock.recv(1) == b"N"
    client.say(messages.SSL_REQUEST, piece)
    assert client.sock.recv(1) == b"N"
    client.say(startup(), piece)
    client.log_in("joe", PASSWORD, piece)
    assert client.until_ready()[b"Z"] == [b"I"]
    client.say(messages.query("SELECT 1"), piece)
    assert client.until_ready()[b"D"] == [b"\0\1\0\0\0\x011"]
    client.sock.close()


def test_what_comes_with_the_last_word_of_a_login_is_the_sessions(house: House) -> None:
    client = RawClient(house.connected())
    client.say(startup())
    client.expect(b"R")
    scram = ScramClient(password=PASSWORD)
    client.say(messages.sasl_initial_response(b"SCRAM-SHA-256", scram.first()))
    _, said = messages.decode_authentication(client.expect(b"R"))
    client.say(messages.sasl_response(scram.final(said)) + messages.query("SELECT 1"))
    client.until_ready()
    assert b"D" in client.until_ready()
    client.sock.close()


def test_a_client_that_leaves_at_any_byte_leaves_nothing(house: House) -> None:
    hello = startup()
    for length in range(len(hello) + 1):
        with house.connected() as sock:
            sock.sendall(hello[:length])
    scram = ScramClient(password=PASSWORD)
    words = messages.sasl_initial_response(b"SCRAM-SHA-256", scram.first())
    for length in range(0, len(words) + 1, 5):
        client = RawClient(house.connected())
        client.say(hello)
        client.expect(b"R")
        client.say(words[:length])
        client.sock.close()
    house.wait_until_empty()


def test_noise_leaves_nothing(house: House, rng: random.Random) -> None:
    """Greetings with a few bytes changed, left out or repeated, cut into pieces, and the end at any time."""
    scram = ScramClient(password=PASSWORD)
    whole = [
        *(messages.GSS_REQUEST, messages.SSL_REQUEST, startup(minor=2), messages.cancel_request(1, b"abcd")),
        messages.sasl_initial_response(b"SCRAM-SHA-256", scram.first()),
        messages.sasl_response(b"c=biws,r=abc,p=" + b"A" * 44),
        messages.TERMINATE,
    ]
    for _ in range(150):
        said = bytearray(b"".join(rng.choices(whole, k=rng.randint(1, 5))))
        for _ in range(rng.randint(0, 3)):
            said[rng.randrange(len(said))] = rng.randrange(256)
        with house.connected() as sock, suppress(ConnectionError):
            RawClient(sock).say(bytes(said), rng.choice([1, 5, 1 << 20]))
            if rng.random() < 0.5:
                sock.settimeout(0.05)
                with suppress(TimeoutError):
                    while sock.recv(4096):
                        pass
    house.wait_until_empty()
    with psycopg.connect(**house.dsn()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_terminate_in_the_middle_of_a_login_leaves_nothing(house: House) -> None:
    client = RawClient(house.connected())
    client.say(startup())
    client.expect(b"R")
    client.say(messages.TERMINATE)
    assert client.next() is None
    house.wait_until_empty()


@pytest.mark.parametrize("said", [b"", startup()[:9], startup()], ids=["nothing", "a part", "no password"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_login_that_takes_too_long_is_ended(short_path: Path, said: bytes, loop: str) -> None:
    with opened(short_path, loop=loop, login_timeout_s=0.2) as house:
        client = RawClient(house.connected())
        with pytest.raises(ConnectionError):  # noqa: PT012
            client.say(said)  # it may be late already
            while client.next() is not None:
                pass
            raise ConnectionResetError
        house.wait_until_empty()


def test_a_newer_version_and_unknown_options_are_negotiated(house: House) -> None:
    client = RawClient(house.connected())
    client.say(startup(minor=9999, **{"_pq_.sparkle": "on"}))
    newest, unknown = messages.decode_negotiate_protocol_version(client.expect(b"v"))
    assert unknown == (b"_pq_.sparkle",)
    assert newest in (2, messages.version_code(2))
    client.log_in("joe", PASSWORD)
    assert len(client.until_ready()[b"K"][0]) == 4 + 32
    client.sock.close()


def test_version_2_is_refused(house: House) -> None:
    client = RawClient(house.connected())
    client.say(struct.pack(">II", 9, 2 << 16) + b"\0")
    assert client.error()["C"] == "0A000"


@pytest.mark.parametrize(
    ("said", "sqlstate"),
    [
        (struct.pack(">I", 4), "08P01"),
        (struct.pack(">I", 1 << 30), "54000"),
        (struct.pack(">II", 12, 3 << 16) + b"user", "08P01"),
        (startup(user=""), "28000"),
        (b"GET / HTTP/1.0\r\n\r\n", "54000"),
    ],
    ids=["too short", "too long", "no end", "no user", "http"],
)
def test_nonsense_is_answered_with_an_error(house: House, said: bytes, sqlstate: str) -> None:
    client = RawClient(house.connected())
    client.say(said)
    fields = messages.error_fields(client.expect(b"E"))
    assert (fields["S"], fields["C"]) == ("FATAL", sqlstate)
    client.sock.close()
    house.wait_until_empty()


def test_a_message_too_large_for_a_login_is_refused(house: House) -> None:
    client = RawClient(house.connected())
    client.say(startup())
    client.expect(b"R")
    client.say(b"p" + struct.pack(">I", 1 << 28))
    assert client.error()["C"] == "54000"


def test_too_many_clients_are_refused_and_admins_are_not(short_path: Path) -> None:
    with opened(short_path, clients_max=1, admins=("ann",)) as house:
        with psycopg.connect(**house.dsn()):
            with pytest.raises(psycopg.OperationalError, match="too many clients") as refused:
                psycopg.connect(**house.dsn())
            assert "clients_max" in str(refused.value)
            psycopg.connect(**house.dsn(user="ann", dbname="shardmove")).close()
        eventually(lambda: not house.clients)
        psycopg.connect(**house.dsn()).close()


def test_too_many_greetings_are_refused(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.door.GREETINGS_MIN", 2)
    with opened(short_path, clients_max=2) as house:
        waiting = [house.connected() for _ in range(2)]
        eventually(lambda: len(house.door.greetings) == 2)
        client = RawClient(house.connected())
        assert client.error()["C"] == "53300"
        for sock in waiting:
            sock.close()
        house.wait_until_empty()


@pytest.mark.parametrize(
    ("changes", "sqlstate"),
    [
        ({"database": "other"}, "3D000"),
        ({"database": "shardmove"}, "42501"),
        ({"replication": "database"}, "0A000"),
    ],
)
def test_what_is_not_served_is_refused(short_path: Path, changes: dict[str, Any], sqlstate: str) -> None:
    with opened(short_path, database="shop", admins=("ann",)) as house:
        client = RawClient(house.connected())
        client.say(startup(**changes))
        client.log_in("joe", PASSWORD)
        client.expect(b"R")
        client.expect(b"R")
        assert client.error()["C"] == sqlstate
        house.wait_until_empty()


def test_a_door_that_is_closing_says_so(house: House) -> None:
    client = RawClient(house.connected())
    eventually(lambda: house.call(lambda: len(house.door.greetings)) == 1)
    house.call(house.door.close)
    assert client.error()["C"] == "57P03"


# --- cancelling


@pytest.mark.parametrize(("version", "length"), [("3.0", 4), ("3.2", 32)])
def test_a_cancel_request_reaches_its_session_only(house: House, version: str, length: int) -> None:
    with psycopg.connect(**house.dsn(max_protocol_version=version)) as one, psycopg.connect(**house.dsn()) as other:
        mine, others = (house.clients[each.info.backend_pid] for each in (one, other))
        assert len(mine.secret) == length
        one.cancel_safe(timeout=DEADLINE_S)
        eventually(lambda: (mine.cancelled, others.cancelled) == (1, 0))
    house.wait_until_empty()


@pytest.mark.parametrize("change", ["pid", "secret", "short"])
def test_a_cancel_request_with_a_wrong_key_does_nothing_and_is_told_nothing(house: House, change: str) -> None:
    with psycopg.connect(**house.dsn()) as connection:
        pid = connection.info.backend_pid
        session = house.clients[pid]
        secret = session.secret
        wrong = {
            "pid": (pid + 1, secret),
            "secret": (pid, bytes(each ^ 1 for each in secret)),
            "short": (pid, secret + b"\0"),
        }[change]
        client = RawClient(house.connected())
        client.say(messages.cancel_request(*wrong))
        assert client.next() is None
        assert session.cancelled == 0


def test_keys_carry_their_process_and_are_not_given_out_twice() -> None:
    keys = CancelKeys(process=200)
    clients: dict[int, Any] = {}
    for _ in range(100):
        key = keys.new(clients, 0)
        assert process_of(key.pid) == 200
        assert 0 < key.pid < 1 << 31
        assert key.pid not in clients
        clients[key.pid] = None
    keys._last = (1 << 22) - 1
    again = keys.new(clients, 2)
    assert again.pid not in clients
    assert len(again.secret) == 32


def test_refusals_survive_a_pickle_round_trip() -> None:
    error = pickle.loads(pickle.dumps(Refusal("53300", "full", hint="wait")))
    assert (error.sqlstate, error.message, error.hint) == ("53300", "full", "wait")


# --- settings

SHARDS = {"catalog": {"dsn": "host=c"}, "shards": {"s1": {"dsn": "host=a"}, "s2": {"dsn": "host=b"}}}


def test_settings_have_defaults_and_home_is_the_first_shard() -> None:
    settings = parse(SHARDS).router
    assert (settings.home, settings.addresses) == ("s1", (Address("127.0.0.1", 6432),))
    assert settings == RouterSettings(home="s1")


def test_settings_are_read(tmp_path: Path) -> None:
    section = {
        "listen": "[::1]:1, /tmp",
        "home": "s2",
        "pooling": "transaction",
        "confirm_s": 2,
        "admins": ["joe"],
        "tls_certificate": "a.crt",
        "tls_key": "/etc/a.key",
        "users": USERS,
    }
    settings = parse({**SHARDS, "router": section}, base=tmp_path).router
    assert settings.addresses == (Address("::1", 1), Address("/tmp", 6432))
    assert (settings.pooling, settings.admins, settings.users) == ("transaction", ("joe",), USERS)
    assert (settings.tls_certificate, settings.tls_key) == (tmp_path / "a.crt", Path("/etc/a.key"))
    assert USERS["joe"] not in repr(settings)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"client_max": 1}, "did you mean clients_max?"),
        ({"home": "s3"}, "unknown shard 's3'"),
        ({"pooling": "statement"}, "pooling 'statement' is not supported"),
        ({"processes": 1.5}, "processes must be a whole number above 0"),
        ({"confirm_s": 0}, "confirm_s must be a number above 0"),
        ({"clients_max": True}, "clients_max must be a whole number"),
        ({"listen": "here"}, "'here' is not an address"),
        ({"listen": 5432}, "listen must be a text"),
        ({"metrics": "9187"}, "'9187' is not an address"),
        ({"tls_required": "no"}, "tls_required must be true or false"),
        ({"admins": "joe"}, "admins must be a list of names"),
        ({"admins": ["eve"], "users": USERS}, "'eve', who is not in [router.users]"),
        ({"users": {"joe": "SCRAM-SHA-256$hunter2"}}, "joe is not a SCRAM-SHA-256 verifier"),
        ({"users": {"joe": USERS["joe"].replace(":", ":A", 1)}}, "joe is not a SCRAM-SHA-256 verifier"),
        ({"users": ["joe"]}, "[router.users] must be a table"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_a_wrong_setting_is_named(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse({**SHARDS, "router": section})
    assert words in f"{refused.value.message} {refused.value.hint}"
    assert "hunter2" not in f"{refused.value.message} {refused.value.hint}"
