"""`wait`: wait until a running proxy is ready. It can be a container's health check.

It needs no event loop, and costs what reading the configuration costs.
"""

import os
import re
from typing import Final

from proxy.config import load_settings
from proxy.exit_codes import EXIT_OK
from proxy.verbs.admin_client import AdminError, wait_until_ready
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments, UsageError
from proxy.verbs.verb_table import TIMEOUT

# The timeout without --timeout.
WAIT_SECONDS: Final = "30"


def run(arguments: Arguments) -> int:
    """Wait until the proxy that has this configuration is ready. Raises ConfigurationError."""
    seconds = arguments.get(TIMEOUT.name) or WAIT_SECONDS
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", seconds):
        raise UsageError(f"{TIMEOUT.flag} needs a number of seconds")
    try:
        wait_until_ready(load_settings(arguments.flags, os.environ).admin, float(seconds))
    except AdminError as error:
        return fail(str(error))
    return EXIT_OK
