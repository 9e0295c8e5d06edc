"""`status`: print what a running proxy does and who is connected, or end a session."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from proxy.config import AdminSettings, load_settings
from proxy.exit_codes import EXIT_OK
from proxy.verbs.admin_client import AdminError, ask_to_end, fetch_sessions, fetch_status
from proxy.verbs.status_report import session_lines, status_lines
from proxy.verbs.stderr import fail
from proxy.verbs.syntax import Arguments, UsageError
from proxy.verbs.verb_table import END, PROCESSES, SESSIONS, WATCH

WATCH_SECONDS: Final = 2.0
# A list of 10,000 takes half a second of CPU, which may be that of a proxy beside it.
_NICENESS: Final = 19
_ID_MAX: Final = 10**18 - 1
_CLEAR: Final = "\x1b[H\x1b[2J"


def run(arguments: Arguments) -> int:
    """Ask the proxy that has this configuration. Raises ConfigurationError and UsageError."""
    number = arguments.number(END.name, 1, _ID_MAX)
    if arguments.has(PROCESSES) and not arguments.has(SESSIONS):
        raise UsageError(f"{PROCESSES.flag} is for {SESSIONS.flag}")
    if number is not None and (arguments.has(SESSIONS) or arguments.has(WATCH)):
        raise UsageError(f"{END.flag} shows nothing: leave {SESSIONS.flag} and {WATCH.flag} out")
    admin = load_settings(arguments.flags, os.environ).admin
    if arguments.has(SESSIONS) or arguments.has(WATCH):
        os.nice(_NICENESS)
    try:
        if number is not None:
            ask_to_end(admin, number)
            ending = {"ok": True, "id": number}
            print(json.dumps(ending) if arguments.as_json else f"session {number} is being ended")
        elif not arguments.has(WATCH):
            print(_shown(admin, arguments))
    except AdminError as error:
        return fail(str(error))
    while arguments.has(WATCH):  # until it is interrupted
        _print_again(admin, arguments)
        time.sleep(WATCH_SECONDS)
    return EXIT_OK


def _print_again(admin: AdminSettings, arguments: Arguments) -> None:
    try:
        shown = _shown(admin, arguments)
    except AdminError as error:  # it may be about to start again
        shown = json.dumps({"error": str(error)}) if arguments.as_json else str(error)
    clear = _CLEAR if sys.stdout.isatty() and not arguments.as_json else ""
    print(f"{clear}{shown}", flush=True)


def _shown(admin: AdminSettings, arguments: Arguments) -> str:
    """Return what is asked for, as text or as one line of JSON. Raises AdminError."""
    status = fetch_status(admin)
    sessions: list[dict[str, Any]] | None = None
    if arguments.has(SESSIONS):
        sessions = list(fetch_sessions(admin, processes=arguments.has(PROCESSES)))
    if arguments.as_json:
        return json.dumps(status if sessions is None else {**status, "open_sessions": sessions})
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines: Iterator[str] = status_lines(status, width)
    if sessions is not None:
        lines = chain(lines, [""], session_lines(sessions, width))
    return "\n".join(lines)
