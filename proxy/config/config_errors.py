"""The error of a configuration, with every problem in it.

For: a sentence for each problem, with the key, where it was given, and the problem of its value.
Not for: finding problems.

Invariant: a problem contains no value of a secret. The code that creates it takes care of that.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from proxy.config.toml import split_path, toml_path

# Problems of each line in a long table would fill the screen; the first ones are enough.
PROBLEMS_SHOWN_MAX: Final = 10
_UNKNOWN_NAME: Final = "there is no "


@dataclass(frozen=True, slots=True)
class Problem:
    """A key's path, its problem, and where the key was given, if it was."""

    key: str
    text: str
    given_as: str = ""

    def __str__(self) -> str:
        place = f" ({self.given_as})" if self.given_as else ""
        return f"{self.key}{place}: {self.text}"


class ConfigurationError(Exception):
    """The settings are not valid: every problem of every source, without any secret."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def shown_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems to show: none twice, and for each key only the first few."""
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
    """Return whether a problem follows from one that is shown.

    An invalid name is also unknown, and two checks may find that a mapping's target is unknown.
    """
    return any(
        one.text.startswith(problem.text) or problem.text.startswith(_UNKNOWN_NAME)
        for one in shown
        if (one.key, one.given_as) == (problem.key, problem.given_as)
    )


def _name_mapping(problem: Problem) -> Problem:
    """Return the problem with a mapping's position as a word, counted from 1, not in its key."""
    path = split_path(problem.key)
    match path:
        case ("shard_maps", _, "mappings", number, *column) if number.isdecimal():
            pass
        case _:
            return problem
    # This sentence names its subject, and needs no column before it.
    where = [] if problem.text.startswith(_UNKNOWN_NAME) else column
    text = ": ".join([f"mapping {int(number) + 1}", *where, problem.text])
    return replace(problem, key=toml_path(path[:3]), text=text)
