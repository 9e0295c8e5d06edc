"""The startup of a client's connection, from its first byte to ReadyForQuery.

The proxy is the server here. One state machine per connection:

    AWAIT_STARTUP --SSLRequest or ClientHello, certificate--> AWAIT_TLS
    AWAIT_TLS --handshake done--> AWAIT_STARTUP
    AWAIT_STARTUP --StartupMessage--> AWAIT_BACKEND --upstream is ready--> READY
    AWAIT_STARTUP --CancelRequest--> CANCEL
    any of these  --violation, refusal, end of stream--> FAILED

The invariants:

- The events do not depend on how the bytes were split into reads (W2), with one exception: bytes
  received together with an accepted SSLRequest are a violation, since plaintext would be taken for
  encrypted data (W3).
- A peer cannot make the machine raise: a violation is an event, `Violated`, and the last one.
- At most `FIRST_PACKET_BYTES_MAX` bytes are buffered before the StartupMessage is complete, and at
  most `EARLY_BYTES_MAX` after it.

PostgreSQL documentation, "Message Flow", sections Start-up, SSL Session Encryption, Canceling
Requests in Progress. PostgreSQL's own side: ProcessStartupPacket in backend_startup.c.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.wire.messages import (
    AuthenticationOk,
    ErrorResponse,
    NegotiateProtocolVersion,
)
from proxy.wire.startup import (
    FIRST_PACKET_BYTES_MAX,
    FIRST_PACKET_BYTES_MIN,
    LENGTH,
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
from proxy.wire.violations import (
    INVALID_AUTHORIZATION,
    INVALID_PARAMETER_VALUE,
    Answer,
    ClientReason,
    ClientViolation,
    StateMachineMisuse,
)

# What a client may send after its StartupMessage before it has an answer. Drivers that pipeline
# send a few queries. The caller stops reading far below this bound, so exceeding it is an error.
EARLY_BYTES_MAX: Final = 1024 * 1024

# The same clients come again and again with the same packet. So many are kept, and the oldest makes
# room.
ORDINARY_MAX: Final = 256

_PROTOCOL_OPTION_PREFIX: Final = b"_pq_."
_TLS_HANDSHAKE_RECORD: Final = b"\x16"
_HTTP_METHODS: Final = (b"GET ", b"POST", b"PUT ", b"HEAD", b"OPTI", b"DELE", b"CONN", b"PATC")


class ClientState(Enum):
    """The state of a client's connection."""

    __hash__ = (
        object.__hash__
    )  # that of Enum is in Python, and takes longer than the rest of a step

    AWAIT_STARTUP = auto()
    AWAIT_TLS = auto()
    AWAIT_BACKEND = auto()
    READY = auto()
    CANCEL = auto()
    FAILED = auto()


class ClientStep(Enum):
    """A transition of a client's connection: the input of the table below."""

    __hash__ = object.__hash__

    REFUSE_ENCRYPTION = auto()
    ACCEPT_TLS = auto()
    RECEIVE_HELLO = auto()
    START_TLS = auto()
    RECEIVE_STARTUP = auto()
    RECEIVE_CANCEL = auto()
    ACCEPT = auto()
    REFUSE = auto()
    VIOLATE = auto()
    DISCONNECT = auto()


