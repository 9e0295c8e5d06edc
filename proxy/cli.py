"""The command line: verbs and exit codes.

0  all well, a clean drain after SIGTERM or SIGINT included
1  failure while running
2  usage or configuration error; every problem at once
3  the drain timed out and sessions were cut
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from typing import Final

import uvloop

from proxy import __version__
from proxy.admin_client import AdminError, ask_to_drain, wait_until_ready
from proxy.check import Step, as_line, check
from proxy.config import (
    ConfigurationError,
    LogSettings,
    Settings,
    effective_toml,
    load,
    load_settings,
)
from proxy.demo import DemoError, demonstrating, greeting
from proxy.errors import ProxyError
from proxy.observe.logs import configure_logging
from proxy.process import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_USAGE,
    Signals,
    explain,
    raise_file_limit,
    serve,
    until_stopped,
)
from proxy.routes import map_problems, resolution_facts, resolution_lines, router_of

# What `wait` waits without --timeout.
WAIT_SECONDS: Final = 30.0

USAGE: Final = """\
usage: lakebase-auth-proxy VERB [--config FILE] [--SECTION.KEY VALUE ...]

  run       serve: local Postgres clients on one side, Databricks Lakebase on the other
  check     walk the whole way once and say what is wrong and how to mend it (--json;
            --all-shards: to every target)
  demo      the whole system on this machine, nothing to install or sign up for
  resolve   say where a shard key leads, without connecting: resolve KEY (--json)
  wait      wait until a running proxy is ready (--timeout SECONDS, 30)
  shutdown  ask a running proxy to drain and end (it must run with admin.quit)
  version   print the version

Every key of config.example.toml is a flag (--listen.port 6000) and an environment variable
(LAKEBASE_PROXY_LISTEN__PORT=6000). A flag beats the environment, which beats the file.
run and check with --print-config print the values in force and where each came from.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help") or (verb in _VERBS and _wants_help(rest)):
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


def _wants_help(arguments: Sequence[str]) -> bool:
    flags = takewhile(lambda argument: argument != _END_OF_FLAGS, arguments)
    return not {"--help", "-h"}.isdisjoint(flags)


def _wrong_usage(sentence: str) -> int:
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_USAGE


def _version(arguments: Sequence[str]) -> int:
    if arguments:
        return _wrong_usage("version takes no argument")
    print(__version__)
    return EXIT_OK


_PRINT_CONFIG: Final = "--print-config"
_JSON: Final = "--json"
_END_OF_FLAGS: Final = "--"


def _print_config(arguments: Sequence[str]) -> int:
    """Print the values in force. It shows what there is, so it asks for nothing that is missing."""
    flags = [argument for argument in arguments if argument != _PRINT_CONFIG]
    print(effective_toml(load(flags, os.environ, inspect=[map_problems])), end="")
    return EXIT_OK


def _settings(arguments: Sequence[str]) -> Settings:
    """Return settings that sessions can be served with. Raises ConfigurationError."""
    return load_settings(arguments, os.environ, upstream_required=True, inspect=[map_problems])


def _run(arguments: Sequence[str]) -> int:
    if _PRINT_CONFIG in arguments:
        return _print_config(arguments)
    reread = partial(_settings, arguments)
    return _until_done(reread(), lambda settings: serve(settings, reread))


def _check(arguments: Sequence[str]) -> int:
    if _PRINT_CONFIG in arguments:
        return _print_config(arguments)
    as_json, all_targets = _JSON in arguments, "--all-shards" in arguments
    flags = [argument for argument in arguments if argument not in (_JSON, "--all-shards")]

    async def walk(settings: Settings) -> int:
        Signals()  # which end it quietly
        steps: list[Step] = []
        async for step in check(settings, all_targets=all_targets):
            if not as_json:
                if all_targets and (not steps or steps[-1].target != step.target):
                    print(f"target {step.target}")
                print(as_line(step), flush=True)
            steps.append(step)
        good = all(step.ok for step in steps)
        if as_json:
            print(json.dumps({"ok": good, "steps": [asdict(step) for step in steps]}))
        return EXIT_OK if good else EXIT_FAILURE

    async def walk_or_stop(settings: Settings) -> int:
        try:
            return await walk(settings)
        except asyncio.CancelledError:
            return _fail("check was interrupted")  # 0 would say that all is well

    settings = _settings(flags)
    quiet = settings.model_copy(update={"log": LogSettings(level="error")})
    return _until_done(quiet, walk_or_stop)


