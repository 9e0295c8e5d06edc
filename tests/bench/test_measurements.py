"""The arithmetic of the benchmark: medians, ratios, percentiles and windows."""

import pytest

from bench.errors import BenchError
from bench.measurements import Measurements, Quantity, percentile
from bench.pgbench import Sample, Transaction, window
from bench.process_usage import CPUTime

SPEED = Quantity("COPY out", "speed", "MB/s")


def measurements(**values: list[float]) -> Measurements:
    """Return measurements of one quantity by system."""
    added = Measurements()
    for system, rounds in values.items():
        for value in rounds:
            added.add(system, SPEED, value)
    return added


def test_a_ratio_is_that_of_the_two_medians_beside_it() -> None:
    # The rounds' own ratios are 1, 2 and 3: their median, 2, would contradict the medians.
    added = measurements(proxy=[10, 30, 40], pgbouncer=[10, 15, 40 / 3])
    assert added.median(SPEED, "proxy") == 30
    assert added.ratio(SPEED, "proxy", "pgbouncer") == pytest.approx(30 / (40 / 3))


def test_there_is_no_ratio_to_a_system_that_was_not_measured() -> None:
    added = measurements(proxy=[30], pgbouncer=[0])
    assert added.ratio(SPEED, "proxy", "direct") is None
    assert added.ratio(SPEED, "proxy", "pgbouncer") is None
    assert added.median(SPEED, "direct") is None


def test_the_added_ratio_compares_what_two_systems_add_to_the_floor() -> None:
    added = measurements(direct=[10, 20, 10], pgbouncer=[14, 24, 14], proxy=[12, 23, 13])
    assert added.added_ratio(SPEED, "proxy", "pgbouncer", "direct") == 0.75  # 13 - 10 of 14 - 10


def test_there_is_no_added_ratio_to_a_system_that_adds_nothing() -> None:
    added = measurements(direct=[10], pgbouncer=[10], proxy=[12])
    assert added.added_ratio(SPEED, "proxy", "pgbouncer", "direct") is None
    assert added.added_ratio(SPEED, "proxy", "haproxy", "direct") is None


def test_a_quantity_is_found_by_the_beginning_of_its_case() -> None:
    added = measurements(proxy=[1])
    assert added.find("COPY", "speed") == SPEED
    assert added.find("COPY", "CPU") is None
    assert added.find("out", "speed") is None


def test_cpu_is_added_in_its_parts_and_in_the_given_unit() -> None:
    added = Measurements()
    added.add_cpu("proxy", "COPY out", "us", CPUTime(user=1, system=2, total=3), scale=1e6 / 10)
    added.add_cpu("direct", "COPY out", "us", None, scale=1)
    found = {one.name: values for one, values in added.values.items()}
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
    samples = [Sample(10 + tenth / 10, CPUTime(0, 0, tenth / 100)) for tenth in range(30)]
    transactions = [Transaction(11 + number / 1000, 0.001) for number in range(1, 1501)]
    counted = window(samples, transactions)  # from 11.201 to 12.5: samples 11.3 to 12.5
    assert counted.seconds == pytest.approx(1.2)
    assert len(counted.latencies) == pytest.approx(1200, abs=1)
    assert counted.cpu is not None
    assert counted.cpu.total == pytest.approx(0.12)


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
