"""The beginning of a session, from both sides: against real servers, and with libpq as the client."""

from __future__ import annotations

import pickle
import socket
import ssl
import subprocess
import threading
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardmove.postgres.embedded import LOOPBACK, Cluster, Server
from shardmove.wire import messages as m
from shardmove.wire.login import Login, LoginRefused, State
from shardmove.wire.messages import Frames, ProtocolViolation
from shardmove.wire.scram import (
    ITERATIONS_MAX,
    MECHANISM,
    AuthenticationFailed,
    ScramClient,
    ScramServer,
    UnsupportedSasl,
    Verifier,
    keys_of,
    mock_verifier,
    prepared,
)
from shardmove.wire.startup import (
    Cancel,
    DirectTls,
    InvalidAuthorization,
    Ready,
    Startup,
    UnsupportedVersion,
    WantsGss,
    WantsTls,
)
from tests.support.servers import old_binaries

PASSWORD: Final = "correct horse"
BOUND_S: Final = 60.0

HBA: Final = """
local all all trust
host all of_scram 127.0.0.1/32 scram-sha-256
host all of_md5 127.0.0.1/32 md5
host all of_clear 127.0.0.1/32 password
host all of_trust 127.0.0.1/32 trust
"""


@pytest.fixture(scope="module", params=["newest", "old"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that asks for passwords on its port: each role's name says how."""
    binaries = old_binaries() if request.param == "old" else None
    with Cluster(["s"], binaries=binaries, settings={"fsync": "off"}) as cluster:
        server = cluster["s"]
        with psycopg.connect(server.dsn, autocommit=True) as session:
            create_roles(session)
        (server.data / "pg_hba.conf").write_text(HBA)
        server.restart()
        yield server


def create_roles(session: psycopg.Connection) -> None:
    for method, encryption in {"scram": "scram-sha-256", "md5": "md5", "clear": "scram-sha-256"}.items():
        session.execute("SELECT set_config('password_encryption', %s, false)", [encryption])
        create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
        session.execute(create.format(sql.Identifier(f"of_{method}"), sql.Literal(PASSWORD)))
    session.execute("CREATE ROLE of_trust LOGIN")


def stored_verifier(server: Server, role: str) -> Verifier:
    with psycopg.connect(server.dsn) as session:
        row = session.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", [role]).fetchone()
    assert row is not None
    return Verifier.parse(row[0])


class Client:
    """A client on a blocking socket: one login, then messages."""

    def __init__(self, port: int, login: Login, **parameters: str) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=BOUND_S)
        self._frames = Frames()
        try:
            self.send(login.start({"database": "postgres", **parameters}))
            while not login.is_done:
                kind, body = self.receive()
                if answer := login.receive(ord(kind), body):
                    self.send(answer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(m.TERMINATE)
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, *sent: bytes) -> None:
        self._socket.sendall(b"".join(sent))

    def receive(self) -> tuple[str, bytes]:
        """The next message: its kind and its body."""
        while True:
            for kind, message in self._frames:
                return chr(kind), message[5:]
            data = self._socket.recv(7)  # so that messages come in pieces
            if not data:
                raise EOFError
            self._frames.feed(data)

    def __call__(self, *sent: bytes, until: str = "Z") -> list[tuple[str, bytes]]:
        """Sends messages; what comes back, up to a message of that kind."""
        self.send(*sent)
        replies = [self.receive()]
        while replies[-1][0] != until:
            replies.append(self.receive())
        return replies


def kinds(replies: list[tuple[str, bytes]]) -> str:
    return "".join(kind for kind, _ in replies)


# --- Logging in at a server -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["of_scram", "of_md5", "of_clear", "of_trust"])
def test_a_login_succeeds_in_the_way_that_the_server_asks_for(server: Server, role: str) -> None:
    login = Login(role, password=PASSWORD, may_send_cleartext=True)
    with Client(server.port, login, application_name="wire", options="-c work_mem=5MB") as client:
        replies = client(m.query("SELECT current_user, pg_backend_pid(), current_setting('work_mem')"))
        assert kinds(replies) == "TDCZ"
        assert m.decode_data_row(replies[1][1]) == (role.encode(), str(login.pid).encode(), b"5MB")
    assert login.parameters[b"application_name"] == b"wire"
    assert login.parameters[b"server_version"]
    assert (len(login.secret), login.minor) == (4, 0)


def test_the_version_is_what_both_sides_speak(server: Server) -> None:
    login = Login("of_scram", password=PASSWORD, minor=2)
    with Client(server.port, login):
        is_new = int(login.parameters[b"server_version"].split(b".")[0]) >= 18
        assert (login.minor, len(login.secret)) == ((2, 32) if is_new else (0, 4))


@pytest.mark.parametrize("role", ["of_scram", "of_md5", "of_clear"])
def test_a_wrong_password_is_refused_with_the_servers_words(server: Server, role: str) -> None:
    login = Login(role, password="wrong", may_send_cleartext=True)
    with pytest.raises(LoginRefused, match="password authentication failed") as caught:
        Client(server.port, login)
    assert caught.value.sqlstate == "28P01"
    assert login.state is State.REFUSED


@pytest.mark.parametrize("role", ["of_scram", "of_md5", "of_clear"])
def test_a_password_that_is_not_known_is_asked_for_in_the_password_file(server: Server, role: str) -> None:
    with pytest.raises(LoginRefused, match=f"{role}.* no password is known") as caught:
        Client(server.port, Login(role, may_send_cleartext=True))
    assert "passfile" in str(caught.value.hint)


def test_a_password_is_not_sent_in_the_clear_unless_allowed(server: Server) -> None:
    with pytest.raises(LoginRefused, match="without TLS"):
        Client(server.port, Login("of_clear", password=PASSWORD))


def test_an_unknown_database_is_refused_with_its_sqlstate(server: Server) -> None:
    with pytest.raises(LoginRefused) as caught:
        Client(server.port, Login("of_trust"), database="nowhere")
    assert caught.value.sqlstate == "3D000"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.message, copy.sqlstate) == (caught.value.message, "3D000")


