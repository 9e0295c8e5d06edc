"""A sidecar with a map in the catalogue: real clients, real shards, and a map that changes."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

from proxy.config import ConfigurationError
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind, MapSpec
from proxy.server.app import App
from proxy.server.router_factory import router_of
from proxy.server.serving import serving
from proxy.wire.messages import ErrorResponse, ReadyForQuery, decode_backend
from tests.support.catalogue import MAP, Stores
from tests.support.client import Client, plain_client, startup
from tests.support.operator import Operator, Placed
from tests.support.running import Listening, LogLines, captured_log, eventually
from tests.support.secret_canaries import watching
from tests.wire.driving import frames

RANGE: Final = MapSpec(Kind.RANGE, KeyType.INT4)
SECONDS_MAX: Final = 20.0
# Of a whole map.
READING: Final = ("map", "version", "load", "lookup", "changes")

Start = Callable[..., Awaitable[App]]


@pytest.fixture
def log() -> Any:
    with captured_log() as lines:
        yield lines


@pytest_asyncio.fixture
async def start(stores: Stores, log: LogLines) -> AsyncIterator[Start]:
    """Return a function that starts a sidecar in this process; keyword arguments are sections."""
    async with AsyncExitStack() as stack:

        async def started(**sections: Any) -> App:
            settings = stores.settings(stores.roles.session, **sections)
            app = await stack.enter_async_context(serving(settings))
            return await stack.enter_async_context(watching(app))

        yield started


async def connect(app: Listening, key: str = "5", **more: Any) -> Any:
    return await asyncpg.connect(
        host=app.listen_host,
        port=app.listen_port,
        user="anyone",
        database=f"app@{key}",
        ssl=False,
        timeout=SECONDS_MAX,
        **more,
    )


@asynccontextmanager
async def session(app: Listening, key: str = "5", **more: Any) -> AsyncIterator[Any]:
    connection = await connect(app, key, **more)
    try:
        yield connection
    finally:
        connection.terminate()


async def refusal(app: Listening, key: str = "5", **more: Any) -> asyncpg.PostgresError:
    with pytest.raises(asyncpg.PostgresError) as refused:
        await connect(app, key, **more)
    return refused.value


@asynccontextmanager
async def raw_session(app: App, key: str = "5") -> AsyncIterator[Client]:
    """Yield a client that reads the messages itself, after its welcome."""
    async with plain_client(app) as client:
        await client.send(startup(user="anyone", database=f"app@{key}"))
        while not isinstance(await client.message(), ReadyForQuery):
            pass
        yield client


async def last_error(client: Client) -> ErrorResponse | None:
    """Return the error that ends a session, None for a bare close."""
    try:
        rest = await client.receive_rest()
    except ConnectionError:
        return None
    found = [decode_backend(frame) for frame in frames(rest) if frame.type == b"E"]
    assert all(isinstance(error, ErrorResponse) for error in found)
    return found[-1] if found else None  # type: ignore[return-value]


async def ended(connection: Any) -> None:
    """Return when a session is over."""
    over = asyncio.Event()
    connection.add_termination_listener(lambda _: over.set())
    if connection.is_closed():
        over.set()
    async with asyncio.timeout(SECONDS_MAX):
        await over.wait()


# -- routes --------------------------------------------------------------------------------------


async def test_s15_each_key_reaches_its_shard_and_the_session_is_counted_there(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    async with session(app) as one, session(app, "1000") as two:
        assert await one.fetchval("select current_database()") == operator.stores.database
        for shard, connection in (("one", one), ("two", two)):
            (row,) = await operator.registered(shard)
            assert row["pid"] == await connection.fetchval("select pg_backend_pid()")
        assert app.metrics.value("sessions_active", target="tenants/one") == 1
        assert app.metrics.value("route_total", map="tenants", shard="one", result="routed") == 1
    error = await refusal(app, "500")
    assert error.sqlstate == "3D000"
    assert "mapping_not_found" in str(error.detail)


async def test_s14_eager_map_asks_nothing_for_a_key_and_a_lazy_one_asks_once(
    start: Start, operator: Operator, placed: Placed
) -> None:
    eager = await start()
    async with session(eager):
        assert queries(eager, "lookup") == 0
    lazy = await start(catalogue={"load": "lazy"})
    for _ in range(2):
        async with session(lazy):
            assert queries(lazy, "lookup") == 1
    assert lazy.metrics.value("lookup_total", map="tenants", result="miss") == 1
    assert lazy.metrics.value("lookup_total", map="tenants", result="hit") == 1


def queries(app: App, purpose: str) -> float:
    return app.metrics.value("catalogue_queries_total", purpose=purpose)


# -- live sessions -------------------------------------------------------------------------------


async def test_s16_offline_ends_live_sessions_and_online_serves_again(
    start: Start, operator: Operator, placed: Placed, log: LogLines
) -> None:
    app = await start(catalogue={"park_timeout_seconds": 0})
    other = await operator.add("20", "30", "one")
    async with session(app) as moved, session(app, "25") as kept:
        ending = asyncio.ensure_future(ended(moved))
        await operator.offline(placed)
        await ending
        assert await kept.fetchval("select 1") == 1
        assert (await refusal(app)).sqlstate == "57P03"
        await eventually(lambda: ends(app, "mapping_moved") == 1, "the end is counted")
        await operator.online(placed)
        await eventually(lambda: changes(app) >= 3, "the change has come")
        async with session(app) as again:
            assert await again.fetchval("select 1") == 1
    assert other.shard == "one"


def ends(app: App, reason: str) -> float:
    return app.metrics.value("sessions_ended_total", reason=reason)


def changes(app: App) -> float:
    return app.metrics.value("cache_changes_total", map="tenants", change="mapping")


async def test_s16_list_map_of_text_keys(stores: Stores, start: Start) -> None:
    operator = Operator(stores, MapSpec(Kind.LIST, KeyType.TEXT))
    await operator.install()
    acme = await operator.add("acme", "acme", "one")
    app = await start(catalogue={"park_timeout_seconds": 0})
    async with session(app, "acme") as moved:
        ending = asyncio.ensure_future(ended(moved))
        await operator.offline(acme)
        await ending
    assert (await refusal(app, "acme")).sqlstate == "57P03"
    assert (await refusal(app, "other")).sqlstate == "3D000"
    await operator.online(acme)
    await eventually(lambda: changes(app) >= 2, "the change has come")
    async with session(app, "acme") as again:
        assert await again.fetchval("select 1") == 1


async def test_r7_session_that_its_shard_does_not_end_is_ended_by_the_proxy(
    start: Start, operator: Operator, placed: Placed
) -> None:
    """A proxy that does not hear of the change ends none: those the operator finds by their pids.

    Until then its session lives on, so neither is there without the other.
    """
    app = await start()
    deaf = await start(catalogue={"feed": "off"})
    async with raw_session(app) as idle, raw_session(app) as busy, session(deaf) as unheard:
        await busy.query("select pg_sleep(60)")
        await operator.offline(placed, ends=False)
        error = await last_error(idle)
        assert error is not None
        assert error.sqlstate == "57P01"
        assert "reason=mapping_moved" in error.text(b"D")
        assert await last_error(busy) is None
        await eventually(lambda: ends(app, "mapping_moved") == 2, "both ends are counted")
        # What ran is cancelled, as for a client that vanished.
        await registered(operator, [await unheard.fetchval("select pg_backend_pid()")])
        await operator.end_sessions(placed)
        await ended(unheard)
        await registered(operator, [])


async def test_s17_keep_leaves_live_sessions_and_refuses_new_ones(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(catalogue={"park_timeout_seconds": 0})
    async with session(app) as live:
        await operator.offline(placed, "keep")
        assert (await refusal(app)).sqlstate == "57P03"
        await asyncio.sleep(2.5)
        assert await live.fetchval("select 1") == 1


async def test_drain_ends_idle_sessions_and_waits_for_transactions(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    async with raw_session(app) as idle, raw_session(app) as busy:
        await busy.query("begin")
        while not isinstance(await busy.message(), ReadyForQuery):
            pass
        await operator.offline(placed, "drain")
        for client in (idle, busy):
            if client is busy:
                await busy.query("commit")
            error = await last_error(client)
            assert error is not None
            assert "reason=mapping_moved" in error.text(b"D")


async def test_s45_r8_nothing_that_a_client_sets_hides_its_session_from_the_fence(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    async with session(app) as live:
        await live.execute("select pg_advisory_unlock_all()")
        await live.execute("set application_name = 'other'; set role none")
        await live.execute("discard all")
        ending = asyncio.ensure_future(ended(live))
        await operator.fence(placed)
        await operator.end_sessions(placed)
        await ending


async def test_r3_move_that_is_not_announced_costs_no_failed_session(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(catalogue={"feed": "off"})
    async with session(app) as live:
        ending = asyncio.ensure_future(ended(live))
        await operator.move(placed, "two", ends=False)
        async with session(app) as again:
            pid = await again.fetchval("select pg_backend_pid()")
            assert [row["pid"] for row in await operator.registered("two")] == [pid]
        await ending
    assert app.metrics.value("stale_retries_total") == 1
    assert app.metrics.value("admit_total", map="tenants", verdict="mapping_missing") == 1


async def test_without_a_feed_the_end_of_a_session_by_its_shard_is_counted_as_the_moves(
    start: Start, operator: Operator, placed: Placed, log: LogLines
) -> None:
    app = await start(catalogue={"feed": "off"})
    async with session(app) as live:
        ending = asyncio.ensure_future(ended(live))
        await operator.move(placed, "two")
        await ending
        await eventually(lambda: ends(app, "mapping_moved") == 1, "the end is counted")
    (ending_line,) = log.events("session ended")
    assert (ending_line["reason"], ending_line["connection"]) == ("mapping_moved", 1)
    async with session(app):
        assert app.metrics.value("stale_retries_total") == 0  # what was asked for it is known


async def registered(operator: Operator, pids: list[int]) -> None:
    """Return when these are the sessions of shard one that live."""
    async with asyncio.timeout(SECONDS_MAX):
        # PostgreSQL reports no end.
        while [row["pid"] for row in await operator.registered("one")] != pids:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


# -- parking -------------------------------------------------------------------------------------


async def test_s47_mapping_that_is_offline_for_two_seconds_costs_a_wait(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    await operator.offline(placed)
    connecting = asyncio.ensure_future(connect(app))
    await eventually(lambda: parked(app) == 1, "the client is parked")
    await asyncio.sleep(2)
    await operator.online(placed)
    connection = await connecting
    assert await connection.fetchval("select 1") == 1
    connection.terminate()
    assert app.metrics.value("park_total", result="served") == 1


def parked(app: App) -> float:
    return app.metrics.value("parked_sessions")


async def test_s46_client_that_leaves_while_it_is_parked_frees_its_place(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(catalogue={"park_max": 1})
    await operator.offline(placed)
    connecting = asyncio.ensure_future(connect(app))
    await eventually(lambda: parked(app) == 1, "the client is parked")
    assert (await refusal(app)).sqlstate == "57P03"
    connecting.cancel()
    await asyncio.wait((connecting,))
    await eventually(lambda: parked(app) == 0, "its place is free")
    assert app.metrics.value("startup_failures_total", reason="client_gone") == 1
    assert app.metrics.value("park_total", result="full") == 1
    assert app.metrics.value("park_total", result="left") == 1


async def test_s64_parked_client_gets_57p01_from_a_drain(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    await operator.offline(placed)
    refused = asyncio.ensure_future(refusal(app))
    await eventually(lambda: parked(app) == 1, "the client is parked")
    await app.drain(5)
    assert (await refused).sqlstate == "57P01"


async def test_s58_offline_shard_parks_its_clients_and_each_mapping_has_its_own_status(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start()
    off = await operator.add("20", "30", "one")
    await operator.offline(off)
    await operator.shard_status("one", "offline")
    connecting = asyncio.ensure_future(connect(app))
    await eventually(lambda: parked(app) == 1, "the client is parked")
    async with session(app, "1000"):
        pass
    await operator.shard_status("one", "online")
    connection = await connecting
    connection.terminate()
    still_off = asyncio.ensure_future(connect(app, "25"))
    await eventually(lambda: parked(app) == 1, "the client of the other mapping is parked")
    still_off.cancel()
    await asyncio.wait((still_off,))


# -- start ---------------------------------------------------------------------------------------


async def test_catalogue_without_the_map_keeps_the_proxy_from_starting(
    start: Start, operator: Operator
) -> None:
    await operator.catalogue("update shardmap.shard_map set name = 'others'")
    with pytest.raises(ConfigurationError, match="no such shard map"):
        await start()


async def test_map_of_another_key_type_keeps_the_proxy_from_starting(
    start: Start, operator: Operator
) -> None:
    shard_map = {"catalogue": True, "key_type": "text"}
    with pytest.raises(ConfigurationError, match="key_type"):
        await start(**{"shard_maps.tenants": shard_map})


async def test_catalogue_of_another_version_keeps_the_proxy_from_starting(
    start: Start, operator: Operator
) -> None:
    await operator.catalogue("update shardmap.store_version set major = 2")
    with pytest.raises(ConfigurationError, match="version"):
        await start()


async def test_catalogue_that_cannot_be_reached_is_waited_for(
    start: Start, operator: Operator, placed: Placed
) -> None:
    endpoint = operator.stores.lakebase[MAP].endpoint
    endpoint.disabled = True
    upstream = {"connect_timeout_seconds": 3}
    app = await start(upstream=upstream)
    assert (app.ready, app.started) == (False, False)
    status = app.status().shard_map
    assert status is not None
    assert (status.state, status.feed) == ("loading", "down")
    connecting = asyncio.ensure_future(connect(app))
    await asyncio.sleep(0.2)
    endpoint.disabled = False
    connection = await connecting
    connection.terminate()
    assert (app.ready, app.started) == (True, True)
    status = app.status().shard_map
    assert status is not None
    shown = app.status().as_dict()["shard_map"]
    assert isinstance(shown, dict)
    assert list(shown) == [
        *("name", "source", "kind", "key_type", "version", "mappings", "shards", "state"),
        *("feed", "age_seconds", "validate", "parked"),
    ]
    assert (status.source, status.state, status.feed) == ("catalogue", "ready", "listening")
    assert (status.kind, status.key_type, status.mappings) == ("range", "int4", 2)
    assert (status.shards, status.validate, status.parked) == (2, True, 0)


# -- where tokens go -----------------------------------------------------------------------------


async def test_s63_host_that_is_not_allowed_is_neither_minted_for_nor_dialled(
    start: Start, operator: Operator, placed: Placed
) -> None:
    app = await start(catalogue={"shard_hosts": ["*.example.com"]})
    lakebase = operator.stores.lakebase
    minted = len(lakebase.workspace.api.mints)
    error = await refusal(app)
    assert error.sqlstate == "55000"
    assert "shard_host_refused" in str(error.detail)
    assert not [one for one in lakebase.gateway.records if "-map-" not in (one.sni or "")]
    assert len(lakebase.workspace.api.mints) == minted
    await operator.catalogue("update shardmap.shard set workspace = 'elsewhere'")
    other = await start(catalogue={"shard_hosts": [operator.stores.host("one")]})
    minted = len(lakebase.workspace.api.mints)
    error = await refusal(other)
    assert "workspace_unknown" in str(error.detail)
    assert not [one for one in lakebase.gateway.records if "-map-" not in (one.sni or "")]
    assert len(lakebase.workspace.api.mints) == minted


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("dbname", "app\n\x1b[31m"),
        ("instance", "../../../2.0/secrets/list"),
        ("instance", "a?b"),
        ("endpoint", "projects/../branches/../endpoints/one"),
        ("endpoint", "projects/a/branches/\x1b/endpoints/one"),
    ],
)
async def test_row_that_cannot_be_right_refuses_its_shard_alone(
    start: Start, operator: Operator, placed: Placed, column: str, value: str
) -> None:
    """The name of a resource is a part of a path in the workspace's API, an error is logged."""
    app = await start()
    resources = {"endpoint": "", "instance": "", column: value}
    if column == "dbname":
        resources = {column: value}
    assignments = ", ".join(f"{name} = ${at}" for at, name in enumerate(resources, start=1))
    sql = f"update shardmap.shard set {assignments} where name = 'two'"
    await operator.catalogue(sql, *resources.values())
    await eventually(lambda: app.metrics.value("cache_changes_total", change="shard"), "heard of")
    minted = len(operator.stores.lakebase.workspace.api.mints)
    error = await refusal(app, "1000")
    assert error.sqlstate == "55000"
    assert "reason=shard_not_valid" in str(error.detail)
    assert str(error.detail).isprintable()
    assert len(operator.stores.lakebase.workspace.api.mints) == minted
    async with session(app) as served:
        assert await served.fetchval("select 1") == 1


