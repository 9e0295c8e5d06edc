"""Why a relayed session ended, and what it carried."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final

from proxy.pool.pool_counts import RetireReason


@unique
class EndReason(StrEnum):
    """The first cause of a session's end, as log and metrics show it."""

    CLIENT_CLOSED = "client_closed"
    CLIENT_LOST = "client_lost"
    CLIENT_NOT_READING = "client_not_reading"
    UPSTREAM_CLOSED = "upstream_closed"
    UPSTREAM_LOST = "upstream_lost"
    SHUTDOWN = "shutdown"
    IDLE_TIMEOUT = "idle_timeout"
    MAPPING_MOVED = "mapping_moved"
    ENDED_BY_OPERATOR = "ended_by_operator"
    INTERNAL_ERROR = "internal_error"


@unique
class Outcome(StrEnum):
    """The end of a session in one word, for alerts; the reason says more."""

    COMPLETED = "completed"
    LOST = "lost"
    CUT = "cut"
    FAILED = "failed"


OUTCOMES: Final[Mapping[str, Outcome]] = {
    EndReason.CLIENT_CLOSED: Outcome.COMPLETED,
    EndReason.CLIENT_LOST: Outcome.LOST,
    EndReason.CLIENT_NOT_READING: Outcome.CUT,
    EndReason.UPSTREAM_CLOSED: Outcome.LOST,
    EndReason.UPSTREAM_LOST: Outcome.LOST,
    EndReason.SHUTDOWN: Outcome.CUT,
    EndReason.IDLE_TIMEOUT: Outcome.CUT,
    EndReason.MAPPING_MOVED: Outcome.CUT,
    EndReason.ENDED_BY_OPERATOR: Outcome.CUT,
    EndReason.INTERNAL_ERROR: Outcome.FAILED,
}

# One side has disconnected.
DISCONNECTS: Final = frozenset(
    {EndReason.CLIENT_LOST, EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST}
)

# What it looks like when the shard itself ends a session whose mapping has moved.
UPSTREAM_ENDS: Final = frozenset({EndReason.UPSTREAM_CLOSED, EndReason.UPSTREAM_LOST})

# A client has left: only then does its upstream session serve another one (P12).
CLIENT_LEFT: Final = frozenset(
    {EndReason.CLIENT_CLOSED, EndReason.CLIENT_LOST, EndReason.IDLE_TIMEOUT}
)

# Why the upstream session of a session that ended otherwise serves no other client.
RETIRED_BY: Final[Mapping[EndReason, RetireReason]] = {
    EndReason.CLIENT_NOT_READING: RetireReason.UPSTREAM_ENDED,
    EndReason.UPSTREAM_CLOSED: RetireReason.UPSTREAM_ENDED,
    EndReason.UPSTREAM_LOST: RetireReason.UPSTREAM_ENDED,
    EndReason.SHUTDOWN: RetireReason.DRAIN,
    EndReason.MAPPING_MOVED: RetireReason.RECONFIGURED,
    EndReason.ENDED_BY_OPERATOR: RetireReason.ENDED_BY_OPERATOR,
    EndReason.INTERNAL_ERROR: RetireReason.BUSY,
}

# Recorded among the recent errors. An upstream that closes normally ends many sessions at once, and
# that is no error.
ERRORS: Final = frozenset({EndReason.UPSTREAM_LOST, EndReason.INTERNAL_ERROR})


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """How a relay ended, and the bytes that it carried."""

    reason: EndReason
    client_bytes: int
    upstream_bytes: int
    kept: bool = False
    """The upstream session is open, and can be reset for another client."""
    reported: bytes = b""
    """The ParameterStatus messages that its client was sent, if it is kept."""
    retired: RetireReason | None = None
    """Why it is closed, if the relay was to keep it."""
