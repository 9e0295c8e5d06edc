"""Routing: keys keep the order of their values, and a map finds what a linear scan finds."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ErrorKind, ProxyError
from proxy.routing.keys import (
    KEY_BYTES_MAX,
    KeyType,
    Normalise,
    hash_key,
    parse_key,
    show_key,
)
from proxy.routing.map_builder import map_from_csv, map_from_tables
from proxy.routing.map_rows import MapError
from proxy.routing.router import Route, Router
from proxy.routing.shard_map import Kind, MapSpec, ShardMapping
from proxy.wire.options import Setting, appended
from proxy.wire.startup import V3_0, StartupMessage

TARGETS = ("eu", "us", "asia")

# For each type: values whose own order is the type's, and how one is written.
INT4S, INT8S = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
UUIDS = st.uuids(allow_nil=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=32)
BYTEAS = st.binary(min_size=1, max_size=KEY_BYTES_MAX)
OFFSETS = st.integers(-15 * 60, 15 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=OFFSETS)  # noqa: DTZ001
VALUES: Mapping[KeyType, tuple[st.SearchStrategy[Any], Callable[[Any], str]]] = {
    KeyType.INT4: (INT4S, str),
    KeyType.INT8: (INT8S, str),
    KeyType.UUID: (UUIDS, str),
    KeyType.TEXT: (TEXTS.map(str.encode), bytes.decode),
    KeyType.BYTEA: (BYTEAS, bytes.hex),
    KeyType.TIMESTAMPTZ: (INSTANTS, datetime.isoformat),
}
KEY_TYPES = st.sampled_from(KeyType)


@given(KEY_TYPES, st.data())
def test_s1_the_order_of_keys_is_the_order_of_values(
    key_type: KeyType, data: st.DataObject
) -> None:
    values, write = VALUES[key_type]
    one, other = data.draw(values), data.draw(values)
    one_key, other_key = parse_key(write(one), key_type), parse_key(write(other), key_type)
    assert (one_key < other_key) == (one < other)
    assert (one_key == other_key) == (one == other)


@given(KEY_TYPES, st.data())
def test_s1_a_key_is_shown_as_a_text_that_is_the_same_key(
    key_type: KeyType, data: st.DataObject
) -> None:
    values, write = VALUES[key_type]
    key = parse_key(write(data.draw(values)), key_type)
    assert parse_key(show_key(key, key_type), key_type) == key


@given(
    KEY_TYPES, st.text(max_size=200) | st.binary(max_size=60).map(lambda raw: raw.decode("latin1"))
)
def test_s3_any_text_is_a_key_or_refused_by_a_kind_that_says_so(
    key_type: KeyType, text: str
) -> None:
    kinds = {
        ErrorKind.KEY_SYNTAX,
        ErrorKind.KEY_RANGE,
        ErrorKind.KEY_INVALID,
        ErrorKind.KEY_TOO_LONG,
    }
    for normalise in Normalise:
        kind, key = None, b""
        try:
            key = parse_key(text, key_type, normalise)
        except ProxyError as error:
            kind = error.kind
        assert kind is None or kind in kinds
        assert len(key) <= KEY_BYTES_MAX
        if key:
            assert parse_key(show_key(key, key_type), key_type, normalise) == key


@given(INSTANTS)
def test_s3_equal_instants_with_other_offsets_are_one_key(instant: datetime) -> None:
    written = {instant.isoformat(), instant.astimezone(UTC).isoformat(sep=" ")}
    assert len({parse_key(text, KeyType.TIMESTAMPTZ) for text in written}) == 1


# Small spaces, so that bounds meet; the texts share their beginning, and more than eight bytes.
SMALL: Mapping[KeyType, st.SearchStrategy[str]] = {
    KeyType.INT4: st.integers(-6, 6).map(str),
    KeyType.INT8: st.sampled_from([-(2**63), -1, 0, 1, 2, 2**40, 2**63 - 1]).map(str),
    KeyType.UUID: st.tuples(st.sampled_from("0f"), st.sampled_from("0123f")).map(
        lambda ends: ends[0] + "0" * 30 + ends[1]
    ),
    KeyType.TEXT: st.tuples(
        st.sampled_from(["", "tenant-", "tenant-12345678"]), st.text("ab", min_size=1, max_size=3)
    ).map("".join),
    KeyType.BYTEA: st.text("0f", max_size=8).filter(lambda text: len(text) % 2 == 0),
    KeyType.TIMESTAMPTZ: st.integers(1, 28).map(lambda day: f"2026-02-{day:02}T00Z"),
}


def scan(entries: list[ShardMapping], key: bytes) -> ShardMapping | None:
    covering = [one for one in entries if one.lo <= key and (one.hi is None or key < one.hi)]
    assert len(covering) <= 1
    return covering[0] if covering else None


@given(KEY_TYPES, st.data())
def test_s5_a_list_finds_what_a_linear_scan_finds(key_type: KeyType, data: st.DataObject) -> None:
    texts = data.draw(st.lists(SMALL[key_type].filter(bool), unique=True, max_size=12))
    rows = [{"key": text, "target": data.draw(st.sampled_from(TARGETS))} for text in texts]
    points = map_from_tables(rows, MapSpec(Kind.LIST, key_type), TARGETS)
    entries = [
        ShardMapping(key, key + b"\0", row["target"])
        for row in rows
        for key in [parse_key(row["key"], key_type)]
    ]
    for key in (parse_key(text, key_type) for text in data.draw(st.lists(SMALL[key_type]))):
        assert points.find(key) == scan(entries, key)
    assert len(points) == len(rows)


def encode_bound(spec: MapSpec, text: str) -> bytes:
    """Return a bound's bytes; of a hash, those of the number itself."""
    return int(text).to_bytes(4) if spec.kind is Kind.HASH else parse_key(text, spec.key_type)


