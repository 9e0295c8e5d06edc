"""Shard keys: from a text to canonical bytes whose order is the order of the values.

Not for finding a key (`key_sources`) or its target (`shard_map`). The bytes are a contract: the
catalogue and every shard's local map store them, and PostgreSQL compares them as `bytea`.

Invariant: two texts are the same key exactly if their bytes are equal. The bytes compare as
PostgreSQL compares `bytea` (byte by byte, unsigned, a prefix first), in the order of the values. An
error names the rule that was broken, never the key.

Sources: shard-map semantics, section 3 (types and encoding); RFC 9562 (UUID), ISO 8601.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, NoReturn
from uuid import UUID

from proxy.errors import ErrorKind, ProxyError

# A key is stored in every session's row and in each mapping's bounds. The longest common
# identifiers (a SHA-512 in hex) fit.
KEY_BYTES_MAX: Final = 128

HASH_BYTES: Final = 4  # the hashed key space is a uint32
_FINGERPRINT_DIGITS: Final = 8

# One more than an int8 has: longer texts are out of range, so int() need not parse 10,000 digits.
_INT_DIGITS_MAX: Final = 20

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FRACTION_DIGITS_MAX: Final = 6
_OFFSET_HOURS_MAX: Final = 15  # as in PostgreSQL


class KeyType(StrEnum):
    """The type of a shard map's keys. All keys of a map have the same type."""

    INT4 = "int4"
    INT8 = "int8"
    UUID = "uuid"
    TEXT = "text"
    BYTEA = "bytea"
    TIMESTAMPTZ = "timestamptz"


class Normalise(StrEnum):
    """Which texts are the same key; for keys of type text only."""

    NONE = "none"
    ASCII_LOWER = "ascii_lower"
    NFC = "nfc"


# The length of every key of a type; None: any length up to KEY_BYTES_MAX.
KEY_BYTES: Final[Mapping[KeyType, int | None]] = {
    KeyType.INT4: 4,
    KeyType.INT8: 8,
    KeyType.UUID: 16,
    KeyType.TEXT: None,
    KeyType.BYTEA: None,
    KeyType.TIMESTAMPTZ: 8,
}


def parse_key(text: str, key_type: KeyType, normalise: Normalise = Normalise.NONE) -> bytes:
    """Return the canonical bytes, at most KEY_BYTES_MAX, and none for an empty text or bytea.

    Raises ProxyError: KEY_SYNTAX (22P02), KEY_RANGE (22003), KEY_INVALID and KEY_TOO_LONG (22023).
    """
    return key_parser(key_type, normalise)(text)


def key_parser(key_type: KeyType, normalise: Normalise = Normalise.NONE) -> Callable[[str], bytes]:
    """Return `parse_key` for one key type; faster for a million keys."""
    if key_type is KeyType.TEXT:
        return _TEXT_ENCODERS[normalise]
    return _ENCODERS[key_type]


def show_key(key: bytes, key_type: KeyType) -> str:
    """Return the canonical text of a key: `parse_key` returns the same bytes for it.

    Bytes that are not a key of this type are shown as hex.
    """
    try:
        return _DECODERS[key_type](key)
    except (ValueError, OverflowError):
        return _show_bytea(key)


def hash_key(key: bytes) -> bytes:
    """Return a hash map's hash of a key: hash_version 1, in SQL `substring(sha256(k) for 4)`."""
    return hashlib.sha256(key).digest()[:HASH_BYTES]


def fingerprint(key: bytes) -> str:
    """Return the fingerprint that logs contain in place of a key: 8 hex digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:_FINGERPRINT_DIGITS]


class _Integer:
    """Signed integers: big-endian, sign bit flipped, so that negative ones sort first."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._bias = 1 << (8 * size_bytes - 1)

    def encode(self, text: str) -> bytes:
        digits = text[1:] if text[:1] == "-" else text
        if not (digits.isdigit() and digits.isascii()):
            raise ProxyError(ErrorKind.KEY_SYNTAX, "an integer is -?[0-9]+")
        if len(digits) > _INT_DIGITS_MAX:
            # The digits of a number that is in range; of a longer one, enough to be out of range.
            digits = digits.lstrip("0")[: _INT_DIGITS_MAX + 1] or "0"
        value = int(digits)
        return self.encode_value(value if digits is text or text[0] != "-" else -value)

    def encode_value(self, value: int) -> bytes:
        try:
            return (value + self._bias).to_bytes(self._size_bytes)
        except OverflowError:
            detail = f"an int{self._size_bytes} has {8 * self._size_bytes} bits"
            raise ProxyError(ErrorKind.KEY_RANGE, detail) from None

    def decode_value(self, key: bytes) -> int:
        if len(key) != self._size_bytes:
            raise ValueError("wrong length")
        return int.from_bytes(key) - self._bias

    def decode(self, key: bytes) -> str:
        return str(self.decode_value(key))


def _encode_uuid(text: str) -> bytes:
    digits = text
    if len(text) == 36 and text[8] == text[13] == text[18] == text[23] == "-":
        digits = text.replace("-", "")
    key = _from_hex(digits)
    if key is None or len(key) != KEY_BYTES[KeyType.UUID]:
        detail = "a uuid is 32 hex digits, plain or as 8-4-4-4-12"
        raise ProxyError(ErrorKind.KEY_SYNTAX, detail)
    return key


def _show_uuid(key: bytes) -> str:
    return str(UUID(bytes=key))


