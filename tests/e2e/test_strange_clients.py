"""Clients that do not behave: each gets a clear ErrorResponse or a close, and leaves nothing.

"Nothing" is counted: tasks of the loop, open files, connections in the metrics, sessions upstream.
Nothing that they do is logged above info.
"""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import AuthenticationOk, ReadyForQuery, Terminate
from proxy.wire.startup import GSSENCRequest, ProtocolVersion, SSLRequest
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client, query, startup
from tests.support.running import LogLines, all_over, eventually, nothing_left


@pytest_asyncio.fixture
async def guarded(start_proxy: StartProxy, lakebase: Lakebase, log: LogLines) -> AsyncIterator[App]:
    """Return a proxy that has served a client, and must be as before after the test."""
    proxy = await start_proxy(listen={"startup_timeout_seconds": 5})
    await ordinary_session(proxy)
    await all_over(proxy, lakebase)
    async with nothing_left():
        yield proxy
        await all_over(proxy, lakebase)
    assert log.above_info() == []
    await ordinary_session(proxy)


async def ordinary_session(proxy: App) -> None:
    async with plain_client(proxy) as client:
        await client.start_up()
        await client.query("SELECT 'served'")
        await until_ready(client)
        await client.send(Terminate().encode())


async def until_ready(client: Client) -> None:
    while not isinstance(await client.message(), ReadyForQuery):
        pass


async def test_a_client_that_speaks_byte_by_byte_is_served(guarded: App) -> None:
    async with plain_client(guarded) as client:
        for byte in SSLRequest().encode():
            await client.send(bytes((byte,)))
        assert await client.receive() == b"N"
        for byte in startup(application_name="slow"):
            await client.send(bytes((byte,)))
            await asyncio.sleep(0)
        await until_ready(client)
        for byte in query("SELECT 1"):
            await client.send(bytes((byte,)))
        await until_ready(client)


async def test_queries_pipelined_after_the_startup_message_are_answered(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(startup() + query("SELECT 1") + query("SELECT 2"))
        assert await client.message() == AuthenticationOk()
        for _ in range(3):
            await until_ready(client)


@pytest.mark.parametrize("length", [100, 100_000, 3_000_000])
async def test_a_query_right_after_the_startup_message_arrives_whole(
    guarded: App, length: int
) -> None:
    # Longer than what waits while the session starts: reading stops meanwhile, and goes on.
    async with plain_client(guarded) as client:
        await client.send(startup() + query(f"SELECT length('{'x' * length}')"))
        await until_ready(client)
        received = b""
        while str(length).encode() not in received:
            received += await client.receive()


@pytest.mark.parametrize("portion", [1, 3, 4, 7, 8, 9, 20])
async def test_a_client_that_closes_in_the_middle_of_startup_is_forgotten(
    guarded: App, portion: int
) -> None:
    async with plain_client(guarded) as client:
        await client.send(startup()[:portion])
        client.close()


@pytest.mark.parametrize("way", ["close", "reset"])
async def test_a_probe_that_connects_and_leaves_is_counted_and_forgotten(
    guarded: App, way: str, log: LogLines
) -> None:
    async with plain_client(guarded) as client:
        getattr(client, way)()
        reason = {"reason": "probe"}
        await eventually(
            lambda: guarded.metrics.value("startup_failures_total", **reason) == 1, "it is counted"
        )


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /x HTTP/1.0\r\n\r\n"]
)
async def test_an_http_request_is_closed_without_a_word(
    guarded: App, line: bytes, log: LogLines
) -> None:
    async with plain_client(guarded) as client:
        await client.send(line)
        assert await client.receive_rest() == b""
    assert guarded.metrics.value("startup_failures_total", reason="http_request") == 1
    assert [line["level"] for line in log.events("client refused")] == ["debug"]


@pytest.mark.parametrize("seed", range(8))
async def test_20_random_bytes_get_an_error_or_a_close(guarded: App, seed: int) -> None:
    noise = random.Random(seed).randbytes(20)
    async with plain_client(guarded) as client:
        await client.send(noise)
        assert_answered(await client.receive_rest())


