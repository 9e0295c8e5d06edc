"""What the verbs share that connect: settings to serve with, and an event loop.

For: `run`, `check`, `demo`. Not for: verbs that only ask or print, which must start fast.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence

import uvloop

from proxy.config import Settings, effective_toml, load, load_settings
from proxy.exit_codes import EXIT_OK
from proxy.observe.logs import configure_logging, flush_log
from proxy.server.file_limit import raise_file_limit
from proxy.server.process import explain
from proxy.server.router_factory import map_problems
from proxy.verbs.stderr import fail

Program = Callable[[Settings], Coroutine[None, None, int]]
"""Runs on the event loop. Returns the exit code."""


def print_config(flags: Sequence[str]) -> int:
    """Print the values in force. Nothing is required to be set."""
    print(effective_toml(load(flags, os.environ, inspect=[map_problems])), end="")
    return EXIT_OK


def serving_settings(flags: Sequence[str]) -> Settings:
    """Return settings that sessions can be served with. Raises ConfigurationError."""
    return load_settings(flags, os.environ, upstream_required=True, inspect=[map_problems])


def run_on_event_loop(settings: Settings, program: Program) -> int:
    """Run a program and return its exit code; print why it cannot start."""
    configure_logging(**settings.log.model_dump())
    raise_file_limit()
    try:
        return uvloop.run(program(settings))
    except asyncio.CancelledError:
        return EXIT_OK  # asked to stop before it served
    except OSError as error:
        flush_log()  # it comes before the sentence
        return fail(explain(error))
    finally:
        flush_log()
