"""The message table: every layout byte for byte, and every way in which a payload can be wrong."""

import pytest

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
from proxy.wire.violations import UpstreamViolation
from tests.support.cuts import byte_by_byte, three_ways

KEY_32 = bytes(range(32))
LONGEST = 300  # no message of the table has a longer payload

# What the proxy reads: (message, its bytes).
BACKEND: list[tuple[BackendMessage, bytes]] = [
    (AuthenticationOk(), bytes.fromhex("52 00 00 00 08 00 00 00 00")),
    (AuthenticationCleartextPassword(), bytes.fromhex("52 00 00 00 08 00 00 00 03")),
    (AuthenticationUnsupported(5), bytes.fromhex("52 00 00 00 08 00 00 00 05")),
    (
        AuthenticationSASL((b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256")),
        bytes.fromhex("52 00 00 00 2a 00 00 00 0a") + b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0",
    ),
    (AuthenticationSASL(()), bytes.fromhex("52 00 00 00 09 00 00 00 0a 00")),
    (
        AuthenticationSASLContinue(b"r=abc,s=ZGVm,i=4096"),
        bytes.fromhex("52 00 00 00 1b 00 00 00 0b") + b"r=abc,s=ZGVm,i=4096",
    ),
    (AuthenticationSASLContinue(b""), bytes.fromhex("52 00 00 00 08 00 00 00 0b")),
    (AuthenticationSASLFinal(b"v=\0x"), bytes.fromhex("52 00 00 00 0c 00 00 00 0c 76 3d 00 78")),
    (
        BackendKeyData(1234, Secret(b"\1\2\3\4")),
        bytes.fromhex("4b 00 00 00 0c 00 00 04 d2 01 02 03 04"),
    ),
    (
        BackendKeyData(-1, Secret(KEY_32)),
        bytes.fromhex("4b 00 00 00 28 ff ff ff ff") + KEY_32,
    ),
    (
        BackendKeyData(0x7FFFFFFF, Secret(bytes(256))),
        bytes.fromhex("4b 00 00 01 08 7f ff ff ff") + bytes(256),
    ),
    (
        ParameterStatus(b"client_encoding", b"UTF8"),
        bytes.fromhex("53 00 00 00 19") + b"client_encoding\0UTF8\0",
    ),
    (
        ParameterStatus(b"application_name", b""),
        bytes.fromhex("53 00 00 00 16") + b"application_name\0\0",
    ),
    (ParameterStatus(b"", b""), bytes.fromhex("53 00 00 00 06 00 00")),
    (ReadyForQuery(b"I"), bytes.fromhex("5a 00 00 00 05 49")),
    (ReadyForQuery(b"T"), bytes.fromhex("5a 00 00 00 05 54")),
    (ReadyForQuery(b"E"), bytes.fromhex("5a 00 00 00 05 45")),
    (
        ErrorResponse(((b"S", b"FATAL"), (b"C", b"57P03"), (b"M", b"d\xe9marrage"))),
        bytes.fromhex("45 00 00 00 1e") + b"SFATAL\0C57P03\0Md\xe9marrage\0\0",
    ),
    (ErrorResponse(()), bytes.fromhex("45 00 00 00 05 00")),
    (
        ErrorResponse(((b"?", b""), (b"?", b""))),  # unknown, empty, repeated: all legal
        bytes.fromhex("45 00 00 00 09 3f 00 3f 00 00"),
    ),
    (
        NoticeResponse(((b"S", b"NOTICE"), (b"M", b"hi"))),
        bytes.fromhex("4e 00 00 00 11") + b"SNOTICE\0Mhi\0\0",
    ),
    # W11's table, row by row, and W12.
    (
        NegotiateProtocolVersion(0x00030000, (b"_pq_.foo",)),
        bytes.fromhex("76 00 00 00 15 00 03 00 00 00 00 00 01") + b"_pq_.foo\0",
    ),
    (
        NegotiateProtocolVersion(0x00030000, ()),
        bytes.fromhex("76 00 00 00 0c 00 03 00 00 00 00 00 00"),
    ),
    (
        NegotiateProtocolVersion(0x00030002, (b"_pq_.test_protocol_negotiation",)),
        bytes.fromhex("76 00 00 00 2b 00 03 00 02 00 00 00 01")
        + b"_pq_.test_protocol_negotiation\0",
    ),
]
BACKEND_BYTES = [wire for _, wire in BACKEND]


@pytest.mark.parametrize(("message", "wire"), BACKEND)
def test_a_backend_message_is_written_as_documented(message: BackendMessage, wire: bytes) -> None:
    assert message.encode() == wire


@pytest.mark.parametrize(("message", "wire"), BACKEND)
def test_a_backend_message_is_read_however_it_was_cut(message: BackendMessage, wire: bytes) -> None:
    for chunks in three_ways(wire):
        reader = MessageReader(LONGEST)
        frames: list[Frame] = []
        for chunk in chunks:
            reader.feed(chunk)
            while (frame := reader.next()) is not None:
                frames.append(frame)
        assert [decode_backend(frame) for frame in frames] == [message]
        assert frames[0].encode() == wire


@pytest.mark.parametrize(("message", "wire"), BACKEND)
def test_a_backend_message_ends_where_its_length_says(message: BackendMessage, wire: bytes) -> None:
    for following in (b"\0", wire, b"Z\0\0\0\5"):
        reader = MessageReader(LONGEST)
        reader.feed(wire + following)
        frame = reader.next()
        assert frame is not None
        assert decode_backend(frame) == message
        assert reader.trailing_data() == following


@pytest.mark.parametrize("wire", BACKEND_BYTES)
def test_w53_a_backend_message_cut_at_any_offset_is_no_message(wire: bytes) -> None:
    reader = MessageReader(LONGEST)
    for chunk in byte_by_byte(wire[:-1]):
        reader.feed(chunk)
        assert reader.next() is None


FRONTEND = [
    (
        PasswordMessage(Secret(b"not-a-real-secret")).encode(),
        bytes.fromhex("70 00 00 00 16") + b"not-a-real-secret\0",
    ),
    (PasswordMessage(Secret(b"")).encode(), bytes.fromhex("70 00 00 00 05 00")),
    (
        SASLInitialResponse(b"SCRAM-SHA-256", b"n,,n=,r=abc").encode(),
        bytes.fromhex("70 00 00 00 21") + b"SCRAM-SHA-256\0" + b"\0\0\0\x0b" + b"n,,n=,r=abc",
    ),
    (SASLResponse(b"c=biws").encode(), bytes.fromhex("70 00 00 00 0a") + b"c=biws"),
    (SASLResponse(b"").encode(), bytes.fromhex("70 00 00 00 04")),
    (Terminate().encode(), bytes.fromhex("58 00 00 00 04")),
]


@pytest.mark.parametrize(("written", "wire"), FRONTEND)
def test_a_frontend_message_is_written_as_documented(written: bytes, wire: bytes) -> None:
    assert written == wire


@pytest.mark.parametrize("password", [b"\0", b"not-a\0real-secret", b"not-a-real-secret\0"])
def test_a_password_with_a_nul_is_refused_and_not_shown(password: bytes) -> None:
    with pytest.raises(ValueError, match="NUL byte") as caught:
        PasswordMessage(Secret(password)).encode()
    assert "secret" not in str(caught.value)


MALFORMED = [
    # R: no code, a cut code, bytes after codes that have none, lists without an end
    (b"R", b"", "malformed message of type R"),
    (b"R", b"\0\0\0", "malformed message of type R"),
    (b"R", b"\0\0\0\0x", "1 bytes too many"),
    (b"R", b"\0\0\0\3abc", "3 bytes too many"),
    (b"R", b"\0\0\0\x0a", "no terminator"),
    (b"R", b"\0\0\0\x0aSCRAM-SHA-256\0", "no terminator"),
    (b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0x\0\0", "bytes after the terminator"),
    (b"R", b"\0\0\0\x0a\0\0", "bytes after the terminator"),
    # K: W26, a zero-length key makes clients fail
    (b"K", b"", "malformed message of type K"),
    (b"K", b"\0\0\0", "malformed message of type K"),
    (b"K", b"\0\0\0\1", "a cancel key of 0 bytes"),
    (b"K", b"\0\0\0\1abc", "a cancel key of 3 bytes"),
    (b"K", b"\0\0\0\1" + bytes(257), "a cancel key of 257 bytes"),
    # S
    (b"S", b"", "not a name and a value"),
    (b"S", b"name\0", "not a name and a value"),
    (b"S", b"name\0value", "not a name and a value"),
    (b"S", b"name\0value\0x", "not a name and a value"),
    (b"S", b"name\0value\0\0", "not a name and a value"),
    # Z
    (b"Z", b"", "no such transaction status"),
    (b"Z", b"X", "no such transaction status"),
    (b"Z", b"i", "no such transaction status"),
    (b"Z", b"II", "no such transaction status"),
    # E and N: CVE-2026-6666 and its like
    (b"E", b"", "no terminator"),
    (b"E", b"SFATAL", "no terminator"),
    (b"E", b"SFATAL\0", "no terminator"),
    (b"E", b"SFATAL\0\0x", "no terminator"),
    (b"E", b"SFATAL\0\0x\0\0", "bytes after the terminator"),
    (b"E", b"\0\0", "bytes after the terminator"),
    (b"N", b"", "no terminator"),
    (b"N", b"\0SNOTICE\0\0", "bytes after the terminator"),
    # v
    (b"v", b"", "malformed message of type v"),
    (b"v", b"\0\3\0\0\0\0\0", "malformed message of type v"),
    (b"v", b"\0\3\0\0\0\0\0\1", "the number of options"),
    (b"v", b"\0\3\0\0\0\0\0\0x\0", "the number of options"),
    (b"v", b"\0\3\0\0\0\0\0\1_pq_.foo", "the number of options"),
    (b"v", b"\0\3\0\0\0\0\0\1_pq_.foo\0x", "the number of options"),
    (b"v", b"\0\3\0\0\xff\xff\xff\xff_pq_.foo\0", "the number of options"),
]


@pytest.mark.parametrize(("type_byte", "payload", "text"), MALFORMED)
def test_w53_a_malformed_payload_is_a_violation_that_says_what(
    type_byte: bytes, payload: bytes, text: str
) -> None:
    with pytest.raises(UpstreamViolation, match=text) as caught:
        decode_backend(Frame(type_byte, payload))
    assert caught.value.message.startswith(f"malformed message of type {type_byte.decode()}: ")


@pytest.mark.parametrize("type_byte", [b"A", b"T", b"D", b"C", b"1", b"\0", b"\xff", b"W", b"z"])
def test_w25_a_message_that_is_not_in_the_table_stays_a_frame(type_byte: bytes) -> None:
    frame = Frame(type_byte, b"anything")
    assert decode_backend(frame) is frame
    assert frame.encode() == type_byte + b"\0\0\0\x0canything"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (2, "KerberosV5"),
        (5, "MD5Password"),
        (6, "SCMCredential"),
        (7, "GSS"),
        (8, "GSSContinue"),
        (9, "SSPI"),
        (1, "number 1"),
        (4, "number 4"),
        (13, "number 13"),
        (-1, "number -1"),
    ],
)
def test_w28_an_authentication_that_is_not_spoken_has_a_name(code: int, name: str) -> None:
    payload = code.to_bytes(4, "big", signed=True) + b"salt"
    message = decode_backend(Frame(b"R", payload))
    assert message == AuthenticationUnsupported(code)
    assert isinstance(message, AuthenticationUnsupported)
    assert message.method == name


def test_w27_the_bounds_of_a_cancel_key_are_the_documented_ones() -> None:
    assert (CANCEL_KEY_BYTES_MIN, CANCEL_KEY_BYTES_MAX) == (4, 256)


@pytest.mark.parametrize("size", [4, 5, 32, 255, 256])
def test_w27_a_cancel_key_is_opaque_bytes(size: int) -> None:
    key = b"\xff" * size
    assert decode_backend(Frame(b"K", b"\x80\0\0\0" + key)) == BackendKeyData(-(2**31), Secret(key))


def test_w48_a_refusal_has_s_v_c_m_d_h_and_the_final_nul() -> None:
    error = ErrorResponse.fatal("53300", "too many clients already", "reason=full", "Wait.")
    assert error.encode() == (
        bytes.fromhex("45 00 00 00 48")
        + b"SFATAL\0VFATAL\0C53300\0Mtoo many clients already\0"
        + b"Dreason=full\0HWait.\0\0"
    )


def test_w48_detail_and_hint_are_left_out_when_there_is_none() -> None:
    fields = b"SFATAL\0VFATAL\0C08006\0Mlost\0\0"
    assert ErrorResponse.fatal("08006", "lost").encode() == b"E\0\0\0\x20" + fields


def test_w48_s_v_c_and_m_are_there_even_when_empty() -> None:
    # An upstream's error may come without a text (W53); passed on as a refusal it must still have
    # the fields that clients look for.
    assert ErrorResponse.fatal("", "").encode() == b"E\0\0\0\x17SFATAL\0VFATAL\0C\0M\0\0"


def test_w48_a_nul_in_a_text_forges_no_field() -> None:
    error = ErrorResponse.fatal("08006", "a\0Cspoofed", "reason=x\0\0", "h\0")
    assert error.encode() == (
        b"E\0\0\0\x36SFATAL\0VFATAL\0C08006\0Ma Cspoofed\0Dreason=x  \0Hh \0\0"
    )


def test_w48_a_text_that_is_no_unicode_is_still_sent() -> None:
    error = ErrorResponse.fatal("08006", "half a pair: \ud800, \N{SNOWMAN}")
    assert dict(error.fields)[b"M"] == "half a pair: ?, \N{SNOWMAN}".encode()


ERROR_TEXTS = [
    ({b"S": b"FATAL", b"V": b"FATAL", b"C": b"3D000", b"M": b"no"}, "FATAL", "3D000", "no"),
    ({b"S": b"FATALE", b"V": b"FATAL", b"C": b"3D000", b"M": b"no"}, "FATAL", "3D000", "no"),
    ({b"S": b"ERROR", b"C": b"XX000", b"M": b"gateway"}, "ERROR", "XX000", "gateway"),
    ({b"S": b"FATAL", b"M": b"no code"}, "FATAL", "", "no code"),
    ({b"M": b"caf\xe9"}, "", "", "caf\N{REPLACEMENT CHARACTER}"),
    ({}, "", "", ""),
]


@pytest.mark.parametrize(("fields", "severity", "sqlstate", "text"), ERROR_TEXTS)
def test_w53_an_error_is_shown_whatever_fields_it_lacks(
    fields: dict[bytes, bytes], severity: str, sqlstate: str, text: str
) -> None:
    for kind in (ErrorResponse, NoticeResponse):
        message = kind(tuple(fields.items()))
        assert (message.severity, message.sqlstate, message.message) == (severity, sqlstate, text)


def test_an_error_is_never_taken_for_a_notice() -> None:
    fields = ((b"M", b"x"),)
    notice: object = NoticeResponse(fields)
    assert notice != ErrorResponse(fields)


def test_a_frame_shows_no_payload() -> None:
    # One that a password came in was alive in the middle of a login.
    assert repr(Frame(b"p", b"not-a-real-token\0")) == "Frame(b'p', 17 bytes)"
