"""The client's machine against the document's cases, and against every entry of its own table."""

import itertools
from collections.abc import Callable
from typing import Final

import pytest

from proxy.wire import client_startup
from proxy.wire.client_startup import (
    CLIENT_TABLE,
    EARLY_BYTES_MAX,
    ORDINARY_MAX,
    CancelReceived,
    ClientEvent,
    ClientStartup,
    ClientState,
    ClientStep,
    DirectTLSReceived,
    Disconnected,
    EncryptionAnswered,
    LastAnswer,
    StartupReceived,
    VersionNegotiated,
    Violated,
    wants_replication,
)
from proxy.wire.messages import ErrorResponse
from proxy.wire.secret import Secret
from proxy.wire.startup import (
    V3_0,
    V3_2,
    CancelRequest,
    ProtocolVersion,
    StartupMessage,
    parse_first_packet,
)
from proxy.wire.violations import ClientViolation, StateMachineMisuse
from tests.support.cuts import byte_by_byte, three_ways
from tests.wire.driving import (
    AUTHENTICATION_OK,
    BACKEND_KEY_DATA,
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    READY_FOR_QUERY,
    SSL_REQUEST,
    STARTUP,
    Pairs,
    fatal,
    feed_client,
    message,
    shown,
    startup,
)

STARTUP_MESSAGE = StartupMessage(V3_0, ((b"user", b"app"), (b"database", b"main")))
QUERY = b"Q\0\0\0\x0dSELECT 1\0"
CLIENT_HELLO = bytes.fromhex("16 03 01 02 00 01 00 01 fc 03 03")


def replies(events: list[ClientEvent]) -> bytes:
    return b"".join(event.reply for event in events)


def one_violation(stream: bytes, machine_kind: Callable[[], ClientStartup]) -> Violated:
    """Feed the stream all three ways and return the violation that it always ends with."""
    found: list[Violated] = []
    for chunks in three_ways(stream):
        machine = machine_kind()
        events = feed_client(machine, chunks)
        assert machine.state is ClientState.FAILED
        assert isinstance(events[-1], Violated)
        assert not any(isinstance(event, Violated) for event in events[:-1])
        found.append(events[-1])
    assert len(set(shown(found))) == 1
    return found[0]


# -- 1. first bytes and framing ------------------------------------------------------------------


def test_w1_a_probe_that_sends_nothing_is_told_apart() -> None:
    machine = ClientStartup()
    assert machine.receive_data(b"") == []
    assert machine.receive_eof() == [Disconnected(untouched=True)]
    assert machine.state is ClientState.FAILED


@pytest.mark.parametrize("sent", [b"\0", SSL_REQUEST, STARTUP[:-1]])
def test_w1_who_sent_a_byte_was_no_probe(sent: bytes) -> None:
    machine = ClientStartup()
    machine.receive_data(sent)
    answer = LastAnswer.TLS_REFUSED if sent == SSL_REQUEST else None
    assert machine.receive_eof() == [Disconnected(untouched=False, last_answer=answer)]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (SSL_REQUEST, LastAnswer.TLS_REFUSED),
        (GSSENC_REQUEST + SSL_REQUEST, LastAnswer.TLS_REFUSED),
        (SSL_REQUEST + GSSENC_REQUEST, LastAnswer.GSSENC_REFUSED),
        (SSL_REQUEST + STARTUP[:3], None),
        (GSSENC_REQUEST + STARTUP[:3], None),
        (GSSENC_REQUEST, LastAnswer.GSSENC_REFUSED),
    ],
)
def test_a_client_that_leaves_at_an_n_wanted_the_encryption(
    sent: bytes, answer: LastAnswer | None
) -> None:
    machine = ClientStartup()
    machine.receive_data(sent)
    assert machine.receive_eof() == [Disconnected(untouched=False, last_answer=answer)]


@pytest.mark.parametrize("begins", [SSL_REQUEST, b"\x16"])
@pytest.mark.parametrize(("sent", "answer"), [(b"", LastAnswer.TLS_STARTED), (STARTUP[:3], None)])
def test_a_client_that_leaves_after_its_handshake_sent_nothing_in_it(
    begins: bytes, sent: bytes, answer: LastAnswer | None
) -> None:
    machine = ClientStartup(tls_offered=True)
    machine.receive_data(begins)
    machine.tls_started()
    machine.receive_data(sent)
    assert machine.receive_eof() == [Disconnected(untouched=False, last_answer=answer)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 11])
def test_w2_a_fragmented_startup_is_the_same_startup(size: int) -> None:
    machine = ClientStartup()
    chunks = [STARTUP[at : at + size] for at in range(0, len(STARTUP), size)]
    assert feed_client(machine, chunks[:-1]) == []
    assert machine.receive_data(chunks[-1]) == [StartupReceived(STARTUP_MESSAGE, V3_0)]
    assert machine.state is ClientState.AWAIT_BACKEND


