"""The proxy as a process: signals, reload, drain, exit codes, the limit of open files.

For: what happens around `serving` between the command line and the end of the process. Not for:
reading arguments (`cli`), or how sessions end (`session`).

SIGTERM and SIGINT drain, and a second one cuts what is left; SIGHUP reads the configuration again.
Invariant: once it is told to stop, nothing is reloaded any more.
"""

import asyncio
import errno
import gc
import math
import resource
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Final

from proxy.blocking import BlockingCalls
from proxy.config import ConfigurationError, Settings
from proxy.exit_codes import EXIT_CUT, EXIT_FAILURE, EXIT_OK
from proxy.observe.logs import get_logger
from proxy.observe.systemd import READY, STOPPING, notify, reloading
from proxy.routing.router import Router
from proxy.server.app import App, serving
from proxy.server.router_factory import RELOAD_SECONDS_MAX, Reread, reread_with_router
from proxy.session.listener import STARTING_MAX

FILES_A_SESSION: Final = 2
# Listeners, the admin address's connections (64), calls to the workspace, cancels, and as many
# connections that are still starting as there are in any case.
FILES_RESERVED: Final = 128
STARTING_MIN: Final = 32

QUIT: Final = "quitquitquit"
_KEPT: Final = "not reloaded; the configuration stays as it was"
_WEAK_POINT: Final = "the configuration has a weak point"

Serving = Callable[[Settings], AbstractAsyncContextManager[App]]
"""Serves by these settings while its block runs, with one process or several."""

_log = get_logger(__name__)


class Signals:
    """SIGTERM and SIGINT, and SIGHUP where somebody reloads.

    Until somebody waits for it, the first of SIGTERM and SIGINT ends the start of the program.
    """

    def __init__(self, *, hangups: bool = False) -> None:
        self._ends: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._hangups: asyncio.Queue[None] = asyncio.Queue(maxsize=1)  # several are as good as one
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        if hangups:
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)

    async def end(self) -> signal.Signals:
        """Return the next signal to end."""
        self._starting = None
        return await self._ends.get()

    async def hangup(self) -> None:
        """Return when the configuration is to be read again."""
        await self._hangups.get()

    def _end(self, number: signal.Signals) -> None:
        self._ends.put_nowait(number)
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None  # what was begun is undone undisturbed

    def _hang_up(self) -> None:
        with suppress(asyncio.QueueFull):
            self._hangups.put_nowait(None)


async def serve(settings: Settings, reread: Reread, opened: Serving = serving) -> int:
    """Serve Lakebase until told to stop; return the exit code. Raises what `opened` does."""
    signals = Signals(hangups=True)
    check_file_limit(settings.listen.max_connections, settings.listen.workers)
    async with opened(settings) as app:
        for warning in settings.warnings():
            _log.warning(_WEAK_POINT, warning=warning)
        notify(READY)
        async with asyncio.TaskGroup() as tasks:
            reloads = tasks.create_task(_reload_on_hangup(app, signals, reread))
            preparation = tasks.create_task(_prepare(app))
            why = await _told_to_stop(app, signals)
            reloads.cancel()
            preparation.cancel()
        return await _drained(app, signals, why)


async def _prepare(app: App) -> None:
    """Do what the first session would wait for, and what would make all others wait.

    The garbage collector walks all objects now and then while everything waits: some hundred
    thousand that came with imports, and stay. From here on it leaves them out.
    """
    with suppress(ImportError, TimeoutError):  # whoever needs it is told so
        await app.snapshot.load_sdk()
    gc.freeze()


async def until_stopped(app: App, signals: Signals) -> int:
    """Wait until told to stop, then drain; return the exit code."""
    return await _drained(app, signals, await _told_to_stop(app, signals))


async def _drained(app: App, signals: Signals, why: str) -> int:
    """Drain; return the exit code. A second signal cuts what is left at once."""
    notify(STOPPING)
    shutdown = app.settings.shutdown
    _log.info(
        "draining",
        signal=why,
        accept_seconds=shutdown.accept_seconds,
        drain_seconds=shutdown.drain_seconds,
    )
    async with asyncio.TaskGroup() as tasks:
        impatience = tasks.create_task(_cut_at_second_signal(app, signals, why))
        cut = await app.drain(shutdown.drain_seconds, accept_seconds=shutdown.accept_seconds)
        impatience.cancel()
    _log.info("stopped", sessions_cut=cut)
    if cut:
        return EXIT_CUT
    return EXIT_FAILURE if app.lifecycle.failed else EXIT_OK


