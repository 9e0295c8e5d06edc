"""A session that runs: opaque bytes, both directions alone, sockets that notice (W31 to W33, W36,
W47).

How much memory that takes is in `test_memory`, the whole of drivers' work in `differential`.
"""

import asyncio
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import ErrorResponse, Frame, ReadyForQuery
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.manual_upstream import (
    WELCOME,
    ManualSession,
    ManualUpstream,
    manual_upstream,
)
from tests.support.running import libpq

SYNC = Frame(b"S", b"").encode()


def extended(sql: str) -> bytes:
    parse = Frame(b"P", b"\0" + sql.encode() + b"\0\0\0").encode()
    return parse + Frame(b"B", bytes(8)).encode() + Frame(b"E", bytes(5)).encode()


@pytest_asyncio.fixture
async def upstream(lakebase: Lakebase) -> AsyncIterator[ManualUpstream]:
    async with manual_upstream(lakebase) as written:
        yield written


async def joined(client: Client, upstream: ManualUpstream) -> ManualSession:
    await client.send(startup())
    assert await client.receive() == WELCOME
    return await upstream.session()


# -- W31: opaque -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_w31_any_bytes_pass_both_ways_unchanged(
    start_proxy: StartProxy, upstream: ManualUpstream, seed: int
) -> None:
    # Messages of all 256 types, and then what is no message at all.
    noise = random.Random(seed)
    there = b"".join(
        Frame(bytes((kind,)), noise.randbytes(noise.randrange(100))).encode() for kind in range(256)
    )
    there += noise.randbytes(200_000)
    back = noise.randbytes(300_000)
    proxy = await start_proxy(upstream={"port": upstream.port, "cancel_on_disconnect": False})
    async with plain_client(proxy) as client:
        session = await joined(client, upstream)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.send(there))
            group.create_task(session.peer.send(back))
            received = b""
            while len(received) < len(back):
                received += await client.receive()
        await upstream.until(lambda: len(session.received) >= len(there))
    assert received == back
    assert session.received == there


async def until_ready(client: Client, count: int = 1) -> list[bytes]:
    """Return the types of the messages up to and with so many ReadyForQuery."""
    kinds: list[bytes] = []
    while count:
        message = await client.message()
        assert not isinstance(message, ErrorResponse), message
        kinds.append(message.type if isinstance(message, Frame) else message.encode()[:1])
        count -= isinstance(message, ReadyForQuery)
    return kinds


async def test_w31_every_way_to_talk_to_postgresql_works(proxy: App) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(query("SELECT 1; SELECT 2"))
        assert b"".join(await until_ready(client)) == b"TDCTDCZ"
        await client.send(extended("SELECT 1") + SYNC)
        assert b"".join(await until_ready(client)) == b"12DCZ"
        await client.send((extended("SELECT 1") + SYNC) * 5)  # pipelined
        assert b"".join(await until_ready(client, 5)) == b"12DCZ" * 5
        await client.send(Frame(b"P", b"\0SELECT 1\0\0\0").encode() + Frame(b"H", b"").encode())
        assert (await client.message()) == Frame(b"1", b"")  # Flush, and no Sync yet
        await client.send(SYNC)
        assert b"".join(await until_ready(client)) == b"Z"
        # FunctionCall: int4pl (177), both arguments binary, binary result
        four = struct.Struct("!i")
        call = struct.pack("!IhhhI", 177, 1, 1, 2, 4) + four.pack(40) + four.pack(4) + four.pack(2)
        await client.send(Frame(b"F", call + struct.pack("!h", 1)).encode())
        assert (await client.message()) == Frame(b"V", four.pack(4) + four.pack(42))
        assert b"".join(await until_ready(client)) == b"Z"


async def test_w31_copy_works_in_all_its_ways(proxy: App) -> None:
    rows, done = Frame(b"d", b"1\n2\n").encode(), Frame(b"c", b"").encode()
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.send(query("CREATE TEMP TABLE t (n int)"))
        await until_ready(client)
        await client.send(query("COPY t FROM STDIN"))
        assert (await client.message()) == Frame(b"G", b"\0\0\1\0\0")
        await client.send(rows * 3 + done)
        assert b"".join(await until_ready(client)) == b"CZ"
        await client.send(query("COPY t TO STDOUT"))
        assert b"".join(await until_ready(client)) == b"H" + b"d" * 6 + b"cCZ"
        await client.send(query("COPY t FROM STDIN"))
        await client.message()
        await client.send(rows + Frame(b"f", b"enough\0").encode())
        assert (await client.error()).sqlstate == "57014"
        await until_ready(client)
        # In the extended protocol, with the Sync that the server ignores
        await client.send(extended("COPY t FROM STDIN") + SYNC + rows + done + SYNC)
        assert b"".join(await until_ready(client)) == b"12GCZ"
        await client.query("SELECT count(*) FROM t")
        assert b"".join(await until_ready(client)) == b"TDCZ"


