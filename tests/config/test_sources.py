"""Keys with a chosen name, and values of more than one part, from every source."""

from pathlib import Path

import pytest

from proxy.config import (
    DatabaseAlias,
    MappingEntry,
    SettingKey,
    Settings,
    UpstreamSettings,
    load_settings,
    named_keys,
)
from tests.support.configuring import loaded, refusals, written

ENTRIES = '[{"high": "7", "target": "upstream"}, {"low": 7, "target": "upstream"}]'
PARSED = (MappingEntry("upstream", high="7"), MappingEntry("upstream", low="7"))
# What a table needs to be valid beside the one key that is tried.
COMPANIONS = {
    "workspaces": {"profile": "p"},
    "targets": {},
    "databases": {"target": "upstream"},
    "shard_maps": {"kind": "range", "key_type": "text", "mappings_file": "m.csv"},
}
VALUES = {
    "endpoint": "projects/p/branches/b/endpoints/e",
    "host": "db.example.com",
    "hostaddr": "10.0.0.1",
    "read_only": "true",
    "pooled": "true",
    "port": "6000",
    "sslmode": "require",
    "connect_timeout_seconds": "7",
    "connect_retry_seconds": "7",
    "connects_max": "7",
    "cancel_on_disconnect": "false",
    "cancel_method": "cancel_request",
    "pool": "session",
    "pool_idle_max": "7",
    "pool_size_max": "7",
    "pool_spare_min": "7",
    "pool_lifetime_seconds": "7",
    "pool_idle_seconds": "7",
    "pool_wait_seconds": "7",
    "pool_check_seconds": "7",
    "accelerated": "false",
    "workspace": "known",
    "target": "upstream",
    "kind": "hash",
    "key_type": "text",
    "normalise": "nfc",
    "mappings": ENTRIES,
    "catalogue": "true",
}


@pytest.mark.parametrize("key", named_keys(), ids=lambda key: key.dotted)
def test_every_key_with_a_chosen_name_can_be_given_as_flag_and_as_variable(
    key: SettingKey, tmp_path: Path
) -> None:
    section, _, name = key.path
    text = VALUES.get(name, "text")
    given = COMPANIONS[section] | {name: text}
    if name == "mappings":
        del given["mappings_file"]
    if name == "catalogue":
        given = {"catalogue": text}
    # Names from variables are in lower case. The workspace exists, because targets name it.
    known = {"LAKEBASE_PROXY_WORKSPACES__KNOWN__PROFILE": "p"}
    known["LAKEBASE_PROXY_CATALOGUE__TARGET"] = "upstream"
    flags = [f"--{section}.eu.{one}={value}" for one, value in given.items()]
    variables = {
        f"LAKEBASE_PROXY_{section}__EU__{one}".upper(): value for one, value in given.items()
    }
    by_flag, by_variable = load_settings(flags, known), load_settings([], known | variables)
    assert by_flag == by_variable
    table = getattr(by_flag, section)["eu"]
    assert name in table.model_fields_set
    assert getattr(table, name) != key.default or name == "mappings_file"


def test_an_alias_is_a_name_or_a_table(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """[databases]
        a = "upstream"
        b = { target = "upstream", database = "x" }
        [databases.c]
        target = "upstream"
        """,
    )
    assert load_settings(file, {}).databases == {
        "a": DatabaseAlias(target="upstream"),
        "b": DatabaseAlias(target="upstream", database="x"),
        "c": DatabaseAlias(target="upstream"),
    }


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--databases.orders", "upstream"], {}),
        (["--databases.orders.target=upstream"], {}),
        (['--databases.orders={"target": "upstream"}'], {}),
        (['--databases={"orders": "upstream"}'], {}),
        ([], {"LAKEBASE_PROXY_DATABASES__ORDERS": "upstream"}),
        ([], {"LAKEBASE_PROXY_DATABASES__ORDERS__TARGET": "upstream"}),
        ([], {"LAKEBASE_PROXY_DATABASES": '{"orders": {"target": "upstream"}}'}),
    ],
)
def test_an_alias_can_be_given_in_any_source(argv: list[str], environ: dict[str, str]) -> None:
    settings = load_settings(argv, environ)
    assert settings.databases == {"orders": DatabaseAlias(target="upstream")}


def test_a_name_with_a_dot_is_quoted_in_a_flag() -> None:
    settings = load_settings(['--databases."my.db"', "upstream"], {})
    assert settings.databases.keys() == {"my.db"}
    assert '(flag --databases."my.db")' in refusals(['--databases."my.db"=x'])['databases."my.db"']


def test_a_variables_name_is_in_lower_case() -> None:
    settings = load_settings([], {"LAKEBASE_PROXY_DATABASES__Orders": "upstream"})
    assert settings.databases.keys() == {"orders"}


