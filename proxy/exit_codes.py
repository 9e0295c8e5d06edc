"""What the program's end says to whoever started it.

For: one list, below everything that ends the program. Not for: why; that is in the log.
"""

from typing import Final

# All well, a clean drain after SIGTERM or SIGINT included.
EXIT_OK: Final = 0
# A failure while running.
EXIT_FAILURE: Final = 1
# Usage or configuration; every problem is said at once.
EXIT_USAGE: Final = 2
# The drain timed out and sessions were cut.
EXIT_CUT: Final = 3
