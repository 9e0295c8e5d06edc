"""`resolve`: where a key leads, as people and machines read it, without connecting to anybody."""

import json
import os
import sys
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from proxy.cli import main
from proxy.exit_codes import EXIT_FAILURE, EXIT_OK, EXIT_USAGE
from proxy.routing.key_sources import BUILT_IN_PARAMETER, take_parameters
from proxy.wire.startup import V3_0, StartupMessage
from tests.support.proxy_process import run_to_end

CONFIGURATION = """
[targets.eu]
endpoint = "projects/shop/branches/eu/endpoints/primary"

[targets.us]
endpoint = "projects/shop/branches/us/endpoints/primary"
host = "ep-us.example.com"
database = "shop"

[routing]
shard_map = "customers"

[shard_maps.customers]
kind = "range"
key_type = "int4"
mappings = [{ high = 0, target = "eu" }, { low = 0, high = 1000, target = "us" }]

[shard_maps.names]
kind = "list"
key_type = "text"
mappings = [
  { key = "--bold", target = "eu" },
  { key = "-h", target = "us" },
  { key = "a b@c/%40", target = "us" },
]

[shard_maps.hashed]
kind = "hash"
key_type = "int4"
mappings = [{ low = "0xc0000000", target = "us" }]
"""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's own settings out of the environment."""
    for name in list(os.environ):
        if name.startswith(("LAKEBASE_", "DATABRICKS_", "PG", "ENDPOINT_NAME")):
            monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path: Path) -> tuple[str, str]:
    """Return the flag that names a file with three maps."""
    file = tmp_path / "proxy.toml"
    file.write_text(CONFIGURATION)
    return "--config", str(file)


def rows(out: str) -> dict[str, str]:
    return {line[:14].strip(): line[15:] for line in out.splitlines()}


def test_a_key_is_shown_with_its_mapping_and_where_that_leads(
    config: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resolve", "007", *config]) == EXIT_OK
    out, err = capsys.readouterr()
    assert err == ""
    assert rows(out) == {
        "canonical key": "80000007",
        "mapping": "[0, 1000)",
        "target": "us",
        "host": "ep-us.example.com",
        "database": "shop",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["-5", "CONFIG"],
        ["CONFIG", "--", "-5"],
        ["--json", "-5", "CONFIG"],
        ["--json", "CONFIG", "--", "-5"],
    ],
    ids=" ".join,
)
def test_a_negative_key_is_a_key_and_no_flag(
    arguments: list[str], config: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("CONFIG")
    assert main(["resolve", *arguments[:at], *config, *arguments[at + 1 :]]) == EXIT_OK
    out = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(out)["canonical_key"] == "7ffffffb"
    else:
        assert rows(out)["canonical key"] == "7ffffffb"
        assert rows(out)["host"] == "looked up from projects/shop/branches/eu/endpoints/primary"


@pytest.mark.parametrize(
    ("arguments", "target"),
    [(["--", "--bold"], "eu"), (["--", "-h"], "us"), (["--json", "--", "-h"], "us")],
    ids=str,
)
def test_any_key_at_all_can_come_after_two_dashes(
    arguments: list[str],
    target: str,
    config: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_name = ["--routing.shard_map", "names", *config]
    assert main(["resolve", *by_name, *arguments]) == EXIT_OK
    assert target in capsys.readouterr().out


def test_machines_get_every_fact_by_name(
    config: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    by_hash = ["--routing.shard_map", "hashed", *config]
    assert main(["resolve", "1", *by_hash, "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "canonical_key": "80000001",
        "hash": "c84a4656",
        "low": "0xc0000000",
        "high": "+inf",
        "target": "us",
        "endpoint": "projects/shop/branches/us/endpoints/primary",
        "host": "ep-us.example.com",
        "database": "shop",
        "url": "postgresql://app@localhost:5432/shop?sslmode=disable"
        "&options=-c%20lakebase.shard_key%3D1",
    }


@pytest.mark.parametrize(
    ("key", "flags", "expected"),
    [
        ("a b@c/%40", "", {"host": "localhost", "port": "5432", "user": "app"}),
        ("-h", "--listen.host * --listen.allow_remote true", {"host": "localhost"}),
        ("-h", "--listen.host 0.0.0.0,127.0.0.2 --listen.allow_remote true", {"host": "localhost"}),
        ("-h", "--listen.host 127.0.0.2,::1 --listen.port 6000", {"host": "127.0.0.2"}),
        ("-h", "--listen.host ::1 --listen.port 6000", {"host": "::1", "port": "6000"}),
        ("-h", "--listen.host= --listen.unix_socket_directory /tmp", {"host": "/tmp"}),
        ("-h", "--upstream.user sales@example.com", {"user": "sales@example.com"}),
        ("-h", "--upstream.user *", {"user": "app"}),
    ],
)
def test_a_url_leads_to_the_listener_with_the_key_in_its_options(
    key: str,
    flags: str,
    expected: dict[str, str],
    config: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_name = ["--routing.shard_map", "names", *config]
    assert main(["resolve", "--url", *by_name, *flags.split(), "--", key]) == EXIT_OK
    url = capsys.readouterr().out.strip()
    found = conninfo_to_dict(url)
    assert {name: found[name] for name in expected} == expected
    sent = StartupMessage(V3_0, ((b"options", str(found["options"]).encode()),))
    (occurrence,), _ = take_parameters(sent, frozenset((BUILT_IN_PARAMETER,)))
    assert occurrence.text.decode() == key
    assert url.count("@") == 1, "some drivers take what follows another one for the host"


@pytest.mark.parametrize(
    ("key", "sqlstate", "reason"),
    [
        ("1000", "3D000", "mapping_not_found"),
        ("seven", "22P02", "key_invalid"),
        ("2147483648", "22003", "key_invalid"),
        ("", "22023", "key_missing"),
    ],
)
def test_what_a_session_would_be_refused_for_exits_with_1(
    key: str,
    sqlstate: str,
    reason: str,
    config: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["resolve", key, *config]) == EXIT_FAILURE
    out, err = capsys.readouterr()
    assert out == ""
    assert f"(SQLSTATE {sqlstate}, reason={reason}" in err
    assert len(err.splitlines()) == 1
    assert main(["resolve", key, "--json", *config]) == EXIT_FAILURE
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["sqlstate"], found["reason"]) == (False, sqlstate, reason)


@pytest.mark.parametrize(
    "arguments", [[], ["--"], ["--json"], ["--routing.shard_map", "names"]], ids=str
)
def test_without_a_key_the_usage_is_printed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resolve", *arguments]) == EXIT_USAGE
    assert "resolve KEY" in capsys.readouterr().err


def test_without_a_shard_map_it_says_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", "7"]) == EXIT_FAILURE
    assert "no shard map is configured" in capsys.readouterr().err


def test_a_map_that_is_wrong_is_a_configuration_error(
    config: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(config[1])
    file.write_text(file.read_text().replace("low = 0,", "low = -9,"))
    assert main(["resolve", "7", *config]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert "shard_maps.customers.mappings (file " in err
    assert "mapping 1 (on eu) and mapping 2 (on us) overlap" in err


@pytest.mark.slow
async def test_as_a_process_it_connects_to_nothing(config: tuple[str, str]) -> None:
    # The workspace of this configuration is nowhere: to ask it would fail.
    command = (sys.executable, "-m", "proxy", "resolve", "-5", *config)
    code, out, err = await run_to_end(*command)
    assert (code, err) == (EXIT_OK, "")
    assert rows(out)["target"] == "eu"
