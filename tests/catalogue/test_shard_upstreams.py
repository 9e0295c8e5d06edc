"""The upstreams of shards: made of their rows alone, and never changed."""

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from proxy.catalogue.model import Shard, Status
from proxy.catalogue.shard_upstreams import ShardUpstreams, target_name
from proxy.config import Settings
from proxy.errors import ErrorKind, ProxyError
from proxy.observe.pool_stats import PoolStats
from proxy.pool.pool import Pool
from proxy.server.metric_labels import build_metrics
from proxy.upstream.upstreams import Upstreams
from proxy.workspace.registry import LocalWorkspaceRegistry

DOMAIN = "database.cloud.example.com"
ENDPOINT = "projects/p/branches/b/endpoints/"
SHARD = Shard(
    *(UUID(int=1), UUID(int=9), "eu", f"ep-eu-1.{DOMAIN}", 5432, "app"), endpoint=ENDPOINT + "eu"
)
B = {
    "host": "https://b.example.com",
    "client_id": "b",
    "client_secret": "not-a-real-secret",
    "auth_type": "oauth-m2m",
}


def settings(**sections: Any) -> Settings:
    values = {
        "targets": {"main": {"endpoint": ENDPOINT + "map"}},
        "catalogue": {"target": "main"},
        "routing": {"shard_map": "tenants"},
        "shard_maps": {"tenants": {"catalogue": True}},
        "workspaces": {"b": B},
    }
    return Settings.model_validate({**values, **sections})


class Made:
    """Makes upstreams for configurations that follow each other."""

    def __init__(self, registry: LocalWorkspaceRegistry) -> None:
        self._registry = registry
        self.pools = PoolStats()
        self._opened: list[Upstreams | ShardUpstreams] = []

    def shards(
        self, given: Settings | None = None, before: ShardUpstreams | None = None
    ) -> ShardUpstreams:
        given = given or settings()

        async def catalogue_host() -> str:
            return f"ep-map-1.{DOMAIN}"

        make_pool = partial(Pool, register=self.pools.register)
        upstreams = Upstreams(given, self._registry, lambda *_: None, make_pool=make_pool)
        made = ShardUpstreams(
            given, upstreams.factory, upstreams.resources(), catalogue_host, before
        )
        self._opened += (made, upstreams)
        return made

    async def close(self) -> None:
        for one in self._opened:
            one.close()
        assert len(self._registry) == 0
        await self._registry.close()


@pytest_asyncio.fixture
async def made() -> AsyncIterator[Made]:
    found = Made(LocalWorkspaceRegistry(build_metrics(), version="1"))
    yield found
    await found.close()


async def refusal(shards: ShardUpstreams, shard: Shard) -> ProxyError:
    with pytest.raises(ProxyError) as refused:
        await shards.of(shard)
    assert len(shards) == 0
    return refused.value


async def test_a_row_gives_where_to_dial_and_the_rest_is_the_upstreams(made: Made) -> None:
    shards = made.shards(settings(upstream={"connects_max": 7, "sslmode": "verify-full"}))
    upstream = await shards.of(SHARD)
    found = upstream.settings
    assert (found.host, found.port, found.database) == (SHARD.host, 5432, "app")
    assert (found.connects_max, found.workspace) == (7, "")
    assert upstream.resource is not None
    assert upstream.resource.name == SHARD.endpoint
    assert [name for name, _ in shards] == [target_name("tenants", SHARD)] == ["tenants/eu"]


async def test_a_row_that_stays_keeps_its_upstream_and_another_gets_another(made: Made) -> None:
    shards = made.shards()
    first = await shards.of(SHARD)
    same = replace(SHARD, status=Status.OFFLINE, version=8, op_id=UUID(int=3))
    assert await shards.of(same) is first
    second = await shards.of(replace(SHARD, port=6432))
    assert second is not first
    assert (first.settings.port, second.settings.port) == (5432, 6432)
    assert len(shards) == 1


async def test_s49_another_workspace_is_another_account(made: Made) -> None:
    shards = made.shards()
    first = await shards.of(SHARD)
    second = await shards.of(replace(SHARD, workspace="b"))
    assert first.account is not None
    assert second.account is not first.account
    assert second.account_key != first.account_key
    assert shards.accounts == [second.account]
    # The one before is what a dial under way has: it did not change.
    assert (first.settings.workspace, second.settings.workspace) == ("", "b")


