"""The form of aliases, routing and shard maps."""

from pathlib import Path

import pytest

from proxy.config import MappingEntry, load_settings
from tests.support.configuring import refusals, written


def shard_map(mappings: str, kind: str = "range", more: str = "") -> str:
    return f'[shard_maps.m]\nkind = "{kind}"\nkey_type = "int8"\nmappings = [{mappings}]\n{more}\n'


# Aliases and routing


@pytest.mark.parametrize(
    ("alias", "good"),
    [
        ("orders", True),
        ("app@42", True),
        ("with blank", True),
        ("ü" * 31, True),
        ("x" * 63, True),
        ("x" * 64, False),
        ("ü" * 32, False),
        ("a\\u0000b", False),
        ("", False),
    ],
)
def test_an_alias_is_a_name_that_postgresql_does_not_truncate(
    tmp_path: Path, alias: str, good: bool
) -> None:
    argv = written(tmp_path, f'[databases]\n"{alias}" = "upstream"\n')
    if good:
        assert alias in load_settings(argv, {}).databases
    else:
        assert "must be a name of 1 to 63 bytes" in str(refusals(argv))


@pytest.mark.parametrize(
    ("pattern", "good"),
    [
        ("{database}@{shard_key}", True),
        ("{database}--{shard_key}", True),
        ("{database}{shard_key}", False),
        ("{shard_key}@{database}", True),
        ("tenant_{shard_key}", True),
        ("x{database}@{shard_key}y", True),
        ("{database}", False),
        ("{shard_key}", False),
        ("{database}@{shard_key}@{shard_key}", False),
        ("{database}@{key}", False),
        ("", False),
    ],
)
def test_a_database_pattern_has_a_key_and_a_text_that_separates_it(
    pattern: str, good: bool
) -> None:
    argv = [f"--routing.database_pattern={pattern}"]
    if good:
        assert load_settings(argv, {}).routing.database_pattern == pattern
    else:
        assert "routing.database_pattern" in refusals(argv)


@pytest.mark.parametrize(
    ("parameter", "good"),
    [
        ("tenant_id", True),
        ("_t", True),
        ("x" * 63, True),
        ("x" * 64, False),
        ("user", False),
        ("Options", False),
        ("a-b", False),
        ("1a", False),
        ("a.b", False),
        ("", False),
    ],
)
def test_a_parameter_is_a_word_that_the_protocol_does_not_use(parameter: str, good: bool) -> None:
    argv = [f"--routing.parameter={parameter}"]
    if good:
        assert load_settings(argv, {}).routing.parameter == parameter
    else:
        assert "routing.parameter" in refusals(argv)


# Shard maps


def test_bounds_are_kept_as_text(tmp_path: Path) -> None:
    entries = (
        '{ low = "-inf", high = -9223372036854775808, target = "upstream" },'
        '{ low = "007", target = "upstream" }, { target = "upstream" }'
    )
    found = load_settings(written(tmp_path, shard_map(entries)), {}).shard_maps["m"]
    assert found.mappings == (
        MappingEntry("upstream", low="-inf", high="-9223372036854775808"),
        MappingEntry("upstream", low="007"),
        MappingEntry("upstream"),
    )


def test_a_list_map_has_keys(tmp_path: Path) -> None:
    entries = '{ key = "a", target = "upstream" }, { key = 0x10, target = "upstream" }'
    found = load_settings(written(tmp_path, shard_map(entries, "list")), {}).shard_maps["m"]
    assert [entry.key for entry in found.mappings] == ["a", "16"]


@pytest.mark.parametrize(
    ("toml", "key", "said"),
    [
        (
            shard_map('{ low = 1.5, target = "upstream" }'),
            "mappings",
            "mapping 1: low: must be a string or an integer",
        ),
        (
            shard_map('{ low = true, target = "upstream" }'),
            "mappings",
            "mapping 1: low: must be a string or an integer",
        ),
        (
            shard_map('{ low = 2026-01-01, target = "upstream" }'),
            "mappings",
            "mapping 1: low: must be a string or an integer",
        ),
        (
            shard_map('{ low = "a\\u0000", target = "upstream" }'),
            "mappings",
            "mapping 1: low: must not contain a NUL",
        ),
        (shard_map("{ low = 1 }"), "mappings", "mapping 1: target: required"),
        (shard_map("7"), "mappings", "mapping 1: must be a table such as { low, high, target }"),
        (
            shard_map('{ hgih = 1, target = "upstream" }'),
            "mappings",
            "mapping 1: hgih: unknown key; did you mean high?",
        ),
        (
            shard_map('{ target = "upstream" }, { key = 1, target = "upstream" }'),
            "mappings",
            "a range has the columns low, high and target: see mapping 2",
        ),
        (
            shard_map('{ key = 1, target = "upstream" }', "hash"),
            "mappings",
            "a hash has the columns low, high and target: see mapping 1",
        ),
        (
            shard_map(", ".join(['{ low = 1, target = "upstream" }'] * 12), "list"),
            "mappings",
            "columns key and target: see mapping 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more",
        ),
        (shard_map("", more='normalise = "nfc"'), "normalise", "none unless key_type is text"),
        (shard_map("", kind="lists"), "kind", "must be 'list', 'range' or 'hash', not 'lists'"),
        ('[shard_maps.m]\nkind = "list"\n', "key_type", "required"),
        ('[shard_maps.m]\ncatalogue = false\nkey_type = "int8"\n', "kind", "required"),
        ("[shard_maps.m]\ncatalogue = 2\n", "catalogue", "must be a valid boolean"),
    ],
)
def test_a_shard_map_with_a_mistake_is_refused(
    tmp_path: Path, toml: str, key: str, said: str
) -> None:
    argv = written(tmp_path, toml)
    found = refusals(argv)[f"shard_maps.m.{key}"]
    assert said in found
    assert found.startswith(f"(file {argv[1]})")


def test_more_than_the_most_mappings_are_referred_to_a_file(tmp_path: Path) -> None:
    entries = ['{ target = "upstream" }'] * 10_000
    assert len(load_settings(written(tmp_path, shard_map(",".join(entries))), {}).shard_maps) == 1
    said = refusals(written(tmp_path, shard_map(",".join([*entries, entries[0]]))))
    assert "has 10001 entries, and 10000 are allowed" in said["shard_maps.m.mappings"]
    assert "name it in mappings_file" in said["shard_maps.m.mappings"]


def test_mappings_are_a_list() -> None:
    for flag in ("--shard_maps.m.mappings.foo=1", '--shard_maps.m.mappings={"0": {}}'):
        assert "must be a list of tables" in refusals([flag])["shard_maps.m.mappings"]


@pytest.mark.parametrize("more", ["", 'mappings_file = "m.csv"\n'])
def test_a_map_has_its_entries_in_mappings_or_in_a_file(tmp_path: Path, more: str) -> None:
    entries = '{ target = "upstream" }' if more else ""
    said = refusals(written(tmp_path, shard_map(entries, more=more)))
    assert "needs entries, either in mappings or in mappings_file" in said["shard_maps.m"]
