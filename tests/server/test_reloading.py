"""Reloads: one after the other, what those who ask are told, and which files are watched."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.config import ConfigurationError, Problem, Settings
from proxy.observe.admin_state import ReloadOutcome, ReloadResult
from proxy.server.app import App
from proxy.server.reloading import Reloads
from proxy.server.serving import serving
from tests.support.running import captured_log, eventually

ENDPOINT = "projects/p/branches/b/endpoints/e"
DRAIN = "shutdown.drain_seconds"


def settings(drain_seconds: int, *, watch: bool) -> Settings:
    values = {
        "listen": {"port": 0},
        "admin": {"enabled": False},
        "upstream": {"endpoint": ENDPOINT},
        "shutdown": {"drain_seconds": drain_seconds},
        "reload": {"watch": watch},
    }
    return Settings.model_validate(values)


class Configuration:
    """What the proxy reads: a file with a number, which is refused if it is none."""

    def __init__(self, file: Path, *, watch: bool = False) -> None:
        self.file = file
        self.watch = watch
        self.reads = 0
        self.blocked = threading.Event()
        self.blocked.set()
        self.write("30")

    def write(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def read(self) -> Settings:
        self.reads += 1
        self.blocked.wait()
        try:
            return settings(int(self.file.read_text()), watch=self.watch)
        except ValueError:
            raise ConfigurationError([Problem(DRAIN, "must be a number")]) from None


@asynccontextmanager
async def reloading(configuration: Configuration) -> AsyncIterator[tuple[App, Reloads]]:
    """Serve, with a task that reloads; it is over when the block ends."""
    first = configuration.read()
    reloads = Reloads(first, configuration.read, str(configuration.file), watch_seconds=0.02)
    async with serving(first) as app:
        assert (await app.reload_configuration()).result is ReloadResult.NOT_SERVING
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(reloads.run(app))
            await asyncio.sleep(0)  # it takes requests
            yield app, reloads
            running.cancel()


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    return Configuration(tmp_path / "proxy.toml")


async def test_who_asks_is_told_what_changed_what_waits_and_what_is_wrong(
    configuration: Configuration,
) -> None:
    async with reloading(configuration) as (app, _):
        configuration.write("5")
        outcome = await app.reload_configuration()
        assert outcome == ReloadOutcome(ReloadResult.RELOADED, changed=(DRAIN,))
        assert app.settings.shutdown.drain_seconds == 5
        configuration.write("five")
        outcome = await app.reload_configuration()
        assert outcome.result is ReloadResult.REFUSED
        assert outcome.problems == (f"{DRAIN}: must be a number",)
        assert app.settings.shutdown.drain_seconds == 5
        assert app.metrics.value("reload_failures_total") == 1


async def test_those_who_ask_before_it_begins_share_a_reload(configuration: Configuration) -> None:
    async with reloading(configuration) as (app, reloads):
        reads = configuration.reads
        configuration.blocked.clear()
        first = asyncio.create_task(app.reload_configuration())
        await eventually(lambda: configuration.reads == reads + 1, "the first one reads")
        later = [asyncio.create_task(app.reload_configuration()) for _ in range(5)]
        reloads.ask()  # a signal
        await asyncio.sleep(0)
        configuration.write("5")
        configuration.blocked.set()
        await asyncio.gather(first, *later)
        assert configuration.reads == reads + 2


async def test_an_end_meanwhile_is_told_and_nothing_is_reloaded_after_it(
    configuration: Configuration,
) -> None:
    async with reloading(configuration) as (app, _):
        configuration.write("5")
        configuration.blocked.clear()
        asked = [asyncio.create_task(app.reload_configuration()) for _ in range(2)]
        await eventually(lambda: configuration.reads == 2, "it reads")
    assert [(await one).result for one in asked] == [ReloadResult.NOT_SERVING] * 2
    assert (await app.reload_configuration()).result is ReloadResult.NOT_SERVING
    assert app.settings.shutdown.drain_seconds == 30
    configuration.blocked.set()


async def test_a_bug_costs_one_reload(configuration: Configuration) -> None:
    def fail() -> Settings:
        raise ZeroDivisionError

    async with reloading(configuration) as (app, reloads):
        with captured_log() as log:
            reloads._reread = fail
            outcome = await app.reload_configuration()
        assert outcome.problems == ("internal error; see the log",)
        assert "ZeroDivisionError" in log.above_info()[0]["exception"]
        reloads._reread = configuration.read
        assert (await app.reload_configuration()).result is ReloadResult.RELOADED


async def test_a_watched_file_is_read_when_it_has_changed_and_each_change_once(
    configuration: Configuration,
) -> None:
    configuration.watch = True

    def serves(app: App, drain_seconds: int) -> Callable[[], bool]:
        return lambda: app.settings.shutdown.drain_seconds == drain_seconds

    async with reloading(configuration) as (app, _):
        configuration.write("5")
        await eventually(serves(app, 5), "the file was read")
        reads = configuration.reads
        configuration.write("none")
        await eventually(lambda: app.metrics.value("reload_failures_total") == 1, "it is refused")
        configuration.file.unlink()
        await eventually(lambda: configuration.reads == reads + 2, "its absence is noticed")
        configuration.write("6")
        await eventually(serves(app, 6), "it is read again")
        assert configuration.reads == reads + 3
