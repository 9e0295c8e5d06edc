"""A listener for this process alone: asyncpg talks to an upstream through the proxy's own dialer.

For: the connections to the catalogue and, as administrator, to shards. So tokens, TLS, waking,
`hostaddr`, retries and the diagnosis of a failure are those of any session. Not for: clients.

The listener is on a free port of 127.0.0.1. `connect` makes a random name that serves once, and
asyncpg sends it as its database. A connection with another name is closed without an answer: other
processes of the machine may connect, and cannot know a name.

`share` serves a unix socket to other programs, for as long as its block runs: the permissions of
the socket's directory say which.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from proxy.catalogue.errors import driver_errors
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.metrics import Metrics
from proxy.session.cancel import CancelForwarder, CancelKeys
from proxy.session.relay import Relay
from proxy.session.starting_client import ClientGone, StartingClient
from proxy.transport.sockets import detect_dead_peer, listen_tcp, listen_unix
from proxy.transport.stream import StartupStream
from proxy.upstream.connector import Connector
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstream_session import UpstreamSession
from proxy.upstream.upstreams import SessionOpener
from proxy.wire.client_startup import CancelReceived, StartupReceived
from proxy.wire.startup import StartupMessage

_LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 128
_NAME_BYTES: Final = 16
# From accept to the StartupMessage, on the same machine and often of a busy process.
_STARTUP_SECONDS_MAX: Final = 10.0
# Connections that have not sent a known name. Ours do so at once.
_UNKNOWN_MAX: Final = 64
# Connections to a shared socket at a time: a parallel dump or restore has one for each job.
SHARED_MAX: Final = 64
_SHARED_MODE: Final = 0o600
# A dial has its own bound, `connect_timeout_seconds`, which is 600 at most.
_CONNECT_SECONDS_MAX: Final = 660.0
CLOSE_SECONDS_MAX: Final = 2.0
# The user where the upstream's is "*". An upstream that has a role of its own ignores it.
_USER: Final = "lakebase-auth-proxy"

# For a driver whose server is this process: it would take these from the environment, where they
# are meant for the upstream.
LOCAL_DRIVER: Final = {
    "ssl": False,
    "direct_tls": False,
    "password": "",
    "target_session_attrs": "any",
    "gsslib": "gssapi",
}


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A connection of our driver, with its StartupMessage."""

    client: StartingClient
    startup: StartupReceived


