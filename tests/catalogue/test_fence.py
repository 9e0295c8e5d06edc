"""Ending sessions: by each of the three ways, and only with the right to see and to end them."""

from collections.abc import Awaitable, Callable

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.mapping_status import TakeOffline
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
