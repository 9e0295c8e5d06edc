"""Fixtures for the tools: where they are tried, and two databases that one server has for them."""

import uuid
from collections.abc import AsyncIterator, Collection
from typing import Final

import pytest
import pytest_asyncio

from proxy.emulator.cluster import CLIENT_ID, quoted
from tests.clients.stage import Stage, stage
from tests.clients.tool_ways import Ways, drop, execute
from tests.support.admin_address import metrics_once

ENDED: Final = "session ended"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place() -> AsyncIterator[Stage]:
    """Return a PostgreSQL and a proxy before it, for all tests of a file."""
    async with stage() as found:
        yield found


@pytest.fixture
def completed(request: pytest.FixtureRequest) -> Collection[str]:
    """Return the reasons for which a session may end."""
    reasons: Collection[str] = getattr(request, "param", ("client_closed",))
    return reasons


@pytest_asyncio.fixture(loop_scope="module")
async def ways(place: Stage, completed: Collection[str]) -> AsyncIterator[Ways]:
    """Return the two ways, each to an empty database. All sessions must end as completed."""
    ended = len(place.proxy.events(ENDED))
    letters = uuid.uuid4().hex[:8]
    names = f"direct_{letters}", f"proxied_{letters}"
    for name in names:
        sql = f"CREATE DATABASE {name} TEMPLATE template0 OWNER {quoted(CLIENT_ID)}"
        await execute(place.server, sql)
    direct, proxied = (
        {**way, "PGDATABASE": name, "PGUSER": CLIENT_ID}
        for way, name in zip((place.direct, place.proxied), names, strict=True)
    )
    yield Ways(place, direct, proxied)
    port = int(place.proxy.events("serving")[0]["admin_port"])
    await metrics_once(port, lambda text: "\nlakebase_proxy_connections 0.0\n" in text)
    await place.ends()  # it has logged them, too
    for name in names:
        await drop(place, name)
    ends = place.proxy.events(ENDED)[ended:]
    assert [end for end in ends if end["reason"] not in completed] == []
