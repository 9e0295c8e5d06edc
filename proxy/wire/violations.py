"""What a peer did wrong on the wire, and how it is told.

The two classes answer "who broke it": a `ClientViolation` is answered on the client's own
connection, an `UpstreamViolation` ends the upstream and is reported to the client as an upstream
failure. A `StateMachineMisuse` is neither: it is our own bug, a method called in a state that does
not allow it.
"""

from enum import Enum, StrEnum, unique

PROTOCOL_VIOLATION = "08P01"
FEATURE_NOT_SUPPORTED = "0A000"
INVALID_AUTHORIZATION = "28000"
INVALID_PARAMETER_VALUE = "22023"


class Answer(Enum):
    """How a client violation is answered before the connection is closed."""

    ERROR_RESPONSE = "an ErrorResponse"
    OLD_ERROR = "the error form of protocol 2.0: a text without fields"
    NOTHING = "no byte at all, as PostgreSQL does when it cannot tell who is there"


@unique
class ClientReason(StrEnum):
    """The stable word for each way in which a client breaks the protocol."""

    DIRECT_TLS = "direct_tls"
    EARLY_DATA_TOO_LONG = "early_data_too_long"
    EARLY_PLAINTEXT = "early_plaintext"
    HTTP_REQUEST = "http_request"
    INVALID_CANCEL_REQUEST = "invalid_cancel_request"
    REPLICATION_VALUE = "replication_value"
    STARTUP_LAYOUT = "startup_layout"
    STARTUP_LENGTH = "startup_length"
    STARTUP_TOO_LONG = "startup_too_long"
    UNKNOWN_PARAMETER = "unknown_parameter"
    UNSUPPORTED_PROTOCOL = "unsupported_protocol"
    USER_MISSING = "user_missing"


class Violation(Exception):
    """A peer broke the protocol. The text names what, never a value that could be a secret."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ClientViolation(Violation):
    """The client broke the protocol: `sqlstate`, stable `reason` word, and the form of answer."""

    def __init__(
        self,
        message: str,
        *,
        reason: ClientReason,
        sqlstate: str = PROTOCOL_VIOLATION,
        answer: Answer = Answer.ERROR_RESPONSE,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.sqlstate = sqlstate
        self.answer = answer


class UpstreamViolation(Violation):
    """The upstream broke the protocol before it was ready (W53)."""


class UnsupportedAuthentication(Violation):
    """The upstream asks for an authentication that a token or SCRAM cannot answer (W28)."""


class StateMachineMisuse(AssertionError):
    """A verb was called, or an event recorded, in a state whose table has no such entry."""
