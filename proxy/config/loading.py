"""Reading all sources, merging and validating them, and reporting every problem at once.

For: `load`, which returns the settings with their sources, and `load_settings`, which returns the
settings alone. Not for: how a source is read (`sources`), or which values are valid (`settings`).

Invariant: an error contains no value of a secret, and none of an unknown key, which may be a
misspelled secret.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_settings import PydanticBaseSettingsSource

from proxy.config.config_errors import ConfigurationError, Problem, shown_problems
from proxy.config.cross_checks import (
    catalogue_conflicts,
    incomplete_workspaces,
    missing_to_dial,
    pool_conflicts,
    unknown_references,
)
from proxy.config.setting_keys import (
    CHOSEN_NAME,
    KeyPath,
    named_keys,
    named_sections,
    settings_keys,
)
from proxy.config.settings import Settings
from proxy.config.sources import Layer, read_environment, read_file, read_flags, read_guide
from proxy.config.toml import split_path
from proxy.config.validation_errors import problems_of

Inspect = Callable[[Settings], Iterable[Problem]]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings, and the source of each value in them."""

    settings: Settings
    layers: tuple[Layer, ...]

    def source_of(self, path: KeyPath) -> str | None:
        """Return the source of a key, as in `flag --listen.port`; None if it is not set."""
        givers = (layer for layer in self.layers if layer.find(path) is not None)
        return next((layer.given_as(path) for layer in givers), None)


def load(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    upstream_required: bool = False,
    inspect: Sequence[Inspect] = (),
) -> Configuration:
    """Read flags, environment and file, in this order of precedence, and validate them.

    `argv` are the settings' flags. With `upstream_required` a target also needs what a verb that
    connects does: a host or how to look it up, and an endpoint or a password for the login. The
    callables of `inspect` check what is not a question of form, such as the mappings of a shard
    map. They get settings in which each section is valid, but names and targets may not exist.
    Their problems are reported with the others, with the source of the key.

    Raises:
        ConfigurationError: with every problem.
    """
    problems: list[Problem] = []
    flags = read_flags(argv, problems)
    environment = read_environment(environ, problems)
    file = read_file(flags, environment, problems)
    overriding = (flags, environment, file)
    layers = (*overriding, read_guide(environ, overriding))
    for layer in layers:
        _drop_sections_without_keys(layer, problems)
    settings = _validate(layers, problems)
    problems += _with_sources(_cross_check(layers, settings, inspect), layers)
    if upstream_required and not problems:
        # What is missing is reported when all that is given is right: a misspelled key may be it.
        problems += _with_sources(missing_to_dial(_merged_values(layers)), layers)
    if settings is None or problems:
        raise ConfigurationError(shown_problems(problems))
    return Configuration(settings, layers)


def load_settings(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    upstream_required: bool = False,
    inspect: Sequence[Inspect] = (),
) -> Settings:
    """Return the settings that `load` returns. Raises ConfigurationError as `load` does."""
    return load(argv, environ, upstream_required=upstream_required, inspect=inspect).settings


def _drop_sections_without_keys(layer: Layer, problems: list[Problem]) -> None:
    """Remove and report values in place of sections, which would hide keys of other sources."""
    values = layer.source.init_kwargs
    for section in Settings.model_fields:
        if section not in values:
            continue
        found = values[section]
        if not isinstance(found, dict):
            problems.append(_not_a_section(layer, (section,)))
            del values[section]
        elif section in named_sections() and section != "databases":
            for name in [name for name, table in found.items() if not isinstance(table, dict)]:
                problems.append(_not_a_section(layer, (section, name)))
                del found[name]


def _not_a_section(layer: Layer, path: KeyPath) -> Problem:
    keys = (*settings_keys(), *named_keys())
    first = next(key.path for key in keys if key.path[0] == path[0])
    # With the chosen name, if there is one.
    example = (*path, *first[len(path) :])
    if path == ("databases",):
        example = (*path, CHOSEN_NAME)
    return layer.problem(
        path, f"is a section: give one of its keys, such as {layer.spell(example)}"
    )


def _validate(layers: Sequence[Layer], problems: list[Problem]) -> Settings | None:
    """Merge and validate the layers with pydantic-settings; the first one takes precedence."""

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls, *_args: object, **_builtin: object
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(layer.source for layer in layers)

    try:
        return Settings(**dict(Layered()))
    except ValidationError as refused:
        for error in refused.errors(include_url=False, include_input=False):
            problems += problems_of(error, layers)
    return None


def _cross_check(
    layers: Sequence[Layer], settings: Settings | None, inspect: Sequence[Inspect]
) -> Iterator[Problem]:
    """Yield the problems that no section can detect alone."""
    raw = _merged_values(layers)
    yield from unknown_references(raw)
    yield from incomplete_workspaces(raw)
    yield from catalogue_conflicts(raw)
    yield from pool_conflicts(raw)
    if settings is not None:
        for one in inspect:
            yield from one(settings)


def _with_sources(found: Iterable[Problem], layers: Sequence[Layer]) -> Iterator[Problem]:
    """Yield the problems, each with the source of its key."""
    for problem in found:
        yield problem if problem.given_as else _with_source(problem, layers)


def _merged_values(layers: Sequence[Layer]) -> dict[str, Any]:
    return _merged([layer.source.init_kwargs for layer in layers])


def _with_source(problem: Problem, layers: Sequence[Layer]) -> Problem:
    path = split_path(problem.key)
    givers = (layer for layer in layers if layer.find(path) is not None)
    return next((replace(problem, given_as=one.given_as(path)) for one in givers), problem)


def _merged(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge tables as pydantic-settings does; the first one takes precedence."""
    merged: dict[str, Any] = {}
    for table in values:
        for key, value in table.items():
            if key not in merged:
                merged[key] = _merged([value]) if isinstance(value, dict) else value
            elif isinstance(value, dict) and isinstance(merged[key], dict):
                merged[key] = _merged([merged[key], value])
    return merged
