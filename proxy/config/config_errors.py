"""What is wrong with a configuration, said once for all of it.

For: sentences that name the key, the place it was given in and the value's problem. Not for:
finding them.

Invariant: no value of a secret is in a problem; whoever makes one sees to it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from proxy.config.toml import split_path, toml_path

# What is wrong with every line of a long table would fill a screen; the first ones tell the story.
PROBLEMS_SHOWN_MAX: Final = 10
_UNKNOWN_NAME: Final = "there is no "


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


def shown_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Return what is to be shown: nothing twice, and of one key no more than the first few."""
    shown: list[Problem] = []
    count = Counter[str]()
    for problem in map(_name_mapping, problems):
        if _is_repeated(problem, shown):
            continue
        count[problem.key] += 1
        if count[problem.key] <= PROBLEMS_SHOWN_MAX:
            shown.append(problem)
    for key, total in count.items():
        if total > PROBLEMS_SHOWN_MAX:
            shown.append(Problem(key, f"and {total - PROBLEMS_SHOWN_MAX} more"))
    return shown


def _is_repeated(problem: Problem, shown: Sequence[Problem]) -> bool:
    """A name that is none is also unknown; and two may find the same mapping's target unknown."""
    return any(
        one.text.startswith(problem.text) or problem.text.startswith(_UNKNOWN_NAME)
        for one in shown
        if (one.key, one.given_as) == (problem.key, problem.given_as)
    )


def _name_mapping(problem: Problem) -> Problem:
    """Name a mapping of a map in words, counted from 1 as whoever reads the map counts them."""
    path = split_path(problem.key)
    match path:
        case ("shard_maps", _, "mappings", number, *column) if number.isdecimal():
            pass
        case _:
            return problem
    # A sentence that names what it is about needs no column in front.
    where = [] if problem.text.startswith(_UNKNOWN_NAME) else column
    text = ": ".join([f"mapping {int(number) + 1}", *where, problem.text])
    return replace(problem, key=toml_path(path[:3]), text=text)
