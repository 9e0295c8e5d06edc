"""The measured values and their arithmetic: medians over rounds, and ratios of these medians.

A ratio can be checked against the two medians that stand beside it. Every round's value is in the
record, for another arithmetic.
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
    """Values by quantity and system, one or more for each round, in the order of the rounds."""

    values: dict[Quantity, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, system: str, quantity: Quantity, value: float) -> None:
        """Add a round's value."""
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
        """Return the median divided by that of `reference`, None if there is none."""
        mine, theirs = self.median(quantity, system), self.median(quantity, reference)
        return None if mine is None or not theirs else mine / theirs

    def added_ratio(
        self, quantity: Quantity | None, system: str, reference: str, floor: str
    ) -> float | None:
        """Return what the system adds to `floor`, divided by what `reference` adds to it.

        None if nothing was measured, or if the reference adds nothing.
        """
        mine, theirs, lowest = (self.median(quantity, name) for name in (system, reference, floor))
        if mine is None or theirs is None or lowest is None or theirs <= lowest:
            return None
        return (mine - lowest) / (theirs - lowest)

    def _of(self, quantity: Quantity | None, system: str) -> list[float]:
        return [] if quantity is None else self.values.get(quantity, {}).get(system, [])


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    rank = max(1, -int(-share * len(ordered) // 1))  # the ceiling, at least the first
    return ordered[rank - 1]
