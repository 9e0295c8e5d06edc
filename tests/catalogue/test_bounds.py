"""The bounds of a mapping as they are written on a command line."""

import pytest

from proxy.catalogue.bounds import in_words, parse_bound, parse_bounds, show_bounds
from proxy.catalogue.errors import CatalogueError
from proxy.errors import ProxyError
from proxy.routing.keys import KeyType, Normalise, parse_key
from proxy.routing.shard_map import Kind, MapSpec

LIST = MapSpec(Kind.LIST, KeyType.TEXT, Normalise.ASCII_LOWER)
RANGE = MapSpec(Kind.RANGE, KeyType.INT4)
HASH = MapSpec(Kind.HASH, KeyType.TEXT)


def int4(value: int) -> bytes:
    return parse_key(str(value), KeyType.INT4)


@pytest.mark.parametrize(
    ("spec", "texts", "bounds", "words"),
    [
        (LIST, ["Acme"], (b"acme", b"acme\0"), "acme"),
        (LIST, ["-inf "], (b"-inf ", b"-inf \0"), "-inf "),
        (RANGE, ["-5", "007"], (int4(-5), int4(7)), "[-5, 7)"),
        (RANGE, ["-inf", "+inf"], (b"", None), "[-inf, +inf)"),
        (RANGE, ["0", "+inf"], (int4(0), None), "[0, +inf)"),
        (HASH, ["0", "0x80000000"], (b"\0\0\0\0", b"\x80\0\0\0"), "[0x00000000, 0x80000000)"),
        (HASH, ["0x80000000", "4294967296"], (b"\x80\0\0\0", None), "[0x80000000, +inf)"),
    ],
)
def test_bounds_are_read_and_shown(
    spec: MapSpec, texts: list[str], bounds: tuple[bytes, bytes | None], words: str
) -> None:
    assert parse_bounds(texts, spec) == bounds
    assert in_words(spec, *bounds) == words
    low, high = show_bounds(spec, *bounds)
    assert parse_bounds([low] if spec.kind is Kind.LIST else [low, high], spec) == bounds


@pytest.mark.parametrize(
    ("spec", "texts", "said"),
    [
        (LIST, ["a", "b"], "one KEY"),
        (LIST, [""], "empty"),
        (RANGE, ["1"], "LOW and HIGH"),
        (RANGE, ["1", "2", "3"], "LOW and HIGH"),
        (RANGE, ["5", "5"], "not below"),
        (RANGE, ["5", "4"], "not below"),
        (RANGE, ["-inf", "-2147483648"], "not below"),
        (RANGE, ["0", "-inf"], "not below"),
        (RANGE, ["-inf", "-inf"], "not below"),
        (RANGE, ["+inf", "5"], "above every key"),
        (HASH, ["4294967296", "+inf"], "above every key"),
        (HASH, ["0", "0"], "not below"),
    ],
)
def test_s4_bounds_without_a_key_between_them_are_refused(
    spec: MapSpec, texts: list[str], said: str
) -> None:
    with pytest.raises(CatalogueError, match=said) as refused:
        parse_bounds(texts, spec)
    assert (refused.value.reason, refused.value.sqlstate) == ("invalid_bounds", "22023")


@pytest.mark.parametrize(
    ("spec", "text", "sqlstate"),
    [
        (RANGE, "x", "22P02"),
        (RANGE, "2147483648", "22003"),
        (HASH, "0xg", "22P02"),
        (HASH, "4294967297", "22003"),
        (LIST, "a" * 129, "22023"),
    ],
)
def test_a_bound_that_is_no_key_has_the_reason_of_the_key(
    spec: MapSpec, text: str, sqlstate: str
) -> None:
    with pytest.raises(ProxyError) as refused:
        parse_bound(text, spec)
    assert refused.value.response().sqlstate == sqlstate
    assert text not in refused.value.detail
