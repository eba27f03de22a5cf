"""What a server owes: the table, the order of replies, and the same through a connection, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.server import Server
from shardmove.wire import messages as wire
from shardmove.wire.messages import ProtocolViolation
from shardmove.wire.streams import ASYNCHRONOUS, HIDDEN, TRANSITIONS, Owed, Replies

KINDS: Final = b"123AcCdDEGHIKnNRsStTvVWZ"
ERROR: Final = wire.error_response("22012", "division by zero")
INJECTED: Final = wire.message(b"1", b"ours")
READY: Final = wire.ready_for_query(b"I")
COLUMNS: Final = wire.row_description([wire.Column(b"a", 0, 0, 23, 4, -1, 0)])
ROW: Final = wire.data_row([b"x" * 30])
COMPLETE: Final = wire.command_complete("SELECT 1")
NOTICE: Final = wire.notice_response("00000", "a word", severity="NOTICE")
TURNS: Final[dict[Owed, list[list[bytes]]]] = {
    Owed.PARSE: [[wire.PARSE_COMPLETE]],
    Owed.BIND: [[wire.BIND_COMPLETE]],
    Owed.DESCRIBE_STATEMENT: [
        [wire.parameter_description([23]), COLUMNS],
        [wire.parameter_description([]), wire.NO_DATA],
    ],
    Owed.DESCRIBE_PORTAL: [[COLUMNS], [wire.NO_DATA]],
    Owed.EXECUTE: [
        [ROW, ROW, COMPLETE],
        [COMPLETE],
        [wire.EMPTY_QUERY],
        [ROW, wire.PORTAL_SUSPENDED],
        [wire.copy_out_response(0, [0]), wire.copy_data(b"row\n"), wire.COPY_DONE, COMPLETE],
    ],
    Owed.CLOSE: [[wire.CLOSE_COMPLETE]],
}
"""What the server may answer to each message."""
QUERIES: Final = [
    [COLUMNS, ROW, COMPLETE, READY],
    [wire.EMPTY_QUERY, READY],
    [COLUMNS, ROW, COMPLETE, ERROR, READY],
    [ERROR, READY],
    [COMPLETE, COLUMNS, COMPLETE, READY],
]


@pytest.mark.parametrize("owed", list(Owed), ids=lambda owed: owed.name)
@pytest.mark.parametrize("kind", [chr(kind) for kind in KINDS if kind not in ASYNCHRONOUS and chr(kind) != "E"])
def test_each_entry_takes_the_replies_of_its_row_and_no_other(owed: Owed, kind: str) -> None:
    replies = Replies()
    replies.sent(owed)
    is_last = TRANSITIONS[owed].get(ord(kind))
    if is_last is None:
        with pytest.raises(ProtocolViolation):
            replies.received(ord(kind))
        return
    assert not replies.received(ord(kind))
    assert replies.is_empty is is_last


@pytest.mark.parametrize("kind", "1CTZE")
def test_what_nobody_asked_is_a_violation(kind: str) -> None:
    with pytest.raises(ProtocolViolation):
        Replies().received(ord(kind))


def test_an_error_takes_everything_up_to_the_sync() -> None:
    replies = queue(Owed.PARSE, Owed.BIND, Owed.EXECUTE, Owed.SYNC, Owed.PARSE, Owed.SYNC)
    assert not replies.received(ord("E"))
    assert replies.first == Owed.SYNC
    take(replies, "Z1Z")
    assert replies.is_ended


def test_after_an_error_without_a_sync_nothing_is_owed_until_it_comes() -> None:
    replies = queue(Owed.PARSE, Owed.BIND)
    replies.received(ord("E"))
    assert replies.is_skipping
    for owed in (Owed.PARSE, Owed.QUERY, Owed.CALL, Owed.CLOSE):
        replies.sent(owed)
    assert replies.inject(INJECTED) == b""
    assert not replies.is_ended
    replies.sent(Owed.SYNC)
    take(replies, "Z")
    assert replies.is_ended


def test_a_query_behind_a_failed_message_is_dropped_too() -> None:
    replies = queue(Owed.PARSE, Owed.QUERY)
    replies.received(ord("E"))
    assert replies.is_skipping


def test_an_error_in_a_query_is_a_reply_among_others() -> None:
    replies = queue(Owed.QUERY, Owed.QUERY)
    take(replies, "EZ")
    assert replies.first == Owed.QUERY
    take(replies, "CZ")
    assert replies.is_ended


def test_a_unit_without_its_sync_leaves_the_server_in_a_transaction_of_its_own() -> None:
    replies = queue(Owed.PARSE, Owed.BIND, Owed.EXECUTE)
    take(replies, "12C")
    assert replies.is_empty
    assert not replies.is_ended
    replies.sent(Owed.SYNC)
    assert not replies.is_ended
    take(replies, "Z")
    assert replies.is_ended


def test_a_query_ends_what_was_open() -> None:
    replies = queue(Owed.PARSE, Owed.QUERY)
    take(replies, "1CZ")
    assert replies.is_ended


def test_in_copy_in_the_syncs_sent_before_count_for_nothing() -> None:
    replies = queue(Owed.PARSE, Owed.BIND, Owed.EXECUTE, Owed.SYNC, Owed.SYNC)
    take(replies, "12G")
    assert replies.first == Owed.EXECUTE
    replies.sent(Owed.SYNC)
    take(replies, "CZ")
    assert replies.is_ended


def test_a_message_in_copy_in_fails_it_and_the_sync_behind_counts() -> None:
    replies = queue(Owed.EXECUTE, Owed.PARSE, Owed.SYNC)
    take(replies, "GEZ")
    assert replies.is_ended


def test_dropped_names_are_counted_and_hidden_ones_are_not() -> None:
    replies = queue(Owed.PARSE, Owed.PARSE, Owed.PARSE | HIDDEN, Owed.CLOSE)
    replies.inject(INJECTED)
    for owed in (Owed.BIND, Owed.SYNC, Owed.PARSE):
        replies.sent(owed)
    take(replies, "1E")
    assert replies.dropped == 3
    replies = queue(Owed.PARSE, Owed.SYNC, Owed.QUERY)
    take(replies, "EZE")
    assert replies.dropped == 0


def test_injected_replies_wait_for_their_turn() -> None:
    replies = Replies()
    assert replies.inject(INJECTED) == INJECTED
    replies.sent(Owed.BIND)
    assert replies.inject(INJECTED) == b""
    assert replies.inject(INJECTED) == b""
    replies.sent(Owed.SYNC)
    replies.received(ord("2"))
    assert replies.injected() == INJECTED * 2
    assert replies.injected() == b""


def test_the_error_of_a_hidden_unit_is_hidden_and_that_of_a_hidden_message_is_not() -> None:
    unit = queue(Owed.PARSE | HIDDEN, Owed.BIND | HIDDEN, Owed.SYNC | HIDDEN)
    assert unit.received(ord("E"))
    assert unit.received(ord("Z"))
    message = queue(Owed.PARSE | HIDDEN, Owed.BIND, Owed.SYNC)
    assert not message.received(ord("E"))
    assert not message.received(ord("Z"))
    query = queue(Owed.QUERY | HIDDEN)
    assert query.received(ord("E"))
    assert query.received(ord("Z"))


def test_a_poison_takes_nothing_but_its_error() -> None:
    assert not queue(Owed.POISON, Owed.SYNC).received(ord("E"))
    with pytest.raises(ProtocolViolation):
        queue(Owed.POISON, Owed.SYNC).received(ord("2"))


def queue(*entries: int) -> Replies:
    replies = Replies()
    for owed in entries:
        replies.sent(owed)
    return replies


def take(replies: Replies, kinds: str) -> None:
    for kind in kinds:
        replies.received(ord(kind))
        replies.injected()


# --- conversations: what is sent, what a server answers to it, and what of that is for the client

Turn = tuple[int | bytes, list[bytes]]
"""An entry with its replies, or an injected reply."""


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    if draw(st.integers(0, 4)) == 0:
        return INJECTED, []
    owed = draw(st.sampled_from(list(TURNS)))
    fails = draw(st.integers(0, 7)) == 0
    replies = [*draw(st.sampled_from(TURNS[owed]))]
    if fails:
        replies = [*replies[: draw(st.integers(0, len(replies) - 1))], ERROR]
    return owed + HIDDEN * (owed is Owed.PARSE and draw(st.booleans())), replies


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    found: list[Turn] = []
    for _ in range(draw(st.integers(1, 5))):
        hidden = HIDDEN * draw(st.booleans())
        if draw(st.integers(0, 2)) == 0:
            found.append((Owed.QUERY + hidden, draw(st.sampled_from(QUERIES))))
            continue
        unit = draw(st.lists(turns(), max_size=6))
        if hidden:
            unit = [(owed | HIDDEN, replies) for owed, replies in unit if isinstance(owed, int)]
        found += [*unit, (Owed.SYNC + hidden, [READY])]
    return found


def answered(conversation: Iterable[Turn]) -> Iterator[tuple[bytes, bool]]:
    """What comes, in order, and whether it is for the client. Injected replies come from nowhere."""
    is_failed = False
    for entry, replies in conversation:
        if isinstance(entry, bytes):
            if not is_failed:
                yield entry, True
            continue
        owed = entry & ~HIDDEN
        if is_failed and owed != Owed.SYNC:
            continue
        is_failed = owed not in (Owed.SYNC, Owed.QUERY) and ERROR in replies
        is_unit_hidden = _is_unit_hidden(conversation, entry, replies)
        for reply in replies:
            yield reply, not (is_unit_hidden if reply == ERROR and owed != Owed.QUERY else entry & HIDDEN)


def _is_unit_hidden(conversation: Iterable[Turn], entry: int, replies: list[bytes]) -> bool:
    """A hidden unit is hidden to its Sync; in a unit of the client's the error of a hidden Parse is the client's."""
    turns = iter(conversation)
    for each in turns:
        if each[0] is entry and each[1] is replies:
            break
    for owed, _ in turns:
        if isinstance(owed, int) and owed & ~HIDDEN == Owed.SYNC:
            return bool(owed & HIDDEN)
    return False


class Client:
    """What a server's connection asks of its session: it keeps what it is given."""

    pid = 1

    def __init__(self) -> None:
        self.given = b""
        self.readies = 0

    def on_replies(self, server: Server, data: bytes) -> None:
        self.given += data

    def on_ready(self, server: Server, status: int) -> None:
        self.readies += 1

    def on_error(self, server: Server, frame: bytes) -> bytes:
        return frame

    def renumbered(self, server: Server, frame: bytes) -> bytes:
        return frame

    def on_poisoned(self, server: Server) -> bytes:
        raise AssertionError("nothing was poisoned")

    def on_complete(self, frame: bytes) -> None: ...
    def on_types(self, frame: bytes) -> None: ...
    def on_copy_in(self, server: Server) -> None: ...
    def on_parameter(self, name: bytes, value: bytes) -> None: ...
    def on_server_writable(self, is_writable: bool) -> None: ...

    def on_server_lost(self, server: Server, error: Exception) -> None:
        raise error


