"""A workspace API that fails for more than some seconds, as clients and operators see it."""

import asyncio
import json
import re
import statistics
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.emulator import faults
from proxy.emulator.api import Call
from proxy.emulator.cluster import Cluster
from proxy.emulator.faults import Hang, Reply
from proxy.emulator.lakebase import PERSONAL_TOKEN, Lakebase
from proxy.observe.logs import worker_log
from proxy.server.app import App
from proxy.server.serving import serving
from proxy.workspace.outage import OUTAGE_SECONDS
from tests.e2e.conftest import StartProcess, StartProxy
from tests.support.admin_address import ask
from tests.support.client import plain_client, startup
from tests.support.proxy_process import START_SECONDS_MAX
from tests.support.running import Listening, LogLines, eventually, libpq, proxy_settings
from tests.support.secret_canaries import watching

# Milliseconds where the machine does nothing else; the tests of others run beside this one.
AT_ONCE_SECONDS = 0.5
AT_ONCE_REFUSALS = 7
BETWEEN_SECONDS = 0.25
OUTAGE_SECONDS_MAX = 30.0
# What is asked for after so long an outage, as the median of so many refusals in a row.
REFUSAL_SECONDS_MAX = 0.05
LONG_OUTAGE_SECONDS = 10.0
REFUSALS = 20
SERIES_MAX = 5
OPEN_SECONDS = 9.0  # the first call that hangs, and the time after it until clients do not wait
PROBES_SECONDS_MAX = 15.0  # the longest back-off, and a call

pytestmark = pytest.mark.slow


async def refused(proxy: Listening) -> tuple[str, float]:
    """Return the words of a client that is refused, and how long it took."""
    begun = time.monotonic()
    with pytest.raises(psycopg.OperationalError) as error:
        await psycopg.AsyncConnection.connect(**libpq(proxy))
    return str(error.value), time.monotonic() - begun


async def served(proxy: Listening) -> bool:
    try:
        async with await psycopg.AsyncConnection.connect(**libpq(proxy)):
            return True
    except psycopg.OperationalError:
        return False


OUTAGES: dict[str, tuple[Call, Reply | Hang, str]] = {
    "credential": (Call.CREDENTIAL, faults.INTERNAL, "reason=api_error HTTP 500"),
    "login_hangs": (Call.TOKEN, faults.HANG, "reason=api_unreachable"),
    "host": (Call.RESOURCE, faults.UNAVAILABLE, "reason=api_error HTTP 503"),
    "discovery": (Call.DISCOVERY, faults.UNAVAILABLE, "HTTP 503"),
    "where_to_log_in": (Call.OIDC, faults.UNAVAILABLE, "HTTP 503"),
    "identity": (Call.ME, faults.INTERNAL, "reason=api_error HTTP 500"),
}
NUMBERS = {how: number for number, how in enumerate(OUTAGES)}
# With a personal access token the role is looked up.
PERSONAL = {
    "workspace": {"client_id": "", "client_secret": "", "token": PERSONAL_TOKEN, "auth_type": "pat"}
}


@pytest.mark.parametrize("max_age_seconds", [60, 0])
async def test_new_clients_are_refused_at_once_until_the_api_works_again(
    clusters: Mapping[str, Cluster], log: LogLines, max_age_seconds: float
) -> None:
    # Each client waited up to 28 s, the page was green, and the log had no line. Every kind of
    # outage takes seconds, so each has a workspace and a proxy of its own, all at a time.
    async with asyncio.TaskGroup() as group:
        for how in OUTAGES:
            group.create_task(outage(clusters, log, how, max_age_seconds))


