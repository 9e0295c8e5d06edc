"""Who may ask the admin address, and how long a connection to it may last.

For: keeping web pages on the same machine from reading or ending the proxy through a browser, and
slow or silent connections from using up the few places that probes need. Not for: users; the
address is loopback's unless the configuration says otherwise.

Invariant: nothing here waits; every connection ends within `CONNECTION_SECONDS_MAX`, and one that
asks for nothing keeps no place that another needs.
"""

import asyncio
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from proxy.addresses import address_of

# From connect to close, whatever it does. A scrape takes milliseconds, and who comes again after
# some seconds (a probe, a scraper, the page) may as well connect again.
CONNECTION_SECONDS_MAX: Final = 10.0
# Probes and one or two scrapers, many times over. Whoever is one too many takes the place of the
# oldest connection without a request; where all have one, that is abuse and is answered with 503.
CONNECTIONS_MAX: Final = 64

# Headers that a browser sends with a page's POST, or a forwarding proxy in front of us: the peer's
# address then says nothing of who asks.
_FOREIGN_HEADERS: Final = ("origin", "forwarded", "x-forwarded-for")

# What a program that calls loopback calls from. The rest of 127.0.0.0/8 may be others' calls that
# something on this machine hands on: Istio's sidecar does so from 127.0.0.6.
_OWN_ADDRESSES: Final = (address_of("127.0.0.1"), address_of("::1"))


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with an end: uvicorn itself waits for a request without a limit.

    And with a way in for a probe while others hold all places in silence: uvicorn's limit refuses
    whoever comes, which would have a pod restarted.
    """

    # uvicorn narrows the argument, too: what listens on TCP is given nothing else.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self.opened = loop.time()
        self._end = loop.call_later(CONNECTION_SECONDS_MAX, transport.abort)
        if len(self.connections) > CONNECTIONS_MAX:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Cut the oldest of the other connections that no request is answered on, if there is."""
        silent = [
            other
            for other in self.connections
            if isinstance(other, BoundedProtocol) and other is not self and not other.is_asked
        ]
        if silent:
            oldest = min(silent, key=lambda other: other.opened)
            self.connections.discard(oldest)  # now: its end is told later
            oldest.transport.abort()

    @property
    def is_asked(self) -> bool:
        """Whether a request has come whole and its answer has not gone out."""
        # uvicorn has no cycle before the first request, whatever it has annotated.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete


class HostCheck:
    """Answers 421 to a Host that is a foreign name, where only this machine is served.

    A page on the web can have its own name resolve to 127.0.0.1 and then read what is served there
    as its own ("DNS rebinding"). Its name is in the Host header; an address is not a name.
    """

    def __init__(self, app: ASGIApp, own_name: str) -> None:
        self._app = app
        self._own_name = own_name.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _without_port(Headers(scope=scope).get("host", ""))
        if host in ("", "localhost", self._own_name) or address_of(host) is not None:
            await self._app(scope, receive, send)
        else:
            answer = PlainTextResponse("ask for localhost or for an address\n", 421)
            await answer(scope, receive, send)


def is_from_this_machine(request: Request) -> bool:
    """Tell whether a program on this machine asks, itself: not a browser's page, not a proxy."""
    peer: Any = request.client
    if peer is None or any(name in request.headers for name in _FOREIGN_HEADERS):
        return False
    return address_of(peer.host) in _OWN_ADDRESSES


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
