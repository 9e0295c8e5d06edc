"""Reading the configuration again while sessions run: SIGHUP, `POST /reload`, and watched files.

For: one reload after the other, and what became of it. Not for: what changes (`App.reload`).

Invariants: an invalid configuration changes nothing. Requests that come before a reload has begun
share it. Once `run` is cancelled, nothing is reloaded any more.
"""

import asyncio
import time
from typing import Final

from proxy.blocking import BlockingCalls, NoThreadStarted
from proxy.config import ConfigurationError, Settings, named_files
from proxy.file_stamp import Stamp, stamp_if_found
from proxy.observe.admin_state import NOT_SERVING, ReloadOutcome, ReloadResult
from proxy.observe.facts import Configuration
from proxy.observe.logs import get_logger
from proxy.observe.systemd import READY, notify, reloading
from proxy.routing.router import Router
from proxy.server.app import App
from proxy.server.router_factory import RELOAD_SECONDS_MAX, Reread, reread_in_thread

CONFIGURATION_WARNING: Final = "configuration warning"
# Between two looks at the watched files. A change is read when it has stayed for so long, so that a
# file that is being written is not read by half.
WATCH_SECONDS: Final = 2.0
# A disk that does not answer is asked again at the next look.
_STAMP_SECONDS_MAX: Final = 5.0
# A request gets its answer within the time of its connection. A reload may take longer.
_ANSWER_SECONDS_MAX: Final = 8.0
_NOT_RELOADED: Final = "not reloaded; the configuration stays as it was"

_log = get_logger(__name__)

Stamps = dict[str, Stamp | None]
"""The stamps of files by their names; None for a file that is not there."""


class Reloads:
    """Asks for reloads, and carries them out."""

    def __init__(
        self,
        settings: Settings,
        reread: Reread,
        config_file: str = "",
        *,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        """`settings` have just been read, from `config_file` if it is not empty."""
        self._reread = reread
        self._config_file = config_file
        self._watch_seconds = watch_seconds
        self._asked = asyncio.Event()
        self._next = _new_future()
        self._is_running = False
        self._threads = BlockingCalls(
            "reload"
        )  # daemons: a file that is not answered delays no exit
        self._read_stamps = self._stamps_of(settings)

    def ask(self) -> None:
        """Start a reload, or the next one if one is under way."""
        self._asked.set()

    async def reload(self) -> ReloadOutcome:
        """Do `ask`, and return what became of it, or that this is not known yet."""
        if not self._is_running:
            return NOT_SERVING
        self.ask()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                return await asyncio.shield(self._next)
        except TimeoutError:
            return ReloadOutcome(ReloadResult.PENDING)

    async def run(self, app: App) -> None:
        """Reload whenever it is asked for or a watched file has changed, until cancelled."""
        app.reload_configuration = self.reload
        app.configuration = Configuration(self._config_file)
        self._is_running = True
        current = self._next
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(app))
                while True:  # ends with the proxy
                    await self._asked.wait()
                    self._asked.clear()
                    current, self._next = self._next, _new_future()
                    current.set_result(await self._reload(app))
        finally:
            self._is_running = False
            for future in (current, self._next):
                if not future.done():
                    future.set_result(NOT_SERVING)

    async def _reload(self, app: App) -> ReloadOutcome:
        if is_started := app.started:  # else READY would end the start and not the reload
            notify(reloading())
        outcome = await self._outcome(app)
        if is_started:
            notify(READY)
        app.configuration = Configuration(self._config_file, time.time(), outcome.result)
        if outcome.result is not ReloadResult.RELOADED:
            app.metrics.reload_failed()
        return outcome

    async def _outcome(self, app: App) -> ReloadOutcome:
        """Reload, and log what became of it."""
        try:
            # First, so that a later write is noticed.
            self._read_stamps = await self._present_stamps(app.settings)
            settings, router = await reread_in_thread(self._threads, self._reread)
            return await _apply(app, settings, router)
        except ConfigurationError as error:
            problems = tuple(map(str, error.problems))
            _log.error(_NOT_RELOADED, problems=list(problems))
            return ReloadOutcome(ReloadResult.REFUSED, problems=problems)
        except TimeoutError:
            text = f"reading it took more than {RELOAD_SECONDS_MAX:g} s"
            _log.error(_NOT_RELOADED, problems=[text])
        except Exception:
            # A bug of ours must cost one reload, not all sessions.
            text = "internal error; see the log"
            _log.exception(_NOT_RELOADED)
        return ReloadOutcome(ReloadResult.FAILED, problems=(text,))

    # -- watched files ---------------------------------------------------------------------------

    async def _watch(self, app: App) -> None:
        """Ask for a reload when a file has changed since it was read, and stays as it is."""
        before: Stamps | None = None
        while True:  # ends with the proxy
            await asyncio.sleep(self._watch_seconds)
            if not app.settings.reload.watch:
                continue
            try:
                present = await self._present_stamps(app.settings)
            except (TimeoutError, NoThreadStarted):
                continue
            if present == before and present != self._read_stamps:
                self._read_stamps = present  # asked for once, whatever becomes of it
                _log.info("a watched file has changed")
                self.ask()
            before = present

    async def _present_stamps(self, settings: Settings) -> Stamps:
        return await self._threads.run(lambda: self._stamps_of(settings), _STAMP_SECONDS_MAX)

    def _stamps_of(self, settings: Settings) -> Stamps:
        files = [self._config_file, *named_files(settings)]
        return {file: stamp_if_found(file) for file in files if file}


async def _apply(app: App, settings: Settings, router: Router) -> ReloadOutcome:
    """Serve new sessions by these settings. Raises ConfigurationError."""
    warned = app.settings.warnings()
    changes = await app.reload_when_loaded(settings, router)
    result, problems = ReloadResult.RELOADED, list[str]()
    if app.workers is not None and not await app.workers.reload():
        result = ReloadResult.FAILED
        problems.append("a worker did not take the configuration; the log says which one and why")
    _log.info("reloaded", changed=changes.reloadable, **app.snapshot.map_facts)
    if changes.restart:
        _log.warning("restart to let these take effect", keys=changes.restart)
    for warning in app.settings.warnings():
        if warning not in warned:
            _log.warning(CONFIGURATION_WARNING, warning=warning)
    return ReloadOutcome(result, changes.reloadable, changes.restart, tuple(problems))


def _new_future() -> asyncio.Future[ReloadOutcome]:
    return asyncio.get_running_loop().create_future()
