"""`shards lookup --from cache`: what a running sidecar knows of a key, without changing it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.server.app import App
from proxy.server.serving import serving
from tests.support.catalogue import Stores
from tests.support.running import eventually
from tests.support.secret_canaries import watching
from tests.support.shards_cli import Shards


@pytest_asyncio.fixture
async def shards(stores: Stores, tmp_path: Path) -> Shards:
    made = Shards(stores, tmp_path)
    await made.set_up()
    await made.done("grant", "reader", stores.roles.reader)
    await made.done("grant", "session", stores.roles.session)
    await made.add("0", "10", "one")
    return made


@pytest_asyncio.fixture(params=["eager", "lazy"])
async def proxy(
    shards: Shards, stores: Stores, request: pytest.FixtureRequest
) -> AsyncIterator[App]:
    catalogue = {"feed": "off", "load": request.param}
    settings = stores.settings(stores.roles.session, admin={"enabled": True}, catalogue=catalogue)
    async with serving(settings) as app, watching(app):
        await eventually(lambda: app.catalogue.loaded, "the map is loaded")
        yield app


def asking(proxy: App, stores: Stores, folder: Path) -> Shards:
    """Return the verbs with the settings of a proxy whose admin address is this one's."""
    assert proxy.admin is not None
    admin = {"enabled": True, "port": proxy.admin.port}
    return Shards(stores, folder, stores.roles.session, admin=admin)


async def test_s22_a_look_up_in_the_cache_loads_nothing(
    shards: Shards, proxy: App, stores: Stores, tmp_path: Path
) -> None:
    asked = asking(proxy, stores, tmp_path)
    is_lazy = proxy.settings.catalogue.load == "lazy"
    if is_lazy:
        for _ in range(2):
            assert await asked.refused("lookup", "5", "--from", "cache") == (
                "mapping_not_found",
                "3D000",
            )
        return
    found = await asked.done("lookup", "5", "--from", "cache")
    assert found == await shards.done("lookup", "5")
    # The map changes, and the proxy has not heard of it: the look-up in the catalogue leaves that.
    await shards.done("offline", "0", "10")
    changed = await shards.done("lookup", "5")
    assert changed["status"] == "offline"
    assert await asked.done("lookup", "5", "--from", "cache") == found
    for key, reason in (("10", "mapping_not_found"), ("x", "key_invalid"), ("", "key_missing")):
        assert (await asked.refused("lookup", key, "--from", "cache"))[0] == reason
    refused = await asked.refused("lookup", "5", "--from", "cache", "--map", "other")
    assert refused == ("unknown_map", "42704")


async def test_without_a_proxy_a_look_up_in_its_cache_says_so(
    shards: Shards, stores: Stores, tmp_path: Path
) -> None:
    asked = Shards(stores, tmp_path, admin={"enabled": True, "port": 1})
    refused = await asked.refused("lookup", "5", "--from", "cache")
    assert refused == ("proxy_unreachable", "08001")
