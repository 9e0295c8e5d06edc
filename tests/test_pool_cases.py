"""docs/pool-cases.md and the tests are one list, on both relays and two versions of PostgreSQL."""

from typing import Final

import pytest

from tests.support.cases import TESTS, files_of, named_files, numbered_tests
from tests.support.cases import rows as rows_of

DOCUMENT: Final = TESTS.parent / "docs" / "pool-cases.md"
ROWS: Final = rows_of(DOCUMENT, "P")
# P51 to P70 are of a mode that does not exist.
NUMBERS: Final = [*range(1, 51), *range(71, 79)]
# Tests that relay without a server, on both relays.
RELAYED: Final = ("native/", "session/test_kept_upstream.py")
CI: Final = (TESTS.parent / ".ci" / "run").read_text()
MAKEFILE: Final = (TESTS.parent / "Makefile").read_text()


def twice_in_ci(file: str, name: str) -> bool:
    """Return whether CI runs a test a second time, with Python's relay on the newest server."""
    return file.startswith("e2e/") and "pool" in f"{file}/{name}".lower()


def test_ci_runs_pools_a_second_time() -> None:
    steps = ("make pure ", "make --jobs=2 --output-sync=target pure-checks\n", "make setup ")
    places = [CI.index(f"\n{step}") for step in steps]
    assert places == sorted(places)
    assert "\npure-checks: pure-wire pure-pools\n" in MAKEFILE
    command = 'TEST_SHARDS_VERSION=18 $(BIN)/pytest -m e2e tests/e2e -q -k "pool and not soak"'
    assert f"\npure-pools: not-compiled\n\t{command}\n" in MAKEFILE


def test_every_case_has_a_row_and_tests_and_no_test_has_another_number() -> None:
    assert [number for number, _ in ROWS] == NUMBERS
    assert sorted(numbered_tests("P")) == NUMBERS


@pytest.mark.parametrize(("number", "cells"), ROWS, ids=[f"P{number}" for number, _ in ROWS])
def test_a_row_says_what_holds_where_and_names_files_with_its_tests(
    number: int, cells: list[str]
) -> None:
    holds, relays, servers, proven = cells
    assert holds
    assert (named := named_files(proven))
    assert named <= files_of("P", number)
    files = files_of("P", number)
    if any(twice_in_ci(*test) for test in numbered_tests("P")[number]):
        assert (relays, servers) == ("both", "16, 18")
    elif any(file.startswith("e2e/") for file in files):
        assert (relays, servers) == ("compiled", "16")
    else:
        relayed = any(file.startswith(RELAYED) for file in files)
        assert (relays, servers) == ("both" if relayed else "-", "-")
