"""One client connection, in the order in which it happens.

Startup within its own timeout, then a route and an upstream session, then the welcome in one write,
then the relay. A client that has sent its StartupMessage and cannot be served always gets an
ErrorResponse, also when the cause is a bug. When a client disconnects, what was begun for it ends.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from proxy.errors import NOT_THE_OPERATORS, ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.observe.traces import Traces
from proxy.pool.pool_counts import RetireReason
from proxy.routing.router import Route
from proxy.session.cancel import CancelForwarder, CancelKeys, IssuedKey
from proxy.session.drain import OpenSession
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.mapped_sessions import MappedSessions
from proxy.session.relay import Relay
from proxy.session.session_log import SessionLog, StartupAdvice
from proxy.session.session_trace import TracedPhases
from proxy.session.starting_client import ClientGone, StartingClient
from proxy.transport.sockets import is_unix
from proxy.transport.stream import StartupStream
from proxy.upstream.phases import DialPhases, StartStep
from proxy.upstream.upstream_session import Lease, UpstreamSession
from proxy.upstream.upstreams import RouteReplaced, SessionOpener
from proxy.wire.client_startup import CancelReceived, Disconnected, StartupReceived, Violated
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientViolation

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes


# A pooled session may be one query and its answer, for which opening and closing lanes costs more
# than they save. Its third read shows that it is longer.
READS_BEFORE_LANES: Final = 3


@dataclass(frozen=True, slots=True)
class SessionParts:
    """The parts that all sessions of a proxy share."""

    route: Callable[[StartupMessage], Awaitable[tuple[Route, SessionOpener]]]
    """Returns where a client's session goes. Raises ProxyError for one without a target.

    What it returns, and itself, raises RouteReplaced where the map was exchanged meanwhile.
    """
    cancel_keys: CancelKeys
    cancels: CancelForwarder
    metrics: Metrics
    startup_timeout_seconds: float
    tls: Callable[[], ssl.SSLContext | None]
    """Returns what clients are offered now: a renewed certificate is used from the next one on."""
    slot: Callable[[], AbstractContextManager[None]]
    """Takes one of `max_connections` slots; raises ProxyError when there is none."""
    mapped_sessions: MappedSessions
    idle_timeout_seconds: float = 0
    """Ends a session that was idle for this time; 0: never."""
    lanes: "Callable[[], Lanes | None]" = lambda: None
    """Returns the lanes of the running loop; None where they were not built."""
    traces: Callable[[], Traces | None] = lambda: None
    """Returns where the starts of sessions are sent; None where they are not traced."""
    advice: StartupAdvice = field(default_factory=StartupAdvice)


class Session:
    """One client connection, from accept to close.

    A session may be relayed for days. From the welcome on it keeps the relay and its log, and
    nothing of the startup.
    """

    __slots__ = ("_entry", "_log", "_parts", "_phases", "_starting_client")

    def __init__(self, stream: StartupStream, entry: OpenSession, parts: SessionParts) -> None:
        tls = parts.tls()
        if tls is not None and is_unix(stream.transport):
            tls = None  # what does not leave the machine needs none: PostgreSQL refuses it, too
        self._starting_client: StartingClient | None = StartingClient(stream, tls)
        self._entry = entry
        self._parts = parts
        self._log = SessionLog(parts.metrics, parts.advice, entry.started_at)
        traces = parts.traces()
        self._phases = DialPhases() if traces is None else TracedPhases(traces, entry.number)

    async def run(self) -> None:
        """Serve the connection from accept to close."""
        try:
            await self._serve()
        except asyncio.CancelledError:
            if self._entry.relay is not None:
                self._log.ended(self._entry.relay.ended(EndReason.SHUTDOWN))
            raise
        except ClientGone:
            self._phases.over(self._log.target, error="client_gone")
            self._log.client_gone(self._phases, self._client.negotiated_at)
        except ProxyError as error:
            self._refuse(error)
        except ClientViolation as violation:
            detail = f"reason={violation.reason}"
            refusal = ErrorResponse.fatal(violation.sqlstate, violation.message, detail)
            self._refuse_with(violation.reason, refusal)
        except Exception:
            self._fail()
            raise
        finally:
            self._entry.closing()
            if self._starting_client is not None:  # else the relay closes both connections
                await self._starting_client.close()

    async def _serve(self) -> None:
        """Do what the client asks for. Raises the error that it is refused with."""
        parts = self._parts
        startup = await self._receive_startup()
        if isinstance(startup, CancelReceived):
            self._entry.closing()  # it is no session, and is over in seconds
            await parts.cancels.request(startup.request)
        if not isinstance(startup, StartupReceived):
            return
        mapped = None
        with parts.slot():
            opener, upstream = await self._open(startup.message)
            with _Leased(upstream.lease) as leased:
                with parts.cancel_keys.issue(
                    upstream.startup.key,
                    upstream.target,
                    startup.version,
                    own_secret=leased.returns,
                ) as key:
                    mapped = parts.mapped_sessions.register(self._entry, upstream.admitted_by)
                    relay = self._start_relay(opener, upstream, key)
                    # The relay may run for days: release what only the startup needs.
                    del startup, opener, upstream
                    with parts.metrics.session(self._log.target):
                        end = await relay.run()
                leased.ended(end, key)
        if mapped is None:
            self._log.ended(end)
        else:
            self._log.over()
            mapped.report(end, self._log.ended)

    # -- startup ---------------------------------------------------------------------------------

    @property
    def _client(self) -> StartingClient:
        assert self._starting_client is not None, "the session is relayed already"
        return self._starting_client

    async def _receive_startup(self) -> StartupReceived | CancelReceived | None:
        """Return what the client asks for; None if it asked for nothing in time.

        A client that is too slow gets no answer, as from PostgreSQL (W49).
        """
        if (at_hand := self._client.startup_at_hand()) is not None:
            return at_hand
        try:
            seconds = self._parts.startup_timeout_seconds
            with self._phases.step(StartStep.STARTUP):
                async with asyncio.timeout(seconds):
                    event = await self._client.receive_startup()
        except TimeoutError:
            self._log.startup_timed_out()
        except (ssl.SSLError, ConnectionError) as error:
            self._log.client_tls_failed(error)
        else:
            if not isinstance(event, Violated | Disconnected):
                return event
            self._log.startup_failed(event)
        return None

    async def _open(self, startup: StartupMessage) -> tuple[SessionOpener, UpstreamSession]:
        """Open a session upstream. Raises ClientGone, ProxyError or ClientViolation."""
        self._entry.opening(self._phases)
        try:
            with self._client.while_connected():
                opener, upstream = await self._open_upstream(startup)
        except asyncio.CancelledError:
            # A drain has begun, or an operator ends it; and this client still waits for an answer.
            self._refuse(ProxyError(self._entry.cancelled_for))
            raise
        if upstream.admitted_by is not None:
            self._log.admitted(upstream.admitted_by)
        # Either side may have disconnected just when the other one was ready.
        if self._client.is_gone:
            upstream.put_back()
            raise ClientGone
        if upstream.stream.transport.is_closing():
            upstream.close()
            raise ProxyError(ErrorKind.UPSTREAM_LOST)
        return opener, upstream

    async def _open_upstream(
        self, startup: StartupMessage
    ) -> tuple[SessionOpener, UpstreamSession]:
        """Route the client, and open its session there. Raises ProxyError or ClientViolation."""
        while True:  # again only if the map was exchanged meanwhile
            try:
                with self._phases.step(StartStep.ROUTE):
                    route, opener = await self._parts.route(startup)
                self._log.routed(route)
                self._entry.route = route
                self._entry.refuse_if_draining()
                return opener, await opener.open(route.message, self._phases, route.fallback)
            except RouteReplaced:
                continue

    def _refuse(self, error: ProxyError) -> None:
        is_warning = error.kind not in NOT_THE_OPERATORS
        self._refuse_with(error.reason, error.response(), is_warning=is_warning)

    def _refuse_with(self, reason: str, error: ErrorResponse, *, is_warning: bool = False) -> None:
        self._phases.over(self._log.target, error=reason, sqlstate=error.sqlstate)
        self._log.refused(reason, error, is_warning=is_warning)
        self._client.refuse(_with_shard(error, self._log.shard))

    def _fail(self) -> None:
        """Record a bug, and refuse a client that waits. The listener counts the bug."""
        relay = self._entry.relay
        if relay is not None:
            end = relay.ended(EndReason.INTERNAL_ERROR)
            self._log.failed(replace(end, reason=EndReason.INTERNAL_ERROR))
        elif self._client.awaits_session:
            self._refuse(ProxyError(ErrorKind.INTERNAL))

    # -- the relay -------------------------------------------------------------------------------

    def _start_relay(
        self, opener: SessionOpener, upstream: UpstreamSession, key: IssuedKey | None
    ) -> Relay:
        """Send the client its welcome, and give both connections to a relay."""
        client = self._client
        client.welcome(upstream, None if key is None else key.issued)  # it need not wait for more
        cancel_query = None
        if key is not None and opener.cancel_on_disconnect:
            cancel_query = partial(self._parts.cancels.cancel_disconnected, key)
        lease = upstream.lease
        keeps_upstream = lease is not None and lease.returns
        relay = Relay(
            client.transport,
            upstream.stream.transport,
            cancel_query,
            self._parts.lanes(),
            cancels_copy_only=opener.checks_connection,
            keeps_upstream=keeps_upstream,
            reads_before_lanes=READS_BEFORE_LANES if keeps_upstream else 0,
            totals=self._parts.metrics.byte_totals(self._log.target),
        )
        self._starting_client = None  # from here on the client cannot be refused
        self._entry.relaying(relay)
        client.start_relay(relay, upstream)
        if self._parts.idle_timeout_seconds:
            self._entry.end_after_idle(self._parts.idle_timeout_seconds)
        reused = None if lease is None else lease.reused
        target = upstream.target
        self._phases.over(self._log.target, target.host, target.port)
        self._log.started(target.host, reused=reused)
        return relay


class _Leased:
    """Gives an upstream session back to its pool when the block ends, whatever ended it."""

    __slots__ = ("_lease", "_reported", "_retired_for")

    def __init__(self, lease: Lease | None) -> None:
        self._lease = lease
        self._reported = b""
        self._retired_for: str = RetireReason.DRAIN  # where its task is cancelled

    @property
    def returns(self) -> bool:
        """Whether the session may go to another client."""
        return self._lease is not None and self._lease.returns

    def ended(self, end: RelayEnd, key: IssuedKey | None) -> None:
        """Set how its client has left. The key is unregistered: no cancel is sent any more."""
        self._reported = end.reported
        if key is not None and key.forwarded:
            self._retired_for = RetireReason.CANCELLED  # it may arrive late (P17)
        else:
            self._retired_for = "" if end.kept else end.retired or RetireReason.BUSY

    def __enter__(self) -> "_Leased":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease is not None:
            self._lease.release(self._retired_for, self._reported)


def _with_shard(error: ErrorResponse, shard: str) -> ErrorResponse:
    """Return the error with the shard in its DETAIL: the client gave a key and knows no shard."""
    ending = f" shard={shard}".encode() if shard else b""
    fields = ((kind, text + ending if kind == b"D" else text) for kind, text in error.fields)
    return ErrorResponse(tuple(fields))
