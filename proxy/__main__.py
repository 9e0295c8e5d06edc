"""The entry point of `lakebase-auth-proxy` and `python -m proxy`.

For: making the program stoppable at once. Importing the rest takes most of a second, and in a
container the program is PID 1, for which the kernel drops signals without a handler: a pod that is
deleted while it starts would wait for SIGKILL. Not for: verbs (`cli`), or how a proxy that serves
ends (`server.process`).

A SIGHUP before the proxy serves is dropped, because it is about to read its configuration.

Invariant: until the handlers are set, only the standard library is imported.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from itertools import pairwise, takewhile
from pathlib import Path
from types import FrameType
from typing import Final

# These serve until they are asked to stop, so a signal to stop is no failure.
_SERVING_VERBS: Final = ("run", "demo")
# These run beside a proxy, often in its container. If memory is short, they are to be killed.
_VERBS_BESIDE: Final = ("check", "wait")
# A key may be called like a verb.
_SHARD_KEY: Final = "--shard-key"
_OOM_SCORE_ADJ: Final = Path("/proc/self/oom_score_adj")
_OOM_SCORE_MAX: Final = "1000"


def main() -> int:
    """Run the command line and return its exit code."""
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    verb = _verb()
    if verb == "run":
        signal.signal(signal.SIGHUP, _drop)
    if verb in _VERBS_BESIDE:
        with suppress(OSError):  # not on Linux, or not allowed: then the kernel decides
            _OOM_SCORE_ADJ.write_text(_OOM_SCORE_MAX)
    from proxy import cli  # noqa: PLC0415

    code = cli.main()
    if threading.active_count() > 1:
        _exit_at_once(code)
    return code


def _verb() -> str:
    """Return the verb if it is one of those that differ here: flags may stand before it."""
    arguments = takewhile(lambda argument: argument != "--", sys.argv)
    verbs = (*_SERVING_VERBS, *_VERBS_BESIDE)
    given = (one for before, one in pairwise(arguments) if before != _SHARD_KEY and one in verbs)
    return next(given, "")


def _exit_at_once(code: int) -> None:
    """End the process now, with what was printed, while daemon threads run.

    The interpreter's own end stops each of them where it is. Within an extension in Rust or C++
    (pydantic, cryptography) that aborts the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # what reads it is gone
            if stream is not None:
                stream.flush()
    os._exit(code)


def _open_standard_streams() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that the program was started without.

    Else the first socket would take its number, and what is printed would go to a client.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            # It stays open as long as the program runs.
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _end(number: int, _frame: FrameType | None) -> None:
    """Exit at once: until the verb sets its own handlers there is nothing to drain."""
    raise SystemExit(0 if _verb() in _SERVING_VERBS else 128 + number)


def _drop(number: int, frame: FrameType | None) -> None:
    """Do nothing. Unlike this handler, SIG_IGN would be inherited by child processes."""


if __name__ == "__main__":
    sys.exit(main())
