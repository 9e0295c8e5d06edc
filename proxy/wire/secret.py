"""A value that must never be displayed: a token, a password, a cancel key.

This is not encryption: the bytes are in memory in the clear. The class ensures that a log line, a
traceback, an f-string or a `repr` of an object that holds a secret contains only a mask.
"""

from typing import Final, final

# What stands for a secret wherever a person may see it: in a repr, a log line, --print-config. The
# configuration refuses it as a value.
MASK: Final = "********"


@final
class Secret:
    """Bytes that only `reveal` returns; equality is by value, for tests and lookups."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Return the bytes. Call it only where they are sent over the network."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({MASK})"

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __len__(self) -> int:
        return len(self._value)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a Secret is never pickled")
