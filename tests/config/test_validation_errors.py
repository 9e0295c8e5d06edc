"""The errors for unknown keys in tables with chosen names, and for values in place of tables."""

import pytest

from tests.support.configuring import refusals

FAKE_SECRET = "not-a-real-secret"


@pytest.mark.parametrize(
    ("argv", "environ", "key", "meant"),
    [
        (["--targets.eu.endpont=x"], {}, "targets.eu.endpont", "--targets.eu.endpoint"),
        (["--target.eu.port=1"], {}, "target.eu.port", "--targets.eu.port"),
        (["--targets.eu.client_id=1"], {}, "targets.eu.client_id", "--workspaces.eu.client_id"),
        (["--databases.a.databse=x"], {}, "databases.a.databse", "--databases.a.database"),
        (["--shard_maps.m.knd=x"], {}, "shard_maps.m.knd", "--shard_maps.m.kind"),
        (["--shard-maps.m.kind=x"], {}, "shard-maps.m.kind", "--shard_maps.m.kind"),
        (["--routing.require_keys=x"], {}, "routing.require_keys", "--routing.require_key"),
        (
            [],
            {"LAKEBASE_PROXY_TARGETS__EU__PROT": "1"},
            "targets.eu.prot",
            "LAKEBASE_PROXY_TARGETS__EU__PORT",
        ),
        (
            [],
            {"LAKEBASE_PROXY_WORKSPACES__EU__TOKNE": FAKE_SECRET},
            "workspaces.eu.tokne",
            "LAKEBASE_PROXY_WORKSPACES__EU__TOKEN",
        ),
    ],
)
def test_an_unknown_key_of_a_table_is_reported_with_the_nearest_one(
    argv: list[str], environ: dict[str, str], key: str, meant: str
) -> None:
    said = refusals(argv, environ)
    assert f"unknown key; did you mean {meant}?" in said[key]
    assert FAKE_SECRET not in str(said)


@pytest.mark.parametrize(
    ("flag", "key", "such_as"),
    [
        ("--targets=x", "targets", "--targets.NAME.endpoint"),
        ("--targets.eu=x", "targets.eu", "--targets.eu.endpoint"),
        ("--workspaces.eu=x", "workspaces.eu", "--workspaces.eu.host"),
        ("--shard_maps.m=x", "shard_maps.m", "--shard_maps.m.catalogue"),
        ("--databases=7", "databases", "--databases.NAME"),
    ],
)
def test_a_value_in_place_of_a_table_is_reported_with_one_of_its_keys(
    flag: str, key: str, such_as: str
) -> None:
    said = refusals([flag])[key]
    assert said.endswith(f"is a section: give one of its keys, such as {such_as}")


def test_an_alias_that_is_neither_name_nor_table_is_refused() -> None:
    said = refusals(['--databases={"a": 5, "b": {}}'])
    assert "must be a name or a table such as { target, database }" in said["databases.a"]
    assert said["databases.b.target"].endswith("required")


@pytest.mark.parametrize("value", ['["not-a-real-secret"]', "********"])
def test_a_secret_of_a_named_workspace_is_in_no_error(value: str) -> None:
    argv = ["--workspaces.eu.host=h", f"--workspaces.eu.client_secret={value}"]
    said = refusals([*argv, "--workspaces.eu.prot", FAKE_SECRET, FAKE_SECRET])
    assert FAKE_SECRET not in str(said)
    assert "workspaces.eu.prot" in said


def test_the_mask_is_refused_as_a_secret() -> None:
    said = refusals(["--workspace.token=********"])["workspace.token"]
    assert "not the mask" in said
