"""Fixtures for whole sessions: the proxy in this process, and as a process of its own."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.emulator.lakebase import Lakebase
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.app import App
from proxy.server.serving import serving
from tests.support.catalogue import Stores
from tests.support.direct_sidecar import Sidecar, direct_sidecar
from tests.support.operator import Operator, Placed
from tests.support.pooling import both_modes
from tests.support.proxy_process import ProxyProcess, started_process
from tests.support.running import (
    LogLines,
    captured_log,
    proxy_settings,
    proxy_values,
    toml,
    without_own_account,
)
from tests.support.secret_canaries import watching

StartProxy = Callable[..., Awaitable[App]]
StartProcess = Callable[..., Awaitable[ProxyProcess]]


@pytest.fixture(scope="session", autouse=True)
def sdk() -> None:
    """Import the SDK, which takes more than a second, before the first test's clock runs."""
    import databricks.sdk  # noqa: F401


@pytest.fixture(autouse=True)
def no_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the SDK and libpq from finding anything of the person's own."""
    for name in set(os.environ) - set(kept := without_own_account(os.environ)):
        monkeypatch.delenv(name)
    for name, value in kept.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def log() -> Iterator[LogLines]:
    """Return what the proxy logs during the test, from debug upwards."""
    with captured_log() as lines:
        yield lines


@pytest_asyncio.fixture
async def start_proxy(lakebase: Lakebase, log: LogLines) -> AsyncIterator[StartProxy]:
    """Return a function that starts a proxy in this process; keyword arguments are sections."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Mapping[str, object]) -> App:
            app = await stack.enter_async_context(serving(proxy_settings(lakebase, **sections)))
            return await stack.enter_async_context(watching(app))

        yield start


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of drivers a second time through a pool."""
    if "connection" in metafunc.fixturenames:
        metafunc.parametrize(*both_modes.args, **both_modes.kwargs)


@pytest.fixture
def upstream_keys(request: pytest.FixtureRequest) -> Mapping[str, object]:
    """Return the proxy's keys of [upstream]."""
    keys: Mapping[str, object] = getattr(request, "param", {})
    return keys


@pytest_asyncio.fixture
async def proxy(start_proxy: StartProxy, upstream_keys: Mapping[str, object]) -> App:
    """Return a proxy with default settings."""
    return await start_proxy(upstream=upstream_keys)


@pytest_asyncio.fixture
async def operator(stores: Stores) -> Operator:
    """Return the operator of a new map in the catalogue."""
    made = Operator(stores, MapSpec(Kind.RANGE, KeyType.INT4))
    await made.install()
    return made


@pytest_asyncio.fixture
async def placed(operator: Operator) -> Placed:
    """Return the mapping [0, 10) on shard one. The keys from 1000 on are on shard two."""
    await operator.add("1000", None, "two")
    return await operator.add("0", "10", "one")


@pytest_asyncio.fixture
async def sidecar(operator: Operator) -> AsyncIterator[Sidecar]:
    """Return what opens sessions for the keys of the operator's map."""
    async with direct_sidecar(operator) as made:
        yield made


@pytest_asyncio.fixture
async def start_process(lakebase: Lakebase, tmp_path: Path) -> AsyncIterator[StartProcess]:
    """Return a function that starts `python -m proxy run`; keyword arguments are sections."""
    async with AsyncExitStack() as stack:

        async def start(**sections: Mapping[str, object]) -> ProxyProcess:
            config = tmp_path / "proxy.toml"
            config.write_text(toml(proxy_values(lakebase, sections)))
            arguments = ("run", "--config", str(config))
            process = await stack.enter_async_context(started_process(*arguments))
            await process.serving()
            return process

        yield start


@pytest_asyncio.fixture
async def proxy_process(start_process: StartProcess) -> ProxyProcess:
    """Return a proxy process with default settings."""
    return await start_process()
