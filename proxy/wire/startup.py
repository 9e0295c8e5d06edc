"""A connection's first packet, the only message without a type byte: parsing and encoding.

PostgreSQL documentation, "Message Formats": SSLRequest, GSSENCRequest, CancelRequest and
StartupMessage share one layout, a length and a number that is either a protocol version or one of
three codes that cannot be one.
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

# W4: PostgreSQL accepts lengths of 8 to 10004 and does not answer others. 10000 is the limit of the
# packet itself (MAX_STARTUP_PACKET_LENGTH), and the most that the front end upstream accepts.
FIRST_PACKET_BYTES_MIN: Final = 8
FIRST_PACKET_BYTES_MAX: Final = 10_000

# Of a message that is remembered. A packet of thousands takes 26 times its size once it is parsed.
REMEMBERED_PARAMETERS_MAX: Final = 64

LENGTH: Final = Struct("!I")
_PREFIX: Final = Struct("!IHH")
_CANCEL_PREFIX: Final = Struct("!IHHi")

_REQUEST_MAJOR: Final = 1234  # the codes' upper half
_CANCEL_MINOR: Final = 5678
_SSL_MINOR: Final = 5679
_GSSENC_MINOR: Final = 5680

# PostgreSQL answers major versions 1 and 2 in the error format of protocol 2.0 (W10).
_OLD_MAJORS: Final = (1, 2)


class ProtocolVersion(NamedTuple):
    """A protocol version; compares by major, then minor."""

    major: int
    minor: int

    @property
    def number(self) -> int:
        """The version as the protocol encodes it: major in the upper 16 bits."""
        return self.major << 16 | self.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


V3_0: Final = ProtocolVersion(3, 0)
V3_2: Final = ProtocolVersion(3, 2)  # no implementation uses 3.1 (W11)


@dataclass(frozen=True, slots=True)
class SSLRequest:
    """The peer requests TLS."""

    def encode(self) -> bytes:
        """Return the packet."""
        return _PREFIX.pack(8, _REQUEST_MAJOR, _SSL_MINOR)


@dataclass(frozen=True, slots=True)
class GSSENCRequest:
    """The peer requests GSSAPI encryption."""

    def encode(self) -> bytes:
        """Return the packet."""
        return _PREFIX.pack(8, _REQUEST_MAJOR, _GSSENC_MINOR)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The peer requests to cancel another connection's query, and sends that connection's key."""

    pid: int
    key: Secret

    def encode(self) -> bytes:
        """Return the packet: 16 bytes with a key of protocol 3.0, longer with one of 3.2 (W38)."""
        length = _CANCEL_PREFIX.size + len(self.key)
        prefix = _CANCEL_PREFIX.pack(length, _REQUEST_MAJOR, _CANCEL_MINOR, self.pid)
        return prefix + self.key.reveal()


@dataclass(frozen=True, slots=True)
class StartupMessage:
    """The peer requests a session. Parameters are in packet order, names as written."""

    version: ProtocolVersion
    parameters: tuple[tuple[bytes, bytes], ...]

    def get(self, name: bytes) -> bytes | None:
        """Return the parameter's value, the last one if it is repeated (W18), or None."""
        return dict(self.parameters).get(name)

    @property
    def may_be_remembered(self) -> bool:
        """Whether it is small, as those of drivers are."""
        return len(self.parameters) <= REMEMBERED_PARAMETERS_MAX

    def encode(self) -> bytes:
        """Return the packet. Raises ValueError for a NUL, which would inject parameters."""
        if any(b"\0" in part for pair in self.parameters for part in pair):
            raise ValueError("a startup parameter cannot contain a NUL byte")
        body = b"".join(name + b"\0" + value + b"\0" for name, value in self.parameters) + b"\0"
        return _PREFIX.pack(_PREFIX.size + len(body), *self.version) + body


FirstPacket = SSLRequest | GSSENCRequest | CancelRequest | StartupMessage


def parse_first_packet(packet: bytes) -> FirstPacket:
    """Parse a whole first packet, its length field included.

    Raises ClientViolation if the layout is invalid or the major version is not 3. The caller has
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
    """Return the violation for an unsupported version, or a request code read as a version."""
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
    """Return the pairs of a StartupMessage's body; an empty name must end them and the body."""
    *strings, after = body.split(b"\0")
    names, values = strings[::2], strings[1::2]
    # In a valid body a NUL ends each string; the number of strings is odd (pairs, then the empty
    # name); and no other name is empty. An empty value is legal.
    if after or len(names) != len(values) + 1 or names[-1] or b"" in names[:-1]:
        raise ClientViolation(
            "invalid startup packet layout: expected terminator as last byte",
            reason=ClientReason.STARTUP_LAYOUT,
        )
    return tuple(zip(names, values, strict=False))
