"""The messages of a session's startup, in one table: the name and the layout of each.

Only messages that the proxy itself writes or reads are here. After ReadyForQuery a session is
opaque bytes and uses none of them. Names and layouts: PostgreSQL documentation, "Message Formats".

Values stay bytes: PostgreSQL does not define the encoding of a peer that has not logged in yet.
Integers are big-endian and, unless stated otherwise, 32 bits wide.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct, error
from typing import Final, TypeVar

from proxy.wire.secret import Secret
from proxy.wire.violations import UpstreamViolation

INT32: Final = Struct("!i")
UINT32: Final = Struct("!I")
_HEADER: Final = Struct("!cI")

# libpq refuses longer keys (fe-protocol3.c, MAX_CANCEL_KEY_LEN); 4 is what protocol 3.0 has.
CANCEL_KEY_BYTES_MIN: Final = 4
CANCEL_KEY_BYTES_MAX: Final = 256

IDLE: Final = b"I"
IN_TRANSACTION: Final = b"T"
IN_FAILED_TRANSACTION: Final = b"E"
_TRANSACTION_STATUSES: Final = (IDLE, IN_TRANSACTION, IN_FAILED_TRANSACTION)


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole message that is not interpreted: its type byte and its payload.

    Its `repr` omits the payload, which may be a password and is in any case the client's data.
    """

    type: bytes
    payload: bytes

    def __repr__(self) -> str:
        return f"Frame({self.type!r}, {len(self.payload)} bytes)"

    def encode(self) -> bytes:
        """Return the bytes as they were on the wire."""
        return _HEADER.pack(self.type, len(self.payload) + 4) + self.payload


def _message(type_byte: bytes, payload: bytes) -> bytes:
    return _HEADER.pack(type_byte, len(payload) + 4) + payload


# -- backend messages: from a server to a client -------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuthenticationOk:
    """`R` 0: authentication succeeded."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"R", INT32.pack(0))


@dataclass(frozen=True, slots=True)
class AuthenticationCleartextPassword:
    """`R` 3: send the password in clear text."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"R", INT32.pack(3))


@dataclass(frozen=True, slots=True)
class AuthenticationSASL:
    """`R` 10: start SASL with one of these mechanisms."""

    mechanisms: tuple[bytes, ...]

    def encode(self) -> bytes:
        """Return the message's bytes."""
        names = b"".join(name + b"\0" for name in self.mechanisms)
        return _message(b"R", INT32.pack(10) + names + b"\0")


@dataclass(frozen=True, slots=True)
class AuthenticationSASLContinue:
    """`R` 11: the server's challenge."""

    data: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"R", INT32.pack(11) + self.data)


@dataclass(frozen=True, slots=True)
class AuthenticationSASLFinal:
    """`R` 12: the server's proof."""

    data: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"R", INT32.pack(12) + self.data)


@dataclass(frozen=True, slots=True)
class AuthenticationUnsupported:
    """`R` with any other code: MD5, GSS, SSPI, Kerberos, or an unknown one."""

    code: int

    @property
    def method(self) -> str:
        """The method's name in the protocol documentation, for error texts."""
        return _METHODS.get(self.code, f"number {self.code}")

    def encode(self) -> bytes:
        """Return the message's bytes (without the method's own payload, which is not kept)."""
        return _message(b"R", INT32.pack(self.code))


_METHODS: Final = {
    2: "KerberosV5",
    5: "MD5Password",
    6: "SCMCredential",
    7: "GSS",
    8: "GSSContinue",
    9: "SSPI",
}


@dataclass(frozen=True, slots=True)
class BackendKeyData:
    """`K`: what a CancelRequest for this session must contain. Both parts are opaque (W26)."""

    pid: int
    key: Secret

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"K", INT32.pack(self.pid) + self.key.reveal())


@dataclass(frozen=True, slots=True)
class ParameterStatus:
    """`S`: the current value of a run-time parameter."""

    name: bytes
    value: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"S", self.name + b"\0" + self.value + b"\0")


