"""Letting a login be admitted in every shard of a map: in all of them, or as before."""

import pytest

from proxy.catalogue.errors import CatalogueError
from proxy.catalogue.mapping_operations import AddMapping
from proxy.catalogue.operation import points
from proxy.catalogue.operation_kinds import KINDS
from proxy.catalogue.role_operations import GrantSession, RevokeSession
from proxy.catalogue.shard_operations import AddShard, RemoveShard, new_shard
from tests.catalogue.test_operations import failing_at
from tests.support.catalogue import MAP, SHARD_NAMES
from tests.support.operating import Killed, Operating, Pauses, in_background, kill_at

MAY = "select has_function_privilege($1, 'shardmap_local.admit(int,uuid,uuid,text,uuid,bigint,bytea,text,bytea,bytea)', 'execute') and has_schema_privilege($1, 'shardmap_local', 'usage')"  # noqa: E501
ROLES = "select session_roles from shardmap.shard_map"
MARKS = "select distinct op_id from shardmap.shard where op_id is not null"


async def granted(operating: Operating) -> tuple[bool, ...]:
    """Return whether the session role is kept with the map, and may call admit in each shard."""
    role = operating.stores.roles.session
    ((kept,),) = await operating.fetch(MAP, ROLES)
    found = [(await operating.fetch(name, MAY, role))[0][0] for name in SHARD_NAMES]
    return role in kept, *found


def make(operating: Operating, *, revoke: bool) -> GrantSession | RevokeSession:
    kind = RevokeSession if revoke else GrantSession
    return kind(operating.map, operating.stores.roles.session)


async def prepare(operating: Operating, *, revoke: bool) -> tuple[bool, ...]:
    """Put rights and map in the state before the operation, and return it."""
    await operating.run(make(operating, revoke=not revoke))
    return await granted(operating)


ALL, NONE = (True, True, True), (False, False, False)


async def test_a_login_is_granted_in_all_shards_and_revoked_in_all(operating: Operating) -> None:
    for revoke, state in ((False, ALL), (False, ALL), (True, NONE), (True, NONE)):
        assert await operating.run(make(operating, revoke=revoke))
        assert await granted(operating) == state
        assert await operating.fetch(MAP, "select * from shardmap.op_log") == []


@pytest.mark.parametrize("revoke", [False, True])
async def test_s26_a_failure_at_any_step_leaves_the_rights_as_they_were(
    operating: Operating, revoke: bool
) -> None:
    kind = make(operating, revoke=revoke).kind
    for point in points(KINDS[kind]):
        if not point.endswith(".commit"):
            continue
        before = await prepare(operating, revoke=revoke)
        with pytest.raises(CatalogueError) as refused:
            await operating.run(make(operating, revoke=revoke), failing_at(point))
        assert (refused.value.reason, refused.value.op_id) == ("step_failed", None)
        assert await granted(operating) == before, point
        assert await operating.run(make(operating, revoke=revoke))
        assert await granted(operating) == (NONE if revoke else ALL)


@pytest.mark.parametrize("revoke", [False, True])
async def test_an_operator_that_ends_at_any_point_leaves_what_the_next_writer_settles(
    operating: Operating, revoke: bool
) -> None:
    kind = make(operating, revoke=revoke).kind
    for number, point in enumerate(points(KINDS[kind])):
        before = await prepare(operating, revoke=revoke)
        with pytest.raises(Killed):
            await operating.run(make(operating, revoke=revoke), kill_at(point))
        low = 10 * number
        await operating.run(AddMapping(operating.map, *operating.bounds(low, low + 10), "one"))
        assert await operating.fetch(MAP, "select * from shardmap.op_log") == []
        after = NONE if revoke else ALL
        assert await granted(operating) in (before, after), point


@pytest.mark.parametrize("revoke", [False, True])
async def test_a_pending_operation_has_its_mark_where_proxies_read(
    operating: Operating, revoke: bool
) -> None:
    """It marked no row, so the alert of an operation that is pending for long did not fire."""
    for resumes in (True, False):
        await prepare(operating, revoke=revoke)
        operation = make(operating, revoke=revoke)
        with pytest.raises(Killed):
            await operating.run(operation, kill_at("local"))
        assert await operating.fetch(MAP, MARKS) == [(operation.op_id,)]
        async with operating.operator() as operator:
            await (operator.resume if resumes else operator.undo)(operation.op_id)
        await operating.check_settled()


async def test_a_login_that_a_server_does_not_have_is_not_granted_and_may_be_revoked(
    operating: Operating,
) -> None:
    with pytest.raises(CatalogueError, match="has no role missing") as refused:
        await operating.run(GrantSession(operating.map, "missing"))
    assert refused.value.reason == "rights_missing"
    assert await operating.fetch(MAP, ROLES) == [([],)]
    await operating.run(RevokeSession(operating.map, "missing"))


async def test_no_shard_is_added_while_a_login_is_granted(operating: Operating) -> None:
    await operating.run(RemoveShard(operating.map, "two"))
    stores = operating.stores
    shard = new_shard(operating.map, "two", stores.host("two"), 5432, stores.database)
    operating.shards["two"] = shard
    for grants_first in (True, False):
        grant = GrantSession(operating.map, stores.roles.session)
        add = AddShard(operating.map, shard)
        first, second = (grant, add) if grants_first else (add, grant)
        pauses = Pauses("local")
        async with in_background(operating.run(first, pauses)) as running:
            await pauses.reached("local")
            with pytest.raises(CatalogueError, match="operation") as refused:
                await operating.run(second)
            assert refused.value.reason == "operation_pending"
            pauses.resume("local")
            assert await running
        await operating.run(second)
        assert await granted(operating) == ALL
        await operating.run(RevokeSession(operating.map, stores.roles.session))
        await operating.run(RemoveShard(operating.map, "two"))