def test_the_packets_whose_meaning_is_kept_are_bounded() -> None:
    for number in range(ORDINARY_MAX + 10):
        packet = startup([(b"user", b"%d" % number)])
        first, again = ClientStartup(), ClientStartup()
        assert first.receive_data(packet) == [again.receive_known(packet)]
        assert again.state is ClientState.AWAIT_BACKEND
    assert len(client_startup._ordinary) == ORDINARY_MAX


@pytest.mark.parametrize(
    "packet",
    [
        CANCEL_REQUEST,
        SSL_REQUEST,
        startup([(b"user", b"app"), (b"_pq_.foo", b"")]),
        startup([(b"user", b"app"), *((b"p%d" % number, b"") for number in range(1000))]),
        startup([(b"user", b"")]),
        startup([], end=b"broken"),
    ],
)
def test_no_meaning_is_kept_but_that_of_an_ordinary_startup(packet: bytes) -> None:
    # A cancel key must not stay in memory, nor a message that is large; a violation has an answer.
    ClientStartup().receive_data(packet)
    assert packet not in client_startup._ordinary
    machine = ClientStartup()
    assert machine.receive_known(packet) is None
    assert machine.state is ClientState.AWAIT_STARTUP


def test_a_known_packet_is_received_only_where_it_is_awaited_and_whole() -> None:
    ClientStartup().receive_data(STARTUP)
    begun, ready = ClientStartup(), ClientStartup()
    begun.receive_data(b"\0")
    ready.receive_data(STARTUP)
    assert begun.receive_known(STARTUP) is None
    assert ready.receive_known(STARTUP) is None
    assert ClientStartup().receive_known(STARTUP + QUERY) is None


def test_w3_plaintext_after_an_accepted_ssl_request_is_an_injection() -> None:
    error = fatal("08P01", "received unencrypted data after SSL request", "early_plaintext")
    for following in (b"\0", STARTUP, CLIENT_HELLO, CANCEL_REQUEST):
        for chunks in three_ways(SSL_REQUEST + following):
            machine = ClientStartup(tls_offered=True)
            events = feed_client(machine, chunks)
            assert events[0] == EncryptionAnswered(b"S")
            assert len(events) == 2
            assert replies(events) == b"S" + error
            assert machine.state is ClientState.FAILED
            assert machine.trailing_data() == b""


def test_w3_after_a_refused_ssl_request_comes_the_next_packet() -> None:
    for chunks in three_ways(SSL_REQUEST + STARTUP):
        machine = ClientStartup()
        assert feed_client(machine, chunks) == [
            EncryptionAnswered(b"N"),
            StartupReceived(STARTUP_MESSAGE, V3_0),
        ]


def test_w3_messages_after_the_startup_message_are_kept_for_the_upstream() -> None:
    for chunks in three_ways(STARTUP + QUERY + b"X\0\0\0\4"):
        machine = ClientStartup()
        assert feed_client(machine, chunks) == [StartupReceived(STARTUP_MESSAGE, V3_0)]
        assert machine.receive_data(b"more") == []
        machine.accept(READY_FOR_QUERY)
        assert machine.trailing_data() == QUERY + b"X\0\0\0\4more"
        assert machine.trailing_data() == b""


def test_w3_what_is_kept_after_the_startup_message_is_bounded() -> None:
    machine = ClientStartup()
    machine.receive_data(STARTUP + bytes(EARLY_BYTES_MAX))
    assert machine.state is ClientState.AWAIT_BACKEND
    [event] = machine.receive_data(b"x")
    assert isinstance(event, Violated)
    assert event.reply == fatal(
        "08P01", "more than 1048576 bytes sent before the session started", "early_data_too_long"
    )
    assert machine.trailing_data() == b""


def padded_startup(length: int) -> bytes:
    """Return a legal StartupMessage of exactly so many bytes."""
    short = startup([(b"user", b"app"), (b"x.y", b"")])
    return startup([(b"user", b"app"), (b"x.y", b"z" * (length - len(short)))])


@pytest.mark.parametrize(
    "length", ["00000000", "00000007", "00002711", "00002714", "7fffffff", "80000000", "ffffffff"]
)
def test_w4_a_length_outside_8_to_10000_closes_without_a_reply(length: str) -> None:
    for following in (b"", b"\0\3\0\0", bytes(64)):
        violated = one_violation(bytes.fromhex(length) + following, ClientStartup)
        assert violated.reply == b""
        assert violated.violation.message == "invalid length of startup packet"
        assert violated.violation.sqlstate == "08P01"
        assert violated.violation.reason == "startup_length"


