"""The start of an upstream connection, from SSLRequest until it is ready for a query.

The proxy is the client here. One machine a dial:

    AWAIT_SSL_REPLY --S--> AWAIT_TLS --handshake done--> AWAIT_AUTHENTICATION
    AWAIT_AUTHENTICATION --AuthenticationOk--> AWAIT_READY --ReadyForQuery--> READY
    any of these --error, violation, end of stream--> FAILED

The invariants:

- No password leaves before TLS: the verbs that answer an authentication exist only behind it, and
  an upstream that answers N to SSLRequest has ended the dial (W52).
- A password is given once. Whatever else an upstream asks for is unsupported, by name (W28).
- What comes between AuthenticationOk and ReadyForQuery is kept as it is and in its order (W25).
- A hostile upstream makes it hold at most `HELD_BYTES_MAX` plus one message (W53).

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

# W53. A session's start is about 1 KiB in PostgreSQL; login-trigger notices may add some.
HELD_MESSAGE_BYTES_MAX: Final = 64 * 1024
HELD_BYTES_MAX: Final = 256 * 1024
# Of an error outside TLS, for the log: PostgreSQL's "out of memory" and the like are shorter (W52).
PLAINTEXT_BYTES_MAX: Final = 512


class UpstreamState(Enum):
    """Where a dial stands."""

    AWAIT_SSL_REPLY = auto()
    AWAIT_TLS = auto()
    AWAIT_AUTHENTICATION = auto()
    AWAIT_READY = auto()
    READY = auto()
    FAILED = auto()


class UpstreamStep(Enum):
    """What moves a dial on: the input of the table below."""

    ACCEPT_TLS = auto()
    START_TLS = auto()
    REQUEST_AUTHENTICATION = auto()
    AUTHENTICATE = auto()
    HOLD = auto()
    BECOME_READY = auto()
    FAIL = auto()


# (state, step) -> state. What an upstream sends is a step only where the table has one for it;
# anything else is an UpstreamViolation. A verb without an entry is our bug: StateMachineMisuse.
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
    """The upstream answered S: start TLS now, then call `tls_started`."""


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
    """The session may be given to the client: see `key`, `welcome`, `trailing_data`."""


@dataclass(frozen=True, slots=True)
class UpstreamRefused:
    """The upstream sent an ErrorResponse; `raw` is it, byte for byte."""

    error: ErrorResponse
    raw: bytes


@dataclass(frozen=True, slots=True)
class UpstreamViolated:
    """The upstream broke the protocol, or wants an authentication that is not spoken here."""

    violation: UpstreamViolation | UnsupportedAuthentication


@dataclass(frozen=True, slots=True)
class UpstreamDisconnected:
    """The upstream ended its stream before it was ready."""


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
    """The machine. `key` is what the upstream gave for cancel requests, None if nothing (W26).

    `plaintext` is the start of an error that came in place of TLS: for the log, for nobody else.
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

    # -- what arrives ----------------------------------------------------------------------------

    def receive_data(self, data: bytes) -> list[UpstreamEvent]:
        """Take bytes as they arrived and return what they mean."""
        if self.state is UpstreamState.FAILED or not data:
            return []
        if self.state is UpstreamState.READY:
            raise StateMachineMisuse("a session that is ready is relayed, not parsed")
        events: list[UpstreamEvent] = []
        try:
            if self.state is UpstreamState.AWAIT_SSL_REPLY:
                events.append(self._receive_ssl_reply(data))
            elif self.state is UpstreamState.AWAIT_TLS:
                raise UpstreamViolation("plaintext behind the answer to SSLRequest")
            else:
                self._receive_messages(data, events)
        except (UpstreamViolation, UnsupportedAuthentication) as violation:
            self._move(UpstreamStep.FAIL)
            events.append(UpstreamViolated(violation))
        return events

    def receive_eof(self) -> list[UpstreamEvent]:
        """Take the end of the upstream's stream."""
        if (self.state, UpstreamStep.FAIL) not in UPSTREAM_TABLE:
            return []
        self._move(UpstreamStep.FAIL)
        return [UpstreamDisconnected()]

    # -- what the owner sends --------------------------------------------------------------------

    def request_tls(self) -> bytes:
        """Return SSLRequest, which goes out alone (W52)."""
        self._require(UpstreamState.AWAIT_SSL_REPLY)
        return SSLRequest().encode()

    def tls_started(self) -> None:
        """Record that the TLS handshake is done and the certificate verified."""
        self._move(UpstreamStep.START_TLS)

    def startup(self, message: StartupMessage) -> bytes:
        """Return the StartupMessage. Its version must be 3.0: front ends take no other."""
        self._require(UpstreamState.AWAIT_AUTHENTICATION)
        if message.version != V3_0:
            raise StateMachineMisuse("the upstream hop speaks exactly 3.0")
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

    # -- what the client gets --------------------------------------------------------------------

    def welcome(self, key: BackendKeyData | None) -> bytes:
        """Return all that belongs between AuthenticationOk and the client's first query.

        `key` stands where the upstream's BackendKeyData stood, if it sent one (W25, W27).
        """
        self._require(UpstreamState.READY)
        middle = key.encode() if key is not None and self.key is not None else b""
        after = b"" if self._held is self._before_key else b"".join(self._held)
        return b"".join(self._before_key) + middle + after

    def trailing_data(self) -> bytes:
        """Take out what the upstream sent behind its ReadyForQuery."""
        return self._reader.trailing_data()

    # -- inside ----------------------------------------------------------------------------------

    def _require(self, state: UpstreamState) -> None:
        if self.state is not state:
            raise StateMachineMisuse(f"not in {self.state.name}, only in {state.name}")

    def _answer(self, request: type[UpstreamEvent]) -> None:
        # Not bound to a state: what came in one read with the question, an ErrorResponse perhaps,
        # has moved the machine on before its owner hears of the request.
        if request not in self._unanswered:
            raise StateMachineMisuse(f"no {request.__name__} is waiting for an answer")
        self._unanswered.remove(request)

    def _move(self, step: UpstreamStep) -> None:
        following = UPSTREAM_TABLE.get((self.state, step))
        if following is None:
            raise StateMachineMisuse(f"{step.name} in {self.state.name}")
        self.state = following

    def _receive_ssl_reply(self, data: bytes) -> UpstreamEvent:
        answer, behind = data[:1], data[1:]
        if answer == b"S" and not behind:
            self._move(UpstreamStep.ACCEPT_TLS)
            return TLSAccepted()
        if answer == b"S":
            raise UpstreamViolation("bytes behind the answer to SSLRequest, outside TLS")
        if answer == b"N":
            self._move(UpstreamStep.FAIL)
            return TLSRefused()
        if answer == b"E":
            # Not authenticated, so anybody's text: it may be logged, never believed.
            self.plaintext = behind[:PLAINTEXT_BYTES_MAX]
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
                raise UpstreamViolation("a protocol version that was not asked for")
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
                raise UpstreamViolation("a message that has no place before AuthenticationOk")
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
            raise UpstreamViolation("an authentication request behind AuthenticationOk")
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
