"""Slots: exactly as many sessions as configured, and each slot is released."""

from contextlib import ExitStack

import pytest

from proxy.errors import ErrorKind, ProxyError
from proxy.session.slots import Slots


@pytest.mark.parametrize("slots_max", [1, 2, 3])
def test_there_are_exactly_as_many_slots_as_configured(slots_max: int) -> None:
    slots = Slots(slots_max)
    with ExitStack() as stack:
        for _ in range(slots_max):
            stack.enter_context(slots.take())
        with pytest.raises(ProxyError) as raised, slots.take():
            pass
        assert raised.value.kind is ErrorKind.TOO_MANY_CONNECTIONS
        assert slots.used == slots_max
    assert slots.used == 0


def test_a_slot_is_released_when_the_session_fails() -> None:
    slots = Slots(1)
    with pytest.raises(RuntimeError), slots.take():
        raise RuntimeError
    with slots.take():
        assert slots.used == 1
