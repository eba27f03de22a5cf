"""SCRAM-SHA-256, both sides, without channel binding.

What is stored of a password is a verifier. With H = SHA-256 and P = PBKDF2(password, salt, iterations):

    ClientKey = HMAC(P, "Client Key")     StoredKey = H(ClientKey)     ServerKey = HMAC(P, "Server Key")

A client proves that it knows ClientKey: proof = ClientKey XOR HMAC(StoredKey, AuthMessage), where AuthMessage is all
that was said, fresh nonces of both sides included. A server that checks the proof against StoredKey learns ClientKey
by the way, and with it can log in at every server that stores the same verifier (same salt, same iterations), without
the password: `Keys`. ClientKey and ServerKey of a user are secrets as good as the password.

An unknown user is asked like any other, with a salt that stays the same for the name, and fails at the end.

Source: RFC 5802, RFC 7677, and PostgreSQL's src/backend/libpq/auth-scram.c and src/common/saslprep.c.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stringprep
import unicodedata
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NoReturn, Self

from shardmove.wire.messages import ProtocolViolation

MECHANISM: Final = b"SCRAM-SHA-256"
ITERATIONS: Final = 4096
ITERATIONS_MAX: Final = 1_000_000  # what a server may ask of us: about a second
SALT_BYTES: Final = 16
KEY_BYTES: Final = 32
MESSAGE_BYTES_MAX: Final = 4096  # of a client's message: PostgreSQL's own bound is of the same size

_VERIFIER: Final = re.compile(r"SCRAM-SHA-256\$([1-9][0-9]{0,8}):([^$:]+)\$([^$:]+):([^$:]+)")
_CLIENT_FIRST: Final = re.compile(
    rb"(?P<header>(?P<binding>[ny]|p=[A-Za-z0-9.-]+),(?P<authzid>a=[^,\0]*)?,)(?P<bare>.+)"
)
_BARE: Final = re.compile(rb"n=[^,\0]*,r=(?P<nonce>[\x21-\x2b\x2d-\x7e]+)(?:,[A-Za-z]=[^,\0]*)*")
_CLIENT_FINAL: Final = re.compile(
    rb"(?P<unproved>c=(?P<binding>[A-Za-z0-9+/=]+),r=(?P<nonce>[\x21-\x2b\x2d-\x7e]+)(?:,[A-Za-oq-z]=[^,\0]*)*)"
    rb",p=(?P<proof>[A-Za-z0-9+/=]+)"
)
_SERVER_FIRST: Final = re.compile(
    rb"r=(?P<nonce>[\x21-\x2b\x2d-\x7e]+),s=(?P<salt>[A-Za-z0-9+/=]+),i=(?P<iterations>[1-9][0-9]{0,9})(?:,[^\0]*)?"
)

_PROCESS_SECRET: Final = secrets.token_bytes(32)


class AuthenticationFailed(ProtocolViolation):
    """The proof does not fit: the password is wrong, or nobody has that name."""

    sqlstate = "28P01"


class UnsupportedSasl(ProtocolViolation):
    """The client asked for something that SCRAM knows and this side does not."""

    sqlstate = "0A000"


@dataclass(frozen=True, slots=True)
class Keys:
    """Enough to log in as one user wherever its verifier is this one. A secret."""

    client_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @property
    def stored_key(self) -> bytes:
        return hashlib.sha256(self.client_key).digest()


@dataclass(frozen=True, slots=True)
class Verifier:
    """What PostgreSQL keeps in pg_authid.rolpassword; `str()` gives that text."""

    iterations: int
    salt: bytes
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.

        Raises:
            ValueError: it is none. The message does not repeat it.
        """
        found = _VERIFIER.fullmatch(text)
        if found is not None:
            with suppress(ValueError):
                salt, stored_key, server_key = (b64decode(word, validate=True) for word in found.groups()[1:])
                if salt and len(stored_key) == len(server_key) == KEY_BYTES:
                    return cls(int(found[1]), salt, stored_key, server_key)
        raise ValueError("not a SCRAM-SHA-256 verifier")

    @classmethod
    def make(cls, password: str, salt: bytes | None = None, iterations: int = ITERATIONS) -> Self:
        salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
        keys = keys_of(password, salt, iterations)
        return cls(iterations, salt, keys.stored_key, keys.server_key)

    def __str__(self) -> str:
        salt, stored_key, server_key = (
            b64encode(word).decode() for word in (self.salt, self.stored_key, self.server_key)
        )
        return f"SCRAM-SHA-256${self.iterations}:{salt}${stored_key}:{server_key}"


