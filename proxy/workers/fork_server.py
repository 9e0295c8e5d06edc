"""The fork server: a process that forks workers, reaps them, and lets none outlive the supervisor.

For: forking without the hazards of threads and event loops, and reporting how each worker ended.
Not for: what a worker does (`worker`), or when there should be one (`supervisor`).

Invariants: it has one thread and no event loop, and does nothing else. It ends when its socket is
closed, whatever became of the supervisor, and kills its workers before. It ignores the signals that
a terminal or systemd sends to every process: they are the supervisor's.
"""

import gc
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Final, NoReturn

from proxy.observe.logs import flush_log, get_logger

SOCKETS_OF_A_WORKER: Final = 2

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_COMMAND: Final = struct.Struct("!BB")  # a _Command and a worker number
_EXIT: Final = struct.Struct("!Bi")  # a worker number and a wait status
_FORK_FAILED: Final = 1 << 8  # the wait status of a worker that was not forked: exit code 1
# The fork server ends as soon as it has killed its workers.
_END_SECONDS_MAX: Final = 5.0

_log = get_logger(__name__)

RunWorker = Callable[[int, Sequence[socket.socket]], int]
"""Runs the worker of this number with its sockets. Returns the exit code."""


class _Command(IntEnum):
    FORK = 1
    KILL = 2


class ForkServer:
    """The supervisor's end. Start it before there are threads or an event loop."""

    def __init__(self, run_worker: RunWorker) -> None:
        """Fork the fork server. Raises OSError."""
        # Packets: each is one command or one exit, and the end of the peer is seen.
        self._socket, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Every object that exists now stays, in all processes. A collection that looked at them
        # would write to every page, and give each process a copy of its own.
        gc.collect()
        gc.freeze()
        self.pid = _fork_ignoring_signals()
        if self.pid == 0:
            self._socket.close()
            _run_and_exit(lambda: _ForkServerProcess(peer, run_worker).run())
        peer.close()
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a worker has ended."""
        return self._socket.fileno()

    def fork(self, worker_number: int, sockets: Sequence[socket.socket]) -> None:
        """Fork a worker; none of this number may be running. Raises OSError."""
        command = _COMMAND.pack(_Command.FORK, worker_number)
        socket.send_fds(self._socket, [command], [each.fileno() for each in sockets])

    def kill(self, worker_number: int) -> None:
        """Kill a worker, if it is running."""
        with suppress(OSError):
            self._socket.send(_COMMAND.pack(_Command.KILL, worker_number))

    def exits(self) -> Iterator[tuple[int, int]]:
        """Yield number and exit code of each worker that has ended; a signal is a negative code.

        Raises EOFError when the fork server itself has ended.
        """
        while True:  # ends when no packet is left
            try:
                packet = self._socket.recv(_EXIT.size)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                raise EOFError
            worker_number, status = _EXIT.unpack(packet)
            yield worker_number, os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End the fork server, which kills its workers. One that is stuck is killed itself."""
        with self._socket, suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_END_SECONDS_MAX)
            try:
                while self._socket.recv(_EXIT.size):  # ends with the fork server
                    pass
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class _ForkServerProcess:
    """The fork server itself."""

    def __init__(self, commands: socket.socket, run_worker: RunWorker) -> None:
        self._commands = commands
        self._run_worker = run_worker
        self._workers: dict[int, int] = {}  # their numbers, by pid
        # Python's signal handling writes to it, which wakes select().
        self._wakeup, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup, self._wakeup_writer):
            end.setblocking(False)

    def run(self) -> int:
        """Fork and reap until the supervisor has gone, then kill all workers."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wakeup_writer.fileno())
        try:
            while self._run_command():
                self._reap()
        finally:
            for pid in self._workers:
                os.kill(pid, signal.SIGKILL)
            for pid in self._workers:
                os.waitpid(pid, 0)
        return 0

    def _run_command(self) -> bool:
        """Wait for a command or the end of a worker. Return False when the supervisor has gone."""
        readable, _, _ = select.select([self._commands, self._wakeup], [], [])
        if self._commands not in readable:
            return True
        try:
            packet, descriptors, *_ = socket.recv_fds(
                self._commands, _COMMAND.size, SOCKETS_OF_A_WORKER
            )
        except ConnectionResetError:  # it had not read all exits when it ended
            return False
        if not packet:
            return False
        command, worker_number = _COMMAND.unpack(packet)
        if command == _Command.FORK:
            self._fork(worker_number, [socket.socket(fileno=number) for number in descriptors])
        else:
            self._kill(worker_number)
        return True

    def _fork(self, worker_number: int, sockets: Sequence[socket.socket]) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # too many processes or no memory: it may succeed soon
            _log.error("cannot fork a worker", worker=worker_number, error=error.strerror)
            self._report_exit(worker_number, _FORK_FAILED)
        else:
            if pid == 0:
                self._undo_inherited()
                _run_and_exit(lambda: self._run_worker(worker_number, sockets))
            self._workers[pid] = worker_number
        for each in sockets:
            each.close()

    def _undo_inherited(self) -> None:
        """Undo in a worker what it has inherited from this process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._commands, self._wakeup, self._wakeup_writer):
            end.close()

    def _kill(self, worker_number: int) -> None:
        for pid, number in self._workers.items():
            if number == worker_number:
                os.kill(pid, signal.SIGKILL)  # it was not reaped: no other process has its pid

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while self._wakeup.recv(4096):
                pass
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._report_exit(self._workers.pop(pid), status)

    def _report_exit(self, worker_number: int, status: int) -> None:
        with suppress(OSError):  # the supervisor has gone: reading the next command shows it
            self._commands.send(_EXIT.pack(worker_number, status))


def _fork_ignoring_signals() -> int:
    """Fork, and ignore the supervisor's signals in the child from its first moment on."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Run a process of its own and exit; nothing of the parent's stack runs in it."""
    code = 1
    try:
        code = run()
    except BaseException:
        _log.exception("a process of the proxy failed")
    finally:
        flush_log()
        os._exit(code)
