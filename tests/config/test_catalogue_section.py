"""The form of [catalogue], and of a shard map that is there."""

from pathlib import Path

import pytest

from proxy.config import Settings, compare, load_settings
from proxy.routing.keys import KeyType, Normalise
from proxy.routing.shard_map import Kind, MapSpec
from tests.support.configuring import ENDPOINT, ENDPOINT_EU, loaded, refusals, written

IN_CATALOGUE = f"""
[routing]
shard_map = "tenants"
[targets.main]
endpoint = "{ENDPOINT}"
user = "map_reader"
[shard_maps.tenants]
catalogue = true
"""
WITH_TARGET = IN_CATALOGUE + '[catalogue]\ntarget = "main"\n'


def test_a_map_in_the_catalogue_needs_nothing_but_its_target(tmp_path: Path) -> None:
    settings = loaded(written(tmp_path, WITH_TARGET), dials=True).settings
    assert settings.catalogue_map == "tenants"
    assert settings.target_names() == ("main",)
    assert settings.shard_maps["tenants"].kind is None
    assert settings.warnings() == []


def test_a_static_map_and_no_map_are_in_no_catalogue(tmp_path: Path) -> None:
    assert Settings().catalogue_map == ""
    static = '[shard_maps.m]\nkind="list"\nkey_type="int4"\nmappings=[{key=1,target="upstream"}]\n'
    argv = written(tmp_path, f'{static}[routing]\nshard_map = "m"\n')
    assert load_settings(argv, {}).catalogue_map == ""


def test_the_section_upstream_can_have_the_catalogue(tmp_path: Path) -> None:
    toml = IN_CATALOGUE + '[catalogue]\ntarget = "upstream"\n'
    assert "upstream" in load_settings(written(tmp_path, toml), {}).target_names()
    said = refusals(written(tmp_path, toml), upstream_required=True)
    assert said.keys() == {"upstream.endpoint"}


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ('""', ()),
        ("[]", ()),
        ('["DB.example.com", "*.eu.example.com"]', ("db.example.com", "*.eu.example.com")),
        ('"a.example.com, 127.0.0.1"', ("a.example.com", "127.0.0.1")),
    ],
)
def test_hosts_of_shards_are_a_list_or_have_commas_between_them(
    tmp_path: Path, text: str, patterns: tuple[str, ...]
) -> None:
    argv = written(tmp_path, f"[catalogue]\nshard_hosts = {text}\n")
    assert load_settings(argv, {}).catalogue.shard_host_patterns == patterns


@pytest.mark.parametrize(
    "text", ["*", "*.", "a.*", "*.*.example.com", "a b", "https://a", "a,", "a:5432"]
)
def test_a_pattern_of_hosts_is_a_name_with_nothing_but_labels_before_it(text: str) -> None:
    assert (
        "must be a host name"
        in refusals([f"--catalogue.shard_hosts={text}"])["catalogue.shard_hosts"]
    )


def test_hosts_of_shards_are_bounded() -> None:
    most = ",".join(["a"] * 100)
    settings = load_settings([f"--catalogue.shard_hosts={most}"], {})
    assert len(settings.catalogue.shard_host_patterns) == 100
    said = refusals([f"--catalogue.shard_hosts={most},a"])
    assert "not be more than 100 names" in said["catalogue.shard_hosts"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("load", "eager lazy|soon"),
        ("feed", "listen poll off|on"),
        ("poll_seconds", "1 3600|0.9 3601"),
        ("max_stale_seconds", "0 86400|-1 86401"),
        ("park_timeout_seconds", "0 600|-1 601"),
        ("park_max", "0 500|-1 501"),
        ("shard_hostaddr", "127.0.0.1 ::1|localhost"),
        ("validate", "true|2"),
        ("snapshot_file", "/run/map|a\0b"),
    ],
)
def test_values_have_bounds(key: str, values: str) -> None:
    good, bad = values.split("|")
    for value in good.split():
        loaded([f"--catalogue.{key}={value}"])
    for value in bad.split(" "):
        assert f"catalogue.{key}" in refusals([f"--catalogue.{key}={value}"])


