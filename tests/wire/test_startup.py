"""The first packet in its five meanings, byte for byte as the document spells them."""

from struct import pack

import pytest

from proxy.wire.secret import Secret
from proxy.wire.startup import (
    FIRST_PACKET_BYTES_MAX,
    FIRST_PACKET_BYTES_MIN,
    V3_0,
    V3_2,
    CancelRequest,
    FirstPacket,
    GSSENCRequest,
    ProtocolVersion,
    SSLRequest,
    StartupMessage,
    parse_first_packet,
    unsupported_version,
)
from proxy.wire.violations import Answer, ClientViolation
from tests.wire.driving import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    SSL_REQUEST,
    STARTUP,
    startup,
)

PACKETS: list[tuple[bytes, FirstPacket]] = [
    (SSL_REQUEST, SSLRequest()),
    (GSSENC_REQUEST, GSSENCRequest()),
    (CANCEL_REQUEST, CancelRequest(1234, Secret(b"\1\2\3\4"))),
    (
        bytes.fromhex("00 00 00 2c 04 d2 16 2e ff ff ff ff") + bytes(range(32)),
        CancelRequest(-1, Secret(bytes(range(32)))),
    ),
    (STARTUP, StartupMessage(V3_0, ((b"user", b"app"), (b"database", b"main")))),
    (
        bytes.fromhex("00 00 00 0f 00 03 00 02 75 73 65 72 00 00 00"),
        StartupMessage(V3_2, ((b"user", b""),)),
    ),
    (bytes.fromhex("00 00 00 09 00 03 00 00 00"), StartupMessage(V3_0, ())),
    (
        startup([(b"user", b"app"), (b"user", b"\xff\xfe")], (3, 9999)),
        StartupMessage(ProtocolVersion(3, 9999), ((b"user", b"app"), (b"user", b"\xff\xfe"))),
    ),
]


@pytest.mark.parametrize(("packet", "meaning"), PACKETS)
def test_a_packet_is_read_and_written_as_documented(packet: bytes, meaning: FirstPacket) -> None:
    assert parse_first_packet(packet) == meaning
    assert meaning.encode() == packet


def test_w4_the_bounds_are_the_documented_ones() -> None:
    assert (FIRST_PACKET_BYTES_MIN, FIRST_PACKET_BYTES_MAX) == (8, 10_000)


@pytest.mark.parametrize("request_packet", [SSL_REQUEST, GSSENC_REQUEST])
def test_a_request_with_a_body_is_the_same_request(request_packet: bytes) -> None:
    # As PostgreSQL: it reads the whole packet and looks at the code alone.
    longer = b"\0\0\0\x0c" + request_packet[4:] + b"body"
    assert parse_first_packet(longer) == parse_first_packet(request_packet)


def test_w9_an_unknown_request_code_is_read_as_a_version() -> None:
    with pytest.raises(ClientViolation) as caught:
        parse_first_packet(bytes.fromhex("00 00 00 08 04 d2 16 31"))
    assert caught.value.sqlstate == "0A000"
    assert caught.value.message == (
        "unsupported frontend protocol 1234.5681: server supports 3.0 to 3.2"
    )
    assert caught.value.answer is Answer.ERROR_RESPONSE


W10_VERSIONS = [
    ((2, 0), Answer.OLD_ERROR),
    ((1, 0), Answer.OLD_ERROR),
    ((1, 7), Answer.OLD_ERROR),
    ((0, 0), Answer.ERROR_RESPONSE),
    ((4, 0), Answer.ERROR_RESPONSE),
    ((1233, 5679), Answer.ERROR_RESPONSE),
    ((65535, 65535), Answer.ERROR_RESPONSE),
]


@pytest.mark.parametrize(("version", "answer"), W10_VERSIONS)
def test_w10_other_majors_are_not_spoken(version: tuple[int, int], answer: Answer) -> None:
    with pytest.raises(ClientViolation) as caught:
        parse_first_packet(startup([(b"user", b"app")], version))
    assert caught.value.reason == "unsupported_protocol"
    assert caught.value.sqlstate == "0A000"
    assert caught.value.answer is answer
    assert caught.value.message == (
        f"unsupported frontend protocol {version[0]}.{version[1]}: server supports 3.0 to 3.2"
    )
    assert unsupported_version(ProtocolVersion(*version)).message == caught.value.message


