"""The command line: verbs and exit codes.

0  all well, a clean drain after SIGTERM or SIGINT included
1  failure while running
2  usage or configuration error; every problem at once
3  the drain timed out and sessions were cut
"""

import asyncio
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Final

import uvloop

from proxy import __version__
from proxy.app import App, serving
from proxy.check import as_line, check
from proxy.config import (
    ConfigurationError,
    LogSettings,
    Settings,
    effective_toml,
    load,
    load_settings,
)
from proxy.demo import DemoError, demonstrating, greeting
from proxy.observe.logs import configure_logging, get_logger

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_CUT: Final = 3

USAGE: Final = """\
usage: lakebase-auth-proxy VERB [--config FILE] [--SECTION.KEY VALUE ...]

  run       serve: local Postgres clients on one side, Databricks Lakebase on the other
  check     walk the whole way once and say what is wrong and how to mend it (--json)
  demo      the whole system on this machine, nothing to install or sign up for
  version   print the version

Every key of config.example.toml is a flag (--listen.port 6000) and an environment variable
(LAKEBASE_PROXY_LISTEN__PORT=6000). A flag beats the environment, which beats the file.
run and check with --print-config print the values in force and where each came from.
"""

_log = get_logger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help") or (verb in _VERBS and {"--help", "-h"} & set(rest)):
        print(USAGE, end="")
        return EXIT_OK
    run = _VERBS.get(verb)
    if run is None:
        print(f"lakebase-auth-proxy: there is no verb {verb!r}\n\n{USAGE}", file=sys.stderr, end="")
        return EXIT_USAGE
    try:
        return run(rest)
    except ConfigurationError as error:
        print("lakebase-auth-proxy: the configuration is not valid", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        return EXIT_USAGE


def _version(arguments: Sequence[str]) -> int:
    if arguments:
        print("lakebase-auth-proxy: version takes no argument", file=sys.stderr)
        return EXIT_USAGE
    print(__version__)
    return EXIT_OK


_PRINT_CONFIG: Final = "--print-config"


def _print_config(arguments: Sequence[str]) -> int:
    """Print the values in force. It shows what there is, so it asks for nothing that is missing."""
    flags = [argument for argument in arguments if argument != _PRINT_CONFIG]
    print(effective_toml(load(flags, os.environ)), end="")
    return EXIT_OK


def _run(arguments: Sequence[str]) -> int:
    if _PRINT_CONFIG in arguments:
        return _print_config(arguments)
    settings = load_settings(arguments, os.environ, upstream_required=True)
    return _serve(settings, _serve_lakebase)


def _check(arguments: Sequence[str]) -> int:
    as_json = "--json" in arguments
    flags = [argument for argument in arguments if argument != "--json"]
    if _PRINT_CONFIG in flags:
        return _print_config(flags)
    settings = load_settings(flags, os.environ, upstream_required=True)

    async def walk(settings: Settings) -> int:
        steps = []
        async for step in check(settings):
            steps.append(step)
            if not as_json:
                print(as_line(step), flush=True)
        good = all(step.ok for step in steps)
        if as_json:
            print(json.dumps({"ok": good, "steps": [asdict(step) for step in steps]}))
        return EXIT_OK if good else EXIT_FAILURE

    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return _serve(quiet, walk)


def _demo(arguments: Sequence[str]) -> int:
    # The guide's variables point at a real Lakebase: the demo has its own.
    own = {name: value for name, value in os.environ.items() if name.startswith("LAKEBASE_PROXY_")}
    settings = load_settings(arguments, {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **own})
    return _serve(settings, _serve_demo)


_VERBS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "run": _run,
    "check": _check,
    "demo": _demo,
    "version": _version,
}


Program = Callable[[Settings], Coroutine[None, None, int]]


def _serve(settings: Settings, program: Program) -> int:
    """Run a program that serves until it is told to stop; say what keeps it from starting."""
    configure_logging(format=settings.log.format, level=settings.log.level)
    _raise_file_limit()
    try:
        return uvloop.run(program(settings))
    except asyncio.CancelledError:
        return EXIT_OK  # told to stop before it served
    except ImportError as error:
        return _fail(f"{error}. For the demo: pip install 'lakebase-auth-proxy[demo]'")
    except DemoError as error:
        return _fail(f"the demo cannot start: {error}")
    except OSError as error:
        return _fail(_explain(error))


def _raise_file_limit() -> None:
    """Use all the file descriptors that we may have: a session takes two, and the usual soft limit
    of 1024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems say "unlimited" and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Signals:
    """SIGTERM and SIGINT. Until somebody waits for one, the first ends the start of the program."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrive, number)

    async def next(self) -> signal.Signals:
        """Return the next one."""
        self._starting = None
        return await self._arrived.get()

    def _arrive(self, number: signal.Signals) -> None:
        self._arrived.put_nowait(number)
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None  # what was begun is undone undisturbed


async def _serve_lakebase(settings: Settings) -> int:
    signals = _Signals()
    async with serving(settings) as app:
        return await _until_stopped(app, settings, signals)


async def _serve_demo(settings: Settings) -> int:
    signals = _Signals()
    async with demonstrating(settings) as (app, lakebase):
        print(greeting(app, lakebase), flush=True)
        return await _until_stopped(app, settings, signals)


async def _until_stopped(app: App, settings: Settings, signals: _Signals) -> int:
    """Wait for SIGTERM or SIGINT, then drain. A second signal cuts what is left at once."""
    first = await signals.next()
    _log.info("draining", signal=first.name)
    async with asyncio.TaskGroup() as tasks:
        impatience = tasks.create_task(_cut_at_second_signal(app, signals))
        cut = await app.drain(settings.shutdown.drain_seconds)
        if impatience.done():
            cut = impatience.result()
        impatience.cancel()
    _log.info("stopped", sessions_cut=cut)
    return EXIT_CUT if cut else EXIT_OK


async def _cut_at_second_signal(app: App, signals: _Signals) -> int:
    await signals.next()
    return await app.drain(0)


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{error.strerror or error}. Is another Postgres or proxy there? Choose free ports: "
            "--listen.port 6432 --admin.port 9091"
        )
    return f"cannot start: {error}"


def _fail(sentence: str) -> int:
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_FAILURE
