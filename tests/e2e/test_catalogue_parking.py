"""Clients of a shard key that is offline: parked, served, refused."""

import asyncio
from dataclasses import replace

import pytest

from proxy.catalogue.parking import Parking, ParkResult
from proxy.errors import ErrorKind, ProxyError
from proxy.upstream.phases import DialPhases
from proxy.upstream.upstreams import RouteReplaced
from tests.support.direct_sidecar import SECONDS_MAX, Sidecar, direct_sidecar
from tests.support.operator import Operator, Placed
from tests.support.running import eventually


async def test_s47_client_is_parked_until_the_mapping_is_online(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.open()
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    assert not opening.done()
    await sidecar.operator.online(placed)
    sidecar.parts.parking.changed([placed.mapping_id])
    session = await opening
    assert session.admitted_by is not None
    assert session.admitted_by.epoch == 3
    assert sidecar.counts.parks == [ParkResult.SERVED]
    assert sidecar.counts.parked_now == 0


async def test_s47_parked_client_finds_out_by_itself(sidecar: Sidecar, placed: Placed) -> None:
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.online(placed)
    assert (await opening).admitted_by is not None


async def test_s47_client_that_waits_too_long_is_refused(
    operator: Operator, placed: Placed
) -> None:
    async with direct_sidecar(operator, catalogue={"park_timeout_seconds": 0.2}) as sidecar:
        await operator.offline(placed)
        error = await sidecar.refusal()
        assert error.kind is ErrorKind.MAPPING_OFFLINE
        assert error.response().sqlstate == "57P03"
        assert sidecar.counts.parks == [ParkResult.TIMED_OUT]


async def test_s64_client_beyond_the_bound_is_refused_at_once(
    operator: Operator, placed: Placed
) -> None:
    async with direct_sidecar(operator, catalogue={"park_max": 1}) as sidecar:
        await operator.offline(placed)
        first = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_OFFLINE
        assert (await sidecar.open("1000")).admitted_by, "others connect meanwhile"
        first.cancel()
        await asyncio.wait((first,))
        assert sidecar.counts.parks == [ParkResult.FULL, ParkResult.LEFT]
        assert len(sidecar.parts.parking) == 0


async def test_parking_that_is_off_refuses_at_once(operator: Operator, placed: Placed) -> None:
    async with direct_sidecar(operator, catalogue={"park_timeout_seconds": 0}) as sidecar:
        await operator.offline(placed)
        assert (await sidecar.refusal()).kind is ErrorKind.MAPPING_OFFLINE


class HeldTurns(Parking):
    """Holds each client whose turn has come."""

    def hold(self) -> tuple[asyncio.Event, asyncio.Event]:
        """Return what is set when a client waits for its turn, and what ends that."""
        self._reached, self._goes_on = asyncio.Event(), asyncio.Event()
        return self._reached, self._goes_on

    async def turn(self) -> None:
        """Wait until the test lets it go on."""
        self._reached.set()
        await self._goes_on.wait()
        await super().turn()


async def test_s62_client_is_routed_anew_if_the_map_is_exchanged_before_its_turn(
    sidecar: Sidecar, placed: Placed
) -> None:
    """It was served by the map that was not in force any more."""
    is_in_force = True
    parking = HeldTurns(5, 10, sidecar.counts)
    reached, goes_on = parking.hold()
    sidecar.parts = replace(sidecar.parts, parking=parking, is_in_force=lambda: is_in_force)
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(parking) == 1, "the client is parked")
    await sidecar.operator.online(placed)
    async with asyncio.timeout(SECONDS_MAX):
        await reached.wait()
        is_in_force = False
        parking.exchanged()
        goes_on.set()
        with pytest.raises(RouteReplaced):
            await opening
    assert sidecar.counts.parks == [ParkResult.REROUTED]


async def test_s62_time_of_a_client_is_what_it_was_parked_and_not_what_was_between(
    sidecar: Sidecar, placed: Placed
) -> None:
    """Each reload that exchanged the map began its time anew; then a dial between counted too."""
    is_in_force, later = True, 0.0
    loop = asyncio.get_running_loop()
    sidecar.parts = replace(
        sidecar.parts, is_in_force=lambda: is_in_force, clock=lambda: loop.time() + later
    )
    await sidecar.operator.offline(placed)
    phases = DialPhases()

    async def rerouted(seconds: float) -> None:
        nonlocal is_in_force, later
        opening = asyncio.ensure_future(sidecar.open(phases=phases))
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        await eventually(lambda: phases.is_parked, "it is said what it waits for")
        later += seconds
        is_in_force = False
        sidecar.parts.parking.exchanged()
        with pytest.raises(RouteReplaced):
            await opening
        assert not phases.is_parked
        is_in_force = True

    await rerouted(0)
    later += 100
    await rerouted(100)
    with pytest.raises(ProxyError) as refused:
        await sidecar.open(phases=phases)
    assert refused.value.kind is ErrorKind.MAPPING_OFFLINE
    assert sidecar.counts.parks == [ParkResult.REROUTED, ParkResult.REROUTED, ParkResult.FULL]


async def test_s64_parked_client_holds_no_connect(operator: Operator, placed: Placed) -> None:
    async with direct_sidecar(operator, upstream={"connects_max": 1}) as sidecar:
        other = await operator.add("20", "30", "one")
        await operator.offline(placed, announces=False)
        opening = asyncio.ensure_future(sidecar.open())
        await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
        sidecar.source.known = None
        session = await sidecar.open("25")
        assert session.admitted_by is not None
        assert session.admitted_by.mapping_id == other.mapping_id
        opening.cancel()
        await asyncio.wait((opening,))


async def test_mapping_that_is_deleted_under_parked_clients_is_not_found(
    sidecar: Sidecar, placed: Placed
) -> None:
    await sidecar.operator.offline(placed)
    opening = asyncio.ensure_future(sidecar.open())
    await eventually(lambda: len(sidecar.parts.parking) == 1, "the client is parked")
    await sidecar.operator.delete(placed)
    with pytest.raises(ProxyError) as refused:
        await opening
    assert refused.value.kind is ErrorKind.MAPPING_NOT_FOUND
    assert sidecar.counts.parks == [ParkResult.FAILED]