# (state, step) -> state. A pair that is not here is a bug in the proxy: StateMachineMisuse. Input
# from the peer becomes a step only if the table has one for it, otherwise VIOLATE.
CLIENT_TABLE: Final[dict[tuple[ClientState, ClientStep], ClientState]] = {
    (ClientState.AWAIT_STARTUP, ClientStep.REFUSE_ENCRYPTION): ClientState.AWAIT_STARTUP,
    (ClientState.AWAIT_STARTUP, ClientStep.ACCEPT_TLS): ClientState.AWAIT_TLS,
    (ClientState.AWAIT_STARTUP, ClientStep.RECEIVE_HELLO): ClientState.AWAIT_TLS,
    (ClientState.AWAIT_STARTUP, ClientStep.RECEIVE_STARTUP): ClientState.AWAIT_BACKEND,
    (ClientState.AWAIT_STARTUP, ClientStep.RECEIVE_CANCEL): ClientState.CANCEL,
    (ClientState.AWAIT_STARTUP, ClientStep.VIOLATE): ClientState.FAILED,
    (ClientState.AWAIT_STARTUP, ClientStep.DISCONNECT): ClientState.FAILED,
    (ClientState.AWAIT_TLS, ClientStep.START_TLS): ClientState.AWAIT_STARTUP,
    (ClientState.AWAIT_TLS, ClientStep.VIOLATE): ClientState.FAILED,
    (ClientState.AWAIT_TLS, ClientStep.DISCONNECT): ClientState.FAILED,
    (ClientState.AWAIT_BACKEND, ClientStep.ACCEPT): ClientState.READY,
    (ClientState.AWAIT_BACKEND, ClientStep.REFUSE): ClientState.FAILED,
    (ClientState.AWAIT_BACKEND, ClientStep.VIOLATE): ClientState.FAILED,
    (ClientState.AWAIT_BACKEND, ClientStep.DISCONNECT): ClientState.FAILED,
}


@dataclass(frozen=True, slots=True)
class EncryptionAnswered:
    """The client requested encryption. After `S` the caller does TLS and calls `tls_started`."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class DirectTLSReceived:
    """The client began with a ClientHello (W5): start TLS with these bytes and require ALPN."""

    hello: bytes
    reply: bytes = b""


@dataclass(frozen=True, slots=True)
class VersionNegotiated:
    """The client requested an unsupported version or option; the reply names what is supported."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class StartupReceived:
    """The client requests a session; `version` is the protocol version used from here on."""

    message: StartupMessage
    version: ProtocolVersion
    reply: bytes = b""


@dataclass(frozen=True, slots=True)
class CancelReceived:
    """The client sent a CancelRequest to forward; it gets no answer (W39)."""

    request: CancelRequest
    reply: bytes = b""


@dataclass(frozen=True, slots=True)
class Violated:
    """The client broke the protocol: send the reply, which may be empty, and close."""

    violation: ClientViolation
    reply: bytes