# -- reload --------------------------------------------------------------------------------------


async def reloaded(app: App, stores: Stores, **sections: Any) -> None:
    settings = stores.settings(stores.roles.session, **sections)
    await app.reload_when_loaded(settings, router_of(settings))


async def test_s62_unrelated_change_keeps_map_feed_and_parked_clients(
    start: Start, operator: Operator, placed: Placed
) -> None:
    stores = operator.stores
    app = await start()
    await operator.offline(placed)
    connecting = asyncio.ensure_future(connect(app))
    await eventually(lambda: parked(app) == 1, "the client is parked")

    def queries(*purposes: str) -> list[float]:
        return [app.metrics.value("catalogue_queries_total", purpose=one) for one in purposes]

    # The parked client asks for its own mapping once a second, on a connection that is kept.
    await eventually(lambda: queries("refresh") > [0], "the parked client has asked")
    asked = queries(*READING)
    connects = len(stores.lakebase.gateway.records)
    async with session(app, "1000") as live:
        await reloaded(app, stores, catalogue={"park_max": 5}, routing={"forward_key": True})
        async with session(app, "1001") as forwarded:
            assert await forwarded.fetchval("show lakebase.shard_key") == "1001"
        assert await live.fetchval("select 1") == 1
    assert queries(*READING) == asked
    assert not [
        record
        for record in list(stores.lakebase.gateway.records)[connects:]
        if record.sni == stores.host(MAP)
    ]
    await operator.online(placed)
    (await connecting).terminate()


