"""The story of one client connection, readable top to bottom.

Startup under its own clock, then a target and a session upstream, then the welcome in one write,
then the relay. A client that has sent its StartupMessage and cannot be served always gets an
ErrorResponse, also when it is a bug that keeps it from being served; one that goes away ends
whatever was begun for it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum, unique
from functools import partial
from typing import TYPE_CHECKING, Final

from proxy.errors import ErrorKind, ProxyError
from proxy.observe.logs import get_logger
from proxy.observe.metrics import Metrics
from proxy.routing.router import Route
from proxy.session.cancel import CancelForwarder, CancelKeys, IssuedKey
from proxy.session.drain import OpenSession
from proxy.session.end_reason import EndReason, RelayEnd
from proxy.session.relay import Relay
from proxy.transport.sockets import is_unix
from proxy.transport.stream import StartupStream
from proxy.transport.tls import ALPN_PROTOCOL
from proxy.upstream.dialer import UpstreamSession
from proxy.upstream.upstreams import Upstream
from proxy.wire.client_startup import (
    CancelReceived,
    ClientEvent,
    ClientStartup,
    ClientState,
    DirectTLSReceived,
    Disconnected,
    EncryptionAnswered,
    StartupReceived,
    Violated,
)
from proxy.wire.messages import ErrorResponse
from proxy.wire.startup import StartupMessage
from proxy.wire.violations import ClientReason, ClientViolation

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

_log = get_logger(__name__)

# Here PostgreSQL quotes the client's options, where a forgotten -c leaves a shard key: the client
# may read that, a log may not.
_QUOTING_OPTIONS: Final = frozenset(
    kind.value.reason for kind in (ErrorKind.ARGUMENT_INVALID, ErrorKind.SETTING_INVALID)
)

# So long a session's first line waits, for the client's first query not to wait for the line.
_LINE_SECONDS: Final = 0.002

# What is wrong with a whole StartupMessage is a driver's, or its settings', and worth a line.
# Whatever else arrives may be a port scan.
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
    """The ways to fail that no ErrorResponse tells: their words in the metrics."""

    STARTUP_TIMEOUT = "startup_timeout"
    CLIENT_TLS = "client_tls"
    PROBE = "probe"
    CLIENT_GONE = "client_gone"


class ClientGone(Exception):
    """The client ended before its session was ready."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Where one session goes, on which way, and what it says there."""

    route: Route
    way: Upstream

    @property
    def shard(self) -> str:
        """The target, where a shard map chose it; else empty."""
        return self.route.target if self.route.shard_map else ""

    async def dial(self) -> UpstreamSession:
        """Return a session upstream. Raises what `Dialer.dial` does."""
        return await self.way.dialer.dial(self.route.message)


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What all sessions of a proxy share."""

    route: Callable[[StartupMessage], Passage]
    """Decides by what is configured now; raises ProxyError for a client that has no way."""
    cancel_keys: CancelKeys
    cancels: CancelForwarder
    metrics: Metrics
    startup_timeout_seconds: float
    tls: Callable[[], ssl.SSLContext | None]
    """Gives what clients are offered now: a renewed certificate counts from the next client on."""
    slot: Callable[[], AbstractContextManager[None]]
    """Takes one of `max_connections` slots; raises ProxyError when there is none."""
    idle_timeout_seconds: float = 0
    """Ends a session that was idle for so long; 0: never."""
    lanes: "Callable[[], Lanes | None]" = lambda: None
    """Gives the compiled relay's, where that was built."""


