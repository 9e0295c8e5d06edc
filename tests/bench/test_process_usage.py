"""The kernel's numbers for a process, compared with what this process knows of itself."""

import os
import socket
import subprocess
import sys
import time

import pytest

from bench.process_usage import (
    CPUTime,
    cpu_time,
    descendants,
    open_files,
    open_sockets,
    resident_bytes,
)


def test_cpu_is_split_as_its_coarse_parts_are() -> None:
    spent = CPUTime(3, 2, 5.004) - CPUTime(0, 1, 1.004)
    assert (spent.user, spent.system, spent.total) == pytest.approx((3, 1, 4))
    assert (CPUTime(1, 1, 2.001) - CPUTime(1, 1, 2.0)).total == pytest.approx(0.001)


def test_cpu_of_several_processes_is_a_sum() -> None:
    assert CPUTime(1, 2, 3) + CPUTime(4, 5, 9) == CPUTime(5, 7, 12)


def test_usage_agrees_with_this_process() -> None:
    before = time.process_time()
    assert before <= cpu_time(os.getpid()).total <= time.process_time()
    assert resident_bytes(os.getpid()) > 1_000_000


def test_files_and_sockets_are_counted() -> None:
    files, sockets = open_files(os.getpid()), open_sockets(os.getpid())
    one, other = socket.socketpair()
    with one, other:
        assert open_files(os.getpid()) == files + 2
        assert open_sockets(os.getpid()) == sockets + 2


def test_descendants_are_children_and_theirs() -> None:
    child = f"import subprocess; subprocess.run(['{sys.executable}', '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while len(found := descendants(process.pid)) < 1:
            assert time.monotonic() < deadline
        assert set(found) <= set(descendants(os.getpid()))
        assert process.pid in descendants(os.getpid())
        process.communicate(b"\n", timeout=30)
    assert process.pid not in descendants(os.getpid())
