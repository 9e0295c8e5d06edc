"""The log's queue and thread: what a pipe without a reader, that is closed, or that is full costs.

Story: standard error was a pipe without a reader. After 144 connections everything stopped: running
sessions, liveness and SIGTERM included. A log that could not be written made a clean drain exit
with 120.
"""

import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest

from proxy.observe.log_writer import (
    _AT_ONCE_MAX,
    _UNMADE_MAX,
    BATCH_BYTES,
    QUEUE_BYTES_MAX,
    LogWriter,
)

LINE = b"x" * 999 + b"\n"
WAIT_SECONDS_MAX = 10.0
needs_writes_at_once = pytest.mark.skipif(
    not hasattr(os, "RWF_NOWAIT"), reason="Linux has writes that do not wait"
)


def read_all(descriptor: int, size: int) -> bytes:
    """Return so many bytes, which may come in parts."""
    received = b""
    while len(received) < size:
        received += os.read(descriptor, size - len(received))
    return received


class Pipe:
    """A pipe, and a writer to it."""

    def __init__(self) -> None:
        self.reader, self.end = os.pipe()
        self.reports: list[int] = []
        self.writer = LogWriter(self.end, flows_again=self.reports.append)

    def read(self, size: int) -> bytes:
        return read_all(self.reader, size)

    def fill(self) -> None:
        """Write until nothing more fits into pipe and queue."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        fitted = True
        while fitted:
            assert time.monotonic() < deadline
            before = self.writer.dropped
            for _ in range(100):
                self.writer.write(LINE)
            takes_more = select.select([], [self.end], [], 0)[1]  # of what the thread has
            fitted = bool(takes_more) or self.writer.dropped < before + 100


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    with suppress(OSError):  # the test has closed it
        os.close(made.reader)
    made.writer.flush(WAIT_SECONDS_MAX)  # it drops what is left
    made.writer.before_fork()  # it waits for the thread
    os.close(made.end)


def test_lines_are_written_in_order_and_whole(pipe: Pipe) -> None:
    lines = [b"%d\n" % number for number in range(1000)] + [b"y" * 10 * BATCH_BYTES + b"\n"]
    for line in lines:
        pipe.writer.write(line)
    whole = b"".join(lines)
    assert pipe.read(len(whole)) == whole
    pipe.writer.flush(WAIT_SECONDS_MAX)
    assert pipe.writer.dropped == 0
    assert pipe.reports == []


def test_lines_that_are_made_later_are_made_in_order_and_most_of_a_burst_by_the_caller(
    pipe: Pipe,
) -> None:
    # The thread made all lines of a burst: meanwhile no session got an answer, for up to 5 ms.
    makers = list[threading.Thread]()

    def make(line: bytes) -> bytes:
        makers.append(threading.current_thread())
        return line

    lines = [b"%0200d\n" % number for number in range(1000)]
    for number, line in enumerate(lines):
        if number % 3:
            pipe.writer.write(partial(make, line))
        else:
            pipe.writer.write(line)
    whole = b"".join(lines)
    assert pipe.read(len(whole)) == whole
    assert makers.count(threading.current_thread()) > len(makers) / 2


def test_a_line_that_is_logged_while_others_are_made_disturbs_none(pipe: Pipe) -> None:
    # A finalizer may log wherever the interpreter allocates. Lines were written twice, or lost.
    whole = {b"%d\n" % number for number in range(1000)}
    inner = {b"inner %d\n" % number for number in range(1000)}

    def make(line: bytes, within: bytes) -> bytes:
        pipe.writer.write(within)
        return line

    for line, within in zip(sorted(whole), sorted(inner), strict=True):
        pipe.writer.write(partial(make, line, within))
    written = pipe.read(sum(map(len, whole | inner)))
    pipe.writer.flush(WAIT_SECONDS_MAX)
    assert sorted(written.splitlines(keepends=True)) == sorted(whole | inner)


def first_later(number: int) -> bool:
    """Return whether it is the first line of a burst that is not written at once."""
    return number == _AT_ONCE_MAX


def burst(writer: LogWriter, make: Callable[[int], bytes]) -> list[bytes]:
    """Write lines of which this thread makes all that are not written at once; return their texts.

    `make` gets the number of a line. Before the first one that is made later it may write at once.
    """
    numbers = range(_AT_ONCE_MAX + _UNMADE_MAX)

    def made(number: int) -> bytes:
        if first_later(number):
            writer._burst_at = -math.inf
        return make(number)

    with writer._lock:
        for number in numbers:
            writer.write(partial(made, number))
    return [b"%d\n" % number for number in numbers]


def test_a_line_that_is_logged_while_others_are_made_comes_after_them(pipe: Pipe) -> None:
    # It was written at once, before older ones.
    def make(number: int) -> bytes:
        if first_later(number):
            pipe.writer.write(b"inner\n")
        return b"%d\n" % number

    whole = b"".join([*burst(pipe.writer, make), b"inner\n"])
    assert pipe.read(len(whole)) == whole


@needs_writes_at_once
@pytest.mark.parametrize("at_once", [False, True])
def test_a_long_line_that_is_logged_while_others_are_made_is_whole(*, at_once: bool) -> None:
    # A socket took a part of it, and other lines came between the two.
    here, there = socket.socketpair()
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that there is
        writer = LogWriter(here.fileno(), flows_again=lambda _: None)
        long = b"x" * 30_000 + b"\n"

        def make(number: int) -> bytes:
            if number == 0 if at_once else first_later(number):
                writer.write(long)
            return b"%d\n" % number

        lines = burst(writer, make)
        lines.insert(1 if at_once else len(lines), long)
        whole = b"".join(lines)
        assert read_all(there.fileno(), len(whole)) == whole
        writer.before_fork()  # it waits for the thread


def test_a_line_that_cannot_be_made_since_the_program_ends_stops_no_other(pipe: Pipe) -> None:
    def end() -> bytes:
        raise SystemExit

    with pytest.raises(SystemExit):
        pipe.writer.write(end)
    lines = [b"%d\n" % number for number in range(50)]
    for line in lines:
        pipe.writer.write(partial(bytes, line))
    assert pipe.read(len(b"".join(lines))) == b"".join(lines)


def test_lines_that_are_not_made_yet_are_written_before_a_fork(pipe: Pipe) -> None:
    lines = [b"%d\n" % number for number in range(50)]
    for line in lines:
        pipe.writer.write(partial(bytes, line))
    pipe.writer.before_fork()
    assert pipe.read(len(b"".join(lines))) == b"".join(lines)


def test_a_made_line_that_does_not_fit_is_dropped_alone(pipe: Pipe) -> None:
    lines = [partial(bytes, b"%d\n" % number) for number in range(10)]
    lines.insert(8, partial(bytes, QUEUE_BYTES_MAX + 1))
    for line in lines:
        pipe.writer.write(line)
    whole = b"".join(b"%d\n" % number for number in range(10))
    assert pipe.read(len(whole)) == whole
    assert pipe.writer.dropped == 1


def test_nothing_is_made_for_a_queue_that_is_full(pipe: Pipe) -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(LINE)
        return LINE

    pipe.fill()
    for _ in range(1000):
        pipe.writer.write(make)
    assert len(made) < 200  # the thread may have taken a part since


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts a process's writes")
def test_a_file_gets_larger_parts_than_a_pipe(tmp_path: Path) -> None:
    # After each write the thread waits for the interpreter, and sessions for the thread.
    def count_writes() -> int:
        return int(Path("/proc/self/io").read_text().split("syscw: ")[1].split()[0])

    with (tmp_path / "log").open("wb") as file:
        writer = LogWriter(file.fileno(), flows_again=lambda _: None)
        before = count_writes()
        for _ in range(200):
            writer.write(LINE)
        writer.flush(WAIT_SECONDS_MAX)
        assert count_writes() - before < 200 * len(LINE) / BATCH_BYTES / 2
        writer.before_fork()  # it waits for the thread
    assert (tmp_path / "log").read_bytes() == 200 * LINE


def test_only_lines_that_a_file_did_not_take_are_counted_as_dropped(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from proxy.observe.log_writer import LogWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_500, 10_500))
with open({str(tmp_path / "log")!r}, "wb") as file:
    writer = LogWriter(file.fileno(), flows_again=lambda _: None)
    for _ in range(100):
        writer.write({LINE!r})
    writer.flush()
print(writer.dropped)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(done.stdout) == 90
    assert (tmp_path / "log").read_bytes() == 10 * LINE + LINE[:500]


@needs_writes_at_once
def test_a_line_that_is_taken_at_once_wakes_no_thread(pipe: Pipe) -> None:
    # A thread was woken for each line, which cost a session some 6 % of its CPU.
    before = set(threading.enumerate())
    pipe.writer.write(b"one\n")
    if set(threading.enumerate()) > before:
        pytest.skip("this kernel has no such writes to pipes")
    assert os.read(pipe.reader, 100) == b"one\n"


@needs_writes_at_once
def test_a_burst_is_left_to_the_thread(pipe: Pipe) -> None:
    # Each write wakes the log's reader: a hundred refusals at once took twice as long.
    before = set(threading.enumerate())
    lines = [b"%d\n" % number for number in range(1000)]
    for line in lines:
        pipe.writer.write(line)
    assert set(threading.enumerate()) > before
    whole = b"".join(lines)
    assert pipe.read(len(whole)) == whole


def test_lines_that_come_together_are_written_together() -> None:
    # Each write wakes the thread and the log's reader. Where sessions came one after the other that
    # was a tenth of the CPU of a session on a pooled connection.
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # it keeps writes apart
    with here, there:
        writer = LogWriter(here.fileno(), flows_again=lambda _: None)
        lines = [b"%0100d\n" % number for number in range(200)]
        for line in lines:
            writer.write(line)
        writer.flush(WAIT_SECONDS_MAX)
        there.setblocking(False)
        writes = []
        with suppress(BlockingIOError):
            while True:
                writes.append(there.recv(1 << 16))
        assert b"".join(writes) == b"".join(lines)
        assert len(writes) < len(lines) / 4
        assert max(map(len, writes)) <= BATCH_BYTES  # of a pipe's writers none is torn
        writer.before_fork()  # it waits for the thread


def test_a_line_waits_for_no_other_that_does_not_come(pipe: Pipe) -> None:
    for number in range(100):  # the last ones are left to the thread
        pipe.writer.write(b"%d\n" % number)
    received = b""
    while not received.endswith(b"99\n"):
        assert select.select([pipe.reader], [], [], WAIT_SECONDS_MAX)[0]
        received += os.read(pipe.reader, 1 << 16)


@needs_writes_at_once
@pytest.mark.parametrize("lines", [1, 50])
def test_what_is_not_taken_at_once_follows_in_order(lines: int) -> None:
    # A socket takes a part of a line; the rest waits for the thread, and later lines for the rest.
    here, there = socket.socketpair()
    with here, there:
        writer = LogWriter(here.fileno(), flows_again=lambda _: None)
        long = [bytes([65 + number % 26]) * 20_000 + b"\n" for number in range(lines)]
        for line in (*long, b"last\n"):
            writer.write(line)
        whole = b"".join(long) + b"last\n"
        assert read_all(there.fileno(), len(whole)) == whole
        writer.before_fork()  # it waits for the thread


def test_a_line_of_which_a_pipe_takes_a_part_is_whole(pipe: Pipe) -> None:
    lines = [b"x" * (QUEUE_BYTES_MAX // 2) + b"\n", b"last\n"]
    for line in lines:
        pipe.writer.write(line)
    whole = b"".join(lines)
    assert pipe.read(len(whole)) == whole


def test_a_line_that_is_longer_than_the_queue_is_dropped_whole(pipe: Pipe) -> None:
    # Of 2 MB the pipe took 64 KB at once. The rest was dropped, and the next line joined to it.
    pipe.writer.write(b"x" * QUEUE_BYTES_MAX + b"\n")
    pipe.writer.write(b"next\n")
    assert os.read(pipe.reader, 100) == b"next\n"
    assert pipe.writer.dropped == 1
    pipe.writer.before_fork()  # it waits for the thread
    assert pipe.reports == [1]


def test_a_pipe_that_is_not_read_makes_no_caller_wait_and_is_told_of_once(pipe: Pipe) -> None:
    pipe.fill()
    begun = time.monotonic()
    for _ in range(1000):
        pipe.writer.write(LINE)
    assert time.monotonic() - begun < 1
    dropped = pipe.writer.dropped
    while not pipe.reports:  # it reports after its last write: then there is nothing to read
        if select.select([pipe.reader], [], [], 0.01)[0]:
            os.read(pipe.reader, QUEUE_BYTES_MAX)
    assert pipe.reports == [dropped]
    pipe.writer.write(b"more\n")
    while not os.read(pipe.reader, QUEUE_BYTES_MAX).endswith(b"more\n"):
        pass
    pipe.writer.before_fork()  # it waits for the thread
    assert pipe.reports == [dropped]


def test_a_flush_has_a_bound(pipe: Pipe) -> None:
    pipe.fill()
    begun = time.monotonic()
    pipe.writer.flush(0.1)
    assert time.monotonic() - begun < WAIT_SECONDS_MAX


def test_lines_for_a_reader_that_has_gone_are_dropped_and_counted(pipe: Pipe) -> None:
    os.close(pipe.reader)
    for _ in range(10):
        pipe.writer.write(LINE)
    pipe.writer.flush(WAIT_SECONDS_MAX)
    assert pipe.writer.dropped == 10
    assert pipe.reports == []


def test_a_full_disk_drops_lines_until_there_is_room() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("Linux has /dev/full")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    reports: SimpleQueue[int] = SimpleQueue()
    writer = LogWriter(descriptor, flows_again=reports.put)
    writer.write(LINE)
    writer.flush(WAIT_SECONDS_MAX)
    assert (writer.dropped, reports.empty()) == (1, True)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    writer.write(LINE)
    assert reports.get(timeout=WAIT_SECONDS_MAX) == 1
    writer.before_fork()
    assert writer.dropped == 1
    os.close(null)
    os.close(descriptor)


def test_a_descriptor_that_was_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.end, False)
    for _ in range(200):  # more than a pipe holds
        pipe.writer.write(LINE)
    assert pipe.read(200 * len(LINE)) == 200 * LINE
    assert pipe.writer.dropped == 0


def test_a_forked_process_has_a_queue_and_a_thread_of_its_own(pipe: Pipe) -> None:
    threads = set(threading.enumerate())
    pipe.writer.write(b"parent\n")
    pipe.writer.before_fork()
    assert pipe.read(7) == b"parent\n"
    for thread in set(threading.enumerate()) - threads:
        thread.join(WAIT_SECONDS_MAX)
    assert set(threading.enumerate()) <= threads
    pid = os.fork()
    if pid == 0:
        pipe.writer.start_over()
        pipe.writer.write(b"child\n")
        pipe.writer.flush(WAIT_SECONDS_MAX)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pipe.writer.write(b"parent\n")
    assert pipe.read(13) == b"child\nparent\n"
