"""`--print-config`: its output can be loaded again, has the source of each value, and no secret."""

import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given

from proxy.config import (
    Changes,
    SettingKey,
    compare,
    effective_toml,
    named_keys,
    settings_keys,
)
from tests.support.configurations import Table, as_toml, tables
from tests.support.configuring import ENDPOINT_EU, loaded, refusals, written

FAKE_SECRET = "not-a-real-secret"
NO_CHANGES = Changes((), ())


@given(tables())
def test_what_is_printed_and_loaded_again_is_equal(found: dict[str, Table]) -> None:
    with tempfile.TemporaryDirectory() as name:
        first = loaded(written(Path(name), as_toml(found)))
        printed = effective_toml(first)
        second = loaded(written(Path(name), printed))
        assert compare(first.settings, second.settings) == NO_CHANGES
        assert second.settings.target_names() == first.settings.target_names()
        third = effective_toml(second)
        assert tomllib.loads(third) == tomllib.loads(printed)


def test_every_key_is_printed(tmp_path: Path) -> None:
    toml = """
        [workspaces.NAME]
        profile = "p"
        [targets.NAME]
        [databases]
        NAME = { target = "NAME", database = "x" }
        [shard_maps.NAME]
        kind = "range"
        key_type = "int4"
        mappings = [{ target = "NAME" }]
        """
    printed = tomllib.loads(effective_toml(loaded(written(tmp_path, toml))))
    for key in (*settings_keys(), *named_keys()):
        found: object = printed
        for part in key.path:
            assert isinstance(found, dict)
            assert part in found, key.dotted
            found = found[part]


def test_each_value_has_its_source_beside_it(tmp_path: Path) -> None:
    toml = f"""
        [upstream]
        database = "shop"
        port = 6000
        [targets.eu]
        endpoint = "{ENDPOINT_EU}"
        [databases]
        orders = "eu"
        "my.db" = {{ target = "eu", database = "x" }}
        [shard_maps.m]
        kind = "list"
        key_type = "int4"
        mappings = [{{ key = 1, target = "eu" }}]
        """
    file = written(tmp_path, toml)
    environ = {"PGHOST": "db.example.com", "LAKEBASE_PROXY_LOG__LEVEL": "debug"}
    lines = effective_toml(loaded([*file, "--targets.eu.user=app"], environ)).splitlines()
    place = f"file {file[1]}"
    for expected in (
        'level = "debug"  # environment LAKEBASE_PROXY_LOG__LEVEL',
        'host = "db.example.com"  # environment PGHOST',
        'host = ""  # default, because the target sets its own address',
        f'endpoint = "{ENDPOINT_EU}"  # {place}',
        f"port = 6000  # {place}",
        f"port = 6000  # upstream.port, {place}",
        'user = "app"  # flag --targets.eu.user',
        f'orders = "eu"  # {place}',
        f'"my.db" = {{ target = "eu", database = "x" }}  # {place}',
        f"mappings = [  # {place}",
        '    { key = "1", target = "eu" },',
        "max_connections = 1000  # default",
    ):
        assert expected in lines


def test_without_any_source_every_value_is_a_default() -> None:
    lines = effective_toml(loaded([])).splitlines()
    assert all(line.endswith("# default") for line in lines if " = " in line)
    assert not any(line.startswith("[targets") for line in lines)


SECRETS = [key for key in (*settings_keys(), *named_keys()) if key.is_secret]


@pytest.mark.parametrize("key", SECRETS, ids=lambda key: key.dotted)
def test_a_secret_is_masked_and_cannot_be_loaded_again(key: SettingKey, tmp_path: Path) -> None:
    argv = [f"{key.flag}={FAKE_SECRET}"]
    if "NAME" in key.path:
        argv += ["--workspaces.NAME.host=h", "--workspaces.NAME.client_id=c"]
        argv += ["--workspaces.NAME.auth_type=azure-client-secret"]
    printed = effective_toml(loaded(argv))
    assert FAKE_SECRET not in printed
    masked = f'# {key.name} = "********"  # flag {key.flag}'
    assert masked in printed.splitlines()
    fed_back = loaded(written(tmp_path, printed)).settings
    assert compare(loaded(argv).settings, fed_back).reloadable == (key.dotted,)
    # A reader who uses the line unchanged is told.
    taken_in = printed.replace(masked, masked.removeprefix("# "))
    assert "not the mask" in refusals(written(tmp_path, taken_in))[key.dotted]


def test_a_file_with_a_strange_name_cannot_end_its_comment(tmp_path: Path) -> None:
    file = tmp_path / "a\n[listen]\nport = 1\n.toml"
    file.write_text("[listen]\nport = 2\n")
    printed = effective_toml(loaded(["--config", str(file)]))
    assert tomllib.loads(printed)["listen"]["port"] == 2
    assert loaded(written(tmp_path, printed)).settings.listen.port == 2
