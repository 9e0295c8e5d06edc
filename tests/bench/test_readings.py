"""The arithmetic of the benchmark: what it prints follows from what it saw."""

import pytest

from bench.accounting import CPU
from bench.errors import BenchError
from bench.queries import Sample, Transaction, window
from bench.readings import Quantity, Readings, percentile

SPEED = Quantity("COPY out", "speed", "MB/s")


def readings(**values: list[float]) -> Readings:
    """Return readings of one quantity by contender."""
    kept = Readings()
    for contender, rounds in values.items():
        for value in rounds:
            kept.add(contender, SPEED, value)
    return kept


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round ran on a machine at half its speed: the ratio does not notice.
    kept = readings(proxy=[30, 15, 30], pgbouncer=[20, 10, 20])
    assert kept.ratio(SPEED, "proxy", "pgbouncer") == 1.5
    assert kept.median(SPEED, "proxy") == 30


def test_there_is_no_ratio_to_what_was_not_measured() -> None:
    kept = readings(proxy=[30], pgbouncer=[0])
    assert kept.ratio(SPEED, "proxy", "direct") is None
    assert kept.ratio(SPEED, "proxy", "pgbouncer") is None
    assert kept.median(SPEED, "direct") is None


def test_what_is_added_to_the_floor_is_compared_with_what_another_adds() -> None:
    kept = readings(direct=[10, 20, 10], pgbouncer=[14, 24, 14], proxy=[12, 23, 13])
    assert kept.added_ratio(SPEED, "proxy", "pgbouncer", "direct") == 0.75  # 3 of 4


def test_there_is_no_added_ratio_to_one_who_adds_nothing() -> None:
    kept = readings(direct=[10], pgbouncer=[10], proxy=[12])
    assert kept.added_ratio(SPEED, "proxy", "pgbouncer", "direct") is None
    assert kept.added_ratio(SPEED, "proxy", "haproxy", "direct") is None


def test_a_quantity_is_found_by_the_beginning_of_its_case() -> None:
    kept = readings(proxy=[1])
    assert kept.find("COPY", "speed") == SPEED
    assert kept.find("COPY", "CPU") is None
    assert kept.find("out", "speed") is None


def test_cpu_is_kept_in_its_parts_and_in_the_unit_that_is_asked_for() -> None:
    kept = Readings()
    kept.add_cpu("proxy", "COPY out", "us", CPU(user=1, system=2, total=3), scale=1e6 / 10)
    kept.add_cpu("direct", "COPY out", "us", None, scale=1)
    found = {one.name: values for one, values in kept.values.items()}
    assert found == {
        "CPU": {"proxy": [3e5]},
        "CPU user": {"proxy": [1e5]},
        "CPU system": {"proxy": [2e5]},
    }


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.01, 1), (0.5, 50), (0.99, 99), (0.995, 100), (1.0, 100)]
)
def test_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_window_leaves_out_warm_up_and_end() -> None:
    samples = [Sample(10 + tenth / 10, CPU(0, 0, tenth / 100)) for tenth in range(30)]
    transactions = [Transaction(11 + number / 1000, 0.001) for number in range(1, 1501)]
    seen = window(samples, transactions)  # from 11.201 to 12.5: samples 11.3 to 12.5
    assert seen.seconds == pytest.approx(1.2)
    assert len(seen.latencies) == pytest.approx(1200, abs=1)
    assert seen.cpu is not None
    assert seen.cpu.total == pytest.approx(0.12)


def test_window_of_a_run_that_is_too_short_is_an_error() -> None:
    with pytest.raises(BenchError, match="too short"):
        window([Sample(1.0, None)], [Transaction(1.0, 0.1)])
    with pytest.raises(BenchError, match="too short"):
        window([Sample(1.0, None)], [])
    with pytest.raises(BenchError, match="too short"):  # nothing between the two samples
        window(
            [Sample(1.5, None), Sample(1.6, None)],
            [Transaction(1.0, 0.1), Transaction(1.7, 0.1)],
        )
