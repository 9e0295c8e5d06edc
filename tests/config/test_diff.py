"""The keys in which two configurations differ, and which of them need a restart."""

from pathlib import Path

import pytest
from hypothesis import given
from pydantic import SecretStr

from proxy.config import (
    Changes,
    Files,
    SettingKey,
    Settings,
    compare,
    lost_secrets,
    named_files,
    settings_keys,
    with_running_values,
)
from tests.support.configurations import Table, tables
from tests.support.configuring import ENDPOINT, ENDPOINT_EU

EU = {"endpoint": ENDPOINT_EU}
SECRETS = ("not-a-real-secret", "another-secret")


def settings(**sections: object) -> Settings:
    return Settings.model_validate(sections)


@pytest.mark.parametrize(
    ("old", "new", "reloadable", "restart"),
    [
        ({}, {}, (), ()),
        ({}, {"listen": {"port": 1}}, (), ("listen.port",)),
        ({}, {"admin": {"quit": True}}, (), ("admin.quit",)),
        ({}, {"log": {"level": "debug", "format": "json"}}, ("log.level",), ("log.format",)),
        ({}, {"shutdown": {"drain_seconds": 1}}, ("shutdown.drain_seconds",), ()),
        ({}, {"upstream": {"accelerated": False}}, ("upstream.accelerated",), ()),
        ({}, {"targets": {"eu": EU}}, ("targets.eu",), ()),
        ({"targets": {"eu": EU, "us": {}}}, {"targets": {"eu": EU}}, ("targets.us",), ()),
        (
            {"targets": {"eu": EU}},
            {"targets": {"eu": {"endpoint": ENDPOINT}}},
            ("targets.eu.endpoint",),
            (),
        ),
        # Set to the default or to the inherited value: the effective value does not change.
        ({"targets": {"eu": EU}}, {"targets": {"eu": EU | {"port": 5432}}}, (), ()),
        (
            {"targets": {"eu": EU}},
            {"targets": {"eu": EU}, "upstream": {"port": 1}},
            ("targets.eu.port", "upstream.port"),
            (),
        ),
        ({}, {"databases": {"my.db": "upstream"}}, ('databases."my.db"',), ()),
        (
            {"databases": {"a": {"target": "upstream"}}},
            {"databases": {"a": {"target": "upstream", "database": "x"}}},
            ("databases.a",),
            (),
        ),
        (
            {"workspaces": {"eu": {"token": SECRETS[0]}}},
            {"workspaces": {"eu": {"token": SECRETS[1]}}},
            ("workspaces.eu.token",),
            (),
        ),
        (
            {"shard_maps": {"m": {"kind": "range", "key_type": "int4", "mappings_file": "a"}}},
            {"shard_maps": {"m": {"kind": "range", "key_type": "int8", "mappings_file": "a"}}},
            ("shard_maps.m.key_type",),
            (),
        ),
        (
            {"shard_maps": {"m": {"kind": "range", "key_type": "int4", "mappings_file": "a"}}},
            {},
            ("shard_maps.m",),
            (),
        ),
        (
            {},
            {"routing": {"shard_map": "m"}, "listen": {"host": "::1"}},
            ("routing.require_key", "routing.shard_map"),
            ("listen.host",),
        ),
    ],
)
def test_changes_are_named_by_their_keys(
    old: dict[str, object],
    new: dict[str, object],
    reloadable: tuple[str, ...],
    restart: tuple[str, ...],
) -> None:
    assert compare(settings(**old), settings(**new)) == Changes(reloadable, restart)
    assert compare(settings(**new), settings(**old)) == Changes(reloadable, restart)


@pytest.mark.parametrize("key", settings_keys(), ids=lambda key: key.dotted)
def test_every_key_is_compared(key: SettingKey) -> None:
    section, name = key.path
    default = getattr(Settings(), section)
    changed = default.model_copy(update={name: "something else"})
    found = compare(Settings(), Settings().model_copy(update={section: changed}))
    assert (*found.reloadable, *found.restart) == (key.dotted,)
    kept = section in ("listen", "admin") and not name.startswith("tls")
    assert bool(found.restart) == (kept or key.dotted in ("log.format", "startup.require"))


def test_a_reload_keeps_the_running_values_of_keys_that_need_a_restart() -> None:
    running = settings(listen={"port": 1, "max_connections": 7}, log={"format": "json"})
    new = settings(
        listen={"port": 2, "tls_certificate": "c", "tls_key": "k"},
        admin={"port": 3},
        log={"format": "console", "level": "debug"},
        upstream={"port": 4},
    )
    kept = with_running_values(new, running)
    assert compare(running, kept).restart == ()
    assert compare(running, kept).reloadable == compare(running, new).reloadable
    assert compare(kept, new).restart == compare(running, new).restart != ()


def test_a_rewritten_file_is_reported_by_its_keys(tmp_path: Path) -> None:
    authority, secret = tmp_path / "ca.pem", tmp_path / "secret"
    authority.write_text("a")
    configured = settings(
        upstream={"ssl_root_cert": str(authority)},
        targets={"eu": {}},
        workspaces={"eu": {"client_secret_file": str(secret)}},
        credentials={"password_file": str(tmp_path / "nowhere")},
    )
    before = Files.of(configured)
    assert list(before.rewritten(Files.of(configured))) == []
    authority.write_text("another one")
    secret.write_text("it was not there")
    assert list(before.rewritten(Files.of(configured))) == [
        *("upstream.ssl_root_cert", "targets.eu.ssl_root_cert"),
    ]
    assert [str(problem) for problem in lost_secrets(configured)] == [
        f"credentials.password_file: no such file: {tmp_path / 'nowhere'}"
    ]
    with_secret = Files.of(configured)
    replacement = tmp_path / "new"
    replacement.write_text("as long as this!")
    replacement.replace(secret)
    assert list(with_secret.rewritten(Files.of(configured))) == [
        "workspaces.eu.client_secret_file",
    ]
    changes = Changes(("log.level",), ()).with_contents(["listen.tls_key"])
    assert changes.reloadable == ("listen.tls_key (contents)", "log.level")


def test_no_secret_is_in_the_changes() -> None:
    old, new = (settings(workspace={"token": SecretStr(secret)}) for secret in SECRETS)
    shown = repr(compare(old, new))
    assert "workspace.token" in shown
    assert not any(secret in shown for secret in SECRETS)


@given(tables())
def test_a_configuration_does_not_differ_from_itself(found: dict[str, Table]) -> None:
    nested: dict[str, dict[str, object]] = {}
    for path, table in found.items():
        section, _, name = path.partition(".")
        nested.setdefault(section, {}).update({name: table} if name else table)
    assert compare(settings(**nested), settings(**nested)) == Changes((), ())


def test_the_files_that_are_watched_are_those_that_a_reload_reads_again() -> None:
    given = settings(
        listen={"tls_certificate": "c.pem", "tls_key": "c.key"},
        workspace={"client_secret_file": "secret", "config_file": "profiles"},
        targets={"eu": {**EU, "ssl_root_cert": "ca.pem"}, "us": {"ssl_root_cert": "system"}},
        shard_maps={"m": {"kind": "list", "key_type": "text", "mappings_file": "m.csv"}},
    )
    assert sorted(named_files(given)) == ["c.key", "c.pem", "ca.pem", "m.csv", "secret"]
