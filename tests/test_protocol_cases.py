"""docs/protocol-cases.md and the tests are one list: every case has a test, no test has another
number; and docs/protocol-states.md is what the tables say.
"""

from typing import Final

import pytest

from tests import protocol_states
from tests.support.cases import TESTS, files_of, named_files, numbered_tests
from tests.support.cases import rows as rows_of

CASES_FILE: Final = TESTS.parent / "docs" / "protocol-cases.md"
NUMBERS: Final = range(1, 56)


def rows() -> list[tuple[int, list[str]]]:
    return rows_of(CASES_FILE, "W")


def test_the_document_has_each_case_once_and_in_order() -> None:
    assert [number for number, _ in rows()] == list(NUMBERS)


def test_each_row_says_what_happens_what_is_done_and_where_it_is_proven() -> None:
    for number, cells in rows():
        assert len(cells) == 3, f"W{number}"
        assert all(cells), f"W{number}"


def test_every_case_has_a_test_and_no_test_has_another_number() -> None:
    assert sorted(numbered_tests("W")) == list(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"W{number}")
def test_a_file_that_a_row_names_has_a_test_of_its_case(number: int) -> None:
    ((_, cells),) = (row for row in rows() if row[0] == number)
    named = named_files(cells[-1])
    assert named
    assert named <= files_of("W", number)


def test_pytest_k_wire_runs_a_test_of_every_case() -> None:
    # What -k looks into: the names of the test, its file, and the directories below the root.
    selected = {
        number
        for number, tests in numbered_tests("W").items()
        if any("wire" in f"{file}/{name}".lower() for file, name in tests)
    }
    assert sorted(set(NUMBERS) - selected) == []


def test_the_states_document_is_up_to_date() -> None:
    written = protocol_states.FILE.read_text()
    assert written == protocol_states.text(), "run: python -m tests.protocol_states"
