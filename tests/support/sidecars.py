"""Sidecars of a catalogue's map in this process, and their clients.

For: tests of what applications notice while a map changes. Not for: changing it (`operating`).
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import Any, Final

import asyncpg

from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.shard_store import reader_statements
from proxy.server.app import App
from proxy.server.serving import serving
from tests.support.catalogue import MAP, SHARD_NAMES, Stores
from tests.support.operating import Operating
from tests.support.running import Listening, captured_log, eventually
from tests.support.secret_canaries import watching

CONNECT_SECONDS_MAX: Final = 30.0
# What a client hears when its session is ended, or its connection with it.
ENDED: Final = (
    asyncpg.AdminShutdownError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server ended it between two of the driver's messages
    OSError,
)

Start = Callable[..., Awaitable[App]]
"""Starts a sidecar; keyword arguments are of [catalogue], but `upstream` for that section."""


@asynccontextmanager
async def named_shards(stores: Stores) -> AsyncIterator[Operating]:
    """Yield a map with [0, 100) and [100, 200) on shard one; a table `here` on both names it."""
    found = Operating(stores)
    await found.set_up()
    for statement in reader_statements(stores.roles.reader):
        await found.fetch(MAP, statement)
    for low in (0, 100):
        await found.run(AddMapping(found.map, *found.bounds(low, low + 100), "one"))
    for name in SHARD_NAMES:
        await found.fetch(name, "create table here (name text)")
        await found.fetch(name, "insert into here values ($1)", name)
        await found.fetch(name, f'grant select on here to "{stores.roles.session}"')
    yield found
    await found.close()


@asynccontextmanager
async def started_sidecars(stores: Stores) -> AsyncIterator[Start]:
    """Yield a function that starts a sidecar, which serves until the block ends."""
    async with AsyncExitStack() as stack:
        stack.enter_context(captured_log())

        async def started(
            upstream: Mapping[str, object] = MappingProxyType({}), **catalogue: Any
        ) -> App:
            sections = {"upstream": upstream, "catalogue": catalogue}
            settings = stores.settings(stores.roles.session, **sections)
            app = await stack.enter_async_context(serving(settings))
            return await stack.enter_async_context(watching(app))

        yield started


async def connect(proxy: Listening, key: int, seconds_max: float = CONNECT_SECONDS_MAX) -> Any:
    """Open a session for a key."""
    return await asyncpg.connect(
        host=proxy.listen_host,
        port=proxy.listen_port,
        user="anyone",
        database=f"app@{key}",
        ssl=False,
        timeout=seconds_max,
    )


@asynccontextmanager
async def session(app: App, key: int) -> AsyncIterator[Any]:
    """Open a session for a key while the block runs."""
    connection = await connect(app, key)
    try:
        yield connection
    finally:
        connection.terminate()


async def lives(connection: Any) -> bool:
    """Return whether a session still answers."""
    try:
        return bool(await connection.fetchval("select true"))
    except ENDED:
        return False


def moved(app: App) -> float:
    """Return how many sessions the sidecar has counted as ended by a move."""
    return app.metrics.value("sessions_ended_total", reason="mapping_moved")


def parked(app: App) -> float:
    """Return how many clients wait."""
    return app.metrics.value("parked_sessions")


async def until_followed(app: App, operating: Operating) -> None:
    """Wait until the sidecar has heard of each change of the map.

    Before that it finds out by asking a shard, which costs the session that it asks on.
    """
    (now,) = await operating.fetch(
        MAP, "select version from shardmap.shard_map where map_id = $1", operating.map.map_id
    )

    def is_followed() -> bool:
        shown = app.shard_map()
        return shown is not None and shown.version == now["version"]

    await eventually(is_followed, "the sidecar has the catalogue's version")
