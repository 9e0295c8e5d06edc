"""The measured values and their arithmetic: medians over rounds, and ratios within a round.

A ratio is the median of the rounds' own ratios, not the ratio of two medians, because what slows
down the machine for a round slows down both systems.
"""

from dataclasses import dataclass, field
from statistics import median

from bench.process_usage import CPUTime


@dataclass(frozen=True, slots=True)
class Quantity:
    """One line of the table: what was run, what was measured, and its unit."""

    case: str
    name: str
    unit: str


@dataclass(slots=True)
class Measurements:
    """Values by quantity and system, one for each round, in the order of the rounds."""

    values: dict[Quantity, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, system: str, quantity: Quantity, value: float) -> None:
        """Add one round's value."""
        self.values.setdefault(quantity, {}).setdefault(system, []).append(value)

    def add_cpu(
        self, system: str, case: str, unit: str, used: CPUTime | None, scale: float
    ) -> None:
        """Add CPU time, also user and system apart, in a unit of which a second has `scale`."""
        if used is None:
            return
        for name, seconds in (
            ("CPU", used.total),
            ("CPU user", used.user),
            ("CPU system", used.system),
        ):
            self.add(system, Quantity(case, name, unit), seconds * scale)

    def find(self, case: str, name: str) -> Quantity | None:
        """Return the first quantity of this name whose case begins so; a size may follow."""
        found = (one for one in self.values if one.case.startswith(case) and one.name == name)
        return next(found, None)

    def median(self, quantity: Quantity | None, system: str) -> float | None:
        """Return the median over the rounds, None if nothing was measured."""
        values = self._of(quantity, system)
        return median(values) if values else None

    def ratio(self, quantity: Quantity | None, system: str, reference: str) -> float | None:
        """Return the median of the rounds' ratios to `reference`, None if there is none."""
        mine, theirs = self._of(quantity, system), self._of(quantity, reference)
        if not mine or len(mine) != len(theirs) or not all(theirs):
            return None
        return median(one / other for one, other in zip(mine, theirs, strict=True))

    def added_ratio(
        self, quantity: Quantity | None, system: str, reference: str, floor: str
    ) -> float | None:
        """Return what the system adds to `floor`, divided by what `reference` adds to it.

        The ratio of the medians of the rounds' differences, because the difference in one round may
        be almost 0. None if nothing was measured, or if the reference adds nothing.
        """
        mine, theirs = (
            self._added(quantity, system, floor),
            self._added(quantity, reference, floor),
        )
        return None if mine is None or theirs is None or theirs <= 0 else mine / theirs

    def _added(self, quantity: Quantity | None, system: str, floor: str) -> float | None:
        values, lowest = self._of(quantity, system), self._of(quantity, floor)
        if not values or len(values) != len(lowest):
            return None
        return median(one - other for one, other in zip(values, lowest, strict=True))

    def _of(self, quantity: Quantity | None, system: str) -> list[float]:
        return [] if quantity is None else self.values.get(quantity, {}).get(system, [])


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    rank = max(1, -int(-share * len(ordered) // 1))  # the ceiling, at least the first
    return ordered[rank - 1]
