"""What was measured, and the arithmetic on it: medians over rounds, and ratios within a round.

A ratio is the median of the rounds' own ratios, not the ratio of two medians: what slows the
machine down for a round slows both contenders.
"""

from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True, slots=True)
class Quantity:
    """One line of the table: what was done, and what was counted."""

    case: str
    name: str
    unit: str


@dataclass(slots=True)
class Readings:
    """Values by quantity and contender, one a round, in the order of the rounds."""

    values: dict[Quantity, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, contender: str, quantity: Quantity, value: float) -> None:
        """Keep one round's value."""
        self.values.setdefault(quantity, {}).setdefault(contender, []).append(value)

    def median(self, quantity: Quantity, contender: str) -> float | None:
        """Return the median over the rounds, None where nothing was measured."""
        values = self.values.get(quantity, {}).get(contender)
        return median(values) if values else None

    def ratio(self, quantity: Quantity, contender: str, reference: str) -> float | None:
        """Return the median of the rounds' ratios to `reference`, None where there is none."""
        values = self.values.get(quantity, {})
        mine, theirs = values.get(contender, []), values.get(reference, [])
        if not mine or len(mine) != len(theirs) or not all(theirs):
            return None
        return median(one / other for one, other in zip(mine, theirs, strict=True))


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    rank = max(1, -int(-share * len(ordered) // 1))  # the ceiling, at least the first
    return ordered[rank - 1]
