"""The places settings come from: flags, environment, TOML file, the Lakebase guide's variables.

For: turning each into a source that pydantic-settings merges, with how its user spells a key. Not
for: judging values.

Invariant: everything is read from the arguments; `os.environ` and `sys.argv` are not.

pydantic-settings has readers of its own. The TOML one is used. The command line's is not, because
argparse ends at the first error; the environment's is not, because it takes `os.environ` only and
overlooks unknown sections.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# The environment of the Lakebase guide, of AppKit and of Databricks Apps. Where two names stand
# for one key the later one wins. PGSSLMODE is left out on purpose: whatever it says is met by
# verify-full or would weaken it. DATABRICKS_* is left to the SDK.
GUIDE_ENVIRONMENT = {
    "LAKEBASE_ENDPOINT": ("upstream", "endpoint"),
    "ENDPOINT_NAME": ("upstream", "endpoint"),
    "PGHOST": ("upstream", "host"),
    "PGPORT": ("upstream", "port"),
    "PGDATABASE": ("upstream", "database"),
    "PGUSER": ("upstream", "user"),
}

# Kubernetes describes a Service called `lakebase-proxy` to every pod under our own prefix
# (service links). These are not ours, and a proxy that refused them would not start there.
_SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT)\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


@dataclass(frozen=True, slots=True)
class Layer:
    """What one place gave, and how a key is spelled there."""

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
        """Say where the key at `path` was given, and under which name if it is another there."""
        # What is inside a list has no name of its own but in the file.
        in_list = next((n for n in range(1, len(path)) if isinstance(self.find(path[:n]), list)), 0)
        spelled = self.spell(path[:in_list] if in_list else path)
        return self.place if self.spell is toml_path else f"{self.place} {spelled}"

    def problem(self, path: KeyPath, text: str) -> Problem:
        """Say what is wrong with the key at `path`, and where it was given under which name."""
        return Problem(toml_path(path), text, self.given_as(path))

    def take_config_path(self) -> str | None:
        """Remove and return the configuration file's path: it is no key of `Settings`."""
        path = self.source.init_kwargs.get("config")
        return self.source.init_kwargs.pop("config") if isinstance(path, str) else None


def _set_at(values: dict[str, Any], path: KeyPath, value: str) -> bool:
    """Store `value` at `path`; False where a section and a value would share one name."""
    section: Any = values
    for part in path[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            return False
    if isinstance(section.get(path[-1]), dict):
        return False
    section[path[-1]] = value
    return True


def read_flags(argv: Sequence[str], problems: list[Problem]) -> Layer:
    """Read `--listen.port 6000`, `--listen.port=6000` and, for a switch, `--listen.allow_remote`.

    A dot in a chosen name is quoted: `--databases."my.db" eu`.

    Unknown keys are kept, for validation to report. A key given twice has its last value.
    """
    values: dict[str, Any] = {}
    layer = Layer("flag", spell_flag, InitSettingsSource(Settings, {}))
    rest = deque(argv)
    before = "the verb"
    while rest:
        flag, equals, value = rest.popleft().partition("=")
        if not flag.startswith("--") or flag == "--":
            # Not shown: a stray argument may well be a secret behind a flag that took no value.
            problems.append(Problem("arguments", f"not a flag: the argument after {before}"))
            continue
        before = flag
        path = split_path(flag.removeprefix("--"))
        key = key_at(path)
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.popleft()
        elif not equals and key and key.is_boolean:
            value = "true"
        elif not equals and (key or path == ("config",)):
            problems.append(layer.problem(path, "needs a value"))
            continue
        if not _set_at(values, path, value):
            problems.append(layer.problem(path, "given both as a section and as a key"))
    layer.source.init_kwargs.update(values)
    _read_json(layer, problems)
    return layer


def _read_json(layer: Layer, problems: list[Problem]) -> None:
    """Put what JSON says in the place of its text, where a key has more than one value."""
    for path, text in list(_structured(layer)):
        inside = layer.find(path[:-1])
        assert isinstance(inside, dict)
        try:
            inside[path[-1]] = json.loads(text)
        except (ValueError, RecursionError) as error:
            # json names the place and the kind of mistake, never what stands there.
            why = error if isinstance(error, json.JSONDecodeError) else "it is too large"
            problems.append(layer.problem(path, f"must be JSON: {why}"))
            del inside[path[-1]]


def _structured(layer: Layer) -> Iterator[tuple[KeyPath, str]]:
    """Yield the places where JSON stands for a table or a list, with their text."""
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
    """Read `LAKEBASE_PROXY_LISTEN__PORT` and its like; unknown keys are kept, as for flags.

    A chosen name is in lower case: `LAKEBASE_PROXY_TARGETS__EU__PORT` is `targets.eu.port`.
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


def read_file(flags: Layer, environment: Layer, problems: list[Problem]) -> Layer:
    """Read the file that the flags or, without one there, the environment name."""
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
        # tomllib names the line and the kind of mistake, never what stands in the line.
        problems.append(layer.problem(("config",), f"{name} is not TOML: {error}"))
    return empty


def read_guide(environ: Mapping[str, str], overriding: Sequence[Layer]) -> Layer:
    """Read the Lakebase guide's own variables; an empty one counts as not set.

    They describe one database of one workspace. Where the layers `above` name another, what would
    make a mixture of the two is left out: no token may be sent to a host of another workspace.
    """
    values: dict[str, Any] = {}
    spelling: dict[KeyPath, str] = {}
    elsewhere = _keys_of_another_database(overriding)
    for variable, path in GUIDE_ENVIRONMENT.items():
        value = environ.get(variable)
        if value and path[-1] not in elsewhere:
            _set_at(values, path, value)
            spelling[path] = variable
    return Layer("environment", spelling.__getitem__, InitSettingsSource(Settings, values))


def _keys_of_another_database(overriding: Sequence[Layer]) -> frozenset[str]:
    """Return the keys of [upstream] that are of another place than the guide's variables are."""

    def given(key: str) -> bool:
        return any(layer.find(("upstream", key)) for layer in overriding)

    if given("workspace"):
        return frozenset(key for _, key in GUIDE_ENVIRONMENT.values())
    # Not host and hostaddr: whoever sets only these says how the same endpoint is reached.
    return frozenset(ADDRESS_KEYS) if given("endpoint") or given("instance") else frozenset()
