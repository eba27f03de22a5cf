"""Whatever a peer sends: a value or a violation, no other exception, and no more memory than what it sent is worth.

`SHARDMOVE_FUZZ=1000000 pytest tests/test_wire_fuzz.py` goes on for longer. The seed is in pytest's header.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmove.wire import messages as m
from shardmove.wire.login import NOTICES_MAX, PARAMETERS_MAX, Login, LoginRefused, State
from shardmove.wire.messages import Frames, ProtocolViolation
from shardmove.wire.scram import MECHANISM, ScramClient, ScramServer, Verifier
from shardmove.wire.startup import PACKET_BYTES_MAX, Cancel, Ready, Startup
from shardmove.wire.startup import State as StartupState
from tests.test_wire_messages import CODECS, Codec

ROUNDS: Final = int(os.environ.get("SHARDMOVE_FUZZ", "3000"))
MESSAGE_BYTES_MAX: Final = 500

INTERESTING: Final = [
    number.to_bytes(size, "big", signed=True)
    for size in (1, 2, 4)
    for number in (0, 1, -1, -2, 4, 5, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)))
]

SEEDS: Final = {
    "Parse": m.parse(b"s", b"SELECT $1", [23, 0]),
    "Bind": m.bind(b"p", b"s", [b"1", None, b"three"], formats=[0, 1, 0], result_formats=[1]),
    "Describe": m.describe(b"S", b"s"),
    "Close": m.close(b"P", b"p"),
    "Execute": m.execute(b"p", 3),
    "Query": m.query("SELECT 1"),
    "FunctionCall": m.function_call(177, [b"\0\0\0\1", None], [1], 1),
    "CopyFail": m.copy_fail("enough"),
    "Password": m.password_message("secret"),
    "SaslInitial": m.sasl_initial_response(MECHANISM, b"n,,n=,r=abc"),
    "ErrorFields": m.error_response("42601", "no", detail="at all", hint="try"),
    "RowDescription": m.row_description([m.Column(b"a", 1, 2, 23, 4, -1, 0), m.Column(b"b", 0, 0, 25, -1, -1, 1)]),
    "DataRow": m.data_row([b"1", None, b"three"]),
    "CommandComplete": m.command_complete("SELECT 1"),
    "ParameterStatus": m.parameter_status("TimeZone", "UTC"),
    "BackendKeyData": m.backend_key_data(7, b"key!"),
    "ReadyForQuery": m.ready_for_query(b"T"),
    "ParameterDescription": m.parameter_description([23, 25]),
    "CopyIn": m.copy_in_response(1, [1, 1, 1]),
    "CopyOut": m.copy_out_response(0, [0]),
    "Notification": m.notification_response(7, b"c", b"hello"),
    "Authentication": m.authentication_sasl_continue(b"r=a,s=b,i=1"),
    "Negotiate": m.negotiate_protocol_version(2, ["_pq_.one", "_pq_.two"]),
}
"""A message for each codec."""


def mutated(rng: random.Random, data: bytes) -> bytes:
    """With a few bytes flipped, lost, repeated, moved, or replaced by numbers that are at an edge."""
    bytes_ = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        at, end = sorted(rng.randrange(len(bytes_) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0 if at < len(bytes_):
                bytes_[at] ^= 1 << rng.randrange(8)
            case 1:
                del bytes_[at : at + rng.choice((1, 2, 4, end - at))]
            case 2:
                bytes_[at:at] = rng.randbytes(rng.randrange(1, 6))
            case 3:
                bytes_[at:at] = bytes_[at:end][:1000]
            case 4:
                number = rng.choice(INTERESTING)
                bytes_[at : at + len(number)] = number
            case _:
                bytes_[at:end] = reversed(bytes_[at:end])
    return bytes(bytes_)


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Cut anywhere; now and then not at all."""
    longest = rng.choice((1, 3, 10, 100, len(data) + 1))
    at = 0
    while at < len(data):
        size = rng.randrange(1, longest + 1)
        yield data[at : at + size]
        at += size


def test_each_codec_has_a_seed() -> None:
    assert SEEDS.keys() == CODECS.keys()


def check_decoder(codec: Codec, body: bytes) -> bool:
    """Whether it is well-formed. Then what was understood is all that there was."""
    try:
        value = codec.decode(body)
    except ProtocolViolation:
        return False
    if codec not in (CODECS["ErrorFields"], CODECS["Negotiate"]):  # texts in no encoding; other versions than ours
        assert codec.encode(value)[5:] == body
    return True


