"""The admin address over real HTTP: what it answers, and that it always gives its port back."""

import asyncio
import signal
import socket
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.observe.admin import AdminState, serve_admin
from proxy.observe.metrics import Metrics

LOOPBACK = "127.0.0.1"

# Far more than an answer on loopback takes; only a hang gets here.
ANSWER_SECONDS_MAX = 5


@dataclass
class Proxy:
    """What the admin address shows, set by each test."""

    started: bool = True
    ready: bool = True
    metrics: Metrics = field(
        default_factory=lambda: Metrics(
            version="1", session_end_reasons=[], startup_failure_reasons=[]
        )
    )

    def state(self) -> AdminState:
        return AdminState(
            started=lambda: self.started,
            ready=lambda: self.ready,
            metrics=self.metrics.exposition,
        )


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def ask(port: int, path: str, method: str = "GET", host: str = LOOPBACK) -> Answer:
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            request = f"{method} {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
            writer.write(request.encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
    status_line, *header_lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in header_lines)
    return Answer(int(status_line.split(" ")[1]), headers, body)


@pytest.mark.parametrize("path", ["/startup", "/readiness", "/liveness"])
async def test_a_proxy_that_serves_is_well(path: str) -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
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
    proxy = Proxy(started, ready)
    async with serve_admin(proxy.state(), host=LOOPBACK, port=0) as address:
        answers = [await ask(address.port, f"/{p}") for p in ("startup", "readiness", "liveness")]
    assert [answer.status for answer in answers] == statuses


async def test_an_answer_is_of_now() -> None:
    proxy = Proxy()
    async with serve_admin(proxy.state(), host=LOOPBACK, port=0) as address:
        before = await ask(address.port, "/readiness")
        proxy.ready = False
        after = await ask(address.port, "/readiness")
    assert (before.status, after.status) == (200, 503)


async def test_metrics_are_in_the_format_that_prometheus_reads() -> None:
    proxy = Proxy()
    proxy.metrics.token_minted()
    async with serve_admin(proxy.state(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.body.decode())
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["lakebase_proxy_tokens_minted_total"] == 1


async def test_head_is_answered_without_a_body() -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/readiness", "HEAD")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/status/x", 404), ("POST", "/metrics", 405)],
)
async def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, path, method)
    assert answer.status == status


async def test_the_program_behind_it_is_not_named() -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        assert "server" not in (await ask(address.port, "/liveness")).headers


async def test_ipv6_loopback_is_served() -> None:
    try:
        async with serve_admin(Proxy().state(), host="::1", port=0) as address:
            assert (await ask(address.port, "/liveness", host="::1")).status == 200
    except OSError:
        pytest.skip("this machine has no IPv6")


async def test_a_port_that_is_taken_raises_before_the_block_begins() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            async with serve_admin(Proxy().state(), host=LOOPBACK, port=port):
                pytest.fail("it must not begin")


async def refuses(port: int) -> bool:
    try:
        await asyncio.open_connection(LOOPBACK, port)
    except ConnectionRefusedError:
        return True
    return False


async def test_the_port_is_free_after_the_block() -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        await ask(address.port, "/liveness")
    assert await refuses(address.port)


async def test_a_block_that_ends_at_once_gives_the_port_back() -> None:
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        pass
    assert await refuses(address.port)


async def test_what_the_block_raises_comes_out_as_it_was() -> None:
    ports = []

    async def fail_inside() -> None:
        async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
            ports.append(address.port)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert await refuses(ports[0])


async def test_a_cancelled_block_gives_the_port_back() -> None:
    ports: asyncio.Queue[int] = asyncio.Queue()

    async def serve_for_ever() -> None:
        async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
            ports.put_nowait(address.port)
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(serve_for_ever())
        port = await ports.get()
        serving.cancel()
    assert serving.cancelled()
    assert await refuses(port)


async def test_a_client_that_says_nothing_does_not_hold_up_the_end() -> None:
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
            await ask(address.port, "/liveness")
            reader, writer = await asyncio.open_connection(LOOPBACK, address.port)
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_a_failing_callable_is_a_500_and_nothing_more() -> None:
    def broken() -> bool:
        raise RuntimeError("not-a-real-secret")

    state = AdminState(started=lambda: True, ready=broken, metrics=lambda: b"")
    async with serve_admin(state, host=LOOPBACK, port=0) as address:
        answer = await ask(address.port, "/readiness")
        assert answer.status == 500
        assert b"not-a-real-secret" not in answer.body
        assert (await ask(address.port, "/liveness")).status == 200


async def test_signals_stay_with_the_proxy() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    async with serve_admin(Proxy().state(), host=LOOPBACK, port=0) as address:
        await ask(address.port, "/liveness")
        during = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert during == before
