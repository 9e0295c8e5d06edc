"""`reload`: ask a running proxy to read its configuration again, and print what became of it."""

import os
import sys

from proxy.config import load_settings
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.verbs.admin_client import AdminError, ask_to_reload
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments

# By the words of `observe.admin_state.ReloadResult`.
_WHY_NOT = {
    "refused": "the configuration is not valid; it stays as it was",
    "pending": "the reload takes longer; the log says when it is done",
}


def run(arguments: Arguments) -> int:
    """Ask the proxy that has this configuration. Raises ConfigurationError."""
    try:
        answer = ask_to_reload(load_settings(arguments.flags, os.environ).admin)
    except AdminError as error:
        return fail(str(error))
    result = answer["result"]
    for key in answer["changed"]:
        print(f"changed: {key}")
    for key in answer["restart"]:
        print(f"restart to let it take effect: {key}")
    if result == "reloaded":
        if not (answer["changed"] or answer["restart"]):
            print("nothing has changed")
        return EXIT_OK
    fail(_WHY_NOT.get(result, "not reloaded"))
    for problem in answer["problems"]:
        print(f"  {problem}", file=sys.stderr)
    return EXIT_USAGE if result == "refused" else EXIT_FAILURE
