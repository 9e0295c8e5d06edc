"""From rows to a map, and every problem with the rows that have it (S4, S6, S7)."""

from collections.abc import Mapping

import pytest

from proxy.routing.keys import KeyType, Normalise
from proxy.routing.map_builder import map_from_csv, map_from_tables
from proxy.routing.map_rows import MapError
from proxy.routing.shard_map import Kind, MapSpec

TARGETS = ("eu", "us")
INT4_RANGE = MapSpec(Kind.RANGE, KeyType.INT4)
INT4_LIST = MapSpec(Kind.LIST, KeyType.INT4)
INT4_HASH = MapSpec(Kind.HASH, KeyType.INT4)
OPEN = (None, None)


def problems(spec: MapSpec, *rows: Mapping[str, object]) -> tuple[str, ...]:
    try:
        map_from_tables(rows, spec, TARGETS)
    except MapError as error:
        return error.problems
    return ()


def spans(*bounds: tuple[int | None, int | None]) -> list[dict[str, str | int]]:
    """Return a row for each pair, the first on eu and the others on us."""
    return [
        {"target": "us" if at else "eu"}
        | ({} if low is None else {"low": low})
        | ({} if high is None else {"high": high})
        for at, (low, high) in enumerate(bounds)
    ]


@pytest.mark.parametrize(("low", "high"), [(5, 5), (6, 5), (None, -(2**31))])
def test_s4_a_range_without_keys_is_refused(low: int | None, high: int) -> None:
    assert problems(INT4_RANGE, *spans((low, high))) == (
        "mapping 1: low is not below high, so it contains no key",
    )


def test_s4_a_range_of_one_letter_without_keys_is_refused() -> None:
    # CPython has one object for each bytes of length 1: equal bounds may be the same object.
    row = {"low": "a", "high": "a", "target": "eu"}
    assert problems(MapSpec(Kind.RANGE, KeyType.TEXT), row) == (
        "mapping 1: low is not below high, so it contains no key",
    )


@pytest.mark.parametrize("key_type", [KeyType.TEXT, KeyType.BYTEA])
def test_s4_what_is_below_the_lowest_key_is_empty_in_every_type(key_type: KeyType) -> None:
    high = "\\x00" if key_type is KeyType.BYTEA else "\1"
    refused = problems(MapSpec(Kind.RANGE, key_type), {"high": high, "target": "eu"})
    assert bool(refused) == (key_type is KeyType.BYTEA)


@pytest.mark.parametrize(
    ("added", "others"),
    [
        ((5, 15), ["mapping 1 (on eu)"]),
        ((5, 7), ["mapping 1 (on eu)"]),
        ((-5, 5), ["mapping 1 (on eu)"]),
        ((-5, 15), ["mapping 1 (on eu)"]),
        ((15, 25), ["mapping 2 (on us)"]),
        (OPEN, ["mapping 1 (on eu)", "mapping 2 (on us)"]),
        ((0, 10), ["mapping 1 (on eu)"]),
    ],
)
def test_s6_an_overlap_names_both_entries(
    added: tuple[int | None, int | None], others: list[str]
) -> None:
    assert problems(INT4_RANGE, *spans((0, 10), (20, 30), added)) == tuple(
        f"{other} and mapping 3 (on us) overlap" for other in others
    )


def test_s6_what_fits_between_is_taken() -> None:
    assert problems(INT4_RANGE, *spans((0, 10), (20, 30), (10, 20))) == ()


def test_s6_an_overlap_with_one_that_began_long_before_is_seen() -> None:
    assert problems(INT4_RANGE, *spans((0, 100), (10, 20), (50, 200), (150, None), (300, 301))) == (
        "mapping 1 (on eu) and mapping 2 (on us) overlap",
        "mapping 1 (on eu) and mapping 3 (on us) overlap",
        "mapping 3 (on us) and mapping 4 (on us) overlap",
        "mapping 4 (on us) and mapping 5 (on us) overlap",
    )


