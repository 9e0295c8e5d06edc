"""pydantic's validation errors as problems, with the sources of the keys.

For: a sentence for each problem, with the key as it was spelled, and the nearest known key for an
unknown one. Not for: finding problems.

Invariant: a sentence contains no value of a secret, and none of an unknown key.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Final

from pydantic_core import ErrorDetails

from proxy.config.config_errors import Problem
from proxy.config.routing_sections import MappingEntry
from proxy.config.setting_keys import KeyPath, key_at, named_keys, settings_keys, spell_flag
from proxy.config.settings import Settings
from proxy.config.sources import Layer
from proxy.config.toml import toml_path

# Enough of a value to recognise it in an error message.
_SHOWN_CHARACTERS_MAX: Final = 80

_UNKNOWN: Final = ("extra_forbidden", "unexpected_keyword_argument")
_ENTRY_COLUMNS: Final = [field.name for field in fields(MappingEntry)]
# The end of pydantic's location for an error in a chosen name.
_NAME_MARK: Final = "[key]"


def problems_of(error: ErrorDetails, layers: Sequence[Layer]) -> Iterator[Problem]:
    """Yield the problems of one pydantic error. An unknown key is one in each of its sources."""
    path = tuple(str(part) for part in error["loc"])
    if len(path) > 2 and path[-1] == _NAME_MARK:
        path = path[:-1]
    # A missing key is missing in its table.
    found = path[:-1] if error["type"] == "missing" else path
    givers = [layer for layer in layers if layer.find(found) is not None]
    if not givers and path[0] == "databases":
        path = path[:2]  # an alias that is not a table
        givers = [layer for layer in layers if layer.find(path) is not None]
    if error["type"] in _UNKNOWN:
        for layer in givers:
            for unknown in _leaves(path, layer.find(path)):
                yield layer.problem(unknown, _unknown_key(unknown, layer))
        return
    text = _sentence(error)
    if not givers:
        yield Problem(toml_path(path), text)
        return
    if error["type"] == "missing":
        yield givers[-1].problem(path, text)  # the file, if the table is there
        return
    key = key_at(path)
    shown = key is not None and not key.is_secret and not key.is_json
    value = repr(givers[0].find(path))[:_SHOWN_CHARACTERS_MAX]
    shown = shown and "@" not in value  # a password may stand before it, as in a URL
    yield givers[0].problem(path, f"{text}, not {value}" if shown else text)


def likely_flags(flag: str) -> list[str]:
    """Return the settings' flags that a flag without a section was probably intended as."""
    return [spell_flag(key) for key in _likely_keys((flag.removeprefix("--"),), is_table=False)]


def _sentence(error: ErrorDetails) -> str:
    match error["type"]:
        case "missing":
            return "required"
        case "dataclass_type":
            return "must be a table such as { low, high, target } or { key, target }"
        case "tuple_type":
            return "must be a list of tables"
        case "model_type":
            return "must be a name or a table such as { target, database }"
        case _:
            text = error["msg"].removeprefix("Value error, ")
            text = text.replace("Input should be", "must be", 1)
            return text.partition(", unable to")[0]


def _leaves(path: KeyPath, value: object) -> Iterator[KeyPath]:
    """Yield the keys below `path`: for an unknown section each of its keys is reported."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves((*path, name), inner)
    else:
        yield path


def _unknown_key(path: KeyPath, layer: Layer) -> str:
    if path[0] == "shard_maps" and len(path) > 3:  # inside an entry
        spelled = difflib.get_close_matches(path[-1], _ENTRY_COLUMNS, n=1)
    else:
        is_table = isinstance(layer.find(path), dict)
        spelled = [layer.spell(meant) for meant in _likely_keys(path, is_table=is_table)]
    return "unknown key" + (f"; did you mean {' or '.join(spelled)}?" if spelled else "")


def _likely_keys(path: KeyPath, *, is_table: bool) -> list[KeyPath]:
    """Return the keys that were probably intended."""
    known = {".".join(key): key for key in _candidates(path, is_table=is_table)}
    dotted = ".".join(path).lower().replace("-", "_")
    name = dotted.rpartition(".")[2]
    # A key without its section, or in a wrong one, is more likely than a typing error.
    return (
        [key for key in known.values() if key[-1] == name]
        or [known[near] for near in difflib.get_close_matches(dotted, known, n=1)]
        or [key for key in known.values() if difflib.get_close_matches(name, [key[-1]])]
    )


def _candidates(path: KeyPath, *, is_table: bool) -> Iterator[KeyPath]:
    """Yield the known keys that `path` could have been intended as, with its chosen name if any.

    Sections are included for an empty table only: a value cannot have been intended as a section.
    The section of aliases is always included, because it can be given as JSON.
    """
    if len(path) < 3:
        yield from ((name,) for name in Settings.model_fields if is_table or name == "databases")
        yield from (key.path for key in settings_keys())
    else:
        yield from ((key.path[0], path[1], key.name) for key in named_keys())