def test_everything_that_contradicts_a_catalogue_is_reported_at_once(tmp_path: Path) -> None:
    toml = f"""
        [listen]
        max_connections = 9
        [upstream]
        read_only = true
        pooled = true
        [targets.eu]
        endpoint = "{ENDPOINT_EU}"
        [shard_maps.tenants]
        catalogue = true
        kind = "rnge"
        mappings = [{{ key = "a", target = "eu" }}]
        mappings_file = "m.csv"
        [shard_maps.other]
        catalogue = "perhaps"
        [catalogue]
        validate = false
        snapshot_file = "/run/map"
        park_max = 5
        """
    said = refusals(written(tmp_path, toml))
    assert said.keys() == {
        "catalogue.target",
        "catalogue.validate",
        "catalogue.snapshot_file",
        "catalogue.park_max",
        "upstream.read_only",
        "upstream.pooled",
        "shard_maps.tenants.kind",
        "shard_maps.tenants.mappings",
        "shard_maps.tenants.mappings_file",
        "shard_maps.other.catalogue",
    }
    assert "allow_unvalidated = true" in said["catalogue.validate"]
    assert "at most 4, half of listen.max_connections" in said["catalogue.park_max"]
    assert "together with catalogue" in said["shard_maps.tenants.mappings"]
    assert "required with shard_maps.tenants.catalogue" in said["catalogue.target"]


def test_an_unknown_target_of_the_catalogue_is_reported_with_the_known_ones(
    tmp_path: Path,
) -> None:
    argv = written(tmp_path, IN_CATALOGUE + '[catalogue]\ntarget = "mian"\n')
    said = refusals(argv)["catalogue.target"]
    assert said.endswith("no target 'mian' (there is: main, upstream); did you mean main?")


@pytest.mark.parametrize("key", ["read_only", "pooled"])
def test_the_target_of_the_catalogue_is_a_direct_host_of_a_primary(key: str) -> None:
    argv = ["--shard_maps.m.catalogue", "--catalogue.target=main", f"--targets.main.{key}"]
    assert "LISTEN" in refusals(argv)[f"targets.main.{key}"]


def test_sessions_without_validation_are_allowed_on_purpose_and_warned_of(tmp_path: Path) -> None:
    argv = written(tmp_path, WITH_TARGET)
    assert "catalogue.validate" in refusals([*argv, "--catalogue.validate=false"])
    allowed = [*argv, "--catalogue.validate=off", "--catalogue.allow_unvalidated"]
    settings = load_settings(allowed, {})
    assert not settings.catalogue.validate
    assert "catalogue.validate is false" in str(settings.warnings())
    assert "catalogue.snapshot_file" in refusals([*allowed, "--catalogue.snapshot_file=/m"])


@pytest.mark.parametrize(
    ("given", "effective"),
    [
        ([], 100),
        (["--listen.max_connections=60"], 30),
        (["--listen.max_connections=1"], 0),
        (["--catalogue.park_max=500"], 500),
        (["--catalogue.park_max=7"], 7),
    ],
)
def test_clients_that_wait_leave_half_of_the_connections_to_others(
    given: list[str], effective: int
) -> None:
    assert load_settings(given, {}).park_max == effective


@pytest.mark.parametrize(
    ("flags", "differing"),
    [
        ([], {}),
        (["kind=hash", "key_type=text", "normalise=nfc"], {}),
        (["kind=list", "key_type=text"], {"kind": "hash"}),
        (["normalise=none"], {"normalise": "nfc"}),
        (
            ["kind=range", "key_type=uuid"],
            {"kind": "hash", "key_type": "text"},
        ),
    ],
)
def test_what_is_set_must_agree_with_the_map_in_the_catalogue(
    tmp_path: Path, flags: list[str], differing: dict[str, str]
) -> None:
    argv = [f"--shard_maps.tenants.{flag}" for flag in flags]
    settings = load_settings([*written(tmp_path, WITH_TARGET), *argv], {})
    found = MapSpec(Kind.HASH, KeyType.TEXT, Normalise.NFC)
    assert settings.shard_maps["tenants"].differing(found) == differing


def test_every_key_can_change_with_a_reload() -> None:
    before = load_settings([], {})
    after = load_settings(["--catalogue.feed=off", "--catalogue.poll_seconds=2"], {})
    assert compare(before, after).reloadable == ("catalogue.feed", "catalogue.poll_seconds")