def _encode_text(text: str) -> bytes:
    if "\0" in text:
        raise ProxyError(ErrorKind.KEY_INVALID, "a text has no NUL")
    try:
        return _not_too_long(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ProxyError(ErrorKind.KEY_INVALID, "a text is valid UTF-8") from None


def _encode_lower(text: str) -> bytes:
    return _encode_text(text).lower()  # bytes.lower changes ASCII letters only


def _encode_nfc(text: str) -> bytes:
    return _encode_text(unicodedata.normalize("NFC", text))


def _show_text(key: bytes) -> str:
    if b"\0" in key:
        raise ValueError("a bound, not a key")
    return key.decode()


def _encode_bytea(text: str) -> bytes:
    key = _from_hex(text.removeprefix("\\x"))
    if key is None:
        raise ProxyError(ErrorKind.KEY_SYNTAX, "a bytea is pairs of hex digits, \\x before them")
    return _not_too_long(key)


def _show_bytea(key: bytes) -> str:
    return "\\x" + key.hex()


def _from_hex(digits: str) -> bytes | None:
    try:
        read = bytes.fromhex(digits)
    except ValueError:
        return None
    return read if 2 * len(read) == len(digits) else None  # fromhex skips whitespace


def _not_too_long(key: bytes) -> bytes:
    if len(key) > KEY_BYTES_MAX:
        raise ProxyError(ErrorKind.KEY_TOO_LONG, f"{len(key)} bytes, {KEY_BYTES_MAX} at most")
    return key


class _TimestampParser:
    """Parses a timestamp from left to right. Every method raises KEY_SYNTAX or KEY_RANGE."""

    def __init__(self, text: str) -> None:
        self._rest = text

    def take(self, marks: str) -> str:
        """Return and consume the next character if it is one of these, else return ""."""
        mark = self._rest[:1]
        if not mark or mark not in marks:
            return ""
        self._rest = self._rest[1:]
        return mark

    def expect(self, marks: str) -> str:
        """Return and consume the next character, which must be one of these."""
        mark = self.take(marks)
        if not mark:
            self._refuse()
        return mark

    def number(self, digits: int) -> int:
        """Return a number of exactly this many digits."""
        taken, self._rest = self._rest[:digits], self._rest[digits:]
        if len(taken) != digits or not (taken.isdigit() and taken.isascii()):
            self._refuse()
        return int(taken)

    def time(self) -> tuple[int, int, int, int]:
        """Return hour, minute, second and microsecond; missing parts are 0."""
        hour, minute, second, microsecond = self.number(2), 0, 0, 0
        if self.take(":"):
            minute = self.number(2)
            if self.take(":"):
                second = self.number(2)
                if self.take(".,"):
                    microsecond = self._fraction()
        return hour, minute, second, microsecond

    def offset(self) -> timedelta:
        """Return the offset from UTC, which is required."""
        sign = self.expect("Zz+-")
        if sign in "Zz":
            return timedelta(0)
        hours, minutes, seconds = self.number(2), 0, 0
        if self.take(":") or self._rest:
            minutes = self.number(2)
            if self.take(":"):
                seconds = self.number(2)
        if hours > _OFFSET_HOURS_MAX or minutes > 59 or seconds > 59:
            raise ProxyError(ErrorKind.KEY_RANGE, "an offset is less than 16:00")
        offset = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        return -offset if sign == "-" else offset

    def end(self) -> None:
        """Check that nothing follows."""
        if self._rest:
            self._refuse()

    def _fraction(self) -> int:
        digits = ""
        while digit := self.take("0123456789"):
            digits += digit
        if not 1 <= len(digits) <= _FRACTION_DIGITS_MAX:
            self._refuse()
        return int(digits.ljust(_FRACTION_DIGITS_MAX, "0"))

    def _refuse(self) -> NoReturn:
        detail = "a timestamptz is as 2026-01-31T12:00:00.000000+00:00, with an offset"
        raise ProxyError(ErrorKind.KEY_SYNTAX, detail)


def _encode_timestamp(text: str) -> bytes:
    parser = _TimestampParser(text)
    year = parser.number(4)
    parser.expect("-")
    month = parser.number(2)
    parser.expect("-")
    day = parser.number(2)
    parser.expect("Tt ")
    time = parser.time()
    offset = parser.offset()
    parser.end()
    try:
        instant = datetime(year, month, day, *time, tzinfo=UTC) - offset
    except (ValueError, OverflowError):
        detail = "no such date or time, or not of the years 1 to 9999 in UTC"
        raise ProxyError(ErrorKind.KEY_RANGE, detail) from None
    return _INT8.encode_value((instant - _EPOCH) // _MICROSECOND)


def _show_timestamp(key: bytes) -> str:
    return (_EPOCH + _INT8.decode_value(key) * _MICROSECOND).isoformat()


_INT4: Final = _Integer(4)
_INT8: Final = _Integer(8)

_ENCODERS: Final[dict[KeyType, Callable[[str], bytes]]] = {
    KeyType.INT4: _INT4.encode,
    KeyType.INT8: _INT8.encode,
    KeyType.UUID: _encode_uuid,
    KeyType.BYTEA: _encode_bytea,
    KeyType.TIMESTAMPTZ: _encode_timestamp,
}
_TEXT_ENCODERS: Final[dict[Normalise, Callable[[str], bytes]]] = {
    Normalise.NONE: _encode_text,
    Normalise.ASCII_LOWER: _encode_lower,
    Normalise.NFC: _encode_nfc,
}
_DECODERS: Final[dict[KeyType, Callable[[bytes], str]]] = {
    KeyType.INT4: _INT4.decode,
    KeyType.INT8: _INT8.decode,
    KeyType.UUID: _show_uuid,
    KeyType.TEXT: _show_text,
    KeyType.BYTEA: _show_bytea,
    KeyType.TIMESTAMPTZ: _show_timestamp,
}