def mock_verifier(user: str, secret: bytes = _PROCESS_SECRET, iterations: int = ITERATIONS) -> Verifier:
    """For a user that there is not: the salt is the same whenever the name and the secret are, no password fits.

    Processes that answer for one another share a secret. Else a name that gives another salt each time is known to be
    unknown.
    """
    salt, stored_key, server_key = (
        hmac.digest(secret, word + user.encode("utf-8", "surrogateescape"), "sha256")
        for word in (b"salt ", b"stored ", b"server ")
    )
    return Verifier(iterations, salt[:SALT_BYTES], stored_key, server_key)


@lru_cache(maxsize=64)  # a pool's connections all have the same password and meet the same salt
def keys_of(password: str, salt: bytes, iterations: int) -> Keys:
    """Takes milliseconds, by intent."""
    salted = hashlib.pbkdf2_hmac("sha256", prepared(password), salt, iterations)
    return Keys(hmac.digest(salted, b"Client Key", "sha256"), hmac.digest(salted, b"Server Key", "sha256"))


class ScramServer:
    """Checks one client: `first`, then `final`, each once.

    Attributes:
        client_key: None until the client has proved that it knows the password.
    """

    def __init__(
        self,
        verifier: Verifier | None,
        *,
        user: str,
        secret: bytes = _PROCESS_SECRET,
        nonce: bytes | None = None,
    ) -> None:
        """`verifier`: None for an unknown user. `secret`: see `mock_verifier`. `nonce`: for tests."""
        self.client_key: bytes | None = None
        self._user = user
        self._is_known = verifier is not None
        self._verifier = verifier or mock_verifier(user, secret)
        self._nonce = nonce or _new_nonce()
        self._header = self._client_bare = self._server_first = b""

    def first(self, client_first: bytes) -> bytes:
        """The server's first message.

        Raises:
            ProtocolViolation: it is malformed, or asks for channel binding.
            UnsupportedSasl: it asks to act as another user, or for an extension.
        """
        assert not self._server_first
        found = _matched(_CLIENT_FIRST, client_first)
        if found["authzid"] is not None:
            raise UnsupportedSasl("client uses authorization identity, but it is not supported")
        if found["bare"].startswith(b"m="):
            raise UnsupportedSasl("client requires an unsupported SCRAM extension")
        if found["binding"].startswith(b"p"):
            raise ProtocolViolation("client selected SCRAM-SHA-256 and requires channel binding, which it lacks")
        bare = _matched(_BARE, found["bare"])
        self._header, self._client_bare = found["header"], found["bare"]
        self._nonce = bare["nonce"] + self._nonce
        salt, iterations = b64encode(self._verifier.salt), str(self._verifier.iterations).encode()
        self._server_first = b"r=" + self._nonce + b",s=" + salt + b",i=" + iterations
        return self._server_first

    def final(self, client_final: bytes) -> bytes:
        """The server's last message; the client's password is right.

        Raises:
            ProtocolViolation: it is malformed, or not the second message of this conversation.
            AuthenticationFailed: it is not right. Nothing tells a wrong password from an unknown user.
        """
        assert self._server_first
        assert self.client_key is None
        found = _matched(_CLIENT_FINAL, client_final)
        if found["binding"] != b64encode(self._header):
            raise ProtocolViolation("SCRAM channel binding check failed")
        if not hmac.compare_digest(found["nonce"], self._nonce):
            raise ProtocolViolation("invalid SCRAM response: nonce does not match")
        said = b",".join((self._client_bare, self._server_first, found["unproved"]))
        client_key = self._checked_key(_decoded(found["proof"]), said)
        self.client_key = client_key
        return b"v=" + b64encode(hmac.digest(self._verifier.server_key, said, "sha256"))

    def _checked_key(self, proof: bytes, said: bytes) -> bytes:
        if len(proof) != KEY_BYTES:
            _malformed()
        client_key = _xor(proof, hmac.digest(self._verifier.stored_key, said, "sha256"))
        is_right = hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key)
        if not (is_right and self._is_known):
            raise AuthenticationFailed(f'password authentication failed for user "{self._user}"')
        return client_key