@pytest.mark.parametrize("length", [0, 7, 10_001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_w4_a_wrong_length_is_refused_on_its_fourth_byte_and_nothing_is_held(length: int) -> None:
    machine = ClientStartup()
    prefix = length.to_bytes(4, "big")
    assert feed_client(machine, byte_by_byte(prefix[:3])) == []
    assert len(machine.receive_data(prefix[3:])) == 1
    assert len(machine._buffer) == 0


@pytest.mark.parametrize("length", [9_999, 10_000])
def test_w4_the_longest_packets_are_taken(length: int) -> None:
    packet = padded_startup(length)
    assert packet[:4] == length.to_bytes(4, "big")
    assert len(packet) == length
    for chunks in ([packet], [packet[:9_000], packet[9_000:]], byte_by_byte(packet)):
        [event] = feed_client(ClientStartup(), chunks)
        assert isinstance(event, StartupReceived)


def test_w4_the_shortest_packet_is_a_layout_error_and_not_a_length_error() -> None:
    violated = one_violation(bytes.fromhex("00 00 00 08 00 03 00 00"), ClientStartup)
    assert violated.violation.reason == "startup_layout"


def test_w4_no_more_is_held_than_the_packet_may_be_long() -> None:
    machine = ClientStartup()
    for chunk in byte_by_byte(padded_startup(10_000)[:-1]):
        machine.receive_data(chunk)
        assert len(machine._buffer) < 10_000


def test_w5_direct_tls_without_a_certificate_is_closed_on_its_first_byte() -> None:
    machine = ClientStartup()
    [event] = machine.receive_data(CLIENT_HELLO[:1])
    assert isinstance(event, Violated)
    assert (event.reply, event.violation.reason) == (b"", "direct_tls")
    assert machine.receive_data(CLIENT_HELLO[1:]) == []


@pytest.mark.parametrize("cut", [1, 4, len(CLIENT_HELLO)])
def test_w5_direct_tls_with_a_certificate_hands_over_what_was_read(cut: int) -> None:
    machine = ClientStartup(tls_offered=True)
    assert machine.receive_data(CLIENT_HELLO[:cut]) == [DirectTLSReceived(CLIENT_HELLO[:cut])]
    assert machine.state is ClientState.AWAIT_TLS
    assert machine.trailing_data() == b""
    machine.tls_started()
    assert machine.receive_data(STARTUP) == [StartupReceived(STARTUP_MESSAGE, V3_0)]


def test_w5_direct_tls_is_not_taken_after_a_refused_request() -> None:
    violated = one_violation(SSL_REQUEST + CLIENT_HELLO, ClientStartup)
    assert (violated.reply, violated.violation.reason) == (b"", "direct_tls")


def in_direct_tls() -> ClientStartup:
    machine = ClientStartup(tls_offered=True)
    machine.receive_data(CLIENT_HELLO)
    machine.tls_started()
    return machine


def test_w5_inside_direct_tls_no_second_tls_is_offered() -> None:
    machine = in_direct_tls()
    assert machine.receive_data(SSL_REQUEST) == [EncryptionAnswered(b"N")]
    assert machine.receive_data(STARTUP) == [StartupReceived(STARTUP_MESSAGE, V3_0)]


@pytest.mark.parametrize("opening", [SSL_REQUEST, CLIENT_HELLO])
def test_w5_a_client_hello_inside_tls_is_not_taken(opening: bytes) -> None:
    machine = ClientStartup(tls_offered=True)
    machine.receive_data(opening)
    machine.tls_started()
    [event] = machine.receive_data(CLIENT_HELLO)
    assert isinstance(event, Violated)
    assert (event.reply, event.violation.reason) == (b"", "direct_tls")


@pytest.mark.parametrize("method", ["GET ", "POST", "PUT ", "HEAD", "OPTI", "DELE", "CONN", "PATC"])
def test_w6_http_is_named_and_closed_without_a_reply(method: str) -> None:
    violated = one_violation(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode(), ClientStartup)
    assert violated.reply == b""
    assert violated.violation.message == "HTTP request on the Postgres port"
    assert violated.violation.reason == "http_request"


def test_w6_http_is_known_on_its_fourth_byte() -> None:
    machine = ClientStartup()
    assert machine.receive_data(bytes.fromhex("47 45 54")) == []
    [event] = machine.receive_data(b"\x20")
    assert isinstance(event, Violated)


def test_w7_ssl_request_is_answered_n_without_a_certificate() -> None:
    for chunks in three_ways(SSL_REQUEST):
        machine = ClientStartup()
        assert feed_client(machine, chunks) == [EncryptionAnswered(b"\x4e")]
        assert machine.state is ClientState.AWAIT_STARTUP


def test_w7_ssl_request_is_answered_s_with_a_certificate() -> None:
    for chunks in three_ways(SSL_REQUEST):
        machine = ClientStartup(tls_offered=True)
        assert feed_client(machine, chunks) == [EncryptionAnswered(b"\x53")]
        assert machine.state is ClientState.AWAIT_TLS
        machine.tls_started()
        assert machine.receive_data(STARTUP) == [StartupReceived(STARTUP_MESSAGE, V3_0)]


@pytest.mark.parametrize(
    "requests",
    [(GSSENC_REQUEST,), (GSSENC_REQUEST, SSL_REQUEST), (SSL_REQUEST, GSSENC_REQUEST)],
)
def test_w8_gssenc_request_is_answered_n_before_or_after_ssl_request(
    requests: tuple[bytes, ...],
) -> None:
    for chunks in three_ways(b"".join(requests) + STARTUP):
        events = feed_client(ClientStartup(), chunks)
        assert replies(events) == b"\x4e" * len(requests)
        assert events[-1] == StartupReceived(STARTUP_MESSAGE, V3_0)


def test_w8_gssenc_request_may_come_before_an_accepted_ssl_request() -> None:
    machine = ClientStartup(tls_offered=True)
    assert replies(machine.receive_data(GSSENC_REQUEST)) == b"N"
    assert replies(machine.receive_data(SSL_REQUEST)) == b"S"
    assert machine.state is ClientState.AWAIT_TLS


W9_REQUESTS = {
    "unknown code": (bytes.fromhex("00 00 00 08 04 d2 16 31"), 5681),
    "second SSLRequest": (SSL_REQUEST * 2, 5679),
    "second GSSENCRequest": (GSSENC_REQUEST * 2, 5680),
    "SSLRequest on both sides of GSSENCRequest": (SSL_REQUEST + GSSENC_REQUEST + SSL_REQUEST, 5679),
    "GSSENCRequest on both sides of SSLRequest": (
        GSSENC_REQUEST + SSL_REQUEST + GSSENC_REQUEST,
        5680,
    ),
}


@pytest.mark.parametrize("name", W9_REQUESTS)
def test_w9_an_unknown_or_repeated_request_is_an_unsupported_version(name: str) -> None:
    stream, minor = W9_REQUESTS[name]
    assert one_violation(stream, ClientStartup).reply == fatal(
        "0A000",
        f"unsupported frontend protocol 1234.{minor}: server supports 3.0 to 3.2",
        "unsupported_protocol",
    )


@pytest.mark.parametrize(("request_packet", "minor"), [(SSL_REQUEST, 5679), (GSSENC_REQUEST, 5680)])
def test_w9_inside_tls_no_encryption_can_be_asked_for(request_packet: bytes, minor: int) -> None:
    machine = ClientStartup(tls_offered=True)
    machine.receive_data(SSL_REQUEST)
    machine.tls_started()
    [event] = machine.receive_data(request_packet)
    assert isinstance(event, Violated)
    assert event.violation.message.startswith(f"unsupported frontend protocol 1234.{minor}: ")


@pytest.mark.parametrize("version", [(2, 0), (1, 0)])
def test_w10_old_protocols_are_answered_in_their_own_error_form(version: tuple[int, int]) -> None:
    major, minor = version
    text = f"unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2"
    violated = one_violation(startup([(b"user", b"app")], version), ClientStartup)
    assert violated.reply == b"\x45FATAL:  " + text.encode() + b"\n\x00"


@pytest.mark.parametrize("version", [(0, 0), (4, 0), (65535, 0)])
def test_w10_other_protocols_are_answered_with_an_error_response(version: tuple[int, int]) -> None:
    major, minor = version
    text = f"unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2"
    violated = one_violation(startup([(b"user", b"app")], version), ClientStartup)
    assert violated.reply == fatal("0A000", text, "unsupported_protocol")


# -- 2. version negotiation ----------------------------------------------------------------------

FOO = (b"_pq_.foo", b"")
V_30_FOO = bytes.fromhex("76 00 00 00 15 00 03 00 00 00 00 00 01") + b"_pq_.foo\0"
V_30 = bytes.fromhex("76 00 00 00 0c 00 03 00 00 00 00 00 00")
V_32_FOO = bytes.fromhex("76 00 00 00 15 00 03 00 02 00 00 00 01") + b"_pq_.foo\0"
V_32 = bytes.fromhex("76 00 00 00 0c 00 03 00 02 00 00 00 00")

# (asked minor, further parameters, reply, version spoken)
W11_TABLE: list[tuple[int, list[tuple[bytes, bytes]], bytes, ProtocolVersion]] = [
    (0, [], b"", V3_0),
    (0, [FOO], V_30_FOO, V3_0),
    (1, [], V_30, V3_0),
    (1, [FOO], V_30_FOO, V3_0),
    (2, [], b"", V3_2),
    (2, [FOO], V_32_FOO, V3_2),
    (3, [], V_32, V3_2),
    (3, [FOO], V_32_FOO, V3_2),
    (9998, [], V_32, V3_2),
    (65535, [], V_32, V3_2),
]


@pytest.mark.parametrize(("minor", "further", "reply", "spoken"), W11_TABLE)
def test_w11_the_version_is_negotiated(
    minor: int, further: list[tuple[bytes, bytes]], reply: bytes, spoken: ProtocolVersion
) -> None:
    packet = startup([(b"user", b"app"), *further], (3, minor))
    for chunks in three_ways(packet):
        events = feed_client(ClientStartup(), chunks)
        assert replies(events) == reply
        assert [type(event) for event in events[:-1]] == [VersionNegotiated] * bool(reply)
        received = events[-1]
        assert isinstance(received, StartupReceived)
        assert received.version == spoken
        assert received.message.version == (3, minor)


def test_w12_grease_is_negotiated_like_anything_else() -> None:
    packet = startup([(b"user", b"app"), (b"_pq_.test_protocol_negotiation", b"")], (3, 9999))
    assert packet[4:8] == bytes.fromhex("00 03 27 0f")
    events = ClientStartup().receive_data(packet)
    assert replies(events) == (
        bytes.fromhex("76 00 00 00 2b 00 03 00 02 00 00 00 01")
        + b"_pq_.test_protocol_negotiation\0"
    )
    assert len(replies(events)) == 44


def test_w13_every_protocol_option_is_listed_whatever_the_minor() -> None:
    # PostgreSQL 15 lists them in packet order, repeated and bare names too.
    pairs = [(b"_pq_.a", b"1"), (b"user", b"app"), (b"_pq_.a", b""), (b"_pq_.", b"x")]
    for minor in (0, 2):
        events = ClientStartup().receive_data(startup(pairs, (3, minor)))
        assert replies(events) == (
            bytes.fromhex("76 00 00 00 20 00 03 00")
            + bytes([minor])
            + bytes.fromhex("00 00 00 03")
            + b"_pq_.a\0_pq_.a\0_pq_.\0"
        )


@pytest.mark.parametrize("name", [b"_PQ_.foo", b"_pq_", b"x_pq_.foo"])
def test_w13_only_the_exact_prefix_is_a_protocol_option(name: bytes) -> None:
    [event] = ClientStartup().receive_data(startup([(b"user", b"app"), (name, b"")]))
    assert isinstance(event, StartupReceived)


def test_w14_a_client_of_3_2_may_get_a_key_of_four_bytes() -> None:
    machine = ClientStartup()
    [event] = machine.receive_data(startup([(b"user", b"app")], (3, 2)))
    assert isinstance(event, StartupReceived)
    assert event.version == V3_2
    assert machine.accept(BACKEND_KEY_DATA) == AUTHENTICATION_OK + BACKEND_KEY_DATA


# -- 3. StartupMessage body ----------------------------------------------------------------------

LAYOUT_ERROR = fatal(
    "08P01",
    "invalid startup packet layout: expected terminator as last byte",
    "startup_layout",
)


@pytest.mark.parametrize(
    "body",
    [b"user\0app\0", b"user\0app\0database\0", b"\0user\0app\0\0", b"user\0app\0\0x", b"user", b""],
)
def test_w15_a_broken_layout_is_answered(body: bytes) -> None:
    assert one_violation(startup([], end=body), ClientStartup).reply == LAYOUT_ERROR


def test_w15_a_broken_layout_negotiates_nothing() -> None:
    packet = startup([(b"user", b"app"), FOO], (3, 9999), end=b"")
    assert shown(ClientStartup().receive_data(packet)) == [
        f"Violated startup_layout 08P01 {LAYOUT_ERROR!r}"
    ]


NO_USER = fatal("28000", "no PostgreSQL user name specified in startup packet", "user_missing")


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(b"user", b"")],
        [(b"database", b"main")],
        [(b"USER", b"app")],
        [(b"user", b"app"), (b"user", b"")],
    ],
)
def test_w16_a_missing_or_empty_user_is_refused(pairs: Pairs) -> None:
    assert one_violation(startup(pairs), ClientStartup).reply == NO_USER


