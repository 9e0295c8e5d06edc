"""Numbered cases: the rows of a document's table, and the tests that carry their numbers.

A case is a letter and a number: W12, S48, P30 or R4. A test of it has that in front of its name
(`test_w12_...`, `test_w20_s48_...`). Not for what a document says; the tests of each look.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
_NAMED: Final = re.compile(r"test((?:_[prsw]\d+)+)_")


def rows(document: Path, letter: str) -> list[tuple[int, list[str]]]:
    """Return each row's number and its other cells, as the document has them."""
    found = re.findall(rf"^\| {letter}(\d+) \|(.*)\|$", document.read_text(), re.MULTILINE)
    return [(int(number), [cell.strip() for cell in rest.split("|")]) for number, rest in found]


@cache
def numbered_tests(letter: str) -> dict[int, set[tuple[str, str]]]:
    """Return by number its tests, as file and name; one test may have several numbers."""
    found: defaultdict[int, set[tuple[str, str]]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = _NAMED.match(node.name)
                for number in re.findall(rf"_{letter.lower()}(\d+)", named[1]) if named else ():
                    found[int(number)].add((path.relative_to(TESTS).as_posix(), node.name))
    return dict(found)


def files_of(letter: str, number: int) -> set[str]:
    """Return the files that have a test of this case."""
    return {file for file, _ in numbered_tests(letter)[number]}


def named_files(cell: str) -> set[str]:
    """Return the test files that a cell names."""
    return set(re.findall(r"`([\w/]+\.py)`", cell))
