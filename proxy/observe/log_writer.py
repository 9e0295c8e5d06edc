"""Lines to a descriptor that may block: a bounded queue, and a thread that writes it.

Where the kernel can say that it takes a line at once (pipes and sockets of Linux), the caller
writes the first lines after a pause. Of more, as where sessions come one after the other, the
thread writes what has come within `GATHER_SECONDS`: to wake it, or the log's reader, for each line
costs a session on a pooled connection a tenth of its CPU, or more.

For: a log whose reader has stopped, or whose disk is full, delays nothing and fails nothing. Lines
that find the queue full, or cannot be written, are dropped and counted. Not for: what a line says
(`logs`).

Invariant: `write` never waits for the descriptor. A forked process has a queue and a thread of its
own, from its first line on.
"""

import gc
import math
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

# Some thousand lines, beside `_UNMADE_MAX` that are not made yet. More would only be older when
# they are read.
QUEUE_BYTES_MAX: Final = 1024 * 1024
# Writes of up to this size are atomic, so that lines of several processes do not mix in a pipe. One
# to a local file is at any size. The thread needs the interpreter again after each.
BATCH_BYTES: Final = select.PIPE_BUF
FILE_BATCH_BYTES: Final = 64 * 1024
# At the end of the process, for a reader that is slow.
FLUSH_SECONDS_MAX: Final = 2.0
_AT_ITS_POSITION: Final = -1
# Each write wakes the reader, which may take the CPU: of a burst the thread writes the rest, in
# larger parts. A session has one line or two.
_AT_ONCE_MAX: Final = 4
_BURST_SECONDS: Final = 0.1
# How long a line may wait for others that are written with it. A process that is killed loses them.
GATHER_SECONDS: Final = 0.1
# From so many bytes on none is waited for.
_GATHER_BYTES_MAX: Final = QUEUE_BYTES_MAX // 8
# So many lines are made by the caller, in half a millisecond, or 1.3 for people. The thread would
# make all of a burst, and keep the interpreter for as long as a thread may: 5 ms.
_UNMADE_MAX: Final = 60
# A line that is made later needs as much room in the queue, so that few are made in vain.
_ROOM_BYTES_MIN: Final = 4096
# A line that a finalizer logs just before the thread waits does not wake it; the next one does.
_IDLE_WAIT_SECONDS: Final = 5.0
# Before a fork. The thread has nothing to do then, or is blocked for longer than is waited for.
_FORK_SECONDS_MAX: Final = 0.1
_Line = bytes | Callable[[], bytes]


