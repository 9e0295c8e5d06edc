"""Keys: text to canonical bytes and back, their order, and what is refused (S1 to S3, S54)."""

from collections.abc import Mapping

import psycopg
import pytest

from proxy.emulator.cluster import DATABASE, SUPERUSER, Cluster
from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import (
    KEY_BYTES_MAX,
    KeyType,
    Normalise,
    fingerprint,
    hash_key,
    parse_key,
    show_key,
)

INT4, INT8, UUID = KeyType.INT4, KeyType.INT8, KeyType.UUID
TEXT, BYTEA, TIMESTAMPTZ = KeyType.TEXT, KeyType.BYTEA, KeyType.TIMESTAMPTZ
ZERO_UUID, FULL_UUID = "0" * 32, "f" * 32

# Canonical text and bytes, in ascending order for each type.
ENCODED: dict[KeyType, list[tuple[str, str]]] = {
    INT4: [
        ("-2147483648", "00000000"),
        ("-1", "7fffffff"),
        ("0", "80000000"),
        ("1", "80000001"),
        ("2147483647", "ffffffff"),
    ],
    INT8: [
        ("-9223372036854775808", "0000000000000000"),
        ("-1", "7fffffffffffffff"),
        ("0", "8000000000000000"),
        ("42", "800000000000002a"),
        ("9223372036854775807", "ffffffffffffffff"),
    ],
    UUID: [
        ("00000000-0000-0000-0000-000000000000", "00" * 16),
        ("00112233-4455-6677-8899-aabbccddeeff", "00112233445566778899aabbccddeeff"),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", "ff" * 16),
    ],
    TEXT: [
        (" ", "20"),
        ("-1", "2d31"),
        ("0", "30"),
        ("Z", "5a"),
        ("a", "61"),
        ("ab", "6162"),
        ("b@c", "624063"),
        ("ü", "c3bc"),
        ("🐘", "f09f9098"),
    ],
    BYTEA: [("\\x00", "00"), ("\\x0000", "0000"), ("\\x01", "01"), ("\\xff00", "ff00")],
    TIMESTAMPTZ: [
        ("0001-01-01T00:00:00+00:00", "7f23400100d44000"),
        ("1969-12-31T23:59:59.999999+00:00", "7fffffffffffffff"),
        ("1970-01-01T00:00:00+00:00", "8000000000000000"),
        ("2026-01-01T00:00:00+00:00", "8006474846204000"),
        ("9999-12-31T23:59:59.999999+00:00", "8384440ccc735fff"),
    ],
}
ALL = [(key_type, *pair) for key_type, pairs in ENCODED.items() for pair in pairs]

# Other spellings of a key: the text, and the canonical text.
SPELLINGS: list[tuple[KeyType, str, str]] = [
    (INT4, "007", "7"),
    (INT4, "-0", "0"),
    (INT4, "-007", "-7"),
    (INT8, "0" * 5000 + "1", "1"),
    (INT8, "-" + "0" * 5000, "0"),
    (UUID, "00112233445566778899AABBCCDDEEFF", "00112233-4455-6677-8899-aabbccddeeff"),
    (BYTEA, "FF00", "\\xff00"),
    (TIMESTAMPTZ, "2026-01-01T00Z", "2026-01-01T00:00:00+00:00"),
    (TIMESTAMPTZ, "2026-01-01t00:00z", "2026-01-01T00:00:00+00:00"),
    (TIMESTAMPTZ, "2026-01-01 02:00:00+02", "2026-01-01T00:00:00+00:00"),
    (TIMESTAMPTZ, "2025-12-31T18:30:00.0-0530", "2026-01-01T00:00:00+00:00"),
    (TIMESTAMPTZ, "2026-01-01T00:00:01,5+00:00:01", "2026-01-01T00:00:00.500000+00:00"),
]

