"""The admin address over real HTTP: its responses, and that it always frees its port."""

import asyncio
import signal
import socket
from contextlib import suppress

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.admin import REQUEST_BYTES_MAX, serve_admin
from proxy.observe.admin_access import CONNECTION_SECONDS_MAX, CONNECTIONS_MAX
from proxy.observe.status import Status
from tests.support.admin_address import ANSWER_SECONDS_MAX, LOOPBACK, ScriptedAdminState, ask
from tests.support.running import captured_log, eventually


@pytest.mark.parametrize("path", ["/startup", "/readiness", "/liveness"])
async def test_a_proxy_that_serves_passes_every_probe(path: str) -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, path)
    assert (answer.status, answer.body) == (200, b"yes\n")


@pytest.mark.parametrize(
    ("started", "ready", "statuses"),
    [
        (False, False, [503, 503, 200]),
        (True, True, [200, 200, 200]),
        (True, False, [200, 503, 200]),
    ],
    ids=["starting", "serving", "draining"],
)
async def test_each_probe_answers_its_own_question(
    started: bool, ready: bool, statuses: list[int]
) -> None:
    proxy = ScriptedAdminState(started, ready)
    async with serve_admin(proxy, host=LOOPBACK, port=0) as address:
        answers = [await ask(address.port, f"/{p}") for p in ("startup", "readiness", "liveness")]
    assert [answer.status for answer in answers] == statuses


async def test_a_response_shows_the_present_state() -> None:
    proxy = ScriptedAdminState()
    async with serve_admin(proxy, host=LOOPBACK, port=0) as address:
        before = await ask(address.port, "/readiness")
        proxy.ready = False
        after = await ask(address.port, "/readiness")
    assert (before.status, after.status) == (200, 503)


async def test_metrics_are_in_the_format_that_prometheus_reads() -> None:
    proxy = ScriptedAdminState()
    proxy.metrics.token_minted()
    async with serve_admin(proxy, host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.body.decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["lakebase_proxy_tokens_minted_total"] == 1


async def test_head_is_answered_without_a_body() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/readiness", "HEAD")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/status/x", 404),
        ("POST", "/metrics", 405),
        ("PUT", "/", 405),
        ("DELETE", "/status", 405),
        ("GET", "/quitquitquit", 404),  # it was not enabled
        ("POST", "/quitquitquit", 404),
    ],
)
async def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, path, method)
    assert answer.status == status


async def test_the_program_that_serves_it_is_not_named() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        assert "server" not in (await ask(address.port, "/liveness")).headers


async def test_ipv6_loopback_is_served() -> None:
    try:
        async with serve_admin(ScriptedAdminState(), host="::1", port=0) as address:
            assert (await ask(address.port, "/liveness", host="::1")).status == 200
    except OSError:
        pytest.skip("this machine has no IPv6")


async def test_a_port_that_is_taken_raises_before_the_block_begins() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=r"admin\.port: .*in use"):
            async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=port):
                pytest.fail("it must not begin")


async def refuses(port: int) -> bool:
    try:
        await asyncio.open_connection(LOOPBACK, port)
    except ConnectionRefusedError:
        return True
    return False


async def test_the_port_is_free_after_the_block() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        await ask(address.port, "/liveness")
    assert await refuses(address.port)


async def test_a_block_that_ends_at_once_frees_the_port() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        pass
    assert await refuses(address.port)


async def test_an_exception_of_the_block_is_not_changed() -> None:
    ports = []

    async def fail_inside() -> None:
        async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
            ports.append(address.port)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert await refuses(ports[0])


async def test_a_cancelled_block_frees_the_port() -> None:
    ports: asyncio.Queue[int] = asyncio.Queue()

    async def serve_for_ever() -> None:
        async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
            ports.put_nowait(address.port)
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(serve_for_ever())
        port = await ports.get()
        serving.cancel()
    assert serving.cancelled()
    assert await refuses(port)


async def test_a_silent_client_does_not_delay_the_end() -> None:
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
            await ask(address.port, "/liveness")
            reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_an_exception_is_answered_with_500_and_logged() -> None:
    class Broken(ScriptedAdminState):
        def status(self) -> Status:
            raise RuntimeError("what only the log shows")

    shown = Broken()
    with captured_log() as log:
        async with serve_admin(shown, host=LOOPBACK, port=0) as address:
            answer = await ask(address.port, "/status")
            assert answer.status == 500
            assert b"what only" not in answer.body
            assert (await ask(address.port, "/liveness")).status == 200
    assert shown.metrics.value("admin_errors_total") == 1
    (line,) = log.above_info()
    assert (line["event"], line["path"], line["level"]) == (
        *("admin request failed", "/status"),
        "error",
    )
    assert "RuntimeError" in line["exception"]


