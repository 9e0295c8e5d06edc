"""The exit codes of the program.

For: one list, below every module that ends the program. Not for: the cause; that is in the log.
"""

from typing import Final

# Success, including a clean drain after SIGTERM or SIGINT.
EXIT_OK: Final = 0
# A failure while running.
EXIT_FAILURE: Final = 1
# A usage or configuration error; every problem is reported at once.
EXIT_USAGE: Final = 2
# The drain timed out, and sessions were cut.
EXIT_CUT: Final = 3
# An operation on a shard map is left pending; its id is printed.
EXIT_PENDING: Final = 4
# The catalogue and a shard differ: `shards verify` has printed where.
EXIT_DIFFERENCES: Final = 5