class LogWriter:
    """Writes to one descriptor. There is one for each; it lasts as long as the process."""

    def __init__(self, descriptor: int, *, flows_again: Callable[[int], None]) -> None:
        """`flows_again` is called from the writer thread with the number of lines dropped."""
        self._descriptor = descriptor
        self._flows_again = flows_again
        self.start_over()

    def start_over(self) -> None:
        """Reset after a fork: queue, thread and count are the parent's."""
        self._takes_at_once = hasattr(os, "RWF_NOWAIT")  # until the descriptor says otherwise
        self._batch_bytes = FILE_BATCH_BYTES if _is_file(self._descriptor) else BATCH_BYTES
        self._burst_at = -math.inf
        self._burst_lines = 0
        self.dropped = 0
        """How many lines were dropped."""
        self._reported = 0
        self._lock = threading.RLock()  # a finalizer may log in the middle of this
        self._changed = threading.Condition(self._lock)
        self._unmade: deque[_Line] = deque()  # they come after those of the queue
        self._making = False
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._writing = False
        self._waiting = False  # the thread, for a first line
        self._stopping = False
        self._flushing = 0  # callers that wait until all is written
        self._thread: threading.Thread | None = None

    def write(self, line: _Line) -> None:
        """Queue a line, or a function that makes one. It is dropped if it does not fit.

        The function is called later, once, by this or another caller or by the writer's thread. It
        returns the line, and raises nothing.
        """
        with self._lock:  # the condition's own methods would cost half a microsecond
            size = len(line) if isinstance(line, bytes) else _ROOM_BYTES_MIN
            if self._queued_bytes + size > QUEUE_BYTES_MAX:
                self.dropped += 1
                return
            at_once = self._may_write_at_once()
            self._unmade.append(line)
            if self._making:  # a finalizer has logged: its line comes after those
                return
            if at_once or isinstance(line, bytes) or len(self._unmade) >= _UNMADE_MAX:
                self._make()
            if at_once:
                self._write_first()
            if not self._is_idle() and self._has_thread() and self._waiting:
                self._changed.notify_all()

    def _make(self) -> None:
        """Queue the lines that were to be made later. Call it with the lock."""
        self._making = True
        try:
            for _ in range(len(self._unmade)):
                made = _made(self._unmade.popleft())
                size = len(made)
                if self._queued_bytes + size > QUEUE_BYTES_MAX:
                    self.dropped += 1
                else:
                    self._queue.append(made)
                    self._queued_bytes += size
        finally:
            self._making = False
        if self._queued_bytes >= _GATHER_BYTES_MAX:
            self._changed.notify_all()

    def _write_first(self) -> None:
        """Write what the descriptor takes of the first line at once. Call it with the lock."""
        if self._queue:
            line = self._queue[0]
            written = self._written_at_once(line)
            self._queued_bytes -= written
            if written == len(line):
                self._queue.popleft()
            else:
                self._queue[0] = line[written:]

    def _may_write_at_once(self) -> bool:
        """Return whether the caller may write a line.

        Not one of a burst, while lines are queued, or while dropped ones are to be reported.
        """
        if not self._takes_at_once or not self._is_idle() or self.dropped != self._reported:
            return False
        now = time.monotonic()
        if now - self._burst_at >= _BURST_SECONDS:
            self._burst_at, self._burst_lines = now, 0
        self._burst_lines += 1
        return self._burst_lines <= _AT_ONCE_MAX

    def _written_at_once(self, line: bytes) -> int:
        """Write what the descriptor takes without a wait, and return how many bytes that was."""
        try:
            return os.pwritev(self._descriptor, (line,), _AT_ITS_POSITION, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # it has no such writes, or fails: the thread's write says which
            self._takes_at_once = False
            return 0

    def flush(self, seconds_max: float = FLUSH_SECONDS_MAX) -> None:
        """Wait until all lines are written or dropped, for a bounded time."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            self._changed.wait_for(self._is_idle, seconds_max)
            self._flushing -= 1

    def before_fork(self) -> None:
        """End the thread, unless it is blocked. The next line starts another."""
        with self._changed:
            thread, self._stopping = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(_FORK_SECONDS_MAX)
        with self._changed:
            self._stopping = False

    def _is_idle(self) -> bool:
        return not (self._unmade or self._making or self._queue or self._writing)

    def _has_thread(self) -> bool:
        """Start the thread if there is none. Return whether there is one."""
        if self._thread is None:
            # A finalizer that logs here would start another thread, or wait in the new one.
            collects = gc.isenabled()
            gc.disable()
            try:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                thread.start()
            except RuntimeError:  # the machine has no more threads: the next line tries again
                return False
            finally:
                if collects:
                    gc.enable()
            self._thread = thread
        return True

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            lost = self._write_all(b"".join(batch)).count(b"\n")
            with self._changed:
                self._writing = False
                self.dropped += lost
                dropped = self.dropped - self._reported
                flows = batch and dropped and not lost and self._is_idle()
                if flows:
                    self._reported = self.dropped
                self._changed.notify_all()
            if flows:
                self._flows_again(dropped)

    def _is_gathered(self) -> bool:
        """Return whether no further lines are waited for."""
        return self._stopping or self._flushing > 0 or self._queued_bytes >= _GATHER_BYTES_MAX

    def _next_batch(self) -> list[bytes] | None:
        """Wait for lines and return some, or none if they did not fit; None to end the thread."""
        with self._changed:
            if self._is_idle():
                self._waiting = True
                while self._is_idle() and not self._stopping:
                    self._changed.wait(_IDLE_WAIT_SECONDS)
                self._waiting = False
                self._changed.wait_for(self._is_gathered, GATHER_SECONDS)
            if not self._queue:
                self._make()
            batch: list[bytes] = []
            left_bytes = self._batch_bytes
            while self._queue and (not batch or len(self._queue[0]) <= left_bytes):
                batch.append(line := self._queue.popleft())
                left_bytes -= len(line)
                self._queued_bytes -= len(line)
            self._writing = bool(batch)
            if self._stopping and not batch:
                self._thread = None
                return None
            return batch

    def _write_all(self, content: bytes) -> bytes:
        """Write it, however long that takes. Return what the descriptor has not taken."""
        left = memoryview(content)
        while left:  # ends with what is left, or with the reader
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another program has made it non-blocking
                self._wait_until_writable()
            except OSError:  # its reader has gone, or the disk is full
                break
        return bytes(left)

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        with suppress(OSError):
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll()


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:  # it is not open
        return False


def _made(line: _Line) -> bytes:
    return line if isinstance(line, bytes) else line()
