"""The arithmetic of the benchmark: what it prints follows from what it saw."""

import os
import time

import pytest

from bench.accounting import CPU, cpu, resident_bytes
from bench.errors import BenchError
from bench.queries import Sample, Transaction, window
from bench.readings import Quantity, Readings, percentile
from bench.report import as_json, table

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


def test_cpu_is_split_as_its_coarse_parts_are() -> None:
    spent = CPU(3, 2, 5.004) - CPU(0, 1, 1.004)
    assert (spent.user, spent.system, spent.total) == pytest.approx((3, 1, 4))
    assert (CPU(1, 1, 2.001) - CPU(1, 1, 2.0)).total == pytest.approx(0.001)


def test_accounting_agrees_with_this_process() -> None:
    before = time.process_time()
    assert before <= cpu(os.getpid()).total <= time.process_time()
    assert resident_bytes(os.getpid()) > 1_000_000


def test_table_and_json_tell_the_same() -> None:
    kept = readings(direct=[40], proxy=[30])
    lines = table(kept, {"cores": "2"}, rounds=1).splitlines()
    assert lines[0] == "cores:       2"
    assert lines[-1].split() == ["speed,", "MB/s", "40.0", "-", "30.0", "-", "0.75"]
    (quantity,) = as_json(kept, {}, rounds=1)["quantities"]
    assert quantity["medians"] == {"direct": 40, "proxy": 30}
    assert quantity["ratios"] == {"proxy/pgbouncer": None, "proxy/direct": 0.75}
