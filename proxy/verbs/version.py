"""`version`: print the version, and whether the relay was compiled."""

from collections.abc import Sequence

from proxy import __version__
from proxy.exit_codes import EXIT_OK
from proxy.native import WHAT_IT_TAKES, WHY_MISSING
from proxy.verbs.stderr import wrong_usage

_BUILD = ["--build"]


def run(arguments: Sequence[str]) -> int:
    """Print the version alone, or with --build whether the relay was compiled too."""
    if arguments and list(arguments) != _BUILD:
        return wrong_usage("version takes no argument but --build")
    print(__version__)
    if arguments:
        built = f"not built ({WHY_MISSING}). {WHAT_IT_TAKES}" if WHY_MISSING else "built"
        print(f"compiled relay: {built}")
    return EXIT_OK
