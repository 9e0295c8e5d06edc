"""`config.example.toml`: it shows every key, and is valid as it is and fully uncommented."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

from proxy.config import (
    DatabaseAlias,
    MappingEntry,
    SettingKey,
    Settings,
    example_toml,
    load_settings,
    named_keys,
    settings_keys,
)

EXAMPLE_FILE = Path(__file__).parents[2] / "config.example.toml"
# The names that the example chooses.
SAMPLES = {"workspaces": "eu", "targets": "eu", "databases": "archive", "shard_maps": "tenants"}


def uncommented(example: str) -> str:
    """Return the example with every key and table: the lines that follow a bare "#"."""
    return re.sub(r"^#(?=\S)", "", example, flags=re.MULTILINE)


def test_the_example_is_what_the_model_says() -> None:
    assert EXAMPLE_FILE.read_text() == example_toml(), "run `make docs`"


def test_the_example_shows_every_key_with_its_default() -> None:
    shown = tomllib.loads(uncommented(EXAMPLE_FILE.read_text()))
    for name in SAMPLES:
        del shown[name]
    expected: dict[str, dict[str, object]] = {}
    for key in settings_keys():
        default = key.default
        value = default.get_secret_value() if isinstance(default, SecretStr) else default
        expected.setdefault(key.section, {})[key.name] = value
    assert shown == expected


@pytest.mark.parametrize("key", named_keys(), ids=lambda key: key.dotted)
def test_the_example_shows_every_key_of_a_table_with_a_chosen_name(key: SettingKey) -> None:
    shown = tomllib.loads(uncommented(EXAMPLE_FILE.read_text()))
    section, _, name = key.path
    assert name in shown[section][SAMPLES[section]]


def test_every_table_with_a_chosen_name_shows_nothing_but_keys() -> None:
    shown = tomllib.loads(uncommented(EXAMPLE_FILE.read_text()))
    known = {(key.path[0], key.name) for key in named_keys()}
    for section, name in SAMPLES.items():
        assert {(section, key) for key in shown[section][name]} <= known


def test_the_example_is_valid_as_it_is() -> None:
    assert load_settings(["--config", str(EXAMPLE_FILE)], {}) == Settings()


def test_the_example_is_valid_with_everything_uncommented(tmp_path: Path) -> None:
    whole = tmp_path / "whole.toml"
    whole.write_text(uncommented(EXAMPLE_FILE.read_text()))
    settings = load_settings(["--config", str(whole)], {})
    for section in set(Settings.model_fields) - SAMPLES.keys():
        assert getattr(settings, section) == getattr(Settings(), section)
    assert settings.databases == {
        "orders": DatabaseAlias(target="eu"),
        "archive": DatabaseAlias(target="eu", database="orders_archive"),
    }
    assert settings.target("eu").workspace == "eu"
    assert settings.workspace_of(settings.target("eu")).client_secret_file == "/run/secrets/eu"
    assert settings.shard_maps["tenants"].mappings == (
        MappingEntry(target="upstream", high="1000"),
        MappingEntry(target="eu", low="1000"),
    )


def test_the_example_as_it_is_leaves_the_guides_environment_in_force() -> None:
    settings = load_settings(["--config", str(EXAMPLE_FILE)], {"PGHOST": "db", "PGPORT": "1"})
    assert (settings.upstream.host, settings.upstream.port) == ("db", 1)