def connection() -> tuple[Server, Client]:
    server, client = Server("s1", "user"), Client()
    server.transport = cast(Any, Closed())
    server.holder = client
    return server, client


class Closed:
    """The transport of a connection that nothing is sent on."""

    def abort(self) -> None: ...


def say(server: Server, client: Client, conversation: Iterable[Turn]) -> None:
    """As a session sends it: at once, without waiting for replies."""
    for number, (entry, _) in enumerate(conversation):
        if isinstance(entry, bytes):
            client.given += server.replies.inject(entry)
            continue
        server.replies.sent(entry)
        if entry & ~HIDDEN == Owed.PARSE:
            server.prepare(b"s%d" % number, object())
        elif entry & ~HIDDEN == Owed.CLOSE:
            server.close_statement(None)


@given(conversations(), st.data())
def test_the_client_gets_its_replies_in_order_however_the_bytes_are_cut(
    conversation: list[Turn], data: st.DataObject
) -> None:
    # Each turn is a list of its own, so that equal ones can be told apart.
    conversation = [(entry, [*replies]) for entry, replies in conversation]
    expected = b"".join(reply for reply, is_visible in answered(conversation) if is_visible)
    server, client = connection()
    say(server, client, conversation)
    replies = [reply for reply, _ in answered(conversation) if reply is not INJECTED]
    stream = b"".join(replies)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        server.data_received(stream[first:last])
    assert client.given == expected
    assert server.replies.is_ended
    assert server.is_clean
    assert not server._naming


