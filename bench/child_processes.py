"""The child processes of a run: each in a session of its own, each ended where it was started.

Ctrl-C in the terminal reaches the benchmark alone, which then ends its children in reverse order of
their start. If the benchmark itself is killed, the kernel signals its children (Linux, by
util-linux's `setpriv`). Servers that refuse to run as root run as an unprivileged user.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.errors import BenchError

LOOPBACK: Final = "127.0.0.1"
START_SECONDS_MAX: Final = 30.0  # the slowest takes about two
STOP_SECONDS_MAX: Final = 15.0  # Postgres with 1,000 sessions; then it is killed
_POLL_SECONDS: Final = 0.02
_LOG_TAIL_CHARACTERS: Final = 2000


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """A running program and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its process group."""
        return self.process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Poll until `ready`. Raises BenchError with the end of the program's output."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.process.args!r} did not start:\n{self.tail()}")
            time.sleep(_POLL_SECONDS)

    def tail(self) -> str:
        """Return the end of its output."""
        return self.log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]


@contextmanager
def child(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    account: pwd.struct_passwd | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    stop_seconds_max: float = STOP_SECONDS_MAX,
) -> Iterator[ChildProcess]:
    """Run a program while the block runs. `environment` is added to ours, see `_clean_environment`.

    At the end of the block it gets `stop_signal`; if it still runs `stop_seconds_max` later, its
    process group is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - fixed commands, no shell
            [*_death_signal(stop_signal), *(str(word) for word in command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_clean_environment() | dict(environment or {}),
            start_new_session=True,
            user=None if account is None else account.pw_uid,
            group=None if account is None else account.pw_gid,
            extra_groups=None if account is None else [],
        )
    try:
        yield ChildProcess(process, log)
    finally:
        _stop(process, stop_signal, stop_seconds_max)


def run(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    account: pwd.struct_passwd | None = None,
    seconds_max: float,
) -> str:
    """Run a program until it exits; return its output. Raises BenchError if it fails."""
    with child(command, log, environment=environment, account=account) as started:
        try:
            status = started.process.wait(seconds_max)
        except subprocess.TimeoutExpired as error:
            raise BenchError(
                f"{command[0]} took over {seconds_max:g} s:\n{started.tail()}"
            ) from error
        if status:
            raise BenchError(f"{command[0]} failed:\n{started.tail()}")
        return log.read_text(errors="replace")


def unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account for servers that refuse to run as root; None when we are not root."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def private_directory(path: Path, account: pwd.struct_passwd | None) -> Path:
    """Make a directory that only the server's account can enter."""
    path.mkdir(mode=0o700)
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)
    return path


def free_port() -> int:
    """Return a port that was free just now, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _death_signal(stop_signal: signal.Signals) -> list[str]:
    """Return the prefix of a command that has the kernel signal the program when we die.

    Empty where setpriv is missing. It executes the program in its place, so the process id stays.
    """
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", stop_signal.name[3:]] if program else []


def _clean_environment() -> dict[str, str]:
    """Return ours without the variables that libpq, the SDK or the proxy would read."""
    foreign = ("PG", "DATABRICKS_", "LAKEBASE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _stop(
    process: subprocess.Popen[bytes], stop_signal: signal.Signals, seconds_max: float
) -> None:
    if process.poll() is not None:
        return
    process.send_signal(stop_signal)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds_max)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
