"""What `--print-config` prints: the effective values as TOML, each with its source.

For: a file that can be loaded again, and that shows where each value came from. Not for: the
example file, which shows defaults.

Invariant: a secret that is set is commented out and masked. Loaded again it is missing, not wrong.
"""

from collections.abc import Iterator
from typing import Final

from pydantic import SecretStr

from proxy.config.diff import effective_values
from proxy.config.loading import Configuration
from proxy.config.routing_sections import DatabaseAlias
from proxy.config.setting_keys import KeyPath
from proxy.config.toml import toml_key, toml_path, toml_value
from proxy.config.upstream_sections import not_inherited
from proxy.wire.secret import MASK

_HEAD: Final = "# The effective configuration, each value with its source. Secrets are left out."


def effective_toml(configuration: Configuration) -> str:
    """Return the effective values as TOML, which can be loaded again; secrets are left out."""
    lines = [_HEAD]
    header = ""
    for path, value in effective_values(configuration.settings):
        if toml_path(path[:-1]) != header:
            header = toml_path(path[:-1])
            lines += ["", f"[{header}]"]
        lines += _key(path, value, _source(configuration, path))
    return "\n".join(lines) + "\n"


def _key(path: KeyPath, value: object, source: str) -> Iterator[str]:
    name = toml_key(path[-1])
    match value:
        case None:  # a key without a default that is not set
            pass
        case SecretStr() if value.get_secret_value():
            yield f'# {name} = "{MASK}"  # {source}'
        case SecretStr():
            yield f'{name} = ""  # {source}'
        case DatabaseAlias(target=target, database=""):
            yield f"{name} = {toml_value(target)}  # {source}"
        case DatabaseAlias():
            yield f"{name} = {toml_value(value.model_dump())}  # {source}"
        case tuple() if value:
            yield f"{name} = [  # {source}"
            yield from (f"    {toml_value(entry.columns())}," for entry in value)
            yield "]"
        case _:
            yield f"{name} = {toml_value(value)}  # {source}"


def _source(configuration: Configuration, path: KeyPath) -> str:
    """Return the source of a value, on one line whatever the name of a file is."""
    source = configuration.source_of(path) or _inherited(configuration, path) or "default"
    return "".join(letter if letter.isprintable() else "?" for letter in source)


def _inherited(configuration: Configuration, path: KeyPath) -> str | None:
    """Return the source of a value that a target inherits."""
    if path[0] != "targets":
        return None
    _, name, key = path
    own = configuration.settings.targets[name].given()
    if key in not_inherited(dict(configuration.settings.upstream), own):
        return "default, because the target sets its own address"
    given = configuration.source_of(("upstream", key))
    return f"upstream.{toml_key(key)}, {given}" if given else None
