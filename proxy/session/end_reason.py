"""Why a relayed session ended, and what it carried."""

from dataclasses import dataclass
from enum import StrEnum, unique


@unique
class EndReason(StrEnum):
    """The first cause of a session's end, as log and metrics show it."""

    CLIENT_CLOSED = "client_closed"
    CLIENT_LOST = "client_lost"
    UPSTREAM_CLOSED = "upstream_closed"
    UPSTREAM_LOST = "upstream_lost"
    SHUTDOWN = "shutdown"
    IDLE_TIMEOUT = "idle_timeout"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """How a relay ended, and the bytes that it carried."""

    reason: EndReason
    client_bytes: int
    upstream_bytes: int