class LastAnswer(Enum):
    """An answer that a client may not accept: then it sends nothing more, and leaves."""

    TLS_REFUSED = auto()
    GSSENC_REFUSED = auto()
    TLS_STARTED = auto()


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The client ended its stream.

    `untouched`: it had sent no byte, as a health probe does. `last_answer` is what it was answered
    last, if it has sent nothing since.
    """

    untouched: bool
    last_answer: LastAnswer | None = None
    reply: bytes = b""


ClientEvent = (
    EncryptionAnswered
    | DirectTLSReceived
    | VersionNegotiated
    | StartupReceived
    | CancelReceived
    | Violated
    | Disconnected
)


_AUTHENTICATION_OK: Final = AuthenticationOk().encode()

# What an ordinary StartupMessage means: one that is answered with nothing yet. It depends on the
# packet's bytes alone.
_ordinary: Final[dict[bytes, StartupReceived]] = {}


class ClientStartup:
    """The state machine. `tls_offered`: the listener has a certificate, so TLS can be started."""

    def __init__(self, *, tls_offered: bool = False) -> None:
        self.state = ClientState.AWAIT_STARTUP
        self._tls_offered = tls_offered
        self._ssl_done = False
        self._gssenc_done = False
        self._touched = False
        self._last_answer: LastAnswer | None = None
        self._buffer = bytearray()

    # -- input from the client -------------------------------------------------------------------

    def receive_data(self, data: bytes) -> list[ClientEvent]:
        """Process received bytes and return their events. Send the replies in order."""
        events: list[ClientEvent] = []
        if data:
            self._touched, self._last_answer = True, None
        if self.state in (ClientState.CANCEL, ClientState.FAILED):
            return events  # bytes after a CancelRequest or a refusal are ignored (W38)
        if self.state is ClientState.READY:
            raise StateMachineMisuse("a session that is ready is relayed, not parsed")
        self._buffer += data
        try:
            while self.state is ClientState.AWAIT_STARTUP:
                if self._buffer[:1] == _TLS_HANDSHAKE_RECORD:
                    self._receive_hello(events)
                    break
                packet = self._next_packet()
                if packet is None:
                    break
                self._receive_packet(packet, events)
            self._check_trailing_bytes()
        except ClientViolation as violation:
            self._move(ClientStep.VIOLATE)
            self._buffer.clear()
            events.append(Violated(violation, _answer(violation)))
        return events

    def receive_known(self, data: bytes) -> StartupReceived | None:
        """Return the only event of these bytes, if they are a packet whose meaning is known.

        Else return None: they are not received.
        """
        if self._buffer or self.state is not ClientState.AWAIT_STARTUP:
            return None
        known = _ordinary.get(data)
        if known is not None:
            self._touched, self._last_answer = True, None
            self._move(ClientStep.RECEIVE_STARTUP)
        return known

    def receive_eof(self) -> list[ClientEvent]:
        """Process the end of the client's stream."""
        if (self.state, ClientStep.DISCONNECT) not in CLIENT_TABLE:
            return []
        self._move(ClientStep.DISCONNECT)
        last_answer = None if self._buffer else self._last_answer
        return [Disconnected(untouched=not self._touched, last_answer=last_answer)]

    # -- actions of the caller -------------------------------------------------------------------

    def tls_started(self) -> None:
        """Record that the TLS handshake is done: further bytes were received encrypted."""
        self._move(ClientStep.START_TLS)
        self._last_answer = LastAnswer.TLS_STARTED

    def accept(self, welcome: bytes) -> bytes:
        """Return AuthenticationOk and the upstream's welcome messages, for one write (W24)."""
        self._move(ClientStep.ACCEPT)
        return _AUTHENTICATION_OK + welcome

    def refuse(self, error: ErrorResponse) -> bytes:
        """Return the error that ends a connection after its StartupMessage."""
        self._move(ClientStep.REFUSE)
        return error.encode()

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the StartupMessage: they are for the upstream (W3)."""
        trailing = bytes(self._buffer)
        self._buffer.clear()
        return trailing

    # -- inside ----------------------------------------------------------------------------------

    def _move(self, step: ClientStep) -> None:
        following = CLIENT_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following

    def _next_packet(self) -> bytes | None:
        """Return the next whole packet. Bytes that cannot become one are refused at once."""
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if not FIRST_PACKET_BYTES_MIN <= length <= FIRST_PACKET_BYTES_MAX:
            if bytes(self._buffer[:4]) in _HTTP_METHODS:
                raise _silent("HTTP request on the Postgres port", ClientReason.HTTP_REQUEST)
            raise _silent("invalid length of startup packet", ClientReason.STARTUP_LENGTH)
        if len(self._buffer) < length:
            return None
        packet = bytes(self._buffer[:length])
        del self._buffer[:length]
        return packet

    def _receive_hello(self, events: list[ClientEvent]) -> None:
        # Detected on the first byte: read as a length, it would be waited for in vain (W5).
        if not self._tls_offered:
            raise _silent("direct TLS where it is not offered", ClientReason.DIRECT_TLS)
        self._tls_offered = False
        self._move(ClientStep.RECEIVE_HELLO)
        events.append(DirectTLSReceived(self.trailing_data()))

    def _receive_packet(self, packet: bytes, events: list[ClientEvent]) -> None:
        match parse_first_packet(packet):
            case CancelRequest() as request:
                self._move(ClientStep.RECEIVE_CANCEL)
                self._buffer.clear()
                events.append(CancelReceived(request))
            case StartupMessage() as message:
                self._receive_startup(message, events)
                _remember(packet, events)
            case SSLRequest() | GSSENCRequest() as request:  # pragma: no branch (mypy: exhaustive)
                events.append(EncryptionAnswered(self._answer_encryption(request)))

    def _answer_encryption(self, request: FirstPacket) -> bytes:
        # Each kind at most once (W8). A repeated code is read as a version, as PostgreSQL does.
        if isinstance(request, SSLRequest):
            if self._ssl_done:
                raise unsupported_version(ProtocolVersion(1234, 5679))
            self._ssl_done = True
            if self._tls_offered:
                self._tls_offered = False
                self._gssenc_done = True  # inside TLS no further encryption can be requested
                self._move(ClientStep.ACCEPT_TLS)
                return b"S"
        else:
            if self._gssenc_done:
                raise unsupported_version(ProtocolVersion(1234, 5680))
            self._gssenc_done = True
        is_tls = isinstance(request, SSLRequest)
        self._last_answer = LastAnswer.TLS_REFUSED if is_tls else LastAnswer.GSSENC_REFUSED
        self._move(ClientStep.REFUSE_ENCRYPTION)
        return b"N"

    def _receive_startup(self, message: StartupMessage, events: list[ClientEvent]) -> None:
        # PostgreSQL's order: an invalid `replication`, then the negotiation, then a missing user.
        for name, value in message.parameters:
            if name == b"replication":
                wants_replication(value)  # every one: PostgreSQL checks repeated ones too
        negotiation = _negotiate(message)
        if negotiation is not None:
            events.append(VersionNegotiated(negotiation.encode()))
        if not message.get(b"user"):
            raise ClientViolation(
                "no PostgreSQL user name specified in startup packet",
                reason=ClientReason.USER_MISSING,
                sqlstate=INVALID_AUTHORIZATION,
            )
        self._move(ClientStep.RECEIVE_STARTUP)
        events.append(StartupReceived(message, V3_2 if message.version >= V3_2 else V3_0))

    def _check_trailing_bytes(self) -> None:
        if self.state is ClientState.AWAIT_TLS and self._buffer:
            raise ClientViolation(
                "received unencrypted data after SSL request", reason=ClientReason.EARLY_PLAINTEXT
            )
        if len(self._buffer) > EARLY_BYTES_MAX:
            raise ClientViolation(
                f"more than {EARLY_BYTES_MAX} bytes sent before the session started",
                reason=ClientReason.EARLY_DATA_TOO_LONG,
            )


def _remember(packet: bytes, events: list[ClientEvent]) -> None:
    """Keep what a small StartupMessage means, if that is the only event, and no answer."""
    match events:
        case [StartupReceived() as received] if received.message.may_be_remembered:
            if len(_ordinary) >= ORDINARY_MAX:
                del _ordinary[next(iter(_ordinary))]
            _ordinary[packet] = received
        case _:
            pass


def _silent(message: str, reason: ClientReason) -> ClientViolation:
    return ClientViolation(message, reason=reason, answer=Answer.NOTHING)


def _answer(violation: ClientViolation) -> bytes:
    match violation.answer:
        case Answer.NOTHING:
            return b""
        case Answer.OLD_ERROR:
            # elog.c, send_message_to_frontend: before 3.0, an error was a type byte and a string.
            return b"EFATAL:  " + violation.message.encode() + b"\n\0"
        case Answer.ERROR_RESPONSE:  # pragma: no branch (mypy: exhaustive)
            detail = f"reason={violation.reason}"
            return ErrorResponse.fatal(violation.sqlstate, violation.message, detail).encode()


def _negotiate(message: StartupMessage) -> NegotiateProtocolVersion | None:
    """Return the `v` to send (W11) if the minor version is newer or there is a `_pq_.` name."""
    unknown = tuple(n for n, _ in message.parameters if n.startswith(_PROTOCOL_OPTION_PREFIX))
    spoken = V3_2 if message.version >= V3_2 else V3_0
    if message.version == spoken and not unknown:
        return None
    return NegotiateProtocolVersion(spoken.number, unknown)


def wants_replication(value: bytes) -> bool:
    """Return what the value of `replication` asks for: true for a replication session.

    PostgreSQL accepts `database`, and a boolean as parse_bool reads it: any case, any unambiguous
    prefix. Raises ClientViolation for any other value (W17).
    """
    word = value.lower()
    if value == b"database" or word in (b"on", b"1"):
        return True
    if word in (b"off", b"of", b"0"):
        return False
    for full in (b"true", b"false", b"yes", b"no") if word else ():
        if full.startswith(word):
            return full in (b"true", b"yes")
    shown = value.decode("utf-8", "replace")
    raise ClientViolation(
        f'invalid value for parameter "replication": "{shown}"',
        reason=ClientReason.REPLICATION_VALUE,
        sqlstate=INVALID_PARAMETER_VALUE,
    )
