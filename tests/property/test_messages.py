"""Messages and first packets: what is written reads back, and what reads writes back the same."""

from collections.abc import Callable

from hypothesis import example, given
from hypothesis import strategies as st

from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    CANCEL_KEY_BYTES_MAX,
    CANCEL_KEY_BYTES_MIN,
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    AuthenticationUnsupported,
    BackendKeyData,
    BackendMessage,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    NoticeResponse,
    ParameterStatus,
    PasswordMessage,
    ReadyForQuery,
    SASLInitialResponse,
    SASLResponse,
    Terminate,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import (
    CancelRequest,
    FirstPacket,
    GSSENCRequest,
    ProtocolVersion,
    SSLRequest,
    StartupMessage,
    parse_first_packet,
)
from proxy.wire.violations import ClientViolation, UpstreamViolation
from tests.wire.driving import frames

INT32 = st.integers(-(2**31), 2**31 - 1)
UINT16 = st.integers(0, 2**16 - 1)
STRINGS = st.binary(max_size=40).filter(lambda text: b"\0" not in text)
NAMES = STRINGS.filter(bool)
KEYS = st.binary(min_size=CANCEL_KEY_BYTES_MIN, max_size=CANCEL_KEY_BYTES_MAX).map(Secret)
FIELDS = st.lists(st.tuples(st.integers(1, 255).map(lambda byte: bytes([byte])), STRINGS)).map(
    tuple
)
SPOKEN = (0, 3, 10, 11, 12)
BACKEND: st.SearchStrategy[BackendMessage] = st.one_of(
    st.builds(AuthenticationOk),
    st.builds(AuthenticationCleartextPassword),
    st.builds(AuthenticationSASL, st.lists(NAMES).map(tuple)),
    st.builds(AuthenticationSASLContinue, st.binary()),
    st.builds(AuthenticationSASLFinal, st.binary()),
    st.builds(AuthenticationUnsupported, INT32.filter(lambda code: code not in SPOKEN)),
    st.builds(BackendKeyData, INT32, KEYS),
    st.builds(ParameterStatus, STRINGS, STRINGS),
    st.builds(ReadyForQuery, st.sampled_from([b"I", b"T", b"E"])),
    st.builds(ErrorResponse, FIELDS),
    st.builds(NoticeResponse, FIELDS),
    st.builds(NegotiateProtocolVersion, st.integers(0, 2**32 - 1), st.lists(STRINGS).map(tuple)),
)
# What the proxy says upstream, and its payload spelled by hand.
FRONTEND: st.SearchStrategy[tuple[PasswordMessage | SASLInitialResponse | SASLResponse, bytes]] = (
    st.one_of(
        STRINGS.map(lambda text: (PasswordMessage(Secret(text)), text + b"\0")),
        st.tuples(NAMES, st.binary(max_size=300)).map(
            lambda pair: (
                SASLInitialResponse(*pair),
                pair[0] + b"\0" + len(pair[1]).to_bytes(4, "big") + pair[1],
            )
        ),
        st.binary(max_size=300).map(lambda proof: (SASLResponse(proof), proof)),
    )
)
FIRST: st.SearchStrategy[FirstPacket] = st.one_of(
    st.builds(SSLRequest),
    st.builds(GSSENCRequest),
    st.builds(CancelRequest, INT32, KEYS),
    st.builds(
        StartupMessage,
        st.builds(ProtocolVersion, st.just(3), UINT16),
        st.lists(st.tuples(NAMES, STRINGS)).map(tuple),
    ),
)


@given(BACKEND)
def test_a_backend_message_reads_back(message: BackendMessage) -> None:
    wire = message.encode()
    [frame] = frames(wire)
    assert decode_backend(frame) == message
    assert frame.encode() == wire


@given(st.lists(FRONTEND, max_size=4), st.integers(1, 50))
def test_what_goes_upstream_is_framed_as_it_was_meant(
    said: list[tuple[PasswordMessage | SASLInitialResponse | SASLResponse, bytes]],
    piece_bytes: int,
) -> None:
    stream = b"".join(message.encode() for message, _ in said) + Terminate().encode()
    reader, found = MessageReader(limit=1000), list[Frame]()
    for at in range(0, len(stream), piece_bytes):
        reader.feed(stream[at : at + piece_bytes])
        while (frame := reader.next()) is not None:
            found.append(frame)
    expected = [Frame(b"p", payload) for _, payload in said]
    assert found == [*expected, Frame(b"X", b"")]
    assert reader.trailing_data() == b""


@given(FIRST)
def test_a_first_packet_reads_back(packet: FirstPacket) -> None:
    wire = packet.encode()
    assert int.from_bytes(wire[:4], "big") == len(wire)
    assert parse_first_packet(wire) == packet


def result_of(decode: Callable[[], object], kind: type[Exception]) -> object | None:
    """Return what was decoded, None for the documented violation; nothing else may come out."""
    try:
        return decode()
    except kind:
        return None


@given(st.sampled_from(b"RKSZENvAT\0\xff"), st.binary(max_size=300))
@example(ord("E"), b"\0\0")
@example(ord("R"), b"\0\0\0\x0a\0\0")
@example(ord("v"), b"\0\3\0\0\xff\xff\xff\xff")
def test_a_payload_is_read_to_the_last_byte_or_is_a_violation(kind: int, payload: bytes) -> None:
    frame = Frame(bytes([kind]), payload)
    message = result_of(lambda: decode_backend(frame), UpstreamViolation)
    if message is None or isinstance(message, AuthenticationUnsupported):
        return  # the payload of an unsupported method is not kept
    assert isinstance(message, BackendMessage | Frame)
    assert message.encode() == frame.encode()


HEADS = st.sampled_from([b"\x04\xd2\x16\x2e", b"\0\3\0\0", b"\0\3\0\2", b"\0\3\x27\x0f"])
BODIES = st.lists(st.sampled_from([b"user", b"a", b"\0", b"\0\0", b"options", b"\xff"])).map(
    b"".join
)


@given(st.one_of(HEADS, st.binary(min_size=4, max_size=4)), st.one_of(BODIES, st.binary()))
@example(b"\0\3\0\0", b"user\0a\0\0\0")
def test_a_first_packet_is_read_to_the_last_byte_or_is_a_violation(
    head: bytes, body: bytes
) -> None:
    packet = (8 + len(body)).to_bytes(4, "big") + head + body
    message = result_of(lambda: parse_first_packet(packet), ClientViolation)
    if isinstance(message, StartupMessage | CancelRequest):
        assert message.encode() == packet


@given(st.text(), st.text(), st.text(), st.text())
def test_w48_a_refusal_has_its_fields_whatever_the_texts(
    sqlstate: str, text: str, detail: str, hint: str
) -> None:
    [frame] = frames(ErrorResponse.fatal(sqlstate, text, detail, hint).encode())
    error = decode_backend(frame)
    assert isinstance(error, ErrorResponse)
    kinds = [kind for kind, _ in error.fields]
    assert kinds == [b"S", b"V", b"C", b"M"] + [b"D"] * bool(detail) + [b"H"] * bool(hint)
    assert error.severity == "FATAL"
