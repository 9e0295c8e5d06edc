"""Writing TOML, which the standard library only reads.

For: one key or one value as TOML. Not for: what is written where.

Invariant: reading what is written gives the value back, whatever characters are in it.
"""

import json
import re
from collections.abc import Mapping, Sequence

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PART = re.compile(r'("(?:[^"\\]|\\["\\bfnrt]|\\u[0-9A-Fa-f]{4})*")|([^."]+)')


def toml_key(part: str) -> str:
    """Write one part of a key: bare where TOML allows it, else in quotes."""
    return part if _BARE.fullmatch(part) else _text(part)


def toml_path(path: Sequence[str]) -> str:
    """Write a key's whole path, as in `targets.eu.port` or `databases."my.db"`."""
    return ".".join(map(toml_key, path))


def split_path(dotted: str) -> tuple[str, ...]:
    """Split a path at its dots, but for those in quotes; a path that was not written so, too."""
    if '"' not in dotted:
        return tuple(dotted.split("."))
    return tuple(
        json.loads(quoted, strict=False) if quoted else bare
        for quoted, bare in _PART.findall(dotted)
    )


def toml_value(value: object) -> str:
    """Write a string, a number, a boolean, a list or an inline table."""
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
    # JSON's escapes are TOML's, but for two: JSON needs none for DEL, and writes a character
    # beyond 16 bits as two escapes, so characters are left as they are.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
