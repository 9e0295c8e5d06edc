"""The log lines and counts of one connection: a failed startup, a refusal, a session's end.

For: what `session` records. The invariant: no line contains what a client sent; of a shard key it
contains the fingerprint.
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

# With these errors PostgreSQL quotes the client's options, which contain a shard key if its -c was
# forgotten. The client may read that; it must not be in a log.
_QUOTING_OPTIONS: Final = frozenset(
    kind.value.reason for kind in (ErrorKind.ARGUMENT_INVALID, ErrorKind.SETTING_INVALID)
)

# "session started" is written this much later, so that the first query does not wait for it.
_STARTED_DELAY_SECONDS: Final = 0.002

# Violations in a complete StartupMessage come from a driver or its settings, and are logged. Other
# ones may come from a port scan.
_DRIVER_VIOLATIONS: Final = frozenset(
    {
        ClientReason.REPLICATION_VALUE,
        ClientReason.STARTUP_LAYOUT,
        ClientReason.UNKNOWN_PARAMETER,
        ClientReason.USER_MISSING,
    }
)


@unique
class StartupFailure(StrEnum):
    """The reasons of failed startups that have no ErrorResponse, as the metrics show them."""

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
        """The target, if a shard map chose it; else empty."""
        self._key: str | None = None
        self._host = ""  # until the session's first line is written

    # -- startup ---------------------------------------------------------------------------------

    def startup_timed_out(self) -> None:
        """Record a client that sent no StartupMessage in time."""
        self._metrics.startup_failed(StartupFailure.STARTUP_TIMEOUT)
        _log.debug("startup timed out")

    def client_tls_failed(self, error: Exception) -> None:
        """Record a TLS handshake that failed."""
        self._metrics.startup_failed(StartupFailure.CLIENT_TLS)
        _log.debug("TLS with the client failed", error=type(error).__name__)

    def startup_failed(self, event: Violated | Disconnected) -> None:
        """Record a client that sent no StartupMessage; probes and port scans at level debug."""
        if isinstance(event, Disconnected):
            word = StartupFailure.PROBE if event.untouched else StartupFailure.CLIENT_GONE
            self._metrics.startup_failed(word)
            _log.debug("client left before its startup", untouched=event.untouched)
            return
        violation = event.violation
        self._metrics.startup_failed(violation.reason)
        level = _log.info if violation.reason in _DRIVER_VIOLATIONS else _log.debug
        level("client refused", reason=violation.reason, sqlstate=violation.sqlstate)

    def client_gone(self) -> None:
        """Record a client that disconnected while it waited for its session."""
        self._metrics.startup_failed(StartupFailure.CLIENT_GONE)
        _log.debug("client left before its session was ready")

    def routed(self, route: Route) -> None:
        """Set the route that all further lines show."""
        self.target, self._key = route.target, route.key
        self.shard = route.target if route.shard_map else ""

    def refused(self, reason: str, error: ErrorResponse) -> None:
        """Record a client that is refused with an ErrorResponse."""
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
        """Record the start of a session. Its line is written a moment later."""
        self._host = host
        asyncio.get_running_loop().call_later(_STARTED_DELAY_SECONDS, self._write_started)

    def ended(self, end: RelayEnd) -> None:
        """Record the end of a session."""
        self._metrics.session_ended(end.reason, self.target)
        self.failed(end)

    def failed(self, end: RelayEnd) -> None:
        """Record the end of a session by a bug. The listener counts it."""
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
        """Return the fields of a line that show the route."""
        return {"target": self.target} | ({"shard_key": self._key} if self._key else {})

    def _duration_seconds(self) -> float:
        """Return the time since accept, as the log shows it."""
        return round(asyncio.get_running_loop().time() - self._started_at, 3)