async def test_s62_a_reload_that_learns_of_a_change_ends_its_sessions(
    start: Start, operator: Operator, placed: Placed
) -> None:
    """The map before had not heard of it; the new one was loaded with it, and told no session."""
    app = await start(catalogue={"feed": "off"})
    async with session(app) as live, session(app, "1000") as other:
        await operator.offline(placed, ends=False)
        await reloaded(app, operator.stores, catalogue={"feed": "listen"})
        await eventually(live.is_closed, "the session is ended", SECONDS_MAX)
        assert await other.fetchval("select 1") == 1


async def test_s62_parked_clients_are_routed_anew_by_a_map_that_a_reload_has_brought(
    start: Start, operator: Operator, placed: Placed
) -> None:
    """They asked the map before, which nothing answered any more, until their time was over.

    One that asked just then was told that the proxy was shutting down.
    """
    stores = operator.stores
    app = await start(catalogue={"park_timeout_seconds": 60})
    await operator.offline(placed)
    connecting = [asyncio.ensure_future(connect(app)) for _ in range(5)]
    refused = [asyncio.ensure_future(refusal(app, "9")) for _ in range(2)]
    await eventually(lambda: parked(app) == 7, "the clients are parked")
    other = Operator(stores, RANGE, name="others")
    await other.register()
    await other.add("0", "9", "two")
    # The clients of the map before are in the middle of a question.
    async with stores.connect(MAP) as connection, connection.transaction():
        await connection.execute("lock table shardmap.mapping in access exclusive mode")
        asked = queries(app, "refresh")
        await eventually(lambda: queries(app, "refresh") > asked, "they ask")
        await reloaded(
            app,
            stores,
            catalogue={"load": "lazy", "park_timeout_seconds": 60},
            routing={"shard_map": "others"},
            **{"shard_maps.others": {"catalogue": True}},
        )
    for one in await asyncio.gather(*connecting):
        pid = await one.fetchval("select pg_backend_pid()")
        assert pid in [row["pid"] for row in await operator.registered("two")]
        one.terminate()
    for error in await asyncio.gather(*refused):
        assert error.sqlstate == "3D000"
    assert app.metrics.value("park_total", result="rerouted") == 7
    assert parked(app) == 0


