"""A login at a PostgreSQL server, as its client, without a socket: from the startup packet to ReadyForQuery.

    login = Login("alice", password=...)
    send(login.start({"database": "shop"}))
    while not login.is_done: send(login.receive(kind, body))

The table: state, the request's code or the message's kind, and what becomes of it. What is not in it is a violation.

    state      what comes                       next       we send
    STARTED    Ok                               LOGGED_IN
    STARTED    CleartextPassword, MD5Password   ANSWERED   the password, or its hash
    STARTED    SASL                             SASL       the client's first message
    SASL       SASLContinue                     PROVED     the client's proof
    PROVED     SASLFinal                        ANSWERED   (the server has proved that it knows the password too)
    ANSWERED   Ok                               LOGGED_IN
    STARTED    NegotiateProtocolVersion         STARTED
    LOGGED_IN  BackendKeyData, ParameterStatus  LOGGED_IN
    LOGGED_IN  ReadyForQuery                    DONE
    any        NoticeResponse
    any        ErrorResponse                    REFUSED

So a server that was asked for SCRAM and did not prove itself cannot say Ok. Source: PostgreSQL manual, Message Flow.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping
from typing import Final

from shardmove.domain.errors import Failed
from shardmove.wire import messages
from shardmove.wire.messages import ProtocolViolation
from shardmove.wire.scram import MECHANISM, Keys, ScramClient

PARAMETERS_MAX: Final = 1000  # of what a server may report before it is ready; PostgreSQL reports some fifteen
NOTICES_MAX: Final = 1000

CODE_OK: Final = 0
CODE_CLEARTEXT: Final = 3
CODE_MD5: Final = 5
CODE_SASL: Final = 10
CODE_SASL_CONTINUE: Final = 11
CODE_SASL_FINAL: Final = 12

_METHODS: Final = {2: "Kerberos V5", 6: "SCM credentials", 7: "GSSAPI", 8: "GSSAPI", 9: "SSPI"}
_PASSFILE: Final = (
    "put the user's password for this server into libpq's password file (~/.pgpass, or passfile= in the DSN)"
)


class LoginRefused(Failed):
    """The server, or our own prudence, said no. There is no session.

    Attributes:
        sqlstate: the server's, or 28000 where we stopped by ourselves.
    """

    def __init__(self, message: str, *, hint: str | None = None, sqlstate: str = "28000") -> None:
        super().__init__(message, hint=hint)
        self.sqlstate = sqlstate

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.message, self.hint, self.sqlstate)


def _rebuild(message: str, hint: str | None, sqlstate: str) -> LoginRefused:
    return LoginRefused(message, hint=hint, sqlstate=sqlstate)


class State(enum.Enum):
    STARTED = enum.auto()
    SASL = enum.auto()
    PROVED = enum.auto()
    ANSWERED = enum.auto()
    LOGGED_IN = enum.auto()
    DONE = enum.auto()
    REFUSED = enum.auto()


class Login:
    """One login of one user. See the module.

    Attributes:
        parameters: what the server reported, by name.
        pid: the server process's number; 0 while unknown.
        secret: with which its queries are cancelled; empty while unknown.
        minor: of protocol 3, as spoken.
    """

    def __init__(
        self,
        user: str,
        *,
        password: str | None = None,
        client_key: bytes | None = None,
        server_key: bytes | None = None,
        may_send_cleartext: bool = False,
        minor: int = 0,
    ) -> None:
        """Both keys, of SCRAM, do where there is no password and the server's verifier is the one that they are from.

        `may_send_cleartext`: whether the connection is one on which the server may be told the password as it is.
        """
        self.state = State.STARTED
        self.parameters: dict[bytes, bytes] = {}
        self.pid = 0
        self.secret = b""
        self.minor = minor
        self._user = user
        self._password = password
        self._keys = Keys(client_key, server_key) if client_key and server_key else None
        self._may_send_cleartext = may_send_cleartext
        self._scram: ScramClient | None = None
        self._notices = 0

    @property
    def is_done(self) -> bool:
        return self.state is State.DONE

    def start(self, parameters: Mapping[str, str]) -> bytes:
        """The startup packet. `parameters`: database, options and others; not the user."""
        return messages.startup_message(messages.version_code(self.minor), {"user": self._user, **parameters})

    def receive(self, kind: int, body: bytes) -> bytes:
        """One message of the server's; what to send back, which may be nothing.

        Raises:
            LoginRefused: the server refused, or asks for what we do not have or do not send.
            ProtocolViolation: what it said makes no sense. In both cases: close the connection.
        """
        try:
            return self._receive(chr(kind), body)
        except (LoginRefused, ProtocolViolation):
            self.state = State.REFUSED
            raise

    def _receive(self, kind: str, body: bytes) -> bytes:
        if self.state in (State.DONE, State.REFUSED):
            raise ProtocolViolation(f"the server sent a message {kind!r} to a login that is {self.state.name}")
        match kind:
            case "E":
                raise _refusal(body)
            case "N":
                return self._notice(body)
            case "R":
                return self._authentication(body)
        step = _MESSAGES.get((self.state, kind))
        if step is None:
            raise ProtocolViolation(f"the server sent a message {kind!r} while the login was {self.state.name}")
        step(self, body)
        return b""

    def _authentication(self, body: bytes) -> bytes:
        code, data = messages.decode_authentication(body)
        found = _REQUESTS.get((self.state, code))
        if found is None:
            raise self._strange_request(code)
        step, self.state = found
        return step(self, data)

    def _strange_request(self, code: int) -> LoginRefused | ProtocolViolation:
        if self.state is State.STARTED and code in _METHODS:
            return LoginRefused(
                f"the server asks user {self._user!r} to authenticate by {_METHODS[code]}, which is not supported",
                hint="use scram-sha-256 for this user in the server's pg_hba.conf",
            )
        return ProtocolViolation(
            f"the server sent an authentication request {code} while the login was {self.state.name}"
        )

    # --- What the tables name ---

    def _ok(self, data: bytes) -> bytes:
        _nothing(data)
        return b""

    def _cleartext(self, data: bytes) -> bytes:
        _nothing(data)
        if not self._may_send_cleartext:
            raise LoginRefused(
                f"the server asks for the password of user {self._user!r} in the clear, on a connection without TLS",
                hint="use TLS to this server, or scram-sha-256 in its pg_hba.conf",
            )
        return messages.password_message(self._known_password("its password"))

    def _md5(self, salt: bytes) -> bytes:
        if len(salt) != 4:
            raise ProtocolViolation("an MD5 salt has 4 bytes")
        password = _encoded(self._known_password("an MD5 hash of its password"))
        inner = _md5(password + _encoded(self._user))
        return messages.password_message(b"md5" + _md5(inner + salt))

    def _sasl(self, data: bytes) -> bytes:
        *mechanisms, terminator, rest = data.split(b"\0") if data.count(b"\0") > 1 else (b"", b"", b"x")
        if terminator or rest or not all(mechanisms):
            raise ProtocolViolation("the server's list of SASL mechanisms is malformed")
        if MECHANISM not in mechanisms:
            offered = b", ".join(mechanisms).decode("utf-8", "replace")
            raise LoginRefused(f"the server offers {offered} to user {self._user!r}, and not SCRAM-SHA-256")
        if self._password is not None:
            self._scram = ScramClient(password=self._password)
        elif self._keys is not None:
            self._scram = ScramClient(keys=self._keys)
        else:
            raise self._no_password("SCRAM-SHA-256")
        return messages.sasl_initial_response(MECHANISM, self._scram.first())

    def _sasl_continue(self, data: bytes) -> bytes:
        assert self._scram is not None
        return messages.sasl_response(self._scram.final(data))

    def _sasl_final(self, data: bytes) -> bytes:
        assert self._scram is not None
        self._scram.verify(data)
        return b""

    def _notice(self, body: bytes) -> bytes:
        messages.error_fields(body)
        self._notices += 1
        if self._notices > NOTICES_MAX:
            raise ProtocolViolation(f"the server sent more than {NOTICES_MAX} notices before it was ready")
        return b""

    def _negotiate(self, body: bytes) -> None:
        version, _ = messages.decode_negotiate_protocol_version(body)
        minor = version - messages.version_code(0)
        if not 0 <= minor <= self.minor:
            raise ProtocolViolation("the server chose a version of the protocol above the one that was asked for")
        self.minor = minor

    def _parameter(self, body: bytes) -> None:
        name, value = messages.decode_parameter_status(body)
        self.parameters[name] = value
        if len(self.parameters) > PARAMETERS_MAX:
            raise ProtocolViolation(f"the server reported more than {PARAMETERS_MAX} parameters")

    def _key_data(self, body: bytes) -> None:
        self.pid, self.secret = messages.decode_backend_key_data(body)

    def _ready(self, body: bytes) -> None:
        if messages.decode_ready_for_query(body) != b"I":
            raise ProtocolViolation("the server's first ReadyForQuery is inside a transaction")
        self.state = State.DONE

    def _known_password(self, what: str) -> str:
        if self._password is None:
            raise self._no_password(what)
        return self._password

    def _no_password(self, what: str) -> LoginRefused:
        return LoginRefused(f"the server asks user {self._user!r} for {what}, and no password is known", hint=_PASSFILE)


_REQUESTS: Final[Mapping[tuple[State, int], tuple[Callable[[Login, bytes], bytes], State]]] = {
    (State.STARTED, CODE_OK): (Login._ok, State.LOGGED_IN),
    (State.STARTED, CODE_CLEARTEXT): (Login._cleartext, State.ANSWERED),
    (State.STARTED, CODE_MD5): (Login._md5, State.ANSWERED),
    (State.STARTED, CODE_SASL): (Login._sasl, State.SASL),
    (State.SASL, CODE_SASL_CONTINUE): (Login._sasl_continue, State.PROVED),
    (State.PROVED, CODE_SASL_FINAL): (Login._sasl_final, State.ANSWERED),
    (State.ANSWERED, CODE_OK): (Login._ok, State.LOGGED_IN),
}

_MESSAGES: Final[Mapping[tuple[State, str], Callable[[Login, bytes], None]]] = {
    (State.STARTED, "v"): Login._negotiate,
    (State.LOGGED_IN, "S"): Login._parameter,
    (State.LOGGED_IN, "K"): Login._key_data,
    (State.LOGGED_IN, "Z"): Login._ready,
}


def _refusal(body: bytes) -> LoginRefused:
    fields = messages.error_fields(body)
    return LoginRefused(
        fields.get("M", "the server refused the login"), hint=fields.get("H"), sqlstate=fields.get("C", "XX000")
    )


def _nothing(data: bytes) -> None:
    if data:
        raise ProtocolViolation("an authentication request has data that it should not have")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).hexdigest().encode()
