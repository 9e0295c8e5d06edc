"""The rows of a shard map as written, bounds and target, from TOML tables or lines of CSV.

Not for parsing the bounds (`map_builder`), and not for opening a file: the caller passes the lines.

Invariant: each problem of a row is added to `Problems` with the row's number, and reading
continues, so that one start reports all problems.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from proxy.routing.shard_map import Kind

# A problem in each line of a large file would fill the log; the first ones show the cause.
PROBLEMS_SHOWN_MAX: Final = 20


class MapError(Exception):
    """A shard map that cannot be used; `problems` has a sentence for each problem."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Problems:
    """Collects problems: the text of the first PROBLEMS_SHOWN_MAX, and how many more there are."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        """Add a problem: a sentence that begins with the row's number."""
        self._count += 1
        if self._count <= PROBLEMS_SHOWN_MAX:
            self._shown.append(problem)

    def shown(self) -> tuple[str, ...]:
        """Return the first problems, and how many more there are."""
        unshown = self._count - len(self._shown)
        return (*self._shown, *([f"and {unshown} more"] if unshown else []))

    def check(self) -> None:
        """Raise MapError if there are any problems."""
        if self._count:
            raise MapError(self.shown())


class Row(NamedTuple):
    """One mapping as written. A list's key is in `low`; an unbounded side is empty."""

    number: int
    low: str
    high: str
    target: str


def columns(kind: Kind) -> tuple[str, ...]:
    """Return the columns of a row of this kind; all but low and high are required."""
    return ("key", "target") if kind is Kind.LIST else ("low", "high", "target")


def rows_from_tables(
    tables: Iterable[Mapping[str, object]], kind: Kind, problems: Problems
) -> Iterator[Row]:
    """Yield the rows of TOML tables; values are strings or integers. Row numbers start at 1."""
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


def rows_from_csv(
    lines: Iterable[str], kind: Kind, problems: Problems, *, owner: str = "target"
) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header line that names its columns, in any order.

    Row numbers are line numbers. Empty lines are skipped. `owner` may be written for the column
    `target`.
    """
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        header = ["target" if name == owner else name for name in header]
        known = columns(kind)
        wrong = set(header) - set(known) or set(known) - {"low", "high"} - set(header)
        if wrong or len(set(header)) != len(header):
            names = ",".join(known).replace("target", owner)
            problems.add(f"line 1: the columns are not {names}")
            return
        # An empty field is appended to each row; the columns that are missing refer to it.
        low, high, target = (
            header.index(name) if name in header else len(header)
            for name in (known[0], "high", "target")
        )
        for fields in reader:
            if len(fields) == len(header):
                fields.append("")
                yield Row(reader.line_num, fields[low], fields[high], fields[target])
            elif fields:
                fault = f"{len(fields)} fields, the header line has {len(header)}"
                problems.add(f"line {reader.line_num}: {fault}")
    except csv.Error as error:
        problems.add(f"line {reader.line_num}: {error}")
