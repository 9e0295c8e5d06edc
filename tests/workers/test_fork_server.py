"""The fork server: real processes, forked, killed and reaped; what it survives and what it ends."""

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from proxy.workers import fork_server as module
from proxy.workers.fork_server import ForkServer
from tests.support.proxy_process import alive

# Other tests leave daemon threads behind. What is forked here takes no lock that one could hold.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

SECONDS_MAX = 10.0


def serve_commands(worker_number: int, sockets: Sequence[socket.socket]) -> int:
    """Send number and pid, then do what each byte asks for, until the stream ends."""
    control, second = sockets
    control.sendall(f"{worker_number} {os.getpid()}\n".encode())
    while command := control.recv(1):
        if command == b"r":
            raise RuntimeError("a bug")
        control.sendall(second.recv(1) if command == b"s" else command)
    return 40 + worker_number


def greeting_of(control: socket.socket) -> list[str]:
    """Return the words of the line that a worker sends first."""
    line = b""
    while not line.endswith(b"\n"):
        received = control.recv(1)
        assert received, line
        line += received
    return line.decode().split()


class Forked:
    """A worker that was forked, and our ends of its sockets."""

    def __init__(self, fork_server: ForkServer, worker_number: int) -> None:
        self.control, its_control = socket.socketpair()
        self.second, its_second = socket.socketpair()
        for ours in (self.control, self.second):
            ours.settimeout(SECONDS_MAX)
        with its_control, its_second:
            fork_server.fork(worker_number, (its_control, its_second))
        number, pid = greeting_of(self.control)
        self.number, self.pid = int(number), int(pid)

    def ask(self, command: bytes) -> bytes:
        """Return its answer, empty when it has ended."""
        self.control.sendall(command)
        return self.control.recv(1)

    def close(self) -> None:
        self.control.close()
        self.second.close()


@pytest.fixture
def fork_server() -> Iterator[ForkServer]:
    started = ForkServer(serve_commands)
    yield started
    started.close()
    gc.unfreeze()


@contextmanager
def forked(fork_server: ForkServer, worker_number: int) -> Iterator[Forked]:
    worker = Forked(fork_server, worker_number)
    try:
        yield worker
    finally:
        worker.close()


def exits(fork_server: ForkServer, count: int) -> list[tuple[int, int]]:
    """Return the next exits, as soon as there are this many."""
    found: list[tuple[int, int]] = []
    ends_at = time.monotonic() + SECONDS_MAX
    while len(found) < count:
        assert select.select([fork_server], [], [], max(0, ends_at - time.monotonic()))[0], found
        found += fork_server.exits()
    return found


def test_a_worker_has_its_number_its_sockets_and_its_exit_code(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as worker:
        assert worker.number == 1
        assert worker.pid not in (os.getpid(), fork_server.pid)
        assert alive({worker.pid}) == {worker.pid}
        worker.second.sendall(b"2")
        assert worker.ask(b"s") == b"2"
    assert exits(fork_server, 1) == [(1, 41)]
    assert alive({worker.pid}) == set()


def test_workers_end_in_any_order_and_a_number_can_be_used_again(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as one:
        with forked(fork_server, 2) as two:
            pass
        assert exits(fork_server, 1) == [(2, 42)]
        with forked(fork_server, 2) as successor:
            assert successor.pid != two.pid
            assert one.ask(b"x") == b"x"
    assert sorted(exits(fork_server, 2)) == [(1, 41), (2, 42)]


def test_a_killed_worker_is_reported_with_its_signal(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as one, forked(fork_server, 2) as other:
        fork_server.kill(one.number)
        assert exits(fork_server, 1) == [(1, -signal.SIGKILL)]
        fork_server.kill(1)  # it is not running: nothing happens
        assert other.ask(b"x") == b"x"


def test_a_worker_that_is_stuck_can_be_killed(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        fork_server.kill(1)
        assert exits(fork_server, 1) == [(1, -signal.SIGKILL)]


def test_a_worker_with_a_bug_exits_with_1(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as worker:
        assert worker.ask(b"r") == b""
        assert exits(fork_server, 1) == [(1, 1)]


def test_signals_that_a_terminal_sends_to_every_process_end_none(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as worker:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(fork_server.pid, number)
            os.kill(worker.pid, number)
        assert worker.ask(b"x") == b"x"
        with forked(fork_server, 2) as another:
            assert another.number == 2
    assert len(exits(fork_server, 2)) == 2


def test_when_it_is_closed_no_process_is_left() -> None:
    fork_server = ForkServer(serve_commands)
    gc.unfreeze()
    with forked(fork_server, 1) as one, forked(fork_server, 2) as two:
        pids = {one.pid, two.pid, fork_server.pid}
        os.kill(one.pid, signal.SIGSTOP)
        fork_server.close()
        assert alive(pids) == set()
    fork_server.close()  # may be repeated


def test_without_it_the_supervisor_is_told_so(fork_server: ForkServer) -> None:
    with forked(fork_server, 1) as worker:
        os.kill(fork_server.pid, signal.SIGKILL)
        with pytest.raises(EOFError):
            exits(fork_server, 1)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            fork_server.fork(2, ())
        fork_server.kill(1)  # is no error
        assert worker.ask(b"x") == b"x", "a worker lives as long as its supervisor"


def test_one_that_is_stuck_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_END_SECONDS_MAX", 0.1)
    fork_server = ForkServer(serve_commands)
    gc.unfreeze()
    os.kill(fork_server.pid, signal.SIGSTOP)
    fork_server.close()
    assert alive({fork_server.pid}) == set()
