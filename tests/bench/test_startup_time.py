"""The startup time of a program: until it accepts, and an error if it exits before."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench.child_processes import ChildProcess, child
from bench.errors import BenchError
from bench.measurements import Measurements, Quantity
from bench.startup_time import CASE, STARTS_MIN, measure
from bench.systems import PROXY

# Accepts after a pause, then waits for a signal.
SLEEPS_SECONDS = 0.1
LISTENS = f"""
import os, signal, socket, time
time.sleep({SLEEPS_SECONDS})
listening = socket.create_server(("127.0.0.1", int(os.environ["LISTEN__PORT"])))
signal.pause()
"""


def test_each_start_is_timed_until_it_accepts(tmp_path: Path) -> None:
    def start(more: Mapping[str, str]) -> AbstractContextManager[ChildProcess]:
        return child([sys.executable, "-c", LISTENS], tmp_path / "log", environment=more)

    measurements = Measurements()
    measure(start, 1, measurements)
    times = measurements.values[Quantity(CASE, "time to ready", "s")][PROXY]
    assert len(times) == STARTS_MIN
    assert all(SLEEPS_SECONDS < seconds < 20 for seconds in times)
    ready = measurements.median(measurements.find(CASE, "memory when ready"), PROXY)
    assert ready is not None
    assert 1 < ready < 100


def test_a_program_that_exits_is_an_error_with_the_end_of_its_output(tmp_path: Path) -> None:
    def start(more: Mapping[str, str]) -> AbstractContextManager[ChildProcess]:
        return child([sys.executable, "-c", "print('no way')"], tmp_path / "log", environment=more)

    with pytest.raises(BenchError, match="no way"):
        measure(start, 1, Measurements())
