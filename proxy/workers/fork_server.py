"""The process that forks workers, and that sees to it that none outlives the supervisor.

For: forking without the hazards of threads and loops, and who has ended how. Not for: what a worker
does (`worker`), or when there is to be one (`pool`).

Invariants: it has one thread, no loop, and no work but this. Its children are dead before it ends,
and it ends when its socket does, whatever became of the supervisor. Signals are the supervisor's: a
terminal, and systemd, send them to every process.
"""

import gc
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Final, NoReturn

from proxy.observe.logs import get_logger

SOCKETS_OF_A_WORKER: Final = 2

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_COMMAND: Final = struct.Struct("!BB")  # an _Order and a worker_number
_EXIT: Final = struct.Struct("!Bi")  # a worker_number and a wait status
_FORK_FAILED: Final = 1 << 8  # the wait status of a worker that was not forked: exit code 1
# The nursery ends as soon as it has killed its workers.
_END_SECONDS_MAX: Final = 5.0

_log = get_logger(__name__)

RunWorker = Callable[[int, Sequence[socket.socket]], int]
"""What a worker does, in a worker_number and with its sockets; returns its exit code."""


class _Command(IntEnum):
    FORK = 1
    KILL = 2


class ForkServer:
    """The supervisor's end. Start it before there are threads or an event loop."""

    def __init__(self, work: RunWorker) -> None:
        # Packets: one is one order, or one piece of news, and an end is seen.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What is there now is there to stay, in all processes. A collection that looked at it would
        # write to every page, and give each process a copy of its own.
        gc.collect()
        gc.freeze()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                for number in _SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.pid == 0:
            self._socket.close()
            _run_and_exit(lambda: _Forker(theirs, work).run())
        theirs.close()
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that can be read when there is news."""
        return self._socket.fileno()

    def fork(self, worker_number: int, sockets: Sequence[socket.socket]) -> None:
        """Have a worker begin in a worker_number where there is none. Raises OSError."""
        command = _COMMAND.pack(_Command.FORK, worker_number)
        socket.send_fds(self._socket, [command], [each.fileno() for each in sockets])

    def kill(self, worker_number: int) -> None:
        """End the worker of a worker_number at once, if there is one."""
        with suppress(OSError):
            self._socket.send(_COMMAND.pack(_Command.KILL, worker_number))

    def exits(self) -> Iterator[tuple[int, int]]:
        """Yield number and exit code of each worker that has ended; a signal's is below zero.

        Raises EOFError when the nursery has ended.
        """
        while True:  # ends with what has come
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
        """End the nursery, and what is left of its workers, at once; a stuck one is killed."""
        with self._socket, suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_END_SECONDS_MAX)
            try:
                while self._socket.recv(_EXIT.size):  # ends with the nursery, and its news before
                    pass
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class _Forker:
    """The nursery itself."""

    def __init__(self, commands: socket.socket, work: RunWorker) -> None:
        self._commands = commands
        self._work = work
        self._workers: dict[int, int] = {}  # by pid
        self._awake, self._waker = socket.socketpair()
        for end in (self._awake, self._waker):
            end.setblocking(False)

    def run(self) -> int:
        """Fork and bury until the supervisor has gone."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._waker.fileno())
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
        """Wait for an order or a death; False when there is nobody left to give orders."""
        readable, _, _ = select.select([self._commands, self._awake], [], [])
        if self._commands not in readable:
            return True
        try:
            packet, descriptors, *_ = socket.recv_fds(
                self._commands, _COMMAND.size, SOCKETS_OF_A_WORKER
            )
        except ConnectionResetError:  # it went before it had read all our news
            return False
        if not packet:
            return False
        command, worker_number = _COMMAND.unpack(packet)
        if command == _Command.FORK:
            self._fork(
                worker_number, [socket.socket(fileno=descriptor) for descriptor in descriptors]
            )
        else:
            for pid in [
                pid for pid, of_worker in self._workers.items() if of_worker == worker_number
            ]:
                os.kill(pid, signal.SIGKILL)  # it is our child and not buried: the number is its
        return True

    def _fork(self, worker_number: int, sockets: Sequence[socket.socket]) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, or no memory: it may be otherwise soon
            _log.error("a worker could not be forked", worker=worker_number, error=error.strerror)
            self._notify(worker_number, _FORK_FAILED)
            for each in sockets:
                each.close()
            return
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._commands, self._awake, self._waker):
                end.close()
            _run_and_exit(lambda: self._work(worker_number, sockets))
        self._workers[pid] = worker_number
        for each in sockets:
            each.close()

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._notify(self._workers.pop(pid), status)

    def _notify(self, worker_number: int, status: int) -> None:
        with suppress(OSError):  # nobody listens: the next look at the orders ends it
            self._commands.send(_EXIT.pack(worker_number, status))


def _run_and_exit(work: Callable[[], int]) -> NoReturn:
    """Do the work and end the process, without a look at what its parent's stack would do."""
    code = 1
    try:
        code = work()
    except BaseException:
        _log.exception("a process of the proxy failed")
    finally:
        with suppress(OSError, ValueError):  # whoever read it may have gone
            sys.stderr.flush()
        os._exit(code)