class PrivateListener:
    """Opens asyncpg connections over `SessionOpener`s; use it with `async with`.

    `cancel_keys` and `cancels` are those of the process's sessions: the driver cancels a statement
    that takes longer than its timeout.
    """

    def __init__(self, cancel_keys: CancelKeys, cancels: CancelForwarder) -> None:
        self._cancel_keys = cancel_keys
        self._cancels = cancels
        self._expected: dict[str, asyncio.Future[_Arrival]] = {}
        self._unknown: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        """Where it listens; known inside the block."""

    @classmethod
    def of_verb(cls, connector: Connector, metrics: Metrics) -> Self:
        """Return a listener for a process that serves no clients: the cancels are its own."""
        keys = CancelKeys()
        return cls(keys, CancelForwarder(keys, connector, metrics))

    async def __aenter__(self) -> Self:
        """Listen. Raises OSError if there is no free port."""
        (sock,) = listen_tcp([_LOOPBACK], 0, _BACKLOG)
        self.port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accepted, sock=sock, backlog=_BACKLOG)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the port, and the connections whose name is not known yet."""
        assert self._server is not None
        self._server.close()
        await _cancelled(*self._unknown)

    @asynccontextmanager
    async def connect(
        self, opener: SessionOpener, *, statements_cached: int = 0
    ) -> AsyncIterator[Any]:
        """Yield an asyncpg connection on a session of this opener, and close it after the block.

        After an exception it is closed without waiting for the statement that runs. The driver
        keeps `statements_cached` prepared statements, which a transaction pooler does not allow.

        Raises ProxyError, that of the dial.
        """
        loop = asyncio.get_running_loop()
        name = secrets.token_hex(_NAME_BYTES)
        self._expected[name] = arrival = loop.create_future()
        serving = loop.create_task(self._serve(opener, arrival))
        try:
            connection = await self._connect_driver(name, serving, statements_cached)
            try:
                yield connection
            except BaseException:
                connection.terminate()
                raise
            with suppress(*driver_errors()):  # a TimeoutError is an OSError
                await connection.close(timeout=CLOSE_SECONDS_MAX)
        finally:
            self._expected.pop(name, None)
            try:
                if arrival.done():  # the relay ends with the driver's connection
                    await asyncio.wait((serving,), timeout=CLOSE_SECONDS_MAX)
            finally:
                await _cancelled(serving)

    async def _connect_driver(
        self, name: str, serving: asyncio.Task[None], statements_cached: int
    ) -> Any:
        """Return the driver's connection. Raises ProxyError."""
        import asyncpg  # noqa: PLC0415 - a proxy without a catalogue does not load it

        try:
            return await asyncpg.connect(
                host=_LOOPBACK,
                port=self.port,
                user=_USER,
                database=name,
                timeout=_CONNECT_SECONDS_MAX,
                statement_cache_size=statements_cached,
                **LOCAL_DRIVER,
            )
        except driver_errors() as error:
            # The driver knows what the dialer sent it; the dialer's own error says more.
            await asyncio.wait((serving,), timeout=CLOSE_SECONDS_MAX)
            failure = serving.exception() if serving.done() and not serving.cancelled() else None
            if failure is not None:
                raise failure from None
            detail = f"{type(error).__name__}: {error}"
            raise ProxyError(ErrorKind.UPSTREAM_LOST, detail) from error

    @asynccontextmanager
    async def share(self, opener: SessionOpener, path: Path) -> AsyncIterator[None]:
        """Serve all connections to a unix socket with sessions of this opener during the block.

        At most SHARED_MAX at a time; another one is closed. What is open at the end of the block is
        closed; the file is left to the owner of its directory. Raises OSError if the socket cannot
        be made.
        """
        loop = asyncio.get_running_loop()
        serving: set[asyncio.Task[None]] = set()

        def connected(stream: StartupStream) -> None:
            if len(serving) >= SHARED_MAX:
                stream.transport.abort()
                return
            task = loop.create_task(self._serve_shared(opener, stream))
            serving.add(task)
            task.add_done_callback(serving.discard)

        sock = listen_unix(path, _SHARED_MODE, _BACKLOG)
        server = await loop.create_unix_server(lambda: _PrivateStream(connected), sock=sock)
        try:
            yield
        finally:
            server.close()
            await _cancelled(*serving)

    async def _serve_shared(self, opener: SessionOpener, stream: StartupStream) -> None:
        arrival = await self._received(stream)
        if arrival is None:
            stream.transport.abort()
            return
        with suppress(ProxyError, OSError):  # the client was told
            await self._relay(opener, arrival)

    # -- accepting -------------------------------------------------------------------------------

    def _accepted(self) -> StartupStream:
        return _PrivateStream(self._connected)

    def _connected(self, stream: StartupStream) -> None:
        if len(self._unknown) >= _UNKNOWN_MAX or self._server is None:
            stream.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._identify(stream))
        self._unknown.add(task)
        task.add_done_callback(self._unknown.discard)

    async def _identify(self, stream: StartupStream) -> None:
        """Pass a connection on to the `connect` that expects it, or close it."""
        arrival = await self._received(stream)
        if arrival is not None:
            name = (arrival.startup.message.get(b"database") or b"").decode("ascii", "replace")
            expected = self._expected.pop(name, None)
            if expected is not None and not expected.done():
                expected.set_result(arrival)
                return
        stream.transport.abort()

    async def _received(self, stream: StartupStream) -> _Arrival | None:
        """Return a connection that has sent its StartupMessage. A CancelRequest is forwarded."""
        client = StartingClient(stream, None)
        try:
            async with asyncio.timeout(_STARTUP_SECONDS_MAX):
                event = await client.receive_startup()
                if isinstance(event, CancelReceived):
                    await self._cancels.request(event.request)
        except (TimeoutError, ConnectionError):
            event = None
        except asyncio.CancelledError:
            stream.transport.abort()
            raise
        return _Arrival(client, event) if isinstance(event, StartupReceived) else None

    # -- serving ---------------------------------------------------------------------------------

    async def _serve(self, opener: SessionOpener, expected: "asyncio.Future[_Arrival]") -> None:
        """Open a session for the driver's connection, and relay. Raises ProxyError."""
        await self._relay(opener, await expected)

    async def _relay(self, opener: SessionOpener, arrival: _Arrival) -> None:
        client, version = arrival.client, arrival.startup.version
        try:
            upstream = await _open(opener, arrival)
        except BaseException:
            await client.close()
            raise
        key = upstream.startup.key
        with self._cancel_keys.issue(key, upstream.target, version) as issued:
            client.welcome(upstream, None if issued is None else issued.issued)
            cancel_query = None
            if issued is not None and opener.cancel_on_disconnect:
                cancel_query = partial(self._cancels.cancel_disconnected, issued)
            relay = Relay(
                client.transport,
                upstream.stream.transport,
                cancel_query,
                cancels_copy_only=opener.checks_connection,
            )
            client.start_relay(relay, upstream)
            await relay.run()


class _PrivateStream(StartupStream):
    """Reports the connection when it is made."""

    __slots__ = ("_on_connected",)

    def __init__(self, on_connected: Callable[[StartupStream], None]) -> None:
        super().__init__()
        self._on_connected = on_connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_connected(self)


async def _open(opener: SessionOpener, arrival: _Arrival) -> UpstreamSession:
    """Open the session upstream, and answer the driver if that fails. Raises ProxyError."""
    client = arrival.client
    try:
        with client.while_connected():
            upstream = await opener.open(_without_name(arrival.startup.message), DialPhases())
    except ClientGone:
        raise ProxyError(ErrorKind.SHUTTING_DOWN, "the driver has given up") from None
    except ProxyError as error:
        client.refuse(error.response())
        raise
    if client.is_gone or upstream.stream.transport.is_closing():
        upstream.stream.transport.abort()
        raise ProxyError(ErrorKind.UPSTREAM_LOST)
    detect_dead_peer(upstream.stream.transport)
    return upstream


def _without_name(message: StartupMessage) -> StartupMessage:
    """Return the message without our name as its database: the target's own is opened."""
    kept = tuple(pair for pair in message.parameters if pair[0] != b"database")
    return StartupMessage(message.version, kept)


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks and wait for them. What they raised was reported before."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
