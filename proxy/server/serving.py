"""Serving with the parts of an App: what opens and closes with the block.

For: `serving`, the whole program for `run`, `demo` and tests; `running`, which every process of it
shares; `open_snapshot`, for verbs that connect without a listener. Not for: the parts (`app`).
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from proxy import __version__
from proxy.config import Settings
from proxy.observe.admin import serve_admin
from proxy.observe.history import sampling
from proxy.observe.logs import get_logger
from proxy.observe.loop_lag import sampling_lag
from proxy.observe.traces import open_traces
from proxy.server.app import App
from proxy.server.metric_labels import build_metrics
from proxy.server.snapshot import ConfigSnapshot
from proxy.session.fast_path import watched_lanes
from proxy.session.listen_sockets import shown
from proxy.session.listener import STARTING_MAX
from proxy.upstream.phases import RecordTargetPhase
from proxy.workspace.registry import LocalWorkspaceRegistry

_log = get_logger(__name__)


@asynccontextmanager
async def serving(settings: Settings, *, starting_max: int = STARTING_MAX) -> AsyncIterator[App]:
    """Serve while the block runs. `starting_max` connections may be starting at a time.

    Raises OSError if an address cannot be listened on, and ConfigurationError for a file that
    a setting names and that cannot be used, or a catalogue that has not the map.
    """
    app = App(settings, starting_max=starting_max)
    async with running(app):
        log_serving(app)
        yield app


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Serve with the parts of `app` while the block runs. Raises as `serving` does.

    Clients that come while a catalogue is asked for its map wait. This is the same in every process
    of a proxy: with one, in the supervisor, and in a worker.
    """
    settings = app.settings
    async with AsyncExitStack() as stack:
        app.lanes = stack.enter_context(watched_lanes())
        stack.push_async_callback(app.workspaces.close)
        if app.workers is None:  # else the workers have the sessions
            app.traces = open_traces(__version__)
            stack.push_async_callback(app.close_traces)
        stack.enter_context(sampling_lag(app.metrics.loop_lagged))
        if settings.admin.enabled:
            app.metrics.set_source(app)
            app.admin = await stack.enter_async_context(
                serve_admin(
                    app,
                    host=settings.admin.host,
                    port=settings.admin.port,
                    quit_allowed=settings.admin.quit,
                )
            )
            await stack.enter_async_context(sampling(partial(_add_to_history, app)))
        stack.push_async_callback(app.close_pools)
        await stack.enter_async_context(app.catalogue.running())
        accepting = app.connection_source.accepting()
        app.listen_addresses = await stack.enter_async_context(accepting)
        app.lifecycle.serve()
        await app.catalogue.first_outcome()
        yield


async def _add_to_history(app: App) -> None:
    await app.refresh()
    ages = [token.age_seconds for token in app.tokens()]
    app.history.add(app.whole_reading().totals, max(ages, default=None))


def log_serving(app: App) -> None:
    """Log where the proxy serves, and with what."""
    _log.info(
        "serving",
        host=app.listen_host,
        port=app.listen_port,
        addresses=[shown(address) for address in app.listen_addresses],
        admin_port=None if app.admin is None else app.admin.port,
        version=__version__,
        acceleration=app.snapshot.acceleration,
        **app.snapshot.map_facts,
    )


@asynccontextmanager
async def open_snapshot(
    settings: Settings, record_phase: RecordTargetPhase, *, retries: bool = True
) -> AsyncIterator[ConfigSnapshot]:
    """Yield the snapshot that sessions would be served by, without a listener.

    Without `retries` a connection to a workspace that fails is reported at once.
    Raises ConfigurationError for a file that a setting names and that cannot be used.
    """
    metrics = build_metrics(settings.target_names())
    workspaces = LocalWorkspaceRegistry(metrics, version=__version__, retries=retries)
    try:
        yield ConfigSnapshot(settings, workspaces, record_phase)
    finally:
        await workspaces.close()