def test_w16_a_missing_user_is_told_after_the_negotiation() -> None:
    # PostgreSQL 15: `v`, then the error.
    events = ClientStartup().receive_data(startup([], (3, 9)))
    assert replies(events) == V_32 + NO_USER


def test_w16_a_missing_database_is_no_fault() -> None:
    for pairs in ([(b"user", b"app")], [(b"user", b"app"), (b"database", b"")]):
        [event] = ClientStartup().receive_data(startup(pairs))
        assert isinstance(event, StartupReceived)


W17_TRUE = b"database true TRUE tRuE t tr tru on ON On yes y ye YES 1".split()
W17_FALSE = b"false FALSE f fa fal fals off of OFF no n NO 0".split()
W17_REFUSED = [b"", b"o", b"O", b"DATABASE", b"databas", b"2", b"10", b"onn", b"offf", b"truee"]
W17_REFUSED += [b" true", b"true ", b"\xff", b"01", b"yess", b"none"]


@pytest.mark.parametrize("value", W17_TRUE + W17_FALSE)
def test_w17_a_replication_value_that_postgresql_takes_is_taken(value: bytes) -> None:
    assert wants_replication(value) is (value in W17_TRUE)
    [event] = ClientStartup().receive_data(startup([(b"user", b"a"), (b"replication", value)]))
    assert isinstance(event, StartupReceived)


