"""The start of a program as the bench sees it: until it accepts, and never if it ends before."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench.children import Child, child
from bench.errors import BenchError
from bench.readings import Quantity, Readings
from bench.start_up import CASE, STARTS_MIN, measure
from bench.systems import PROXY

# Ready later than it starts, by its own clock; then it waits to be ended.
SLEEPS_SECONDS = 0.1
LISTENS = f"""
import os, signal, socket, time
time.sleep({SLEEPS_SECONDS})
listening = socket.create_server(("127.0.0.1", int(os.environ["LISTEN__PORT"])))
signal.pause()
"""


def test_each_start_is_timed_until_it_accepts(tmp_path: Path) -> None:
    def run(more: Mapping[str, str]) -> AbstractContextManager[Child]:
        return child([sys.executable, "-c", LISTENS], tmp_path / "log", environment=more)

    readings = Readings()
    measure(run, 1, readings)
    times = readings.values[Quantity(CASE, "time to ready", "s")][PROXY]
    assert len(times) == STARTS_MIN
    assert all(SLEEPS_SECONDS < seconds < 20 for seconds in times)
    ready = readings.median(readings.find(CASE, "memory when ready"), PROXY)
    assert ready is not None
    assert 1 < ready < 100


def test_a_program_that_ends_instead_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    def run(more: Mapping[str, str]) -> AbstractContextManager[Child]:
        return child([sys.executable, "-c", "print('no way')"], tmp_path / "log", environment=more)

    with pytest.raises(BenchError, match="no way"):
        measure(run, 1, Readings())
