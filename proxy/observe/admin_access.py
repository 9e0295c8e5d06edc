"""Access to the admin address: which requests are allowed, and how long a connection may last.

For: preventing a web page in a browser on this machine from reading the status or ending the proxy,
and connections that are slow, idle or not read from occupying the few that probes need. Not for:
user authentication; the address is on loopback unless the configuration says otherwise.

Invariant: nothing here waits. Every connection ends within `CONNECTION_SECONDS_MAX`, and the
oldest is closed if another client needs its place.
"""

import asyncio
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from proxy.addresses import address_of

# From connect to close, in any case. A scrape takes milliseconds, and a client that returns after
# some seconds (a probe, a scraper, the page) can connect again.
CONNECTION_SECONDS_MAX: Final = 10.0
# Far more than probes and one or two scrapers need. Beyond it the oldest connection is closed for a
# new one, first of those without a request: a request that is old has a client that does not read.
CONNECTIONS_MAX: Final = 64
# A probe may be among the many that have just connected: it is not closed while others are older.
_YOUNG_SECONDS: Final = 0.2

# Headers that a browser adds to a page's POST, or an HTTP proxy in front of us to any request. The
# peer's address then does not identify the client.
_FOREIGN_HEADERS: Final = ("origin", "forwarded", "x-forwarded-for")
# What a browser says of a request that no other site's page made. It adds no Origin to the GET of a
# script or an image.
_OWN_SITES: Final = ("same-origin", "none")

# The source addresses of a program that connects to loopback. Connections from the rest of
# 127.0.0.0/8 may be forwarded for others: Istio's sidecar forwards from 127.0.0.6.
_OWN_ADDRESSES: Final = (address_of("127.0.0.1"), address_of("::1"))


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with two bounds that uvicorn does not have.

    It ends after a fixed time, because uvicorn waits for a request without a limit. And if all
    places are occupied, a new connection replaces the oldest one. uvicorn would refuse the new one,
    and a probe that is refused restarts the pod.
    """

    # uvicorn narrows the argument as well: a TCP listener passes nothing else.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self.opened = loop.time()
        self._end = loop.call_later(CONNECTION_SECONDS_MAX, transport.abort)
        if len(self.connections) > CONNECTIONS_MAX:
            self._close_oldest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _close_oldest(self) -> None:
        """Abort another connection: if possible not a new one, and one without a request."""
        others = [
            other
            for other in self.connections
            if isinstance(other, BoundedProtocol) and other is not self
        ]
        old_at = self.opened - _YOUNG_SECONDS
        oldest = min(others, key=lambda each: (each.opened > old_at, each.has_request, each.opened))
        self.connections.discard(oldest)  # at once: connection_lost is called later
        oldest.transport.abort()

    @property
    def has_request(self) -> bool:
        """Whether a complete request was received and its response is not sent yet."""
        # Before the first request there is no cycle, in spite of uvicorn's annotation.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete


class HostCheck:
    """Checks the name in the Host header: a page in a browser may be the client of a foreign one.

    A web page can let its own host name resolve to 127.0.0.1, and then read responses from there as
    its own ("DNS rebinding"). The Host header has the page's name then. An address is no name.

    On loopback a foreign name is answered with 421. An address for other machines may have any
    name; but a request with a foreign one then counts as another machine's.
    """

    def __init__(self, app: ASGIApp, own_name: str, *, refuses: bool) -> None:
        self._app = app
        self._own_name = own_name.lower()
        self._refuses = refuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _without_port(Headers(scope=scope).get("host", ""))
        if host in ("", "localhost", self._own_name) or address_of(host) is not None:
            await self._app(scope, receive, send)
        elif self._refuses:
            answer = PlainTextResponse("ask for localhost or for an address\n", 421)
            await answer(scope, receive, send)
        else:
            await self._app({**scope, "client": None}, receive, send)


def is_from_this_machine(request: Request) -> bool:
    """Return whether a program on this machine sent the request: no web page, no HTTP proxy."""
    peer: Any = request.client
    if peer is None or any(name in request.headers for name in _FOREIGN_HEADERS):
        return False
    if request.headers.get("sec-fetch-site", "none") not in _OWN_SITES:
        return False
    return address_of(peer.host) in _OWN_ADDRESSES


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