@pytest.mark.parametrize("value", W17_REFUSED)
def test_w17_any_other_replication_value_is_refused(value: bytes) -> None:
    with pytest.raises(ClientViolation):
        wants_replication(value)
    shown_value = value.decode("utf-8", "replace")
    packet = startup([(b"user", b"app"), (b"replication", value)])
    assert one_violation(packet, ClientStartup).reply == fatal(
        "22023", f'invalid value for parameter "replication": "{shown_value}"', "replication_value"
    )


def test_w17_a_bad_replication_value_is_refused_even_when_a_good_one_follows() -> None:
    # PostgreSQL 15 checks each as it reads the packet; taking only the last one let this through.
    pairs = [(b"user", b"app"), (b"replication", b"xyz"), (b"replication", b"true")]
    violated = one_violation(startup(pairs), ClientStartup)
    assert violated.violation.message == 'invalid value for parameter "replication": "xyz"'


def test_w17_a_bad_replication_value_is_told_before_version_and_user() -> None:
    # PostgreSQL 15: no `v` before this error.
    events = ClientStartup().receive_data(startup([(b"replication", b"zz"), FOO], (3, 9)))
    assert len(events) == 1
    assert isinstance(events[0], Violated)
    assert events[0].violation.reason == "replication_value"


def test_w18_of_a_repeated_user_the_last_counts() -> None:
    [event] = ClientStartup().receive_data(startup([(b"user", b""), (b"user", b"app")]))
    assert isinstance(event, StartupReceived)
    assert event.message.get(b"user") == b"app"


