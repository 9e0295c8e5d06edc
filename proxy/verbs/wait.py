"""`wait`: wait until a running proxy is ready. It can be a container's health check.

It needs no event loop, and costs what reading the configuration costs.
"""

import os
import re
from collections.abc import Sequence
from typing import Final

from proxy.config import load_settings
from proxy.exit_codes import EXIT_OK
from proxy.verbs.admin_client import AdminError, wait_until_ready
from proxy.verbs.stderr import fail, wrong_usage

# The timeout without --timeout.
WAIT_SECONDS: Final = 30.0


def run(arguments: Sequence[str]) -> int:
    """Wait until the proxy that has this configuration is ready. Raises ConfigurationError."""
    seconds, flags = _take_timeout(arguments)
    if seconds is None:
        return wrong_usage("--timeout needs a number of seconds")
    try:
        wait_until_ready(load_settings(flags, os.environ).admin, seconds)
    except AdminError as error:
        return fail(str(error))
    return EXIT_OK


def _take_timeout(arguments: Sequence[str]) -> tuple[float | None, list[str]]:
    """Return the value of --timeout, None if it is not a number, and the other arguments."""
    rest, seconds = list(arguments), str(WAIT_SECONDS)
    for at, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--timeout":
            seconds = value if equals else " ".join(arguments[at + 1 : at + 2])
            del rest[at : at + (1 if equals else 2)]
            break
    number = float(seconds) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", seconds) else None
    return number, rest
