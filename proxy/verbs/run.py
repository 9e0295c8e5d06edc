"""`run`: serve local Postgres clients until asked to stop."""

import os
from functools import partial

from proxy.config import Settings, config_file
from proxy.server.file_limit import starting_max
from proxy.server.process import Serve, run_proxy
from proxy.server.serving import serving
from proxy.verbs.event_loop import print_config, run_on_event_loop, serving_settings
from proxy.verbs.syntax import PRINT_CONFIG, Arguments


def run(arguments: Arguments) -> int:
    """Serve, or print the values in force. Raises ConfigurationError."""
    if arguments.has(PRINT_CONFIG):
        return print_config(arguments.flags)
    reread = partial(serving_settings, arguments.flags)
    # The lambda is called before there is an event loop, which is when workers can be prepared.
    return run_on_event_loop(
        reread(),
        lambda settings: run_proxy(
            settings, reread, _serve_of(settings), config_file(arguments.flags, os.environ)
        ),
    )


def _serve_of(settings: Settings) -> Serve:
    """Return what serves, with one process or several. Raises OSError."""
    workers = settings.listen.workers
    limit = starting_max(settings.listen)
    if workers == 1:
        return partial(serving, starting_max=limit)
    # With one process none of this is imported.
    from proxy.workers.supervisor import prefork, supervising  # noqa: PLC0415

    return partial(supervising, preforked=prefork(workers, starting_max=limit))
