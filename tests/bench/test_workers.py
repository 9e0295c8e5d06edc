"""How evenly sessions are spread over processes."""

import pytest

from bench.errors import BenchError
from bench.workers import KEY, available, unevenness
from proxy.config import settings_keys


@pytest.mark.parametrize(
    ("counts", "expected"), [([200, 200], 0), ([240, 160], 20), ([100, 100, 40], 50), ([7], 0)]
)
def test_unevenness_is_the_largest_distance_from_an_even_share(
    counts: list[int], expected: float
) -> None:
    assert unevenness(counts) == pytest.approx(expected)


def test_sessions_that_no_process_has_are_an_error() -> None:
    with pytest.raises(BenchError, match="no process"):
        unevenness([])


def test_workers_are_measured_where_the_key_exists() -> None:
    assert available() == (KEY in {key.dotted for key in settings_keys()})
