"""The settings as a list of keys, derived from the model.

For: the name, default, bounds, reason and other metadata of each key, for help texts, the example
file, printing and comparison. Not for: values in use.

Invariant: because it is derived from the model, it cannot lack a key or contradict one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from proxy.config.settings import Settings
from proxy.config.toml import toml_path
from proxy.config.validators import Marker, Section

ENVIRONMENT_PREFIX = "LAKEBASE_PROXY_"
ENVIRONMENT_DELIMITER = "__"

# The placeholder for a name that the configuration chooses, as in targets.NAME.port.
CHOSEN_NAME = "NAME"

KeyPath = tuple[str, ...]


def spell_flag(path: KeyPath) -> str:
    """Return a key as it is written on the command line: `--listen.port`."""
    return "--" + toml_path(path)


def spell_variable(path: KeyPath) -> str:
    """Return a key as it is written in the environment: `LAKEBASE_PROXY_LISTEN__PORT`."""
    return ENVIRONMENT_PREFIX + ENVIRONMENT_DELIMITER.join(path).upper()


@dataclass(frozen=True, slots=True)
class SettingKey:
    """One key, with its names in the file, as a variable and as a flag.

    The value of an `is_json` key is a list of tables, which is JSON in a variable or a flag.
    """

    path: KeyPath
    default: object
    description: str
    bounds: str
    is_secret: bool
    is_boolean: bool
    is_json: bool
    needs_restart: bool
    is_watched_file: bool

    @property
    def section(self) -> str:
        """The section's name in the file, as in `listen` or `targets.NAME`."""
        return toml_path(self.path[:-1])

    @property
    def name(self) -> str:
        """The key's name inside its section."""
        return self.path[-1]

    @property
    def dotted(self) -> str:
        """The key's path, as in `listen.port`."""
        return toml_path(self.path)

    @property
    def flag(self) -> str:
        """The key on the command line, as in `--listen.port`."""
        return spell_flag(self.path)

    @property
    def variable(self) -> str:
        """The key in the environment, as in `LAKEBASE_PROXY_LISTEN__PORT`."""
        return spell_variable(self.path)


@cache
def sections() -> Mapping[str, Section]:
    """Return the sections that always exist, in the order of the model, with their defaults."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    return {name: value for name, value in defaults.items() if isinstance(value, Section)}


@cache
def named_sections() -> Mapping[str, type[Section]]:
    """Return the sections that contain tables with chosen names, and the class of the tables."""
    return {
        name: get_args(field.annotation)[1]
        for name, field in Settings.model_fields.items()
        if get_origin(field.annotation) is dict
    }


@cache
def settings_keys() -> tuple[SettingKey, ...]:
    """Return every key of the sections that always exist, in the order of the model."""
    return tuple(
        _key((section, name), field, getattr(default, name))
        for section, default in sections().items()
        for name, field in type(default).model_fields.items()
    )


@cache
def named_keys() -> tuple[SettingKey, ...]:
    """Return every key of the tables with chosen names, with `NAME` in place of the name."""
    return tuple(
        _key((section, CHOSEN_NAME, name), field, None if field.is_required() else field.default)
        for section, model in named_sections().items()
        for name, field in model.model_fields.items()
    )


def key_at(path: KeyPath) -> SettingKey | None:
    """Return the key at `path`, with any chosen name in it; None if there is none."""
    if len(path) == 3:
        section, _, name = path
        found = _by_path().get((section, CHOSEN_NAME, name))
        return found and replace(found, path=path)
    return _by_path().get(path) if len(path) == 2 else None


@cache
def _by_path() -> Mapping[KeyPath, SettingKey]:
    return {key.path: key for key in (*settings_keys(), *named_keys())}


def _key(path: KeyPath, field: FieldInfo, default: object) -> SettingKey:
    return SettingKey(
        path=path,
        default=default,
        description=field.description or "",
        bounds=_bounds(field),
        is_secret=field.annotation is SecretStr,
        is_boolean=field.annotation is bool,
        is_json=get_origin(field.annotation) is tuple,
        needs_restart=Marker.NEEDS_RESTART in field.metadata,
        is_watched_file=Marker.WATCHED_FILE in field.metadata,
    )


def _bounds(field: FieldInfo) -> str:
    """Return the allowed values as a sentence, empty if the type allows all of its values."""
    if words := _words(field.annotation):
        return f"One of {', '.join(words)}."
    limits = {type(limit): limit for limit in field.metadata}
    match limits.get(annotated_types.Ge), limits.get(annotated_types.Le):
        case annotated_types.Ge(ge=low), annotated_types.Le(le=high):
            return f"From {low} to {high}."
        case _:
            return "Either true or false." if field.annotation is bool else ""


def _words(annotation: object) -> Sequence[str]:
    """Return the words that a type lists, none for a type that is no list of words."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is UnionType:  # of a type and None, where a key has no default
        (annotation,) = (one for one in get_args(annotation) if one is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return list(annotation)
    return ()
