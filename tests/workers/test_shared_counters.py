"""The page that all processes see: places as a bound of the whole, and what a death gives back."""

import os

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.workers.shared_counters import SharedCounters, SharedSlots


def test_workers_take_places_from_one_bound_and_give_them_back() -> None:
    counters = SharedCounters(2)
    one, other = SharedSlots(counters, 0, 3), SharedSlots(counters, 1, 3)
    with one.take(), other.take(), other.take():
        assert (one.taken, other.taken, counters.slots_taken) == (1, 2, 3)
        for places in (one, other):
            with pytest.raises(ProxyError) as caught, places.take():
                pytest.fail("there was no place")
            assert caught.value.kind is ErrorKind.TOO_MANY_CONNECTIONS
        assert counters.slots_taken == 3, "who is refused holds nothing"
    assert counters.slots_taken == 0


def test_a_dead_workers_places_are_free_again() -> None:
    counters = SharedCounters(2)
    with SharedSlots(counters, 1, 1).take():
        counters.end(1)
        counters.clear(1)
        assert (counters.slots_taken, counters.ended(1)) == (0, 0)
        counters.take(1, 1)  # for the place that the dead one would have given back


def test_another_process_sees_what_this_one_writes_and_the_other_way_round() -> None:
    counters = SharedCounters(2)
    counters.take(0, 7)
    pid = os.fork()
    if pid == 0:
        counters.end(1)
        os._exit(0 if counters.slots_taken == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert counters.ended(1) == 1