def test_the_key_that_a_client_proved_logs_in_at_a_server_with_the_same_verifier(server: Server) -> None:
    """The password is nowhere but with the client."""
    verifier = stored_verifier(server, "of_scram")
    ours = ScramServer(verifier, user="of_scram")
    converse(ScramClient(password=PASSWORD), ours)
    login = Login("of_scram", client_key=ours.client_key, server_key=verifier.server_key)
    with Client(server.port, login):
        assert login.is_done


def test_keys_of_another_verifier_are_refused(server: Server) -> None:
    other = keys_of(PASSWORD, b"another salt", 4096)
    with pytest.raises(LoginRefused) as caught:
        Client(server.port, Login("of_scram", client_key=other.client_key, server_key=other.server_key))
    assert caught.value.sqlstate == "28P01"


def test_half_of_the_keys_is_no_password(server: Server) -> None:
    keys = keys_of(PASSWORD, b"salt", 4096)
    with pytest.raises(LoginRefused, match="no password is known"):
        Client(server.port, Login("of_scram", client_key=keys.client_key))


def converse(client: ScramClient, server: ScramServer) -> None:
    client.verify(server.final(client.final(server.first(client.first()))))


# --- A login whose server is somebody else ---------------------------------------------------------------------------


def said(login: Login, *replies: bytes) -> bytes:
    """What the login answers last."""
    answer = b""
    for reply in replies:
        answer = login.receive(reply[0], reply[5:])
    return answer


def proved() -> tuple[Login, ScramServer, bytes]:
    """A login that has sent its proof, the server that it talks to, and the proof."""
    login, server = Login("u", password=PASSWORD), ScramServer(Verifier.make(PASSWORD), user="u")
    first = m.decode_sasl_initial_response(said(login, m.authentication_sasl([b"SCRAM-SHA-256-PLUS", MECHANISM]))[5:])
    assert first[0] == MECHANISM
    assert first[1] is not None
    return login, server, said(login, m.authentication_sasl_continue(server.first(first[1])))[5:]


def test_a_server_that_proves_itself_is_believed() -> None:
    login, server, proof = proved()
    said(login, m.authentication_sasl_final(server.final(proof)), m.AUTHENTICATION_OK)
    said(login, m.parameter_status("a", "1"), m.backend_key_data(7, b"key!"), m.ready_for_query(b"I"))
    assert (login.is_done, login.parameters, login.pid, login.secret) == (True, {b"a": b"1"}, 7, b"key!")


def test_a_server_that_does_not_know_the_password_is_not_believed() -> None:
    login, _, proof = proved()
    with pytest.raises(ProtocolViolation, match="does not know the password"):
        said(login, m.authentication_sasl_final(b"v=" + proof[-44:]))


@pytest.mark.parametrize(
    "reply",
    [
        m.AUTHENTICATION_OK,
        m.AUTHENTICATION_CLEARTEXT,
        m.authentication_md5(b"salt"),
        m.authentication_sasl([MECHANISM]),
    ],
)
def test_a_server_that_skips_its_proof_is_not_believed(reply: bytes) -> None:
    login, _, _ = proved()
    with pytest.raises(ProtocolViolation):
        said(login, reply)
    with pytest.raises(ProtocolViolation):
        said(login, m.AUTHENTICATION_OK)


