"""Read every source, merge, validate, and report everything that is wrong at once.

For: `load_settings`, the one way from a command line to a `Settings`. Not for: how a source is
read (`sources`) or what a value may be (`settings`).

Invariant: no value of a secret, and no value of an unknown key, which may be a misspelled secret,
is in an error.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import PydanticBaseSettingsSource

from proxy.config.keys import KeyPath, settings_keys
from proxy.config.problems import ConfigurationError, Problem
from proxy.config.settings import Settings
from proxy.config.sources import Layer, read_environment, read_file, read_flags, read_guide

# A value longer than this tells no more in an error message.
_SHOWN_CHARACTERS_MAX = 80


def load_settings(
    argv: Sequence[str], environ: Mapping[str, str], *, upstream_required: bool = False
) -> Settings:
    """Read flags, environment and file, in this order of precedence, and validate them.

    `argv` is what follows the verb. `upstream_required` also demands what a verb needs that
    dials: somewhere to dial, and an endpoint or a password to log in there.

    Raises:
        ConfigurationError: with every problem at once.
    """
    problems: list[Problem] = []
    flags = read_flags(argv, problems)
    environment = read_environment(environ, problems)
    file = read_file(flags, environment, problems)
    layers = (flags, environment, file, read_guide(environ))
    for layer in layers:
        _drop_sections_without_keys(layer, problems)
    settings = _validate(layers, problems)
    if upstream_required:
        problems += _missing_for_upstream(layers)
    if settings is None or problems:
        raise ConfigurationError(problems)
    return settings


def _drop_sections_without_keys(layer: Layer, problems: list[Problem]) -> None:
    """Report a value where a section belongs; merged, it would hide the section's other keys."""
    for section in Settings.model_fields:
        found = layer.find((section,))
        if found is not None and not isinstance(found, dict):
            first = next(key for key in settings_keys() if key.section == section)
            spelled = layer.spell((section, first.name))
            text = f"is a section: give one of its keys, such as {spelled}"
            problems.append(layer.problem((section,), text))
            del layer.source.init_kwargs[section]


def _validate(layers: Sequence[Layer], problems: list[Problem]) -> Settings | None:
    """Let pydantic-settings merge and validate the layers, the first one winning."""

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
            problems += _translate(error, layers)
    return None


def _translate(error: ErrorDetails, layers: Sequence[Layer]) -> Iterator[Problem]:
    """Say one of pydantic's errors in our words, for the places where the key was given."""
    path = tuple(str(part) for part in error["loc"])
    givers = [layer for layer in layers if layer.find(path) is not None]
    if error["type"] == "extra_forbidden":
        for layer in givers:
            for unknown in _leaves(path, layer.find(path)):
                yield layer.problem(unknown, "unknown key" + _suggestion(unknown, layer))
        return
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    text = text.partition(", unable to")[0]
    if not givers:
        yield Problem(".".join(path), text)
        return
    shown = any(key.dotted == ".".join(path) and not key.secret for key in settings_keys())
    value = repr(givers[0].find(path))[:_SHOWN_CHARACTERS_MAX]
    yield givers[0].problem(path, f"{text}, not {value}" if shown else text)


def _leaves(path: KeyPath, value: object) -> Iterator[KeyPath]:
    """Yield the keys below `path`: an unknown section is reported as what its user wrote."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves((*path, name), inner)
    else:
        yield path


def _name(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _suggestion(path: KeyPath, layer: Layer) -> str:
    """Name the key that was probably meant, spelled as in the place where it was given."""
    known = [*Settings.model_fields, *(key.dotted for key in settings_keys())]
    dotted = ".".join(path).lower().replace("-", "_")
    # A key without its section, or in a wrong one, is a likelier slip than a typing error.
    meant = (
        [key for key in known if _name(key) == _name(dotted)]
        or difflib.get_close_matches(dotted, known, n=1)
        or [key for key in known if difflib.get_close_matches(_name(dotted), [_name(key)])]
    )
    spelled = [layer.spell(tuple(name.split("."))) for name in meant]
    return f"; did you mean {' or '.join(spelled)}?" if spelled else ""


def _missing_for_upstream(layers: Sequence[Layer]) -> Iterator[Problem]:
    """Yield what a verb that dials lacks. Judges raw values: others may be wrong as well."""

    def given(section: str, name: str) -> object:
        values = (layer.find((section, name)) for layer in layers)
        return next((value for value in values if value is not None), None)

    endpoint = given("upstream", "endpoint") or given("upstream", "instance")
    if not given("credentials", "password_file"):
        if _is_pooled(given("upstream", "host")):
            yield Problem(
                "upstream.host",
                "is a pooled host, which takes no OAuth token: use the direct host, without"
                " -pooler, or a native role's password with credentials.password_file",
            )
        if not endpoint:
            yield Problem(
                "upstream.endpoint",
                "required, because tokens are issued for an endpoint: set it, or ENDPOINT_NAME, to"
                " projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT (or upstream.instance)",
            )
        return
    if not endpoint and not given("upstream", "host"):
        yield Problem("upstream.host", "required without an endpoint: set it, or PGHOST")
    if not given("upstream", "user"):
        yield Problem(
            "upstream.user",
            "required with credentials.password_file, because there is no token to say who logs in:"
            " set it, or PGUSER",
        )


def _is_pooled(host: object) -> bool:
    """Tell a pooled host by the suffix of its first label: -pooler, -ro-pooler."""
    return isinstance(host, str) and host.partition(".")[0].lower().endswith("-pooler")