SYNTAX, RANGE, INVALID = ErrorKind.KEY_SYNTAX, ErrorKind.KEY_RANGE, ErrorKind.KEY_INVALID
REFUSED: list[tuple[KeyType, str, ErrorKind]] = [
    *((INT4, text, SYNTAX) for text in ("", "-", "+7", "7 ", "--7", "1_0", "0x7", "7.0", "²", "٣")),
    (INT4, "2147483648", RANGE),
    (INT4, "-2147483649", RANGE),
    (INT8, "9223372036854775808", RANGE),
    (INT8, "-9223372036854775809", RANGE),
    (INT8, "9" * 9000, RANGE),
    (UUID, "0" * 31, SYNTAX),
    (UUID, "0" * 33, SYNTAX),
    (UUID, "0" * 31 + "g", SYNTAX),
    (UUID, "0" * 31 + " ", SYNTAX),
    (UUID, "{00112233-4455-6677-8899-aabbccddeeff}", SYNTAX),
    (UUID, "0011-22334455-6677-8899-aabbccddeeff", SYNTAX),
    (UUID, "00112233-4455-6677-8899-aabb-cddeeff", SYNTAX),
    (TEXT, "a\0b", INVALID),
    (TEXT, "\ud800", INVALID),
    (TEXT, "x" * (KEY_BYTES_MAX + 1), ErrorKind.KEY_TOO_LONG),
    (TEXT, "ü" * (KEY_BYTES_MAX // 2) + "x", ErrorKind.KEY_TOO_LONG),
    (BYTEA, "0", SYNTAX),
    (BYTEA, "\\x0", SYNTAX),
    (BYTEA, "00 00", SYNTAX),
    (BYTEA, "\\X00", SYNTAX),
    (BYTEA, "00" * (KEY_BYTES_MAX + 1), ErrorKind.KEY_TOO_LONG),
    *(
        (TIMESTAMPTZ, text, SYNTAX)
        for text in (
            *("", "infinity", "2026", "2026-01-01", "2026-01-01T00:00:00", "20260101T00Z"),
            *("2026-01-01T0:00Z", "2026-01-01T00:00:00.Z", "2026-01-01T00:00:00.0000000Z"),
            *("2026-01-01T00Z ", "2026-01-01T00+1", "2026-01-01T00+01:0", "2026-01-01T00+0100:00x"),
            *("2026-1-01T00Z", "2026-01-01_00Z", "+2026-01-01T00Z", "²026-01-01T00Z"),
        )
    ),
    *(
        (TIMESTAMPTZ, text, RANGE)
        for text in (
            *("2026-02-29T00Z", "2026-13-01T00Z", "0000-01-01T00Z", "2026-01-01T24:00Z"),
            *("2026-01-01T00:00:60Z", "2026-01-01T00+16:00", "2026-01-01T00+00:60"),
            *("2026-01-01T00+00:00:60", "0001-01-01T00+01", "9999-12-31T23-01"),
        )
    ),
]


@pytest.mark.parametrize(("key_type", "text", "encoded"), ALL)
def test_s1_a_key_is_its_canonical_bytes_and_back(
    key_type: KeyType, text: str, encoded: str
) -> None:
    assert parse_key(text, key_type).hex() == encoded
    assert show_key(bytes.fromhex(encoded), key_type) == text


@pytest.mark.parametrize("key_type", KeyType)
def test_s1_byte_order_is_value_order(key_type: KeyType) -> None:
    keys = [parse_key(text, key_type) for text, _ in ENCODED[key_type]]
    assert keys == sorted(set(keys))


@pytest.mark.parametrize("key_type", KeyType)
def test_s1_byte_order_is_postgresqls_order(
    key_type: KeyType, clusters: Mapping[str, Cluster]
) -> None:
    texts = [text for text, _ in reversed(ENCODED[key_type])]
    keys = [parse_key(text, key_type) for text in texts]
    collation = 'COLLATE "C"' if key_type is TEXT else ""
    order = "SELECT array_agg(k ORDER BY {}) FROM unnest(%s::text[], %s::bytea[]) AS t (v, k)"
    with psycopg.connect(
        host=str(clusters["one"].directory), user=SUPERUSER, dbname=DATABASE
    ) as connection:
        by_value, by_key = (
            connection.execute(order.format(term).encode(), (texts, keys)).fetchone()
            for term in (f"v::{key_type} {collation}", "k")
        )
    assert by_value == by_key == (sorted(keys),)


@pytest.mark.parametrize(("key_type", "text", "canonical"), SPELLINGS)
def test_s3_other_spellings_are_the_same_key(key_type: KeyType, text: str, canonical: str) -> None:
    assert parse_key(text, key_type) == parse_key(canonical, key_type)


@pytest.mark.parametrize(("key_type", "text", "kind"), REFUSED)
def test_s3_what_is_no_key_is_refused_by_its_kind(
    key_type: KeyType, text: str, kind: ErrorKind
) -> None:
    with pytest.raises(ProxyError) as refusal:
        parse_key(text, key_type)
    assert refusal.value.kind is kind


def test_a_refusal_does_not_show_the_key() -> None:
    for key_type in KeyType:
        with pytest.raises(ProxyError) as refusal:
            parse_key("canary-key" * 12 + "\0", key_type)
        assert "canary" not in f"{refusal.value!r} {refusal.value.response()}"


def test_texts_are_normalised_as_the_map_says() -> None:
    composed, decomposed = "\xc9", "E\u0301"
    assert parse_key("Aä" + composed, TEXT, Normalise.ASCII_LOWER).decode() == "aä\xc9"
    assert parse_key(decomposed, TEXT, Normalise.NFC) == composed.encode()
    assert parse_key(decomposed, TEXT) == decomposed.encode()


def test_the_length_that_counts_is_that_of_the_normalised_text() -> None:
    # 129 bytes as written, 86 when composed.
    assert len(parse_key("E\u0301" * 43, TEXT, Normalise.NFC)) == 86
    # U+0958 decomposes in NFC: 3 bytes become 6.
    with pytest.raises(ProxyError) as refusal:
        parse_key("\u0958" * 42, TEXT, Normalise.NFC)
    assert refusal.value.kind is ErrorKind.KEY_TOO_LONG


def test_the_longest_key_is_taken() -> None:
    assert len(parse_key("x" * KEY_BYTES_MAX, TEXT)) == KEY_BYTES_MAX
    assert len(parse_key("00" * KEY_BYTES_MAX, BYTEA)) == KEY_BYTES_MAX


def test_an_empty_text_has_no_bytes() -> None:
    assert parse_key("", TEXT) == b""
    assert parse_key("\\x", BYTEA) == b""


@pytest.mark.parametrize(
    ("bound", "key_type"),
    [(b"a\0", TEXT), (b"\xff", TEXT), (b"\1", INT4), (b"\1", UUID), (b"\xff" * 8, TIMESTAMPTZ)],
)
def test_bytes_that_are_no_key_are_shown_as_hex(bound: bytes, key_type: KeyType) -> None:
    assert show_key(bound, key_type) == "\\x" + bound.hex()


HASHES = [
    (INT4, "1", "c84a4656"),
    (INT4, "-1", "24ae0d93"),
    (INT8, "42", "99458a2f"),
    (TEXT, "tenant-1", "0a96abb3"),
]


@pytest.mark.parametrize(("key_type", "text", "expected"), HASHES)
def test_s54_hash_vectors(key_type: KeyType, text: str, expected: str) -> None:
    assert hash_key(parse_key(text, key_type)).hex() == expected


def test_s54_hashes_agree_with_sql(clusters: Mapping[str, Cluster]) -> None:
    for key_type, text, expected in HASHES:
        key = parse_key(text, key_type).hex()
        sql = f"SELECT encode(substring(sha256('\\x{key}'::bytea) for 4), 'hex')"
        assert clusters["one"].execute(sql).strip() == expected


def test_a_fingerprint_is_eight_digits_of_the_keys_sha256() -> None:
    assert fingerprint(b"tenant-1") == "0a96abb3"
