"""Clients of the admin address that send much and read nothing: probes are answered anyway."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from statistics import median

import pytest

from tests.e2e.conftest import StartProcess
from tests.support.admin_address import LOOPBACK, ask

pytestmark = pytest.mark.slow

METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
FLOODS = {
    "never read": (300, METRICS),
    "pipelined": (80, METRICS * 10_000),
    "header without an end": (300, b"GET /liveness HTTP/1.1\r\nX-Long: "),
}
PROBES = 20
PROBE_SECONDS_MAX = 1.0  # half of them took 2 s and more


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


async def flood(port: int, said: bytes, stack: ExitStack) -> None:
    """Connect and send what the proxy takes at once; read nothing."""
    client = stack.enter_context(closing(socket.socket()))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (LOOPBACK, port))
    with suppress(OSError):  # it is full, or has made room for a younger one
        client.send(said)


@pytest.mark.parametrize("flooding", FLOODS)
async def test_admin_clients_that_never_read_delay_no_probe(
    start_process: StartProcess, stack: ExitStack, flooding: str
) -> None:
    # Each report was made for 64 of them before the next step of a probe, and once all had a
    # request, a probe was refused with 503, which restarts a pod.
    count, said = FLOODS[flooding]
    proxy = await start_process(admin={"enabled": True, "port": 0})
    port = int(proxy.events("serving")[0]["admin_port"])
    seconds = []
    for _ in range(PROBES):
        for _ in range(count // PROBES):
            await flood(port, said, stack)
        begun = time.monotonic()
        assert (await ask(port, "/liveness")).status == 200
        seconds.append(time.monotonic() - begun)
    assert median(seconds) < PROBE_SECONDS_MAX, seconds