@pytest.mark.parametrize("seed", range(8))
async def test_20_random_bytes_in_a_packet_of_the_right_length_get_an_error_or_a_close(
    guarded: App, seed: int
) -> None:
    noise = random.Random(seed).randbytes(20)
    async with plain_client(guarded) as client:
        await client.send(b"\0\0\0\x18" + noise)
        assert_answered(await client.receive_rest())


def assert_answered(answer: bytes) -> None:
    """An ErrorResponse of either form, or nothing."""
    assert answer == b"" or answer.startswith(b"E"), answer


async def test_ssl_request_is_answered_n_and_the_session_goes_on(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(SSLRequest().encode())
        assert await client.receive() == b"N"
        await client.start_up()


async def test_both_encryption_requests_are_answered_n_once_each(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(GSSENCRequest().encode())
        assert await client.receive() == b"N"
        await client.send(SSLRequest().encode())
        assert await client.receive() == b"N"
        await client.send(GSSENCRequest().encode())
        error = await client.error()
        assert error.sqlstate == "0A000"
        assert error.text(b"D").startswith("reason=unsupported_protocol")
        assert await client.receive_rest() == b""


async def test_a_tls_hello_is_closed_on_its_first_byte(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(b"\x16")
        assert await client.receive_rest() == b""


async def test_protocol_4_gets_an_error_response(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(startup(ProtocolVersion(4, 0)))
        error = await client.error()
        assert (error.sqlstate, error.text(b"V")) == ("0A000", "FATAL")
        assert await client.receive_rest() == b""


async def test_a_startup_message_without_a_user_gets_an_error_response(guarded: App) -> None:
    async with plain_client(guarded) as client:
        await client.send(startup(user=""))
        error = await client.error()
        assert (error.sqlstate, error.text(b"D")) == ("28000", "reason=user_missing")


async def test_protocol_3_2_is_served_and_keeps_the_upstreams_key(guarded: App) -> None:
    async with plain_client(guarded) as client:
        key = await client.start_up(ProtocolVersion(3, 2))
        assert key is not None
        assert len(key.key) in (4, 32)


@pytest.mark.parametrize("first", [b"", b"\0\0\0\x08", SSLRequest().encode()])
async def test_a_startup_that_is_too_slow_is_closed_without_a_word(
    start_proxy: StartProxy, log: LogLines, first: bytes
) -> None:
    proxy = await start_proxy(listen={"startup_timeout_seconds": 0.1})
    async with nothing_left():
        async with plain_client(proxy) as client:
            await client.send(first)
            rest = await client.receive_rest()
            assert rest in (b"", b"N")
        await eventually(lambda: proxy.metrics.value("connections") == 0, "it is gone")
    assert proxy.metrics.value("startup_failures_total", reason="startup_timeout") == 1
    assert log.above_info() == []


async def test_the_startup_clock_does_not_run_while_the_database_wakes(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    endpoint = lakebase["one"].endpoint
    endpoint.suspend()
    endpoint.wake_seconds = 0.4
    proxy = await start_proxy(listen={"startup_timeout_seconds": 0.1})
    async with plain_client(proxy) as client:
        await client.start_up()


async def test_a_hundred_strange_clients_at_once_do_not_keep_an_ordinary_one_waiting(
    guarded: App,
) -> None:
    noise = random.Random(1)

    async def strange() -> None:
        async with plain_client(guarded) as client:
            await client.send(noise.randbytes(noise.randrange(1, 60)))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(strange())
        async with asyncio.timeout(5):
            await ordinary_session(guarded)


SMB_NEGOTIATE = bytes.fromhex("000000a4ff534d42") + bytes(156)


async def test_a_port_scan_of_smb_is_no_news(guarded: App, log: LogLines) -> None:
    async with plain_client(guarded) as client:
        await client.send(SMB_NEGOTIATE)
        await client.receive_rest()
    assert [line["level"] for line in log.events("client refused")] == ["debug"]


async def test_what_a_driver_says_wrong_is_a_line(guarded: App, log: LogLines) -> None:
    async with plain_client(guarded) as client:
        await client.send(bytes((0, 0, 0, 9, 0, 3, 0, 0, 0)))
        assert (await client.error()).sqlstate == "28000"
    (line,) = log.events("client refused")
    assert (line["level"], line["reason"]) == ("info", "user_missing")
