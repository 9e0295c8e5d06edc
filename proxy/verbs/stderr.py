"""What a verb says to a person when it cannot do what it was asked for.

For: one sentence on standard error, with the exit code that goes with it. Not for: the log.
"""

import sys

from proxy.exit_codes import EXIT_FAILURE, EXIT_USAGE


def fail(sentence: str) -> int:
    """Say what went wrong; return the exit code for it."""
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_FAILURE


def wrong_usage(sentence: str) -> int:
    """Say what the verb needs; return the exit code for it."""
    print(f"lakebase-auth-proxy: {sentence}", file=sys.stderr)
    return EXIT_USAGE
