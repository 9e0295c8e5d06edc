"""A command as a child of this process, started and waited for as a shell does.

For: `exec`: signals passed on to the child, and its exit code. Not for: what serves it.

The child is in this process's group, and so in the terminal's foreground group if this one is. What
the terminal sends to the group (Ctrl-C, Ctrl-\\, Ctrl-Z) reaches both, and is not passed on again.
It has this process's standard streams, which nothing here reads or writes for it.

Invariant: a child that was started is waited for. Nothing here kills it: a child that ignores
SIGTERM works until it ends, as it would without the proxy.
"""

import asyncio
import errno
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
KILLED_BY: Final = 128  # and the number of the signal

_PASSED: Final = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
_SENT_BY_TERMINALS: Final = frozenset((signal.SIGINT, signal.SIGQUIT))

FileLimit = tuple[int, int]
"""The limit of open files, soft and hard."""


class CommandNotStarted(Exception):
    """The command cannot be started. `exit_code` is what a shell would end with."""

    def __init__(self, command: str, error: OSError) -> None:
        super().__init__(f"{command or repr(command)}: {error.strerror or error}")
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


class PassedSignals:
    """Passes signals on to the child while there is one.

    Before that, the first one cancels the task that made this object; `received` has it. After it,
    each one calls `on_late`. A signal that was ignored when the program was started stays so, for
    the child too.
    """

    def __init__(self, on_late: Callable[[], None]) -> None:
        self.received: signal.Signals | None = None
        self._on_late = on_late
        self._starting = asyncio.current_task()
        self._child: subprocess.Popen[bytes] | None = None
        loop = asyncio.get_running_loop()
        for number in _PASSED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._pass, number)

    def pass_to(self, child: "subprocess.Popen[bytes]") -> None:
        """Pass the next signals on to this child, until it has ended."""
        self._starting, self._child = None, child

    def _pass(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            if number not in _SENT_BY_TERMINALS or not _in_foreground():
                self._child.send_signal(number)
        elif self._starting is None:
            self._on_late()
        else:  # once: closing what was opened is not to be cancelled
            self.received = number
            self._starting.cancel()
            self._starting = None


async def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: PassedSignals,
    file_limit: FileLimit,
) -> int:
    """Run the command to its end and return its exit code, 128 and n if a signal n ended it.

    It has `file_limit`: a program that uses select() fails with the high limit of a proxy. Raises
    CommandNotStarted.
    """
    child = _start(command, environment, file_limit)
    signals.pass_to(child)
    code = await _ended(child)
    return code if code >= 0 else KILLED_BY - code


def _start(
    command: Sequence[str], environment: Mapping[str, str], file_limit: FileLimit
) -> "subprocess.Popen[bytes]":
    """Return the child. Raises CommandNotStarted."""
    raised = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if not command[0]:  # it would be each folder of PATH
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with suppress(ValueError, OSError):  # as it could not be raised either
            resource.setrlimit(resource.RLIMIT_NOFILE, (file_limit[0], raised[1]))
        return subprocess.Popen(command, env=environment)  # noqa: S603 - what the user asked for
    except OSError as error:
        raise CommandNotStarted(command[0], error) from error
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, raised)


async def _ended(child: "subprocess.Popen[bytes]") -> int:
    """Return the child's own exit code. There is no bound: it may work for as long as it takes."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        code = child.wait()
        with suppress(RuntimeError):  # the loop was closed: this process could not go on
            loop.call_soon_threadsafe(ended.set_result, code)

    threading.Thread(target=wait, name="child", daemon=True).start()
    return await ended


def _in_foreground() -> bool:
    """Return whether the terminal has sent to this process's group what it was sent."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False  # there is none
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
