"""Writing TOML, which the standard library can only read.

For: a key or a value as TOML. Not for: whole documents.

Invariant: reading the written text gives the same value, whatever characters it contains.
"""

import json
import re
from collections.abc import Mapping, Sequence

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PART = re.compile(r'("(?:[^"\\]|\\["\\bfnrt]|\\u[0-9A-Fa-f]{4})*")|([^."]+)')


def toml_key(part: str) -> str:
    """Return one part of a key: bare if TOML allows it, else in quotes."""
    return part if _BARE.fullmatch(part) else _text(part)


def toml_path(path: Sequence[str]) -> str:
    """Return the path of a key, as in `targets.eu.port` or `databases."my.db"`."""
    return ".".join(map(toml_key, path))


def split_path(dotted: str) -> tuple[str, ...]:
    """Split a path at the dots that are not in quotes. Any text is accepted."""
    if '"' not in dotted:
        return tuple(dotted.split("."))
    return tuple(
        json.loads(quoted, strict=False) if quoted else bare
        for quoted, bare in _PART.findall(dotted)
    )


def toml_value(value: object) -> str:
    """Return a string, a number, a boolean, a list or an inline table as TOML."""
    match value:
        case str():
            return _text(value)
        case bool() | int():
            return json.dumps(value)
        case float():
            return str(int(value)) if value.is_integer() else repr(value)
        case Mapping():
            inside = ", ".join(f"{toml_key(key)} = {toml_value(one)}" for key, one in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case Sequence():
            return f"[{', '.join(map(toml_value, value))}]"
    raise TypeError(f"TOML has no {type(value).__name__}")


def _text(value: str) -> str:
    # JSON's escapes are TOML's, with two exceptions: JSON has none for DEL, and two for a character
    # beyond 16 bits, so other characters are not escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
