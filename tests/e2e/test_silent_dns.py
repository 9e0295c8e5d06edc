"""DNS that does not answer for one name: no other target is delayed, and no cancel.

Story: look-ups ran in the event loop's pool of four threads. Two clients of a target whose name DNS
never answers stalled every other target's clients for 9 to 29 s, and a Ctrl-C of a healthy session
was not delivered meanwhile.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import psycopg
import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.upstream.name_lookup import LOOK_UP_SECONDS_MAX, STALE_AFTER_SECONDS
from tests.support.client import plain_client, startup
from tests.support.name_server import NameServer, available, name_server
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import eventually, libpq, proxy_values, toml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs Linux and root"),
]

DEAD = "dead.database.example.com"
CLIENTS = 50
PROMPT_SECONDS = 2.0  # a connect takes some tens of milliseconds, on a busy machine more

StartByName = Callable[..., Awaitable[ProxyProcess]]


@pytest_asyncio.fixture
async def dns(lakebase: Lakebase) -> AsyncIterator[NameServer]:
    async with name_server() as server:
        server.known[lakebase["one"].endpoint.host] = lakebase.host_address
        server.silent.add(DEAD)
        yield server


@pytest_asyncio.fixture
async def start_by_name(
    lakebase: Lakebase, dns: NameServer, tmp_path: Path
) -> AsyncIterator[StartByName]:
    """Return a function that starts a proxy that asks DNS; its database `dead` has no answer."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Mapping[str, object]) -> ProxyProcess:
            values = proxy_values(lakebase, sections)
            values["upstream"]["hostaddr"] = ""
            values["targets"] = {
                "dead": {
                    "endpoint": lakebase["one"].endpoint.name,
                    "host": DEAD,
                    "connect_timeout_seconds": 300,
                }
            }
            values["databases"] = {"dead": "dead"}
            config = tmp_path / "proxy.toml"
            config.write_text(toml(values))
            process = await stack.enter_async_context(
                started_process("run", "--config", str(config), python=dns.python(tmp_path))
            )
            await process.serving()
            return process

        yield start


async def connect(proxy: ProxyProcess) -> float:
    """Connect and return how long it took."""
    begun = time.monotonic()
    connection = await psycopg.AsyncConnection.connect(**libpq(proxy, connect_timeout=60))
    seconds = time.monotonic() - begun
    await connection.close()
    return seconds


async def dead_clients(proxy: ProxyProcess, stack: AsyncExitStack, count: int = CLIENTS) -> None:
    """Connect to the database whose name is never answered, and wait for nothing."""
    for _ in range(count):
        client = await stack.enter_async_context(plain_client(proxy))
        await client.send(startup(database="dead"))


@pytest.mark.parametrize("workers", [1, 2])
async def test_clients_of_a_name_without_an_answer_delay_no_other_target(
    start_by_name: StartByName, dns: NameServer, workers: int
) -> None:
    proxy = await start_by_name(listen={"port": 0, "workers": workers})
    await connect(proxy)
    async with AsyncExitStack() as stack:
        await dead_clients(proxy, stack)
        await eventually(lambda: dns.asked.count(DEAD) >= workers, "the dead name is asked for")
        for _ in range(10):
            assert await connect(proxy) < PROMPT_SECONDS
        # One look-up is under way for all who wait (in each process), and each asks twice at most.
        assert dns.asked.count(DEAD) <= 2 * workers


async def test_w54_a_client_that_leaves_while_its_name_has_no_answer_waited_for_dns(
    start_by_name: StartByName, dns: NameServer
) -> None:
    proxy = await start_by_name()
    async with AsyncExitStack() as stack:
        await dead_clients(proxy, stack, 1)
        await eventually(lambda: DEAD in dns.asked, "the dead name is asked for")
    left = "client left before its session was ready"
    await eventually(lambda: proxy.events(left), "its line")
    assert proxy.events(left)[0]["reason"] == "client_gone_dns"


ROUNDS = 5
CONNECTS = 20  # in each round, with and without the others
SLOWER_MAX = 2.0  # the medians; 1.0 is usual


async def test_a_healthy_targets_connects_take_no_longer_beside_a_dead_name(
    start_by_name: StartByName,
) -> None:
    proxy = await start_by_name()
    await connect(proxy)
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(ROUNDS):
        alone += [await connect(proxy) for _ in range(CONNECTS)]
        async with AsyncExitStack() as stack:
            await dead_clients(proxy, stack)
            beside += [await connect(proxy) for _ in range(CONNECTS)]
    assert median(beside) < SLOWER_MAX * median(alone), (alone, beside)


async def test_a_cancel_waits_for_no_look_up(
    start_by_name: StartByName, lakebase: Lakebase, dns: NameServer
) -> None:
    proxy = await start_by_name()
    async with (
        await psycopg.AsyncConnection.connect(**libpq(proxy)) as healthy,
        AsyncExitStack() as stack,
    ):
        await dead_clients(proxy, stack)
        dns.silent.add(lakebase["one"].endpoint.host)  # its own name has no answer either
        query = asyncio.create_task(healthy.execute("SELECT pg_sleep(60)"))
        await eventually(
            lambda: lakebase.gateway.sessions and not query.done(), "the query is under way"
        )
        asked = len(dns.asked)
        begun = time.monotonic()
        while not query.done():  # until one comes after the query has begun
            assert time.monotonic() - begun < PROMPT_SECONDS
            await healthy.cancel_safe(timeout=PROMPT_SECONDS)
            await asyncio.wait([query], timeout=0.1)
        assert isinstance(query.exception(), psycopg.errors.QueryCanceled)
        assert dns.asked[asked:].count(lakebase["one"].endpoint.host) == 0


async def test_the_last_addresses_serve_while_dns_is_silent(
    start_by_name: StartByName, lakebase: Lakebase, dns: NameServer
) -> None:
    proxy = await start_by_name()
    await connect(proxy)
    dns.silent.add(lakebase["one"].endpoint.host)
    for _ in range(3):
        assert await connect(proxy) < STALE_AFTER_SECONDS + PROMPT_SECONDS
    dns.silent.clear()
    dns.failing.add(lakebase["one"].endpoint.host)
    assert await connect(proxy) < STALE_AFTER_SECONDS + PROMPT_SECONDS


async def test_a_look_up_without_an_answer_ends_and_the_next_one_succeeds(
    start_by_name: StartByName, lakebase: Lakebase, dns: NameServer
) -> None:
    host = lakebase["one"].endpoint.host
    dns.silent.add(host)
    proxy = await start_by_name()
    connecting = asyncio.create_task(connect(proxy))
    await eventually(lambda: host in dns.asked, "the name is asked for")
    dns.silent.discard(host)
    assert await connecting < LOOK_UP_SECONDS_MAX  # the resolver asks again after 5 s
