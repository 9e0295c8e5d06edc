"""The log lines and counts of one connection: a failed startup, a refusal, a session's end.

For: what `session` records. The invariant: no line contains what a client sent; of a shard key it
contains the fingerprint.
"""

import asyncio
import ssl
from collections.abc import Mapping
from enum import StrEnum, unique
from typing import Final

from proxy.errors import ErrorKind
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.routing.router import Route
from proxy.session.end_reason import RelayEnd
from proxy.upstream.phases import ConnectPhase, DialPhases
from proxy.upstream.upstream_session import AdmittedBy
from proxy.wire.client_startup import Disconnected, LastAnswer, Violated
from proxy.wire.messages import ErrorResponse
from proxy.wire.violations import ClientReason

_log = get_logger(__name__)

# With these errors PostgreSQL quotes the client's options, which contain a shard key if its -c was
# forgotten. The client may read that; it must not be in a log.
_QUOTING_OPTIONS: Final = frozenset(
    kind.value.reason for kind in (ErrorKind.ARGUMENT_INVALID, ErrorKind.SETTING_INVALID)
)

# "session started" is written this much later, so that the first queries do not wait for it. Where
# the session ends before, the line of its end has the fields of both. The time is longer than the
# kernel's tick, 10 ms at most: for a timer before that the kernel sets its clock at each wait,
# which takes 5 to 10 us on a virtual machine.
_STARTED_DELAY_SECONDS: Final = 0.02

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
    # The client did not accept what it was answered.
    CLIENT_WANTS_TLS = "client_wants_tls"
    CLIENT_WANTS_GSSENC = "client_wants_gssenc"
    CLIENT_REJECTS_CERTIFICATE = "client_rejects_certificate"
    # Most likely for the same reason; but a probe of TLS, or a client that gives up, does so too.
    CLIENT_GONE_HANDSHAKE = "client_gone_handshake"
    CLIENT_GONE_VERSION = "client_gone_version"
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

_LEFT_AT: Final = {
    LastAnswer.TLS_REFUSED: StartupFailure.CLIENT_WANTS_TLS,
    LastAnswer.GSSENC_REFUSED: StartupFailure.CLIENT_WANTS_GSSENC,
    LastAnswer.TLS_STARTED: StartupFailure.CLIENT_GONE_HANDSHAKE,
}

_WANTS_TLS: Final = (
    "client wants TLS",
    (
        "a client asked for TLS and left when it was refused: set sslmode=disable in the "
        "application (the Lakebase guide exports PGSSLMODE=require), without "
        'sslnegotiation=direct, or set listen.tls = "self-signed". With sslmode=prefer some '
        "drivers, such as pgx, then connect again without TLS: sslmode=disable saves them that"
    ),
)
_TRUST: Final = (
    "set sslmode=require or sslmode=prefer in the application, or give it the certificate's "
    "authority (sslrootcert) and a host that the certificate names, or set listen.tls_certificate "
    "to one that it trusts"
)
# The log event and the advice for clients that leave at an answer.
_ADVICE: Final[Mapping[StartupFailure | ClientReason, tuple[str, str]]] = {
    StartupFailure.CLIENT_WANTS_TLS: _WANTS_TLS,
    ClientReason.DIRECT_TLS: _WANTS_TLS,
    StartupFailure.CLIENT_WANTS_GSSENC: (
        "client wants GSSAPI encryption",
        "a client asked for GSSAPI encryption and left when it was refused: set gssencmode=disable",
    ),
    StartupFailure.CLIENT_REJECTS_CERTIFICATE: (
        "client rejects the certificate",
        f"a client does not trust the listener's certificate: {_TRUST}",
    ),
    StartupFailure.CLIENT_GONE_HANDSHAKE: (
        "client left after its TLS handshake",
        (
            "a client left right after its TLS handshake. If it is no probe, it did not accept the "
            f"listener's certificate: {_TRUST}"
        ),
    ),
    StartupFailure.CLIENT_GONE_VERSION: (
        "client left when it was told the protocol version",
        (
            "a client asked for a newer version of the protocol, or for an option of it, and left "
            "within a second of being told that the proxy has none: set min_protocol_version=3.0"
        ),
    ),
}
# Many applications connect again at once, so a line is written no more often than this.
ADVICE_SECONDS: Final = 60.0
# A client that does not accept the version leaves when it has read of it; later ones give up, which
# no usual timeout of a driver does so soon.
_VERSION_SECONDS_MAX: Final = 1.0


class StartupAdvice:
    """When each advice for clients that leave was logged last; one for all sessions."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def is_due(self, reason: str, now: float) -> bool:
        """Return whether a reason's line is to be written again, and record that it is."""
        logged_at = self._logged_at.get(reason)
        if logged_at is not None and now - logged_at < ADVICE_SECONDS:
            return False
        self._logged_at[reason] = now
        return True


def _is_certificate_alert(error: Exception) -> bool:
    """Return whether the client ended the handshake because it does not accept the certificate."""
    alert = error.reason if isinstance(error, ssl.SSLError) and error.reason else ""
    return "ALERT" in alert and ("CERTIFICATE" in alert or "UNKNOWN_CA" in alert)


