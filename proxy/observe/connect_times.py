"""How long connects to upstreams took that succeeded, as counts between bounds.

For: percentiles over any time between two readings, and over several processes, because counts can
be subtracted and added. Not for: the phases of a connect (`target_stats`, `metrics`).

Invariant: a connect that failed is in none of them, so that it is never a fast one.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

# From 1 ms to a minute in steps of a quarter: a percentile is wrong by no more than that.
BOUNDS: Final = tuple(0.001 * 1.25**step for step in range(51))

Counts = Sequence[int]
"""How many connects took up to each bound, and longer than the last one."""

NO_CONNECTS: Final[Counts] = (0,) * (len(BOUNDS) + 1)


def index_of(seconds: float) -> int:
    """Return the place of a time in `Counts`."""
    return bisect_left(BOUNDS, seconds)


def add_counts(one: Counts, other: Counts) -> Counts:
    """Return the sum of both."""
    return tuple(a + b for a, b in zip(one, other, strict=True))


def since(before: Counts, now: Counts) -> Counts:
    """Return the connects between two readings."""
    return tuple(max(0, b - a) for a, b in zip(before, now, strict=True))


def percentile(counts: Counts, share: float) -> float | None:
    """Return the bound that this share of the connects did not exceed; None without connects."""
    wanted = sum(counts) * share
    if not wanted:
        return None
    reached = next(at for at, count in enumerate(accumulate(counts)) if count >= wanted)
    return BOUNDS[min(reached, len(BOUNDS) - 1)]
