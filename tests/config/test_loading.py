"""Settings: their sources, the precedence of these, and the errors."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from proxy.config import (
    ConfigurationError,
    SettingKey,
    Settings,
    load_settings,
    settings_keys,
)

FAKE_SECRET = "not-a-real-secret"
ENDPOINT = "projects/shop/branches/production/endpoints/primary"


def refused(
    argv: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    upstream_required: bool = False,
) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(argv, environ or {}, upstream_required=upstream_required)
    assert caught.value.__cause__ is caught.value.__context__ is None, "a cause would show values"
    return str(caught.value)


def value_of(settings: Settings, dotted: str) -> object:
    section, name = dotted.split(".")
    value = getattr(getattr(settings, section), name)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


# Sources and their precedence


def test_without_any_source_every_key_has_its_default() -> None:
    assert load_settings([], {}) == Settings()


def test_flags_precede_environment_file_guide_and_default(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('[upstream]\nhost = "file"\nport = 3\ndatabase = "file"\n')
    guide = {"PGHOST": "guide", "PGPORT": "4", "PGDATABASE": "guide", "PGUSER": "guide"}
    environ = {
        "LAKEBASE_PROXY_CONFIG": str(file),
        "LAKEBASE_PROXY_UPSTREAM__HOST": "environment",
        "LAKEBASE_PROXY_UPSTREAM__PORT": "2",
    }
    upstream = load_settings(["--upstream.host", "flag"], guide | environ).upstream
    assert (upstream.host, upstream.port) == ("flag", 2)
    assert (upstream.database, upstream.user) == ("file", "guide")
    assert upstream.sslmode == "verify-full"


def test_sources_complete_one_section_together(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("[listen]\nmax_connections = 7\n")
    listen = load_settings(
        ["--config", str(file), "--listen.port=6000"], {"LAKEBASE_PROXY_LISTEN__HOST": "::1"}
    ).listen
    assert (listen.host, listen.port, listen.max_connections) == ("::1", 6000, 7)


@pytest.mark.parametrize("argv", [["--listen.port", "6000"], ["--listen.port=6000"]])
def test_a_flag_takes_its_value_with_a_space_or_an_equals_sign(argv: list[str]) -> None:
    assert load_settings(argv, {}).listen.port == 6000


def test_the_last_of_two_equal_flags_is_used() -> None:
    assert load_settings(["--listen.port=1", "--listen.port=2"], {}).listen.port == 2


def test_an_equals_sign_gives_a_value_that_looks_like_a_flag_or_is_empty() -> None:
    upstream = load_settings(["--upstream.user=--x=y", "--upstream.host="], {}).upstream
    assert (upstream.user, upstream.host) == ("--x=y", "")


def test_a_switch_needs_no_value() -> None:
    argv = ["--listen.allow_remote", "--listen.host", "0.0.0.0", "--admin.enabled", "false"]
    settings = load_settings(argv, {})
    assert settings.listen.allow_remote
    assert not settings.admin.enabled


@pytest.mark.parametrize("key", settings_keys(), ids=lambda key: key.dotted)
def test_every_key_can_be_given_as_flag_and_as_variable(key: SettingKey) -> None:
    default = value_of(Settings(), key.dotted)
    text = str(default).lower() if key.is_boolean else str(default).removesuffix(".0")
    assert load_settings([f"{key.flag}={text}"], {}) == Settings()
    assert load_settings([], {key.variable: text}) == Settings()


def test_a_flag_names_another_file_than_the_environment(tmp_path: Path) -> None:
    chosen, ignored = tmp_path / "chosen.toml", tmp_path / "ignored.toml"
    chosen.write_text("[listen]\nport = 1\n")
    ignored.write_text("[listen]\nport = 2\nmax_connections = 3\n")
    settings = load_settings([f"--config={chosen}"], {"LAKEBASE_PROXY_CONFIG": str(ignored)})
    assert (settings.listen.port, settings.listen.max_connections) == (1, 1000)


def test_the_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKEBASE_PROXY_LISTEN__PORT", "6000")
    monkeypatch.setenv("LISTEN", '{"port": 6001}')
    monkeypatch.setenv("PGHOST", "db.example.com")
    assert load_settings([], {}) == Settings()


# The environment of the Lakebase guide


@pytest.mark.parametrize("variable", ["ENDPOINT_NAME", "LAKEBASE_ENDPOINT"])
def test_the_guides_environment_is_enough(variable: str) -> None:
    environ = {
        variable: ENDPOINT,
        "PGHOST": "ep-x.database.example.com",
        "PGPORT": "5433",
        "PGDATABASE": "shop",
        "PGUSER": "app@example.com",
        "PGSSLMODE": "require",
        "DATABRICKS_HOST": "https://workspace.example.com",
        "DATABRICKS_CLIENT_SECRET": FAKE_SECRET,
    }
    settings = load_settings([], environ, upstream_required=True)
    upstream = settings.upstream
    assert (upstream.endpoint, upstream.host) == (ENDPOINT, "ep-x.database.example.com")
    assert (upstream.port, upstream.database, upstream.user) == (5433, "shop", "app@example.com")
    assert settings.workspace.host == "", "DATABRICKS_* is left to the SDK"


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca"])
def test_pgsslmode_never_weakens(mode: str) -> None:
    assert load_settings([], {"PGSSLMODE": mode}).upstream.sslmode == "verify-full"


def test_endpoint_name_precedes_lakebase_endpoint() -> None:
    other = ENDPOINT.replace("primary", "replica")
    environ = {"ENDPOINT_NAME": ENDPOINT, "LAKEBASE_ENDPOINT": other}
    assert load_settings([], environ).upstream.endpoint == ENDPOINT


def test_an_empty_variable_of_the_guide_counts_as_not_set() -> None:
    environ = {"PGPORT": "", "PGDATABASE": "", "PGHOST": "", "ENDPOINT_NAME": ""}
    assert load_settings([], environ) == Settings()


# What is wrong


def test_every_problem_of_every_source_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(
        '[listen]\nmax_connections = 0\n[log]\nlevle = "info"\n[sutdown]\ndrain_seconds = 1\n'
    )
    with pytest.raises(ConfigurationError) as caught:
        load_settings(
            ["--config", str(file), "--admin.port", "abc", "--prot=1", "stray"],
            {"LAKEBASE_PROXY_UPSTREAM__SSLMODE": "prefer", "PGPORT": "70000"},
            upstream_required=True,
        )
    assert {problem.key: problem.text for problem in caught.value.problems} == {
        "arguments": "not all of them are flags",
        "listen.max_connections": "must be greater than or equal to 1, not 0",
        "admin.port": "must be a valid integer, not 'abc'",
        "upstream.port": "must be less than or equal to 65535, not '70000'",
        "upstream.sslmode": "must be 'verify-full', 'verify-ca' or 'require', not 'prefer'",
        "log.levle": "unknown key; did you mean log.level?",
        "sutdown.drain_seconds": "unknown key; did you mean shutdown.drain_seconds?",
        "prot": "unknown key; did you mean --listen.port or --admin.port or --upstream.port?",
    }
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]


def test_problems_can_be_read_one_by_one() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(["--listen.port=-1"], {})
    (problem,) = caught.value.problems
    assert (problem.key, problem.given_as) == ("listen.port", "flag --listen.port")


@pytest.mark.parametrize(
    ("argv", "environ", "suggestion"),
    [
        (["--listen.prot=1"], {}, "did you mean --listen.port?"),
        (["--listen.allow-remote=1"], {}, "did you mean --listen.allow_remote?"),
        (["--Log.Level=info"], {}, "did you mean --log.level?"),
        (["--allow_remote"], {}, "did you mean --listen.allow_remote?"),
        (["--listen.sslmode=require"], {}, "did you mean --upstream.sslmode?"),
        (["--port=1"], {}, "did you mean --listen.port or --admin.port or --upstream.port?"),
        ([], {"LAKEBASE_PROXY_LISTEN__PROT": "1"}, "did you mean LAKEBASE_PROXY_LISTEN__PORT?"),
        ([], {"LAKEBASE_PROXY_LISTEN_PORT": "1"}, "did you mean LAKEBASE_PROXY_LISTEN__PORT?"),
        ([], {"LAKEBASE_PROXY_DATABASSES": "{}"}, "did you mean LAKEBASE_PROXY_DATABASES?"),
        ([], {"LAKEBASE_PROXY_CREDENTIAL__X": "1"}, "unknown key"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_known_one(
    argv: list[str], environ: dict[str, str], suggestion: str
) -> None:
    assert suggestion in refused(argv, environ)


@pytest.mark.parametrize("slip", ["LISTENS", "LISTENER", "ADMINS", "LOGS", "WORKSPACE_"])
def test_a_section_is_not_suggested_for_an_unknown_key(slip: str) -> None:
    # It would be refused itself: a section has no value.
    said = refused([], {f"LAKEBASE_PROXY_{slip}": "1"})
    assert "unknown key" in said
    for meant in re.findall(r"LAKEBASE_PROXY_\w+", said.partition("did you mean")[2]):
        assert "__" in meant


def test_a_misspelled_empty_table_is_reported_with_the_section(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("[lisen]\n")
    assert "did you mean listen?" in refused([f"--config={file}"])


@pytest.mark.parametrize("level", ["INFO", "info", "Warning", "DEBUG"])
def test_a_log_level_is_accepted_in_any_case(level: str) -> None:
    assert load_settings([f"--log.level={level}"], {}).log.level == level.lower()
    assert "must be 'debug', 'info'" in refused([f"--log.level={level}X"])


def test_an_unknown_key_is_reported_for_every_source_that_has_it(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("[listen]\nprot = 1\n")
    said = refused([f"--config={file}"], {"LAKEBASE_PROXY_LISTEN__PROT": "1"})
    assert "environment LAKEBASE_PROXY_LISTEN__PROT" in said
    assert f"file {file}" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LAKEBASE_PROXY_PORT", "tcp://10.0.0.1:5432"),
        ("LAKEBASE_PROXY_PORT_5432_TCP", "tcp://10.0.0.1:5432"),
        ("LAKEBASE_PROXY_PORT_5432_TCP_ADDR", "10.0.0.1"),
        ("LAKEBASE_PROXY_SERVICE_HOST", "10.0.0.1"),
        ("LAKEBASE_PROXY_SERVICE_PORT_POSTGRES", "5432"),
    ],
)
def test_the_service_links_of_kubernetes_are_not_ours(name: str, value: str) -> None:
    assert load_settings([], {name: value}) == Settings()


def test_a_port_number_without_a_section_is_not_a_service_link() -> None:
    assert "unknown key" in refused([], {"LAKEBASE_PROXY_PORT": "6000"})


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--listen", "5432", "--listen.host=::1"], {}),
        (["--listen.host=::1", "--listen", "5432"], {}),
        ([], {"LAKEBASE_PROXY_LISTEN": "x", "LAKEBASE_PROXY_LISTEN__HOST": "::1"}),
        ([], {"LAKEBASE_PROXY_LISTEN__HOST__X": "y", "LAKEBASE_PROXY_LISTEN__HOST": "::1"}),
    ],
)
def test_a_name_cannot_be_both_section_and_key(argv: list[str], environ: dict[str, str]) -> None:
    assert "given both as a section and as a key" in refused(argv, environ)


def test_a_value_in_place_of_a_section_is_reported_and_hides_nothing(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text("listen = 5432\n")
    said = refused([f"--config={file}", "--listen.port=x"], {"LAKEBASE_PROXY_LISTEN": "y"})
    assert f"listen (file {file}): is a section: give one of its keys" in said
    assert "such as LAKEBASE_PROXY_LISTEN__HOST" in said
    assert "listen.port (flag --listen.port)" in said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[listen\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"[listen]\nport = true\n", "must not be true or false"),
        (b"[upstream]\nhost = 5\n", "must be a valid string, not 5"),
        (b"[listen]\nstartup_timeout_seconds = nan\n", "must be a finite number"),
        (b"[listen]\nport = [1]\n", "must be a valid integer"),
        (b"[[listen]]\nport = 1\n", "is a section"),
        (b'[upstream]\nuser = "a\\u0000b"\n', "must not contain a NUL character"),
        (b'config = "other.toml"\n', "config (file"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "proxy.toml"
    file.write_bytes(content)
    said = refused([f"--config={file}"])
    assert problem in said
    assert str(file) in said


def test_a_missing_file_is_reported_with_the_other_problems(tmp_path: Path) -> None:
    said = refused(["--listen.port=x"], {"LAKEBASE_PROXY_CONFIG": str(tmp_path / "nowhere.toml")})
    assert "config (environment LAKEBASE_PROXY_CONFIG): cannot be read: no such file" in said
    assert "listen.port" in said


def test_an_empty_name_of_the_file_is_refused_as_a_flag_and_ignored_as_a_variable() -> None:
    assert "must name a file" in refused(["--config="])
    assert load_settings([], {"LAKEBASE_PROXY_CONFIG": ""}) == Settings()


@pytest.mark.parametrize("argv", [["--listen.port"], ["--listen.port", "--log.level=info"]])
def test_a_flag_without_its_value_is_reported(argv: list[str]) -> None:
    assert refused(argv) == "listen.port (flag --listen.port): needs a value"


def test_config_without_its_value_is_reported() -> None:
    assert refused(["--config"]) == "config (flag --config): needs a value"


# Bounds and forms


@pytest.mark.parametrize("key", ["listen.port", "admin.port"])
@pytest.mark.parametrize(("port", "good"), [(-1, False), (0, True), (65535, True), (65536, False)])
def test_ports_are_bounded(key: str, port: int, good: bool) -> None:
    if good:
        assert value_of(load_settings([f"--{key}={port}"], {}), key) == port
    else:
        assert key in refused([f"--{key}={port}"])


def test_the_upstream_port_cannot_be_0() -> None:
    assert "upstream.port" in refused(["--upstream.port=0"])


@pytest.mark.parametrize("host", ["10.1.2.3", "::ffff:10.1.2.3", "192.0.2.7"])
def test_no_client_could_quit_by_an_admin_address_that_loopback_does_not_reach(host: str) -> None:
    argv = [f"--admin.host={host}", "--admin.quit"]
    assert refused(argv).startswith(
        "admin.quit (flag --admin.quit): accepts requests from loopback"
    )
    assert load_settings(argv[:1], {}).admin.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost", "0.0.0.0", "::"])
def test_quit_is_accepted_for_an_admin_address_that_loopback_can_reach(host: str) -> None:
    assert load_settings([f"--admin.host={host}", "--admin.quit"], {}).admin.quit


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "localhost.example.com", "db"])
def test_a_host_that_is_not_loopback_needs_allow_remote(host: str) -> None:
    said = refused([f"--listen.host={host}"])
    assert said.startswith(f"listen.allow_remote: must be true because listen.host {host} is not")
    settings = load_settings([f"--listen.host={host}", "--listen.allow_remote"], {})
    assert settings.listen.host == host


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST", "::ffff:127.0.0.1"]
)
def test_loopback_needs_no_allow_remote(host: str) -> None:
    assert load_settings([f"--listen.host={host}"], {}).listen.host == host


def test_without_a_listen_host_the_unix_socket_is_required() -> None:
    argv = ["--listen.host=", "--listen.unix_socket_directory=/run/lakebase"]
    settings = load_settings(argv, {})
    assert (settings.listen.host, settings.warnings()) == ("", [])
    assert refused(argv[:1]).startswith(
        "listen.unix_socket_directory: required if listen.host is empty"
    )
    assert "it names the unix socket" in refused([*argv, "--listen.port=0"])


@pytest.mark.parametrize(
    "host", ["https://db.example.com", "db.example.com:5432", "a b", "a,b", "/run/pg", "-x", "."]
)
def test_an_invalid_host_is_refused(host: str) -> None:
    assert "must be a host name or an address" in refused([f"--upstream.host={host}"])


@pytest.mark.parametrize("host", ["a" * 253, "ep-x.database.us-west-2.example.com", "10.0.0.1"])
def test_valid_hosts_are_accepted(host: str) -> None:
    assert load_settings([f"--upstream.host={host}"], {}).upstream.host == host


def test_a_host_longer_than_dns_allows_is_refused() -> None:
    assert "upstream.host" in refused([f"--upstream.host={'a' * 254}"])


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1"])
def test_hostaddr_is_an_address(address: str) -> None:
    assert load_settings([f"--upstream.hostaddr={address}"], {}).upstream.hostaddr == address
    assert "must be an IPv4 or IPv6 address" in refused(["--upstream.hostaddr=db.example.com"])


@pytest.mark.parametrize(
    "endpoint", ["primary", "ep-sweet-y2nm75e1", "projects/p/branches/b", f"{ENDPOINT}/", "a b"]
)
def test_an_endpoint_is_a_resource_name(endpoint: str) -> None:
    assert "must have the form projects/" in refused([f"--upstream.endpoint={endpoint}"])


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", ""])
def test_no_sslmode_allows_plaintext(mode: str) -> None:
    assert "upstream.sslmode" in refused([f"--upstream.sslmode={mode}"])


def test_seconds_may_have_a_fraction() -> None:
    argv = ["--listen.startup_timeout_seconds=0.25"]
    assert load_settings(argv, {}).listen.startup_timeout_seconds == 0.25


# What a verb that dials needs


def test_other_verbs_need_no_upstream() -> None:
    load_settings([], {})


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], ["upstream.endpoint"]),
        (["--upstream.host=db"], ["upstream.endpoint"]),
        ([f"--upstream.endpoint={ENDPOINT}"], []),
        (["--credentials.password_file=/p"], ["upstream.host", "upstream.user"]),
        (["--credentials.password_file=/p", "--upstream.host=db"], ["upstream.user"]),
        (["--credentials.password_file=/p", "--upstream.host=db", "--upstream.user=u"], []),
        (
            [
                "--credentials.password_file=/p",
                "--upstream.user=u",
                f"--upstream.endpoint={ENDPOINT}",
            ],
            [],
        ),
    ],
)
def test_a_verb_that_connects_needs_an_address_and_a_login(
    argv: list[str], missing: list[str]
) -> None:
    if not missing:
        load_settings(argv, {}, upstream_required=True)
        return
    with pytest.raises(ConfigurationError) as caught:
        load_settings(argv, {}, upstream_required=True)
    assert [problem.key for problem in caught.value.problems] == missing


@pytest.mark.parametrize(
    "argv", [["--listen.prot=1"], ["--listen.port=x"], ["--upstream.endpint", "x"], ["stray"]]
)
def test_what_is_missing_is_not_reported_with_a_mistake(argv: list[str]) -> None:
    # It had nothing to do with the mistake, or followed from it, and stood below it.
    said = refused(argv, upstream_required=True)
    assert len(said.splitlines()) == 1
    assert "required" not in said


def test_an_empty_value_of_a_higher_source_unsets_a_lower_one() -> None:
    argv = ["--upstream.endpoint="]
    assert "upstream.endpoint" in refused(argv, {"ENDPOINT_NAME": ENDPOINT}, upstream_required=True)


# Secrets


@pytest.mark.parametrize("key", [key for key in settings_keys() if key.is_secret])
def test_a_secret_is_never_shown(key: SettingKey) -> None:
    settings = load_settings([key.flag, FAKE_SECRET], {})
    assert value_of(settings, key.dotted) == FAKE_SECRET
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert FAKE_SECRET not in shown


def test_client_secret_and_token_are_secrets() -> None:
    secrets = {key.dotted for key in settings_keys() if key.is_secret}
    assert secrets == {
        "workspace.client_secret",
        "workspace.token",
        "workspace.azure_client_secret",
    }


def test_a_secret_is_in_no_error(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(f'[workspace]\ntoken = ["{FAKE_SECRET}"]\ntokne = "{FAKE_SECRET}"\n')
    said = refused(
        [
            "--config",
            str(file),
            "--workspace.client_secret",
            FAKE_SECRET,
            FAKE_SECRET,
            f"--workspace.client_secrt={FAKE_SECRET}",
            "--workspace",
            FAKE_SECRET,
        ],
        {
            "LAKEBASE_PROXY_WORKSPACE": FAKE_SECRET,
            "LAKEBASE_PROXY_TOKEN": FAKE_SECRET,
            "LAKEBASE_PROXY_LISTEN__PORT": "x",
        },
    )
    assert FAKE_SECRET not in said
    for key in ("arguments", "workspace.token", "workspace.tokne", "workspace.client_secrt"):
        assert key in said


def test_the_error_for_invalid_toml_shows_no_line(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(f"[workspace]\ntoken = {FAKE_SECRET}\n")
    said = refused([f"--config={file}"])
    assert FAKE_SECRET not in said
    assert "line 2" in said


def test_pydantics_own_error_shows_no_value_either() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"workspace": {"token": [FAKE_SECRET]}})
    assert FAKE_SECRET not in str(caught.value)


# The model


@pytest.mark.parametrize("section", [Settings(), Settings().listen])
def test_settings_are_frozen(section: BaseModel) -> None:
    for name in type(section).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, None)


def test_every_key_has_a_description_and_every_number_has_bounds() -> None:
    for key in settings_keys():
        assert key.description.endswith("."), key.dotted
        if isinstance(key.default, int | float):
            assert key.bounds, key.dotted


def test_a_duration_has_its_unit_in_name_and_description() -> None:
    for key in settings_keys():
        if key.name.endswith("_seconds"):
            assert "in seconds" in key.description, key.dotted


# What it costs


@pytest.mark.slow
def test_reading_the_configuration_imports_no_event_loop() -> None:
    """`version` and `--help` are quick, because they need neither asyncio nor the SDK."""
    code = "import proxy.config, sys; print({'databricks', 'uvloop'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()"


POOLED = (
    "ep-quiet-forest-00000001-pooler.database.eu-west-1.cloud.databricks.com",
    "ep-quiet-forest-00000001-ro-pooler.database.eu-west-1.cloud.databricks.com",
    "EP-QUIET-FOREST-00000001-POOLER.database.example.com",
)


@pytest.mark.parametrize("host", POOLED)
def test_a_pooled_host_is_tried_with_a_token(host: str) -> None:
    # It was refused before it was tried, and the newest documentation says that it takes tokens.
    environ = {"ENDPOINT_NAME": "projects/p/branches/b/endpoints/e", "PGHOST": host}
    assert load_settings([], environ, upstream_required=True).upstream.host == host


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"PGHOST": "db.example.com", "ENDPOINT_NAME": ENDPOINT}, "must not be set together"),
        ({"LAKEBASE_PROXY_UPSTREAM__INSTANCE": "shop"}, "requires endpoint"),
    ],
)
def test_a_pooled_host_is_the_endpoints_and_looked_up(given: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(["--upstream.pooled"], given, upstream_required=True)
    (problem,) = caught.value.problems
    assert problem.key == "upstream.pooled"
    assert text in problem.text


@pytest.mark.parametrize("host", POOLED)
def test_a_pooled_host_is_accepted_with_a_native_password(host: str) -> None:
    argv = ["--credentials.password_file", "password", "--upstream.user", "app"]
    settings = load_settings(argv, {"PGHOST": host}, upstream_required=True)
    assert settings.upstream.host == host


@pytest.mark.parametrize("host", ["db.example.com", "my-pooler-x.example.com", "x.a-pooler.com"])
def test_a_host_is_pooled_by_the_end_of_its_first_label_alone(host: str) -> None:
    environ = {"PGHOST": host, "ENDPOINT_NAME": ENDPOINT}
    assert load_settings([], environ, upstream_required=True).upstream.host == host


def test_an_instance_replaces_an_endpoint() -> None:
    settings = load_settings(["--upstream.instance", "shop"], {}, upstream_required=True)
    assert (settings.upstream.instance, settings.upstream.endpoint) == ("shop", "")
    argv = ["--upstream.instance", "shop", "--upstream.endpoint", ENDPOINT]
    with pytest.raises(ConfigurationError, match=r"together with endpoint"):
        load_settings(argv, {})


@pytest.mark.parametrize(
    "key",
    [
        *("workspace.client_secret_file", "workspace.config_file", "workspace.oidc_token_filepath"),
        *("credentials.password_file", "upstream.ssl_root_cert", "targets.eu.ssl_root_cert"),
        *("listen.tls_certificate", "listen.tls_key", "shard_maps.m.mappings_file"),
        "catalogue.snapshot_file",
    ],
)
def test_a_file_name_with_a_nul_is_refused(key: str) -> None:
    """To open it raised a ValueError, not an OSError, and ended the process at a reload."""
    assert f"{key} (flag --{key}): must not contain a NUL character" in refused([f"--{key}=a\0b"])


def test_a_socket_directory_with_a_nul_is_refused() -> None:
    assert "must not contain a NUL" in refused(["--listen.unix_socket_directory=/tmp\0"])


def test_a_secret_is_given_by_value_or_by_file_not_both() -> None:
    argv = ["--workspace.client_secret=not-a-real-secret", "--workspace.client_secret_file=x"]
    together = r"together with client_secret"
    with pytest.raises(ConfigurationError, match=together) as caught:
        load_settings(argv, {})
    assert "not-a-real" not in str(caught.value)


def test_several_hosts_are_a_list_or_have_commas_between_them(tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('[listen]\nhost = ["127.0.0.1", "::1"]\n')
    hosts = ("127.0.0.1", "::1")
    assert load_settings(["--config", str(file)], {}).listen.hosts == hosts
    assert load_settings(["--listen.host", "127.0.0.1, ::1"], {}).listen.hosts == hosts
    assert load_settings([], {}).listen.hosts == ("localhost",)
    assert "listen.host" in refused(["--listen.host", "127.0.0.1,"])
    assert "listen.host" in refused(["--listen.host", ",".join(["::1"] * 33)])
    said = refused(["--listen.host", "::1,*,127.0.0.1,10.1.2.3"])
    assert "must be true because listen.host *, 10.1.2.3 is not loopback" in said
    everywhere = load_settings(["--listen.host=*", "--listen.allow_remote"], {})
    assert everywhere.listen.hosts == ("*",)
    assert "listen.host * is not loopback" in everywhere.warnings()[0]
