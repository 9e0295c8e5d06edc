"""`run`: serve local Postgres clients until asked to stop."""

import os
from collections.abc import Sequence
from functools import partial

from proxy.config import Settings, config_file
from proxy.server.file_limit import starting_max
from proxy.server.process import Serve, run_proxy
from proxy.server.serving import serving
from proxy.verbs.event_loop import PRINT_CONFIG, print_config, run_on_event_loop, serving_settings


def run(arguments: Sequence[str]) -> int:
    """Serve, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    reread = partial(serving_settings, arguments)
    # The lambda is called before there is an event loop, which is when workers can be prepared.
    return run_on_event_loop(
        reread(),
        lambda settings: run_proxy(
            settings, reread, _serve_of(settings), config_file(arguments, os.environ)
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
