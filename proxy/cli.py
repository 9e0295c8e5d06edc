"""The command line: choose the verb, report wrong usage and configuration errors.

For: from arguments to an exit code (`exit_codes`). Not for: what a verb takes (`verbs.verb_table`)
or does (`verbs`).

Invariant: no verb imports what only another needs. Serving imports an event loop, an HTTP server
and more, half a second of CPU time; a health check that waits needs none of it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Final

from proxy.config import ConfigurationError, load
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.verbs.stderr import wrong_usage
from proxy.verbs.syntax import (
    END_OF_FLAGS,
    PROGRAM,
    Arguments,
    UnknownFlags,
    UsageError,
    one_of,
    take_verb,
)
from proxy.verbs.verb_table import VERBS

_HELP: Final = {"--help", "-h"}
_VERSION: Final = {"--version", "-V"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except UnknownFlags as error:
        wrong_usage(str(error))
        try:
            if error.settings is not None:
                load(error.settings, os.environ)
        except ConfigurationError as also:
            _print_problems(also)
        return EXIT_USAGE
    except UsageError as error:
        return wrong_usage(str(error))
    except ConfigurationError as error:
        return _print_problems(error)
    except BrokenPipeError:  # what reads the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return EXIT_FAILURE


def _run(arguments: list[str]) -> int:
    """Run the verb that the arguments name. Raises UsageError and ConfigurationError."""
    if arguments[:1] in ([], ["help"]):
        arguments = [*arguments[1:], "--help"]
    flags = set(takewhile(lambda argument: argument != END_OF_FLAGS, arguments))
    verb, rest = take_verb(arguments, VERBS, _HELP | _VERSION)
    if flags & _HELP:
        return _help(verb, rest)
    if not verb and flags & _VERSION:
        verb, rest = "version", []
    if not verb:
        raise UsageError(f"a verb is needed: {one_of(VERBS)}")
    if verb == "shards":  # which has verbs of its own
        shards: Callable[[Sequence[str]], int] = import_module("proxy.verbs.shards").run
        return shards(rest)
    given = Arguments.parse(rest, VERBS[verb])
    run: Callable[[Arguments], int] = import_module(f"proxy.verbs.{verb}").run
    return run(given)


def _print_problems(error: ConfigurationError) -> int:
    print(f"{PROGRAM}: the configuration is not valid", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    return EXIT_USAGE


def _help(verb: str, rest: Sequence[str]) -> int:
    from proxy.verbs.help import help_of, overview  # noqa: PLC0415 - `wait` needs none

    if verb == "shards":
        text: str = import_module("proxy.verbs.shards").help_of_verb(rest)
    else:
        text = help_of(VERBS[verb]) if verb else overview(VERBS)
    print(text, end="")
    return EXIT_OK
