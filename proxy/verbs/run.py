"""`run`: serve local Postgres clients until told to stop."""

from collections.abc import Sequence
from functools import partial

from proxy.config import Settings
from proxy.server.app import serving
from proxy.server.process import Serving, serve, starting_max
from proxy.verbs.event_loop import PRINT_CONFIG, print_config, settings_of, until_done


def run(arguments: Sequence[str]) -> int:
    """Serve, or print the values in force. Raises ConfigurationError."""
    if PRINT_CONFIG in arguments:
        return print_config(arguments)
    reread = partial(settings_of, arguments)
    # The processes are prepared before there is an event loop, which is when this is called.
    return until_done(reread(), lambda settings: serve(settings, reread, _with_processes(settings)))


def _with_processes(settings: Settings) -> Serving:
    """Return what serves, with one process or several. Raises OSError."""
    workers = settings.listen.workers
    limit = starting_max(settings.listen.max_connections, workers)
    if workers == 1:
        return partial(serving, starting_max=limit)
    # Who has one process pays for nothing of this.
    from proxy.workers.supervisor import prefork, supervising  # noqa: PLC0415

    return partial(supervising, preforked=prefork(workers, starting_max=limit))