def test_w19_w20_names_and_values_arrive_as_they_were_sent() -> None:
    pairs = ((b"user", b"caf\xe9"), (b"TIMEZONE", b"\xff\xfe"), (b"shard_key", b"7"), (b"a.b", b""))
    [event] = ClientStartup().receive_data(startup(pairs))
    assert isinstance(event, StartupReceived)
    assert event.message.parameters == pairs


# -- 5. and 7.: accepting, refusing, cancelling --------------------------------------------------


def test_w24_authentication_ok_and_the_welcome_leave_in_one_piece() -> None:
    machine = ClientStartup()
    assert replies(machine.receive_data(STARTUP)) == b""
    assert machine.accept(BACKEND_KEY_DATA + READY_FOR_QUERY) == (
        bytes.fromhex("52 00 00 00 08 00 00 00 00")
        + bytes.fromhex("4b 00 00 00 0c 00 00 04 d2 01 02 03 04")
        + bytes.fromhex("5a 00 00 00 05 49")
    )
    assert machine.state is ClientState.READY


def test_w48_a_refusal_is_the_error_and_the_end() -> None:
    machine = ClientStartup()
    machine.receive_data(STARTUP + QUERY)
    error = ErrorResponse.fatal("3D000", "no such shard", "reason=unknown_shard")
    assert machine.refuse(error) == fatal("3D000", "no such shard", "unknown_shard")
    assert machine.state is ClientState.FAILED
    assert machine.receive_data(QUERY) == []


CANCEL_32 = bytes.fromhex("00 00 00 2c 04 d2 16 2e 00 00 04 d2") + bytes(range(32))
W38_FORMS = {
    "plaintext, 3.0": (CANCEL_REQUEST, b"\1\2\3\4", b""),
    "plaintext, 3.2": (CANCEL_32, bytes(range(32)), b""),
    "after SSLRequest": (SSL_REQUEST + CANCEL_REQUEST, b"\1\2\3\4", b"N"),
    "after both requests": (GSSENC_REQUEST + SSL_REQUEST + CANCEL_32, bytes(range(32)), b"NN"),
    "with a NUL after": (CANCEL_REQUEST + b"\0", b"\1\2\3\4", b""),
    "with packets after": (CANCEL_REQUEST + CANCEL_32 + STARTUP, b"\1\2\3\4", b""),
}


