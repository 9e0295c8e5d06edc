"""What one connection's log lines and counts say: how its startup failed, where it went, its end.

For: the words of `session`. The invariant: what clients send is in no line; a shard key is in one
only as its fingerprint.
"""

import asyncio
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ErrorKind
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.routing.router import Route
from proxy.session.end_reason import RelayEnd
from proxy.wire.client_startup import Disconnected, Violated
from proxy.wire.messages import ErrorResponse
from proxy.wire.violations import ClientReason

_log = get_logger(__name__)

# Here PostgreSQL quotes the client's options, where a forgotten -c leaves a shard key: the client
# may read that, a log may not.
_QUOTING_OPTIONS: Final = frozenset(
    kind.value.reason for kind in (ErrorKind.ARGUMENT_INVALID, ErrorKind.SETTING_INVALID)
)

# A session's first line waits for this long, so that the client's first query does not wait for it.
_LINE_SECONDS: Final = 0.002

# What is wrong with a whole StartupMessage is a driver's, or its settings', and worth a line.
# Anything else may be a port scan.
_OF_A_DRIVER: Final = frozenset(
    {
        ClientReason.REPLICATION_VALUE,
        ClientReason.STARTUP_LAYOUT,
        ClientReason.UNKNOWN_PARAMETER,
        ClientReason.USER_MISSING,
    }
)


@unique
class StartupFailure(StrEnum):
    """The failures of a startup that have no ErrorResponse: their words in the metrics."""

    STARTUP_TIMEOUT = "startup_timeout"
    CLIENT_TLS = "client_tls"
    PROBE = "probe"
    CLIENT_GONE = "client_gone"


class SessionLog:
    """The lines and counts of one connection."""

    __slots__ = ("_host", "_key", "_metrics", "_started_at", "shard", "target")

    def __init__(self, metrics: Metrics, started_at: float) -> None:
        """`started_at` is the loop's time of the accept."""
        self._metrics = metrics
        self._started_at = started_at
        self.target = ""
        self.shard = ""
        """The target, where a shard map chose it; else empty."""
        self._key: str | None = None
        self._host = ""  # until the session's first line is written

    # -- startup ---------------------------------------------------------------------------------

    def startup_timed_out(self) -> None:
        """Record a client that sent no StartupMessage in time."""
        self._metrics.startup_failed(StartupFailure.STARTUP_TIMEOUT)
        _log.debug("startup timed out")

    def client_tls_failed(self, error: Exception) -> None:
        """Record a handshake that failed."""
        self._metrics.startup_failed(StartupFailure.CLIENT_TLS)
        _log.debug("TLS with the client failed", error=type(error).__name__)

    def startup_failed(self, event: Violated | Disconnected) -> None:
        """Record a client that asked for nothing; probes and port scans at level debug."""
        if isinstance(event, Disconnected):
            word = StartupFailure.PROBE if event.untouched else StartupFailure.CLIENT_GONE
            self._metrics.startup_failed(word)
            _log.debug("client left before its startup", untouched=event.untouched)
            return
        violation = event.violation
        self._metrics.startup_failed(violation.reason)
        level = _log.info if violation.reason in _OF_A_DRIVER else _log.debug
        level("client refused", reason=violation.reason, sqlstate=violation.sqlstate)

    def client_gone(self) -> None:
        """Record a client that left while it waited for its session."""
        self._metrics.startup_failed(StartupFailure.CLIENT_GONE)
        _log.debug("client left before its session was ready")

    def routed(self, route: Route) -> None:
        """Record where the client goes, for all further lines."""
        self.target, self._key = route.target, route.key
        self.shard = route.target if route.shard_map else ""

    def refused(self, reason: str, error: ErrorResponse) -> None:
        """Record a client that is told why it is not served."""
        self._metrics.session_refused(reason, error.sqlstate, self.target)
        _log.info(
            "session refused",
            reason=reason,
            sqlstate=error.sqlstate,
            detail=f"reason={reason}" if reason in _QUOTING_OPTIONS else error.text(b"D"),
            **self._where(),
            duration_seconds=self._duration_seconds(),
        )

    # -- a session -------------------------------------------------------------------------------

    def started(self, host: str) -> None:
        """Record a session that is served; its line is written a moment later."""
        self._host = host
        asyncio.get_running_loop().call_later(_LINE_SECONDS, self._write_started)

    def ended(self, end: RelayEnd) -> None:
        """Record the end of a session."""
        self._metrics.session_ended(end.reason, self.target)
        self.failed(end)

    def failed(self, end: RelayEnd) -> None:
        """Record the end of a session by a bug, which the listener counts."""
        self._write_started()
        _log.info(
            "session ended",
            reason=end.reason.value,
            **self._where(),
            duration_seconds=self._duration_seconds(),
            client_bytes=end.client_bytes,
            upstream_bytes=end.upstream_bytes,
        )

    def _write_started(self) -> None:
        if host := self._host:
            self._host = ""
            _log.info("session started", **self._where(), host=host)

    def _where(self) -> dict[str, str]:
        """Return what a line says of where the session goes."""
        return {"target": self.target} | ({"shard_key": self._key} if self._key else {})

    def _duration_seconds(self) -> float:
        """Return the time since accept, as the log shows it."""
        return round(asyncio.get_running_loop().time() - self._started_at, 3)
