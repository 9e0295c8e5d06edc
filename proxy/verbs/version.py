"""`version`: print the version, and whether the relay was compiled."""

from proxy import __version__
from proxy.exit_codes import EXIT_OK
from proxy.native import WHAT_IT_TAKES, WHY_MISSING
from proxy.verbs.syntax import Arguments
from proxy.verbs.verb_table import BUILD


def run(arguments: Arguments) -> int:
    """Print the version alone, or with --build whether the relay was compiled too."""
    print(__version__)
    if arguments.has(BUILD):
        built = f"not built ({WHY_MISSING}). {WHAT_IT_TAKES}" if WHY_MISSING else "built"
        print(f"compiled relay: {built}")
    return EXIT_OK
