"""Faults that tests inject: replies of the workspace API, and failures at stages of a login.

Only the values, and the list that returns them in order; workspace and gateway act on them.
"""

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, Generic, TypeVar


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP reply of the workspace API."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


class Hang(Enum):
    """The faults that are no complete reply."""

    HANG = auto()  # hold the request until the faults are cleared
    ENDLESS = auto()  # a reply that does not end, as fast as it is read
    DRIPPING = auto()  # a reply that does not end, a few bytes a second


HANG: Final = Hang.HANG
ENDLESS: Final = Hang.ENDLESS
DRIPPING: Final = Hang.DRIPPING


def api_error(status: int, code: str | int, message: str, **headers: str) -> Reply:
    """Return an error as the REST API words it; header names take `_` for `-`."""
    body = json.dumps({"error_code": code, "message": message, "details": []}).encode()
    return Reply(status, body, {name.replace("_", "-"): text for name, text in headers.items()})


INVALID_CLIENT: Final = Reply(
    401, b'{"error":"invalid_client","error_description":"Client authentication failed"}'
)
UNAUTHENTICATED: Final = api_error(401, "UNAUTHENTICATED", "Credential was not sent or was invalid")
ACCESS_MISSING: Final = api_error(
    403, "PERMISSION_DENIED", "API is disabled for users without workspace-access entitlement"
)
IP_BLOCKED: Final = api_error(
    403,
    "PERMISSION_DENIED",
    "Source IP address: 192.0.2.7 is blocked by Databricks IP ACL for workspace: 123",
)
# Without the second private link; seen as JSON and as plain text.
NETWORK_DENIED_TEXT: Final = "Unauthorized network access to workspace: 1234567890123456"
NETWORK_DENIED: Final = api_error(403, "PERMISSION_DENIED", NETWORK_DENIED_TEXT)
NETWORK_DENIED_PLAIN: Final = Reply(403, NETWORK_DENIED_TEXT.encode(), content_type="text/plain")
# Of a workspace token or PAT that has expired or was revoked.
INVALID_ACCESS_TOKEN: Final = api_error(403, "PERMISSION_DENIED", "Invalid access token.")
PAT_SCOPE: Final = api_error(
    403, "PERMISSION_DENIED", "PAT token does not have required scopes: postgres"
)
PERMISSION_DENIED: Final = api_error(
    403, "PERMISSION_DENIED", "User does not have permission CAN_USE on the project"
)
NOT_FOUND: Final = api_error(404, "NOT_FOUND", "The endpoint does not exist")
INSTANCE_NOT_FOUND: Final = api_error(404, "NOT_FOUND", "Database instance is not found.")
ABORTED: Final = api_error(409, "ABORTED", "The project is under maintenance")
THROTTLED: Final = api_error(429, "RESOURCE_EXHAUSTED", "Too many requests", Retry_After="1")
THROTTLED_NO_DELAY: Final = api_error(429, "RESOURCE_EXHAUSTED", "Too many requests")
INTERNAL: Final = api_error(500, "INTERNAL_ERROR", "Internal error")
BAD_GATEWAY: Final = Reply(
    502, b"<html><body><h1>502 Bad Gateway</h1></body></html>", content_type="text/html"
)
UNAVAILABLE: Final = api_error(503, "TEMPORARILY_UNAVAILABLE", "Try again", Retry_After="1")
GATEWAY_TIMEOUT: Final = api_error(504, "DEADLINE_EXCEEDED", "Deadline exceeded")
NUMERIC_CODE: Final = api_error(403, 7, "User does not have permission CAN_USE on the project")
EMPTY: Final = Reply(200, b"{}")
NOT_JSON: Final = Reply(200, b"not JSON", content_type="text/plain")
SIGN_IN_PAGE: Final = Reply(200, b"<html>sign in</html>", content_type="text/html")


class Stage(Enum):
    """The stages of a gateway connection at which a fault can be injected, in order."""

    ACCEPTED = auto()  # before anything is read
    SSL_REPLY = auto()  # SSLRequest read, not answered
    TLS = auto()  # answered S; the ClientHello is not read
    STARTUP = auto()  # TLS established, StartupMessage read, endpoint known
    PASSWORD = auto()  # token read, not checked
    AUTHENTICATED = auto()  # AuthenticationOk sent
    READY = auto()  # everything before ReadyForQuery sent
    RESET = auto()  # of a session: a DISCARD ALL read, not delivered
    CANCEL = auto()  # CancelRequest read, not delivered


class Injection(Enum):
    """What a fault does at its stage. Bytes in place of one are sent, followed by CLOSE."""

    HANG = auto()  # send nothing more, keep the connection open until the faults are cleared
    CLOSE = auto()  # a clean end: close_notify if there is TLS, then FIN
    FIN = auto()  # a bare FIN
    RESET = auto()  # RST


Where = TypeVar("Where", bound=Hashable)
What = TypeVar("What")


class FaultList(Generic[Where, What]):
    """Faults by place, each for a number of times or until cleared; the oldest comes first."""

    def __init__(self) -> None:
        self._faults: dict[Where, list[tuple[What, int | None]]] = {}

    def add(self, where: Where, what: What, times: int | None) -> None:
        """Add the fault `what` at `where`, for `times` times, or without limit if None."""
        self._faults.setdefault(where, []).append((what, times))

    def take(self, where: Where) -> What | None:
        """Return the next fault at `where`, if any, and count it."""
        queue = self._faults.get(where)
        if not queue:
            return None
        what, times = queue[0]
        if times is not None:
            queue[0] = (what, times - 1)
            if times <= 1:
                del queue[0]
        return what

    def clear(self) -> None:
        """Remove all faults."""
        self._faults.clear()
