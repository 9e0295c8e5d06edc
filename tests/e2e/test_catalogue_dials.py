"""Shards that cannot be reached or do not admit now, with real shards: looks, waits, one budget."""

import asyncio
import socket

import pytest

from proxy.catalogue.admission import Verdict
from proxy.errors import ErrorKind, ProxyError
from tests.support.direct_sidecar import Sidecar, direct_sidecar
from tests.support.operator import Operator, Placed
from tests.support.running import eventually


async def test_s58_shard_that_is_offline_refuses_a_proxy_that_has_not_heard(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.shard_status("one", "offline", announces=False)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert Verdict.OFFLINE in sidecar.counts.verdicts
    await sidecar.operator.shard_status("one", "online", announces=False)
    assert (await opening).admitted_by is not None


async def test_operation_that_has_begun_counts_as_offline_once_a_shard_refused(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.catalogue(
        "update shardmap.mapping set op_id = gen_random_uuid() where mapping_id = $1",
        placed.mapping_id,
    )
    await sidecar.open()  # known: the shard decides, and still admits
    async with sidecar.operator.stores.connect("one") as local:
        await local.execute("update shardmap_local.mapping set epoch = epoch + 1")
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.catalogue(
        "update shardmap.mapping set op_id = null, epoch = epoch + 1 where mapping_id = $1",
        placed.mapping_id,
    )
    assert (await opening).admitted_by is not None


async def test_operation_of_the_shard_that_stops_no_session_is_not_waited_for(
    operator: Operator, placed: Placed
) -> None:
    """A file of mappings that is added, or a login that is granted, marks the shard's row.

    A client whose mapping had changed meanwhile was refused for as long as that took.
    """
    async with direct_sidecar(operator, catalogue={"park_timeout_seconds": 0}) as sidecar:
        await sidecar.open()
        known = sidecar.source.known
        await operator.offline(placed)
        await operator.online(placed)
        await operator.catalogue("update shardmap.shard set op_id = gen_random_uuid()")
        sidecar.source.known = known
        assert (await sidecar.open()).admitted_by is not None
        assert sidecar.counts.verdicts[-2:] == [Verdict.STALE, Verdict.OK]


async def test_operation_of_the_shard_is_waited_for_once_the_shard_refused(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    mark = "update shardmap.shard set op_id = {} where shard_id = $1"
    shard_id = sidecar.operator.shard_ids["one"]
    await sidecar.operator.catalogue(mark.format("gen_random_uuid()"), shard_id)
    await sidecar.operator.shard_status("one", "offline", announces=False)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    dials = len(sidecar.counts.verdicts)
    queries = sidecar.source.queries
    await eventually(lambda: sidecar.source.queries >= queries + 2, "it has looked twice")
    assert (len(sidecar.counts.verdicts), len(sidecar.parts.parking)) == (dials, 1)
    await sidecar.operator.shard_status("one", "online", announces=False)
    await sidecar.operator.catalogue(mark.format("null"), shard_id)
    assert (await opening).admitted_by is not None


async def test_r1_admission_that_waits_for_a_fence_reads_what_the_fence_left(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    async with sidecar.operator.stores.connect("one") as local:
        fence = local.transaction()
        await fence.start()
        await local.execute(
            "update shardmap_local.mapping set status = 'offline', epoch = epoch + 1"
            " where mapping_id = $1",
            placed.mapping_id,
        )
        opening = asyncio.ensure_future(sidecar.open())
        await asyncio.sleep(0.1)
        assert not opening.done()
        await fence.commit()
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert sidecar.counts.verdicts[-1] == Verdict.OFFLINE
    opening.cancel()
    await asyncio.wait((opening,))


# -- failed dials --------------------------------------------------------------------------------


async def test_s20_shard_that_cannot_be_reached_is_looked_up_once(
    operator: Operator, placed: Placed
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        await operator.catalogue(
            "update shardmap.shard set port = $2 where shard_id = $1",
            *(operator.shard_ids["one"], port),
        )
        upstream = {"connect_retry_seconds": 0.05}
        async with direct_sidecar(operator, upstream=upstream) as sidecar:
            error = await sidecar.refusal()
            assert error.kind is ErrorKind.UPSTREAM_UNREACHABLE
            assert sidecar.source.reached == ["no"]
            # It is elsewhere by now, and the proxy has not heard of it.
            known = sidecar.source.known
            await operator.catalogue(
                "update shardmap.shard set port = $2 where shard_id = $1",
                *(operator.shard_ids["one"], operator.stores.lakebase.port),
            )
            sidecar.source.known = known
            assert (await sidecar.open()).admitted_by is not None
            assert sidecar.source.reached == ["no", "no", "yes"]


async def test_clients_own_mistake_asks_nothing(sidecar: Sidecar, placed: Placed) -> None:
    error = await sidecar.refusal(options=b"-c no_such_setting=1")
    assert error.kind is ErrorKind.SETTING_UNKNOWN
    assert sidecar.source.reached == []


async def test_failed_look_leaves_the_dials_own_error(operator: Operator, placed: Placed) -> None:
    await operator.catalogue("update shardmap.shard set dbname = 'nowhere'")
    async with direct_sidecar(operator) as sidecar:
        opener = await sidecar.opener()
        sidecar.source.fails = True
        with pytest.raises(ProxyError) as refused:
            await sidecar.open_with(opener)
        assert refused.value.kind is ErrorKind.DATABASE_MISSING


# -- one budget ----------------------------------------------------------------------------------


async def test_one_budget_bounds_both_dials_and_not_the_time_parked(
    operator: Operator, placed: Placed
) -> None:
    async with direct_sidecar(operator, upstream={"connect_timeout_seconds": 1.5}) as sidecar:
        await operator.offline(placed)
        opening = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        await asyncio.sleep(2)
        await operator.online(placed)
        assert (await opening).admitted_by is not None
        async with operator.stores.connect("one") as local, local.transaction():
            await local.execute("select * from shardmap_local.mapping for update")
            error = await sidecar.refusal()
            assert error.kind is ErrorKind.LOGIN_TIMEOUT


async def test_s28_one_lost_connection_within_the_budget_is_invisible(
    sidecar: Sidecar, placed: Placed
) -> None:
    async with sidecar.operator.stores.connect("one") as local, local.transaction():
        await local.execute("select * from shardmap_local.mapping for update")
        opening = asyncio.ensure_future(sidecar.open())
        async with sidecar.operator.stores.connect("one") as other:
            ended = 0
            while not ended:
                ended = await other.fetchval(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                    " where wait_event_type = 'Lock' and query like '%admit(%'"
                )
    assert (await opening).admitted_by is not None
    assert sidecar.counts.verdicts == [Verdict.OK]
