"""Where a StartupMessage names its shard key, and the message without it.

Not for what the texts mean (`keys`) or which of them counts (`router`): every occurrence comes
out, unparsed. `options` is read as PostgreSQL reads it (`wire.options`).

Invariant: each parameter, and each word of `options`, that stays is byte for byte what the client
wrote; where words were taken out, one blank is between those that stay.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final, Self

from proxy.wire.options import Setting, appended, settings, without
from proxy.wire.startup import StartupMessage

# Beside the configured bare name this one is always read: PostgreSQL takes a dotted name as a
# setting of its own, so that a client with this in its options can also connect without the proxy.
# It is also the name under which `forward_key` sends the key on.
BUILT_IN_PARAMETER: Final = b"lakebase.shard_key"

_OPTIONS: Final = b"options"
_DATABASE: Final = b"database"
_DATABASE_FIELD: Final = "{database}"
_KEY_FIELD: Final = "{shard_key}"


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A shard key as the client wrote it, and where, in words."""

    source: str
    text: bytes

    def __repr__(self) -> str:
        """Return the place only: a key is in no log."""
        return f"Occurrence({self.source!r})"


def take_parameters(
    message: StartupMessage, names: AbstractSet[bytes]
) -> tuple[list[Occurrence], StartupMessage]:
    """Return the keys under these lower-case names, and the message without them.

    They stand as parameters and in `options`, in any of the latter's spellings. Names compare
    case-insensitively, as PostgreSQL's settings do (W19); of a repeated one all count.
    """
    found: list[Occurrence] = []
    kept: list[tuple[bytes, bytes]] = []
    for name, value in message.parameters:
        if name.lower() in names:
            found.append(Occurrence("startup parameter", value))
        elif name == _OPTIONS:
            inside = [one.value for one in settings(value) if one.name.lower() in names]
            found += [Occurrence("options", text) for text in inside]
            rest = without(value, names) if inside else value
            if rest or not inside:
                kept.append((name, rest))
        else:
            kept.append((name, value))
    return found, replace(message, parameters=tuple(kept))


def with_database(message: StartupMessage, database: bytes | None) -> StartupMessage:
    """Return the message with this database, or with none."""
    kept = [(name, value) for name, value in message.parameters if name != _DATABASE]
    if database is not None:
        kept.append((_DATABASE, database))
    return replace(message, parameters=tuple(kept))


def with_forwarded_key(message: StartupMessage, text: bytes) -> StartupMessage:
    """Return the message with the key as a setting behind all others in `options`."""
    options = appended(message.get(_OPTIONS) or b"", [Setting(BUILT_IN_PARAMETER, text)])
    kept = [(name, value) for name, value in message.parameters if name != _OPTIONS]
    return replace(message, parameters=(*kept, (_OPTIONS, options)))


@dataclass(frozen=True, slots=True)
class DatabasePattern:
    """How a database's name holds a shard key: a template with fixed text around its fields."""

    prefix: bytes
    separator: bytes
    suffix: bytes
    has_database: bool
    is_key_first: bool

    @classmethod
    def parse(cls, template: str) -> Self:
        """Read a template such as `{database}@{shard_key}`; `{database}` may be left out.

        Raises ValueError, with a sentence about the template.
        """
        fields = [_KEY_FIELD, _DATABASE_FIELD] if _DATABASE_FIELD in template else [_KEY_FIELD]
        fields.sort(key=template.find)
        if any(template.count(field) != 1 for field in fields):
            raise ValueError(f"must contain {_KEY_FIELD} once and {_DATABASE_FIELD} at most once")
        prefix, _, rest = template.partition(fields[0])
        separator, _, suffix = rest.rpartition(fields[-1]) if len(fields) > 1 else ("", "", rest)
        if any(brace in prefix + separator + suffix for brace in "{}"):
            raise ValueError(f"must have no fields but {_KEY_FIELD} and {_DATABASE_FIELD}")
        if "\0" in template:
            raise ValueError("must not contain NUL")
        if len(fields) > 1 and not separator:
            raise ValueError("must have a text between its fields, to tell them apart")
        if not prefix + separator + suffix:
            raise ValueError("must have a fixed text, or every name would be a shard key")
        return cls(
            prefix.encode(),
            separator.encode(),
            suffix.encode(),
            has_database=len(fields) > 1,
            is_key_first=fields[0] == _KEY_FIELD,
        )

    def split(self, name: bytes) -> tuple[bytes, Occurrence] | None:
        """Return a name's database and key, split at the first separator; None if it has no key.

        Either may be empty. A template without `{database}` gives an empty one.
        """
        end = len(name) - len(self.suffix)
        if not (name.startswith(self.prefix) and name.endswith(self.suffix)):
            return None
        if end < len(self.prefix):  # they overlap
            return None
        middle = name[len(self.prefix) : end]
        if not self.has_database:
            return b"", Occurrence("database name", middle)
        first, separator, second = middle.partition(self.separator)
        if not separator:
            return None
        database, key = (second, first) if self.is_key_first else (first, second)
        return database, Occurrence("database name", key)