class ScramClient:
    """Logs in at one server: `first`, then `final`, then `verify`, each once."""

    def __init__(
        self, *, password: str | None = None, keys: Keys | None = None, user: bytes = b"", nonce: bytes | None = None
    ) -> None:
        """Either a password, or keys where the server's verifier is the one they are from.

        `user`: PostgreSQL goes by the startup packet and ignores it here. `nonce`: for tests.
        """
        assert (password is None) != (keys is None)
        self._password, self._keys = password, keys
        self._nonce = nonce or _new_nonce()
        self._bare = b"n=" + user + b",r=" + self._nonce
        self._signature: bytes | None = None

    def first(self) -> bytes:
        return b"n,," + self._bare

    def final(self, server_first: bytes) -> bytes:
        """Raises:
        ProtocolViolation: the server's message is malformed, or no answer to ours, or asks for too many iterations.
        """
        found = _matched(_SERVER_FIRST, server_first)
        if not found["nonce"].startswith(self._nonce) or found["nonce"] == self._nonce:
            raise ProtocolViolation("invalid SCRAM response: nonce does not match")
        if (iterations := int(found["iterations"])) > ITERATIONS_MAX:
            raise ProtocolViolation(f"the server's verifier has {iterations} iterations, more than {ITERATIONS_MAX}")
        keys = self._keys or self._derived(_decoded(found["salt"]), iterations)
        unproved = b"c=biws,r=" + found["nonce"]
        said = b",".join((self._bare, server_first, unproved))
        self._signature = hmac.digest(keys.server_key, said, "sha256")
        proof = _xor(keys.client_key, hmac.digest(keys.stored_key, said, "sha256"))
        return unproved + b",p=" + b64encode(proof)

    def verify(self, server_final: bytes) -> None:
        """Raises:
        ProtocolViolation: the server does not know the password either: it is somebody else.
        """
        if self._signature is None or not hmac.compare_digest(server_final, b"v=" + b64encode(self._signature)):
            raise ProtocolViolation("incorrect SCRAM server signature: the server does not know the password")

    def _derived(self, salt: bytes, iterations: int) -> Keys:
        assert self._password is not None
        return keys_of(self._password, salt, iterations)


def prepared(password: str) -> bytes:
    """The password as PostgreSQL hashes it: in SASLprep's normal form, or as it is where that is not defined for it."""
    raw = password.encode("utf-8", "surrogateescape")
    if password.isascii():
        return raw
    mapped = "".join(
        " " if stringprep.in_table_c12(char) else char for char in password if not stringprep.in_table_b1(char)
    )
    normal = unicodedata.normalize("NFKC", mapped)
    return normal.encode() if normal and _is_allowed(normal) else raw


_PROHIBITED: Final = (
    stringprep.in_table_a1,
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def _is_allowed(text: str) -> bool:
    if any(is_in(char) for char in text for is_in in _PROHIBITED):
        return False
    if not any(map(stringprep.in_table_d1, text)):
        return True
    is_enclosed = stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1])
    return is_enclosed and not any(map(stringprep.in_table_d2, text))


def _new_nonce() -> bytes:
    return b64encode(secrets.token_bytes(18))


def _matched(pattern: re.Pattern[bytes], message: bytes) -> re.Match[bytes]:
    found = pattern.fullmatch(message) if len(message) <= MESSAGE_BYTES_MAX else None
    return found if found is not None else _malformed()


def _decoded(word: bytes) -> bytes:
    """Of the one spelling: base64 has several where the last bits mean nothing."""
    try:
        data = b64decode(word, validate=True)
    except ValueError:
        _malformed()
    return data if b64encode(data) == word else _malformed()


def _malformed() -> NoReturn:
    raise ProtocolViolation("malformed SCRAM message")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