async def outage(
    clusters: Mapping[str, Cluster], log: LogLines, how: str, max_age_seconds: float
) -> None:
    """Run one outage, with clients all the time."""
    call, fault, reason = OUTAGES[how]
    async with AsyncExitStack() as stack:
        # The proxy's lines have it, as this task starts it.
        stack.enter_context(worker_log(NUMBERS[how]))
        lakebase = await stack.enter_async_context(Lakebase(clusters=clusters))
        settings = proxy_settings(
            lakebase,
            admin={"enabled": True, "port": 0},
            credentials={"mint_timeout_seconds": 3, "token_max_age_seconds": max_age_seconds},
            **(PERSONAL if call is Call.ME else {}),
        )
        proxy = await stack.enter_async_context(serving(settings))
        await stack.enter_async_context(watching(proxy))
        lakebase.workspace.fail(call, fault)
        begun = time.monotonic()
        while (await refused(proxy))[1] > AT_ONCE_SECONDS or (
            time.monotonic() - begun < OPEN_SECONDS
        ):
            assert time.monotonic() - begun < OUTAGE_SECONDS_MAX, how
            await asyncio.sleep(BETWEEN_SECONDS)
        series = []
        for _ in range(AT_ONCE_REFUSALS):
            text, seconds = await refused(proxy)
            assert reason in text
            series.append(seconds)
            await asyncio.sleep(BETWEEN_SECONDS)
        assert statistics.median(series) < AT_ONCE_SECONDS, how
        assert lines(log, how, "the workspace API fails") == 1
        assert len(await shown(proxy)) == 1
        lakebase.workspace.clear_faults()
        recovered = time.monotonic()
        while not await served(proxy):
            assert time.monotonic() - recovered < PROBES_SECONDS_MAX, how
            await asyncio.sleep(BETWEEN_SECONDS)
        assert await shown(proxy) == []
        assert lines(log, how, "the workspace API works again") == 1


def lines(log: LogLines, how: str, event: str) -> int:
    """Return how many lines of this event the proxy of an outage has written."""
    return sum(line.get("worker") == NUMBERS[how] for line in log.events(event))


async def test_after_ten_seconds_of_an_outage_a_refusal_takes_milliseconds(
    start_process: StartProcess, lakebase: Lakebase
) -> None:
    # The bound is asked of the proxy, and the machine may do much else: of five series the best.
    lakebase.workspace.fail(Call.CREDENTIAL, faults.INTERNAL)
    proxy = await start_process(credentials={"mint_timeout_seconds": 3})
    await eventually(
        lambda: proxy.events("the workspace API fails"), "its first mint", START_SECONDS_MAX
    )
    begun = time.monotonic()
    while time.monotonic() - begun < LONG_OUTAGE_SECONDS:  # it is the proxy's own clock
        await seconds_to_refusal(proxy)
        await asyncio.sleep(0.2)
    medians = []
    for _ in range(SERIES_MAX):
        series = [await seconds_to_refusal(proxy) for _ in range(REFUSALS)]
        medians.append(statistics.median(series))
        if medians[-1] <= REFUSAL_SECONDS_MAX:
            break
    assert min(medians) <= REFUSAL_SECONDS_MAX, medians


async def seconds_to_refusal(proxy: Listening) -> float:
    """Return how long one client is connected that is refused for the outage."""
    begun = time.monotonic()
    async with plain_client(proxy) as client:
        await client.send(startup())
        error = await client.error()
        assert await client.receive_rest() == b""
    assert error.text(b"D").startswith("reason=api_error HTTP 500")
    return time.monotonic() - begun


async def shown(proxy: App) -> list[str]:
    """Return the reasons of failing APIs in `/status`; each says since when."""
    assert proxy.admin is not None
    return [api["reason"] for api in await failing(proxy.admin.port)]


async def failing(admin_port: int) -> list[dict[str, Any]]:
    """Return the APIs that fail as `/status` shows them; each says since when."""
    status = json.loads((await ask(admin_port, "/status")).body)
    found = [api for api in status["workspace_apis"] if api["reason"]]
    assert all(api["failing_since"] and api["failing_seconds"] > 0 for api in found)
    return found


@pytest.mark.parametrize("how", ["host", "identity"])
async def test_an_outage_that_workers_meet_is_shown_and_logged_once(
    start_process: StartProcess, lakebase: Lakebase, how: str
) -> None:
    # Each worker logged it, and page and /status were green: the process that they show did not
    # know of it.
    call, fault, _ = OUTAGES[how]
    proxy = await start_process(
        admin={"enabled": True, "port": 0},
        listen={"port": 0, "workers": 2},
        upstream={"connect_timeout_seconds": 3},
        **PERSONAL,
    )
    port = int(proxy.events("serving")[0]["admin_port"])
    begun = time.monotonic()
    while (await ask(port, "/startup")).status != 200:  # a mint ends an outage
        assert time.monotonic() - begun < PROBES_SECONDS_MAX
        await asyncio.sleep(0.05)
    lakebase.workspace.fail(call, fault)
    for _ in range(3):
        await refused(proxy)
    (api,) = await failing(port)
    assert api["reason"] == "api_error"
    await eventually(lambda: proxy.events("the workspace API fails"), "it warns")
    assert len(proxy.events("the workspace API fails")) == 1
    lakebase.workspace.clear_faults()
    recovered = time.monotonic()
    while not await served(proxy):
        assert time.monotonic() - recovered < PROBES_SECONDS_MAX
        await asyncio.sleep(0.05)
    assert await failing(port) == []


