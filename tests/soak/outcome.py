"""What a soak did, by kind, what took longest, and what was wrong."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_WRONG_SHOWN_MAX: Final = 20


@dataclass
class Outcome:
    """What happened; `wrong` has a sentence for each thing that must not."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    longest_seconds: dict[str, float] = field(default_factory=dict)  # by what was measured
    wrong: list[str] = field(default_factory=list)

    def longest(self, what: str, seconds: float) -> None:
        """Keep the longest time."""
        self.longest_seconds[what] = max(self.longest_seconds.get(what, 0.0), seconds)

    def bounded(self, what: str, seconds: float, seconds_max: float, who: object) -> None:
        """Keep the longest time; over its bound it is wrong."""
        self.longest(what, seconds)
        if seconds > seconds_max:
            self.wrong.append(f"{what}: {seconds:.1f} s, not {seconds_max:g} s: {who}")

    def missing(self, kinds: Iterable[str]) -> list[str]:
        """Return which of these did not happen."""
        return [kind for kind in kinds if not self.counts[kind]]

    def __str__(self) -> str:
        counts = [f"  {count:>7,} {what}" for what, count in sorted(self.counts.items())]
        times = [f"  {s:>7.2f} s {what}" for what, s in sorted(self.longest_seconds.items())]
        wrong = [f"  WRONG: {sentence}" for sentence in self.wrong[:_WRONG_SHOWN_MAX]]
        return "\n".join((f"seed {self.seed}, {len(self.wrong)} wrong", *counts, *times, *wrong))
