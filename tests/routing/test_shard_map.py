"""Finding a key's mapping: every kind, every boundary (S4, S5)."""

from array import array
from collections.abc import Mapping

import pytest

from proxy.routing.keys import KeyType, parse_key
from proxy.routing.map_builder import map_from_tables
from proxy.routing.shard_map import UNASSIGNED, Kind, MapSpec, ShardMap, ShardMapping

TARGETS = ("eu", "us")
INT4_RANGE = MapSpec(Kind.RANGE, KeyType.INT4)
TEXT_LIST = MapSpec(Kind.LIST, KeyType.TEXT)


def built(spec: MapSpec, *rows: Mapping[str, object]) -> ShardMap:
    return map_from_tables(rows, spec, TARGETS)


def target(shard_map: ShardMap, text: str) -> str | None:
    key = shard_map.parse_key(text)
    mapping = shard_map.find(key)
    assert shard_map.target(key) == (mapping.target if mapping else None)
    return mapping.target if mapping else None


def test_s5_a_list_finds_its_keys_and_no_others() -> None:
    points = built(TEXT_LIST, {"key": "a", "target": "eu"}, {"key": "ab", "target": "us"})
    found = {text: target(points, text) for text in ("a", "ab", "abc", "aa", "b", "A", "0")}
    assert found == {"a": "eu", "ab": "us"} | dict.fromkeys(("abc", "aa", "b", "A", "0"))
    assert points.find(b"a") == ShardMapping(b"a", b"a\0", "eu")
    assert points.spec.show_bounds(ShardMapping(b"a", b"a\0", "eu")) == ("a", "a")


def test_s5_a_range_finds_from_low_to_below_high() -> None:
    ranges = built(
        INT4_RANGE,
        {"high": "0", "target": "eu"},
        {"low": 100, "high": 200, "target": "us"},
        {"low": 200, "high": "300", "target": "eu"},
    )
    wanted = {
        "-2147483648": "eu",
        "-1": "eu",
        "0": None,
        "99": None,
        "100": "us",
        "199": "us",
        "200": "eu",
        "299": "eu",
        "300": None,
        "2147483647": None,
    }
    assert {text: target(ranges, text) for text in wanted} == wanted
    shown = [
        ranges.spec.show_bounds(mapping)
        for mapping in map(ranges.find, map(ranges.parse_key, ("-5", "150", "250")))
        if mapping is not None
    ]
    assert shown == [("-inf", "0"), ("100", "200"), ("200", "300")]


def test_s4_from_minus_to_plus_infinity_everything_is_covered() -> None:
    everything = built(INT4_RANGE, {"target": "eu"})
    assert target(everything, "-2147483648") == target(everything, "2147483647") == "eu"
    mapping = everything.find(parse_key("0", KeyType.INT4))
    assert mapping == ShardMapping(b"", None, "eu")
    assert everything.spec.show_bounds(mapping) == ("-inf", "+inf")


def test_s4_adjacent_ranges_at_min_and_max_resolve_at_each_boundary() -> None:
    lowest, highest = -(2**31), 2**31 - 1
    ranges = built(
        INT4_RANGE,
        {"low": lowest, "high": lowest + 1, "target": "us"},
        {"low": lowest + 1, "high": highest, "target": "eu"},
        {"low": highest, "target": "us"},
    )
    wanted = {lowest: "us", lowest + 1: "eu", 0: "eu", highest - 1: "eu", highest: "us"}
    assert {value: target(ranges, str(value)) for value in wanted} == wanted


def test_s5_a_hash_map_compares_the_hash_of_the_key() -> None:
    hashed = built(
        MapSpec(Kind.HASH, KeyType.INT4),
        {"low": "0x80000000", "target": "us"},
        {"low": 0, "high": "2147483648", "target": "eu"},
    )
    assert target(hashed, "1") == "us"  # c84a4656
    assert target(hashed, "-1") == "eu"  # 24ae0d93
    mapping = hashed.find(parse_key("1", KeyType.INT4))
    assert mapping == ShardMapping(b"\x80\0\0\0", None, "us")
    assert hashed.spec.show_bounds(mapping) == ("0x80000000", "+inf")


@pytest.mark.parametrize("kind", Kind)
def test_an_empty_map_finds_nothing(kind: Kind) -> None:
    empty = built(MapSpec(kind, KeyType.TEXT))
    assert target(empty, "a") is None
    assert len(empty) == 0
    assert empty.targets() == frozenset()


def test_bounds_that_share_their_beginning_and_more_are_told_apart() -> None:
    # They differ only after the eight bytes that are compared first.
    names = [f"customer-12345678-{at:02}" for at in range(20)]
    points = built(TEXT_LIST, *({"key": name, "target": "eu"} for name in names))
    assert all(target(points, name) == "eu" for name in names)
    for name in ("customer", "customer-12345678-", names[3] + "x", "customer-12345678-99"):
        assert target(points, name) is None
    for name in ("a", "z", "customer-", "customer-123456780", "customer-02345678-00"):
        assert target(points, name) is None


def test_uuids_that_differ_at_their_end_are_told_apart() -> None:
    uuids = [f"{head}0000000-0000-0000-0000-00000000000{tail}" for head in "af" for tail in "13579"]
    points = built(
        MapSpec(Kind.LIST, KeyType.UUID), *({"key": text, "target": "eu"} for text in uuids)
    )
    assert all(target(points, text) == "eu" for text in uuids)
    assert not any(target(points, text[:-1] + digit) for text in uuids for digit in "02468a")


def test_a_map_counts_its_mappings_and_names_the_targets_in_use() -> None:
    gap = built(INT4_RANGE, {"high": 0, "target": "eu"}, {"low": 5, "high": 6, "target": "eu"})
    assert len(gap) == 2
    assert gap.targets() == {"eu"}


def test_maps_with_the_same_mappings_have_the_same_digest_whatever_else_there_is() -> None:
    rows = [{"high": 0, "target": "us"}, {"low": 5, "high": 6, "target": "us"}]
    one = built(INT4_RANGE, *rows)
    more_targets = map_from_tables(reversed(rows), INT4_RANGE, ("a", "us", "zz"))
    assert one.digest == more_targets.digest
    others = [
        built(INT4_RANGE, *rows[:1]),
        built(INT4_RANGE, rows[0], {**rows[1], "target": "eu"}),
        built(INT4_RANGE, rows[0], {**rows[1], "low": 4}),
        built(INT4_RANGE, rows[0], {**rows[1], "low": 0}),
        built(MapSpec(Kind.HASH, KeyType.INT4)),
        built(INT4_RANGE),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == len(others) + 1


def test_a_key_is_shown_as_its_type_writes_it() -> None:
    assert built(INT4_RANGE).show_key(parse_key("007", KeyType.INT4)) == "7"


def test_bounds_without_owners_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        ShardMap(TEXT_LIST, [b"a"], array("I"), TARGETS)
    assert ShardMap(TEXT_LIST, [b"a"], array("I", [UNASSIGNED]), TARGETS).target(b"a") is None
