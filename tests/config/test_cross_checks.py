"""What one key requires of others: known names, complete workspaces, targets with an address."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.config import Problem, Settings, load
from tests.support.configuring import ENDPOINT, ENDPOINT_EU, loaded, refusals, written

EU = f'[targets.eu]\nendpoint = "{ENDPOINT_EU}"\n'
POINTS = """
[shard_maps.m]
kind = "list"
key_type = "int4"
mappings = [{ key = 1, target = "upstream" }, { key = 2, target = "zz" }]
"""
FAKE_SECRET = "not-a-real-secret"


# Names


@pytest.mark.parametrize(
    ("toml", "key", "said"),
    [
        (
            '[targets.eu]\n[targets.us]\n[databases]\norders = "euu"\n',
            "databases.orders",
            "there is no target 'euu' (there is: eu, us, upstream); did you mean eu?",
        ),
        (
            '[databases]\norders = { target = "zz" }\n',
            "databases.orders.target",
            "there is no target 'zz' (there is: upstream)",
        ),
        (
            POINTS,
            "shard_maps.m.mappings",
            "mapping 2: there is no target 'zz' (there is: upstream)",
        ),
        (
            '[routing]\nshard_map = "zz"\n',
            "routing.shard_map",
            "there is no shard map 'zz' (there is: none)",
        ),
        (
            '[upstream]\nworkspace = "zz"\n[workspaces.eu]\nprofile = "p"\n',
            "upstream.workspace",
            "there is no workspace 'zz' (there is: eu)",
        ),
        (
            '[targets.eu]\nworkspace = "zz"\n',
            "targets.eu.workspace",
            "there is no workspace 'zz' (there is: none)",
        ),
        (
            "[targets.eu]\n[targets.EU]\n[targets.us]\n",
            "targets.EU",
            "another name differs only in case: a variable could mean either",
        ),
    ],
)
def test_an_unknown_name_is_reported_with_the_known_names(
    tmp_path: Path, toml: str, key: str, said: str
) -> None:
    argv = written(tmp_path, toml)
    assert refusals(argv)[key] == f"(file {argv[1]}): {said}"


def test_unknown_names_are_reported_with_every_other_problem() -> None:
    said = refusals(
        ["--databases.orders=euu", "--listen.port=x"],
        {"LAKEBASE_PROXY_ROUTING__SHARD_MAP": "m", "LAKEBASE_PROXY_TARGETS__EU__PORT": "0"},
        upstream_required=True,
    )
    assert said.keys() == {
        "databases.orders",
        "listen.port",
        "routing.shard_map",
        "targets.eu.port",
    }


def test_an_invalid_name_is_reported_once() -> None:
    assert "must be a name" in refusals(["--databases.orders=a b"])["databases.orders"]
    assert "must be a name" in refusals(["--targets.a b.port=1"])['targets."a b"']


def test_no_target_can_be_named_upstream() -> None:
    said = refusals(["--targets.upstream.port=1"])["targets.upstream"]
    assert "upstream is the section [upstream]" in said


def test_a_long_list_of_invalid_entries_is_reported_in_part(tmp_path: Path) -> None:
    entries = ", ".join(f'{{ key = {n}, target = "zz" }}' for n in range(1000))
    said = refusals(
        written(
            tmp_path,
            f'[shard_maps.m]\nkind = "list"\nkey_type = "int4"\nmappings = [{entries}]\n',
        )
    )
    lines = said["shard_maps.m.mappings"].splitlines()
    assert len(lines) == 11
    assert lines[-1] == "and 990 more"


# Workspaces


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, ["auth_type", "host"]),
        ({"host": "h"}, ["auth_type"]),
        ({"profile": "p"}, []),
        ({"token": FAKE_SECRET}, ["host"]),
        ({"host": "h", "token": FAKE_SECRET}, []),
        ({"host": "h", "client_id": "c"}, ["auth_type"]),
        ({"host": "h", "client_secret": FAKE_SECRET}, ["client_id"]),
        ({"host": "h", "client_id": "c", "client_secret": FAKE_SECRET}, []),
        ({"host": "h", "client_id": "c", "client_secret_file": "/s"}, []),
        ({"host": "h", "auth_type": "file-oidc", "client_id": "c"}, []),
        ({"host": "h", "google_service_account": "g"}, ["auth_type"]),
    ],
)
def test_a_named_workspace_needs_a_host_and_a_login(
    keys: dict[str, str], missing: list[str]
) -> None:
    # The default workspace has everything, and none of it may be inherited.
    environ = {"LAKEBASE_PROXY_WORKSPACE__HOST": "h", "LAKEBASE_PROXY_WORKSPACE__TOKEN": "t"}
    argv = [
        f"--workspaces.eu.{key}={value}" for key, value in (keys or {"config_file": "x"}).items()
    ]
    if not missing:
        assert load(argv, environ).settings.workspaces.keys() == {"eu"}
        return
    said = refusals(argv, environ)
    assert sorted(said) == [f"workspaces.eu.{key}" for key in missing]
    assert FAKE_SECRET not in str(said)


# Targets that can be dialled


@pytest.mark.parametrize(
    ("toml", "missing"),
    [
        (EU, []),
        (EU + '[databases]\norders = "eu"\n', []),
        (EU + '[databases]\norders = "upstream"\n', ["upstream.endpoint"]),
        (EU + '[databases]\norders = { target = "upstream" }\n', ["upstream.endpoint"]),
        (EU + '[upstream]\nhost = "h"\n', ["upstream.endpoint"]),
        (EU + "[upstream]\nport = 1\n", []),
        (EU + "[targets.us]\nport = 1\n", ["targets.us.endpoint"]),
        (
            EU + f'[upstream]\nendpoint = "{ENDPOINT}"\n[targets.us]\nhost = "h"\n',
            ["targets.us.endpoint"],
        ),
        (EU + f'[upstream]\nendpoint = "{ENDPOINT}"\n[targets.us]\nport = 1\n', []),
        (EU + '[targets.us]\ninstance = "x"\nhost = "a-pooler.example.com"\n', []),
        (
            EU + '[targets.us]\nhost = "a-pooler.example.com"\n[credentials]\npassword_file = "p"\n'
            '[upstream]\nuser = "u"\n',
            [],
        ),
        (
            EU + '[targets.us]\nport = 1\n[credentials]\npassword_file = "p"\n',
            ["targets.eu.user", "targets.us.host", "targets.us.user"],
        ),
    ],
)
def test_every_target_of_sessions_must_have_what_a_connection_needs(
    tmp_path: Path, toml: str, missing: list[str]
) -> None:
    argv = written(tmp_path, toml)
    if missing:
        assert sorted(refusals(argv, upstream_required=True)) == missing
    loaded(argv, dials=not missing)


@pytest.mark.parametrize(
    ("toml", "refused"),
    [
        (f'[upstream]\nendpoint = "{ENDPOINT}"\nread_only = true\n', []),
        (f'[upstream]\nendpoint = "{ENDPOINT}"\nhost = "h"\nread_only = false\n', []),
        (
            f'[upstream]\nendpoint = "{ENDPOINT}"\nhost = "h"\nread_only = true\n',
            ["upstream.read_only"],
        ),
        (EU + "read_only = true\n", []),
        (EU + 'host = "h"\nread_only = true\n', ["targets.eu.read_only"]),
        (EU + 'host = "h"\n[upstream]\nread_only = true\n', ["targets.eu.read_only"]),
        (
            EU
            + f'[upstream]\nendpoint = "{ENDPOINT}"\nhost = "h"\n[targets.us]\nread_only = true\n',
            ["targets.us.read_only"],
        ),
    ],
)
def test_a_read_only_host_is_looked_up_or_configured_and_never_ignored(
    tmp_path: Path, toml: str, refused: list[str]
) -> None:
    # The guide's environment names the host, and read_only was ignored without an error.
    argv = written(tmp_path, toml)
    if not refused:
        loaded(argv, dials=True)
        return
    said = refusals(argv, upstream_required=True)
    assert sorted(said) == refused
    assert "must not be set together with host" in said[refused[0]]


@pytest.mark.parametrize("given", ["true", "1", "YES", "on"])
def test_read_only_beside_the_guides_host_is_refused_in_any_spelling(
    given: str,
) -> None:
    environ = {"PGHOST": "h", "ENDPOINT_NAME": ENDPOINT}
    said = refusals([f"--upstream.read_only={given}"], environ, upstream_required=True)
    assert "or PGHOST" in said["upstream.read_only"]
    argv = ["--upstream.read_only=false"]
    assert loaded(argv, environ, dials=True).settings.upstream.host == "h"


KEYED = (
    EU + '[shard_maps.m]\nkind = "list"\nkey_type = "int4"\n'
    'mappings = [{ key = 1, target = "eu" }]\n[routing]\nshard_map = "m"\n'
)


def test_sessions_without_a_key_need_upstream_only_if_they_are_allowed(tmp_path: Path) -> None:
    argv = written(tmp_path, KEYED)
    loaded(argv, dials=True)
    for false in ("false", "0", "no", "OFF"):
        said = refusals([*argv, f"--routing.require_key={false}"], upstream_required=True)
        assert said.keys() == {"upstream.endpoint"}


def test_raw_and_valid_settings_agree_on_whether_upstream_is_a_target(tmp_path: Path) -> None:
    for flags in (
        [],
        ["--routing.require_key=f"],
        ["--upstream.host=h"],
        ["--databases.x=upstream"],
    ):
        argv = [*written(tmp_path, KEYED), *flags]
        is_target = "upstream" in loaded(argv).settings.target_names()
        refused = bool(flags) and bool(refusals(argv, upstream_required=True))
        assert is_target == refused


# Pools


def test_p1_no_target_pools_unless_it_is_configured_to(tmp_path: Path) -> None:
    argv = written(tmp_path, EU + '[targets.migrations]\npool = "off"\n')
    assert {one.pool for one in loaded(argv).settings.targets.values()} == {"off"}
    inherited = loaded([*argv, "--upstream.pool=session"]).settings
    modes = [inherited.target(name).pool for name in ("eu", "migrations")]
    assert modes == ["session", "off"]


def test_pools_by_transaction_are_refused_by_name() -> None:
    said = refusals(["--upstream.pool=transaction", "--targets.eu.pool=statement"])
    assert "as pools by transaction are not built yet" in said["upstream.pool"]
    assert "must be 'off' or 'session', not 'statement'" in said["targets.eu.pool"]


@pytest.mark.parametrize(
    ("toml", "refused"),
    [
        ("[upstream]\npool_idle_max = 0\n", {"upstream": ["pool_idle_max, which is 0"]}),
        ("[upstream]\npool_idle_max = 0\npool_spare_min = 0\n", {}),
        ("[upstream]\npool_spare_min = 10\n", {}),
        ("[upstream]\npool_spare_min = 11\n", {"upstream": ["pool_idle_max, which is 10"]}),
        ("[upstream]\npool_size_max = 2\npool_spare_min = 2\n", {}),
        (
            "[upstream]\npool_size_max = 2\npool_spare_min = 3\n",
            {"upstream": ["pool_size_max, which is 2"]},
        ),
        (
            "[upstream]\npool_size_max = 2\npool_idle_max = 2\npool_spare_min = 3\n[targets.eu]\n",
            {"upstream": ["pool_idle_max, which is 2", "pool_size_max, which is 2"]},
        ),
        (
            "[upstream]\npool_idle_max = 2\n[targets.eu]\npool_spare_min = 3\n[targets.us]\n",
            {"targets.eu": ["pool_idle_max, which is 2"]},
        ),
        # The section's own check reports these; the others still are.
        ("[upstream]\npool_spare_min = -1\n", {"upstream": ["greater than or equal to 0"]}),
        (
            '[upstream]\npool_idle_max = "x"\npool_size_max = 1\npool_spare_min = 2\n',
            {"upstream": ["pool_size_max, which is 1"]},
        ),
        ('[upstream]\npool_spare_min = "x"\n', {"upstream": ["valid integer"]}),
    ],
)
def test_p4_more_spares_than_a_pool_may_have_are_refused(
    tmp_path: Path, toml: str, refused: dict[str, list[str]]
) -> None:
    argv = written(tmp_path, toml)
    if not refused:
        loaded(argv)
        return
    said = refusals(argv)
    spares = {key: text for key, text in said.items() if key.endswith(".pool_spare_min")}
    assert spares.keys() == {f"{section}.pool_spare_min" for section in refused}
    for section, texts in refused.items():
        lines = spares[f"{section}.pool_spare_min"].splitlines()
        assert len(lines) == len(texts)
        assert all(text in line for text, line in zip(texts, lines, strict=True))


@pytest.mark.parametrize(
    ("toml", "refused"),
    [
        ('[upstream]\npool = "session"\nhost = "ep-a-pooler.example.com"\n', ["upstream"]),
        ('[upstream]\npool = "session"\npooled = true\n[targets.eu]\nport = 1\n', ["upstream"]),
        ('[upstream]\npool = "off"\nhost = "ep-a-pooler.example.com"\n', []),
        ('[upstream]\nhost = "ep-a-pooler.example.com"\n', []),
        ('[upstream]\npool = "session"\nhost = "ep-a.pooler.example.com"\n', []),
        ('[upstream]\npool = "session"\n[targets.eu]\npooled = true\n', ["targets.eu"]),
        (
            '[upstream]\npool = "session"\n[targets.eu]\nhost = "A-POOLER.example.com"\n',
            ["targets.eu"],
        ),
        ('[upstream]\npooled = true\n[targets.eu]\npool = "session"\n', ["targets.eu"]),
        (
            '[upstream]\nhost = "a-pooler.x"\n[targets.eu]\nhost = "a.x"\npool = "session"\n',
            [],
        ),
    ],
)
def test_p5_a_pool_with_a_pooled_host_is_refused(
    tmp_path: Path, toml: str, refused: list[str]
) -> None:
    argv = written(tmp_path, toml)
    if not refused:
        loaded(argv)
        return
    said = refusals(argv)
    assert said.keys() == {f"{section}.pool" for section in refused}
    assert all("must be off with a pooled host" in text for text in said.values())


def test_p4_p5_problems_of_pools_are_reported_with_all_others() -> None:
    flags = ["--upstream.pool=session", "--upstream.pooled=on", "--upstream.pool_idle_max=0"]
    said = refusals([*flags, "--listen.port=x"], {"PGPORT": "y"})
    assert said.keys() == {
        "listen.port",
        "upstream.port",
        "upstream.pool",
        "upstream.pool_spare_min",
    }


# What others find


def test_problems_of_other_checks_are_reported_with_the_source_of_their_key(
    tmp_path: Path,
) -> None:
    def inspect(settings: Settings) -> Iterator[Problem]:
        assert settings.routing.shard_map == "m"
        yield Problem(
            "shard_maps.m.mappings", "mapping 1 (1 on eu) and mapping 1 (1 on eu) overlap"
        )
        yield Problem("shard_maps.m.mappings_file", "cannot be read", "line 7")

    argv = written(tmp_path, KEYED)
    said = refusals(argv, inspect=[inspect])
    overlap = "mapping 1 (1 on eu) and mapping 1 (1 on eu) overlap"
    assert said["shard_maps.m.mappings"] == f"(file {argv[1]}): {overlap}"
    assert said["shard_maps.m.mappings_file"] == "(line 7): cannot be read"


def test_a_target_that_two_checks_find_unknown_is_reported_once(tmp_path: Path) -> None:
    def inspect(_settings: Settings) -> Iterator[Problem]:
        yield Problem("shard_maps.m.mappings", "mapping 2: there is no target 'zz'")
        yield Problem("shard_maps.m.mappings", "mapping 7: there is no target 'zz'")

    (first, second) = refusals(written(tmp_path, POINTS), inspect=[inspect])[
        "shard_maps.m.mappings"
    ].splitlines()
    assert "mapping 2: there is no target 'zz' (there is: upstream)" in first
    assert "mapping 7: there is no target 'zz'" in second


def test_no_further_check_sees_settings_that_are_not_valid() -> None:
    asked: list[Settings] = []

    def ask(settings: Settings) -> list[Problem]:
        asked.append(settings)
        return []

    assert refusals(["--listen.port=x"], inspect=[ask]).keys() == {"listen.port"}
    assert asked == []
    load([], {}, inspect=[ask])
    assert asked == [Settings()]
