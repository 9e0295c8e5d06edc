"""The startup of an upstream connection, from SSLRequest to ReadyForQuery.

The proxy is the client here. One state machine per connection attempt (a dial):

    AWAIT_SSL_REPLY --S--> AWAIT_TLS --handshake done--> AWAIT_AUTHENTICATION
    AWAIT_AUTHENTICATION --AuthenticationOk--> AWAIT_READY --ReadyForQuery--> READY
    any of these --error, violation, end of stream--> FAILED

The invariants:

- No password is sent before TLS: authentication can be answered only in states after it, and an
  upstream that answers N to SSLRequest ends the dial (W52).
- A password is sent once. Any other authentication request is refused by its name (W28).
- The messages between AuthenticationOk and ReadyForQuery are kept verbatim and in order (W25).
- A hostile upstream can make it buffer at most `HELD_BYTES_MAX` plus one message (W53).

PostgreSQL documentation, "Message Flow", section Start-up.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from proxy.wire.framing import MessageReader
from proxy.wire.messages import (
    AuthenticationCleartextPassword,
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    AuthenticationUnsupported,
    BackendKeyData,
    ErrorResponse,
    Frame,
    NegotiateProtocolVersion,
    NoticeResponse,
    PasswordMessage,
    ReadyForQuery,
    SASLInitialResponse,
    SASLResponse,
    decode_backend,
)
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, SSLRequest, StartupMessage
from proxy.wire.violations import (
    StateMachineMisuse,
    UnsupportedAuthentication,
    UpstreamViolation,
)

# W53. PostgreSQL sends about 1 KiB at startup; notices of login triggers may add some.
HELD_MESSAGE_BYTES_MAX: Final = 64 * 1024
HELD_BYTES_MAX: Final = 256 * 1024
# Of an error outside TLS, for the log. PostgreSQL's, such as "out of memory", are shorter (W52).
PLAINTEXT_BYTES_MAX: Final = 512


class UpstreamState(Enum):
    """The state of a dial."""

    AWAIT_SSL_REPLY = auto()
    AWAIT_TLS = auto()
    AWAIT_AUTHENTICATION = auto()
    AWAIT_READY = auto()
    READY = auto()
    FAILED = auto()


class UpstreamStep(Enum):
    """A transition of a dial: the input of the table below."""

    ACCEPT_TLS = auto()
    START_TLS = auto()
    REQUEST_AUTHENTICATION = auto()
    AUTHENTICATE = auto()
    HOLD = auto()
    BECOME_READY = auto()
    FAIL = auto()


# (state, step) -> state. Input from the upstream is a step only if the table has one for it;
# otherwise it is an UpstreamViolation. A method call without one is our bug: StateMachineMisuse.
UPSTREAM_TABLE: Final[dict[tuple[UpstreamState, UpstreamStep], UpstreamState]] = {
    (UpstreamState.AWAIT_SSL_REPLY, UpstreamStep.ACCEPT_TLS): UpstreamState.AWAIT_TLS,
    (UpstreamState.AWAIT_SSL_REPLY, UpstreamStep.FAIL): UpstreamState.FAILED,
    (UpstreamState.AWAIT_TLS, UpstreamStep.START_TLS): UpstreamState.AWAIT_AUTHENTICATION,
    (UpstreamState.AWAIT_TLS, UpstreamStep.FAIL): UpstreamState.FAILED,
    (
        UpstreamState.AWAIT_AUTHENTICATION,
        UpstreamStep.REQUEST_AUTHENTICATION,
    ): UpstreamState.AWAIT_AUTHENTICATION,
    (UpstreamState.AWAIT_AUTHENTICATION, UpstreamStep.HOLD): UpstreamState.AWAIT_AUTHENTICATION,
    (UpstreamState.AWAIT_AUTHENTICATION, UpstreamStep.AUTHENTICATE): UpstreamState.AWAIT_READY,
    (UpstreamState.AWAIT_AUTHENTICATION, UpstreamStep.FAIL): UpstreamState.FAILED,
    (UpstreamState.AWAIT_READY, UpstreamStep.HOLD): UpstreamState.AWAIT_READY,
    (UpstreamState.AWAIT_READY, UpstreamStep.BECOME_READY): UpstreamState.READY,
    (UpstreamState.AWAIT_READY, UpstreamStep.FAIL): UpstreamState.FAILED,
}


@dataclass(frozen=True, slots=True)
class TLSAccepted:
    """The upstream answered S: start TLS, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class TLSRefused:
    """The upstream answered N: the dial is over."""


@dataclass(frozen=True, slots=True)
class PasswordRequested:
    """Answer with `password`."""


@dataclass(frozen=True, slots=True)
class SASLRequested:
    """Answer with `sasl_initial_response`, with one of these mechanisms."""

    mechanisms: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SASLContinued:
    """Answer with `sasl_response`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class SASLFinished:
    """Check the server's proof."""

    data: bytes


