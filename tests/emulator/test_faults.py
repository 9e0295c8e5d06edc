"""The list that hands out faults: in order, so many times, at one place."""

from proxy.emulator.faults import FaultList, Strike, api_error


def test_a_fault_strikes_as_often_as_it_was_told() -> None:
    faults: FaultList[str, Strike] = FaultList()
    faults.add("here", Strike.FIN, 2)
    faults.add("here", Strike.RESET, 1)
    taken = [faults.take("here") for _ in range(4)]
    assert taken == [Strike.FIN, Strike.FIN, Strike.RESET, None]


def test_a_fault_without_a_number_strikes_until_it_is_cleared() -> None:
    faults: FaultList[str, Strike] = FaultList()
    faults.add("here", Strike.HANG, None)
    assert [faults.take("here") for _ in range(3)] == [Strike.HANG] * 3
    assert faults.take("there") is None
    faults.clear()
    assert faults.take("here") is None


def test_an_api_error_has_a_code_a_message_and_headers() -> None:
    error = api_error(429, "RESOURCE_EXHAUSTED", "slow down", Retry_After="1")
    assert error.headers == {"Retry-After": "1"}
    assert b'"error_code": "RESOURCE_EXHAUSTED"' in error.body
