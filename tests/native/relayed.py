"""A relay over real sockets, with lanes or without, and the two peers whose bytes it carries."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from proxy import native
from proxy.session.end_reason import RelayEnd
from proxy.session.fast_path import watched_lanes
from proxy.session.relay import Relay
from tests.support.peer import WAIT_SECONDS_MAX, Peer, bound_buffers
from tests.transport.peers import Contexts, linked, secured

if TYPE_CHECKING:
    from proxy.native.lanes import Lanes

# What the ends of a connection hold where a peer that reads nothing is to be full soon; less than
# a segment of the loopback, which is 64 KiB, would make each wait for a timer.
SMALL_BUFFER_BYTES: Final = 128 * 1024


@dataclass
class Relayed:
    """A relay that runs, and its two peers."""

    client: Peer
    upstream: Peer
    client_transport: asyncio.Transport
    upstream_transport: asyncio.Transport
    relay: Relay
    lanes: "Lanes"
    running: asyncio.Task[RelayEnd]

    async def end(self) -> RelayEnd:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            return await self.running


@asynccontextmanager
async def relayed(
    *,
    laned: bool = True,
    tls: Contexts | None = None,
    small: bool = False,
    first: bytes = b"",
    closed: bool = False,
    keeps_upstream: bool = False,
    reads_before_lanes: int = 0,
    cancel_query: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Relayed]:
    """Run a relay; `tls` is on its upstream. With `small` buffers a peer that reads nothing is
    full soon. `first` is written to the client before the relay gets its connection. `closed`
    lanes take no new one."""
    async with AsyncExitStack() as stack:
        lanes = stack.enter_context(watched_lanes())
        if closed:
            lanes = native.lanes.Lanes()
            lanes.close()
        upstream_stream, upstream = await stack.enter_async_context(
            linked() if tls is None else secured(tls, server_side=False)
        )
        client_stream, client = await stack.enter_async_context(
            linked(SMALL_BUFFER_BYTES if small else 0)
        )
        if small:
            bound_buffers(upstream_stream.transport.get_extra_info("socket"), SMALL_BUFFER_BYTES)
            bound_buffers(upstream.sock, SMALL_BUFFER_BYTES)
        relay = Relay(
            client_stream.transport,
            upstream_stream.transport,
            cancel_query,
            lanes if laned else None,
            keeps_upstream=keeps_upstream,
            reads_before_lanes=reads_before_lanes,
        )
        client_stream.write(first)
        relay.from_upstream.data_received(upstream_stream.hand_over(relay.from_upstream))
        relay.from_client.data_received(client_stream.hand_over(relay.from_client))
        running = asyncio.create_task(relay.run())
        await asyncio.sleep(0)  # it begins
        try:
            yield Relayed(
                client,
                upstream,
                client_stream.transport,
                upstream_stream.transport,
                relay,
                cast("Lanes", lanes),
                running,
            )
        finally:
            running.cancel()
            await asyncio.wait((running,))


def pythons(tls: Contexts) -> Contexts:
    """Return the same contexts with Python's for the end under test."""
    return Contexts(tls.server, tls.client, tls.authority)