@given(KEY_TYPES, st.sampled_from([Kind.RANGE, Kind.HASH]), st.data())
def test_s5_ranges_find_what_a_linear_scan_finds(
    key_type: KeyType, kind: Kind, data: st.DataObject
) -> None:
    spec = MapSpec(kind, key_type)
    bound = SMALL[key_type] if kind is Kind.RANGE else st.integers(1, 7).map(lambda n: str(n << 29))
    drawn = data.draw(st.lists(bound, max_size=12))
    # Nothing is below the lowest value of a type: no range ends there.
    by_key = {encode_bound(spec, text): text for text in drawn}
    inner = [(key, by_key[key]) for key in sorted(by_key) if key.strip(b"\0")]
    rows: list[dict[str, str]] = []
    entries: list[ShardMapping] = []
    for (lo, low), (hi, high) in pairwise([(b"", "-inf"), *inner, (None, "+inf")]):
        target = data.draw(st.sampled_from((*TARGETS, None)))  # None: a gap
        if target is not None and lo is not None:
            rows.append({"low": low, "high": high, "target": target})
            entries.append(ShardMapping(lo, hi, target))
    ranges = map_from_tables(data.draw(st.permutations(rows)), spec, TARGETS)
    assert len(ranges) == len(rows)
    for text in data.draw(st.lists(SMALL[key_type])):
        key = parse_key(text, key_type)
        sought = hash_key(key) if kind is Kind.HASH else key
        assert ranges.find(key) == scan(entries, sought)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=6))
def test_s6_a_map_is_refused_exactly_when_ranges_meet(bounds: list[tuple[int, int]]) -> None:
    lines = ["low,high,target", *(f"{low},{high},eu" for low, high in bounds)]
    covered = [value for low, high in bounds for value in range(low, high)]
    is_sound = len(set(covered)) == len(covered) and all(low < high for low, high in bounds)
    try:
        ranges = map_from_csv(lines, MapSpec(Kind.RANGE, KeyType.INT4), TARGETS)
    except MapError:
        assert not is_sound
    else:
        assert is_sound
        found = [
            value for value in range(-10, 10) if ranges.target(parse_key(str(value), KeyType.INT4))
        ]
        assert found == sorted(covered)


@given(TEXTS.filter(lambda text: len(text.encode()) <= KEY_BYTES_MAX), st.sampled_from("pods"))
def test_s15_every_way_to_give_a_key_leads_to_the_same_shard(text: str, way: str) -> None:
    points = map_from_tables(
        [{"key": text, "target": "eu"}], MapSpec(Kind.LIST, KeyType.TEXT), TARGETS
    )
    pair = {
        "p": (b"shard_key", text.encode()),
        "d": (b"database", b"app@" + text.encode()),
        "o": (b"options", appended(b"", [Setting(b"shard_key", text.encode())])),
        "s": (b"options", appended(b"", [Setting(b"lakebase.shard_key", text.encode())])),
    }[way]
    route = Router("main", shard_map=points, map_name="tenants").route(
        StartupMessage(V3_0, ((b"user", b"ada"), pair))
    )
    kept = StartupMessage(V3_0, ((b"user", b"ada"),))
    assert route == Route("eu", kept, "tenants", hash_key(text.encode()).hex())