async def kill_the_server() -> None:
    """End the task that serves, as a bug in the HTTP library would."""
    (served,) = [task for task in asyncio.all_tasks() if task.get_name() == "admin server"]
    served.cancel()
    await asyncio.wait([served])


def reopened() -> bool:
    return any(task.get_name() == "admin server" for task in asyncio.all_tasks())


async def test_an_admin_address_that_dies_is_opened_again() -> None:
    # Otherwise probes fail until the orchestrator restarts a proxy that works.
    shown = ScriptedAdminState()
    with captured_log() as log:
        async with serve_admin(shown, host=LOOPBACK, port=0) as address:
            for deaths in (1, 2):
                assert (await ask(address.port, "/readiness")).status == 200
                await kill_the_server()
                await eventually(reopened, "another one serves")
                assert shown.metrics.value("admin_restarts_total") == deaths
            assert (await ask(address.port, "/readiness")).status == 200
    assert await refuses(address.port)
    assert [(line["event"], line["level"]) for line in log.above_info()] == [
        ("admin address died; sessions continue", "error")
    ] * 2


async def test_a_dead_admin_address_does_not_delay_the_end() -> None:
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
            await ask(address.port, "/liveness")
            await kill_the_server()
        assert await refuses(address.port)


async def take(port: int) -> socket.socket:
    """Listen on the port as soon as it is free."""
    while True:  # ends with the test's own timeout
        try:
            return socket.create_server((LOOPBACK, port))
        except OSError:
            await asyncio.sleep(0)


async def test_a_port_in_use_by_another_program_is_waited_for() -> None:
    with captured_log() as log:
        async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
            await ask(address.port, "/liveness")
            await kill_the_server()
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                taken = await take(address.port)
            with taken:
                await eventually(lambda: log.events("admin address not reopened"), "it tries")
            await eventually(reopened, "it has the port again")
            assert (await ask(address.port, "/liveness")).status == 200


async def test_a_request_has_a_bounded_size() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
        head = b"GET /liveness HTTP/1.1\r\nHost: localhost\r\nX-Long: "
        writer.write(head + b"x" * REQUEST_BYTES_MAX)
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            assert (await reader.readline()).split()[1] == b"400"
            assert b"yes" not in await reader.read()
        writer.close()


@pytest.mark.slow
async def test_a_connection_that_never_finishes_its_request_ends() -> None:
    # A few of these occupied the connections that probes need, forever.
    async def stay(port: int, said: bytes) -> None:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(said)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()

    async with (
        asyncio.timeout(CONNECTION_SECONDS_MAX + ANSWER_SECONDS_MAX),
        serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address,
        asyncio.TaskGroup() as tasks,
    ):
        for said in (b"", b"GET /liveness HTTP/1.1\r\nHost: lo"):
            tasks.create_task(stay(address.port, said))


async def test_idle_connections_do_not_keep_a_probe_out() -> None:
    # Sixty-four of them were enough for a 503, and so for a restart of the pod.
    async with (
        asyncio.timeout(ANSWER_SECONDS_MAX),
        serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address,
    ):
        held = []
        for number in range(2 * CONNECTIONS_MAX):
            reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
            writer.write(b"GET /liveness HTTP/1.1\r\nHost: lo" if number % 2 else b"")
            held.append((reader, writer))
        assert (await ask(address.port, "/liveness")).status == 200
        with suppress(ConnectionResetError):
            assert await held[0][0].read() == b""  # the oldest went
        reader, writer = held[-1]
        writer.write(b"calhost\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"  # the youngest did not
        for _, writer in held:
            writer.close()


async def test_no_response_is_cached_or_sniffed_by_a_browser() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        for path in ("/", "/status", "/metrics", "/liveness"):
            headers = (await ask(address.port, path)).headers
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff"


async def test_signals_stay_with_the_proxy() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        await ask(address.port, "/liveness")
        during = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert during == before


async def test_a_look_up_is_answered_with_what_the_proxy_knows_to_this_machine_only() -> None:
    async with serve_admin(ScriptedAdminState(), host=LOOPBACK, port=0) as address:
        found = await ask(address.port, "/lookup?key=%2D5%26")
        none = await ask(address.port, "/lookup")
        headers = "Host: localhost\r\nX-Forwarded-For: 192.0.2.1\r\n"
        foreign = await ask(address.port, "/lookup?key=5", headers=headers)
    assert (found.status, found.json) == (200, {"ok": True, "canonical_key": "-5&"})
    assert none.status == 200
    assert (none.json["ok"], none.json["reason"]) == (False, "key_missing")
    assert foreign.status == 403