def test_mappings_are_json_in_a_variable_and_in_a_flag() -> None:
    base = ["--shard_maps.m.kind=range", "--shard_maps.m.key_type=int4"]
    by_flag = load_settings([*base, "--shard_maps.m.mappings", ENTRIES], {})
    by_variable = load_settings(base, {"LAKEBASE_PROXY_SHARD_MAPS__M__MAPPINGS": ENTRIES})
    assert by_flag.shard_maps["m"].mappings == by_variable.shard_maps["m"].mappings == PARSED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "must be JSON: Expecting property name"),
        ("", "must be JSON: Expecting value"),
        ("[" * 100_000, "must be JSON: it is too large"),
        ('[{"high": ' + "9" * 5000 + ', "target": "upstream"}]', "must be JSON: it is too large"),
    ],
    ids=["cut", "empty", "deep", "long"],
)
def test_invalid_json_is_refused_without_being_shown(text: str, said: str) -> None:
    found = refusals([f"--shard_maps.m.mappings={text}"])["shard_maps.m.mappings"]
    assert found.startswith(f"(flag --shard_maps.m.mappings): {said}")
    assert "99" not in found


def test_a_higher_source_replaces_a_list_and_completes_a_table(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """[shard_maps.m]
        kind = "range"
        key_type = "int4"
        mappings = [{ target = "upstream" }]
        [targets.eu]
        port = 1
        user = "file"
        """,
    )
    environ = {
        "LAKEBASE_PROXY_SHARD_MAPS__M__MAPPINGS": ENTRIES,
        "LAKEBASE_PROXY_TARGETS__EU__PORT": "2",
    }
    settings = loaded(file, environ).settings
    assert settings.shard_maps["m"].mappings == PARSED
    assert (settings.target("eu").port, settings.target("eu").user) == (2, "file")


def test_the_source_of_each_value_is_known(tmp_path: Path) -> None:
    file = written(tmp_path, '[targets.eu]\nport = 1\nuser = "u"\n')
    environ = {"LAKEBASE_PROXY_TARGETS__EU__PORT": "2", "PGHOST": "db"}
    configuration = loaded([*file, "--targets.eu.database=x"], environ)
    sources = {
        ("targets", "eu", "port"): "environment LAKEBASE_PROXY_TARGETS__EU__PORT",
        ("targets", "eu", "user"): f"file {file[1]}",
        ("targets", "eu", "database"): "flag --targets.eu.database",
        ("upstream", "host"): "environment PGHOST",
        ("upstream", "port"): None,
    }
    assert {path: configuration.source_of(path) for path in sources} == sources


def test_a_switch_with_a_chosen_name_needs_no_value() -> None:
    assert load_settings(["--targets.eu.read_only"], {}).target("eu").read_only
    assert load_settings([], {}) == Settings()


@pytest.mark.parametrize(
    ("given", "workspace", "upstream"),
    [
        ({}, "", "system"),
        ({"SSL_CERT_FILE": "one"}, "one", "system"),
        ({"REQUESTS_CA_BUNDLE": "one"}, "", "one"),
        ({"SSL_CERT_FILE": "one", "REQUESTS_CA_BUNDLE": "two"}, "", "system"),
        # The SDK's HTTP library reads this one, too: SSL_CERT_FILE took its place.
        ({"CURL_CA_BUNDLE": "one"}, "", "one"),
        ({"SSL_CERT_FILE": "one", "CURL_CA_BUNDLE": "two"}, "", "system"),
        ({"REQUESTS_CA_BUNDLE": "one", "CURL_CA_BUNDLE": "two"}, "", "one"),
        ({"SSL_CERT_FILE": "absent"}, "", "system"),
        ({"REQUESTS_CA_BUNDLE": "absent"}, "", "system"),
    ],
)
def test_where_one_file_of_authorities_is_named_both_sides_use_it(
    tmp_path: Path, given: dict[str, str], workspace: str, upstream: str
) -> None:
    # With an intercepting proxy one half worked, and the other was told to name its authority.
    for name in ("one", "two"):
        (tmp_path / name).write_text("")
    settings = load_settings([], {key: str(tmp_path / name) for key, name in given.items()})
    found = [Path(settings.workspace.ssl_root_cert).name, settings.upstream.ssl_root_cert]
    assert (found[0], Path(found[1]).name) == (workspace, upstream)


def test_a_named_workspace_trusts_the_authorities_of_the_first_one() -> None:
    argv = ["--workspace.ssl_root_cert=ca.pem", "--workspaces.eu.profile=p"]
    settings = load_settings(argv, {})
    eu = UpstreamSettings(workspace="eu")
    assert settings.workspace_of(eu).ssl_root_cert == "ca.pem"
    settings = load_settings([*argv, "--workspaces.eu.ssl_root_cert=eu.pem"], {})
    assert settings.workspace_of(eu).ssl_root_cert == "eu.pem"
