"""CancelRequests (W38 to W42): delivered before the client hears of it, and never answered."""

import asyncio
import socket

import pytest

from proxy.emulator.faults import Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.wire.messages import BackendKeyData, Terminate
from proxy.wire.secret import Secret
from proxy.wire.startup import V3_0, V3_2, CancelRequest, ProtocolVersion, SSLRequest
from tests.e2e.conftest import StartProxy
from tests.support.client import Client, plain_client
from tests.support.running import LogLines, eventually, query_runs

SLEEP = "SELECT pg_sleep(60)"


async def busy_session(client: Client, lakebase: Lakebase) -> BackendKeyData:
    """Start a session with a query that runs; return its cancel key."""
    key = await client.start_up()
    assert key is not None
    await client.query(SLEEP)
    await query_runs(lakebase)
    return key


async def cancel(proxy: App, key: BackendKeyData, before: bytes = b"", after: bytes = b"") -> bytes:
    """Send a CancelRequest and return all that came back."""
    async with plain_client(proxy) as client:
        if before:
            await client.send(before)
            assert await client.receive() == b"N"
        await client.send(CancelRequest(key.pid, key.key).encode() + after)
        return await client.receive_rest()


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (SSLRequest().encode(), b""), (b"", b"\0")],
    ids=["plain", "after SSLRequest", "with a byte after it"],
)
async def test_w38_each_form_of_cancel_ends_the_query_and_is_not_answered(
    proxy: App, lakebase: Lakebase, before: bytes, after: bytes
) -> None:
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        assert await cancel(proxy, key, before, after) == b""
        assert (await client.error()).sqlstate == "57014"
    (record,) = lakebase.gateway.cancels
    assert record.cancel_known
    assert record.secure
    assert record.sni == lakebase["one"].endpoint.host
    assert record.token is None
    assert proxy.metrics.value("cancel_requests_total", result="forwarded") == 1


async def test_w39_the_client_is_closed_only_after_the_upstream_closed(
    proxy: App, lakebase: Lakebase
) -> None:
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG, times=1)
        async with plain_client(proxy) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            await lakebase.gateway.until(lambda: bool(lakebase.gateway.cancels))
            closing = asyncio.create_task(canceller.receive())
            # A round trip on another session: had the proxy closed, it would be seen by now.
            async with plain_client(proxy) as other:
                await other.start_up()
            assert not closing.done()
            lakebase.gateway.clear_faults()
            assert await closing == b""
            assert lakebase.gateway.cancels[0].cancel_known


async def test_w39_an_unknown_key_is_closed_at_once_and_goes_nowhere(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        wrong_key = BackendKeyData(key.pid, Secret(bytes(4)))
        wrong_pid = BackendKeyData(key.pid ^ 1, key.key)
        longer = BackendKeyData(key.pid, Secret(key.key.reveal() + b"\0"))
        for unknown in (wrong_key, wrong_pid, longer):
            assert await cancel(proxy, unknown) == b""
        with pytest.raises(TimeoutError):
            await client.receive(0.05)
    assert lakebase.gateway.cancels == []
    assert proxy.metrics.value("cancel_requests_total", result="unknown_key") == 3
    assert log.above_info() == []


async def test_a_key_ends_with_its_session(proxy: App, lakebase: Lakebase) -> None:
    async with plain_client(proxy) as client:
        key = await client.start_up()
        assert key is not None
        assert len(proxy.cancel_keys) == 1
        await client.send(Terminate().encode())
        client.close()
        await eventually(lambda: len(proxy.cancel_keys) == 0, "the key is forgotten")
    assert await cancel(proxy, key) == b""
    assert lakebase.gateway.cancels == []


async def test_a_cancel_ends_only_the_session_that_it_names(proxy: App, lakebase: Lakebase) -> None:
    async with plain_client(proxy) as one, plain_client(proxy) as two:
        keys = [await busy_session(client, lakebase) for client in (one, two)]
        await cancel(proxy, keys[1])
        assert (await two.error()).sqlstate == "57014"
        found = [proxy.cancel_keys.find(CancelRequest(key.pid, key.key)) for key in keys]
        # A pool keeps the upstream session of neither client, if it was cancelled (P17).
        assert [issued and issued.forwarded for issued in found] == [False, True]
        with pytest.raises(TimeoutError):
            await one.receive(0.05)


async def test_w42_cancels_are_neither_refused_nor_counted_when_all_places_are_taken(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(listen={"max_connections": 1})
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        lakebase.gateway.inject(Stage.CANCEL, Injection.HANG, times=1)
        async with plain_client(proxy) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            await lakebase.gateway.until(lambda: bool(lakebase.gateway.cancels))
            lakebase.gateway.clear_faults()
            assert await canceller.receive_rest() == b""
        assert (await client.error()).sqlstate == "57014"


async def test_a_cancel_that_cannot_be_delivered_closes_and_is_counted(
    proxy: App, lakebase: Lakebase, log: LogLines
) -> None:
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        await lakebase.gateway.refuse_connections()
        assert await cancel(proxy, key) == b""
        await lakebase.gateway.accept_connections()
    assert proxy.metrics.value("cancel_requests_total", result="failed") == 1
    assert len(log.events("cancel request not delivered")) == 1
    assert log.above_info() == []


@pytest.mark.parametrize("version", [V3_0, V3_2], ids=str)
@pytest.mark.parametrize("real", [True, False], ids=["real keys", "random keys"])
async def test_w27_the_key_is_the_upstreams_own_unless_its_pid_is_not_positive(
    proxy: App, lakebase: Lakebase, version: ProtocolVersion, real: bool
) -> None:
    lakebase["one"].endpoint.passes_real_key = real
    for _ in range(6):  # random pids are negative half of the time
        async with plain_client(proxy) as client:
            key = await client.start_up(version)
            shown = lakebase.gateway.sessions[-1].issued_key
            assert key is not None
            assert shown is not None
            assert key.pid > 0
            if shown.pid > 0:
                assert key == shown
            else:
                assert len(key.key) == (32 if version == V3_2 else 4)


async def test_a_key_of_32_bytes_that_the_proxy_issued_cancels(
    proxy: App, lakebase: Lakebase
) -> None:
    while True:  # until the gateway's random pid is negative
        async with plain_client(proxy) as client:
            key = await client.start_up(V3_2)
            assert key is not None
            if len(key.key) == 32:
                await client.query(SLEEP)
                assert await cancel(proxy, key) == b""
                # Cancelled while running, or before it began: then it runs, so try again.
                while lakebase.gateway.cancels[-1].cancel_known:
                    try:
                        assert (await client.error()).sqlstate == "57014"
                        return
                    except TimeoutError:
                        await cancel(proxy, key)


async def test_a_client_that_does_not_wait_for_its_cancel_still_has_it_delivered(
    proxy: App, lakebase: Lakebase
) -> None:
    # node-postgres closes as soon as the request is written.
    async with plain_client(proxy) as client:
        key = await busy_session(client, lakebase)
        async with plain_client(proxy) as canceller:
            await canceller.send(CancelRequest(key.pid, key.key).encode())
            canceller.sock.shutdown(socket.SHUT_RDWR)
            canceller.close()
        assert (await client.error()).sqlstate == "57014"