@given(conversations())
def test_byte_by_byte_is_the_same(conversation: list[Turn]) -> None:
    conversation = [(entry, [*replies]) for entry, replies in conversation]
    whole, at_once = connection()
    say(whole, at_once, conversation)
    pieces, one_by_one = connection()
    say(pieces, one_by_one, conversation)
    stream = b"".join(reply for reply, _ in answered(conversation) if reply is not INJECTED)
    whole.data_received(stream)
    for byte in stream:
        pieces.data_received(bytes([byte]))
    assert one_by_one.given == at_once.given
    assert one_by_one.readies == at_once.readies
    assert whole.statements.keys() == pieces.statements.keys()


@given(conversations(), st.data())
def test_a_notice_may_come_between_any_two_messages(conversation: list[Turn], data: st.DataObject) -> None:
    conversation = [(entry, [*replies]) for entry, replies in conversation]
    server, client = connection()
    say(server, client, conversation)
    replies = [reply for reply, _ in answered(conversation) if reply is not INJECTED]
    at = data.draw(st.integers(0, len(replies)))
    server.data_received(b"".join([*replies[:at], NOTICE, *replies[at:]]))
    without = b"".join(reply for reply, is_visible in answered(conversation) if is_visible)
    assert client.given.replace(NOTICE, b"") == without
    assert server.is_clean


def test_a_large_row_passes_in_pieces() -> None:
    server, client = connection()
    server.replies.sent(Owed.QUERY)
    stream = COLUMNS + wire.data_row([b"x" * 1_000_000]) + ROW + COMPLETE + READY
    for at in range(0, len(stream), 10_000):
        before = len(client.given)
        server.data_received(stream[at : at + 10_000])
        assert len(client.given) > before, "it waits for the whole row"
    assert client.given == stream
    assert server.is_clean


@pytest.mark.parametrize("stream", [b"Z\0\0\0\3", b"D\0\0\0\0", b"1\0\0\0\4", b"\0\0\0\0\5x", b"E\xff\xff\xff\xff"])
def test_nonsense_of_a_server_ends_its_connection(stream: bytes) -> None:
    server, _ = connection()
    lost: list[Exception] = []
    cast(Any, server.holder).on_server_lost = lambda _server, error: lost.append(error)
    server.replies.sent(Owed.EXECUTE)
    server.replies.sent(Owed.SYNC)
    server.data_received(stream)
    assert server.is_closed
    assert len(lost) == 1
    assert not server.is_clean
