"""What was measured, and the arithmetic on it: medians over rounds, and ratios within a round.

A ratio is the median of the rounds' own ratios, not the ratio of two medians: what slows the
machine down for a round slows both contenders.
"""

from dataclasses import dataclass, field
from statistics import median

from bench.accounting import CPU


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

    def add_cpu(
        self, contender: str, case: str, unit: str, spent: CPU | None, scale: float
    ) -> None:
        """Keep CPU time, user and system apart, in units of which a second has `scale`."""
        if spent is None:
            return
        for name, seconds in (
            ("CPU", spent.total),
            ("CPU user", spent.user),
            ("CPU system", spent.system),
        ):
            self.add(contender, Quantity(case, name, unit), seconds * scale)

    def find(self, case: str, name: str) -> Quantity | None:
        """Return the first quantity of this name whose case begins so; a size may follow there."""
        found = (one for one in self.values if one.case.startswith(case) and one.name == name)
        return next(found, None)

    def median(self, quantity: Quantity | None, contender: str) -> float | None:
        """Return the median over the rounds, None where nothing was measured."""
        values = self._of(quantity, contender)
        return median(values) if values else None

    def ratio(self, quantity: Quantity | None, contender: str, reference: str) -> float | None:
        """Return the median of the rounds' ratios to `reference`, None where there is none."""
        mine, theirs = self._of(quantity, contender), self._of(quantity, reference)
        if not mine or len(mine) != len(theirs) or not all(theirs):
            return None
        return median(one / other for one, other in zip(mine, theirs, strict=True))

    def added_ratio(
        self, quantity: Quantity | None, contender: str, reference: str, floor: str
    ) -> float | None:
        """Return how many times what `reference` adds to `floor` the contender adds to it.

        Of the medians of the rounds' differences: a single round's may be next to nothing. None
        where nothing was measured, or where the reference adds nothing.
        """
        mine, theirs = (
            self._added(quantity, contender, floor),
            self._added(quantity, reference, floor),
        )
        return None if mine is None or theirs is None or theirs <= 0 else mine / theirs

    def _added(self, quantity: Quantity | None, contender: str, floor: str) -> float | None:
        values, least = self._of(quantity, contender), self._of(quantity, floor)
        if not values or len(values) != len(least):
            return None
        return median(one - other for one, other in zip(values, least, strict=True))

    def _of(self, quantity: Quantity | None, contender: str) -> list[float]:
        return [] if quantity is None else self.values.get(quantity, {}).get(contender, [])


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    rank = max(1, -int(-share * len(ordered) // 1))  # the ceiling, at least the first
    return ordered[rank - 1]