class Session:
    """One client connection's whole life.

    While it is relayed, which may be for days, it is little more than the relay: what it only began
    with is let go, and no frame waits that has nothing left to do.
    """

    __slots__ = (
        "_entry",
        "_key",
        "_parts",
        "_relay",
        "_shard",
        "_started_at_host",
        "_startup",
        "_stream",
        "_target",
        "_tls",
    )

    def __init__(self, stream: StartupStream, entry: OpenSession, parts: SessionParts) -> None:
        self._stream = stream
        self._entry = entry
        self._parts = parts
        # A unix socket's bytes do not leave the machine: TLS is refused there as PostgreSQL does.
        self._tls = None if is_unix(stream.transport) else parts.tls()
        self._startup = ClientStartup(tls_offered=self._tls is not None)
        # What its lines in the log say of where it goes, once that is decided.
        self._target = ""
        self._key: str | None = None  # the fingerprint of a shard key
        self._shard = ""
        self._relay: Relay | None = None
        self._started_at_host = ""  # until that is logged

    async def run(self) -> None:
        """Serve the connection from accept to close."""
        try:
            await self._serve(self._entry)
        finally:
            self._entry.closing()
            if self._relay is None:  # which closes both connections
                await self._stream.close()

    # -- startup ---------------------------------------------------------------------------------

    async def _receive_startup(self) -> ClientEvent | None:
        """Return what the client wants, once that is whole; None after the startup timeout.

        Slow senders get no reply, as PostgreSQL gives none (W49).
        """
        try:
            async with asyncio.timeout(self._parts.startup_timeout_seconds):
                while True:
                    events = await self._next_events()
                    for event in events:
                        self._stream.write(event.reply)
                        match event:
                            # With anything behind it, plaintext came behind the request (W3).
                            case EncryptionAnswered(b"S") if event is events[-1]:
                                await self._start_tls(b"")
                            case DirectTLSReceived(hello):
                                await self._start_tls(hello)
                            case StartupReceived() | CancelReceived():
                                return event
                            case Violated() | Disconnected():
                                self._note_failure(event)
                                return event
        except TimeoutError:
            self._parts.metrics.startup_failed(StartupFailure.STARTUP_TIMEOUT)
            _log.debug("startup timed out")
        except (ssl.SSLError, ConnectionError) as error:
            self._parts.metrics.startup_failed(StartupFailure.CLIENT_TLS)
            _log.debug("TLS with the client failed", error=type(error).__name__)
        return None

    async def _next_events(self) -> list[ClientEvent]:
        data = await self._stream.receive()
        return self._startup.receive_data(data) if data else self._startup.receive_eof()

    async def _start_tls(self, hello: bytes) -> None:
        """Start TLS; a client that began with it must have meant Postgres (W5).

        Raises ssl.SSLError or ConnectionError.
        """
        assert self._tls is not None
        tls = await self._stream.start_tls(self._tls, server_side=True, first=hello)
        if hello and tls.selected_alpn_protocol() != ALPN_PROTOCOL:
            raise ConnectionError("direct TLS without ALPN")
        self._startup.tls_started()

    def _note_failure(self, event: Violated | Disconnected) -> None:
        """Count and log, quietly: probes and port scans are no news."""
        if isinstance(event, Disconnected):
            word = StartupFailure.PROBE if event.untouched else StartupFailure.CLIENT_GONE
            self._parts.metrics.startup_failed(word)
            _log.debug("client left before its startup", untouched=event.untouched)
            return
        violation = event.violation
        self._parts.metrics.startup_failed(violation.reason)
        level = _log.info if violation.reason in _OF_A_DRIVER else _log.debug
        level("client refused", reason=violation.reason, sqlstate=violation.sqlstate)

    # -- a session -------------------------------------------------------------------------------

    async def _serve(self, live: OpenSession) -> None:
        """Do what the client wants; tell it when that cannot be."""
        parts = self._parts
        try:
            startup = await self._receive_startup()
            if isinstance(startup, CancelReceived):
                live.closing()  # it is no session, and is done in seconds
                await parts.cancels.request(startup.request)
            if not isinstance(startup, StartupReceived):
                return
            with parts.slot():
                passage = self._route(startup.message)
                live.opening()
                upstream = await self._dial(passage)
                key_of = parts.cancel_keys.issue
                with key_of(upstream.startup.key, upstream.target, startup.version) as key:
                    relay = self._hand_over(passage, upstream, key)
                    # It may go on for days: what it only began with is not kept so long.
                    del startup, passage, upstream, key, self._startup
                    with parts.metrics.session(self._target, relay.carried):
                        end = await relay.run()
            self._note_end(end)
        except asyncio.CancelledError:
            if self._relay is not None:
                self._note_end(self._relay.ended(EndReason.SHUTDOWN))
            raise
        except ClientGone:
            parts.metrics.startup_failed(StartupFailure.CLIENT_GONE)
            _log.debug("client left before its session was ready")
        except ProxyError as error:
            self._refuse(error.reason, error.response())
        except ClientViolation as violation:
            detail = f"reason={violation.reason}"
            refusal = ErrorResponse.fatal(violation.sqlstate, violation.message, detail)
            self._refuse(violation.reason, refusal)
        except Exception:
            # A bug of ours: its client is told what any other is, and the listener counts it.
            if self._relay is not None:
                end = self._relay.ended(EndReason.INTERNAL_ERROR)
                self._log_end(replace(end, reason=EndReason.INTERNAL_ERROR))
            elif self._startup.state is ClientState.AWAIT_BACKEND:
                bug = ProxyError(ErrorKind.INTERNAL)
                self._refuse(bug.reason, bug.response())
            raise

    def _route(self, message: StartupMessage) -> Passage:
        """Return where the client goes, and note it. Raises ProxyError for one without a way."""
        passage = self._parts.route(message)
        route = passage.route
        self._target, self._key, self._shard = route.target, route.key, passage.shard
        return passage

    async def _dial(self, passage: Passage) -> UpstreamSession:
        """Return a session upstream. Raises ClientGone, ProxyError or ClientViolation."""
        try:
            async with self._while_connected():
                upstream = await passage.dial()
        except asyncio.CancelledError:
            # A drain begins, and this client has not been answered yet.
            error = ProxyError(ErrorKind.SHUTTING_DOWN)
            self._refuse(error.reason, error.response())
            raise
        # Either side may have gone in the moment in which the other one was ready.
        if self._stream.gone.done():
            upstream.stream.transport.close()
            raise ClientGone
        if upstream.stream.transport.is_closing():
            raise ProxyError(ErrorKind.UPSTREAM_LOST)
        return upstream

    def _hand_over(
        self, passage: Passage, upstream: UpstreamSession, key: IssuedKey | None
    ) -> Relay:
        """Tell the client that it is served, and hand both connections over to a relay."""
        client, stream = self._stream, upstream.stream
        cancel_query = None
        if key is not None and passage.way.settings.cancel_on_disconnect:
            cancel_query = partial(self._parts.cancels.cancel, key)
        relay = Relay(client.transport, stream.transport, cancel_query, self._parts.lanes())
        # What either side sent early goes behind what the other is told first.
        shown = None if key is None else key.issued
        client.write(self._startup.accept(upstream.startup.welcome(shown)))
        self._relay = relay  # from here on no refusal can be told
        self._entry.relaying(relay)
        upstream_gone = stream.gone
        relay.from_upstream.data_received(
            upstream.startup.trailing_data() + stream.hand_over(relay.from_upstream)
        )
        relay.from_client.data_received(
            self._startup.trailing_data() + client.hand_over(relay.from_client)
        )
        if upstream_gone.done():
            relay.from_upstream.eof_received()
        if self._parts.idle_timeout_seconds:
            self._entry.end_after_idle(self._parts.idle_timeout_seconds)
        self._started_at_host = upstream.target.host
        asyncio.get_running_loop().call_later(_LINE_SECONDS, self._log_start)
        return relay

    def _refuse(self, reason: str, error: ErrorResponse) -> None:
        self._parts.metrics.session_refused(reason, error.sqlstate, self._target)
        _log.info(
            "session refused",
            reason=reason,
            sqlstate=error.sqlstate,
            detail=f"reason={reason}" if reason in _QUOTING_OPTIONS else error.text(b"D"),
            **self._where(),
            duration_seconds=self._duration_seconds(),
        )
        self._stream.write(self._startup.refuse(_naming(self._shard, error)))

    def _note_end(self, end: RelayEnd) -> None:
        self._parts.metrics.session_ended(end.reason, self._target)
        self._log_end(end)

    def _log_start(self) -> None:
        if host := self._started_at_host:
            self._started_at_host = ""
            _log.info("session started", **self._where(), host=host)

    def _log_end(self, end: RelayEnd) -> None:
        self._log_start()
        _log.info(
            "session ended",
            reason=end.reason.value,
            **self._where(),
            duration_seconds=self._duration_seconds(),
            client_bytes=end.client_bytes,
            upstream_bytes=end.upstream_bytes,
        )

    def _where(self) -> dict[str, str]:
        """Return what a log line says of where it goes."""
        return {"target": self._target} | ({"shard_key": self._key} if self._key else {})

    def _duration_seconds(self) -> float:
        """Return the time since accept, as the log shows it."""
        return round(asyncio.get_running_loop().time() - self._entry.started_at, 3)

    @asynccontextmanager
    async def _while_connected(self) -> AsyncIterator[None]:
        """Run the block as long as the client is there; then cancel it and raise ClientGone."""
        gone = self._stream.gone
        over = False
        try:
            async with asyncio.timeout(None) as scope:

                def leave(_: object) -> None:
                    if not over:  # a callback that is under way cannot be removed any more
                        scope.reschedule(asyncio.get_running_loop().time())

                gone.add_done_callback(leave)
                try:
                    yield
                finally:
                    over = True
                    gone.remove_done_callback(leave)
        except TimeoutError:
            raise ClientGone from None


def _naming(shard: str, error: ErrorResponse) -> ErrorResponse:
    """Return the error with the shard behind its DETAIL: who gave a key did not say which one."""
    ending = f" shard={shard}".encode() if shard else b""
    fields = ((kind, text + ending if kind == b"D" else text) for kind, text in error.fields)
    return ErrorResponse(tuple(fields))
