"""What notifications say, and what is missing between them."""

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.catalogue.notifications import PENDING_IDS_MAX, Notification, Pending, parse

MAP = UUID(int=7)
ONE, TWO = UUID(int=1), UUID(int=2)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"m": str(MAP), "v": 3}, Notification(MAP, 3)),
        ({"m": str(MAP), "v": 3, "ids": [str(ONE)]}, Notification(MAP, 3, (ONE,))),
        ({"m": str(MAP), "v": 3, "ids": []}, Notification(MAP, 3, ())),
        ({"m": str(MAP), "v": 3, "s": [str(TWO)]}, Notification(MAP, 3, None, (TWO,))),
        ({"m": str(MAP), "v": 3, "later": True}, Notification(MAP, 3)),
        ({"m": str(MAP), "v": "3"}, None),
        ({"m": str(MAP), "v": True}, None),
        ({"m": str(MAP), "v": 0}, None),
        ({"m": str(MAP), "v": 1.5}, None),
        ({"m": 7, "v": 3}, None),
        ({"m": "zz", "v": 3}, None),
        ({"v": 3}, None),
        ({"m": str(MAP)}, None),
        ({"m": str(MAP), "v": 3, "ids": 7}, None),
        ({"m": str(MAP), "v": 3, "ids": [7]}, None),
        ({"m": str(MAP), "v": 3, "s": {"a": 1}}, None),
        ([], None),
        (None, None),
        (7, None),
        ("x" * 8000, None),
    ],
)
def test_s55_a_payload_is_a_change_of_a_map_or_nothing(
    payload: object, expected: Notification | None
) -> None:
    assert parse(json.dumps(payload)) == expected


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_parsed_or_nothing(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("text", ["[" * 7999, '{"m":' * 1500, "", "\0", '"\\ud800"'])
def test_a_hostile_text_is_nothing(text: str) -> None:
    assert parse(text) is None


def test_changes_in_order_are_collected() -> None:
    pending = Pending(4)
    pending.add(Notification(MAP, 5, (ONE,)))
    pending.add(Notification(MAP, 6, (TWO, ONE)))
    assert (pending.version, pending.mapping_ids, pending.shards_changed) == (6, {ONE, TWO}, False)
    pending.add(Notification(MAP, 7, None, (ONE,)))
    assert pending.shards_changed
    taken = pending.taken()
    assert (taken.version, taken.mapping_ids, taken.shards_changed) == (7, {ONE, TWO}, True)
    assert (bool(taken), bool(pending), pending.version) == (True, False, 7)


@pytest.mark.parametrize("version", [1, 4])
def test_what_is_known_already_is_ignored(version: int) -> None:
    pending = Pending(4)
    pending.add(Notification(MAP, version))
    assert pending == Pending(4)


@pytest.mark.parametrize(
    "found", [Notification(MAP, 6, (ONE,)), Notification(MAP, 5), Notification(MAP, 10**12)]
)
def test_s55_a_gap_or_a_change_that_says_nothing_needs_a_reload(found: Notification) -> None:
    pending = Pending(4)
    pending.add(found)
    assert (pending.reload, pending.gaps, pending.mapping_ids) == (True, 1, set())
    assert pending.version == found.version
    assert pending.taken().gaps == 1
    assert pending.gaps == 0


def test_s44_too_many_ids_become_a_reload_and_are_not_kept() -> None:
    pending = Pending(1)
    for number in range(PENDING_IDS_MAX):
        pending.add(Notification(MAP, number + 2, (UUID(int=number),)))
    assert (pending.reload, len(pending.mapping_ids)) == (False, PENDING_IDS_MAX)
    pending.add(Notification(MAP, PENDING_IDS_MAX + 2, (UUID(int=PENDING_IDS_MAX),)))
    assert pending.reload
    assert pending.mapping_ids == set()
    assert pending.gaps == 0