def test_s6_ranges_of_hashes_do_not_overlap_either() -> None:
    assert problems(INT4_HASH, *spans((0, 16), (15, None))) == (
        "mapping 1 (on eu) and mapping 2 (on us) overlap",
    )


def test_s7_a_duplicate_key_names_both_entries_however_it_is_written() -> None:
    rows = [{"key": key, "target": "eu"} for key in ("7", "8", "007")]
    assert problems(INT4_LIST, *rows) == ("mapping 1 (on eu) and mapping 3 (on eu) overlap",)
    assert problems(INT4_LIST, *rows[:2]) == ()


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert problems(
        MapSpec(Kind.RANGE, KeyType.INT4, Normalise.NFC),
        {"low": "x", "target": "eu"},
        {"low": "0", "high": 2**40, "target": "eu"},
        {"high": "0", "target": "mars"},
        {"low": 0, "target": "eu", "colour": "red"},
        {"low": 4, "high": 3, "target": "eu"},
    ) == (
        "normalise is for keys of type text, not int4",
        "mapping 1: low: an integer is -?[0-9]+",
        "mapping 2: high: an int4 has 32 bits",
        "mapping 3: there is no target 'mars'",
        "mapping 4: colour is not one of low, high, target",
        "mapping 5: low is not below high, so it contains no key",
    )


def test_a_lists_key_is_not_empty() -> None:
    row = {"key": "", "target": "eu"}
    assert problems(MapSpec(Kind.LIST, KeyType.TEXT), row) == ("mapping 1: the key is empty",)


def test_a_list_may_have_a_key_that_is_written_as_an_open_bound() -> None:
    points = map_from_tables(
        [{"key": "-inf", "target": "eu"}], MapSpec(Kind.LIST, KeyType.TEXT), TARGETS
    )
    assert points.target(b"-inf") == "eu"


@pytest.mark.parametrize("text", ["-1", "x", "4294967297", "0x100000001", "0x", "1" * 5000, "0xg"])
def test_the_bound_of_a_hash_is_a_number_of_its_space(text: str) -> None:
    refused = problems(INT4_HASH, {"low": text, "target": "eu"})
    assert refused == ("mapping 1: low: a hash is a number from 0 to 4294967296",)


def test_hashes_end_at_two_to_the_32() -> None:
    assert problems(INT4_HASH, {"low": 0, "high": 2**32, "target": "eu"}) == ()
    assert problems(INT4_HASH, {"low": "-inf", "high": "+inf", "target": "eu"}) == ()
    assert problems(INT4_HASH, {"low": 2**32, "target": "eu"}) == (
        "mapping 1: low is above every hash",
    )


def test_a_csv_makes_the_same_map_and_names_lines() -> None:
    lines = ["low,high,target", "-inf,0,eu", "100,+inf,us"]
    ranges = map_from_csv(lines, INT4_RANGE, TARGETS)
    found = {text: ranges.target(ranges.parse_key(text)) for text in ("-1", "0", "100")}
    assert found == {"-1": "eu", "0": None, "100": "us"}
    with pytest.raises(MapError) as refusal:
        map_from_csv([*lines, "50,101,us"], INT4_RANGE, TARGETS)
    assert refusal.value.problems == ("line 3 (on us) and line 4 (on us) overlap",)


@pytest.mark.parametrize("spec", [INT4_LIST, INT4_RANGE, INT4_HASH])
def test_no_problem_shows_a_key(spec: MapSpec) -> None:
    """A reload logs problems, and keys must not be logged."""
    low = "key" if spec is INT4_LIST else "low"
    rows = [{low: key, "target": "eu"} for key in ("4711", "4711", "4711x", "0x4711x", "4711" * 9)]
    said = problems(spec, *rows)
    assert len(said) >= 3
    assert not [problem for problem in said if "4711" in problem]


def test_of_a_name_that_is_no_target_not_everything_is_shown() -> None:
    (said,) = problems(INT4_LIST, {"key": 1, "target": "x" * 1000})
    assert "there is no target 'xxx" in said
    assert len(said) < 100