@pytest.mark.parametrize("form", W38_FORMS)
def test_w38_every_form_of_a_cancel_request_is_taken(form: str) -> None:
    stream, key, answered = W38_FORMS[form]
    for chunks in three_ways(stream):
        machine = ClientStartup()
        events = feed_client(machine, chunks)
        assert events[-1] == CancelReceived(CancelRequest(1234, Secret(key)))
        assert replies(events) == answered
        assert machine.state is ClientState.CANCEL
        assert machine.trailing_data() == b""


@pytest.mark.parametrize("direct", [False, True])
def test_w38_a_cancel_request_is_taken_inside_tls(direct: bool) -> None:
    machine = ClientStartup(tls_offered=True)
    machine.receive_data(CLIENT_HELLO if direct else SSL_REQUEST)
    machine.tls_started()
    assert machine.receive_data(CANCEL_REQUEST) == [
        CancelReceived(CancelRequest(1234, Secret(b"\1\2\3\4")))
    ]


@pytest.mark.parametrize("length", [8, 11, 12, 15, 269, 10_000])
def test_w38_w39_a_cancel_request_of_a_bad_length_is_never_answered(length: int) -> None:
    packet = length.to_bytes(4, "big") + bytes.fromhex("04 d2 16 2e") + bytes(length - 8)
    assert one_violation(packet, ClientStartup).reply == b""


# -- the table -----------------------------------------------------------------------------------

PAIRS = list(itertools.product(ClientState, ClientStep))


def in_state(state: ClientState) -> ClientStartup:
    """Bring a machine into a state by the shortest legal way."""
    machine = ClientStartup(tls_offered=state is ClientState.AWAIT_TLS)
    match state:
        case ClientState.AWAIT_STARTUP:
            pass
        case ClientState.AWAIT_TLS:
            machine.receive_data(SSL_REQUEST)
        case ClientState.AWAIT_BACKEND:
            machine.receive_data(STARTUP)
        case ClientState.READY:
            machine.receive_data(STARTUP)
            machine.accept(READY_FOR_QUERY)
        case ClientState.CANCEL:
            machine.receive_data(CANCEL_REQUEST)
        case ClientState.FAILED:
            machine.receive_eof()
    assert machine.state is state
    return machine


@pytest.mark.parametrize(("state", "step"), PAIRS)
def test_every_pair_of_state_and_step_moves_or_is_misuse(
    state: ClientState, step: ClientStep
) -> None:
    machine = in_state(state)
    following = CLIENT_TABLE.get((state, step))
    if following is None:
        with pytest.raises(StateMachineMisuse, match=f"{step.name} in {state.name}"):
            machine._move(step)
        assert machine.state is state
    else:
        machine._move(step)
        assert machine.state is following


def test_failed_cancel_and_ready_are_sinks_of_the_table() -> None:
    moving = {state for state, _ in CLIENT_TABLE}
    assert set(ClientState) - moving == {
        ClientState.READY,
        ClientState.CANCEL,
        ClientState.FAILED,
    }


def test_every_state_that_waits_for_the_client_ends_with_it() -> None:
    for state, _ in CLIENT_TABLE:
        for end in (ClientStep.VIOLATE, ClientStep.DISCONNECT):
            assert CLIENT_TABLE[state, end] is ClientState.FAILED


Drive = Callable[[ClientStartup], list[ClientEvent]]


def sending(data: bytes) -> Drive:
    return lambda machine: machine.receive_data(data)


def calling(verb: Callable[[ClientStartup], object]) -> Drive:
    def call(machine: ClientStartup) -> list[ClientEvent]:
        verb(machine)
        return []

    return call


INPUTS: Final[dict[str, Drive]] = {
    "nothing": sending(b""),
    "a byte": sending(b"\0"),
    "SSLRequest": sending(SSL_REQUEST),
    "GSSENCRequest": sending(GSSENC_REQUEST),
    "CancelRequest": sending(CANCEL_REQUEST),
    "StartupMessage": sending(STARTUP),
    "ClientHello": sending(CLIENT_HELLO),
    "Query": sending(QUERY),
    "bad length": sending(b"\xff\xff\xff\xff"),
    "end of stream": lambda machine: machine.receive_eof(),
    "tls_started": calling(lambda machine: machine.tls_started()),
    "accept": calling(lambda machine: machine.accept(b"")),
    "refuse": calling(lambda machine: machine.refuse(ErrorResponse(()))),
    "trailing_data": calling(lambda machine: machine.trailing_data()),
}