STATIC: Final[dict[str, dict[str, Any]]] = {
    "targets.main": {},
    "shard_maps.tenants": {
        "catalogue": False,
        "kind": "range",
        "key_type": "int4",
        "mappings": [{"low": "0", "high": "10", "target": "one"}],
    },
}


@pytest.mark.parametrize("is_static", [False, True])
async def test_s62_clients_that_wait_for_a_map_are_routed_anew_by_another_one(
    start: Start, operator: Operator, placed: Placed, is_static: bool
) -> None:
    """They waited for the map before until their time was over, which was then never loaded."""
    stores = operator.stores
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        app = await start(**{"targets.main": {"port": port}})
        connecting = [asyncio.ensure_future(connect(app)) for _ in range(3)]
        await eventually(lambda: app.session_slots_used == 3, "the clients wait")
        hostaddr = stores.lakebase.host_address
        one = {"endpoint": stores.endpoint("one"), "hostaddr": hostaddr}
        sections = {**STATIC, "targets.one": one} if is_static else {}
        await reloaded(app, stores, **sections)
        for live in await asyncio.gather(*connecting):
            assert await live.fetchval("select current_database()") == stores.database
            live.terminate()


async def test_s62_another_map_is_loaded_beside_the_old_one_and_exchanged(
    start: Start, operator: Operator, placed: Placed
) -> None:
    stores = operator.stores
    app = await start()
    sections: dict[str, Any] = {
        "routing": {"shard_map": "others"},
        "shard_maps.others": {"catalogue": True},
    }
    async with session(app) as live:
        with pytest.raises(ConfigurationError, match="no such shard map"):
            await reloaded(app, stores, **sections)
        assert app.settings.routing.shard_map == "tenants"
        async with session(app) as still_served:
            assert await still_served.fetchval("select 1") == 1
        other = Operator(stores, RANGE, name="others")
        await other.register()
        await other.add("70", "80", "two")
        await reloaded(app, stores, **sections)
        async with session(app, "75") as of_the_other:
            assert await of_the_other.fetchval("select 1") == 1
        assert (await refusal(app, "5")).sqlstate == "3D000"
        assert await live.fetchval("select 1") == 1
        status = app.status().shard_map
        assert status is not None
        assert (status.name, status.mappings) == ("others", 1)
    plain = {"routing": {"shard_map": ""}, "upstream": {"endpoint": stores.endpoint("one")}}
    await reloaded(app, stores, **plain)
    assert app.status().shard_map is None