@dataclass(frozen=True, slots=True)
class ReadyForQuery:
    """`Z`: the server waits for a query; `status` is I, T or E."""

    status: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"Z", self.status)


@dataclass(frozen=True, slots=True)
class NegotiateProtocolVersion:
    """`v`: the newest supported version, as a full number, and the unsupported options (W11)."""

    version: int
    options: tuple[bytes, ...]

    def encode(self) -> bytes:
        """Return the message's bytes."""
        names = b"".join(name + b"\0" for name in self.options)
        return _message(b"v", UINT32.pack(self.version) + UINT32.pack(len(self.options)) + names)


@dataclass(frozen=True, slots=True)
class _Fields:
    """The body of ErrorResponse and NoticeResponse: (field type, value) pairs in order."""

    fields: tuple[tuple[bytes, bytes], ...]

    def text(self, field: bytes) -> str:
        """Return a field as text: decoded with replacement, empty if it is missing."""
        return dict(self.fields).get(field, b"").decode("utf-8", "replace")

    @property
    def severity(self) -> str:
        """The severity: `V`, which is never translated, or `S` of a server that sends no `V`."""
        return self.text(b"V") or self.text(b"S")

    @property
    def sqlstate(self) -> str:
        """The SQLSTATE: `C`, or the empty string: a faulty server may omit it (CVE-2026-6666)."""
        return self.text(b"C")

    @property
    def message(self) -> str:
        """The primary human-readable text, `M`."""
        return self.text(b"M")

    def _body(self) -> bytes:
        return b"".join(kind + value + b"\0" for kind, value in self.fields) + b"\0"


@dataclass(frozen=True, slots=True)
class ErrorResponse(_Fields):
    """`E`: an error, as fields."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"E", self._body())

    @staticmethod
    def fatal(sqlstate: str, message: str, detail: str = "", hint: str = "") -> "ErrorResponse":
        """Return an error as the proxy refuses: S = V = FATAL, C, M, and D, H if not empty."""
        named = [(b"S", "FATAL"), (b"V", "FATAL"), (b"C", sqlstate), (b"M", message)]
        named += [(kind, text) for kind, text in ((b"D", detail), (b"H", hint)) if text]
        return ErrorResponse(tuple((kind, _without_nul(value)) for kind, value in named))


@dataclass(frozen=True, slots=True)
class NoticeResponse(_Fields):
    """`N`: a notice, as fields."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"N", self._body())


def _without_nul(text: str) -> bytes:
    # A NUL would end the field early and turn the rest into further fields.
    return text.replace("\0", " ").encode("utf-8", "replace")


# -- frontend messages: from a client to a server ------------------------------------------------


@dataclass(frozen=True, slots=True)
class PasswordMessage:
    """`p` in answer to AuthenticationCleartextPassword."""

    password: Secret

    def encode(self) -> bytes:
        """Return the message's bytes. Raises ValueError for a NUL, which would truncate it."""
        if b"\0" in self.password.reveal():
            raise ValueError("a password cannot contain a NUL byte")
        return _message(b"p", self.password.reveal() + b"\0")


@dataclass(frozen=True, slots=True)
class SASLInitialResponse:
    """`p` in answer to AuthenticationSASL."""

    mechanism: bytes
    data: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"p", self.mechanism + b"\0" + INT32.pack(len(self.data)) + self.data)


@dataclass(frozen=True, slots=True)
class SASLResponse:
    """`p` in answer to AuthenticationSASLContinue."""

    data: bytes

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"p", self.data)


@dataclass(frozen=True, slots=True)
class Terminate:
    """`X`: the client ends the session."""

    def encode(self) -> bytes:
        """Return the message's bytes."""
        return _message(b"X", b"")


