"""The proxy as a process: signals, reload, drain, exit codes.

For: what happens around serving, from the command line to the end of the process. Not for: reading
arguments (`cli`), or how sessions end (`session.drain`).

SIGTERM and SIGINT start a drain, and a second one ends what is left. SIGHUP reloads the
configuration. Invariant: once the proxy was asked to stop, nothing is reloaded any more.
"""

import asyncio
import errno
import gc
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final

from proxy.blocking import BlockingCalls, NoThreadStarted
from proxy.config import ConfigurationError, Settings
from proxy.exit_codes import EXIT_CUT, EXIT_FAILURE, EXIT_OK
from proxy.observe.logs import get_logger
from proxy.observe.systemd import READY, STOPPING, notify, reloading
from proxy.routing.router import Router
from proxy.server.app import App
from proxy.server.file_limit import check_file_limit
from proxy.server.first_tokens import mint_first_tokens
from proxy.server.router_factory import RELOAD_SECONDS_MAX, Reread, reread_in_thread
from proxy.server.serving import serving

QUIT: Final = "quitquitquit"  # what the log names in place of a signal
_NOT_RELOADED: Final = "not reloaded; the configuration stays as it was"
_CONFIGURATION_WARNING: Final = "configuration warning"

Serve = Callable[[Settings], AbstractAsyncContextManager[App]]
"""Serves by these settings while its block runs, with one process or several."""

_log = get_logger(__name__)


class Signals:
    """SIGTERM and SIGINT, and SIGHUP where the configuration can be reloaded.

    Until `stop` is awaited, the first SIGTERM or SIGINT cancels the task that made this object: the
    program is still starting.
    """

    def __init__(self, *, reloads: bool = False) -> None:
        self._stops: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._reloads: asyncio.Queue[None] = asyncio.Queue(maxsize=1)  # several are as good as one
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        if reloads:
            loop.add_signal_handler(signal.SIGHUP, self._on_reload)

    async def stop(self) -> signal.Signals:
        """Return the next SIGTERM or SIGINT."""
        self._starting = None
        return await self._stops.get()

    async def reload(self) -> None:
        """Return at the next SIGHUP."""
        await self._reloads.get()

    def _on_stop(self, number: signal.Signals) -> None:
        self._stops.put_nowait(number)
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None  # once: closing what was opened is not to be cancelled

    def _on_reload(self) -> None:
        with suppress(asyncio.QueueFull):
            self._reloads.put_nowait(None)


async def run_proxy(settings: Settings, reread: Reread, serve: Serve = serving) -> int:
    """Serve until asked to stop, then drain. Return the exit code. Raises what `serve` does."""
    signals = Signals(reloads=True)
    check_file_limit(settings.listen)
    async with serve(settings) as app:
        for warning in settings.warnings():
            _log.warning(_CONFIGURATION_WARNING, warning=warning)
        async with asyncio.TaskGroup() as tasks:
            reloads = tasks.create_task(_reload_on_hangup(app, signals, reread))
            preparation = tasks.create_task(_prepare(app))
            cause = await _stop_cause(app, signals)
            reloads.cancel()
            preparation.cancel()
        return await _drain(app, signals, cause)


async def run_until_stopped(app: App, signals: Signals) -> int:
    """Wait until asked to stop, then drain. Return the exit code."""
    return await _drain(app, signals, await _stop_cause(app, signals))


async def _prepare(app: App) -> None:
    """Load what the first session needs, freeze the garbage collector, and get the first tokens.

    A collection looks at all objects while every session waits. The hundreds of thousands that came
    with imports stay: they are left out from here on. The service manager is notified as soon as
    `/startup` succeeds, so that units ordered after this one can log in.
    """
    if is_started := app.started:  # no token is required
        notify(READY)
    with suppress(ImportError, TimeoutError, NoThreadStarted):  # the first mint reports this
        await app.snapshot.load_sdk()
    gc.freeze()
    await mint_first_tokens(app)
    if not is_started:
        notify(READY)


