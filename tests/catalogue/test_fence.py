"""Ending sessions: by each of the three ways, with the right to see and to end them, and soon."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.fence import Registered, clean_registry, end_sessions, growing_pauses
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline
from proxy.catalogue.model import Shard
from proxy.catalogue.shard_store import end_session_statements
from tests.support.operating import Operating


async def with_own_function(operating: Operating) -> None:
    """Create the function that ends the login's sessions, as `grant session` prints it."""
    roles = operating.stores.roles
    (row,) = await operating.fetch("one", "select $1::text::regrole::oid", f'"{roles.session}"')
    role = ""
    for statement in end_session_statements(roles.session, row[0], roles.admin):
        if statement.startswith("--"):
            role = roles.session if "next" in statement else roles.admin
        else:
            operating.stores.execute("one", statement, role or roles.admin)


async def with_membership(operating: Operating) -> None:
    roles = operating.stores.roles
    operating.stores.execute("one", f'grant "{roles.session}" to "{roles.admin}"')


async def with_signal(operating: Operating) -> None:
    operating.stores.execute("one", f'grant pg_signal_backend to "{operating.stores.roles.admin}"')


WAYS = (with_own_function, with_membership, with_signal)


@pytest.mark.parametrize("way", WAYS)
async def test_s66_sessions_are_ended_by_each_of_three_ways(
    operating: Operating, way: Callable[[Operating], Awaitable[None]]
) -> None:
    admin = operating.stores.roles.admin
    operating.stores.execute("one", f'revoke pg_signal_backend from "{admin}"')
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    await operating.run(AddMapping(operating.map, *operating.bounds(10, 20), "one"))
    await way(operating)
    async with operating.session(1) as session, operating.session(11) as other:
        operation = TakeOffline(operating.map, *operating.bounds(0, 10))
        await operating.run(operation)
        assert operation.sessions_ended == 1
        assert not await session.lives()
        assert await other.lives()


@pytest.mark.parametrize("right", ["pg_signal_backend", "pg_read_all_stats"])
async def test_s66_without_a_right_nothing_is_ended_and_the_refusal_names_it(
    operating: Operating, right: str
) -> None:
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    async with operating.session(1) as session:
        operating.stores.execute("one", f'revoke {right} from "{operating.stores.roles.admin}"')
        operation = TakeOffline(operating.map, *operating.bounds(0, 10))
        with pytest.raises(CatalogueError) as refused:
            await operating.run(operation)
        assert (refused.value.reason, refused.value.sqlstate) == ("rights_missing", "42501")
        assert ("end" if "signal" in right else "see") in refused.value.message
        assert operating.stores.roles.session in refused.value.message
        assert await session.lives()
        # Undone, it is online again.
        async with operating.operator() as operator:
            await operator.undo(operation.op_id)
    operating.stores.execute("one", f'grant {right} to "{operating.stores.roles.admin}"')
    await operating.check_settled()


def test_a_session_that_ends_at_once_is_looked_for_soon() -> None:
    assert list(islice(growing_pauses(0.02), 6)) == [0.002, 0.004, 0.008, 0.016, 0.02, 0.02]


class Explaining:
    """A connection that also notes how often each statement reads the activity of all backends."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.reads: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, query: str, *arguments: Any) -> Any:
        """Fetch rows, after the statement was explained where it ends nothing."""
        if "shardmap_local.session" in query:
            await self._explain(query, *arguments)
        return await self._connection.fetch(query, *arguments)

    async def execute(self, query: str, *arguments: Any) -> Any:
        """Execute a statement, after it was explained."""
        if "shardmap_local.session" in query:
            await self._explain(query, *arguments)
        return await self._connection.execute(query, *arguments)

    async def _explain(self, query: str, *arguments: Any) -> None:
        analyse = "explain (analyze, timing off, format json) "
        harmless = query.replace("pg_catalog.pg_terminate_backend(pid)", "true")
        transaction = self._connection.transaction()
        await transaction.start()
        found = await self._connection.fetchval(analyse + harmless, *arguments)
        await transaction.rollback()
        self.reads.append(_reads(json.loads(found)[0]["Plan"]))


def _reads(plan: dict[str, Any]) -> int:
    """Return how often a plan reads the activity of all backends."""
    own = plan["Actual Loops"] if plan.get("Function Name") == "pg_stat_get_activity" else 0
    return int(own) + sum(map(_reads, plan.get("Plans", ())))


class ExplainingDatabases:
    """Connects as `operating` does, to shards alone."""

    def __init__(self, operating: Operating) -> None:
        self._operating = operating
        self.reads: list[int] = []

    def catalogue(self) -> Any:
        raise NotImplementedError

    @asynccontextmanager
    async def shard(self, shard: Shard) -> AsyncIterator[Any]:
        async with self._operating.databases.shard(shard) as connection:
            explaining = Explaining(connection)
            yield explaining
            self.reads += explaining.reads


async def test_the_activity_of_all_backends_is_not_read_for_each_session(
    operating: Operating,
) -> None:
    """Ending a thousand sessions took a fifth of a second in one statement, and more to clean."""
    await operating.run(AddMapping(operating.map, *operating.bounds(0, 10), "one"))
    databases = ExplainingDatabases(operating)
    tools = replace(operating.tools, databases=databases)
    which = Registered.of_mapping((await operating.mapping(1))["mapping_id"])
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(operating.session(1))
        assert await end_sessions(operating.shards["one"], which, tools, {}) == 4
    async with databases.shard(operating.shards["one"]) as connection:
        await clean_registry(connection)
    assert len(databases.reads) >= 5, "looked for twice, ended, and cleaned away twice"
    assert max(databases.reads) == 2, "by the view, and for the state of its rows"
    assert await operating.registered() == {}
