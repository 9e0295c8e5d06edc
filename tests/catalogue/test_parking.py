"""Clients that wait: how many, what wakes them, and who asks for all of them."""

import asyncio
from contextlib import ExitStack
from uuid import UUID

import pytest

from proxy.catalogue.parking import LOOK_SECONDS, TURN_SECONDS, Parking, ParkResult
from proxy.errors import ErrorKind, ProxyError
from tests.support.operating import in_background

MAPPING, OTHER, SHARD = (UUID(int=number) for number in (1, 2, 11))
REFUSAL = ProxyError(ErrorKind.MAPPING_OFFLINE)


class Counts:
    """What was counted."""

    def __init__(self) -> None:
        self.now: list[int] = []
        self.ended: list[str] = []

    def parked(self, now: int) -> None:
        self.now.append(now)

    def park_ended(self, result: str) -> None:
        self.ended.append(result)


def test_a_client_is_counted_while_it_waits_and_so_is_how_that_ends() -> None:
    counts = Counts()
    parking = Parking(5, 10, counts)
    with parking.waiting(1.0, REFUSAL) as set_result:
        assert len(parking) == 1
        set_result(ParkResult.SERVED)
    with pytest.raises(asyncio.CancelledError), parking.waiting(1.0, REFUSAL):
        raise asyncio.CancelledError
    assert len(parking) == 0
    assert counts.now == [1, 0, 1, 0]
    assert counts.ended == [ParkResult.SERVED, ParkResult.LEFT]


@pytest.mark.parametrize(("park_max", "seconds"), [(2, 1.0), (9, 0.0), (9, -1.0), (0, 1.0)])
def test_s64_a_client_beyond_the_bound_or_without_time_is_refused(
    park_max: int, seconds: float
) -> None:
    counts = Counts()
    parking = Parking(park_max, 10, counts)
    with ExitStack() as stack:
        for _ in range(min(2, park_max)):
            stack.enter_context(parking.waiting(1.0, REFUSAL))
        parked = len(parking)
        with pytest.raises(ProxyError) as refused, parking.waiting(seconds, REFUSAL):
            pytest.fail("there was no place")
        assert refused.value is REFUSAL
        assert (len(parking), counts.ended) == (parked, [ParkResult.FULL])


def test_s64_the_clients_of_all_processes_are_counted_together() -> None:
    shared = {"this": 0, "other": 2}

    def share(parked: int) -> int:
        shared["this"] = parked
        return sum(shared.values())

    parking = Parking(3, 10, Counts(), share)
    with parking.waiting(1.0, REFUSAL):
        with pytest.raises(ProxyError), parking.waiting(1.0, REFUSAL):
            pytest.fail("there was no place")
        assert shared["this"] == 1
    assert shared["this"] == 0


@pytest.mark.parametrize(
    ("mappings", "shards", "wakes"),
    [
        ((MAPPING,), (), True),
        ((), (SHARD,), True),
        (None, (), True),
        ((OTHER,), (), False),
        ((), (UUID(int=12),), False),
    ],
)
async def test_a_change_of_its_mapping_or_its_shard_wakes_a_client(
    mappings: tuple[UUID, ...] | None, shards: tuple[UUID, ...], wakes: bool
) -> None:
    parking = Parking(5, 10, Counts())
    async with in_background(parking.wait(MAPPING, SHARD, 0.3, until=0)) as waiting:
        await asyncio.sleep(0)
        parking.changed(mappings, shards)
        parking.changed(mappings, shards)  # one that is awake already
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert waiting.done() is wakes


async def test_one_of_those_that_wait_for_a_mapping_asks_for_all() -> None:
    parking = Parking(9, 10, Counts())
    with parking.waiting(9.0, REFUSAL):
        async with asyncio.timeout(20):
            due = await asyncio.gather(
                *(parking.wait(MAPPING, SHARD, 9.0, until=0) for _ in range(5))
            )
            assert due.count(True) == 1
            assert await parking.wait(OTHER, SHARD, LOOK_SECONDS, until=0), (
                "another mapping has its own"
            )
            assert not await parking.wait(OTHER, SHARD, 0.01, until=0), "it has just been asked for"


async def test_the_client_that_waited_longest_goes_on_first() -> None:
    """A client that had looked by itself was woken after those that came later.

    All dialled at once: on a machine that is busy with it the first was served no sooner than the
    fiftieth.
    """
    parking, order = Parking(9, 10, Counts()), list[float]()
    loop = asyncio.get_running_loop()
    at = dict[float, float]()

    async def client(until: float) -> None:
        await parking.wait(MAPPING, SHARD, 9.0, until=until)
        await parking.turn()
        order.append(until)
        at[until] = loop.time()

    async with asyncio.timeout(20), asyncio.TaskGroup() as clients:
        for until in (3.0, 1.0, 4.0, 2.0):
            clients.create_task(client(until))
        await asyncio.sleep(0)
        parking.changed((MAPPING,))
    assert order == [1.0, 2.0, 3.0, 4.0]
    # At least so far apart, but for the resolution of the loop's timers.
    assert at[4.0] - at[1.0] > 2 * TURN_SECONDS
