"""The first process of a proxy with several workers: an App that accepts, and serves nobody itself.

For: making the processes and putting the parts together. Not for: signals and exit codes
(`process`), which are those of a proxy with one process.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from proxy.config import Settings
from proxy.server.app import App, running
from proxy.workers.fork_server import ForkServer
from proxy.workers.shared_counters import SharedCounters
from proxy.workers.worker import work
from proxy.workers.worker_pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Prefork:
    """What has to be made before there is an event loop."""

    counters: SharedCounters
    fork_server: ForkServer


def prefork(workers: int, *, starting_max: int) -> Prefork:
    """Fork what so many workers are forked from; in each `starting_max` clients may be starting.

    Call it while this process has one thread and no event loop. Raises OSError.
    """
    counters = SharedCounters(workers)
    return Prefork(counters, ForkServer(partial(work, counters, starting_max)))


@asynccontextmanager
async def supervising(settings: Settings, preforked: Prefork) -> AsyncIterator[App]:
    """Serve with several processes while the block runs; none is left behind it.

    Raises OSError when an address cannot be listened on or a worker does not start, and
    ConfigurationError for a file that a setting names and that cannot be used.
    """
    try:
        app = App(settings)
        app.entrance = app.others = WorkerPool(app, preforked.counters, preforked.fork_server)
        async with running(app):
            yield app
    finally:
        preforked.fork_server.close()
