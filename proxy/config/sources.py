"""The sources of settings: flags, environment, TOML file, the Lakebase guide's variables.

For: reading each into a source that pydantic-settings merges, with the spelling of a key there. Not
for: validating values.

Invariant: everything comes from the arguments of the functions, not from `os.environ` or
`sys.argv`.

Of pydantic-settings' own readers the one for TOML is used. The one for the command line ends at the
first error, as argparse does. The one for the environment reads `os.environ` only, and ignores
unknown sections.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic_settings import InitSettingsSource, TomlConfigSettingsSource

from proxy.config.config_errors import Problem
from proxy.config.setting_keys import (
    ENVIRONMENT_DELIMITER,
    ENVIRONMENT_PREFIX,
    KeyPath,
    key_at,
    spell_flag,
    spell_variable,
)
from proxy.config.settings import Settings
from proxy.config.toml import split_path, toml_path
from proxy.config.upstream_sections import ADDRESS_KEYS

# The variables of the Lakebase guide, of AppKit and of Databricks Apps. If two names mean one key,
# the later one takes precedence. PGSSLMODE is left out on purpose: each of its values is met by
# verify-full or would weaken it. The SDK reads DATABRICKS_*.
GUIDE_ENVIRONMENT = {
    "LAKEBASE_ENDPOINT": ("upstream", "endpoint"),
    "ENDPOINT_NAME": ("upstream", "endpoint"),
    "PGHOST": ("upstream", "host"),
    "PGPORT": ("upstream", "port"),
    "PGDATABASE": ("upstream", "database"),
    "PGUSER": ("upstream", "user"),
}

# The name of the file is no key of the model.
_CONFIG: Final = ("config",)
_UNDOTTED: Final = frozenset((*_CONFIG, *Settings.model_fields))
# As the model reads them. Anything else after a switch is the next argument.
_SWITCH_VALUES: Final = frozenset(
    ("true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n")
)

# For a Service named `lakebase-proxy` Kubernetes sets variables with our prefix in every pod
# (service links). They are no settings, and a proxy that refused them would not start there.
_SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT)\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


@dataclass(frozen=True, slots=True)
class Layer:
    """The values of one source, and the spelling of a key there."""

    place: str
    spell: Callable[[KeyPath], str]
    source: InitSettingsSource

    def find(self, path: KeyPath) -> object:
        """Return the value at `path` as it was given, or None."""
        found: object = self.source.init_kwargs
        for part in path:
            match found:
                case dict():
                    found = found.get(part)
                case list() if part.isdecimal() and int(part) < len(found):
                    found = found[int(part)]
                case _:
                    return None
        return found

    def given_as(self, path: KeyPath) -> str:
        """Return where the key at `path` was given, with its name there if that is different."""
        # Only in the file does an element of a list have a name of its own.
        in_list = next((n for n in range(1, len(path)) if isinstance(self.find(path[:n]), list)), 0)
        spelled = self.spell(path[:in_list] if in_list else path)
        return self.place if self.spell is toml_path else f"{self.place} {spelled}"

    def problem(self, path: KeyPath, text: str) -> Problem:
        """Return a problem of the key at `path`, with where it was given."""
        return Problem(toml_path(path), text, self.given_as(path))

    def take_config_path(self) -> str | None:
        """Remove and return the path of the configuration file, which is no key of `Settings`."""
        path = self.source.init_kwargs.get("config")
        return self.source.init_kwargs.pop("config") if isinstance(path, str) else None


def _set_at(values: dict[str, Any], path: KeyPath, value: str) -> bool:
    """Store `value` at `path`. Return False if a section and a value would have the same name."""
    section: Any = values
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return False
    if isinstance(section.get(path[-1]), dict):
        return False
    section[path[-1]] = value
    return True


def take_flags(
    arguments: Sequence[str], *, undotted: bool = False, others: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Return the settings' flags, each with its value after an equals sign, and the rest.

    `--listen.port 6000` and `--listen.port=6000` are the same. A flag is one of the settings if it
    is --config, a section, or has a dot, and is none of `others`; with `undotted` every flag is
    one. What follows a switch is its value only if it is true, false or the like.
    """
    flags: list[str] = []
    left: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        name, equals, _ = argument.removeprefix("--").partition("=")
        is_flag = argument.startswith("--") and name and f"--{name}" not in others
        if not is_flag or not (undotted or "." in name or name in _UNDOTTED):
            left.append(argument)
        elif not equals and _has_value(split_path(name), rest):
            flags.append(f"{argument}={rest.popleft()}")
        else:
            flags.append(argument)
    return flags, left


def _has_value(path: KeyPath, rest: Sequence[str]) -> bool:
    """Return whether the argument after a flag without an equals sign is its value."""
    if not rest:
        return False
    key = key_at(path)
    if key and key.is_boolean:
        return rest[0].lower() in _SWITCH_VALUES
    return not rest[0].startswith("--")


def read_flags(argv: Sequence[str], problems: list[Problem]) -> Layer:
    """Read the flags of the settings; for a switch `--listen.allow_remote` is enough.

    A chosen name with a dot is quoted: `--databases."my.db" eu`.

    Unknown keys are kept, and validation reports them. Of a key given twice the last value counts.
    """
    values: dict[str, Any] = {}
    layer = Layer("flag", spell_flag, InitSettingsSource(Settings, {}))
    flags, others = take_flags(argv, undotted=True)
    if others:
        # Not shown: a stray argument may be a secret after a flag that takes no value.
        problems.append(Problem("arguments", "not all of them are flags"))
    for given in flags:
        name, equals, value = given.removeprefix("--").partition("=")
        path = split_path(name)
        key = key_at(path)
        if not equals and key and key.is_boolean:
            value = "true"
        elif not equals and (key or path == _CONFIG):
            problems.append(layer.problem(path, "needs a value"))
            continue
        if not _set_at(values, path, value):
            problems.append(layer.problem(path, "given both as a section and as a key"))
    layer.source.init_kwargs.update(values)
    _read_json(layer, problems)
    return layer


