"""The log lines and counts of one connection: a failed startup, a refusal, a session's end.

For: what `session` records. The invariant: no line contains what a client sent; of a shard key it
contains the fingerprint.
"""

import asyncio
import math
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ErrorKind
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.routing.router import Route
from proxy.session.end_reason import RelayEnd
from proxy.upstream.dialer import AdmittedBy
from proxy.upstream.phases import ConnectPhase, DialPhases
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
    CLIENT_WANTS_TLS = "client_wants_tls"
    # The client disconnected: before its StartupMessage was complete, or while its session waited.
    CLIENT_GONE = "client_gone"
    CLIENT_GONE_SLOT = "client_gone_slot"
    CLIENT_GONE_DNS = "client_gone_dns"
    CLIENT_GONE_MINT = "client_gone_mint"
    CLIENT_GONE_TCP = "client_gone_tcp"
    CLIENT_GONE_TLS = "client_gone_tls"
    CLIENT_GONE_LOGIN = "client_gone_login"


_GONE_IN: Final = {
    None: StartupFailure.CLIENT_GONE,
    ConnectPhase.DNS: StartupFailure.CLIENT_GONE_DNS,
    ConnectPhase.MINT: StartupFailure.CLIENT_GONE_MINT,
    ConnectPhase.TCP: StartupFailure.CLIENT_GONE_TCP,
    ConnectPhase.TLS: StartupFailure.CLIENT_GONE_TLS,
    ConnectPhase.LOGIN: StartupFailure.CLIENT_GONE_LOGIN,
}

_WANTS_TLS_ADVICE: Final = (
    "a client asked for TLS and left when it was refused: set sslmode=disable or sslmode=prefer in "
    "the application (the Lakebase guide exports PGSSLMODE=require), without "
    "sslnegotiation=direct, or set "
    'listen.tls = "self-signed"'
)
# Many applications connect again at once, so the line is written no more often than this.
WANTS_TLS_LINE_SECONDS: Final = 60.0


class TLSAdvice:
    """When the advice for clients that want TLS was logged last; one for all sessions."""

    def __init__(self) -> None:
        self._logged_at = -math.inf

    def is_due(self, now: float) -> bool:
        """Return whether the line is to be written again, and record that it is."""
        if now - self._logged_at < WANTS_TLS_LINE_SECONDS:
            return False
        self._logged_at = now
        return True


class SessionLog:
    """The lines and counts of one connection."""

    __slots__ = ("_host", "_key", "_metrics", "_started_at", "_tls_advice", "shard", "target")

    def __init__(self, metrics: Metrics, tls_advice: TLSAdvice, started_at: float) -> None:
        """`started_at` is the loop's time of the accept."""
        self._metrics = metrics
        self._tls_advice = tls_advice
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
        if isinstance(event, Disconnected) and event.wanted_tls:
            self._client_wanted_tls(StartupFailure.CLIENT_WANTS_TLS)
            return
        if isinstance(event, Disconnected):
            word = StartupFailure.PROBE if event.untouched else StartupFailure.CLIENT_GONE
            self._metrics.startup_failed(word)
            _log.debug("client left before its startup", untouched=event.untouched)
            return
        violation = event.violation
        if violation.reason is ClientReason.DIRECT_TLS:
            self._client_wanted_tls(violation.reason)
            return
        self._metrics.startup_failed(violation.reason)
        level = _log.info if violation.reason in _DRIVER_VIOLATIONS else _log.debug
        level("client refused", reason=violation.reason, sqlstate=violation.sqlstate)

    def client_gone(self, phases: DialPhases) -> None:
        """Record a client that disconnected while it waited, with what it waited for."""
        word = _GONE_IN[phases.current]
        if phases.waits_for_slot:
            word = StartupFailure.CLIENT_GONE_SLOT
        self._metrics.startup_failed(word)
        _log.info(
            "client left before its session was ready",
            reason=word.value,
            **self._where(),
            duration_seconds=self._duration_seconds(),
        )

    def routed(self, route: Route) -> None:
        """Set the route that all further lines show."""
        self.target, self._key = route.target, route.key
        self.shard = route.target if route.shard_map else ""

    def admitted(self, by: AdmittedBy) -> None:
        """Set the shard that has admitted the session: the key may have moved since the route."""
        self.target = self.shard = by.target

    def refused(self, reason: str, error: ErrorResponse, *, is_warning: bool) -> None:
        """Record a client that is refused with an ErrorResponse. A warning asks for an operator."""
        self._metrics.session_refused(reason, error.sqlstate, self.target)
        level = _log.warning if is_warning else _log.info
        level(
            "session refused",
            reason=reason,
            sqlstate=error.sqlstate,
            detail=f"reason={reason}" if reason in _QUOTING_OPTIONS else error.text(b"D"),
            **self._where(),
            duration_seconds=self._duration_seconds(),
        )

    def _client_wanted_tls(self, reason: StartupFailure | ClientReason) -> None:
        self._metrics.startup_failed(reason)
        self._metrics.record_error(reason, message=_WANTS_TLS_ADVICE)
        if self._tls_advice.is_due(asyncio.get_running_loop().time()):
            _log.info("client wants TLS", reason=reason.value, advice=_WANTS_TLS_ADVICE)

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
