"""The proxy as a process: signals, drain, exit codes.

For: what happens around serving, from the command line to the end of the process. Not for: reading
arguments (`cli`), what a reload does (`reloading`), or how sessions end (`session.drain`).

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

from proxy.blocking import NoThreadStarted
from proxy.config import Settings
from proxy.exit_codes import EXIT_CUT, EXIT_FAILURE, EXIT_OK
from proxy.observe.logs import get_logger
from proxy.observe.systemd import READY, STOPPING, notify
from proxy.server.app import App
from proxy.server.file_limit import check_file_limit
from proxy.server.first_tokens import mint_first_tokens
from proxy.server.greeting import greet
from proxy.server.reloading import CONFIGURATION_WARNING, Reloads
from proxy.server.router_factory import Reread
from proxy.server.serving import serving

QUIT: Final = "quitquitquit"  # what the log names in place of a signal

Serve = Callable[[Settings], AbstractAsyncContextManager[App]]
"""Serves by these settings while its block runs, with one process or several."""

_log = get_logger(__name__)


class Signals:
    """SIGTERM and SIGINT, and SIGHUP where the configuration can be reloaded.

    Until `stop` is awaited, the first SIGTERM or SIGINT cancels the task that made this object: the
    program is still starting.
    """

    def __init__(self, *, hang_up: Callable[[], None] | None = None) -> None:
        """`hang_up` is called at each SIGHUP."""
        self._stops: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        if hang_up is not None:
            loop.add_signal_handler(signal.SIGHUP, hang_up)

    async def stop(self) -> signal.Signals:
        """Return the next SIGTERM or SIGINT."""
        self._starting = None
        return await self._stops.get()

    def _on_stop(self, number: signal.Signals) -> None:
        self._stops.put_nowait(number)
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None  # once: closing what was opened is not to be cancelled


async def run_proxy(
    settings: Settings, reread: Reread, serve: Serve = serving, config_file: str = ""
) -> int:
    """Serve until asked to stop, then drain. Return the exit code. Raises what `serve` does.

    `config_file` is what the settings were read from, if a file was.
    """
    reloads = Reloads(settings, reread, config_file)
    signals = Signals(hang_up=reloads.ask)
    check_file_limit(settings.listen)
    async with serve(settings) as app:
        for warning in settings.warnings():
            _log.warning(CONFIGURATION_WARNING, warning=warning)
        async with asyncio.TaskGroup() as tasks:
            reloading = tasks.create_task(reloads.run(app))
            preparation = tasks.create_task(_prepare(app))
            cause = await _stop_cause(app, signals)
            reloading.cancel()
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
    await greet(app)


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


def explain(error: OSError) -> str:
    """Return a sentence that says why the proxy cannot start, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"{error.strerror or error}. Is another Postgres or proxy there? Choose free ports: "
            "--listen.port 6432 --admin.port 9091"
        )
    return f"cannot start: {error}"
