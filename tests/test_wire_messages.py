"""The messages of the protocol: to bytes and back, and what becomes of those that are broken."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmove.wire import messages as m
from shardmove.wire.messages import Frames, MessageTooLarge, ProtocolViolation

names: Final = st.binary(max_size=20).map(lambda data: data.replace(b"\0", b""))
words: Final = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
codes: Final = st.lists(st.integers(0, 0xFFFF), max_size=80).map(tuple)
uint32: Final = st.integers(0, 2**32 - 1)
int32: Final = st.integers(-(2**31), 2**31 - 1)
oids: Final = st.lists(uint32, max_size=80).map(tuple)
values: Final = st.lists(st.none() | st.binary(max_size=40), max_size=20).map(tuple)
kinds: Final = st.sampled_from([b"S", b"P"])
columns: Final = st.lists(
    st.builds(
        m.Column,
        names,
        uint32,
        st.integers(0, 2**15 - 1),
        uint32,
        st.integers(-(2**15), 2**15 - 1),
        int32,
        st.integers(0, 1),
    ),
    max_size=10,
).map(tuple)


@st.composite
def binds(draw: st.DrawFn) -> m.Bind:
    parameters = draw(values)
    each = st.lists(st.integers(0, 1), min_size=len(parameters), max_size=len(parameters))
    formats = draw(st.lists(st.integers(0, 1), max_size=1) | each)
    return m.Bind(draw(names), draw(names), tuple(formats), parameters, draw(codes))


@dataclass(frozen=True)
class Codec:
    """`ends`: whether the body says itself where it ends, so that a shorter and a longer one are malformed."""

    values: st.SearchStrategy[Any]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    ends: bool = True


def bound(value: m.Bind) -> bytes:
    portal, statement, formats, parameters, result_formats = value
    return m.bind(portal, statement, parameters, formats=formats, result_formats=result_formats)


CODECS: Final = {
    "Parse": Codec(st.builds(m.Parse, names, names, oids), lambda value: m.parse(*value), m.decode_parse),
    "Bind": Codec(binds(), bound, m.decode_bind),
    "Describe": Codec(st.tuples(kinds, names), lambda value: m.describe(*value), m.decode_describe),
    "Close": Codec(st.tuples(kinds, names), lambda value: m.close(*value), m.decode_close),
    "Execute": Codec(st.tuples(names, int32), lambda value: m.execute(*value), m.decode_execute),
    "Query": Codec(names, m.query, m.decode_query),
    "FunctionCall": Codec(
        st.builds(m.FunctionCall, uint32, codes, values, st.integers(0, 1)),
        lambda value: m.function_call(value.oid, value.values, value.formats, value.result_format),
        m.decode_function_call,
    ),
    "CopyFail": Codec(names, m.copy_fail, m.decode_copy_fail),
    "Password": Codec(names, m.password_message, m.decode_password),
    "SaslInitial": Codec(
        st.tuples(names, st.binary(max_size=40)),
        lambda value: m.sasl_initial_response(*value),
        m.decode_sasl_initial_response,
    ),
    "ErrorFields": Codec(
        st.dictionaries(st.sampled_from("SVCMDHPpqWstcdnFLR"), words),
        lambda fields: m.encode_fields(b"E", fields),
        m.error_fields,
    ),
    "RowDescription": Codec(columns, m.row_description, m.decode_row_description),
    "DataRow": Codec(values, m.data_row, m.decode_data_row),
    "CommandComplete": Codec(names, m.command_complete, m.decode_command_complete),
    "ParameterStatus": Codec(
        st.tuples(names, names), lambda value: m.parameter_status(*value), m.decode_parameter_status
    ),
    "BackendKeyData": Codec(
        st.tuples(uint32, st.binary(min_size=4, max_size=256)),
        lambda value: m.backend_key_data(*value),
        m.decode_backend_key_data,
        ends=False,
    ),
    "ReadyForQuery": Codec(st.sampled_from([b"I", b"T", b"E"]), m.ready_for_query, m.decode_ready_for_query),
    "ParameterDescription": Codec(oids, m.parameter_description, m.decode_parameter_description),
    "CopyIn": Codec(
        st.builds(m.CopyResponse, st.integers(0, 1), codes),
        lambda value: m.copy_in_response(*value),
        m.decode_copy_response,
    ),
    "CopyOut": Codec(
        st.builds(m.CopyResponse, st.integers(0, 1), codes),
        lambda value: m.copy_out_response(*value),
        m.decode_copy_response,
    ),
    "Notification": Codec(
        st.builds(m.Notification, uint32, names, names),
        lambda value: m.notification_response(*value),
        m.decode_notification,
    ),
    "Authentication": Codec(
        st.tuples(uint32, st.binary(max_size=40)),
        lambda value: m.message(b"R", value[0].to_bytes(4, "big") + value[1]),
        m.decode_authentication,
        ends=False,
    ),
    "Negotiate": Codec(
        st.tuples(st.integers(0, 9999), st.lists(names.filter(bool), max_size=5).map(tuple)),
        lambda value: m.negotiate_protocol_version(
            value[0], [option.decode("utf-8", "surrogateescape") for option in value[1]]
        ),
        lambda body: (lambda version, options: (version - m.version_code(0), options))(
            *m.decode_negotiate_protocol_version(body)
        ),
    ),
}

every_codec: Final = pytest.mark.parametrize("codec", [pytest.param(codec, id=name) for name, codec in CODECS.items()])


def body_of(message: bytes) -> bytes:
    """The body of a whole message whose length is right."""
    assert int.from_bytes(message[1:5], "big") == len(message) - 1
    return message[5:]


@every_codec
@given(data=st.data())
def test_a_message_is_decoded_to_what_was_encoded(codec: Codec, data: st.DataObject) -> None:
    value = data.draw(codec.values)
    assert codec.decode(body_of(codec.encode(value))) == value


@every_codec
@given(data=st.data())
def test_a_message_that_is_cut_short_or_goes_on_is_a_violation(codec: Codec, data: st.DataObject) -> None:
    body = body_of(codec.encode(data.draw(codec.values)))
    if not codec.ends:
        return
    for end in range(len(body)):
        with pytest.raises(ProtocolViolation):
            codec.decode(body[:end])
    with pytest.raises(ProtocolViolation):
        codec.decode(body + data.draw(st.binary(min_size=1, max_size=3)))


@pytest.mark.parametrize(
    ("decode", "body"),
    [
        (m.decode_bind, b"\0\0\0\0\xff\xff\0\0"),  # 65,535 values that are not there
        (m.decode_bind, b"\0\0\0\0\0\x01\xff\xff\xff\xfe\0\0"),  # a value of -2 bytes
        (m.decode_bind, b"\0\0\0\0\0\x01\x7f\xff\xff\xff\0\0"),  # one of 2 GB
        (m.decode_bind, b"\0\0\0\x02\0\0\0\0\0\x01\xff\xff\xff\xff\0\0"),  # two formats, one value
        (m.decode_parse, b"\0\0\xff\xff"),
        (m.decode_describe, b"X\0"),
        (m.decode_close, b""),
        (m.decode_data_row, b"\xff\xff"),
        (m.decode_row_description, b"\xff\xff"),
        (m.decode_execute, b"\0\0\0\0"),
        (m.decode_query, b"SELECT 1; no zero"),
        (m.decode_query, b"SELECT 1\0; SELECT 2\0"),
        (m.decode_ready_for_query, b"X"),
        (m.decode_backend_key_data, b"\0\0\0\1key"),
        (m.decode_backend_key_data, b"\0\0\0\1" + b"k" * 257),
        (m.decode_copy_response, b"\2\0\0"),
        (m.error_fields, b"Mhello\0"),
        (m.error_fields, b""),
        (m.decode_sasl_initial_response, b"SCRAM-SHA-256\0\xff\xff\xff\xfe"),
        (m.decode_negotiate_protocol_version, b"\0\3\0\0\xff\xff\xff\xff"),
    ],
)
def test_counts_and_lengths_are_not_believed(decode: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        decode(body)
    assert caught.value.sqlstate == "08P01"


def test_the_bytes_are_those_of_the_manual() -> None:
    assert m.SYNC == b"S\0\0\0\4"
    assert m.AUTHENTICATION_OK == b"R\0\0\0\x08\0\0\0\0"
    assert bytes.fromhex("00000008 04d2162f") == m.SSL_REQUEST
    assert bytes.fromhex("00000008 04d21630") == m.GSS_REQUEST
    assert m.cancel_request(1, b"key!") == bytes.fromhex("00000010 04d2162e 00000001") + b"key!"
    assert m.startup_message(0x30000, {"user": "u"}) == bytes.fromhex("00000010 00030000") + b"user\0u\0\0"
    assert m.parse(b"s", b"SELECT $1", [23]) == b"P\0\0\0\x16s\0SELECT $1\0\0\1\0\0\0\x17"
    assert m.bind(b"", b"s", [b"7", None], result_formats=[1]) == (
        b"B\0\0\0\x18\0s\0\0\0\0\2\0\0\0\x017\xff\xff\xff\xff\0\1\0\1"
    )
    assert m.execute(b"", 5) == b"E\0\0\0\x09\0\0\0\0\5"
    assert m.error_response("22000", "no", hint="try") == b"E\0\0\0\x23SERROR\0VERROR\0C22000\0Mno\0Htry\0\0"
    assert m.row_description([m.Column(b"a", 1, 2, 23, 4, -1, 0)]) == (
        b"T\0\0\0\x1a\0\1a\0\0\0\0\1\0\2\0\0\0\x17\0\4\xff\xff\xff\xff\0\0"
    )


def test_a_text_with_a_zero_cannot_smuggle_a_second_field() -> None:
    with pytest.raises(ProtocolViolation):
        m.parse(b"a\0b", b"SELECT 1")
    with pytest.raises(ProtocolViolation):
        m.startup_message(0x30000, {"user": "u\0database\0other"})
    assert m.error_fields(m.error_response("42601", 'near "\0"')[5:])["M"] == 'near ""'


def test_texts_of_any_encoding_survive() -> None:
    assert m.error_fields(b"S\xc4RGER\0M\xff\0\0") == {"S": "\ufffdRGER", "M": "\ufffd"}
    lone = m.error_response("XX000", "half a pair: \ud800")
    assert m.error_fields(lone[5:])["M"] == "half a pair: ?"


@pytest.mark.parametrize("kind", [ProtocolViolation, MessageTooLarge])
def test_the_errors_survive_a_pickle_round_trip(kind: type[ProtocolViolation]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", hint="do")))
    assert (type(error), error.message, error.hint, error.sqlstate) == (kind, "what", "do", kind.sqlstate)


# --- Cutting a stream -----------------------------------------------------------------------------------------------

streams: Final = st.lists(
    st.builds(m.message, st.sampled_from([b"D", b"Q", b"Z"]), st.binary(max_size=300)), max_size=12
)


@given(stream=streams, data=st.data())
def test_messages_come_out_whole_however_the_stream_is_cut(stream: list[bytes], data: st.DataObject) -> None:
    whole, frames, out = b"".join(stream), Frames(), []
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        frames.feed(whole[begin:end])
        if data.draw(st.booleans()):
            out += frames
    out += frames
    assert out == [(message[0], message) for message in stream]
    assert all(type(message) is bytes for _, message in out)
    assert frames.pending_bytes == 0


@given(stream=streams)
def test_messages_come_out_as_soon_as_their_last_byte_is_there(stream: list[bytes]) -> None:
    frames = Frames()
    for message in stream:
        for at in range(len(message)):
            assert list(frames) == []
            frames.feed(message[at : at + 1])
        assert list(frames) == [(message[0], message)]


def test_a_loop_that_is_left_goes_on_where_it_was() -> None:
    frames, rows = Frames(), [m.data_row([b"%d" % number]) for number in range(10)]
    frames.feed(b"".join(rows[:5]))
    first = next(iter(frames))[1]
    frames.feed(rows[5])
    second, *others = (message for _, message in frames)
    assert [first, second, *others] == rows[:6]


def test_the_stream_may_be_fed_inside_the_loop() -> None:
    frames, out = Frames(), []
    frames.feed(m.SYNC + m.FLUSH + m.SYNC[:3])
    for _, message in frames:
        out.append(message)
        if message == m.FLUSH:
            frames.feed(m.SYNC[3:] + m.TERMINATE)
    assert out == [m.SYNC, m.FLUSH, m.SYNC, m.TERMINATE]


def test_the_rest_can_be_taken_as_it_came() -> None:
    frames = Frames()
    frames.feed(m.SYNC + m.FLUSH[:2])
    assert next(iter(frames)) == (ord("S"), m.SYNC)
    assert frames.take_rest() == m.FLUSH[:2]
    assert (list(frames), frames.pending_bytes) == ([], 0)


@pytest.mark.parametrize("length", [0, 1, 3, -1, -(2**31)])
def test_an_impossible_length_is_refused_again_and_again(length: int) -> None:
    frames, out = Frames(), []
    frames.feed(m.SYNC + b"Q" + length.to_bytes(4, "big", signed=True) + m.SYNC)
    for _ in range(3):
        with pytest.raises(ProtocolViolation) as caught:
            out += frames
        assert caught.value.sqlstate == "08P01"


def test_the_messages_before_a_broken_one_come_out() -> None:
    frames = Frames()
    frames.feed(m.SYNC + m.FLUSH + b"Q\0\0\0\0")
    stream = iter(frames)
    assert [next(stream)[1], next(stream)[1]] == [m.SYNC, m.FLUSH]
    with pytest.raises(ProtocolViolation):
        next(stream)


def test_a_message_that_is_too_large_is_refused_by_its_header() -> None:
    frames = Frames(message_bytes_max=100)
    frames.feed(m.message(b"Q", bytes(95)))
    assert len(next(iter(frames))[1]) == 100
    frames.feed(m.message(b"Q", bytes(96))[:4])
    assert list(frames) == []
    frames.feed(b"\x64")
    with pytest.raises(MessageTooLarge) as caught:
        list(frames)
    assert caught.value.sqlstate == "54000"


def test_a_large_message_in_small_pieces_is_not_copied_for_each_of_them() -> None:
    """The buffer grows in place: its identity stays while a message comes in."""
    frames = Frames()
    frames.feed(m.message(b"d", bytes(1_000_000))[:10])
    frames.feed(bytes(10))
    buffer = frames._buffer
    for _ in range(1_000):
        frames.feed(bytes(100))
        assert list(frames) == []
    assert frames._buffer is buffer
