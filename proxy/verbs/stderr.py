"""One sentence on standard error, and the exit code that goes with it.

For: a verb that cannot do what it was asked for. Not for: the log.
"""

import sys
import textwrap
from typing import Final

from proxy.exit_codes import EXIT_FAILURE, EXIT_USAGE

_LINES: Final = textwrap.TextWrapper(
    80, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
)


def fail(sentence: str) -> int:
    """Print what went wrong. Return the exit code of a failure."""
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_FAILURE


def show_progress(doing: str) -> None:
    """Print what is being done, for a person who waits at a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"{doing} ...", file=sys.stderr, flush=True)


def wrong_usage(sentence: str) -> int:
    """Print how the verb is used, in lines of a terminal. Return the exit code of wrong usage."""
    for line in f"lakebase-auth-proxy: {sentence}".split("\n"):
        print(_LINES.fill(line), file=sys.stderr)
    return EXIT_USAGE