async def test_w31_notifications_and_prepared_statements_stay_with_their_session(
    proxy: App,
) -> None:
    connect = psycopg.AsyncConnection.connect
    async with (
        await connect(**libpq(proxy), autocommit=True) as hears,
        await connect(**libpq(proxy), autocommit=True) as speaks,
    ):
        await hears.execute("LISTEN w31")
        await speaks.execute("NOTIFY w31, 'heard'")
        heard = [n.payload async for n in hears.notifies(timeout=5, stop_after=1)]
        assert heard == ["heard"]
        for number in range(3):
            cursor = await speaks.execute("SELECT %s::int", (number,), prepare=True)
            assert await cursor.fetchone() == (number,)


# -- W32, W33 --------------------------------------------------------------------------------------


async def test_w32_neither_direction_waits_for_the_other(
    start_proxy: StartProxy, upstream: ManualUpstream
) -> None:
    # The client sends all of its 24 MB before it reads; the upstream's 24 MB wait meanwhile.
    size = 24_000_000
    proxy = await start_proxy(upstream={"port": upstream.port, "cancel_on_disconnect": False})
    async with plain_client(proxy) as client:
        session = await joined(client, upstream)
        answering = asyncio.create_task(session.peer.send(b"a" * size))
        await client.send(b"q" * size)
        await upstream.until(lambda: len(session.received) == size)
        assert not answering.done()
        received = 0
        while received < size:
            received += len(await client.receive())
        await answering


async def test_w33_an_upstream_is_not_read_while_its_client_does_not(
    start_proxy: StartProxy, upstream: ManualUpstream
) -> None:
    proxy = await start_proxy(upstream={"port": upstream.port, "cancel_on_disconnect": False})
    async with plain_client(proxy, receive_buffer_bytes=4096) as client:
        session = await joined(client, upstream)
        written = 0

        async def flood() -> None:
            nonlocal written
            while True:  # ends when the test does
                await session.peer.send(bytes(65536))
                written += 65536

        flooding = asyncio.create_task(flood())
        seen = -1
        while written > seen:  # until nothing more is taken for a while
            seen = written
            await asyncio.wait((flooding,), timeout=0.2)
        # What two connections of a kernel take, and the proxy's own bound; not the flood.
        assert written < 30_000_000
        flooding.cancel()
        await asyncio.wait((flooding,))


# -- W36: the sockets ------------------------------------------------------------------------------


@contextmanager
def own_sockets() -> Iterator[list[socket.socket]]:
    """Yield all connected TCP sockets of this process, in which the proxy runs too."""
    found: list[socket.socket] = []
    files = Path("/proc/self/fd")
    try:
        for name in list(files.iterdir()):
            # Only sockets are taken up: a second handle of a pipe would keep that from ending.
            with suppress(FileNotFoundError):  # the listing's own
                if str(name.readlink()).startswith("socket:"):
                    found.append(socket.socket(fileno=os.dup(int(name.name))))
        yield [sock for sock in found if _is_connected(sock)]
    finally:
        for sock in found:
            sock.close()


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return sock.family == socket.AF_INET


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looked up in /proc")
async def test_w36_both_sockets_send_at_once_and_notice_a_dead_peer(
    proxy: App, lakebase: Lakebase
) -> None:
    tcp = socket.IPPROTO_TCP
    expected = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (tcp, socket.TCP_NODELAY): 1,
        (tcp, socket.TCP_KEEPIDLE): 60,
        (tcp, socket.TCP_KEEPINTVL): 10,
        (tcp, socket.TCP_KEEPCNT): 3,
    }
    # The upstream's alone: to a client a closed window is a reason to wait, not to cut (W33).
    unacknowledged = {"client": 0, "upstream": 120_000}
    async with plain_client(proxy) as client:
        await client.start_up()
        with own_sockets() as sockets:
            both = {
                "client": [s for s in sockets if s.getpeername() == client.sock.getsockname()],
                "upstream": [s for s in sockets if s.getpeername()[1] == lakebase.gateway.port],
            }
            for side, (sock,) in both.items():
                found = {
                    option: int(bool(sock.getsockopt(*option))) for option in list(expected)[:2]
                }
                found |= {option: sock.getsockopt(*option) for option in list(expected)[2:]}
                assert found == expected, side
                user_timeout = sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT)
                assert user_timeout == unacknowledged[side], side
