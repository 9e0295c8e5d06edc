"""`config.example.toml`, generated from the model.

For: the text of the file. Not for: settings in use, which `printing` shows.

Invariant: prose follows "# ", and a key or table follows a "#" without a blank. So a test (or an
editor) can uncomment every key and table at once, and the result is a valid configuration.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Final

from pydantic import SecretStr

from proxy.config.setting_keys import (
    SettingKey,
    named_keys,
    named_sections,
    sections,
    settings_keys,
)
from proxy.config.settings import Settings
from proxy.config.toml import toml_value
from proxy.config.validators import Marker

_COLUMNS_MAX: Final = 96

_HEAD: Final = """\
# Every key of lakebase-auth-proxy with its default. Copy this file, remove the # before the keys
# that you change, and name the copy with --config or in LAKEBASE_PROXY_CONFIG.
#
# Each key is also an environment variable (LAKEBASE_PROXY_LISTEN__PORT=6000) and a flag
# (--listen.port 6000). Flags take precedence over the environment, the environment over this file,
# and this file over the Lakebase guide's variables (ENDPOINT_NAME, PGHOST, PGPORT, PGDATABASE,
# PGUSER). A name that you choose, such as eu, is in upper case in a variable and means the name in
# lower case: LAKEBASE_PROXY_TARGETS__EU__ENDPOINT. In variables and flags mappings are JSON.
#
# This file is generated from the settings model by `make docs`."""

# What a table with a chosen name is for. Its keys are explained in it, or in the section it names.
_PROSE: Final[Mapping[str, str]] = {
    "workspaces": "Another Databricks workspace, for targets that name it. It has the keys of "
    "[workspace] and inherits nothing from there or from DATABRICKS_*, so that no identity or "
    "secret of one workspace reaches another. Required are host and a login (client_id with "
    "client_secret or client_secret_file, or token, or auth_type with what it needs), or else a "
    "profile.",
    "targets": "Another target, for aliases and shard maps. It has the keys of [upstream] and "
    "inherits those that are not set. But a target that sets any of endpoint, instance, host and "
    "hostaddr, or another workspace, inherits none of these four.",
    "databases": "Aliases: names that clients use as a database. An alias is the NAME of a target, "
    "or a table with these keys:",
    "shard_maps": "A shard map: which target has which shard keys. kind and key_type are required, "
    "and either mappings or mappings_file. With catalogue = true, none of them: that map is in "
    "the database of [catalogue].",
}

# Values for the tables with chosen names, whose defaults alone are not valid.
_SAMPLES: Final[Mapping[tuple[str, str], object]] = {
    ("workspaces", "host"): "https://eu.cloud.databricks.com",
    ("workspaces", "client_id"): "00000000-0000-0000-0000-000000000000",
    ("workspaces", "client_secret_file"): "/run/secrets/eu",
    ("targets", "endpoint"): "projects/shop/branches/production/endpoints/eu",
    ("targets", "workspace"): "eu",
    ("shard_maps", "kind"): "range",
    ("shard_maps", "key_type"): "int8",
    ("shard_maps", "normalise"): "none",
    ("shard_maps", "mappings"): [
        {"high": 1000, "target": "upstream"},
        {"low": 1000, "target": "eu"},
    ],
}
_SAMPLE_NAMES: Final[Mapping[str, str]] = {
    "workspaces": "eu",
    "targets": "eu",
    "shard_maps": "tenants",
}
# Sections whose keys are explained in another section.
_EXPLAINED_ABOVE: Final = ("workspaces", "targets")


def example_toml() -> str:
    """Return the text of `config.example.toml`."""
    lines = [_HEAD]
    for section in Settings.model_fields:
        lines.append("")
        if section in sections():
            lines += _section(section)
        elif section == "databases":
            lines += _aliases()
        else:
            lines += _named(section)
    return "\n".join(lines) + "\n"


def _section(section: str) -> Iterator[str]:
    yield f"# {type(sections()[section]).__doc__}"
    yield f"[{section}]"
    for key in settings_keys():
        if key.section == section:
            yield ""
            yield from _comment(key)
            yield f"#{key.name} = {_default(key.default)}"


def _named(section: str) -> Iterator[str]:
    """Yield a commented table with a chosen name and every key."""
    yield from _wrap(_PROSE[section])
    yield f"#[{section}.{_SAMPLE_NAMES[section]}]"
    for key in _keys_of(section):
        if section not in _EXPLAINED_ABOVE:
            yield ""
            yield from _comment(key)
        yield f"#{key.name} = {_default(_SAMPLES.get((section, key.name), key.default))}"


def _aliases() -> Iterator[str]:
    yield from _wrap(_PROSE["databases"])
    for key in _keys_of("databases"):
        yield from _wrap(f"{key.name}: {key.description}")
    yield "[databases]"
    yield '#orders = "eu"'
    yield f"#archive = {toml_value({'target': 'eu', 'database': 'orders_archive'})}"


def _keys_of(section: str) -> list[SettingKey]:
    assert section in named_sections()
    return [key for key in named_keys() if key.path[0] == section]


def _comment(key: SettingKey) -> list[str]:
    restart = Marker.NEEDS_RESTART.value if key.needs_restart else ""
    return _wrap(" ".join(filter(None, (key.description, key.bounds, restart))))


def _wrap(prose: str) -> list[str]:
    return textwrap.wrap(prose, _COLUMNS_MAX, initial_indent="# ", subsequent_indent="# ")


def _default(value: object) -> str:
    return toml_value(value.get_secret_value() if isinstance(value, SecretStr) else value)
