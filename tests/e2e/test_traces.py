"""Traces of session starts, by the real SDK, at a real receiver of OTLP over HTTP."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from proxy.catalogue.mapping_status import TakeOffline, TakeOnline
from proxy.emulator.lakebase import Lakebase
from proxy.observe.traces import CLOSE_SECONDS_MAX
from proxy.server.serving import serving
from tests.e2e.conftest import StartProcess
from tests.e2e.test_psql import psql
from tests.support.catalogue import Stores
from tests.support.client import plain_client, startup
from tests.support.pooling import pooling, settled
from tests.support.proxy_process import run_to_end
from tests.support.running import LogLines, eventually, first_lines, proxy_settings
from tests.support.sidecars import connect, named_shards, parked, started_sidecars
from tests.support.trace_receiver import TraceReceiver, receiving_traces, values

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
DIAL = ["mint", "dns", "tcp", "tls", "login"]
# There is none where the StartupMessage came with the connection, or the host is known.
MAY_BE_THERE = ("startup", "lookup")


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceReceiver]:
    """Return a receiver that the environment names."""
    with receiving_traces() as receiver:
        monkeypatch.setenv(ENDPOINT, receiver.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        yield receiver


async def test_a_session_start_is_a_span_with_its_phases_as_children(
    lakebase: Lakebase, log: LogLines, receiver: TraceReceiver
) -> None:
    async with serving(proxy_settings(lakebase)) as proxy:
        assert await psql(proxy, "SELECT 1") == "1"
    (line,) = first_lines(log)
    host, connection = line["host"], line["connection"]
    (start,) = receiver.starts()
    assert (start.name, start.kind) == ("session start", start.SPAN_KIND_SERVER)
    assert start.status.code == start.status.STATUS_CODE_UNSET
    assert values(start.attributes) == {
        "db.system.name": "postgresql",
        "lakebase_proxy.connection": connection,
        "lakebase_proxy.target": "upstream",
        "server.address": host,
        "server.port": lakebase.port,
    }
    names = receiver.names_within(start)
    rest = [name for name in names if name not in MAY_BE_THERE]
    assert rest == ["route", *sorted_dial(names)]
    resource = receiver.resources[0]
    assert resource["service.name"] == "lakebase-auth-proxy"
    assert resource["deployment.environment.name"] == "tests"
    for body in receiver.bodies:  # of what the client sent and was: nothing
        for word in (b"anyone", b"SELECT", lakebase.client_id.encode(), b"databricks_postgres"):
            assert word not in body


def sorted_dial(names: list[str]) -> list[str]:
    """Return a dial's phases in the order in which they began; each is there once."""
    dial = [name for name in names if name in DIAL]
    assert sorted(dial) == sorted(DIAL)
    return dial


async def test_a_pools_take_has_the_dial_inside_it_and_a_reused_session_has_none(
    lakebase: Lakebase, receiver: TraceReceiver
) -> None:
    async with serving(proxy_settings(lakebase, **pooling())) as proxy:
        for _ in range(2):
            await psql(proxy, "SELECT 1")
            await settled(proxy, idle=1)
    dialled, reused = sorted(receiver.starts(), key=lambda span: int(span.start_time_unix_nano))
    for start in (dialled, reused):
        names = [name for name in receiver.names_within(start) if name not in MAY_BE_THERE]
        assert names == ["route", "take"]
    first, second = (span for span in receiver.spans if span.name == "take")
    assert set(receiver.names_within(first)) >= set(DIAL)
    assert receiver.names_within(second) == []


async def test_with_a_catalogue_the_park_and_the_admission_are_spans(
    stores: Stores, receiver: TraceReceiver
) -> None:
    async with named_shards(stores) as operating, started_sidecars(stores) as start:
        bounds, app = operating.bounds(0, 100), await start()
        await (await connect(app, 5)).close()
        await operating.run(TakeOffline(operating.map, *bounds))
        waiting = asyncio.ensure_future(connect(app, 5))
        await eventually(lambda: parked(app) == 1, "the client is parked")
        await operating.run(TakeOnline(operating.map, *bounds))
        await (await waiting).close()
    starts = sorted(receiver.starts(), key=lambda span: int(span.start_time_unix_nano))
    at_once, after_a_park = map(receiver.names_within, starts)
    for names in (at_once, after_a_park):
        assert set(names) >= {"route", *DIAL}
        assert names[-1] == "admit"
    assert ("park" in at_once, "park" in after_a_park) == (False, True)
    assert {values(start.attributes)["lakebase_proxy.target"] for start in starts} == {
        f"{operating.map.name}/one"
    }


async def test_a_refused_session_says_why_and_in_which_phase(
    lakebase: Lakebase, receiver: TraceReceiver
) -> None:
    async with serving(proxy_settings(lakebase)) as proxy, plain_client(proxy) as client:
        await client.send(startup(database="missing"))
        assert (await client.error()).sqlstate == "3D000"
    (start,) = receiver.starts()
    found = values(start.attributes)
    assert found["error.type"] == "database_missing"
    assert found["db.response.status_code"] == "3D000"
    assert start.status.code == start.status.STATUS_CODE_ERROR
    assert values(receiver.named("login").attributes) == {"error.type": "database_missing"}


async def test_workers_send_what_they_have_before_they_end(
    start_process: StartProcess, receiver: TraceReceiver
) -> None:
    process = await start_process(listen={"port": 0, "workers": 2})
    for _ in range(2):
        assert await psql(process, "SELECT 1") == "1"
    process.send(signal.SIGTERM)
    assert await process.ended() == 0
    assert len(receiver.starts()) == 2


async def test_a_collector_that_does_not_answer_costs_a_bounded_end_and_no_session(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts and never answers
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{silent.getsockname()[1]}")
        process = await start_process()
        assert await psql(process, "SELECT 1") == "1"
        began = time.monotonic()
        process.send(signal.SIGTERM)
        assert await process.ended() == 0
    assert time.monotonic() - began < CLOSE_SECONDS_MAX + 5


async def test_what_the_sdk_cannot_use_costs_no_start_and_shows_no_secret(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The proxy ended with a traceback, and the SDK logged the header that it could not read.
    for name, value in {
        ENDPOINT: "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key not-a-real-secret",
        "OTEL_BSP_MAX_QUEUE_SIZE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    process = await start_process()
    assert await psql(process, "SELECT 1") == "1"
    process.send(signal.SIGTERM)
    assert await process.ended() == 0
    assert "no traces: the SDK refuses its environment" in process.err
    assert "not-a-real-secret" not in process.err


IMPORTED = """
import sys
from proxy.observe.traces import open_traces
assert open_traces("1") is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=["no-endpoint", "disabled", "no-exporter", "grpc"],
)
async def test_nothing_is_imported_where_nothing_is_to_be_sent(
    environment: dict[str, str],
) -> None:
    code, out, _ = await run_to_end(sys.executable, "-c", IMPORTED, environment=environment)
    assert (code, out.strip().splitlines()[-1]) == (0, "[]")


async def test_an_endpoint_without_the_extra_is_a_warning() -> None:
    without = "import sys; sys.modules['opentelemetry'] = None"
    code, out, errors = await run_to_end(
        sys.executable, "-c", without + IMPORTED, environment={ENDPOINT: "http://127.0.0.1:1"}
    )
    assert code == 0
    assert "no traces: the extra otel is not installed" in out + errors
