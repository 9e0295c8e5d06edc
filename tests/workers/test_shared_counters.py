"""The page that all processes see: places as a bound of the whole, and what a death gives back."""

import os

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.workers.shared_counters import Ledger, SharedPlaces


def test_workers_take_places_from_one_bound_and_give_them_back() -> None:
    ledger = Ledger(2)
    one, other = SharedPlaces(ledger, 0, 3), SharedPlaces(ledger, 1, 3)
    with one.take(), other.take(), other.take():
        assert (one.taken, other.taken, ledger.places_taken) == (1, 2, 3)
        for places in (one, other):
            with pytest.raises(ProxyError) as caught, places.take():
                pytest.fail("there was no place")
            assert caught.value.kind is ErrorKind.TOO_MANY_CONNECTIONS
        assert ledger.places_taken == 3, "who is refused holds nothing"
    assert ledger.places_taken == 0


def test_a_dead_workers_places_are_free_again() -> None:
    ledger = Ledger(2)
    with SharedPlaces(ledger, 1, 1).take():
        ledger.end(1)
        ledger.clear(1)
        assert (ledger.places_taken, ledger.ended(1)) == (0, 0)
        ledger.take(1, 1)  # for the place that the dead one would have given back


def test_another_process_sees_what_this_one_writes_and_the_other_way_round() -> None:
    ledger = Ledger(2)
    ledger.take(0, 7)
    pid = os.fork()
    if pid == 0:
        ledger.end(1)
        os._exit(0 if ledger.places_taken == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ledger.ended(1) == 1