async def _told_to_stop(app: App, signals: Signals) -> str:
    """Return the name of the signal, or of the request, that ends the proxy."""
    async with asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(app.lifecycle.quit_asked.wait())
        signalled = tasks.create_task(signals.end())
        await asyncio.wait((asked, signalled), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        signalled.cancel()
    if not signalled.cancelled():
        return signalled.result().name
    return "" if app.lifecycle.failed else QUIT


async def _cut_at_second_signal(app: App, signals: Signals, why: str) -> None:
    number = await signals.end()
    if why == QUIT:
        # A preStop hook has asked, and the kubelet sends its one SIGTERM behind every hook.
        _log.info("draining already; one more signal cuts what is left", signal=number.name)
        await signals.end()
    await app.drain(0)


# -- reload --------------------------------------------------------------------------------------


async def _reload_on_hangup(app: App, signals: Signals, reread: Reread) -> None:
    threads = BlockingCalls(
        "reload"
    )  # daemons: one whose file does not answer keeps nobody from ending
    while True:  # ends with the proxy
        await signals.hangup()
        notify(reloading())
        try:
            read = partial(reread_with_router, reread)
            await _take_over(app, *await threads.run(read, RELOAD_SECONDS_MAX))
        except ConfigurationError as error:
            app.metrics.reload_failed()
            _log.error(_KEPT, problems=[str(problem) for problem in error.problems])
        except TimeoutError:
            gc.enable()  # which the thread left behind will not do
            app.metrics.reload_failed()
            _log.error(_KEPT, problems=[f"reading it took more than {RELOAD_SECONDS_MAX:g} s"])
        except Exception:
            # A bug of ours must cost one reload, not all sessions.
            app.metrics.reload_failed()
            _log.exception(_KEPT)
        notify(READY)


async def _take_over(app: App, settings: Settings, router: Router) -> None:
    """Serve new sessions by these settings. Raises ConfigurationError."""
    warned = app.settings.warnings()
    changes = app.reload(settings, router)
    if app.workers is not None and not await app.workers.reload():
        app.metrics.reload_failed()  # which of them did not, and why, is in the log
    _log.info("reloaded", changed=changes.reloadable, **app.snapshot.map_facts)
    if changes.restart:
        _log.warning("restart to let these take effect", keys=changes.restart)
    for warning in app.settings.warnings():
        if warning not in warned:
            _log.warning(_WEAK_POINT, warning=warning)


# -- the limit of open files ---------------------------------------------------------------------


def raise_file_limit() -> None:
    """Use all the file descriptors that we may have: a session takes two, and the usual soft limit
    of 1024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems say "unlimited" and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_file_limit(max_connections: int, workers: int = 1) -> None:
    """Warn where the limit of open files would refuse clients before `max_connections` does.

    The limit is a process's, and workers share the connections evenly.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_A_SESSION * math.ceil(max_connections / workers) + FILES_RESERVED
    if limit != resource.RLIM_INFINITY and limit < needed:
        _log.warning(
            "the limit of open files is too low for listen.max_connections",
            limit=limit,
            needed=needed,
            max_connections=max_connections,
            connections_possible=max(0, (limit - FILES_RESERVED) // FILES_A_SESSION) * workers,
            hint="raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of"
            " a container), or lower listen.max_connections",
        )


def starting_max(max_connections: int, workers: int = 1) -> int:
    """Return how many connections may be starting at a time in one process, so that they leave the
    sessions, the admin address and the calls to the workspace their files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return STARTING_MAX
    left = limit - FILES_A_SESSION * math.ceil(max_connections / workers) - FILES_RESERVED
    return max(STARTING_MIN, min(STARTING_MAX, left))


def explain(error: OSError) -> str:
    """Return what keeps the proxy from starting, with what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"{error.strerror or error}. Is another Postgres or proxy there? Choose free ports: "
            "--listen.port 6432 --admin.port 9091"
        )
    return f"cannot start: {error}"