async def test_a_limit_of_the_rate_is_no_outage(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(credentials={"mint_timeout_seconds": 30})
    lakebase.workspace.fail(Call.CREDENTIAL, faults.THROTTLED)
    early = asyncio.create_task(served(proxy))
    await lakebase.workspace.called(Call.CREDENTIAL, 2)
    late = asyncio.create_task(served(proxy))
    done, _ = await asyncio.wait([late], timeout=1)
    assert not done, "it was not refused: it waits within its budget"
    lakebase.workspace.clear_faults()
    assert await early
    assert await late


async def test_one_call_after_another_goes_on_without_further_clients(
    start_proxy: StartProxy, lakebase: Lakebase, log: LogLines
) -> None:
    proxy = await start_proxy(credentials={"mint_timeout_seconds": 1})
    lakebase.workspace.fail(Call.CREDENTIAL, faults.INTERNAL)
    begun = came = time.monotonic()
    # Until a client comes that does not wait: the first failure may take as long as a mint may.
    while came - begun < OUTAGE_SECONDS + 2:
        await asyncio.sleep(0.1)
        came = time.monotonic()
        await refused(proxy)
    lakebase.workspace.clear_faults()
    await eventually(
        lambda: log.events("the workspace API works again"), "a probe", PROBES_SECONDS_MAX
    )
    assert await served(proxy)


# -- the password file ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["gone", "empty"])
async def test_a_password_file_that_cannot_be_used_is_an_outage_in_log_and_status(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path, how: str, workers: int
) -> None:
    # Its clients were refused; no line of the log said since when, and the page was green.
    file = tmp_path / "password"
    file.write_text(lakebase.native_password)
    proxy = await start_process(
        admin={"enabled": True, "port": 0},
        listen={"port": 0, "workers": workers},
        credentials={"password_file": str(file)},
        upstream={
            "endpoint": "",
            "host": lakebase["one"].endpoint.pooled_host,
            "user": lakebase.native_role,
        },
    )
    port = int(proxy.events("serving")[0]["admin_port"])
    assert await served(proxy)
    assert await failing(port) == []
    if how == "gone":
        file.unlink()
    else:
        file.write_text("")
    text, _ = await refused(proxy)
    assert "password_file_unreadable" in text
    (shown_api,) = await failing(port)
    assert shown_api["workspace"] == "credentials.password_file"
    assert shown_api["reason"] == "password_file_unreadable"
    fails, works = "the password file cannot be used", "the password file can be used again"
    await eventually(lambda: proxy.events(fails), "it warns")
    line = proxy.events(fails)[0]
    assert (line["level"], line["reason"]) == ("warning", "password_file_unreadable")
    assert "credentials.password_file" in line["detail"]
    metrics = (await ask(port, "/metrics")).body.decode()
    found = re.search(
        r'api_failing_seconds\{workspace="credentials\.password_file"\} (\S+)', metrics
    )
    assert found is not None
    assert float(found[1]) > 0
    file.write_text(lakebase.native_password)
    assert await served(proxy)
    assert await failing(port) == []
    await eventually(lambda: proxy.events(works), "it says that it is over")


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_host_that_cannot_be_looked_up_for_a_password_is_an_outage_in_the_status(
    start_process: StartProcess, lakebase: Lakebase, tmp_path: Path, workers: int
) -> None:
    # It had a line of the log, and no row in /status: a password has no account.
    file = tmp_path / "password"
    file.write_text(lakebase.native_password)
    lakebase.workspace.fail(Call.RESOURCE, faults.INTERNAL)
    proxy = await start_process(
        admin={"enabled": True, "port": 0},
        listen={"port": 0, "workers": workers},
        credentials={"password_file": str(file)},
        upstream={"user": lakebase.native_role, "connect_timeout_seconds": 3},
    )
    port = int(proxy.events("serving")[0]["admin_port"])
    await refused(proxy)
    (api,) = await failing(port)
    assert (api["workspace"], api["reason"]) == ("workspace", "api_error")
    await eventually(lambda: proxy.events("the workspace API fails"), "it warns")
    lakebase.workspace.clear_faults()
    begun = time.monotonic()
    while await failing(port):
        assert time.monotonic() - begun < PROBES_SECONDS_MAX
        await served(proxy)
    assert len(proxy.events("the workspace API fails")) == 1