@pytest.mark.parametrize(
    "replies",
    [
        [m.ready_for_query(b"I")],
        [m.parameter_status("a", "b")],
        [m.AUTHENTICATION_OK, m.AUTHENTICATION_OK],
        [m.AUTHENTICATION_OK, m.ready_for_query(b"T")],
        [m.AUTHENTICATION_OK, m.data_row([b"1"])],
        [m.AUTHENTICATION_OK, m.negotiate_protocol_version(0, [])],
        [m.negotiate_protocol_version(2, [])],
        [m.AUTHENTICATION_OK, m.ready_for_query(b"I"), m.parameter_status("a", "b")],
        [m.authentication_sasl([])],
        [m.authentication_md5(b"five!")],
        [m.message(b"R", b"\0\0\0\x0b")],
        [m.message(b"R", b"\0\0")],
        [m.message(b"R", b"\0\0\0\0more")],
    ],
)
def test_what_is_not_in_the_table_is_a_violation(replies: list[bytes]) -> None:
    with pytest.raises(ProtocolViolation):
        said(Login("u", password=PASSWORD), *replies)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (m.message(b"R", b"\0\0\0\x07"), "GSSAPI"),
        (m.message(b"R", b"\0\0\0\x09"), "SSPI"),
        (m.authentication_sasl([b"OAUTHBEARER"]), "OAUTHBEARER"),
        (m.error_response("57P03", "starting up", severity="FATAL"), "starting up"),
    ],
)
def test_what_we_cannot_do_is_said(reply: bytes, words: str) -> None:
    with pytest.raises(LoginRefused, match=words):
        said(Login("u", password=PASSWORD), reply)


def test_a_server_cannot_fill_our_memory_before_it_is_ready() -> None:
    login = Login("u")
    said(login, m.AUTHENTICATION_OK)
    with pytest.raises(ProtocolViolation, match="1000 parameters"):
        said(login, *(m.parameter_status(f"p{number}", "v") for number in range(1001)))
    with pytest.raises(ProtocolViolation, match="1000 notices"):
        said(Login("u"), *[m.notice_response("00000", "hello")] * 1001)


def test_a_server_cannot_make_us_count_forever() -> None:
    client = ScramClient(password=PASSWORD, nonce=b"n")
    with pytest.raises(ProtocolViolation, match="iterations"):
        client.final(b"r=nm,s=c2FsdA==,i=%d" % (ITERATIONS_MAX + 1))


# --- Messages at a server -------------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.port, Login("of_trust")) as client:
        yield client


def test_an_extended_query_runs_with_our_messages(client: Client) -> None:
    replies = client(
        m.parse(b"s", b"SELECT $1 + 1, $2, NULL::text", [20, 25]),
        m.describe(b"S", b"s"),
        m.bind(b"p", b"s", [(41).to_bytes(8, "big"), b"text"], formats=[1, 0], result_formats=[1, 0, 0]),
        m.describe(b"P", b"p"),
        m.execute(b"p"),
        m.close(b"P", b"p"),
        m.close(b"S", b"s"),
        m.SYNC,
    )
    assert kinds(replies) == "1tT2TDC33Z"
    assert m.decode_parameter_description(replies[1][1]) == (20, 25)
    columns = m.decode_row_description(replies[4][1])
    assert [(column.type_oid, column.type_size, column.format) for column in columns] == [
        (20, 8, 1),
        (25, -1, 0),
        (25, -1, 0),
    ]
    assert columns[0].name == b"?column?"
    assert m.decode_data_row(replies[5][1]) == ((42).to_bytes(8, "big"), b"text", None)
    assert m.decode_command_complete(replies[6][1]) == b"SELECT 1"
    assert m.decode_ready_for_query(replies[-1][1]) == b"I"
    assert m.row_description(columns)[5:] == replies[4][1]


def test_a_portal_is_read_in_pieces(client: Client) -> None:
    replies = client(
        m.parse(b"", b"SELECT generate_series(1, 3)"), m.bind(b"", b""), m.execute(b"", 2), m.execute(b"", 2), m.SYNC
    )
    assert kinds(replies) == "12DDsDCZ"


def test_more_parameters_than_there_are_prepared_structs(client: Client) -> None:
    marks = ", ".join(f"${number}" for number in range(1, 1001))
    numbers = [b"%d" % number for number in range(1000)]
    replies = client(
        m.parse(b"", f"SELECT ARRAY[{marks}]::int[]", [23] * 1000),
        m.bind(b"", b"", numbers, formats=[0] * 1000),
        m.execute(b""),
        m.SYNC,
    )
    assert m.decode_data_row(replies[2][1]) == (b"{" + b",".join(numbers) + b"}",)


def test_an_error_can_be_read(client: Client) -> None:
    replies = client(m.parse(b"", b"SELECT * FROM nowhere"), m.SYNC)
    fields = m.error_fields(replies[0][1])
    assert (fields["S"], fields["C"]) == ("ERROR", "42P01")
    assert "nowhere" in fields["M"]


def test_rows_are_copied_in_and_out(client: Client) -> None:
    client(m.query("CREATE TEMP TABLE t (a int, b text)"))
    replies = client(m.query("COPY t FROM STDIN"), until="G")
    assert m.decode_copy_response(replies[-1][1]) == m.CopyResponse(0, (0, 0))
    assert kinds(client(m.copy_data(b"1\tone\n2\t"), m.copy_data(b"two\n"), m.COPY_DONE)) == "CZ"
    replies = client(m.query("COPY t TO STDOUT (FORMAT binary)"))
    assert kinds(replies)[0] == "H"
    assert m.decode_copy_response(replies[0][1]) == m.CopyResponse(1, (1, 1))
    client(m.query("COPY t FROM STDIN"), until="G")
    replies = client(m.copy_fail("enough"))
    assert "enough" in m.error_fields(replies[0][1])["M"]


