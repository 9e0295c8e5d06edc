"""`reconnect`: ask a running proxy to close the sessions of its pools, others at their end."""

import os

from proxy.config import load_settings
from proxy.exit_codes import EXIT_OK
from proxy.verbs.admin_client import AdminError, ask_to_reconnect
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments


def run(arguments: Arguments) -> int:
    """Ask the proxy that has this configuration. Raises ConfigurationError."""
    try:
        ask_to_reconnect(load_settings(arguments.flags, os.environ).admin)
    except AdminError as error:
        return fail(str(error))
    return EXIT_OK
