"""Shared counters: slots as a bound of all workers, and what the death of one frees."""

import os

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.workers.shared_counters import SharedCounters, SharedSlots


def test_workers_take_slots_from_one_bound_and_give_them_back() -> None:
    counters = SharedCounters(2)
    one, other = SharedSlots(counters, 1, 3), SharedSlots(counters, 2, 3)
    with one.take(), other.take(), other.take():
        assert (one.used, other.used, counters.slots_used) == (1, 2, 3)
        for slots in (one, other):
            with pytest.raises(ProxyError) as caught, slots.take():
                pytest.fail("there was no slot")
            assert caught.value.kind is ErrorKind.TOO_MANY_CONNECTIONS
        assert counters.slots_used == 3, "a refused session holds none"
    assert counters.slots_used == 0


def test_a_dead_workers_slots_are_free_again() -> None:
    counters = SharedCounters(2)
    with SharedSlots(counters, 2, 1).take():
        counters.record_end(2)
        counters.reset(2)
        assert (counters.slots_used, counters.connections_ended(2)) == (0, 0)
        counters.add_slots(2, 1)  # for the slot that the dead one would have given back


def test_parked_clients_of_all_workers_are_counted_together() -> None:
    counters = SharedCounters(2)
    assert counters.share_parked(1, 2) == 2
    assert counters.share_parked(2, 3) == 5
    assert counters.slots_used == 0
    counters.reset(2)
    assert counters.share_parked(1, 1) == 1


def test_a_worker_is_silent_until_it_beats() -> None:
    counters = SharedCounters(2)
    assert counters.is_silent(1)
    counters.beat(1)
    assert not counters.is_silent(1)
    assert counters.is_silent(2)


def test_another_process_sees_what_this_one_writes_and_the_other_way_round() -> None:
    counters = SharedCounters(2)
    counters.add_slots(1, 7)
    pid = os.fork()
    if pid == 0:
        counters.record_end(2)
        os._exit(0 if counters.slots_used == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert counters.connections_ended(2) == 1