def test_a_function_is_called(client: Client) -> None:
    int4pl = 177
    replies = client(m.function_call(int4pl, [b"\0\0\0\x28", b"\0\0\0\2"], [1], 1))
    assert replies[0] == ("V", m.function_call_response(b"\0\0\0\x2a")[5:])


def test_notifications_and_notices_can_be_read(client: Client) -> None:
    replies = dict(client(m.query("LISTEN c; NOTIFY c, 'hello'; DO $$BEGIN RAISE NOTICE 'look'; END$$")))
    assert m.decode_notification(replies["A"])[1:] == (b"c", b"hello")
    assert m.error_fields(replies["N"])["M"] == "look"


def test_a_query_is_cancelled_with_the_secret_of_its_login(server: Server) -> None:
    for minor in (0, 2):
        login = Login("of_trust", minor=minor)
        with Client(server.port, login) as client:
            client(m.query("BEGIN"))
            client.send(m.query("SELECT pg_sleep(600)"))
            wait_until_active(server, login.pid)
            with socket.create_connection((LOOPBACK, server.port), timeout=BOUND_S) as canceller:
                canceller.sendall(m.cancel_request(login.pid, login.secret))
                assert canceller.recv(1) == b""
            replies = client()
            assert m.error_fields(replies[-2][1])["C"] == "57014"


def wait_until_active(server: Server, pid: int) -> None:
    with psycopg.connect(server.dsn, autocommit=True) as session:
        sleeping = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
        deadline = time.monotonic() + BOUND_S
        while session.execute(sleeping, [pid]).fetchone() is None:
            assert time.monotonic() < deadline
            session.execute("SELECT pg_sleep(0.01)")


# --- SCRAM ----------------------------------------------------------------------------------------------------------

RFC_SALT: Final = b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
RFC_CLIENT_NONCE: Final = b"rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_NONCE: Final = b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
RFC_FIRST: Final = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
RFC_SERVER_FIRST: Final = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
RFC_FINAL: Final = (
    b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
)
RFC_SERVER_FINAL: Final = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def rfc_server() -> ScramServer:
    verifier = Verifier.make("pencil", RFC_SALT, 4096)
    return ScramServer(Verifier.parse(str(verifier)), user="user", nonce=RFC_SERVER_NONCE)


def test_the_client_says_what_rfc_7677_says() -> None:
    client = ScramClient(password="pencil", user=b"user", nonce=RFC_CLIENT_NONCE)
    assert client.first() == RFC_FIRST
    assert client.final(RFC_SERVER_FIRST) == RFC_FINAL
    client.verify(RFC_SERVER_FINAL)


def test_the_server_says_what_rfc_7677_says() -> None:
    server = rfc_server()
    assert server.first(RFC_FIRST) == RFC_SERVER_FIRST
    assert server.final(RFC_FINAL) == RFC_SERVER_FINAL
    assert server.client_key == keys_of("pencil", RFC_SALT, 4096).client_key


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"p=tls-server-end-point,,n=,r=abc", ProtocolViolation),
        (b"n,a=admin,n=,r=abc", UnsupportedSasl),
        (b"n,,m=ext,n=,r=abc", UnsupportedSasl),
        (b"n,,n=,r=", ProtocolViolation),
        (b"n,,r=abc", ProtocolViolation),
        (b"x,,n=,r=abc", ProtocolViolation),
        (b"n,,n=,r=a b", ProtocolViolation),
        (b"n,,n=,r=abc\n", ProtocolViolation),
        (b"n,,n=,r=" + b"a" * 5000, ProtocolViolation),
        (b"", ProtocolViolation),
    ],
)
def test_a_first_message_that_cannot_be_is_refused(first: bytes, kind: type[ProtocolViolation]) -> None:
    with pytest.raises(kind):
        rfc_server().first(first)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (b"c=biws", b"c=eSws", ProtocolViolation),  # says now that it could have bound the channel
        (b"r=rO", b"r=xO", ProtocolViolation),
        (b"p=dHz", b"p=dHy", AuthenticationFailed),
        (b"p=dHz", b"p=", ProtocolViolation),
        (b",p=dHz", b",x=1,p=dHz", AuthenticationFailed),  # an extension, which the proof does not cover
        (b",p=dHzb", b"", ProtocolViolation),
    ],
)
def test_a_final_message_that_was_changed_is_refused(old: bytes, new: bytes, kind: type[ProtocolViolation]) -> None:
    server = rfc_server()
    server.first(RFC_FIRST)
    with pytest.raises(kind) as caught:
        server.final(RFC_FINAL.replace(old, new))
    assert type(caught.value) is kind
    assert server.client_key is None