def _read_json(layer: Layer, problems: list[Problem]) -> None:
    """Replace JSON texts by their values, for the keys that have several values."""
    for path, text in list(_structured(layer)):
        inside = layer.find(path[:-1])
        assert isinstance(inside, dict)
        try:
            inside[path[-1]] = json.loads(text)
        except (ValueError, RecursionError) as error:
            # json's message has the position and the kind of the error, never the text.
            why = error if isinstance(error, json.JSONDecodeError) else "it is too large"
            problems.append(layer.problem(path, f"must be JSON: {why}"))
            del inside[path[-1]]


def _structured(layer: Layer) -> Iterator[tuple[KeyPath, str]]:
    """Yield the paths that have JSON in place of a table or a list, with the text."""
    aliases = layer.find(("databases",))
    if isinstance(aliases, str):
        yield ("databases",), aliases
    for section in ("databases", "shard_maps"):
        tables = layer.find((section,))
        for name, table in tables.items() if isinstance(tables, dict) else ():
            if section == "databases" and isinstance(table, str) and table.startswith("{"):
                yield (section, name), table
            for key, value in table.items() if isinstance(table, dict) else ():
                known = key_at((section, name, key))
                if known and known.is_json and isinstance(value, str):
                    yield (section, name, key), value


def _is_service_link(name: str, value: str) -> bool:
    return bool(_SERVICE_LINK.fullmatch(name)) or (name == "PORT" and "://" in value)


def read_environment(environ: Mapping[str, str], problems: list[Problem]) -> Layer:
    """Read variables such as `LAKEBASE_PROXY_LISTEN__PORT`; unknown keys are kept, as for flags.

    Names become lower case: `LAKEBASE_PROXY_TARGETS__EU__PORT` is `targets.eu.port`.
    """
    values: dict[str, Any] = {}
    layer = Layer("environment", spell_variable, InitSettingsSource(Settings, {}))
    for variable, value in environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or _is_service_link(name, value):
            continue
        path = tuple(name.lower().split(ENVIRONMENT_DELIMITER))
        if not _set_at(values, path, value):
            problems.append(layer.problem(path, "given both as a section and as a key"))
    layer.source.init_kwargs.update(values)
    _read_json(layer, problems)
    return layer


def config_file(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the file that `read_file` reads; empty without one."""
    by_flag = read_flags(argv, []).take_config_path()
    by_variable = read_environment(environ, []).take_config_path()
    name = by_variable if by_flag is None else by_flag
    return str(Path(name).expanduser()) if name else ""


def read_file(flags: Layer, environment: Layer, problems: list[Problem]) -> Layer:
    """Read the file that a flag names or, without such a flag, a variable."""
    by_flag, by_variable = flags.take_config_path(), environment.take_config_path()
    layer, name = (flags, by_flag) if by_flag is not None else (environment, by_variable)
    empty = Layer("file", toml_path, InitSettingsSource(Settings, {}))
    if not name:
        if by_flag is not None:
            problems.append(layer.problem(("config",), "must name a file"))
        return empty
    try:
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {name}")
        return Layer(f"file {name}", toml_path, TomlConfigSettingsSource(Settings, path))
    except (OSError, RuntimeError) as error:
        problems.append(layer.problem(("config",), f"cannot be read: {error}"))
    except ValueError as error:
        # tomllib's message has the line and the kind of the error, never the text.
        problems.append(layer.problem(("config",), f"{name} is not TOML: {error}"))
    return empty


# The SDK reads the first two, in this order, and OpenSSL the third. Where only one side's is set,
# both sides use it.
_SDK_CA_FILES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_OPENSSL_CA_FILES: Final = ("SSL_CERT_FILE",)
_CA_FILES: Final = (
    (_SDK_CA_FILES, _OPENSSL_CA_FILES, ("upstream", "ssl_root_cert")),
    (_OPENSSL_CA_FILES, _SDK_CA_FILES, ("workspace", "ssl_root_cert")),
)


def read_guide(environ: Mapping[str, str], overriding: Sequence[Layer]) -> Layer:
    """Read the variables of the Lakebase guide; an empty one counts as not set.

    They describe one database of one workspace. If the layers that take precedence, `overriding`,
    name another, keys that would mix the two are left out: no token may be sent to a host of
    another workspace.
    """
    values: dict[str, Any] = {}
    spelling: dict[KeyPath, str] = {}
    left_out = _keys_of_another_database(overriding)
    for variable, path in GUIDE_ENVIRONMENT.items():
        value = environ.get(variable)
        if value and path[-1] not in left_out:
            _set_at(values, path, value)
            spelling[path] = variable
    for variables, others, path in _CA_FILES:
        used = next(filter(environ.get, variables), None)
        if used is None or any(map(environ.get, others)):
            continue
        if Path(environ[used]).is_file():
            _set_at(values, path, environ[used])
            spelling[path] = used
    return Layer("environment", spelling.__getitem__, InitSettingsSource(Settings, values))


def _keys_of_another_database(overriding: Sequence[Layer]) -> frozenset[str]:
    """Return the keys of `[upstream]` that must not come from the guide's variables."""

    def given(key: str) -> bool:
        return any(layer.find(("upstream", key)) for layer in overriding)

    if given("workspace"):
        return frozenset(key for _, key in GUIDE_ENVIRONMENT.values())
    # Not for host and hostaddr: they only change how the same endpoint is reached.
    return frozenset(ADDRESS_KEYS) if given("endpoint") or given("instance") else frozenset()
