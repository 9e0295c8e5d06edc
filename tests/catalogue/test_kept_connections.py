"""An operator's connections to shards: one for each shard of its operation, replaced when lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.catalogue.kept_connections import KeptConnections
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.model import Shard
from tests.support.catalogue import SHARD_NAMES
from tests.support.operating import Databases, Operating


class Counted(Databases):
    """Counts the connections to shards that were opened, and those that are open."""

    opened = 0
    open = 0

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        async with super().shard(shard) as connection:
            self.opened += 1
            self.open += 1
            try:
                yield connection
            finally:
                self.open -= 1


async def pid_of(kept: KeptConnections, shard: Shard) -> int:
    async with kept.shard(shard) as connection:
        pid: int = await connection.fetchval("select pg_backend_pid()")
        return pid


async def test_a_shard_is_connected_to_once_and_each_shard_for_itself(
    operating: Operating,
) -> None:
    kept = KeptConnections(databases := Counted(operating.stores))
    one, two = (operating.shards[name] for name in SHARD_NAMES)
    await kept.keep_only([one, two])
    assert await pid_of(kept, one) == await pid_of(kept, one)
    assert await pid_of(kept, two)
    assert (databases.opened, databases.open) == (2, 2)
    await kept.keep_only([two])
    assert databases.open == 1
    await kept.keep_only([])
    assert databases.open == 0


async def test_a_second_user_gets_a_connection_of_its_own(operating: Operating) -> None:
    kept = KeptConnections(databases := Counted(operating.stores))
    one = operating.shards["one"]
    await kept.keep_only([one])
    async with kept.shard(one) as connection:
        first = await connection.fetchval("select pg_backend_pid()")
        assert await pid_of(kept, one) != first
    assert (databases.opened, databases.open) == (2, 1)
    await kept.keep_only([])


async def test_a_connection_that_failed_or_was_lost_is_replaced(operating: Operating) -> None:
    kept = KeptConnections(databases := Counted(operating.stores))
    one = operating.shards["one"]
    await kept.keep_only([one])
    with pytest.raises(ValueError, match="of the test"):
        async with kept.shard(one):
            raise ValueError("of the test")
    assert databases.open == 0
    async with kept.shard(one) as connection:
        connection.terminate()
    assert await pid_of(kept, one)
    assert (databases.opened, databases.open) == (3, 1)
    await kept.keep_only([])


async def test_the_operations_of_one_operator_log_in_once(operating: Operating) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(90, 100), "two"))
    operating.databases = databases = Counted(operating.stores)
    async with operating.operator() as operator:
        for low in range(0, 50, 10):
            bounds = operating.bounds(low, low + 10)
            assert await operator.run(AddMapping(operating.map, *bounds, "one"))
        assert (databases.opened, databases.open) == (1, 1)
        assert await operator.run(AddMapping(operating.map, *operating.bounds(50, 60), "two"))
        assert (databases.opened, databases.open) == (2, 1)
    assert databases.open == 0


async def test_a_connection_to_a_shard_that_is_only_asked_is_not_kept(
    operating: Operating,
) -> None:
    """A mapping was added over as many connections as there were shards without mappings."""
    operating.databases = databases = Counted(operating.stores)
    async with operating.operator() as operator:
        assert await operator.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
        assert (databases.opened, databases.open) == (2, 1)


async def test_a_plan_keeps_no_connection_to_the_shards_of_the_one_before(
    operating: Operating,
) -> None:
    """`merge --auto --dry-run` kept one to each shard of the map."""
    operating.databases = databases = Counted(operating.stores)
    async with operating.operator() as operator:
        for low, name in ((0, "one"), (10, "two")):
            operation = AddMapping(operating.map, *operating.bounds(low, low + 10), name)
            assert await operator.plan(operation)
            assert databases.open == 1