def test_a_client_that_changes_its_mind_about_channel_binding_is_refused() -> None:
    """With the flag `y` at first: it can, and thinks that we cannot. Over TLS libpq says so, and is let in, below."""
    server, client = ScramServer(Verifier.make(PASSWORD), user="u"), ScramClient(password=PASSWORD, nonce=b"n")
    server_first = server.first(b"y,," + client.first()[3:])
    with pytest.raises(ProtocolViolation, match="channel binding check"):
        server.final(client.final(server_first))


def test_an_unknown_user_cannot_be_told_from_a_wrong_password() -> None:
    def conversation(verifier: Verifier | None, user: str) -> tuple[bytes, str]:
        server, client = ScramServer(verifier, user=user, nonce=b"s"), ScramClient(password="guess", nonce=b"c")
        first = server.first(client.first())
        with pytest.raises(AuthenticationFailed) as caught:
            server.final(client.final(first))
        return first, caught.value.message

    known = conversation(Verifier.make(PASSWORD), "u")
    unknown = [conversation(None, user) for user in ("u", "u", "other")]
    assert len(known[0]) == len(unknown[0][0])
    assert known[1] == unknown[0][1]
    assert unknown[0] == unknown[1], "a salt that changes would give an unknown user away"
    assert unknown[0][0] != unknown[2][0], "a salt that many share would too"


def test_the_mock_salt_depends_on_the_secret() -> None:
    assert mock_verifier("u", b"one") == mock_verifier("u", b"one")
    assert mock_verifier("u", b"one").salt != mock_verifier("u", b"two").salt


def test_not_even_the_mock_verifiers_own_key_lets_an_unknown_user_in() -> None:
    """Whatever the proof: `None` stays unknown."""
    client, server = ScramClient(password="x", nonce=b"c"), ScramServer(None, user="u", nonce=b"s")
    server._verifier = Verifier.make("x")
    with pytest.raises(AuthenticationFailed):
        converse(client, server)
    converse(ScramClient(password="x"), ScramServer(server._verifier, user="u"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "md5" + "0" * 32,
        "SCRAM-SHA-256$0:c2FsdA==$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:c2FsdA==$AAAA:AAAA",
        "SCRAM-SHA-256$1000000000:c2FsdA==$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:c2FsdA$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:$" + "A" * 43 + "=:" + "A" * 43 + "=",
        "SCRAM-SHA-256$4096:c2FsdA==$" + "A" * 43 + "=:" + "A" * 43 + "=\n",
        "SCRAM-SHA-256$4096:\ud800$" + "A" * 43 + "=:" + "A" * 43 + "=",
    ],
)
def test_what_is_no_verifier_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a SCRAM-SHA-256 verifier"):
        Verifier.parse(text)


def test_secrets_are_not_shown() -> None:
    verifier = Verifier.make(PASSWORD)
    assert "key" not in repr(verifier)
    assert repr(keys_of(PASSWORD, verifier.salt, 4096)) == "Keys()"


PASSWORDS: Final = [
    "plain",
    " spaces and \t controls\x01 ",
    "Ünïcödé",
    "u\u0308 composes",
    "\u00aa\u2168 compatibility",
    "no\u00a0break\u2003spaces",
    "soft\u00adhyphen",
    "\u00ad",
    "ctrl\u0007 and é",
    "\u0627\u0628 1",
    "\u0627\u0628\u0628",
    "\u0627a\u0628",
    "private \ue000",
    "unassigned \u0221",
    "emoji \U0001f40e",
    "ﬁ ligature",
    "\u200e mark",
    "tag \U000e0041",
]


def test_passwords_are_prepared_as_the_server_does(server: Server) -> None:
    """For each, the server's own verifier is ours."""
    differing = []
    with psycopg.connect(server.dsn, autocommit=True) as session:
        session.execute("CREATE ROLE prepared")
        for password in PASSWORDS:
            session.execute(sql.SQL("ALTER ROLE prepared PASSWORD {}").format(sql.Literal(password)))
            theirs = stored_verifier(server, "prepared")
            if Verifier.make(password, theirs.salt, theirs.iterations) != theirs:
                differing.append(ascii(password))
        session.execute("DROP ROLE prepared")
    assert differing == []


def test_a_password_without_a_normal_form_is_taken_as_it_is() -> None:
    assert prepared("\u2168") == b"IX"
    assert prepared("I\u00adX") == b"IX"
    assert prepared("\u0627 1") == "\u0627 1".encode()
    assert prepared("caf\udce9") == b"caf\xe9"


# --- The greeting ---------------------------------------------------------------------------------------------------


