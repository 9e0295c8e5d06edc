"""Memory stays flat: COPY of 200 MB both ways, and a client that does not read 300 MB (W32, W33).

The proxy is a process of its own, measured by the highest resident size that the kernel saw.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import psycopg
import pytest

from proxy.emulator.lakebase import Lakebase
from proxy.session.memory_trim import RELEASE_SECONDS_MAX
from proxy.wire.messages import ReadyForQuery
from tests.e2e.conftest import StartProcess
from tests.support.admin_address import ask, metrics_once
from tests.support.client import Client, plain_client, query
from tests.support.pooling import SESSION_MODE
from tests.support.proxy_process import ProxyProcess
from tests.support.running import WAIT_SECONDS_MAX, eventually, libpq

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured in /proc"),
]

MEGABYTE = 1_000_000
GROWTH_BYTES_MAX = 8 * MEGABYTE
IDLE_SESSION_BYTES_MAX = 26_000  # of a pool, OpenSSL's part of 15 to 20 kB included
LINE = b"x" * 999 + b"\n"
CHUNK = LINE * 256


def copy_in(proxy: ProxyProcess, total_bytes: int) -> int:
    """Send so many bytes by COPY; return how many the database took."""
    with psycopg.connect(**libpq(proxy)) as connection:
        connection.execute("CREATE TEMP TABLE t (s text)")
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            for _ in range(total_bytes // len(CHUNK)):
                copy.write(CHUNK)
        row = connection.execute("SELECT sum(length(s) + 1) FROM t").fetchone()
    assert row is not None
    return int(row[0])


def copy_out(proxy: ProxyProcess, total_bytes: int) -> int:
    """Receive so many bytes by COPY; return how many came."""
    sql = f"COPY (SELECT repeat('x', 999) FROM generate_series(1, {total_bytes // 1000})) TO STDOUT"
    with psycopg.connect(**libpq(proxy)) as connection, connection.cursor().copy(sql) as copy:
        return sum(len(portion) for portion in copy)


async def growth(proxy: ProxyProcess, work: Callable[[ProxyProcess, int], int], size: int) -> int:
    """Return by how much the peak rose over what a smaller run of the same needed."""
    await asyncio.to_thread(work, proxy, 4 * MEGABYTE)
    before = proxy.memory_bytes()
    proxy.reset_peak()
    moved = await asyncio.to_thread(work, proxy, size)
    assert moved >= size - len(CHUNK)
    return proxy.memory_bytes("VmHWM") - before


@pytest.mark.parametrize("work", [copy_in, copy_out])
async def test_copy_of_200_megabytes_keeps_memory_flat(
    proxy_process: ProxyProcess, work: Callable[[ProxyProcess, int], int]
) -> None:
    assert await growth(proxy_process, work, 200 * MEGABYTE) < GROWTH_BYTES_MAX


async def test_w33_a_stalled_client_with_a_result_of_300_megabytes_keeps_memory_flat(
    proxy_process: ProxyProcess, lakebase: Lakebase
) -> None:
    rows = 300_000
    async with plain_client(proxy_process) as client:
        await client.start_up()
        await client.query("SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        await drop_until_ready(client)
        before = proxy_process.memory_bytes()
        proxy_process.reset_peak()
        await client.query(f"SELECT repeat('x', 1000) FROM generate_series(1, {rows})")
        # All buffers on the way are full when Postgres itself waits to write.
        pid = lakebase.gateway.sessions[-1].real_pid
        stalled = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'ClientWrite'"
        await eventually(lambda: lakebase["one"].cluster.execute(stalled), "Postgres is stalled")
        async with plain_client(proxy_process) as other:  # and others are served meanwhile
            await other.start_up()
        assert proxy_process.memory_bytes("VmHWM") - before < GROWTH_BYTES_MAX
        assert await drop_until_ready(client) > rows * 1000
        assert proxy_process.memory_bytes("VmHWM") - before < GROWTH_BYTES_MAX


async def drop_until_ready(client: Client) -> int:
    """Read up to an idle ReadyForQuery; return how many bytes that was."""
    total, tail = 0, b""
    ready = ReadyForQuery(b"I").encode()
    while not tail.endswith(ready):
        received = await client.receive()
        assert received
        total += len(received)
        tail = (tail + received)[-len(ready) :]
    return total


async def test_w32_24_megabytes_pipelined_each_way_neither_deadlock_nor_pile_up(
    proxy_process: ProxyProcess,
) -> None:
    # Each query's text comes back as its row: what is sent and what is received is the same size.
    # Nothing is read until sending stalls, as libpq does it in its non-blocking mode.
    count, text = 24, "x" * MEGABYTE
    async with plain_client(proxy_process) as client:
        await client.start_up()
        before = proxy_process.memory_bytes()
        proxy_process.reset_peak()
        sending = asyncio.create_task(send_all(client, query(f"SELECT '{text}'") * count))
        received, answers = 0, 0
        while answers < count:
            portion = await client.receive()
            assert portion
            received += len(portion)
            answers += portion.count(b"Z\0\0\0\x05I")
        await sending
    assert received > count * MEGABYTE
    assert proxy_process.memory_bytes("VmHWM") - before < GROWTH_BYTES_MAX


async def send_all(client: Client, content: bytes) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(60):
        await loop.sock_sendall(client.sock, content)


async def test_p49_an_idle_upstream_session_costs_little_and_gives_it_back(
    start_process: StartProcess,
) -> None:
    count = 200
    bounds = {"pool_idle_max": count, "pool_spare_min": 0}
    admin = {"enabled": True, "port": 0}
    proxy = await start_process(admin=admin, upstream={**SESSION_MODE, **bounds})
    port = int(proxy.events("serving")[0]["admin_port"])
    async with AsyncExitStack() as stack:
        for _ in range(count):
            client = await stack.enter_async_context(plain_client(proxy))
            await client.start_up()
    idle = '_pool_sessions{state="idle",target="upstream"} '
    await metrics_once(port, lambda text: f"{idle}{count}.0" in text)
    kept = proxy.memory_bytes()
    await ask(port, "/reconnect", "POST")
    # It is released a moment after the last session has ended.
    seconds = RELEASE_SECONDS_MAX + WAIT_SECONDS_MAX
    freed = partial(_freed_bytes, proxy, kept)
    await eventually(lambda: freed() > count * 10_000, "memory is given back", seconds)
    assert freed() < count * IDLE_SESSION_BYTES_MAX


def _freed_bytes(proxy: ProxyProcess, before: int) -> int:
    return before - proxy.memory_bytes()
