"""The command line: choose the verb, report wrong usage and configuration errors.

For: from arguments to an exit code (`exit_codes`). Not for: what a verb does (`verbs`).

Invariant: no verb imports what only another needs. Serving imports an event loop, an HTTP server
and more, half a second of CPU time; a health check that waits needs none of it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Final

from proxy.config import ConfigurationError
from proxy.exit_codes import EXIT_OK, EXIT_USAGE

# Each is a module of `verbs`.
_VERBS: Final = (
    *(
        "run",
        "exec",
        "check",
        "demo",
        "resolve",
        "shards",
        "wait",
        "reconnect",
        "reload",
        "shutdown",
    ),
    "version",
)

_END_OF_FLAGS: Final = "--"

USAGE: Final = """\
usage: lakebase-auth-proxy VERB [--config FILE] [--SECTION.KEY VALUE ...]

  run       serve local Postgres clients, and connect each of them to Databricks Lakebase
  exec      run a command beside a proxy of its own: exec [flags] -- COMMAND ... (--socket: no
            port; --shard-key KEY: on the shard that has the key)
  check     test every step of a connection; print what fails and how to fix it (--json;
            --all-shards: test every target)
  demo      run the whole system on this machine, with nothing to install or sign up for
  resolve   print where a shard key leads, without connecting: resolve KEY (--json)
  shards    the catalogue of shard maps: shards VERB (init, create, add-shard, show, ...; --json)
  wait      wait until a running proxy is ready (--timeout SECONDS, 30)
  reconnect ask a running proxy to replace the sessions of its pools (upstream.pool)
  reload    ask a running proxy to read its configuration again; print what changed
  shutdown  ask a running proxy to drain and end (it must run with admin.quit)
  version   print the version (--build: also whether the relay was compiled)

Every key of config.example.toml is a flag (--listen.port 6000) and an environment variable
(LAKEBASE_PROXY_LISTEN__PORT=6000). A flag beats the environment, which beats the file.
run and check with --print-config print the values in force and where each came from.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help") or (verb in _VERBS and _wants_help(rest)):
        shown: str = import_module("proxy.verbs.shards").USAGE if verb == "shards" else USAGE
        print(shown, end="")
        return EXIT_OK
    if verb not in _VERBS:
        print(f"lakebase-auth-proxy: there is no verb {verb!r}\n\n{USAGE}", file=sys.stderr, end="")
        return EXIT_USAGE
    run: Callable[[Sequence[str]], int] = import_module(f"proxy.verbs.{verb}").run
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
