"""The program's first lines: `lakebase-auth-proxy`, which is `python -m proxy`.

For: being stoppable from the first moment. Importing the rest takes most of a second, and the
kernel drops a signal for which PID 1, which is what we are in a container, has no handler: a pod
that is deleted while it starts would wait for SIGKILL. Not for: verbs, or how a proxy that serves
ends; that is `cli`.

A SIGHUP that comes before the proxy serves is dropped: it is reading its configuration anyway.

Invariant: nothing is imported here but the standard library, until the handlers are set.
"""

import signal
import sys
from types import FrameType
from typing import Final

# These serve until they are told to stop, so that being told so is no failure.
_SERVING_VERBS: Final = ("run", "demo")


def main() -> int:
    """Run the command line and return its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGHUP, _drop)
    from proxy import cli  # noqa: PLC0415

    return cli.main()


def _end(number: int, _frame: FrameType | None) -> None:
    """End at once: until `cli` takes the signals over there is nothing to drain."""
    raise SystemExit(0 if sys.argv[1:2] and sys.argv[1] in _SERVING_VERBS else 128 + number)


def _drop(number: int, frame: FrameType | None) -> None:
    """Do nothing. SIG_IGN would go over to every program that is started from here."""


if __name__ == "__main__":
    sys.exit(main())
