"""A connection's first packet: the only message without a type byte, in its five meanings.

PostgreSQL documentation, "Message Formats": SSLRequest, GSSENCRequest, CancelRequest and
StartupMessage share one layout, a length and a number that is either a protocol version or one of
three codes chosen not to look like a version.
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from proxy.wire.messages import CANCEL_KEY_BYTES_MAX, CANCEL_KEY_BYTES_MIN
from proxy.wire.secret import Secret
from proxy.wire.violations import (
    FEATURE_NOT_SUPPORTED,
    Answer,
    ClientReason,
    ClientViolation,
)

# W4: PostgreSQL takes 8 to 10004 and gives no answer outside; 10000 is what the packet itself
# may have (MAX_STARTUP_PACKET_LENGTH), and what the front end upstream takes at most.
FIRST_PACKET_BYTES_MIN: Final = 8
FIRST_PACKET_BYTES_MAX: Final = 10_000

LENGTH: Final = Struct("!I")
_PREFIX: Final = Struct("!IHH")
_CANCEL_PREFIX: Final = Struct("!IHHi")

_REQUEST_MAJOR: Final = 1234  # the codes' upper half
_CANCEL_MINOR: Final = 5678
_SSL_MINOR: Final = 5679
_GSSENC_MINOR: Final = 5680

# PostgreSQL answers majors 1 and 2 in the error form of those days (W10).
_OLD_MAJORS: Final = (1, 2)


class ProtocolVersion(NamedTuple):
    """A protocol version; compares as versions do."""

    major: int
    minor: int

    @property
    def number(self) -> int:
        """The version as the protocol writes it: major in the upper 16 bits."""
        return self.major << 16 | self.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


V3_0: Final = ProtocolVersion(3, 0)
V3_2: Final = ProtocolVersion(3, 2)  # 3.1 was never spoken by anything (W11)


@dataclass(frozen=True, slots=True)
class SSLRequest:
    """The peer wants TLS."""

    def encode(self) -> bytes:
        """Return the packet."""
        return _PREFIX.pack(8, _REQUEST_MAJOR, _SSL_MINOR)


@dataclass(frozen=True, slots=True)
class GSSENCRequest:
    """The peer wants GSSAPI encryption."""

    def encode(self) -> bytes:
        """Return the packet."""
        return _PREFIX.pack(8, _REQUEST_MAJOR, _GSSENC_MINOR)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The peer wants another connection's query cancelled, and shows that connection's key."""

    pid: int
    key: Secret

    def encode(self) -> bytes:
        """Return the packet: 16 bytes with a key of protocol 3.0, longer with one of 3.2 (W38)."""
        length = _CANCEL_PREFIX.size + len(self.key)
        prefix = _CANCEL_PREFIX.pack(length, _REQUEST_MAJOR, _CANCEL_MINOR, self.pid)
        return prefix + self.key.reveal()


@dataclass(frozen=True, slots=True)
class StartupMessage:
    """The peer wants a session. Parameters are in packet order, names as they were written."""

    version: ProtocolVersion
    parameters: tuple[tuple[bytes, bytes], ...]

    def get(self, name: bytes) -> bytes | None:
        """Return the parameter's value, the last one if it is repeated (W18), or None."""
        return dict(self.parameters).get(name)

    def encode(self) -> bytes:
        """Return the packet. Raises ValueError for a NUL, which would forge further parameters."""
        if any(b"\0" in part for pair in self.parameters for part in pair):
            raise ValueError("a startup parameter cannot contain a NUL byte")
        body = b"".join(name + b"\0" + value + b"\0" for name, value in self.parameters) + b"\0"
        return _PREFIX.pack(_PREFIX.size + len(body), *self.version) + body


FirstPacket = SSLRequest | GSSENCRequest | CancelRequest | StartupMessage


def parse_first_packet(packet: bytes) -> FirstPacket:
    """Return what a whole first packet, its length included, says.

    Raises ClientViolation: the layout is broken, or the version is none of 3.x. The caller has
    checked the length against the bounds above.
    """
    length, major, minor = _PREFIX.unpack_from(packet)
    if major == _REQUEST_MAJOR and minor == _CANCEL_MINOR:
        return _parse_cancel(packet)
    if major == _REQUEST_MAJOR and minor == _SSL_MINOR:
        return SSLRequest()
    if major == _REQUEST_MAJOR and minor == _GSSENC_MINOR:
        return GSSENCRequest()
    version = ProtocolVersion(major, minor)
    if major != V3_0.major:
        raise unsupported_version(version)
    return StartupMessage(version, _parse_parameters(packet[_PREFIX.size : length]))


def unsupported_version(version: ProtocolVersion) -> ClientViolation:
    """Return the violation for a version (or a request code read as one) not spoken here."""
    return ClientViolation(
        f"unsupported frontend protocol {version}: server supports {V3_0} to {V3_2}",
        reason=ClientReason.UNSUPPORTED_PROTOCOL,
        sqlstate=FEATURE_NOT_SUPPORTED,
        answer=Answer.OLD_ERROR if version.major in _OLD_MAJORS else Answer.ERROR_RESPONSE,
    )


def _parse_cancel(packet: bytes) -> CancelRequest:
    key = packet[_CANCEL_PREFIX.size :]
    if not CANCEL_KEY_BYTES_MIN <= len(key) <= CANCEL_KEY_BYTES_MAX:
        raise ClientViolation(
            "invalid length of cancel request packet",
            reason=ClientReason.INVALID_CANCEL_REQUEST,
            answer=Answer.NOTHING,  # a CancelRequest is never answered (W39)
        )
    pid = _CANCEL_PREFIX.unpack_from(packet)[3]
    return CancelRequest(pid, Secret(key))


def _parse_parameters(body: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Return the pairs of a StartupMessage's body, which one empty name ends, at the very end."""
    *strings, after = body.split(b"\0")
    names, values = strings[::2], strings[1::2]
    # A whole body has a string a NUL, an odd number of them (pairs, then the empty name), and no
    # other empty name. An empty value is legal.
    if after or len(names) != len(values) + 1 or names[-1] or b"" in names[:-1]:
        raise ClientViolation(
            "invalid startup packet layout: expected terminator as last byte",
            reason=ClientReason.STARTUP_LAYOUT,
        )
    return tuple(zip(names, values, strict=False))
