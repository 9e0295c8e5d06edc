"""The settings as a list of keys, for whatever is written from it: help text, example file.

For: what a key is called, what it is by default, which values it takes. Not for: any value in use.

Invariant: it is derived from the model, so that it can neither lack a key nor contradict one.
"""

import json
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import get_args

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from proxy.config.settings import Section, Settings

ENVIRONMENT_PREFIX = "LAKEBASE_PROXY_"
ENVIRONMENT_DELIMITER = "__"

KeyPath = tuple[str, ...]


def spell_flag(path: KeyPath) -> str:
    """Return a key as it is on the command line: `--listen.port`."""
    return "--" + ".".join(path)


def spell_variable(path: KeyPath) -> str:
    """Return a key as it is in the environment: `LAKEBASE_PROXY_LISTEN__PORT`."""
    return ENVIRONMENT_PREFIX + ENVIRONMENT_DELIMITER.join(path).upper()


@dataclass(frozen=True, slots=True)
class SettingKey:
    """One key as people meet it: in the file, as a variable, as a flag."""

    section: str
    name: str
    default: object
    description: str
    bounds: str
    secret: bool
    switch: bool

    @property
    def dotted(self) -> str:
        """The key's path, as in `listen.port`."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """The key on the command line, as in `--listen.port`."""
        return spell_flag((self.section, self.name))

    @property
    def variable(self) -> str:
        """The key in the environment, as in `LAKEBASE_PROXY_LISTEN__PORT`."""
        return spell_variable((self.section, self.name))


def _bounds(field: FieldInfo) -> str:
    """Say which values are allowed, in words; empty when a type says it all."""
    if choices := get_args(field.annotation):
        return "One of " + ", ".join(choices) + "."
    limits = {type(limit): limit for limit in field.metadata}
    match limits.get(annotated_types.Ge), limits.get(annotated_types.Le):
        case annotated_types.Ge(ge=low), annotated_types.Le(le=high):
            return f"From {low} to {high}."
        case _:
            return "Either true or false." if field.annotation is bool else ""


@cache
def settings_keys() -> tuple[SettingKey, ...]:
    """Return every key in the order of the model."""
    return tuple(
        SettingKey(
            section=section,
            name=name,
            default=field.default,
            description=field.description or "",
            bounds=_bounds(field),
            secret=field.annotation is SecretStr,
            switch=field.annotation is bool,
        )
        for section, model in _sections().items()
        for name, field in model.model_fields.items()
    )


def _sections() -> dict[str, type[Section]]:
    return {name: type(field.default) for name, field in Settings.model_fields.items()}


_EXAMPLE_HEAD = """\
# Every key of lakebase-auth-proxy with its default. Copy the file, take away the # in front of
# what you change, and name it with --config or in LAKEBASE_PROXY_CONFIG.
#
# Each key is also an environment variable (LAKEBASE_PROXY_LISTEN__PORT=6000) and a flag
# (--listen.port 6000). A flag wins over the environment, that over this file, and this file over
# the Lakebase guide's own variables (ENDPOINT_NAME, PGHOST, PGPORT, PGDATABASE, PGUSER).
#
# This file is generated from the settings model by `make docs`."""


def example_toml() -> str:
    """Write `config.example.toml`: prose after "# ", each key commented out after a bare "#"."""
    lines = [_EXAMPLE_HEAD]
    for section, model in _sections().items():
        lines += [f"\n# {model.__doc__}", f"[{section}]"]
        for key in settings_keys():
            if key.section == section:
                prose = f"{key.description} {key.bounds}".strip()
                lines.append("")
                lines += textwrap.wrap(prose, 96, initial_indent="# ", subsequent_indent="# ")
                lines.append(f"#{key.name} = {_toml(key.default)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """Write a default as TOML; its strings, numbers and booleans are spelled as JSON's."""
    return json.dumps(value.get_secret_value() if isinstance(value, SecretStr) else value)