async def test_s63_what_may_not_be_dialled_makes_no_upstream(made: Made) -> None:
    shards = made.shards()
    error = await refusal(shards, replace(SHARD, workspace="elsewhere"))
    assert error.kind is ErrorKind.WORKSPACE_UNKNOWN
    error = await refusal(shards, replace(SHARD, host="evil\n.example.com"))
    assert error.kind is ErrorKind.SHARD_HOST_REFUSED
    assert error.detail.isprintable()
    shards = made.shards(settings(catalogue={"target": "main", "shard_hosts": ["x.example.com"]}))
    assert (await refusal(shards, SHARD)).kind is ErrorKind.SHARD_HOST_REFUSED
    host = "x.example.com"
    assert (await shards.of(replace(SHARD, host=host))).settings.host == host


@pytest.mark.parametrize(
    "changes",
    [
        {"database": "a\x1bb"},
        {"database": ""},
        {"port": 0},
        {"port": 70_000},
        {"endpoint": "", "instance": "../secrets"},
        {"endpoint": "projects/p?x"},
        {"host": f"ep-eu-1-pooler.{DOMAIN}"},
    ],
)
async def test_s63_a_row_that_cannot_be_right_is_refused(
    made: Made, changes: dict[str, Any]
) -> None:
    error = await refusal(made.shards(), replace(SHARD, **changes))
    assert error.kind is ErrorKind.SHARD_ROW_INVALID


async def test_a_shard_without_a_resource_uses_one_of_its_workspace(made: Made) -> None:
    bare = replace(SHARD, endpoint="")
    upstream = await made.shards().of(bare)
    assert upstream.account is not None
    other = made.shards()
    error = await refusal(other, replace(bare, workspace="b"))
    assert error.kind is ErrorKind.SHARD_ROW_INVALID
    # Another shard of that workspace has one, and a token for it is good for both.
    named = replace(SHARD, shard_id=UUID(int=2), name="us", workspace="b")
    first = await other.of(named)
    assert (await other.of(replace(bare, workspace="b"))).account is first.account


async def test_shards_that_the_map_has_no_more_are_closed(made: Made) -> None:
    shards = made.shards()
    await shards.of(SHARD)
    us = replace(SHARD, shard_id=UUID(int=2), name="us")
    kept = await shards.of(us)
    shards.keep_only([us.shard_id])
    assert [upstream for _, upstream in shards] == [kept]
    shards.discard(SHARD.shard_id)  # gone already


async def test_a_reload_keeps_the_upstreams_that_would_be_the_same(made: Made) -> None:
    before = made.shards()
    us = replace(SHARD, shard_id=UUID(int=2), name="us", workspace="b")
    first, second = await before.of(SHARD), await before.of(us)
    same = made.shards(before=before)
    assert (await same.of(SHARD), await same.of(us)) == (first, second)
    other = made.shards(settings(upstream={"connects_max": 7}), before=before)
    assert len(other) == 0
    assert await other.of(SHARD) is not first
    without_b = made.shards(settings(workspaces={}), before=before)
    assert [upstream for _, upstream in without_b] == [first]
    others = {"tenants": {"catalogue": True}, "others": {"catalogue": True}}
    another_map = settings(routing={"shard_map": "others"}, shard_maps=others)
    assert len(made.shards(another_map, before=before)) == 0


async def test_a_closed_configuration_keeps_nothing_that_is_made_later(made: Made) -> None:
    shards = made.shards()
    await shards.of(SHARD)
    shards.close()
    assert len(shards) == 0
    assert (await shards.of(SHARD)).settings.host == SHARD.host
    assert len(shards) == 0


async def test_p44_the_pool_of_a_shard_is_open_while_a_configuration_has_the_shard(
    made: Made,
) -> None:
    def pools() -> list[str]:
        return [row.target for row in made.pools.rows() if "/" in row.target]

    given = settings(upstream={"pool": "session"})
    before = made.shards(given)
    kept = (await before.of(SHARD)).pool
    assert kept is not None
    later = made.shards(given, before)
    before.close()
    assert (await later.of(SHARD)).pool is kept
    assert pools() == ["tenants/eu"]
    assert (await later.of(replace(SHARD, port=6432))).pool is not kept
    assert pools() == ["tenants/eu"]
    later.keep_only(())
    assert pools() == []
    # A client that was parked until now dials once more for the configuration that was replaced.
    later.close()
    await later.of(SHARD)
    assert pools() == []
