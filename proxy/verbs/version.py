"""`version`: which one this is."""

from collections.abc import Sequence

from proxy import __version__
from proxy.exit_codes import EXIT_OK
from proxy.verbs.telling import wrong_usage


def run(arguments: Sequence[str]) -> int:
    """Print the version and nothing else."""
    if arguments:
        return wrong_usage("version takes no argument")
    print(__version__)
    return EXIT_OK