class SessionLog:
    """The lines and counts of one connection."""

    __slots__ = (
        "_advice",
        "_ended_at",
        "_host",
        "_key",
        "_metrics",
        "_reused",
        "_started_at",
        "_timer",
        "shard",
        "target",
    )

    def __init__(self, metrics: Metrics, advice: StartupAdvice, started_at: float) -> None:
        """`started_at` is the loop's time of the accept."""
        self._metrics = metrics
        self._advice = advice
        self._started_at = started_at
        self.target = ""
        self.shard = ""
        """The target, if a shard map chose it; else empty."""
        self._key: str | None = None
        self._host = ""  # until a line has shown it
        self._reused: bool | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended_at: float | None = None

    # -- startup ---------------------------------------------------------------------------------

    def startup_timed_out(self) -> None:
        """Record a client that sent no StartupMessage in time."""
        self._metrics.startup_failed(StartupFailure.STARTUP_TIMEOUT)
        _log.debug("startup timed out")

    def client_tls_failed(self, error: Exception) -> None:
        """Record a TLS handshake that failed."""
        if _is_certificate_alert(error):
            self._left_at(StartupFailure.CLIENT_REJECTS_CERTIFICATE)
            return
        self._metrics.startup_failed(StartupFailure.CLIENT_TLS)
        _log.debug("TLS with the client failed", error=type(error).__name__)

    def startup_failed(self, event: Violated | Disconnected) -> None:
        """Record a client that sent no StartupMessage; probes and port scans at level debug."""
        if isinstance(event, Disconnected):
            if event.last_answer is not None:
                self._left_at(_LEFT_AT[event.last_answer])
                return
            word = StartupFailure.PROBE if event.untouched else StartupFailure.CLIENT_GONE
            self._metrics.startup_failed(word)
            _log.debug("client left before its startup", untouched=event.untouched)
            return
        violation = event.violation
        if violation.reason is ClientReason.DIRECT_TLS:
            self._left_at(violation.reason)
            return
        self._metrics.startup_failed(violation.reason)
        level = _log.info if violation.reason in _DRIVER_VIOLATIONS else _log.debug
        level("client refused", reason=violation.reason, sqlstate=violation.sqlstate)

    def client_gone(self, phases: DialPhases, negotiated_at: float | None) -> None:
        """Record a client that disconnected while it waited, with what it waited for.

        `negotiated_at`: when it was told another protocol version than it had asked for.
        """
        now = asyncio.get_running_loop().time()
        if negotiated_at is not None and now - negotiated_at < _VERSION_SECONDS_MAX:
            self._left_at(StartupFailure.CLIENT_GONE_VERSION)
            return
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

    def _left_at(self, reason: StartupFailure | ClientReason) -> None:
        """Record a client that did not accept what it was answered."""
        event, advice = _ADVICE[reason]
        self._metrics.startup_failed(reason)
        self._metrics.record_error(reason, message=advice)
        if self._advice.is_due(reason, asyncio.get_running_loop().time()):
            _log.info(event, reason=reason.value, advice=advice)

    # -- a session -------------------------------------------------------------------------------

    def started(self, host: str, *, reused: bool | None = None) -> None:
        """Record the start of a session. Its line is written a moment later, if it lasts.

        `reused`: whether another client had its upstream session before; None without a pool.
        """
        self._host, self._reused = host, reused
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_STARTED_DELAY_SECONDS, self._write_started)

    def over(self) -> None:
        """Write no line of its start any more: the session has ended, and its cause may follow."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended_at is None:
            self._ended_at = asyncio.get_running_loop().time()

    def ended(self, end: RelayEnd) -> None:
        """Record the end of a session."""
        self._metrics.session_ended(end.reason, self.target)
        self.failed(end)

    def failed(self, end: RelayEnd) -> None:
        """Record the end of a session by a bug. The listener counts it."""
        self.over()
        _log.info(
            "session ended",
            reason=end.reason.value,
            **self._where(),
            **self._take_upstream(),
            duration_seconds=self._duration_seconds(),
            client_bytes=end.client_bytes,
            upstream_bytes=end.upstream_bytes,
        )

    def _write_started(self) -> None:
        self._timer = None
        _log.info("session started", **self._where(), **self._take_upstream())

    def _take_upstream(self) -> dict[str, str | bool]:
        """Return the fields that show the upstream session; none after the first call."""
        host, self._host = self._host, ""
        if not host:
            return {}
        return {"host": host} if self._reused is None else {"host": host, "reused": self._reused}

    def _where(self) -> dict[str, str]:
        """Return the fields of a line that show the route."""
        return {"target": self.target} | ({"shard_key": self._key} if self._key else {})

    def _duration_seconds(self) -> float:
        """Return the time from accept to the end, or until now, as the log shows it."""
        until = self._ended_at or asyncio.get_running_loop().time()
        return round(until - self._started_at, 3)
