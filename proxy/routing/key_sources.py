"""Finding the shard key in a StartupMessage, and removing it.

Not for parsing the keys (`keys`) or comparing them (`router`): every occurrence is returned,
unparsed. `options` is parsed as PostgreSQL parses it (`wire.options`).

Invariant: each parameter that stays, and each word of `options` that stays, is byte for byte what
the client sent; where words were removed, one space separates the remaining ones.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final, Self

from proxy.wire.options import OPTIONS, Setting, appended, take_settings
from proxy.wire.startup import StartupMessage

# Always read, in addition to the configured name. PostgreSQL accepts a dotted name as a custom
# setting, so a client with this name in its options can also connect without the proxy.
# `forward_key` sends the key to the upstream under this name.
BUILT_IN_PARAMETER: Final = b"lakebase.shard_key"

_DATABASE: Final = b"database"
_DATABASE_FIELD: Final = "{database}"
_KEY_FIELD: Final = "{shard_key}"


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A shard key as the client sent it, and a description of where it was found."""

    source: str
    text: bytes

    def __repr__(self) -> str:
        """Return the source only: keys must not be logged."""
        return f"Occurrence({self.source!r})"


def take_parameters(
    message: StartupMessage, names: AbstractSet[bytes]
) -> tuple[list[Occurrence], StartupMessage]:
    """Return the keys under these lower-case names, and the message without them.

    Both startup parameters and `options` are searched, the latter in every spelling.
    """
    found, message = take_settings(message, names)
    return [
        Occurrence("options" if where == OPTIONS else "startup parameter", text)
        for where, text in found
    ], message


def with_database(message: StartupMessage, database: bytes | None) -> StartupMessage:
    """Return the message with this database, or without a database."""
    kept = [(name, value) for name, value in message.parameters if name != _DATABASE]
    if database is not None:
        kept.append((_DATABASE, database))
    return replace(message, parameters=tuple(kept))


def with_forwarded_key(message: StartupMessage, text: bytes) -> StartupMessage:
    """Return the message with the key as the last setting in `options`."""
    options = appended(message.get(OPTIONS) or b"", [Setting(BUILT_IN_PARAMETER, text)])
    kept = [(name, value) for name, value in message.parameters if name != OPTIONS]
    return replace(message, parameters=(*kept, (OPTIONS, options)))


@dataclass(frozen=True, slots=True)
class DatabasePattern:
    """A template for database names that contain a shard key, with fixed text around its fields."""

    prefix: bytes
    separator: bytes
    suffix: bytes
    has_database: bool
    is_key_first: bool

    @classmethod
    def parse(cls, template: str) -> Self:
        """Parse a template such as `{database}@{shard_key}`; `{database}` is optional.

        Raises ValueError with a text that completes "the template ...".
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

        Either may be empty. With a template without `{database}`, the database is empty.
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
