"""One proxy with several workspaces: a token is sent to hosts of its own workspace alone.

Two emulators, each with an API, an issuer and a gateway of its own. Their shards have the same
names and therefore the same endpoints and hosts, so that nothing but the workspace tells a token of
one from a token of the other. Each gateway keeps which tokens it saw, whatever became of the login.
"""

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from proxy.emulator.api import Call
from proxy.emulator.cluster import Cluster
from proxy.emulator.endpoints import neon_error
from proxy.emulator.faults import HANG, Injection, Stage
from proxy.emulator.lakebase import Lakebase
from proxy.server.app import App
from proxy.upstream.address_lookup import AddressLookup
from proxy.upstream.dialer import Dialer
from proxy.upstream.upstreams import Upstream
from proxy.wire.startup import V3_0
from proxy.workspace.client import Workspace
from proxy.workspace.registry import LocalWorkspaceRegistry
from proxy.workspace.token_source import LocalTokenSource
from tests.e2e.conftest import StartProxy
from tests.support.client import plain_client, startup
from tests.support.running import eventually, proxy_settings
from tests.support.sharding import Section, range_map, shard_by_psycopg, sharded, target, targets

# Of sessions that are begun at once: two cores serve them in a second or two.
CLIENTS = 40


@pytest_asyncio.fixture
async def other(clusters: Mapping[str, Cluster]) -> AsyncIterator[Lakebase]:
    """Return a second workspace with a gateway of its own, in front of the same servers."""
    async with Lakebase(clusters=clusters) as started:
        yield started


def foreign_target(other: Lakebase, shard: str = "two", **more: object) -> Section:
    """Return a target in the second workspace, which has a name: b."""
    way = {"workspace": "b", "port": other.port, "ssl_root_cert": str(other.ca_file)}
    return target(other, other[shard].endpoint, **way, **more)


def sections(lakebase: Lakebase, other: Lakebase, two: Section) -> dict[str, Section]:
    """Return sections with both workspaces, the shard one in the first, and this shard two."""
    b: Section = {
        "host": other.workspace_url,
        "client_id": other.client_id,
        "client_secret": other.client_secret,
        "auth_type": "oauth-m2m",
    }
    one = target(lakebase, lakebase["one"].endpoint)
    return {**sharded(lakebase), "workspaces": {"b": b}, "targets": {"one": one, "two": two}}


def assert_own_tokens_only(*stands: Lakebase) -> None:
    """Assert that each gateway saw tokens, all of its own workspace, and refused none."""
    for stand in stands:
        seen = {record.token for record in stand.gateway.records if record.token}
        assert seen
        assert seen <= {mint.fingerprint for mint in stand.workspace.mints}
        assert [record.refusal for record in stand.gateway.records if record.refusal] == []


async def opened(proxy: App, *keys: str) -> list[Any]:
    """Open a session for each key at once; return the shards that they are on."""
    return await asyncio.gather(*(shard_by_psycopg(proxy, dbname=f"app@{key}") for key in keys))