def _resolve(arguments: Sequence[str]) -> int:
    """Print what the shard map says of a key, without connecting."""
    key, flags = _take_key(arguments)
    if key is None:
        return _wrong_usage(
            "resolve needs a shard key in front of all flags, or behind --:"
            " lakebase-auth-proxy resolve KEY [flags]"
        )
    as_json, flags = _JSON in flags, [flag for flag in flags if flag != _JSON]
    settings = load_settings(flags, os.environ, inspect=[map_problems])
    try:
        found = router_of(settings).resolve(key)
    except ProxyError as error:
        answer = error.response()
        if as_json:
            words = {"sqlstate": answer.sqlstate, "reason": error.reason, "error": answer.message}
            print(json.dumps({"ok": False, **words}))
            return EXIT_FAILURE
        return _fail(f"{answer.message} (SQLSTATE {answer.sqlstate}, {answer.text(b'D')})")
    if as_json:
        print(json.dumps({"ok": True, **resolution_facts(settings, found)}))
    else:
        print("\n".join(resolution_lines(settings, found)))
    return EXIT_OK


def _take_key(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the key, None if there is none, and the flags.

    A key may be negative: no flag begins with one dash. One that begins with two stands behind --.
    """
    rest = list(arguments)
    if _END_OF_FLAGS in rest:
        at = rest.index(_END_OF_FLAGS)
        del rest[at]
    else:
        at = 1 if rest[:1] == [_JSON] else 0  # the one flag without a value
        if rest[at : at + 1] and rest[at].startswith("--"):
            return None, rest
    return (rest.pop(at) if at < len(rest) else None), rest


def _wait(arguments: Sequence[str]) -> int:
    """Wait until a proxy with this configuration is ready."""
    seconds, flags = _take_timeout(arguments)
    if seconds is None:
        return _wrong_usage("--timeout needs a number of seconds")
    try:
        wait_until_ready(load_settings(flags, os.environ).admin, seconds)
    except AdminError as error:
        return _fail(str(error))
    return EXIT_OK


def _take_timeout(arguments: Sequence[str]) -> tuple[float | None, list[str]]:
    """Return the value of --timeout, None for one that is no number, and the other arguments."""
    rest, seconds = list(arguments), str(WAIT_SECONDS)
    for at, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--timeout":
            seconds = value if equals else " ".join(arguments[at + 1 : at + 2])
            del rest[at : at + (1 if equals else 2)]
            break
    number = float(seconds) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", seconds) else None
    return number, rest


def _shutdown(arguments: Sequence[str]) -> int:
    """Ask a proxy with this configuration to drain and end."""
    try:
        ask_to_drain(load_settings(arguments, os.environ).admin)
    except AdminError as error:
        return _fail(str(error))
    return EXIT_OK


def _demo(arguments: Sequence[str]) -> int:
    # The guide's variables point at a real Lakebase: the demo has its own.
    own = {name: value for name, value in os.environ.items() if name.startswith("LAKEBASE_PROXY_")}
    settings = load_settings(arguments, {"LAKEBASE_PROXY_LOG__LEVEL": "warning", **own})
    return _until_done(settings, _serve_demo)


_VERBS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "run": _run,
    "check": _check,
    "demo": _demo,
    "resolve": _resolve,
    "wait": _wait,
    "shutdown": _shutdown,
    "version": _version,
}


Program = Callable[[Settings], Coroutine[None, None, int]]


def _until_done(settings: Settings, program: Program) -> int:
    """Run a program on an event loop; say what keeps it from starting."""
    configure_logging(format=settings.log.format, level=settings.log.level)
    raise_file_limit()
    try:
        return uvloop.run(program(settings))
    except asyncio.CancelledError:
        return EXIT_OK  # told to stop before it served
    except ImportError as error:
        return _fail(f"{error}. For the demo: pip install 'lakebase-auth-proxy[demo]'")
    except DemoError as error:
        return _fail(f"the demo cannot start: {error}")
    except OSError as error:
        return _fail(explain(error))


async def _serve_demo(settings: Settings) -> int:
    signals = Signals()
    async with demonstrating(settings) as (app, lakebase):
        print(greeting(app, lakebase), flush=True)
        return await until_stopped(app, signals)


def _fail(sentence: str) -> int:
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_FAILURE
