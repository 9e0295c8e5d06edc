"""The arguments of `shards VERB`: judged before anything is asked of a database."""

import os
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.exit_codes import EXIT_USAGE
from proxy.verbs.shards.arguments import Arguments, syntax
from proxy.verbs.syntax import UsageError

SYNTAX = syntax("add RANGE --shard NAME", 1, 2, options=("shard",), switches=("offline",))


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's own settings out of the environment."""
    for name in list(os.environ):
        if name.startswith(("LAKEBASE_", "DATABRICKS_", "PG", "ENDPOINT_NAME")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-5", "-inf", "--shard", "eu"], Arguments(("-5", "-inf"), {"shard": "eu"})),
        (
            ["--shard=eu", "--offline", "5"],
            Arguments(("5",), {"shard": "eu"}, frozenset({"offline"})),
        ),
        (["--json", "--", "--key"], Arguments(("--key",), {}, frozenset({"json"}))),
        (["--map", "m", "-h"], Arguments(("-h",), {"map": "m"})),
        (
            ["5", "--config", "f", "--targets.main.user", "me", "--listen.port=1", "6"],
            Arguments(
                ("5", "6"), flags=("--config=f", "--targets.main.user=me", "--listen.port=1")
            ),
        ),
        (["", "6"], Arguments(("", "6"))),
    ],
)
def test_words_options_and_settings_are_told_apart(
    arguments: list[str], expected: Arguments
) -> None:
    assert Arguments.parse(arguments, SYNTAX) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "too few arguments\nusage: lakebase-auth-proxy shards add RANGE"),
        (["1", "2", "3"], "too many arguments\nusage:"),
        (["1", "--shard"], "--shard needs a value"),
        (["1", "--shard", "--json"], "--shard needs a value"),
        (["1", "--shard", "a", "--shard", "b"], "--shard is given twice"),
        (["1", "--json=yes"], "--json takes no value"),
        (["1", "--dry-run"], "there is no --dry-run: this verb has --json, --map, --offline"),
        (["1", "--shrad", "a"], "there is no --shrad"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Arguments.parse(arguments, SYNTAX)
    assert str(refused.value).startswith(said)


CONFIGURATION = """
[targets.main]
endpoint = "projects/p/branches/b/endpoints/map"
host = "127.0.0.1"
port = 1
[catalogue]
target = "main"
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of\n  init, upgrade"),
        (["--json"], "shards needs a verb"),
        (["inti"], "there is no verb 'inti'; did you mean init?"),
        (["init", "tenants"], "usage: lakebase-auth-proxy shards init"),
        (["create", "tenants", "--kind", "list"], "create needs --kind and --key-type"),
        (["create", "tenants", "--kind", "tree", "--key-type", "text"], "--kind is one of list"),
        (["create", "tenants", "--kind", "list", "--key-type", "int"], "--key-type is one of"),
        (
            ["create", "tenants", "--kind", "list", "--key-type", "int4", "--normalise", "nfc"],
            "--normalise is for keys of type text",
        ),
        (["create", "a" * 51, "--kind", "list", "--key-type", "text"], "a map's name is 1 to 50"),
        (["create", "a b", "--kind", "list", "--key-type", "text"], "a map's name is"),
        (["drop", ""], "a map's name is"),
        (["show"], "--map NAME is needed"),
        (["show", "--map", "a.b"], "a map's name is"),
        (["show", "--map", "m", "--limit", "-1"], "--limit is a whole number"),
        (["show", "--map", "m", "--shard", "a b"], "a shard's name is 1 to 63"),
        (["list", "--dry-run"], "there is no --dry-run"),
        (["lookup", "--map", "m"], "usage: lakebase-auth-proxy shards lookup KEY"),
        (["lookup", "5", "--map", "m", "--from", "elsewhere"], "--from is one of"),
        (["upgrade", "--map", "m", "--shard", "a", "--all"], "--shard and --all exclude"),
        (["grant", "writer", "app"], "what is granted is one of reader, session"),
        (["grant", "reader", ""], "a role's name has 1 to 63 bytes"),
        (["grant", "session", "app"], "--map NAME is needed"),
        (["sessions", "1", "2", "3", "--map", "m"], "usage: lakebase-auth-proxy shards sessions"),
    ],
)
def test_wrong_usage_is_told_at_once(
    arguments: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens there: what is asked would fail with another sentence.
    file = tmp_path / "proxy.toml"
    file.write_text(CONFIGURATION)
    assert main(["shards", *arguments, "--config", str(file)]) == EXIT_USAGE
    printed = capfd.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_settings_without_a_catalogue_are_refused_by_the_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text('[upstream]\nendpoint = "projects/p/branches/b/endpoints/map"\n')
    assert main(["shards", "list", "--config", str(file)]) == EXIT_USAGE
    assert "catalogue.target: required" in capfd.readouterr().err
