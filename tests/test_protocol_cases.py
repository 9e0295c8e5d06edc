"""docs/protocol-cases.md and the tests are one list: every case has a test, no test has another
number; and docs/protocol-states.md is what the tables say.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests import protocol_states

TESTS: Final = Path(__file__).parent
CASES_FILE: Final = TESTS.parent / "docs" / "protocol-cases.md"
NUMBERS: Final = range(1, 56)
_ROW: Final = re.compile(r"^\| W(\d+) \|(.*)\|$", re.MULTILINE)
_NAMED: Final = re.compile(r"test((?:_w\d+)+)_")


def rows() -> list[tuple[int, list[str]]]:
    """Return each row's number and cells, as the document has them."""
    found = _ROW.findall(CASES_FILE.read_text())
    return [(int(number), [cell.strip() for cell in rest.split("|")]) for number, rest in found]


@cache
def numbered_tests() -> dict[int, set[tuple[str, str]]]:
    """Return by number its tests, as file and name; one test may have several numbers."""
    found: defaultdict[int, set[tuple[str, str]]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = _NAMED.match(node.name)
                for number in re.findall(r"\d+", named[1]) if named else ():
                    found[int(number)].add((path.relative_to(TESTS).as_posix(), node.name))
    return dict(found)


def files_of(number: int) -> set[str]:
    """Return the files that have a test of this case."""
    return {file for file, _ in numbered_tests()[number]}


def test_the_document_has_each_case_once_and_in_order() -> None:
    assert [number for number, _ in rows()] == list(NUMBERS)


def test_each_row_says_what_happens_what_is_done_and_where_it_is_proven() -> None:
    for number, cells in rows():
        assert len(cells) == 3, f"W{number}"
        assert all(cells), f"W{number}"


def test_every_case_has_a_test_and_no_test_has_another_number() -> None:
    assert sorted(numbered_tests()) == list(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"W{number}")
def test_a_file_that_a_row_names_has_a_test_of_its_case(number: int) -> None:
    ((_, cells),) = (row for row in rows() if row[0] == number)
    named = set(re.findall(r"`([\w/]+\.py)`", cells[-1]))
    assert named
    assert named <= files_of(number)


def test_pytest_k_wire_runs_a_test_of_every_case() -> None:
    # What -k looks into: the names of the test, its file, and the directories below the root.
    selected = {
        number
        for number, tests in numbered_tests().items()
        if any("wire" in f"{file}/{name}".lower() for file, name in tests)
    }
    assert sorted(set(NUMBERS) - selected) == []


def test_the_states_document_is_up_to_date() -> None:
    written = protocol_states.FILE.read_text()
    assert written == protocol_states.text(), "run: python -m tests.protocol_states"
