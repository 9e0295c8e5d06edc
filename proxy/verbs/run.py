"""`run`: serve local Postgres clients until told to stop."""

from collections.abc import Sequence
from functools import partial

from proxy.process import serve
from proxy.verbs.running import PRINT_CONFIG, print_config, settings_of, until_done


def run(arguments: Sequence[str]) -> int:
    """Serve, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    reread = partial(settings_of, arguments)
    return until_done(reread(), lambda settings: serve(settings, reread))