def packet(code: int, body: bytes = b"") -> bytes:
    return (8 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body


def greeted(*parts: bytes, startup: Startup | None = None) -> list[object]:
    """The events of a greeting, each part fed after the one before."""
    startup = startup or Startup(has_tls=True)
    return [event for part in parts for event in startup.feed(part)]


HELLO: Final = m.startup_message(m.version_code(0), {"user": "u", "database": "d", "application_name": "é"})
READY: Final = Ready(0, 0, {"user": "u", "database": "d", "application_name": "é"}, (), None, b"")


ORDERS: Final = [[], ["ssl"], ["gss"], ["gss", "ssl"]]


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(
    ("asked", "has_tls"),
    [*((asked, True) for asked in ORDERS), *((asked, False) for asked in [*ORDERS, ["ssl", "gss"]])],
)
def test_encryption_is_asked_for_in_any_order(asked: list[str], has_tls: bool, is_whole: bool) -> None:
    startup = Startup(has_tls=has_tls)
    requests = {"ssl": m.SSL_REQUEST, "gss": m.GSS_REQUEST}
    answers = {"ssl": WantsTls(b"S" if has_tls else b"N"), "gss": WantsGss(b"N")}
    whole = [*(requests[name] for name in asked), HELLO]
    parts = whole if is_whole else [part[at : at + 1] for part in whole for at in range(len(part))]
    assert greeted(*parts, startup=startup) == [*(answers[name] for name in asked), READY]


def test_a_handshake_may_come_at_once() -> None:
    assert greeted(b"\x16\x03\x01", HELLO) == [DirectTls(b"\x16\x03\x01"), READY]
    with pytest.raises(ProtocolViolation, match="no TLS"):
        greeted(b"\x16", startup=Startup())
    with pytest.raises(ProtocolViolation):
        greeted(m.GSS_REQUEST, b"\x16\x03\x01\x00")


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("request_", [m.SSL_REQUEST, m.GSS_REQUEST])
def test_bytes_that_came_with_a_request_for_encryption_are_refused(request_: bytes, has_tls: bool) -> None:
    for extra in (HELLO, b"\0"):
        with pytest.raises(ProtocolViolation, match="unencrypted data"):
            greeted(request_ + extra, startup=Startup(has_tls=has_tls))


def test_without_that_check_the_words_of_somebody_in_between_are_the_clients() -> None:
    class Careless(Startup):
        def _encryption(self, code: int, packet: bytes) -> WantsTls | WantsGss:
            kept, self._buffer = self._buffer, b""
            event = super()._encryption(code, packet)
            self._buffer = kept
            assert isinstance(event, WantsTls)
            return event

    injected = m.startup_message(m.version_code(0), {"user": "mallory"})
    events = greeted(m.SSL_REQUEST + injected, HELLO, startup=Careless(has_tls=True))
    assert isinstance(events[1], Ready)
    assert events[1].parameters["user"] == "mallory"


@pytest.mark.parametrize("again", [m.SSL_REQUEST, m.GSS_REQUEST])
def test_encryption_inside_of_encryption_is_refused(again: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="second time"):
        greeted(m.SSL_REQUEST, again)
    with pytest.raises(ProtocolViolation, match="second time"):
        greeted(b"\x16", again)


@pytest.mark.parametrize("request_", [m.SSL_REQUEST, m.GSS_REQUEST])
def test_a_second_request_of_a_kind_is_refused(request_: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="second time"):
        greeted(request_, request_, startup=Startup())


@pytest.mark.parametrize("secret", [b"four", bytes(range(256)), b"s" * 32])
def test_a_request_to_cancel_is_read(secret: bytes) -> None:
    request = m.cancel_request(2**32 - 1, secret)
    assert greeted(request) == [Cancel(2**32 - 1, secret)]
    assert greeted(m.SSL_REQUEST, request) == [WantsTls(b"S"), Cancel(2**32 - 1, secret)]
    assert greeted(request, startup=Startup(has_tls=True, requires_tls=True)) == [Cancel(2**32 - 1, secret)]


@pytest.mark.parametrize("secret", [b"", b"abc", bytes(257)])
def test_a_secret_of_another_length_is_refused(secret: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        greeted(m.cancel_request(1, secret))


def test_what_came_with_the_startup_packet_is_handed_on() -> None:
    (event,) = greeted(HELLO + m.query("SELECT 1"))
    assert isinstance(event, Ready)
    assert event.leftover == m.query("SELECT 1")


def test_the_database_is_the_users_unless_named() -> None:
    (event,) = greeted(m.startup_message(m.version_code(0), {"user": "u", "options": "-c a=b"}))
    assert isinstance(event, Ready)
    assert event.parameters == {"user": "u", "options": "-c a=b", "database": "u"}


def test_a_connection_in_the_clear_is_refused_where_tls_is_required() -> None:
    with pytest.raises(InvalidAuthorization):
        greeted(HELLO, startup=Startup(has_tls=True, requires_tls=True))
    assert greeted(m.SSL_REQUEST, HELLO, startup=Startup(has_tls=True, requires_tls=True)) == [WantsTls(b"S"), READY]


def test_a_startup_packet_has_a_bound() -> None:
    fill = 10_000 - len(packet(0x30000, b"user\0u\0x\0\0\0")) + 4
    assert greeted(packet(0x30000, b"user\0u\0x\0" + b"y" * fill + b"\0\0"))
    for refused in (packet(0x30000, b"user\0u\0x\0" + b"y" * (fill + 1) + b"\0\0"), b"\xff\xff\xff\xff", b"\0\0\0\x07"):
        with pytest.raises(ProtocolViolation):
            greeted(refused[:4])


def test_a_broken_greeting_stays_broken() -> None:
    startup = Startup()
    with pytest.raises(ProtocolViolation):
        startup.feed(b"\0\0\0\0")
    with pytest.raises(AssertionError):
        startup.feed(HELLO)


BODY: Final = b"user\0of_trust\0database\0postgres\0"
GREETINGS: Final[Mapping[str, bytes]] = {
    "3.0": packet(0x30000, BODY + b"\0"),
    "3.1": packet(0x30001, BODY + b"\0"),
    "3.2": packet(0x30002, BODY + b"\0"),
    "3.3": packet(0x30003, BODY + b"\0"),
    "3.9999": packet(0x30000 + 9999, BODY + b"\0"),
    "unknown option": packet(0x30000, BODY + b"_pq_.one\0x\0_pq_.two\0y\0\0"),
    "newer, unknown option": packet(0x30003, b"_pq_.one\0x\0" + BODY + b"\0"),
    "4.0": packet(0x40000, BODY + b"\0"),
    "no user": packet(0x30000, b"database\0postgres\0\0"),
    "empty user": packet(0x30000, b"user\0\0database\0postgres\0\0"),
    "nothing": packet(0x30000, b"\0"),
    "no terminator": packet(0x30000, BODY),
    "no end": packet(0x30000, BODY[:-1]),
    "empty": packet(0x30000),
    "more after the end": packet(0x30000, BODY + b"\0x"),
    "a name alone": packet(0x30000, BODY + b"options\0\0"),
    "data after SSLRequest": m.SSL_REQUEST + HELLO,
    "data after GSSENCRequest": m.GSS_REQUEST + HELLO,
}


@pytest.mark.parametrize("server", ["newest"], indirect=True)
@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting_is_taken_as_postgresql_takes_it(server: Server, name: str) -> None:
    """Negotiated in the same words, or refused with the same SQLSTATE."""
    kind, first = first_message(server.port, GREETINGS[name])
    sqlstate = m.error_fields(first[5:])["C"] if kind == ord("E") else None
    assert greeting_of(GREETINGS[name]) == (sqlstate or first)


def greeting_of(sent: bytes) -> str | bytes:
    """The SQLSTATE of our refusal, or what we would say first."""
    try:
        (event,) = Startup().feed(sent)
    except ProtocolViolation as violation:
        return violation.sqlstate
    assert isinstance(event, Ready)
    return event.negotiate or m.AUTHENTICATION_OK


def first_message(port: int, sent: bytes) -> tuple[int, bytes]:
    """What the server says first, but for the byte that refuses encryption."""
    frames = Frames()
    with socket.create_connection((LOOPBACK, port), timeout=BOUND_S) as connection:
        connection.sendall(sent)
        data = connection.recv(1)
        frames.feed(b"" if data == b"N" else data)
        while True:
            for kind, message in frames:
                return kind, message
            data = connection.recv(1)
            assert data, "the server closed without a word"
            frames.feed(data)


def test_the_negotiation_is_ours_where_the_server_is_older() -> None:
    with pytest.raises(UnsupportedVersion):
        greeted(packet(0x20000, BODY + b"\0"))


# --- libpq as the client --------------------------------------------------------------------------------------------


class Host:
    """A server of one answer, `42`, on threads: the greeting, SCRAM, and a row for every query."""

    def __init__(self, verifiers: Mapping[str, Verifier], context: ssl.SSLContext | None) -> None:
        self.events: list[object] = []
        self.client_keys: list[bytes | None] = []
        self.cancelled = threading.Event()
        self._verifiers = verifiers
        self._context = context
        self._listener = socket.create_server((LOOPBACK, 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(BOUND_S)
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(BOUND_S)
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError):
            try:
                connection, ready = self._greet(connection)
                if ready is not None:
                    self._session(connection, ready)
            except ProtocolViolation as violation:
                connection.sendall(m.error_response(violation.sqlstate, violation.message, severity="FATAL"))
            finally:
                connection.close()

    def _greet(self, connection: socket.socket) -> tuple[socket.socket, Ready | None]:
        startup = Startup(has_tls=self._context is not None)
        while True:
            for event in startup.feed(read(connection, peek=not self.events)):
                self.events.append(event)
                match event:
                    case WantsTls(answer) | WantsGss(answer):
                        connection.sendall(answer)
                        if answer == b"S":
                            connection = self._secured(connection)
                    case DirectTls():
                        connection = self._secured(connection)
                    case Cancel():
                        self.cancelled.set()
                        return connection, None
                    case Ready():
                        return connection, event

    def _secured(self, connection: socket.socket) -> socket.socket:
        assert self._context is not None
        secured = self._context.wrap_socket(connection, server_side=True)
        self._open.append(secured)
        return secured

    def _session(self, connection: socket.socket, ready: Ready) -> None:
        frames = Frames()
        frames.feed(ready.leftover)
        connection.sendall(ready.negotiate or b"")
        self._authenticate(connection, frames, ready.parameters["user"])
        secret = b"s" * 32 if ready.minor >= 2 else b"four"
        connection.sendall(
            m.AUTHENTICATION_OK
            + m.parameter_status("server_version", "18.0")
            + m.parameter_status("client_encoding", "UTF8")
            + m.backend_key_data(7, secret)
            + m.ready_for_query(b"I")
        )
        while (message := receive(connection, frames))[0] != ord("X"):
            connection.sendall(ANSWERS.get(chr(message[0]), b""))

    def _authenticate(self, connection: socket.socket, frames: Frames, user: str) -> None:
        scram = ScramServer(self._verifiers.get(user), user=user)
        connection.sendall(m.authentication_sasl([MECHANISM]))
        mechanism, first = m.decode_sasl_initial_response(receive(connection, frames)[5:])
        assert mechanism == MECHANISM
        assert first is not None
        connection.sendall(m.authentication_sasl_continue(scram.first(first)))
        connection.sendall(m.authentication_sasl_final(scram.final(receive(connection, frames)[5:])))
        self.client_keys.append(scram.client_key)


COLUMNS: Final = m.row_description([m.Column(b"answer", 0, 0, 25, -1, -1, 0)])
ROW: Final = m.data_row([b"42"]) + m.command_complete("SELECT 1")
ANSWERS: Final = {
    "Q": COLUMNS + ROW + m.ready_for_query(b"I"),
    "P": m.PARSE_COMPLETE,
    "B": m.BIND_COMPLETE,
    "D": COLUMNS,
    "E": ROW,
    "C": m.CLOSE_COMPLETE,
    "S": m.ready_for_query(b"I"),
}


def read(connection: socket.socket, *, peek: bool = False) -> bytes:
    """What is there; of a TLS handshake that comes first, nothing is taken off the socket but looked at."""
    if peek and connection.recv(1, socket.MSG_PEEK) == b"\x16":
        return b"\x16"
    data = connection.recv(8192)
    if not data:
        raise EOFError
    return data


def receive(connection: socket.socket, frames: Frames) -> bytes:
    while True:
        for _, message in frames:
            return message
        frames.feed(read(connection))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    home = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(["openssl", *words.split()], cwd=home, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "cert.pem", home / "key.pem")
    context.set_alpn_protocols(["postgresql"])
    return context


@contextmanager
def hosting(context: ssl.SSLContext | None = None) -> Iterator[Host]:
    host = Host({"u": Verifier.make(PASSWORD, b"0123456789abcdef")}, context)
    try:
        yield host
    finally:
        host.close()


def conninfo(host: Host, **words: str) -> str:
    return make_conninfo(
        **{"host": LOOPBACK, "port": str(host.port), "user": "u", "dbname": "d", "password": PASSWORD, **words}
    )


def answer_of(dsn: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as session:
        row = session.execute("SELECT 'whatever'").fetchone()
        assert row is not None
        return str(row[0])


def test_libpq_logs_in_with_scram() -> None:
    with hosting() as host:
        assert answer_of(conninfo(host, require_auth="scram-sha-256")) == "42"
    assert host.events[0] == WantsTls(b"N")
    assert host.client_keys == [keys_of(PASSWORD, b"0123456789abcdef", 4096).client_key]


@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
def test_libpq_logs_in_with_or_without_tls(context: ssl.SSLContext, sslmode: str) -> None:
    with hosting(context) as host:
        assert answer_of(conninfo(host, sslmode=sslmode)) == "42"
    assert (host.events[0] == WantsTls(b"S")) == (sslmode != "disable")


def test_libpq_logs_in_where_tls_comes_at_once(context: ssl.SSLContext) -> None:
    with hosting(context) as host:
        assert answer_of(conninfo(host, sslmode="require", sslnegotiation="direct")) == "42"
    assert host.events[0] == DirectTls(b"\x16")


@pytest.mark.parametrize(("version", "minor", "secret"), [("3.0", 0, b"four"), ("3.2", 2, b"s" * 32)])
def test_libpq_cancels_with_the_secret_of_its_version(version: str, minor: int, secret: bytes) -> None:
    with hosting() as host:
        with psycopg.connect(conninfo(host, max_protocol_version=version), autocommit=True) as session:
            session.cancel_safe()
            assert host.cancelled.wait(BOUND_S)
        readies = [event for event in host.events if isinstance(event, Ready)]
        assert [ready.minor for ready in readies] == [minor]
        assert Cancel(7, secret) in host.events


def test_libpq_understands_a_wrong_password_and_an_unknown_user() -> None:
    with hosting() as host:
        for words in ({"password": "wrong"}, {"user": "nobody"}):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                answer_of(conninfo(host, **words))
    assert host.client_keys == []


def test_an_older_psql_logs_in() -> None:
    psql = Path(old_binaries()) / "psql"
    with hosting() as host:
        done = subprocess.run(
            [psql, conninfo(host), "-XAtc", "SELECT 1"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.stdout, done.stderr) == ("42\n", "")
