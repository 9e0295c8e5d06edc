"""What is wrong with a configuration, said once for all of it.

For: sentences that name the key, the place it was given in and the value's problem. Not for:
finding them.

Invariant: no value of a secret is in a problem; whoever makes one sees to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one key: its path, where and how it was given (if it was), and why."""

    key: str
    text: str
    given_as: str = ""

    def __str__(self) -> str:
        place = f" ({self.given_as})" if self.given_as else ""
        return f"{self.key}{place}: {self.text}"


class ConfigurationError(Exception):
    """The settings cannot be used: every problem of every source. No secret is in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))