@pytest.mark.parametrize("name", CODECS)
@given(body=st.binary(max_size=200))
def test_a_decoder_takes_any_bytes(name: str, body: bytes) -> None:
    check_decoder(CODECS[name], body)


@pytest.mark.parametrize("name", CODECS)
def test_a_decoder_takes_any_change_of_a_message(name: str, rng: random.Random) -> None:
    outcomes = {check_decoder(CODECS[name], mutated(rng, SEEDS[name][5:])) for _ in range(ROUNDS)}
    assert True in outcomes, "some are not changed at all: if none is understood, this tests nothing"


@pytest.mark.parametrize("name", CODECS)
def test_a_decoder_needs_no_memory_for_what_is_only_announced(name: str) -> None:
    """Counts and lengths of all ones, wherever they are: not what they announce is made, but an error."""
    body = SEEDS[name][5:]
    announced = [body[:at] + b"\x7f\xff\xff\xff" + body[at + 4 :] for at in range(len(body))]
    announced += [body[:at] + b"\xff\xff" + body[at + 2 :] for at in range(len(body))]
    tracemalloc.start()
    try:
        for each in announced:
            check_decoder(CODECS[name], each)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_frames_take_any_stream(rng: random.Random) -> None:
    """What comes out is what went in, as far as it goes; what is kept has a bound."""
    for _ in range(ROUNDS):
        stream = mutated(rng, b"".join(rng.choices(list(SEEDS.values()), k=rng.randrange(1, 8))))
        frames, out = Frames(MESSAGE_BYTES_MAX), bytearray()
        with suppress(ProtocolViolation):
            for piece in pieces(rng, stream):
                frames.feed(piece)
                for kind, message in frames:
                    assert kind == message[0]
                    assert len(message) == 1 + int.from_bytes(message[1:5], "big") <= MESSAGE_BYTES_MAX
                    out += message
                assert frames.pending_bytes < MESSAGE_BYTES_MAX
        assert stream.startswith(out)
        assert stream[len(out) :].startswith(frames.take_rest())


PARAMETERS: Final = {"user": "u", "database": "d", "options": "-c a=b"}
GREETINGS: Final = [
    m.SSL_REQUEST,
    m.GSS_REQUEST,
    m.startup_message(0x30000, PARAMETERS),
    m.startup_message(0x30002, {**PARAMETERS, "_pq_.x": "y"}),
    m.startup_message(0x20000, PARAMETERS),
    m.cancel_request(7, b"key!"),
    b"\x16\x03\x01\x02\x00",
]


def test_a_greeting_takes_any_bytes(rng: random.Random) -> None:
    ends = set()
    for _ in range(ROUNDS):
        startup = Startup(has_tls=rng.random() < 0.5, requires_tls=rng.random() < 0.2)
        parts = [mutated(rng, rng.choice(GREETINGS)) for _ in range(rng.randrange(1, 5))]
        ends.add(greet(startup, [piece for part in parts for piece in pieces(rng, part)]))
    assert ends == set(StartupState)


def greet(startup: Startup, parts: list[bytes]) -> StartupState:
    for part in parts:
        try:
            events = startup.feed(part)
        except ProtocolViolation:
            assert startup.state is StartupState.BROKEN
            return startup.state
        assert len(events) <= 1
        assert len(startup._buffer) <= PACKET_BYTES_MAX + 4
        if any(isinstance(event, Ready | Cancel) for event in events):
            assert startup.state is StartupState.DONE
            return startup.state
    return startup.state


@given(parts=st.lists(st.binary(max_size=40), max_size=6))
def test_a_greeting_takes_arbitrary_bytes(parts: list[bytes]) -> None:
    greet(Startup(has_tls=True), parts)


VERIFIER: Final = Verifier.make("secret", b"salt" * 4, iterations=1)


def honest_server(sent: list[bytes]) -> Iterator[bytes]:
    """What a server says in a login by SCRAM, to a client whose answers are appended to `sent`."""
    scram = ScramServer(VERIFIER, user="u")
    yield m.negotiate_protocol_version(0, [])
    yield m.notice_response("00000", "hello")
    yield m.authentication_sasl([MECHANISM])
    _, first = m.decode_sasl_initial_response(sent[-1][5:])
    assert first is not None
    yield m.authentication_sasl_continue(scram.first(first))
    yield m.authentication_sasl_final(scram.final(sent[-1][5:]))
    yield m.AUTHENTICATION_OK
    yield m.parameter_status("TimeZone", "UTC")
    yield m.backend_key_data(7, b"key!")
    yield m.ready_for_query(b"I")