Authentication = (
    AuthenticationOk
    | AuthenticationCleartextPassword
    | AuthenticationSASL
    | AuthenticationSASLContinue
    | AuthenticationSASLFinal
    | AuthenticationUnsupported
)
BackendMessage = (
    Authentication
    | BackendKeyData
    | ParameterStatus
    | ReadyForQuery
    | ErrorResponse
    | NoticeResponse
    | NegotiateProtocolVersion
)


# -- decoding an upstream's messages before its ReadyForQuery ------------------------------------


def decode_backend(frame: Frame) -> BackendMessage | Frame:
    """Return the message in a frame, or the frame itself for a type that is not in the table.

    Raises UpstreamViolation if the payload does not have the layout of its type.
    """
    decode = _BACKEND.get(frame.type)
    if decode is None:
        return frame
    try:
        return decode(frame.payload)
    except (error, ValueError) as exception:
        name = frame.type.decode("ascii", "backslashreplace")
        raise UpstreamViolation(f"malformed message of type {name}: {exception}") from exception


def _decode_authentication(payload: bytes) -> Authentication:
    (code,) = INT32.unpack_from(payload)
    body = payload[4:]
    match code:
        case 0:
            return _exactly(AuthenticationOk(), body)
        case 3:
            return _exactly(AuthenticationCleartextPassword(), body)
        case 10:
            return AuthenticationSASL(tuple(_strings_until_empty(body)))
        case 11:
            return AuthenticationSASLContinue(body)
        case 12:
            return AuthenticationSASLFinal(body)
        case _:
            return AuthenticationUnsupported(code)


_Bare = TypeVar("_Bare")


def _exactly(message: _Bare, rest: bytes) -> _Bare:
    if rest:
        raise ValueError(f"{len(rest)} bytes too many")
    return message


def _decode_key(payload: bytes) -> BackendKeyData:
    (pid,) = INT32.unpack_from(payload)
    key = payload[4:]
    if not CANCEL_KEY_BYTES_MIN <= len(key) <= CANCEL_KEY_BYTES_MAX:
        raise ValueError(f"a cancel key of {len(key)} bytes")
    return BackendKeyData(pid, Secret(key))


def _decode_parameter(payload: bytes) -> ParameterStatus:
    parts = payload.split(b"\0")
    if len(parts) != 3 or parts[2]:
        raise ValueError("not a name and a value")
    return ParameterStatus(parts[0], parts[1])


def _decode_ready(payload: bytes) -> ReadyForQuery:
    if payload not in _TRANSACTION_STATUSES:
        raise ValueError("no such transaction status")
    return ReadyForQuery(payload)


def _decode_negotiation(payload: bytes) -> NegotiateProtocolVersion:
    version, count = Struct("!II").unpack_from(payload)
    names = payload[8:].split(b"\0")
    if names.pop() or len(names) != count:
        raise ValueError("the number of options is not what it says")
    return NegotiateProtocolVersion(version, tuple(names))


def _decode_error(payload: bytes) -> ErrorResponse:
    return ErrorResponse(_decode_fields(payload))


def _decode_notice(payload: bytes) -> NoticeResponse:
    return NoticeResponse(_decode_fields(payload))


def _decode_fields(payload: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((field[:1], field[1:]) for field in _strings_until_empty(payload))


def _strings_until_empty(payload: bytes) -> Iterable[bytes]:
    """Return the NUL-terminated strings of a list; an empty string must end it and the payload."""
    if payload == b"\0":
        return []
    if not payload.endswith(b"\0\0"):
        raise ValueError("no terminator")
    strings = payload[:-2].split(b"\0")
    if b"" in strings:
        raise ValueError("bytes after the terminator")
    return strings


_BACKEND: Final[dict[bytes, Callable[[bytes], BackendMessage]]] = {
    b"R": _decode_authentication,
    b"K": _decode_key,
    b"S": _decode_parameter,
    b"Z": _decode_ready,
    b"E": _decode_error,
    b"N": _decode_notice,
    b"v": _decode_negotiation,
}