async def test_each_workspace_gets_its_own_tokens_and_one_each_is_enough(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase
) -> None:
    proxy = await start_proxy(**sections(lakebase, other, foreign_target(other)))
    shards = await opened(proxy, *(["7", "1500"] * (CLIENTS // 2)))
    assert shards == ["one", "two"] * (CLIENTS // 2)
    assert_own_tokens_only(lakebase, other)
    for stand in (lakebase, other):
        assert len(stand.gateway.sessions) == CLIENTS // 2
        assert len(stand.workspace.mints) == 1
    assert {token.workspace for token in proxy.snapshot.tokens()} == {"workspace", "b"}


async def test_one_mint_serves_all_endpoints_of_a_workspace(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    proxy = await start_proxy(**sharded(lakebase))
    await opened(proxy, *(["7", "1500"] * 10))
    (mint,) = lakebase.workspace.mints
    seen = {(record.sni, record.token) for record in lakebase.gateway.sessions}
    assert seen == {(shard.endpoint.host, mint.fingerprint) for shard in lakebase.shards}


async def test_provisioned_and_autoscaling_are_mixed_and_an_instance_has_tokens_of_its_own(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    names = ["one", "two", "one-instance", "two-instance"]
    instances = {f"{one.name}-instance": target(lakebase, one.instance) for one in lakebase.shards}
    given = sharded(lakebase, range_map(names))
    proxy = await start_proxy(**{**given, "targets": {**targets(lakebase), **instances}})
    shards = await opened(proxy, *(["0", "1000", "2000", "3000"] * 3))
    assert shards == ["one", "two", "one", "two"] * 3
    told = [token.workspace for token in proxy.snapshot.tokens()]
    labels = [f"workspace/{shard.instance.name}" for shard in lakebase.shards]
    assert sorted(told) == ["workspace", *labels]  # each a time series of its own
    endpoints = {shard.endpoint.name for shard in lakebase.shards}
    minted = [mint.name for mint in lakebase.workspace.mints]
    assert len(minted) == 3
    assert set(minted) - endpoints == {shard.instance.name for shard in lakebase.shards}
    for shard in lakebase.shards:
        (own,) = (mint for mint in lakebase.workspace.mints if mint.name == shard.instance.name)
        sessions = [one for one in lakebase.gateway.sessions if one.endpoint is shard.instance]
        assert [record.token for record in sessions] == [own.fingerprint] * 3


async def test_a_refused_token_is_minted_anew_in_its_own_workspace(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase
) -> None:
    proxy = await start_proxy(**sections(lakebase, other, foreign_target(other)))
    assert await opened(proxy, "7", "1500") == ["one", "two"]
    other["two"].endpoint.refuse(neon_error("jwk not found"))
    assert await opened(proxy, "1500") == ["two"]
    assert (len(lakebase.workspace.mints), len(other.workspace.mints)) == (1, 2)
    seen = {record.token for record in other.gateway.records}
    assert seen == {mint.fingerprint for mint in other.workspace.mints}


async def test_a_workspace_that_fails_costs_the_other_nothing(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase
) -> None:
    proxy = await start_proxy(**sections(lakebase, other, foreign_target(other)))
    other.workspace.fail(Call.CREDENTIAL, HANG)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(opened(proxy, "1500"))
        async with asyncio.timeout(10):
            await other.workspace.called(Call.CREDENTIAL)
        assert await opened(proxy, "7", "7") == ["one", "one"]
        other.workspace.clear_faults()
        assert await waiting == ["two"]
    assert_own_tokens_only(lakebase, other)


# -- S49: a target is moved to the other workspace -----------------------------------------------


async def reach(lakebase: Lakebase, stage: Stage | None, dials: int) -> None:
    """Wait until so many dials hang at this stage; None: in the call for a token."""
    gateway = lakebase.gateway
    if stage is None:
        async with asyncio.timeout(10):
            await lakebase.workspace.called(Call.CREDENTIAL)
    elif stage is Stage.STARTUP:
        await gateway.until(lambda: sum(r.endpoint is not None for r in gateway.records) == dials)
    else:
        await gateway.until(lambda: sum(r.token is not None for r in gateway.records) == dials)


@pytest.mark.parametrize("stage", [None, Stage.STARTUP, Stage.PASSWORD], ids=str)
async def test_s49_dials_in_flight_across_a_move_keep_their_workspace(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase, stage: Stage | None
) -> None:
    here = sections(lakebase, other, target(lakebase, lakebase["two"].endpoint))
    proxy = await start_proxy(**here)
    if stage is None:
        lakebase.workspace.fail(Call.CREDENTIAL, HANG)
    else:
        lakebase.gateway.inject(stage, Injection.HANG)
    async with asyncio.TaskGroup() as tasks:
        in_flight = tasks.create_task(opened(proxy, *["1500"] * 5))
        await reach(lakebase, stage, 5)
        there = sections(lakebase, other, foreign_target(other))
        changed = proxy.reload(proxy_settings(lakebase, **there)).reloadable
        assert "targets.two.workspace" in changed
        assert await opened(proxy, *["1500"] * 5) == ["two"] * 5
        assert len(other.gateway.sessions) == 5
        lakebase.gateway.clear_faults()
        lakebase.workspace.clear_faults()
        assert await in_flight == ["two"] * 5
    assert len(lakebase.gateway.sessions) == 5
    assert_own_tokens_only(lakebase, other)


async def test_s49_a_dial_that_is_tried_again_after_a_move_stays_in_its_workspace(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase
) -> None:
    here = sections(lakebase, other, target(lakebase, lakebase["two"].endpoint))
    proxy = await start_proxy(**here)
    lakebase.gateway.inject(Stage.PASSWORD, Injection.RESET, times=1)
    async with asyncio.TaskGroup() as tasks:
        in_flight = tasks.create_task(opened(proxy, "1500"))
        await lakebase.gateway.until(lambda: any(r.token for r in lakebase.gateway.records))
        proxy.reload(proxy_settings(lakebase, **sections(lakebase, other, foreign_target(other))))
        assert await in_flight == ["two"]
    assert other.gateway.accepted == 0
    assert await opened(proxy, "1500") == ["two"]
    assert other.gateway.accepted == 1
    assert_own_tokens_only(lakebase, other)


async def test_s49_no_token_goes_astray_while_a_target_moves_to_and_fro(
    start_proxy: StartProxy, lakebase: Lakebase, other: Lakebase
) -> None:
    ways = [
        proxy_settings(lakebase, **sections(lakebase, other, two))
        for two in (foreign_target(other), target(lakebase, lakebase["two"].endpoint))
    ]
    # A token for each session: as many as can be are on their way.
    own = {"credentials": {"token_max_age_seconds": 0}}
    proxy = await start_proxy(
        **own, **sections(lakebase, other, target(lakebase, lakebase["two"].endpoint))
    )
    ways = [way.model_copy(update={"credentials": proxy.settings.credentials}) for way in ways]
    lanes = 8

    async def lane() -> None:
        for _ in range(CLIENTS // lanes):
            assert await shard_by_psycopg(proxy, dbname="app@1500") == "two"

    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(lane()) for _ in range(lanes)]
        moves = 0
        for stand, way in itertools.cycle(zip((other, lakebase), ways, strict=True)):
            proxy.reload(way)
            moves += 1
            before = len(stand.gateway.sessions)
            await eventually(
                lambda stand=stand, before=before: (  # type: ignore[misc]
                    len(stand.gateway.sessions) > before or all(task.done() for task in work)
                ),
                "a session comes there",
            )
            if all(task.done() for task in work):
                break
    assert moves >= 3
    assert len(lakebase.gateway.sessions) + len(other.gateway.sessions) == CLIENTS
    assert_own_tokens_only(lakebase, other)


async def test_an_account_that_comes_back_while_it_still_mints_does_not_mint_twice(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    """No target uses it meanwhile, but its call is under way."""
    first = sharded(lakebase)
    proxy = await start_proxy(**first)
    lakebase.workspace.fail(Call.CREDENTIAL, HANG)
    await give_up_while_it_mints(proxy, lakebase)
    proxy.reload(proxy_settings(lakebase, **first, credentials={"token_max_age_seconds": 59}))
    proxy.reload(proxy_settings(lakebase, **first))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(opened(proxy, "7"))
        await eventually(lambda: proxy.slots.used == 1, "it waits for a token")
        lakebase.workspace.clear_faults()
        assert await waiting == ["one"]
    assert len(lakebase.workspace.mints) == 1


async def test_a_dial_under_way_across_a_reload_ends_on_its_own_upstream_and_closes_it(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    first = sharded(lakebase)
    proxy = await start_proxy(**first)
    registry = proxy.workspaces
    assert isinstance(registry, LocalWorkspaceRegistry)
    lakebase.workspace.fail(Call.CREDENTIAL, HANG)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(opened(proxy, "7"))
        await lakebase.workspace.called(Call.CREDENTIAL)
        other = {"credentials": {"token_max_age_seconds": 59}}
        proxy.reload(proxy_settings(lakebase, **first, **other))
        assert len(registry) == 2
        lakebase.workspace.clear_faults()
        assert await waiting == ["one"]
    assert len(registry) == 1
    assert len(registry.calls) == 0


async def test_an_account_that_comes_back_while_a_dial_uses_it_does_not_mint_twice(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    first = sharded(lakebase)
    proxy = await start_proxy(**first)
    lakebase.gateway.inject(Stage.PASSWORD, Injection.HANG, times=1)
    async with plain_client(proxy) as client, asyncio.timeout(10):
        await client.send(startup(V3_0, user="anyone", database="app@7"))
        await lakebase.gateway.until(lambda: any(r.token for r in lakebase.gateway.records))
        other = {"credentials": {"token_max_age_seconds": 59}}
        proxy.reload(proxy_settings(lakebase, **first, **other))
        proxy.reload(proxy_settings(lakebase, **first))
        assert await opened(proxy, "7") == ["one"]
    assert len(lakebase.workspace.mints) == 1


async def test_reloads_without_end_leave_only_what_the_last_one_uses(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    """Each reload makes new upstreams, with an account of their own, while sessions are opened."""
    first = sharded(lakebase)
    proxy = await start_proxy(**first)
    registry = proxy.workspaces
    assert isinstance(registry, LocalWorkspaceRegistry)
    ages = itertools.count(1)

    async def lane() -> None:
        for _ in range(CLIENTS // 4):
            assert await opened(proxy, "7") == ["one"]

    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(lane()) for _ in range(4)]
        while not all(task.done() for task in work):
            age = {"credentials": {"token_max_age_seconds": next(ages)}}
            proxy.reload(proxy_settings(lakebase, **first, **age))
            await asyncio.sleep(0.01)
    assert next(ages) > CLIENTS / 4
    await eventually(lambda: proxy.slots.used == 0, "all sessions are over")
    assert len(registry) == 1
    assert len(registry.calls) == 0
    gc.collect()
    count = len(proxy.snapshot.upstreams)
    expected = {Upstream: count, Dialer: count, AddressLookup: count}
    expected |= {LocalTokenSource: 1, Workspace: 1}
    alive = Counter(type(one) for one in gc.get_objects() if type(one) in expected)
    assert alive == expected


async def test_a_mint_of_an_account_that_is_gone_ends_with_the_proxy(
    start_proxy: StartProxy, lakebase: Lakebase
) -> None:
    first = sharded(lakebase)
    proxy = await start_proxy(**first)
    lakebase.workspace.fail(Call.CREDENTIAL, HANG)
    await give_up_while_it_mints(proxy, lakebase)
    proxy.reload(proxy_settings(lakebase, **first, credentials={"token_max_age_seconds": 59}))
    assert len(proxy.workspaces.calls) == 1
    await proxy.workspaces.close()
    assert len(proxy.workspaces.calls) == 0


async def give_up_while_it_mints(proxy: App, lakebase: Lakebase) -> None:
    """Begin a session and leave as soon as a token is asked for it."""
    async with plain_client(proxy) as client, asyncio.timeout(10):
        await client.send(startup(V3_0, user="anyone", database="app@7"))
        await lakebase.workspace.called(Call.CREDENTIAL)
    await eventually(lambda: proxy.slots.used == 0, "its session is over")