# -- stop and drain ------------------------------------------------------------------------------


async def _stop_cause(app: App, signals: Signals) -> str:
    """Wait until asked to stop. Return the signal's name, QUIT, or nothing after a failure."""
    async with asyncio.TaskGroup() as tasks:
        quit_asked = tasks.create_task(app.lifecycle.quit_asked.wait())
        signalled = tasks.create_task(signals.stop())
        await asyncio.wait((quit_asked, signalled), return_when=asyncio.FIRST_COMPLETED)
        quit_asked.cancel()
        signalled.cancel()
    if not signalled.cancelled():
        return signalled.result().name
    return "" if app.lifecycle.failed else QUIT


async def _drain(app: App, signals: Signals, cause: str) -> int:
    """Drain. Return the exit code. A second signal ends at once what is left."""
    notify(STOPPING)
    shutdown = app.settings.shutdown
    _log.info(
        "draining",
        signal=cause,
        accept_seconds=shutdown.accept_seconds,
        drain_seconds=shutdown.drain_seconds,
    )
    async with asyncio.TaskGroup() as tasks:
        second_signal = tasks.create_task(_end_at_second_signal(app, signals, cause))
        cut = await app.drain(shutdown.drain_seconds, accept_seconds=shutdown.accept_seconds)
        second_signal.cancel()
    _log.info("stopped", sessions_cut=cut)
    if cut:
        return EXIT_CUT
    return EXIT_FAILURE if app.lifecycle.failed else EXIT_OK


async def _end_at_second_signal(app: App, signals: Signals, cause: str) -> None:
    number = await signals.stop()
    if cause == QUIT:
        # A preStop hook has asked, and the kubelet sends its one SIGTERM after every hook.
        _log.info("draining already; one more signal cuts what is left", signal=number.name)
        await signals.stop()
    await app.drain(0)


# -- reload --------------------------------------------------------------------------------------


async def _reload_on_hangup(app: App, signals: Signals, reread: Reread) -> None:
    threads = BlockingCalls("reload")  # daemons: a file that is not answered delays no exit
    while True:  # ends with the proxy
        await signals.reload()
        if is_started := app.started:  # else READY would end the start and not the reload
            notify(reloading())
        try:
            await _apply(app, *await reread_in_thread(threads, reread))
        except ConfigurationError as error:
            app.metrics.reload_failed()
            _log.error(_NOT_RELOADED, problems=[str(problem) for problem in error.problems])
        except TimeoutError:
            app.metrics.reload_failed()
            text = f"reading it took more than {RELOAD_SECONDS_MAX:g} s"
            _log.error(_NOT_RELOADED, problems=[text])
        except Exception:
            # A bug of ours must cost one reload, not all sessions.
            app.metrics.reload_failed()
            _log.exception(_NOT_RELOADED)
        if is_started:
            notify(READY)


async def _apply(app: App, settings: Settings, router: Router) -> None:
    """Serve new sessions by these settings. Raises ConfigurationError."""
    warned = app.settings.warnings()
    changes = await app.reload_when_loaded(settings, router)
    if app.workers is not None and not await app.workers.reload():
        app.metrics.reload_failed()  # the log says which worker failed and why
    _log.info("reloaded", changed=changes.reloadable, **app.snapshot.map_facts)
    if changes.restart:
        _log.warning("restart to let these take effect", keys=changes.restart)
    for warning in app.settings.warnings():
        if warning not in warned:
            _log.warning(_CONFIGURATION_WARNING, warning=warning)


def explain(error: OSError) -> str:
    """Return a sentence that says why the proxy cannot start, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"{error.strerror or error}. Is another Postgres or proxy there? Choose free ports: "
            "--listen.port 6432 --admin.port 9091"
        )
    return f"cannot start: {error}"