@dataclass(frozen=True, slots=True)
class UpstreamReady:
    """The session can be handed to the client: see `key`, `welcome`, `trailing_data`."""


@dataclass(frozen=True, slots=True)
class UpstreamRefused:
    """The upstream sent an ErrorResponse; `raw` is the whole message, byte for byte."""

    error: ErrorResponse
    raw: bytes


@dataclass(frozen=True, slots=True)
class UpstreamViolated:
    """The upstream broke the protocol or requested an unsupported authentication method."""

    violation: UpstreamViolation | UnsupportedAuthentication


@dataclass(frozen=True, slots=True)
class UpstreamDisconnected:
    """The upstream ended its stream before ReadyForQuery."""


UpstreamEvent = (
    TLSAccepted
    | TLSRefused
    | PasswordRequested
    | SASLRequested
    | SASLContinued
    | SASLFinished
    | UpstreamReady
    | UpstreamRefused
    | UpstreamViolated
    | UpstreamDisconnected
)

Authentication = type[
    AuthenticationOk
    | AuthenticationCleartextPassword
    | AuthenticationSASL
    | AuthenticationSASLContinue
    | AuthenticationSASLFinal
]


class UpstreamStartup:
    """The state machine. `key` is the upstream's BackendKeyData, None if it sent none (W26).

    `plaintext` is the beginning of an error sent in place of TLS. It is for the log only.
    """

    def __init__(self) -> None:
        self.state = UpstreamState.AWAIT_SSL_REPLY
        self.key: BackendKeyData | None = None
        self.plaintext = b""
        self._reader = MessageReader(HELD_MESSAGE_BYTES_MAX)
        self._before_key: list[bytes] = []
        self._held: list[bytes] = self._before_key
        self._held_bytes = 0
        self._next_expected: frozenset[Authentication] = frozenset(
            (AuthenticationOk, AuthenticationCleartextPassword, AuthenticationSASL)
        )
        self._unanswered: set[type[UpstreamEvent]] = set()

    # -- input from the upstream -----------------------------------------------------------------

    def receive_data(self, data: bytes) -> list[UpstreamEvent]:
        """Process received bytes and return their events."""
        if self.state is UpstreamState.FAILED or not data:
            return []
        if self.state is UpstreamState.READY:
            raise StateMachineMisuse("a session that is ready is relayed, not parsed")
        events: list[UpstreamEvent] = []
        try:
            if self.state is UpstreamState.AWAIT_SSL_REPLY:
                events.append(self._receive_ssl_reply(data))
            elif self.state is UpstreamState.AWAIT_TLS:
                raise UpstreamViolation("plaintext after the answer to SSLRequest")
            else:
                self._receive_messages(data, events)
        except (UpstreamViolation, UnsupportedAuthentication) as violation:
            self._move(UpstreamStep.FAIL)
            events.append(UpstreamViolated(violation))
        return events

    def receive_eof(self) -> list[UpstreamEvent]:
        """Process the end of the upstream's stream."""
        if (self.state, UpstreamStep.FAIL) not in UPSTREAM_TABLE:
            return []
        self._move(UpstreamStep.FAIL)
        return [UpstreamDisconnected()]

    # -- messages that the caller sends ----------------------------------------------------------

    def request_tls(self) -> bytes:
        """Return SSLRequest. Send nothing else until it is answered (W52)."""
        self._require(UpstreamState.AWAIT_SSL_REPLY)
        return SSLRequest().encode()

    def tls_started(self) -> None:
        """Record that the TLS handshake is done and the certificate verified."""
        self._move(UpstreamStep.START_TLS)

    def startup(self, message: StartupMessage) -> bytes:
        """Return the StartupMessage. Its version must be 3.0: front ends accept no other."""
        self._require(UpstreamState.AWAIT_AUTHENTICATION)
        if message.version != V3_0:
            raise StateMachineMisuse("upstream connections use exactly 3.0")
        return message.encode()

    def password(self, password: Secret) -> bytes:
        """Return the PasswordMessage that answers PasswordRequested."""
        self._answer(PasswordRequested)
        return PasswordMessage(password).encode()

    def sasl_initial_response(self, mechanism: bytes, data: bytes) -> bytes:
        """Return the message that answers SASLRequested."""
        self._answer(SASLRequested)
        return SASLInitialResponse(mechanism, data).encode()

    def sasl_response(self, data: bytes) -> bytes:
        """Return the message that answers SASLContinued."""
        self._answer(SASLContinued)
        return SASLResponse(data).encode()

    # -- messages for the client -----------------------------------------------------------------

    def welcome(self, key: BackendKeyData | None) -> bytes:
        """Return the messages after AuthenticationOk, up to and including ReadyForQuery.

        `key` takes the position of the upstream's BackendKeyData, if it sent one (W25, W27).
        """
        self._require(UpstreamState.READY)
        middle = key.encode() if key is not None and self.key is not None else b""
        after = b"" if self._held is self._before_key else b"".join(self._held)
        return b"".join(self._before_key) + middle + after

    def trailing_data(self) -> bytes:
        """Remove and return the bytes after the upstream's ReadyForQuery."""
        return self._reader.trailing_data()

    # -- inside ----------------------------------------------------------------------------------

    def _require(self, state: UpstreamState) -> None:
        if self.state is not state:
            raise StateMachineMisuse(f"not in {self.state.name}, only in {state.name}")

    def _answer(self, request: type[UpstreamEvent]) -> None:
        # Independent of the state: a message in the same read as the request, for example an
        # ErrorResponse, changes the state before the caller sees the request.
        if request not in self._unanswered:
            raise StateMachineMisuse(f"no {request.__name__} is waiting for an answer")
        self._unanswered.remove(request)

    def _move(self, step: UpstreamStep) -> None:
        following = UPSTREAM_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following

    def _receive_ssl_reply(self, data: bytes) -> UpstreamEvent:
        answer, rest = data[:1], data[1:]
        if answer == b"S" and not rest:
            self._move(UpstreamStep.ACCEPT_TLS)
            return TLSAccepted()
        if answer == b"S":
            raise UpstreamViolation("bytes after the answer to SSLRequest, outside TLS")
        if answer == b"N":
            self._move(UpstreamStep.FAIL)
            return TLSRefused()
        if answer == b"E":
            # Not authenticated: anyone could have sent this text. It may be logged, not trusted.
            self.plaintext = rest[:PLAINTEXT_BYTES_MAX]
            raise UpstreamViolation("an error in plaintext instead of TLS")
        raise UpstreamViolation("an answer to SSLRequest that is neither S nor N")

    def _receive_messages(self, data: bytes, events: list[UpstreamEvent]) -> None:
        self._reader.feed(data)
        while self.state in (UpstreamState.AWAIT_AUTHENTICATION, UpstreamState.AWAIT_READY):
            is_started = self.state is UpstreamState.AWAIT_READY
            if is_started and (parameters := self._reader.take_parameters()):
                self._hold(parameters)
            frame = self._reader.next()
            if frame is None:
                break
            event = self._receive_message(frame)
            if event is not None:
                events.append(event)

    def _receive_message(self, frame: Frame) -> UpstreamEvent | None:
        message = decode_backend(frame)
        if isinstance(message, ErrorResponse):
            self._move(UpstreamStep.FAIL)
            return UpstreamRefused(message, frame.encode())
        if isinstance(message, NoticeResponse):  # may come at any time (W30)
            self._hold(frame.encode())
            return None
        if isinstance(message, NegotiateProtocolVersion):
            if message.version != V3_0.number:
                raise UpstreamViolation("a protocol version that was not requested")
            return None
        if self.state is UpstreamState.AWAIT_AUTHENTICATION:
            return self._receive_authentication(message)
        return self._receive_held(message, frame)

    def _receive_authentication(self, message: object) -> UpstreamEvent | None:
        if isinstance(message, AuthenticationUnsupported):
            raise UnsupportedAuthentication(message.method)
        expected: tuple[Authentication, ...]
        event: UpstreamEvent | None
        match message:
            case AuthenticationOk():
                expected, event = (), None
            case AuthenticationCleartextPassword():
                expected, event = (AuthenticationOk,), PasswordRequested()
            case AuthenticationSASL(mechanisms):
                expected, event = (AuthenticationSASLContinue,), SASLRequested(mechanisms)
            case AuthenticationSASLContinue(data):
                expected, event = (AuthenticationSASLFinal,), SASLContinued(data)
            case AuthenticationSASLFinal(data):
                expected, event = (AuthenticationOk,), SASLFinished(data)
            case _:
                raise UpstreamViolation("a message that is not allowed before AuthenticationOk")
        if type(message) not in self._next_expected:
            raise UnsupportedAuthentication(f"{type(message).__name__} out of order")
        self._next_expected = frozenset(expected)
        self._move(UpstreamStep.REQUEST_AUTHENTICATION if event else UpstreamStep.AUTHENTICATE)
        if event is not None:
            self._unanswered.add(type(event))
        return event

    def _receive_held(self, message: object, frame: Frame) -> UpstreamEvent | None:
        if isinstance(message, BackendKeyData):
            if self.key is not None:
                raise UpstreamViolation("a second BackendKeyData")
            self.key, self._held = message, []
            return None
        if frame.type == b"R":
            raise UpstreamViolation("an authentication request after AuthenticationOk")
        self._hold(frame.encode())
        if isinstance(message, ReadyForQuery):
            self._move(UpstreamStep.BECOME_READY)
            return UpstreamReady()
        return None

    def _hold(self, raw: bytes) -> None:
        self._held_bytes += len(raw)
        if self._held_bytes > HELD_BYTES_MAX:
            raise UpstreamViolation(f"more than {HELD_BYTES_MAX} bytes before ReadyForQuery")
        self._move(UpstreamStep.HOLD)
        self._held.append(raw)