def test_w10_the_version_is_judged_before_the_layout() -> None:
    with pytest.raises(ClientViolation, match=r"protocol 2\.0"):
        parse_first_packet(startup([], (2, 0), end=b"no terminator"))


W15_BROKEN = {
    "no body at all": b"",
    "missing final NUL": b"user\0app\0",
    "no NUL anywhere": b"user",
    "one name": b"user\0",
    "name without a value": b"user\0app\0database\0",
    "value without its NUL": b"user\0app",
    "last value without its NUL": b"user\0app\0database\0main",
    "empty name before the end": b"\0x\0user\0app\0\0",
    "empty name in the middle": b"user\0app\0\0x\0\0",
    "one byte after the terminator": b"user\0app\0\0x",
    "a NUL after the terminator": b"user\0app\0\0\0",
    "two NULs after the terminator": b"user\0app\0\0\0\0",
    "only two NULs": b"\0\0",
    "only three NULs": b"\0\0\0",
    "a second packet after the terminator": b"user\0app\0\0user\0eve\0\0",
}


@pytest.mark.parametrize("name", W15_BROKEN)
def test_w15_a_broken_layout_is_refused(name: str) -> None:
    packet = startup([], end=W15_BROKEN[name])
    with pytest.raises(ClientViolation) as caught:
        parse_first_packet(packet)
    assert caught.value.message == (
        "invalid startup packet layout: expected terminator as last byte"
    )
    assert (caught.value.sqlstate, caught.value.reason) == ("08P01", "startup_layout")
    assert caught.value.answer is Answer.ERROR_RESPONSE


def test_w15_a_last_parameter_may_have_an_empty_value() -> None:
    packet = startup([(b"user", b"app"), (b"options", b"")])
    message = parse_first_packet(packet)
    assert isinstance(message, StartupMessage)
    assert message.parameters == ((b"user", b"app"), (b"options", b""))


def test_w18_of_a_repeated_parameter_the_last_counts() -> None:
    message = StartupMessage(V3_0, ((b"user", b"a"), (b"x", b"1"), (b"user", b"b")))
    assert message.get(b"user") == b"b"
    assert message.get(b"database") is None


def test_w19_names_and_values_stay_the_bytes_they_were() -> None:
    pairs = [(b"TimeZone", b"UTC"), (b"TIMEZONE", b"\xff"), (b"n\xe9", b"caf\xe9 \\ ")]
    message = parse_first_packet(startup(pairs))
    assert isinstance(message, StartupMessage)
    assert list(message.parameters) == pairs
    assert message.get(b"timezone") is None


@pytest.mark.parametrize("pair", [(b"us\0er", b"x"), (b"user", b"a\0b"), (b"user", b"\0")])
def test_a_nul_forges_no_further_parameter(pair: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="NUL"):
        StartupMessage(V3_0, ((b"user", b"app"), pair)).encode()


@pytest.mark.parametrize("size", [4, 5, 32, 255, 256])
def test_w38_a_cancel_key_may_have_4_to_256_bytes(size: int) -> None:
    key = bytes(at % 251 for at in range(size))
    packet = pack("!II", 12 + size, 80877102) + b"\x7f\xff\xff\xff" + key
    request = parse_first_packet(packet)
    assert request == CancelRequest(0x7FFFFFFF, Secret(key))
    assert request.encode() == packet


@pytest.mark.parametrize("body", [0, 1, 3, 4, 5, 7, 261, 500, 9_992])
def test_w38_a_cancel_request_of_a_wrong_length_gets_no_answer(body: int) -> None:
    packet = pack("!II", 8 + body, 80877102) + bytes(body)
    with pytest.raises(ClientViolation) as caught:
        parse_first_packet(packet)
    assert caught.value.answer is Answer.NOTHING
    assert caught.value.reason == "invalid_cancel_request"


def test_versions_compare_and_count_as_the_protocol_writes_them() -> None:
    assert V3_0 < ProtocolVersion(3, 1) < V3_2 < ProtocolVersion(3, 9999) < ProtocolVersion(4, 0)
    assert (V3_0.number, V3_2.number) == (0x00030000, 0x00030002)
    assert ProtocolVersion(3, 9999).number == 0x0003270F
    assert str(ProtocolVersion(3, 9999)) == "3.9999"
