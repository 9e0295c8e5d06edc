"""`version`: which one this is, and what was compiled of it."""

from collections.abc import Sequence

from proxy import __version__
from proxy.exit_codes import EXIT_OK
from proxy.native import WHY_MISSING
from proxy.verbs.telling import wrong_usage

_BUILD = ["--build"]


def run(arguments: Sequence[str]) -> int:
    """Print the version and nothing else, or with --build what was built as well."""
    if arguments and list(arguments) != _BUILD:
        return wrong_usage("version takes no argument but --build")
    print(__version__)
    if arguments:
        print(
            f"compiled relay: not built ({WHY_MISSING})" if WHY_MISSING else "compiled relay: built"
        )
    return EXIT_OK
