"""The list of faults: in order, a number of times, at one place."""

from proxy.emulator.faults import FaultList, Injection, api_error


def test_a_fault_is_returned_as_often_as_it_was_added() -> None:
    faults: FaultList[str, Injection] = FaultList()
    faults.add("here", Injection.FIN, 2)
    faults.add("here", Injection.RESET, 1)
    taken = [faults.take("here") for _ in range(4)]
    assert taken == [Injection.FIN, Injection.FIN, Injection.RESET, None]


def test_a_fault_without_a_number_is_returned_until_it_is_cleared() -> None:
    faults: FaultList[str, Injection] = FaultList()
    faults.add("here", Injection.HANG, None)
    assert [faults.take("here") for _ in range(3)] == [Injection.HANG] * 3
    assert faults.take("there") is None
    faults.clear()
    assert faults.take("here") is None


def test_an_api_error_has_a_code_a_message_and_headers() -> None:
    error = api_error(429, "RESOURCE_EXHAUSTED", "slow down", Retry_After="1")
    assert error.headers == {"Retry-After": "1"}
    assert b'"error_code": "RESOURCE_EXHAUSTED"' in error.body
