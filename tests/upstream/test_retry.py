"""Whether and when a dial is tried again, as tables."""

import pytest

from proxy.errors import Disposition, ErrorKind, ProxyError
from proxy.upstream.retry import RETRIES_MAX, RETRY_CEILING_SECONDS, WAIT_CEILING_SECONDS, Retry

FAILS = [kind for kind in ErrorKind if kind.value.disposition is Disposition.FAIL]


def delays(
    kinds: list[ErrorKind], *, jitter: float = 1.0, from_cache: bool = True
) -> list[float | None]:
    retry = Retry(lambda: jitter)
    return [retry.delay(ProxyError(kind), from_cache=from_cache, now=0.0) for kind in kinds]


def reconnects(*times: float, seconds: float = 30.0) -> list[float | None]:
    """Return the delays after a refused connection at each of these times."""
    retry = Retry(lambda: 1.0, seconds)
    refused = ProxyError(ErrorKind.UPSTREAM_UNREACHABLE)
    return [retry.delay(refused, from_cache=False, now=now) for now in times]


def test_a_port_that_refuses_is_tried_for_connect_retry_seconds() -> None:
    # Three tries in half a second: each restart of a compute was an error in every application.
    assert reconnects(100, 101, 115, 125, 129.5, 130) == [0.2, 0.4, 0.8, 1.6, 0.5, None]
    assert reconnects(5, seconds=0.0) == [None]


LOST, ONCE, WAIT, REMINT, FAIL = (
    ErrorKind.FRONT_END_ERROR,
    ErrorKind.UPSTREAM_TIMEOUT,
    ErrorKind.UPSTREAM_STARTING,
    ErrorKind.TOKEN_REJECTED,
    ErrorKind.IDENTITY_MISMATCH,
)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([LOST] * 3, [0.2, 0.4, None]),
        ([ONCE] * 2, [0.2, None]),
        ([LOST, ONCE], [0.2, None]),
        ([WAIT] * 7, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]),
        ([WAIT, LOST, LOST, LOST], [0.5, 0.4, 0.8, None]),
        ([REMINT] * 2, [0.0, None]),
        ([LOST, REMINT, LOST, LOST], [0.2, 0.0, 0.8, None]),
        ([FAIL], [None]),
        ([LOST, FAIL], [0.2, None]),
    ],
)
def test_the_delays_of_a_dial(kinds: list[ErrorKind], expected: list[float | None]) -> None:
    assert delays(kinds) == expected


def test_a_token_minted_for_this_dial_is_not_minted_again() -> None:
    assert delays([REMINT], from_cache=False) == [None]


@pytest.mark.parametrize("kind", FAILS, ids=lambda kind: kind.value.reason)
def test_what_fails_for_good_is_not_tried_again(kind: ErrorKind) -> None:
    assert delays([kind]) == [None]


def test_the_jitter_is_the_whole_of_the_delay() -> None:
    assert delays([LOST, LOST], jitter=0.0) == [0.0, 0.0]
    assert delays([WAIT, WAIT], jitter=0.5) == [0.25, 0.5]


def test_the_bounds_hold_for_a_dial_of_any_length() -> None:
    # The ceiling doubled as a whole number and broke as a float at the 1025th try.
    found = delays([WAIT] * 5000)
    assert max(delay or 0 for delay in found) == WAIT_CEILING_SECONDS[1]
    assert len([delay for delay in delays([LOST] * 100) if delay is not None]) == RETRIES_MAX
    assert max(delay or 0 for delay in delays([LOST] * 100)) <= RETRY_CEILING_SECONDS[1]