SERVER_SAYS: Final = [
    m.AUTHENTICATION_OK,
    m.AUTHENTICATION_CLEARTEXT,
    m.authentication_md5(b"salt"),
    m.authentication_sasl([b"SCRAM-SHA-256-PLUS", MECHANISM]),
    m.authentication_sasl_final(b"v=AAAA"),
    m.error_response("28P01", "no", severity="FATAL"),
    m.ready_for_query(b"I"),
    m.data_row([b"1"]),
]


def test_a_login_takes_whatever_a_server_says(rng: random.Random) -> None:
    """Now and then a server changes what it says, leaves it out, repeats it, or says something else."""
    ends = set()
    for _ in range(ROUNDS):
        login = Login(
            "u", password=rng.choice(("secret", "secret", "other", None)), may_send_cleartext=rng.random() < 0.5
        )
        honesty = rng.choice((1.0, 0.9, 0.5))
        try:
            log_in(login, rng, honesty)
        except (ProtocolViolation, LoginRefused):
            assert login.state is State.REFUSED
        ends.add(login.state)
        assert not (login.is_done and login.state is not State.DONE)
    assert {State.DONE, State.REFUSED} <= ends


def log_in(login: Login, rng: random.Random, honesty: float) -> None:
    sent: list[bytes] = []
    server = honest_server(sent)
    while not login.is_done:
        try:
            reply = next(server)
        except (StopIteration, ProtocolViolation, IndexError):  # an honest server that was confused is silent
            return
        if rng.random() > honesty:
            reply = mutated(rng, rng.choice([reply, *SERVER_SAYS])) or b"R"
        if answer := login.receive(reply[0], reply[5:]):
            sent.append(answer)


@pytest.mark.parametrize(
    "reply",
    [m.notice_response("00000", "x" * 100), m.parameter_status("name", "v"), m.negotiate_protocol_version(0, [])],
)
def test_a_login_does_not_grow_while_a_server_talks(reply: bytes) -> None:
    login = Login("u")
    if reply[:1] == b"S":
        login.receive(ord("R"), m.AUTHENTICATION_OK[5:])
    tracemalloc.start()
    try:
        for _ in range(2 * max(NOTICES_MAX, PARAMETERS_MAX)):
            try:
                login.receive(reply[0], reply[5:])
            except ProtocolViolation:
                break
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_both_sides_of_scram_take_whatever_the_other_says(rng: random.Random) -> None:
    """And a changed message never ends in a login."""
    outcomes = set()
    for _ in range(ROUNDS):
        server, client = ScramServer(VERIFIER, user="u", nonce=b"sss"), ScramClient(password="secret", nonce=b"ccc")
        changed: list[bool] = []

        def sent(message: bytes, changed: list[bool] = changed) -> bytes:
            result = mutated(rng, message) if rng.random() < 0.4 else message
            changed.append(result != message)
            return result

        outcomes.add((scram_succeeds(server, client, sent), any(changed)))
    assert outcomes == {(True, False), (False, True)}


def scram_succeeds(server: ScramServer, client: ScramClient, sent: Callable[[bytes], bytes]) -> bool:
    try:
        first = server.first(sent(client.first()))
        final = server.final(sent(client.final(sent(first))))
        client.verify(sent(final))
    except ProtocolViolation:
        return False
    return True


@given(data=st.binary(max_size=100))
def test_scram_takes_arbitrary_bytes(data: bytes) -> None:
    server, client = ScramServer(None, user="u"), ScramClient(password="secret")
    for step in (server.first, client.final, client.verify):
        with pytest.raises(ProtocolViolation):
            step(data)
    server.first(client.first())
    with pytest.raises(ProtocolViolation):
        server.final(data)


@given(text=st.text(max_size=60) | st.from_regex(r"SCRAM-SHA-256\$[0-9]*:[^$]*\$[^:]*:.*", fullmatch=True))
def test_a_verifier_is_read_or_refused(text: str) -> None:
    try:
        verifier = Verifier.parse(text)
    except ValueError:
        return
    assert Verifier.parse(str(verifier)) == verifier
