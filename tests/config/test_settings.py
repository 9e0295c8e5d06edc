"""What follows from all sections together: the effective values of a target, and warnings."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy.config import (
    UPSTREAM,
    CredentialsSettings,
    DatabaseAlias,
    ListenSettings,
    MappingEntry,
    RoutingSettings,
    Settings,
    ShardMapSettings,
    UpstreamSettings,
    WorkspaceSettings,
)
from proxy.routing.keys import KeyType
from proxy.routing.shard_map import Kind
from tests.support.configuring import ENDPOINT, ENDPOINT_EU, loaded, refusals, written

EU = UpstreamSettings(endpoint=ENDPOINT_EU)
MAP = ShardMapSettings(
    kind=Kind.LIST, key_type=KeyType.INT4, mappings=(MappingEntry("eu", key="1"),)
)


# A target's values


def test_a_target_inherits_what_it_does_not_set() -> None:
    upstream = UpstreamSettings(endpoint=ENDPOINT, port=6000, database="shop", sslmode="verify-ca")
    settings = Settings(
        upstream=upstream, targets={"eu": UpstreamSettings(port=7000, database="shop_eu")}
    )
    target = settings.target("eu")
    assert (target.port, target.database) == (7000, "shop_eu")
    assert (target.endpoint, target.sslmode) == (ENDPOINT, "verify-ca")
    assert settings.target(UPSTREAM) == upstream


def test_a_value_that_a_target_sets_to_its_default_is_set() -> None:
    settings = Settings(
        upstream=UpstreamSettings(port=6000, read_only=True),
        targets={"eu": UpstreamSettings(port=5432, read_only=False)},
    )
    assert (settings.target("eu").port, settings.target("eu").read_only) == (5432, False)


@pytest.mark.parametrize(
    "own",
    [
        {"endpoint": ENDPOINT_EU},
        {"instance": "shop-eu"},
        {"host": "eu.example.com"},
        {"hostaddr": "10.0.0.2"},
        {"workspace": "eu"},
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_target_with_an_address_inherits_no_part_of_one(
    own: dict[str, str],
) -> None:
    """PGHOST is in the environment of the guide: it must not send every target to one host."""
    settings = Settings(
        upstream=UpstreamSettings(endpoint=ENDPOINT, host="h.example.com", hostaddr="10.0.0.1"),
        workspaces={"eu": WorkspaceSettings(profile="eu")},
        targets={"eu": UpstreamSettings.model_validate(own)},
    )
    where = {name: getattr(settings.target("eu"), name) for name in ("endpoint", "instance")}
    where |= {name: getattr(settings.target("eu"), name) for name in ("host", "hostaddr")}
    assert where == {"endpoint": "", "instance": "", "host": "", "hostaddr": ""} | {
        name: value for name, value in own.items() if name != "workspace"
    }


def test_an_empty_host_of_a_target_unsets_the_inherited_host_only() -> None:
    settings = Settings(
        upstream=UpstreamSettings(endpoint=ENDPOINT, host="h.example.com"),
        targets={"eu": UpstreamSettings(host="", workspace="")},
    )
    assert (settings.target("eu").endpoint, settings.target("eu").host) == (ENDPOINT, "")


def test_a_change_of_all_targets_is_made_once_to_the_effective_values_of_each() -> None:
    settings = Settings(
        upstream=UpstreamSettings(endpoint=ENDPOINT, port=6000, connects_max=10),
        workspaces={"eu": WorkspaceSettings(profile="eu")},
        targets={
            "inheriting": UpstreamSettings(database="shop"),
            "own": UpstreamSettings(endpoint=ENDPOINT_EU, workspace="eu", connects_max=4),
        },
    )

    def halved(target: UpstreamSettings) -> UpstreamSettings:
        return target.model_copy(update={"connects_max": target.connects_max // 2})

    changed = settings.with_targets(halved)
    found = {name: changed.target(name).connects_max for name in changed.target_names()}
    assert found == {"upstream": 5, "inheriting": 5, "own": 2}
    for name in settings.target_names():
        before = settings.target(name)
        assert (
            changed.target(name).model_copy(update={"connects_max": before.connects_max}) == before
        )


def test_an_unknown_target_has_no_values() -> None:
    with pytest.raises(KeyError):
        Settings().target("eu")


def test_a_target_keeps_what_it_was_given_through_every_source(tmp_path: Path) -> None:
    file = written(tmp_path, f'[upstream]\nport = 1\n[targets.eu]\nendpoint = "{ENDPOINT_EU}"\n')
    environ = {"PGHOST": "guide.example.com", "LAKEBASE_PROXY_TARGETS__EU__DATABASE": "shop"}
    settings = loaded([*file, "--targets.eu.user", "app"], environ, dials=False).settings
    target = settings.target("eu")
    assert (target.endpoint, target.host, target.port) == (ENDPOINT_EU, "", 1)
    assert (target.database, target.user) == ("shop", "app")


# Which targets there are


@pytest.mark.parametrize(
    ("sections", "is_target"),
    [
        ({}, False),
        ({"upstream": UpstreamSettings(port=6000, user="app")}, False),
        ({"upstream": UpstreamSettings(endpoint=ENDPOINT)}, True),
        ({"upstream": UpstreamSettings(host="h")}, True),
        ({"databases": {"orders": DatabaseAlias(target="eu")}}, False),
        ({"databases": {"orders": DatabaseAlias(target="upstream")}}, True),
        ({"shard_maps": {"m": MAP}, "routing": RoutingSettings(shard_map="m")}, False),
        (
            {
                "shard_maps": {"m": MAP},
                "routing": RoutingSettings(shard_map="m", require_key=False),
            },
            True,
        ),
        (
            {
                "shard_maps": {
                    "m": ShardMapSettings(
                        kind=Kind.LIST,
                        key_type=KeyType.INT4,
                        mappings=(MappingEntry("upstream", key="1"),),
                    )
                }
            },
            True,
        ),
    ],
)
def test_upstream_is_a_target_if_sessions_can_be_sent_there(
    sections: dict[str, object], is_target: bool
) -> None:
    settings = Settings.model_validate({"targets": {"eu": EU}, **sections})
    assert settings.target_names() == (("upstream", "eu") if is_target else ("eu",))


def test_without_other_targets_upstream_is_the_only_one() -> None:
    assert Settings().target_names() == ("upstream",)


def test_targets_of_one_workspace_share_it() -> None:
    named = WorkspaceSettings(profile="eu")
    settings = Settings(
        workspaces={"eu": named},
        targets={"a": UpstreamSettings(workspace="eu"), "b": UpstreamSettings(workspace="")},
    )
    assert settings.workspace_of(settings.target("a")) is named
    for name in ("b", "upstream"):
        assert settings.workspace_of(settings.target(name)) is settings.workspace


def test_a_target_inherits_its_workspace_unless_it_sets_one() -> None:
    named = WorkspaceSettings(profile="eu")
    settings = Settings(
        workspaces={"eu": named},
        upstream=UpstreamSettings(workspace="eu"),
        targets={"a": EU, "b": UpstreamSettings(workspace="")},
    )
    assert settings.workspace_of(settings.target("a")) is named
    assert settings.workspace_of(settings.target("b")) is settings.workspace


@pytest.mark.parametrize(
    ("routing", "required"),
    [
        ({}, False),
        ({"shard_map": "m"}, True),
        ({"shard_map": "m", "require_key": False}, False),
        ({"require_key": True}, True),
    ],
)
def test_a_key_is_required_with_a_map_unless_configured_otherwise(
    routing: dict[str, object], required: bool
) -> None:
    assert RoutingSettings.model_validate(routing).require_key is required


# Warnings


def test_the_defaults_cause_no_warning() -> None:
    assert Settings().warnings() == []


def test_each_target_without_full_certificate_verification_is_warned_of() -> None:
    settings = Settings(
        upstream=UpstreamSettings(endpoint=ENDPOINT, sslmode="verify-ca"),
        targets={"a": EU, "b": UpstreamSettings(sslmode="require")},
    )
    first, second, third = settings.warnings()
    assert first.startswith("upstream.sslmode verify-ca does not compare the host name")
    assert second.startswith("targets.a.sslmode verify-ca")
    assert third.startswith("targets.b.sslmode require verifies no certificate")


def test_a_remote_listener_is_warned_of() -> None:
    settings = Settings(listen=ListenSettings(host="0.0.0.0", allow_remote=True))
    (warning,) = settings.warnings()
    assert "listen.host 0.0.0.0 is not loopback" in warning
    assert Settings(listen=ListenSettings(allow_remote=True)).warnings() == []


@pytest.mark.parametrize(("connect", "mint", "said"), [(30, 30, 0), (29.5, 30, 1), (60, 61, 1)])
def test_a_connect_timeout_shorter_than_a_mint_is_warned_of(
    connect: float, mint: float, said: int
) -> None:
    settings = Settings(
        upstream=UpstreamSettings(endpoint=ENDPOINT),
        targets={"a": UpstreamSettings(connect_timeout_seconds=connect)},
        credentials=CredentialsSettings(mint_timeout_seconds=mint),
    )
    warnings = [one for one in settings.warnings() if one.startswith("targets.a")]
    assert len(warnings) == said
    if said:
        assert f"connect_timeout_seconds {connect:g} is less than" in warnings[0]
    native = CredentialsSettings(mint_timeout_seconds=mint, password_file="p")
    assert settings.model_copy(update={"credentials": native}).warnings() == []


# Workspaces


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("", True),
        ("https://shop.cloud.databricks.com", True),
        ("shop.cloud.databricks.com", True),
        ("http://127.0.0.1:8080", True),
        ("http://localhost:8080/", True),
        ("http://[::1]:8080", True),
        ("http://shop.cloud.databricks.com", False),
        ("HTTP://10.0.0.1", False),
        (" http://shop.cloud.databricks.com", False),
        ("http://localhost.example.com", False),
        ("http://localhost@example.com", False),
        ("http://", False),
    ],
)
def test_a_client_secret_never_leaves_the_machine_in_plaintext(host: str, good: bool) -> None:
    if good:
        assert WorkspaceSettings(host=host).host == host
        return
    with pytest.raises(ValidationError, match="must be https://"):
        WorkspaceSettings(host=host)
    for section in ("workspace", "workspaces.eu"):
        said = refusals([f"--{section}.host={host}"])
        assert "must be https://" in said[f"{section}.host"]


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("https://shop.cloud.databricks.com/sql/warehouses", "has a path"),
        ("shop.cloud.databricks.com/browse", "has a path"),
        ("https://shop.cloud.databricks.com/?a=b", "has a query"),
        ("https://shop.cloud.databricks.com/#job", "has a query"),
        ('"https://shop.cloud.databricks.com"', "in quotes"),
        ("https://shop.cloud.databricks.com:4x", "no URL"),
        ("https://shop cloud.databricks.com", "no valid host name"),
        ("https://me:not-real@shop.cloud.databricks.com", "a user or a password"),
        ("postgresql://shop.cloud.databricks.com", "must begin with https://"),
    ],
)
def test_a_workspace_host_that_is_more_than_an_address_is_a_problem_of_its_key(
    host: str, why: str
) -> None:
    # It was reported at the first mint, after the proxy had started.
    for section in ("workspace", "workspaces.eu"):
        said = refusals([f"--{section}.host={host}"])
        assert why in said[f"{section}.host"]
        assert "not-real" not in said[f"{section}.host"]


@pytest.mark.parametrize("after", ["/", "/?o=123", "?o=123", " \n"])
def test_what_is_harmless_after_a_workspace_host_is_no_problem(after: str) -> None:
    WorkspaceSettings(host=f"https://shop.cloud.databricks.com{after}")


# Listening


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"unix_socket_directory": "run"}, "must be an absolute path"),
        ({"unix_socket_directory": "/" + "x" * 92}, "at most 92 bytes"),
        ({"unix_socket_mode": "0800"}, "must be three octal digits"),
        ({"unix_socket_mode": "rw"}, "must be three octal digits"),
        ({"tls_key": "k"}, "must be set if listen.tls_certificate is"),
        ({"tls_certificate": "c"}, "must be set if listen.tls_certificate is"),
        (
            {"tls": "self-signed", "tls_certificate": "c", "tls_key": "k"},
            "together with listen.tls",
        ),
    ],
)
def test_an_impossible_listener_is_refused(keys: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ListenSettings.model_validate(keys)


def test_a_listener_accepts_the_longest_directory_and_either_spelling_of_a_mode() -> None:
    directory = "/" + "x" * 91
    for mode in ("0660", "660"):
        listen = ListenSettings(unix_socket_directory=directory, unix_socket_mode=mode)
        assert (listen.unix_socket_directory, listen.unix_socket_mode) == (directory, mode)


@pytest.mark.parametrize("seconds", [0, 0.1, 604_800])
def test_an_idle_timeout_is_0_or_at_least_the_minimum(seconds: float) -> None:
    assert ListenSettings(idle_timeout_seconds=seconds).idle_timeout_seconds == seconds


@pytest.mark.parametrize("seconds", [-1, 0.000001, 0.099, 604_801])
def test_an_idle_timeout_out_of_bounds_is_refused(seconds: float) -> None:
    # Sessions that are idle in a transaction were checked without a pause.
    with pytest.raises(ValidationError):
        ListenSettings(idle_timeout_seconds=seconds)
