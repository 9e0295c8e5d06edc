"""Rows from TOML and CSV, and the problems of a row."""

from collections.abc import Iterable

import pytest

from proxy.routing.map_rows import (
    PROBLEMS_SHOWN_MAX,
    MapError,
    Problems,
    Row,
    rows_from_csv,
    rows_from_tables,
)
from proxy.routing.shard_map import Kind


def faults(problems: Problems) -> tuple[str, ...]:
    try:
        problems.check()
    except MapError as error:
        return error.problems
    return ()


def read_csv(lines: Iterable[str], kind: Kind = Kind.RANGE) -> tuple[list[Row], tuple[str, ...]]:
    problems = Problems()
    return list(rows_from_csv(lines, kind, problems)), faults(problems)


def read_tables(
    *tables: dict[str, object], kind: Kind = Kind.RANGE
) -> tuple[list[Row], tuple[str, ...]]:
    problems = Problems()
    return list(rows_from_tables(tables, kind, problems)), faults(problems)


def test_a_table_has_strings_or_integers_and_open_bounds_are_empty() -> None:
    assert read_tables({"low": 1, "high": "2", "target": "eu"}, {"target": "us"}) == (
        [Row(1, "1", "2", "eu"), Row(2, "", "", "us")],
        (),
    )


def test_a_lists_table_has_a_key() -> None:
    tables: list[dict[str, object]] = [{"key": 7, "target": "eu"}]
    assert read_tables(*tables, kind=Kind.LIST) == ([Row(1, "7", "", "eu")], ())


def test_what_is_wrong_with_tables_is_said_of_each() -> None:
    rows, problems = read_tables(
        {"low": 1.5, "high": True, "target": "eu"},
        {"key": "a", "target": "eu"},
        {"low": "1"},
        {"low": "1", "target": "eu"},
    )
    assert rows == [Row(4, "1", "", "eu")]
    assert problems == (
        "mapping 1: low is neither a string nor an integer",
        "mapping 1: high is neither a string nor an integer",
        "mapping 2: key is not one of low, high, target",
        "mapping 3: target is missing",
    )
    _, problems = read_tables({"target": "eu"}, kind=Kind.LIST)
    assert problems == ("mapping 1: key is missing",)


def test_csv_columns_come_in_any_order_and_bounds_may_be_left_out() -> None:
    lines = ["target, high\r\n", "eu,5\r\n", "\r\n", '"u,s",\r\n']
    assert read_csv(lines) == ([Row(2, "", "5", "eu"), Row(4, "", "", "u,s")], ())


def test_a_lists_csv_has_keys() -> None:
    assert read_csv(["key,target", "a b,eu"], Kind.LIST) == ([Row(2, "a b", "", "eu")], ())


@pytest.mark.parametrize(
    ("kind", "head", "columns"),
    [
        (Kind.RANGE, "low,high", "low,high,target"),
        (Kind.RANGE, "low,high,target,target", "low,high,target"),
        (Kind.HASH, "key,target", "low,high,target"),
        (Kind.LIST, "target", "key,target"),
        (Kind.LIST, "low,target", "key,target"),
        (Kind.LIST, "", "key,target"),
    ],
)
def test_a_csv_needs_its_header_line(kind: Kind, head: str, columns: str) -> None:
    assert read_csv([head, "1,2,3"], kind) == ([], (f"line 1: the columns are not {columns}",))


def test_an_empty_csv_has_no_header_line() -> None:
    assert read_csv([]) == ([], ("line 1: the columns are not low,high,target",))


def test_csv_lines_with_other_numbers_of_fields_are_named() -> None:
    rows, problems = read_csv(["low,high,target", "1,2", "1,2,eu", "1,2,eu,us"])
    assert rows == [Row(3, "1", "2", "eu")]
    assert problems == (
        "line 2: 2 fields, the header line has 3",
        "line 4: 4 fields, the header line has 3",
    )


def test_broken_csv_ends_the_reading_with_its_line() -> None:
    rows, problems = read_csv(["low,high,target", "1,2,eu", '"1"x,2,eu', "3,4,eu"])
    assert rows == [Row(2, "1", "2", "eu")]
    assert len(problems) == 1
    assert problems[0].startswith("line 3: ")


def test_many_problems_are_counted_and_the_first_are_shown() -> None:
    problems = Problems()
    for number in range(PROBLEMS_SHOWN_MAX):
        problems.add(f"number {number}")
    assert len(faults(problems)) == PROBLEMS_SHOWN_MAX
    problems.add("one more")
    problems.add("another")
    assert faults(problems)[-2:] == (f"number {PROBLEMS_SHOWN_MAX - 1}", "and 2 more")
    with pytest.raises(MapError, match="number 0; number 1; "):
        problems.check()
