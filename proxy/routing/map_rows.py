"""A shard map as it is written: rows of bounds and target, from TOML tables or lines of CSV.

Not for what the texts mean (`building`), and not for opening a file: the lines come in.

Invariant: whatever is wrong with a row goes to `Problems` with the row's number, and reading goes
on, so that one start reports them all.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from proxy.routing.shard_map import Kind

# What is wrong with every line of a large file would fill a log; the first ones tell the story.
PROBLEMS_SHOWN_MAX: Final = 20


class MapError(Exception):
    """A shard map that cannot be used, with all that is wrong with it, a sentence each."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Problems:
    """Collects what is wrong: the first PROBLEMS_SHOWN_MAX in words, the others by number."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        """Keep a problem: a sentence that begins with its place."""
        self._count += 1
        if self._count <= PROBLEMS_SHOWN_MAX:
            self._shown.append(problem)

    def check(self) -> None:
        """Raise MapError if there were any."""
        unshown = self._count - len(self._shown)
        if self._count:
            raise MapError((*self._shown, *([f"and {unshown} more"] if unshown else [])))


class Row(NamedTuple):
    """One mapping as written. A list's key stands in `low`; a bound that is left open is empty."""

    number: int
    low: str
    high: str
    target: str


def columns(kind: Kind) -> tuple[str, ...]:
    """Return the names that a row of this kind has; all but low and high are required."""
    return ("key", "target") if kind is Kind.LIST else ("low", "high", "target")


def rows_from_tables(
    tables: Iterable[Mapping[str, object]], kind: Kind, problems: Problems
) -> Iterator[Row]:
    """Yield the rows of tables such as TOML has them: strings and integers. Places count from 1."""
    known = columns(kind)
    required = [name for name in known if name not in ("low", "high")]
    for number, table in enumerate(tables, 1):
        faults = [f"{name} is not one of {', '.join(known)}" for name in table if name not in known]
        faults += [f"{name} is missing" for name in required if name not in table]
        faults += [
            f"{name} is neither a string nor an integer"
            for name, value in table.items()
            if not isinstance(value, str | int) or isinstance(value, bool)
        ]
        for fault in faults:
            problems.add(f"mapping {number}: {fault}")
        if not faults:
            low, high = table.get(known[0], ""), "" if len(known) == 2 else table.get("high", "")
            yield Row(number, str(low), str(high), str(table["target"]))


def rows_from_csv(lines: Iterable[str], kind: Kind, problems: Problems) -> Iterator[Row]:
    """Yield the rows of a CSV file with a head line that names its columns, in any order.

    Places are line numbers. Empty lines are passed over.
    """
    reader = csv.reader(lines, strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        known = columns(kind)
        strange = set(head) - set(known) or set(known) - {"low", "high"} - set(head)
        if strange or len(set(head)) != len(head):
            problems.add(f"line 1: the columns are not {','.join(known)}")
            return
        # Behind the row's own fields stands an empty one, for a column that is not there.
        low, high, target = (
            head.index(name) if name in head else len(head) for name in (known[0], "high", "target")
        )
        for fields in reader:
            if len(fields) == len(head):
                fields.append("")
                yield Row(reader.line_num, fields[low], fields[high], fields[target])
            elif fields:
                fault = f"{len(fields)} fields, the head line has {len(head)}"
                problems.add(f"line {reader.line_num}: {fault}")
    except csv.Error as error:
        problems.add(f"line {reader.line_num}: {error}")
