"""Protocol violations by a peer, and how each is answered.

The class states which side broke the protocol: a `ClientViolation` is answered on the client's own
connection; an `UpstreamViolation` ends the upstream connection and is reported to the client as an
upstream failure. A `StateMachineMisuse` is neither: it is a bug in the proxy, a method called in a
state that does not allow it.
"""

from enum import Enum, StrEnum, unique

PROTOCOL_VIOLATION = "08P01"
FEATURE_NOT_SUPPORTED = "0A000"
INVALID_AUTHORIZATION = "28000"
INVALID_PARAMETER_VALUE = "22023"


class Answer(Enum):
    """How a client violation is answered before the connection is closed."""

    ERROR_RESPONSE = "an ErrorResponse"
    OLD_ERROR = "the error format of protocol 2.0: a text without fields"
    NOTHING = "no byte at all, as PostgreSQL does when it does not recognize the protocol"


@unique
class ClientReason(StrEnum):
    """The stable reason word for each kind of client violation."""

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
    """A peer broke the protocol. The text says how, and contains no value that could be secret."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ClientViolation(Violation):
    """The client broke the protocol: `sqlstate`, the stable `reason` word, and how to answer."""

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
    """The upstream broke the protocol before its ReadyForQuery (W53)."""


class UnsupportedAuthentication(Violation):
    """The upstream requests an authentication method other than a token or SCRAM (W28)."""


class StateMachineMisuse(AssertionError):
    """A method was called in a state for which the state table has no such step."""