# (state, input) -> (state, event). What is not here changes nothing and gives no event.
EFFECTS: Final[dict[tuple[str, str], tuple[str, type[ClientEvent] | None]]] = {
    ("AWAIT_STARTUP", "SSLRequest"): ("AWAIT_STARTUP", EncryptionAnswered),
    ("AWAIT_STARTUP", "GSSENCRequest"): ("AWAIT_STARTUP", EncryptionAnswered),
    ("AWAIT_STARTUP", "CancelRequest"): ("CANCEL", CancelReceived),
    ("AWAIT_STARTUP", "StartupMessage"): ("AWAIT_BACKEND", StartupReceived),
    ("AWAIT_STARTUP", "ClientHello"): ("FAILED", Violated),
    ("AWAIT_STARTUP", "Query"): ("FAILED", Violated),
    ("AWAIT_STARTUP", "bad length"): ("FAILED", Violated),
    ("AWAIT_STARTUP", "end of stream"): ("FAILED", Disconnected),
    ("AWAIT_TLS", "a byte"): ("FAILED", Violated),
    ("AWAIT_TLS", "SSLRequest"): ("FAILED", Violated),
    ("AWAIT_TLS", "GSSENCRequest"): ("FAILED", Violated),
    ("AWAIT_TLS", "CancelRequest"): ("FAILED", Violated),
    ("AWAIT_TLS", "StartupMessage"): ("FAILED", Violated),
    ("AWAIT_TLS", "ClientHello"): ("FAILED", Violated),
    ("AWAIT_TLS", "Query"): ("FAILED", Violated),
    ("AWAIT_TLS", "bad length"): ("FAILED", Violated),
    ("AWAIT_TLS", "end of stream"): ("FAILED", Disconnected),
    ("AWAIT_TLS", "tls_started"): ("AWAIT_STARTUP", None),
    ("AWAIT_BACKEND", "end of stream"): ("FAILED", Disconnected),
    ("AWAIT_BACKEND", "accept"): ("READY", None),
    ("AWAIT_BACKEND", "refuse"): ("FAILED", None),
}
VERBS = ("tls_started", "accept", "refuse")
ARRIVING = tuple(name for name in INPUTS if name not in (*VERBS, "end of stream", "trailing_data"))
# A verb is misuse wherever it has no effect; so is parsing what must be relayed.
MISUSES = {
    (state.name, verb)
    for state in ClientState
    for verb in VERBS
    if (state.name, verb) not in EFFECTS
} | {("READY", arriving) for arriving in ARRIVING}


@pytest.mark.parametrize(("state", "name"), list(itertools.product(ClientState, INPUTS)))
def test_every_state_takes_every_kind_of_input(state: ClientState, name: str) -> None:
    machine = in_state(state)
    if (state.name, name) in MISUSES:
        with pytest.raises(StateMachineMisuse):
            INPUTS[name](machine)
        assert machine.state is state
        return
    following, kind = EFFECTS.get((state.name, name), (state.name, None))
    events = INPUTS[name](machine)
    assert machine.state.name == following
    assert [type(event) for event in events] == ([kind] if kind else [])


PACKETS = {
    "SSLRequest": SSL_REQUEST,
    "GSSENCRequest": GSSENC_REQUEST,
    "CancelRequest": CANCEL_REQUEST,
    "StartupMessage": STARTUP,
}


@pytest.mark.parametrize("name", PACKETS)
def test_w53_a_packet_cut_at_any_offset_ends_as_a_disconnect(name: str) -> None:
    for at in range(len(PACKETS[name])):
        machine = ClientStartup()
        assert machine.receive_data(PACKETS[name][:at]) == []
        assert machine.receive_eof() == [Disconnected(untouched=at == 0)]
        assert machine.receive_data(PACKETS[name][at:]) == []
        assert machine.receive_eof() == []


@pytest.mark.parametrize("name", PACKETS)
def test_a_packet_with_more_after_is_the_same_packet(name: str) -> None:
    packet = PACKETS[name]
    for following in (b"\0", b"\0\0\0", QUERY[:4]):
        machine = ClientStartup()
        events = machine.receive_data(packet + following)
        alone = ClientStartup().receive_data(packet)
        assert events[: len(alone)] == alone
        if name == "StartupMessage":
            assert machine.trailing_data() == following


def test_the_packets_of_this_file_are_what_they_are_called() -> None:
    for name, packet in PACKETS.items():
        assert type(parse_first_packet(packet)).__name__ == name
    assert message(b"Q", b"SELECT 1\0") == QUERY
