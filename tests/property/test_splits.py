"""How a stream was cut into reads makes no difference to what a machine says (W2)."""

from hypothesis import assume, example, given
from hypothesis import strategies as st

from proxy.wire import client_startup
from proxy.wire.client_startup import ClientEvent, ClientStartup, ClientState, DirectTLSReceived
from proxy.wire.upstream_startup import UpstreamStartup, UpstreamState
from tests.support.cuts import at_offsets
from tests.wire.driving import (
    AUTHENTICATION_OK,
    BACKEND_KEY_DATA,
    CANCEL_REQUEST,
    CLEARTEXT_PASSWORD,
    GSSENC_REQUEST,
    READY_FOR_QUERY,
    SSL_REQUEST,
    STARTUP,
    feed_client,
    message,
    shown,
    startup,
)

CLIENT_PIECES = [
    SSL_REQUEST,
    GSSENC_REQUEST,
    CANCEL_REQUEST,
    STARTUP,
    startup([(b"user", b"app"), (b"_pq_.foo", b"")], (3, 9999)),
    startup([(b"user", b"")]),
    startup([(b"user", b"app"), (b"replication", b"maybe")]),
    startup([(b"user", b"app")], (2, 0)),
    startup([], end=b"broken"),
    b"Q\0\0\0\x0dSELECT 1\0",
    b"GET / HTTP/1.1\r\n",
    b"\x16\3\1\2\0",
    b"\0\0\0\7",
    b"\0\0\0\x09\0\3\0\0\0",
]
UPSTREAM_PIECES = [
    AUTHENTICATION_OK,
    CLEARTEXT_PASSWORD,
    BACKEND_KEY_DATA,
    READY_FOR_QUERY,
    message(b"S", b"TimeZone\0Etc/UTC\0"),
    message(b"N", b"SNOTICE\0Mhello\0\0"),
    message(b"E", b"SFATAL\0C3D000\0Mno\0\0"),
    message(b"A", b"anything"),
    message(b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0"),
    message(b"R", b"\0\0\0\x0bchallenge"),
    message(b"R", b"\0\0\0\x0cproof"),
    message(b"R", b"\0\0\0\5salt"),
    message(b"v", b"\0\3\0\0\0\0\0\0"),
    message(b"K", b"short"),
    b"E\0\0\0\3",
]
LOGIN = [AUTHENTICATION_OK, BACKEND_KEY_DATA, READY_FOR_QUERY]


def streams(pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """Make streams of whole messages, some with noise inside, some cut short."""
    parts = st.one_of(st.sampled_from(pieces), st.sampled_from(pieces), st.binary(max_size=6))
    whole = st.lists(parts, max_size=6).map(b"".join)
    return st.one_of(whole, whole.map(lambda stream: stream[:-1]))


CUTS = st.lists(st.integers(0, 120), max_size=12)


@given(streams(CLIENT_PIECES), CUTS, st.booleans())
@example(SSL_REQUEST + STARTUP, [8], True)
def test_w2_w3_a_clients_stream_means_the_same_in_any_cut(
    stream: bytes, cuts: list[int], tls_offered: bool
) -> None:
    whole, pieces = (ClientStartup(tls_offered=tls_offered) for _ in range(2))
    expected = whole.receive_data(stream)
    # A ClientHello is handed over as far as it was read; the rest is TLS's own.
    assume(not any(isinstance(event, DirectTLSReceived) for event in expected))
    assert shown(feed_client(pieces, at_offsets(stream, cuts))) == shown(expected)
    assert pieces.state is whole.state
    if whole.state is ClientState.AWAIT_BACKEND:
        assert pieces.trailing_data() == whole.trailing_data()
    assert shown(pieces.receive_eof()) == shown(whole.receive_eof())


@given(streams(CLIENT_PIECES), CUTS, st.booleans())
@example(STARTUP, [], False)
@example(SSL_REQUEST + STARTUP, [8], False)
@example(STARTUP + b"Q\0\0\0\x0dSELECT 1\0", [len(STARTUP)], False)
def test_a_packet_that_came_before_means_what_it_meant_the_first_time(
    stream: bytes, cuts: list[int], tls_offered: bool
) -> None:
    client_startup._ordinary.clear()
    first, again = (ClientStartup(tls_offered=tls_offered) for _ in range(2))
    expected = feed_client(first, at_offsets(stream, cuts))
    for packet in CLIENT_PIECES:  # those that are ordinary are known from here on
        ClientStartup().receive_data(packet)
    events: list[ClientEvent] = []
    for chunk in at_offsets(stream, cuts):
        known = again.receive_known(chunk)
        events += again.receive_data(chunk) if known is None else [known]
    assert shown(events) == shown(expected)
    assert again.state is first.state
    assert again.trailing_data() == first.trailing_data()
    assert again.receive_eof() == first.receive_eof()


def inside_tls() -> UpstreamStartup:
    machine = UpstreamStartup()
    machine.receive_data(b"S")
    machine.tls_started()
    return machine


@given(
    st.one_of(
        streams(UPSTREAM_PIECES),
        streams(UPSTREAM_PIECES).map(lambda stream: AUTHENTICATION_OK + stream),
        st.permutations(UPSTREAM_PIECES).map(
            lambda pieces: b"".join([LOGIN[0], *pieces[:3], *LOGIN[1:], *pieces[3:]])
        ),
    ),
    CUTS,
)
def test_w2_an_upstreams_stream_means_the_same_in_any_cut(stream: bytes, cuts: list[int]) -> None:
    whole, pieces = inside_tls(), inside_tls()
    expected = whole.receive_data(stream)
    events, relayed = [], b""
    for chunk in at_offsets(stream, cuts):
        if pieces.state is UpstreamState.READY:
            relayed += chunk  # a ready session is relayed, not parsed
        else:
            events += pieces.receive_data(chunk)
    assert shown(events) == shown(expected)
    assert (pieces.state, pieces.key) == (whole.state, whole.key)
    if whole.state is UpstreamState.READY:
        assert pieces.welcome(pieces.key) == whole.welcome(whole.key)
        assert pieces.trailing_data() + relayed == whole.trailing_data()
    assert shown(pieces.receive_eof()) == shown(whole.receive_eof())
